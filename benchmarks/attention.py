"""Streamed attention beside `jax.nn.dot_product_attention` by XLA: time and memory, causal and not."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.measure import Case, F
from jsoftmax import attention

SHAPE = (1, 4096, 8, 64)
"""Batch, queries and keys, heads, features."""


def arrays() -> tuple[jax.Array, ...]:
    """Query, key and value."""
    return tuple(jax.random.normal(key, SHAPE) for key in jax.random.split(jax.random.key(0), 3))


def value(f: F) -> F:
    return f


def gradient(f: F) -> F:
    return jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given).astype(jnp.float32))), (0, 1, 2))


def value_and_vjp(f: F) -> F:
    def of(*given: jax.Array) -> Any:
        output, back = jax.vjp(f, *given)
        return output, back(output)

    return of


def jvp(f: F) -> F:
    return lambda *given: jax.jvp(f, given, tuple(jnp.cos(a) for a in given))


def hessian_product(f: F) -> F:
    return lambda *given: jax.jvp(gradient(f), given, tuple(jnp.cos(a) for a in given))[1]


def pair(is_causal: bool) -> dict[str, F]:
    """Ours and the peer."""
    return {
        "ours": functools.partial(attention.dot_product_attention, is_causal=is_causal),
        "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="xla"),
    }


def cases() -> list[Case]:
    given, made = arrays(), []
    modes = {"value": value, "gradient": gradient, "value and jvp": jvp, "HVP": hessian_product}
    for is_causal in (False, True):
        for mode, of in modes.items():
            candidates = {name: of(f) for name, f in pair(is_causal).items()}
            name = f"{'causal ' if is_causal else ''}attention, {mode}"
            made.append(Case("attention", name, SHAPE, candidates, given))
    return made


def run(output: pathlib.Path) -> None:
    measure.run(cases(), output, fewest=5)
