"""Draws, relaxed samples and truncated laws beside jax.random, a sort, numpyro and, where it is installed, PyTorch."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.measure import Case, F, normal
from jsoftmax import gumbel, truncate

KEY = jax.random.key(0)
BIG, ROW, DRAWS, FEW = (64, 131_072), (50_000,), 1_000_000, 2_000


def torch_calls(z: jax.Array) -> dict[str, F]:
    """PyTorch's functions by name; none if it is not installed."""
    torch = measure.torch()
    if torch is None:
        return {}
    x = torch.tensor(np.asarray(z))
    p = torch.softmax(x, -1)

    def perturbed() -> Any:
        return x - torch.empty_like(x).exponential_().log()

    return {
        "multinomial": lambda: torch.multinomial(torch.softmax(x, -1), 1, replacement=True),
        "argmax": lambda: perturbed().argmax(-1),
        "gumbel_softmax": lambda: torch.nn.functional.gumbel_softmax(x, 0.5),
        "top_k": lambda: perturbed().topk(11, -1),
        "many": lambda: torch.multinomial(p, DRAWS, replacement=True),
        "few": lambda: torch.multinomial(p, FEW, replacement=True),
    }


def numpyro_categorical() -> F | None:
    try:
        from numpyro import distributions  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  (a peer)
    except ImportError:
        return None
    return lambda z: distributions.Categorical(logits=z).sample(KEY)


def top_k_by_sort(z: jax.Array, k: int) -> jax.Array:
    """What a user would write for `truncate(z, top_k=k)`."""
    return jnp.where(z >= jnp.sort(z, -1)[..., -k, None], z, -jnp.inf)


def top_p_by_sort(z: jax.Array, p: float) -> jax.Array:
    """What a user would write for `truncate(z, top_p=p)`."""
    ordered = jnp.sort(z, -1, descending=True)
    probabilities = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    least = jnp.min(jnp.where(before < p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(z >= least, z, -jnp.inf)


def cases() -> list[Case]:
    z, row = normal(0, BIG), normal(0, ROW)
    of_rows, of_row = torch_calls(z), torch_calls(row)

    def only(calls: dict[str, F], **names: str) -> dict[str, F]:
        return {label: calls[name] for label, name in names.items() if name in calls}

    one = {"ours": lambda z: gumbel.categorical(KEY, z), "jax.random": lambda z: jax.random.categorical(KEY, z)}
    if peer := numpyro_categorical():
        one["numpyro"] = peer

    def noise(z: jax.Array) -> jax.Array:
        return z + jax.random.gumbel(KEY, z.shape)

    relaxed = {
        "ours": lambda z: gumbel.gumbel_softmax(KEY, z, 0.5),
        "jax.random": lambda z: jax.nn.softmax(noise(z) / 0.5),
    }
    top = {"ours": lambda z: gumbel.gumbel_top_k(KEY, z, 10), "jax.random": lambda z: jax.lax.top_k(noise(z), 11)}
    few = {
        "ours": lambda z: gumbel.categorical(KEY, z, shape=(FEW,)),
        "jax.random": lambda z: jax.random.categorical(KEY, z, shape=(FEW,)),
    }
    many: dict[str, F] = {"ours": lambda z: gumbel.categorical(KEY, z, shape=(DRAWS,))}

    def case(name: str, scores: jax.Array, candidates: dict[str, F], calls: dict[str, F]) -> Case:
        return Case("gumbel", name, scores.shape, candidates, (scores,), calls=calls)

    few_classes = {"ours": lambda z: truncate(z, top_k=50), "sort": lambda z: top_k_by_sort(z, 50)}
    mass = {"ours": lambda z: truncate(z, top_p=0.9), "sort": lambda z: top_p_by_sort(z, 0.9)}
    return [
        case("one draw a row", z, one, only(of_rows, torch="multinomial", **{"torch argmax": "argmax"})),
        case("gumbel_softmax", z, relaxed, only(of_rows, torch="gumbel_softmax")),
        case("top 10 of Gumbel", z, top, only(of_rows, torch="top_k")),
        case(f"{FEW:,} draws of one row", row, few, only(of_row, torch="few")),
        case(f"{DRAWS:,} draws of one row", row, many, only(of_row, torch="many")),
        case("truncate, top_k=50", z, few_classes, {}),
        case("truncate, top_p=0.9", z, mass, {}),
    ]


def run(output: pathlib.Path) -> None:
    made = cases()
    measure.run(made, output)
    for case in made:  # what the programs need beside their arguments
        for name, f in case.candidates.items():
            memory: Any = jax.jit(f).lower(*case.arguments).compile().memory_analysis()
            total = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
            print(f"{case.name:32} {name:12} {total:8.1f} MiB of temporaries and results")
