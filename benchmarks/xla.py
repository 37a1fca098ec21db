"""The smallest programs that show where XLA on CPU is the limit (benchmarks/NOTES.md): plain jax.numpy."""

import jax
import jax.numpy as jnp

from benchmarks import measure


def slices(z: jax.Array) -> jax.Array:
    """Σ over the first axis, slice by slice."""
    return sum((z[i] for i in range(1, z.shape[0])), z[0])


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
    )
    for name, candidates, arguments in cases:
        result = measure.interleaved(candidates, arguments)
        times = ", ".join(f"{k} {ms:.1f} ms" for k, ms in result["ms"].items())
        print(f"{name:28} {arguments[0].shape!s:16} {times}", flush=True)
