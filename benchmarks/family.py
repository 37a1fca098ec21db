"""The family beside its peers, jax.nn and, where it is installed, distrax."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import jsoftmax as js
from benchmarks import measure
from benchmarks.measure import Case, F, normal


def vjp(f: F) -> F:
    return lambda z, g: jax.vjp(f, z)[1](g)[0]


def value_and_vjp(f: F) -> F:
    def both(z: jax.Array, g: jax.Array) -> Any:
        value, pull = jax.vjp(f, z)
        return value, pull(g)

    return both


def hvp(f: F) -> F:
    def product(z: jax.Array, g: jax.Array, v: jax.Array) -> Any:
        return jax.jvp(lambda z: jax.vjp(f, z)[1](g)[0], (z,), (v,))[1]

    return product


def total(f: F) -> F:
    return lambda z: jnp.sum(f(z))


def plain_entropy(z: jax.Array) -> jax.Array:
    """−Σ p log p, as it is usually written."""
    return -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z), -1)


def distrax_entropy() -> F | None:
    try:
        import distrax  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  (a peer)
    except ImportError:
        return None
    return lambda z: distrax.Categorical(logits=z).entropy()


MAPS: dict[str, tuple[F, F]] = {
    "softmax": (js.softmax, jax.nn.softmax),
    "log_softmax": (js.log_softmax, jax.nn.log_softmax),
    "log_normalizer": (js.log_normalizer, lambda z, axis=-1: jax.nn.logsumexp(z, axis)),
}


def map_cases() -> list[Case]:
    cases = []
    for shape in ((1024, 1024), (256, 32768), (1_000_000, 8), (16384, 64), (4096, 1000)):
        for name, (ours, peer) in MAPS.items():
            z, v = normal(0, shape), normal(2, shape)
            g = normal(1, jax.eval_shape(ours, z).shape)
            forms = {
                name: (lambda f: f, (z,)),
                f"{name}, vjp": (vjp, (z, g)),
                f"{name}, value and vjp": (value_and_vjp, (z, g)),
                f"{name}, HVP": (hvp, (z, g, v)),
            }
            for label, (form, arguments) in forms.items():
                cases.append(Case("maps", label, shape, {"ours": form(ours), "jax.nn": form(peer)}, arguments))
    z = normal(0, (1024, 1024))
    for name, (ours, peer) in MAPS.items():
        candidates = {"ours": jax.vmap(ours), "jax.nn": jax.vmap(peer)}
        cases.append(Case("maps", f"{name}, vmapped rows", z.shape, candidates, (z,)))
    for name, (ours, peer) in MAPS.items():
        first = {"ours": functools.partial(ours, axis=0), "jax.nn": functools.partial(peer, axis=0)}
        cases.append(Case("maps", f"{name}, axis=0", (8, 1_000_000), first, (normal(0, (8, 1_000_000)),)))
        narrow = normal(0, (64, 131072), "bfloat16")
        cases.append(Case("maps", name, narrow.shape, {"ours": ours, "jax.nn": peer}, (narrow,), "bfloat16"))
    return cases


def entropy_cases() -> list[Case]:
    candidates = {"ours": js.entropy, "jax.nn": plain_entropy}
    if peer := distrax_entropy():
        candidates["distrax"] = peer
    cases = []
    for shape in ((1024, 1024), (256, 32768), (1_000_000, 8), (4096, 1000)):
        z = normal(0, shape)
        cases.append(Case("entropy", "entropy", shape, candidates, (z,)))
        both = {name: jax.value_and_grad(total(f)) for name, f in candidates.items()}
        cases.append(Case("entropy", "entropy, value and gradient", shape, both, (z,)))
    shape = (64, 32768)
    products = {name: hvp(f) for name, f in candidates.items() if name != "distrax"}
    arguments = (normal(0, shape), jnp.ones(64), normal(1, shape))
    cases.append(Case("entropy", "entropy, HVP", shape, products, arguments))
    return cases


def dense_cases() -> list[Case]:
    z, small = normal(0, (1024,)), normal(0, (64,))
    hessian = {
        "ours": lambda z: js.entropy_hessian(z).as_matrix(),
        "jax.hessian": jax.hessian(plain_entropy),
        "writing": lambda z: jnp.broadcast_to(z, (1024, 1024)) + 1,
    }
    tensor = {
        "ours": js.softmax_second_derivative,
        "jax.hessian": jax.hessian(jax.nn.softmax),
        "writing": lambda z: jnp.broadcast_to(z, (64, 64, 64)) + 1,
    }
    return [
        Case("dense", "entropy Hessian", z.shape, hessian, (z,)),
        Case("dense", "softmax second derivatives", small.shape, tensor, (small,)),
    ]


def limit_cases() -> list[Case]:
    """What the machine can do at best, measured by programs that contain nothing of ours."""
    cases = []
    for shape in ((1024, 1024), (256, 32768), (1_000_000, 8)):
        z = normal(0, shape)
        candidates: dict[str, F] = {
            "copy": lambda z: z + 1,
            "exp": jnp.exp,
            "sum": lambda z: jnp.sum(z, -1),
            "sum of exp": lambda z: jnp.sum(jnp.exp(z), -1),
        }
        cases.append(Case("limits", "limits", shape, candidates, (z,)))
    return cases


def run(output: pathlib.Path) -> None:
    measure.run([*map_cases(), *entropy_cases(), *dense_cases(), *limit_cases()], output)
