"""The smallest programs that show where XLA on CPU is the limit (benchmarks/NOTES.md): plain jax.numpy."""

import jax
import jax.numpy as jnp
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


def run() -> None:
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
