"""Programs compiled for an H100 and a TPU v5e, which need not be there: kernels, traffic, temporaries, beside peers.

`python -m benchmarks programs --device h100` or `--device v5e` writes `benchmarks/results/programs-<device>.json`, and
`python -m benchmarks --render` the table of `benchmarks/programs.md`. These are counts (`benchmarks.hlo`): nothing is
timed, and every machine gives the same.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import jsoftmax as js
from benchmarks import attention, hlo
from benchmarks.family import plain_entropy
from benchmarks.gumbel import top_k_by_sort, top_p_by_sort
from benchmarks.heads import hessian_product
from jsoftmax import gumbel, heads, losses
from jsoftmax.heads import adaptive

F = Callable[..., Any]

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84978434048
}
"""
"""What XLA asks of a GPU before it compiles for it."""

NEEDS = {"h100": "jsoftmax[programs-h100]", "v5e": "jsoftmax[programs-tpu]"}
SHAPES = ((1024, 1024), (256, 32768), (1_000_000, 8), (4096, 1000), (4096, 1500))
DTYPES = ("float32", "bfloat16")


def configure() -> None:
    """Prepares the environment for a compiler that is named explicitly and need not find its device."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")


def missing(kind: str, error: Exception, extra: str) -> str:
    """The message if a compiler is not installed."""
    return (
        f"programs: XLA's compiler for {kind} is missing here ({type(error).__name__}: {str(error)[:200]}).\n"
        f"In an environment of its own: pip install '{extra}', in the version of jax {jax.__version__}."
    )


def device(kind: str) -> Any:
    """A device to compile for, or a message that says what is missing."""
    configure()
    try:
        if kind == "h100":
            described = topologies.get_topology_desc("h100", "cuda", topology="1x1x1", target_config=H100)
        else:
            described = topologies.get_topology_desc("v5e:2x2", "tpu", chips_per_host_bounds=(2, 2, 1), num_slices=1)
    except Exception as error:
        sys.exit(missing(kind, error, NEEDS[kind]))
    return described.devices[0]


# --- what is compared ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of scores and of the arrays that `more` makes for their shape and dtype. peer: what a user would
    write."""

    name: str
    ours: F
    peer: F | None = None
    more: Callable[[tuple[int, ...], Any], tuple[Any, ...]] = lambda shape, dtype: ()
    modes: tuple[str, ...] = ("value", "value and vjp", "HVP")


def labels(shape: tuple[int, ...], _: Any) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct(shape[:-1], jnp.int32),)


def like_scores(shape: tuple[int, ...], dtype: Any) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct(shape, dtype),)


def key(*_: Any) -> tuple[Any, ...]:
    return (jax.ShapeDtypeStruct((2,), jnp.uint32),)


def plain_jensen_shannon(z_p: jax.Array, z_q: jax.Array) -> jax.Array:
    """Σ p (log p − log m) / 2 + Σ q (log q − log m) / 2, m = (p + q) / 2."""
    log_p, log_q = jax.nn.log_softmax(z_p), jax.nn.log_softmax(z_q)
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0).astype(log_p.dtype)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_m) + jnp.exp(log_q) * (log_q - log_m), -1) / 2


def plain_kl(z_p: jax.Array, z_q: jax.Array) -> jax.Array:
    log_p, log_q = jax.nn.log_softmax(z_p), jax.nn.log_softmax(z_q)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def plain_taylor(z: jax.Array) -> jax.Array:
    phi = 1 + z + z**2 / 2
    return phi / jnp.sum(phi, -1, keepdims=True)


def plain_smoothing(z: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype), 0.1))


def made(z: jax.Array) -> jax.Array:
    """Scores as programs make them: of logits read as float32, with a temperature."""
    return z.astype(jnp.float32) / 0.7


def plain_gumbel_softmax(z: jax.Array, key: jax.Array) -> jax.Array:
    return jax.nn.softmax((z + jax.random.gumbel(key, z.shape, z.dtype)) / 0.5)


def plain_gumbel_top_k(z: jax.Array, key: jax.Array) -> Any:
    perturbed = jax.nn.log_softmax(z) + jax.random.gumbel(key, z.shape, z.dtype)
    best, indices = jax.lax.top_k(perturbed, min(9, z.shape[-1]))
    return indices[..., :8], best[..., :8], best[..., -1]


