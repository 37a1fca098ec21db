"""Streamed attention beside `jax.nn.dot_product_attention` by XLA, and beside a scan over keys: time and memory."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

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


def by_scan(query: jax.Array, key: jax.Array, value: jax.Array, is_causal: bool = False) -> jax.Array:
    """What a user would write in a few lines: a checkpointed scan over blocks of 512 keys with a running maximum,
    differentiated by JAX."""
    length, block = query.shape[1], 512
    in_blocks = [jnp.moveaxis(a.reshape(1, -1, block, *a.shape[2:]), 1, 0) for a in (key, value)]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state: Any, xs: Any) -> tuple[Any, None]:
        start, peak, total, weighted = state
        of_key, of_value = xs
        s = jnp.einsum("btnh,bsnh->bnts", query, of_key) / query.shape[-1] ** 0.5
        if is_causal:
            s = jnp.where(start + jnp.arange(block) <= jnp.arange(length)[:, None], s, -1e30)
        new_peak = jnp.maximum(peak, lax.stop_gradient(jnp.max(s, -1)))
        e, fall = jnp.exp(s - new_peak[..., None]), jnp.exp(peak - new_peak)
        weighted = weighted * fall[..., None] + jnp.einsum("bnts,bsnh->bnth", e, of_value)
        return (start + block, new_peak, total * fall + jnp.sum(e, -1), weighted), None

    rows = jnp.zeros((1, query.shape[2], length))
    state = 0, rows - jnp.inf, rows, jnp.zeros((*rows.shape, value.shape[-1]))
    _, _, total, weighted = lax.scan(step, state, in_blocks)[0]
    return jnp.moveaxis(weighted / total[..., None], 1, 2)


def pair(is_causal: bool) -> dict[str, F]:
    """Ours and the peer of the same name."""
    return {
        "ours": functools.partial(attention.dot_product_attention, is_causal=is_causal),
        "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=is_causal, implementation="xla"),
    }


def cases() -> list[Case]:
    given, made = arrays(), []
    modes = {"value": value, "gradient": gradient, "value and jvp": jvp, "HVP": hessian_product}
    for is_causal in (False, True):
        for mode, of in modes.items():
            functions = pair(is_causal) | {"a scan": functools.partial(by_scan, is_causal=is_causal)}
            candidates = {name: of(f) for name, f in functions.items()}
            name = f"{'causal ' if is_causal else ''}attention, {mode}"
            made.append(Case("attention", name, SHAPE, candidates, given))
    return made


def run(output: pathlib.Path) -> None:
    measure.run(cases(), output, fewest=5, second_call=True)
