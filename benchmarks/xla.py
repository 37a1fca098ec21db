"""The smallest programs that show where XLA on CPU is the limit (benchmarks/NOTES.md): plain jax.numpy."""

import jax
import jax.numpy as jnp

from benchmarks import measure


def slices(z: jax.Array) -> jax.Array:
    """Σ over the first axis, slice by slice."""
    return sum((z[i] for i in range(1, z.shape[0])), z[0])


def shared(z: jax.Array, g: jax.Array) -> jax.Array:
    """z g − z Σ z g: the product is written once, for the sum and the result to read."""
    product = z * g
    return product - z * jnp.sum(product, -1, keepdims=True)


def apart(z: jax.Array, g: jax.Array) -> jax.Array:
    """The same, each product computed where it is used."""
    return z * g - z * jnp.sum(jax.lax.optimization_barrier(z) * g, -1, keepdims=True)


def run() -> None:
    key = jax.random.key(0)
    leading, short, long = (jax.random.normal(key, shape) for shape in ((8, 1_000_000), (1_000_000, 8), (256, 32768)))
    cases = (
        (
            "Σ e^z over the first axis",
            {"ours": lambda z: jnp.sum(jnp.exp(z), 0), "slices": lambda z: slices(jnp.exp(z))},
            (leading,),
        ),
        ("Σ z over eight classes", {"ours": lambda z: jnp.sum(z, -1), "max": lambda z: jnp.max(z, -1)}, (short,)),
        ("z g − z Σ z g", {"ours": shared, "apart": apart}, (long, 2 * long)),
    )
    for name, candidates, arguments in cases:
        result = measure.interleaved(candidates, arguments)
        times = ", ".join(f"{'plain' if k == 'ours' else k} {ms:.1f} ms" for k, ms in result["ms"].items())
        print(f"{name:28} {arguments[0].shape!s:16} {times}", flush=True)