CASES = (
    Case("softmax", js.softmax, jax.nn.softmax),
    Case("log_softmax", js.log_softmax, jax.nn.log_softmax),
    Case("log_normalizer", js.log_normalizer, lambda z: jax.nn.logsumexp(z, -1)),
    Case("entropy", js.entropy, plain_entropy),
    Case("kl_divergence", js.kl_divergence, plain_kl, like_scores),
    Case("jensen_shannon_divergence", js.jensen_shannon_divergence, plain_jensen_shannon, like_scores),
    Case("softmax, taylor(2)", lambda z: js.softmax(z, phi=js.taylor(2)), plain_taylor),
    Case("cross_entropy", losses.cross_entropy, optax.softmax_cross_entropy_with_integer_labels, labels),
    Case(
        "cross_entropy, smoothing",
        lambda z, y: losses.cross_entropy(z, y, label_smoothing=0.1),
        plain_smoothing,
        labels,
    ),
    Case("softmax of float32(z) / 0.7", lambda z: js.softmax(made(z)), lambda z: jax.nn.softmax(made(z))),
    Case("entropy of float32(z) / 0.7", lambda z: js.entropy(made(z)), lambda z: plain_entropy(made(z))),
    Case(
        "cross_entropy of float32(z) / 0.7",
        lambda z, y: losses.cross_entropy(made(z), y),
        lambda z, y: optax.softmax_cross_entropy_with_integer_labels(made(z), y),
        labels,
    ),
    Case("sparsemax", js.sparsemax),
    Case("entmax15", js.entmax15),
    Case(
        "gumbel.categorical",
        lambda z, key: gumbel.categorical(key, z),
        lambda z, key: jax.random.categorical(key, z),
        key,
        ("value",),
    ),
    Case(
        "gumbel.gumbel_softmax",
        lambda z, key: gumbel.gumbel_softmax(key, z, 0.5),
        plain_gumbel_softmax,
        key,
        ("value",),
    ),
    Case(
        "gumbel.gumbel_top_k",
        lambda z, key: gumbel.gumbel_top_k(key, z, min(8, z.shape[-1])),
        plain_gumbel_top_k,
        key,
        ("value",),
    ),
    Case(
        "truncate, top_k",
        lambda z: js.truncate(z, top_k=min(50, z.shape[-1])),
        lambda z: top_k_by_sort(z, min(50, z.shape[-1])),
        modes=("value",),
    ),
    Case(
        "truncate, top_p",
        lambda z: js.truncate(z, top_p=0.9),
        lambda z: top_p_by_sort(z, 0.9),
        modes=("value",),
    ),
)


TOKENS, FEATURES, CLASSES = 8192, 2048, 131072
HEADS = {
    "ours, linear_cross_entropy": heads.linear_cross_entropy,
    "ours, linear_cross_entropy_sum": heads.linear_cross_entropy_sum,
    "ours, linear_statistics": lambda h, W, y: sum(jnp.sum(a) for a in heads.linear_statistics(h, W, y)[:3]),
    "optax, all logits in float32": lambda h, W, y: optax.softmax_cross_entropy_with_integer_labels(
        jnp.matmul(h, W.T, preferred_element_type=jnp.float32), y
    ),
    "optax, all logits in bfloat16": lambda h, W, y: optax.softmax_cross_entropy_with_integer_labels(h @ W.T, y),
}
"""Losses of a language model's last layer, whose value and gradients are taken."""


def total(f: F) -> F:
    """The sum of a loss over the tokens."""
    return lambda h, W, y: jnp.sum(f(h, W, y), dtype=jnp.float32)


def value_and_gradients(f: F) -> F:
    """Value and gradients of that sum, by hidden and weight."""
    return jax.value_and_grad(total(f), (0, 1))


def in_mode(f: F, mode: str, z: Any, more: tuple[Any, ...]) -> tuple[F, tuple[Any, ...]]:
    """The function that is compiled, and its arguments: z, further arrays, a cotangent and a tangent."""
    if mode == "value":
        return f, (z, *more)
    cotangent = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), jax.eval_shape(f, z, *more))

    def value_and_vjp(z: Any, g: Any, *more: Any) -> Any:
        value, pull = jax.vjp(lambda z: f(z, *more), z)
        return value, *pull(g)

    def hvp(z: Any, g: Any, v: Any, *more: Any) -> Any:
        return jax.jvp(lambda z: jax.vjp(lambda z: f(z, *more), z)[1](g)[0], (z,), (v,))[1]

    return (hvp, (z, cotangent, z, *more)) if mode == "HVP" else (value_and_vjp, (z, cotangent, *more))


