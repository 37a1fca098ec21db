"""The smallest programs in plain jax.numpy that show where XLA on CPU is the limit, and the errors of its sums
(benchmarks/NOTES.md)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import measure


def slices(z: jax.Array) -> jax.Array:
    """Σ over the first axis, slice by slice."""
    return sum((z[i] for i in range(1, z.shape[0])), z[0])


def compare(z: jax.Array, y: jax.Array, g: jax.Array) -> jax.Array:
    """(e^z − 1_y) g, by comparing every class with the label."""
    hot = lax.broadcasted_iota(y.dtype, z.shape, 1) == y[:, None]
    return (jnp.exp(z - g) - hot.astype(z.dtype)) * g


def scatter(z: jax.Array, y: jax.Array, g: jax.Array) -> jax.Array:
    """The same by a scatter into the array that is written."""
    return (jnp.exp(z - g) * g).at[jnp.arange(z.shape[0]), y].add(-g[:, 0])


def errors_of_sums(dtype: str) -> None:
    """Prints the worst relative error, in epsilons of the dtype, of sums along each axis and of a running sum."""
    rng, epsilon = np.random.default_rng(0), np.finfo(dtype).eps
    with jax.enable_x64(dtype == "float64"):
        for count in (64, 257, 1000, 4096, 65536, 10**6):
            a = rng.uniform(0, 1, (8, count)).astype(dtype)
            found = {"last axis": jnp.sum(a, -1), "first axis": jnp.sum(a.T, 0), "running": np.cumsum(a, 1)[:, -1]}
            want = np.sum(a, 1, dtype=np.longdouble)
            worst = {k: float(np.max(np.abs(np.asarray(v) - want) / want) / epsilon) for k, v in found.items()}
            print(f"sum of {count} in {dtype:8}", ", ".join(f"{k} {e:.1f}" for k, e in worst.items()), flush=True)


def run() -> None:
    for dtype in ("float32", "float64"):
        errors_of_sums(dtype)
    key = jax.random.key(0)
    leading, short = (jax.random.normal(key, shape) for shape in ((8, 1_000_000), (1_000_000, 8)))
    cases = (
        (
            "Σ e^z over the first axis",
            {"plain": lambda z: jnp.sum(jnp.exp(z), 0), "slices": lambda z: slices(jnp.exp(z))},
            (leading,),
        ),
        ("Σ z over eight classes", {"plain": lambda z: jnp.sum(z, -1), "max": lambda z: jnp.max(z, -1)}, (short,)),
        (
            "(e^z − 1_y) g, many classes",
            {"compare": compare, "scatter": scatter, "copy": lambda z, *_: z + 1},
            (jax.random.normal(key, (4096, 32768)), jnp.arange(4096), jnp.full((4096, 1), 1e-3)),
        ),
        (
            "(e^z − 1_y) g, eight classes",
            {"compare": compare, "scatter": scatter},
            (short, jnp.arange(1_000_000) % 8, jnp.full((1_000_000, 1), 1e-3)),
        ),
    )
    for name, candidates, arguments in cases:
        result = measure.interleaved(candidates, arguments)
        times = ", ".join(f"{k} {ms:.1f} ms" for k, ms in result["ms"].items())
        print(f"{name:28} {arguments[0].shape!s:16} {times}", flush=True)