def compiled(where: Any, f: F, given: tuple[Any, ...]) -> hlo.Program:
    """The counts of f, compiled for the device."""
    place = jax.sharding.SingleDeviceSharding(where)
    placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), given)
    return hlo.read(jax.jit(f).lower(*placed).compile())


def cells(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[tuple[Case, str, tuple[int, ...], str]]:
    """Every case in each of its modes; in bfloat16 for more than 1,000 classes."""
    return [
        (case, mode, shape, dtype)
        for case, dtype, shape in itertools.product(CASES, DTYPES, shapes)
        if dtype == "float32" or shape[-1] > 1000
        for mode in case.modes
    ]


def of(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


HIDDEN, WEIGHT, LABELS = of((TOKENS, FEATURES)), of((CLASSES, FEATURES)), of((TOKENS,), jnp.int32)
KEY, LOG_PROPOSAL = of((2,), jnp.uint32), of((CLASSES,), jnp.float32)
CUTOFFS, SAMPLES, FEW_TOKENS = (4000, 20_000, 60_000), 8192, of((256, FEATURES))


def adaptive_params() -> Any:
    """Shapes of an adaptive softmax of three tails."""
    made = jax.eval_shape(lambda key: adaptive.init(key, FEATURES, CLASSES, CUTOFFS), jax.random.key(0))
    return jax.tree.map(lambda a: of(a.shape), made)


def along(f: F) -> F:
    """A loss and its derivative along tangents of hidden states and weight."""
    return lambda h, W, y, *tangents: jax.jvp(lambda h, W: f(h, W, y), (h, W), tangents)


def other_heads() -> dict[str, tuple[F, tuple[Any, ...]]]:
    """Programs of the other heads, or of other modes, and their arguments."""
    both, with_tangents = (HIDDEN, WEIGHT, HIDDEN, WEIGHT), (HIDDEN, WEIGHT, LABELS, HIDDEN, WEIGHT)
    loss, all_logits = total(heads.linear_cross_entropy), total(HEADS["optax, all logits in float32"])

    def kl(h: Any, W: Any, g: Any, U: Any) -> Any:
        return jnp.sum(heads.linear_kl(h, W, g, U))

    def adaptive_loss(params: Any, h: Any, y: Any) -> Any:
        return -jnp.sum(adaptive.log_prob(params, h, y))

    def sampled(f: F) -> F:
        return lambda h, W, y, key, log_q: jnp.sum(f(key, h, W, y, SAMPLES, log_proposal=log_q))

    def quadratic(h: Any, W: Any, y: Any) -> Any:
        return jnp.sum(heads.quadratic_cross_entropy(h, W, y, phi=js.taylor(2)))

    of_samples = (HIDDEN, WEIGHT, LABELS, KEY, LOG_PROPOSAL)
    gradients = functools.partial(jax.value_and_grad, argnums=(0, 1))
    return {
        "linear_cross_entropy, value and jvp": (along(loss), with_tangents),
        "optax, all logits in float32, value and jvp": (along(all_logits), with_tangents),
        "linear_cross_entropy, Hessian product": (hessian_product(loss), with_tangents),
        "optax, all logits in float32, Hessian product": (hessian_product(all_logits), with_tangents),
        "linear_kl": (jax.value_and_grad(kl, (0, 1, 2, 3)), both),
        "linear_top_k, k = 50, value": (lambda h, W: heads.linear_top_k(h, W, 50), (HIDDEN, WEIGHT)),
        "linear_top_k, k = 50, value, 256 tokens": (lambda h, W: heads.linear_top_k(h, W, 50), (FEW_TOKENS, WEIGHT)),
        "linear_categorical, value": (heads.linear_categorical, (KEY, HIDDEN, WEIGHT)),
        "linear_categorical, value, 256 tokens": (heads.linear_categorical, (KEY, FEW_TOKENS, WEIGHT)),
        "quadratic_cross_entropy, taylor(2)": (gradients(quadratic), (HIDDEN, WEIGHT, LABELS)),
        "sampled_cross_entropy, 8,192 samples": (gradients(sampled(heads.sampled_cross_entropy)), of_samples),
        "nce_loss, 8,192 samples": (gradients(sampled(heads.nce_loss)), of_samples),
        "adaptive.log_prob, three tails": (gradients(adaptive_loss), (adaptive_params(), HIDDEN, LABELS)),
    }


def values(kind: str) -> dict[str, tuple[F, tuple[Any, ...]]]:
    """Programs of the value alone; for a TPU also those of the kernel, whose gradients are the loop's."""
    loss, statistics = heads.linear_cross_entropy, heads.linear_statistics
    given = (HIDDEN, WEIGHT, LABELS)
    found: dict[str, tuple[F, tuple[Any, ...]]] = {
        "linear_cross_entropy, value": (loss, given),
        "linear_statistics, value": (statistics, given),
    }
    if kind == "v5e":
        kernel = functools.partial(loss, implementation="pallas")
        found |= {
            'linear_cross_entropy, value, implementation="pallas"': (kernel, given),
            'linear_statistics, value, implementation="pallas"': (
                functools.partial(statistics, implementation="pallas"),
                given,
            ),
            'linear_cross_entropy, implementation="pallas"': (value_and_gradients(kernel), given),
        }
    return found


def heads_rows(kind: str, where: Any) -> list[dict[str, Any]]:
    """The counts of the heads."""
    of_losses = {name: (value_and_gradients(f), (HIDDEN, WEIGHT, LABELS)) for name, f in HEADS.items()}
    rows = []
    for name, (f, given) in (of_losses | other_heads() | values(kind)).items():
        counts = dataclasses.asdict(compiled(where, f, given))
        rows.append({"name": name, "sizes": [TOKENS, FEATURES, CLASSES], **counts})
        print(f"{name}: {counts['kernels']} kernels, {counts['traffic'] / 2**30:.1f} GiB", flush=True)
    return rows


def attention_rows(where: Any) -> list[dict[str, Any]]:
    """The counts of attention, in the form of the other cells."""
    modes = {"value": attention.value, "value and vjp": attention.value_and_vjp, "HVP": attention.hessian_product}
    rows = []
    for is_causal, dtype, mode in itertools.product((False, True), DTYPES, modes):
        row: dict[str, Any] = {"name": f"{'causal ' if is_causal else ''}attention", "mode": mode}
        row |= {"shape": list(attention.SHAPE), "dtype": dtype}
        given = (jax.ShapeDtypeStruct(attention.SHAPE, dtype),) * 3
        for side, f in zip(("ours", "peer"), attention.pair(is_causal).values(), strict=True):
            row[side] = dataclasses.asdict(compiled(where, modes[mode](f), given))
        rows.append(row)
        print(line(row), flush=True)
    return rows


def run(kind: str, output: pathlib.Path, only_heads: bool = False) -> None:
    """Compiles every cell for the device and writes the counts; or only the heads, and keeps the rest of the file."""
    where = device(kind)
    of_heads = heads_rows(kind, where)
    versions = {"device": kind, "jax": jax.__version__, "optax": optax.__version__, "jsoftmax": js.__version__}
    kept = json.loads(output.read_text())["rows"] if only_heads and output.exists() else []
    rows = kept if only_heads else cells_rows(where)
    output.write_text(json.dumps({**versions, "heads": of_heads, "rows": rows}, indent=1) + "\n")


def cells_rows(where: Any) -> list[dict[str, Any]]:
    """The counts of functions of scores, and of their peers."""
    rows = attention_rows(where)
    for case, mode, shape, dtype in cells():
        z, more = jax.ShapeDtypeStruct(shape, dtype), case.more(shape, jnp.dtype(dtype))
        row: dict[str, Any] = {"name": case.name, "mode": mode, "shape": list(shape), "dtype": dtype}
        for side, f in (("ours", case.ours), ("peer", case.peer)):
            if f is not None:
                row[side] = dataclasses.asdict(compiled(where, *in_mode(f, mode, z, more)))
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """One cell as a line of text."""
    what = f"{row['name']}, {row['mode']}, {'×'.join(map(str, row['shape']))}, {row['dtype']}: "
    ours, peer = row["ours"], row.get("peer")
    own = f"{ours['kernels']} kernels, {ours['traffic'] / 2**20:.1f} MiB"
    if peer is None:
        return f"{what}{own}, {ours['traffic'] / max(1, ours['least']):.2f} times the least"
    ratio = ours["traffic"] / max(1, peer["traffic"])
    return f"{what}{own}; the peer's {peer['kernels']}, {peer['traffic'] / 2**20:.1f}: {ratio:.2f}"
