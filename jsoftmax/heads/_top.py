"""The classes with the k largest x of each token, of a block and of parts of a row (MATH 11.2)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jsoftmax import _top_k
from jsoftmax.heads._head import SHARDS, Plan

_LENGTH = 64
"""The classes of a short block. The k largest are in the k short blocks with the largest maxima."""

_COMPARISONS = 2**14
"""A TPU compares up to so many pairs of a token's places. Measured at k = 50, with 5,000 (benchmarks/NOTES.md)."""

Pair = tuple[Array, Array]


def block_top_k(x: Array, k: int, plan: Plan | None = None) -> Pair:
    """The k largest x `[N, k]` of a block of classes, the first of equals first, and their places in the block. A row
    has no NaN, or NaN only."""
    of_row = functools.partial(_row_top_k, plan=plan)
    if k * _LENGTH >= x.shape[1]:
        by_parts = functools.partial(of_row, k=k)
    else:
        by_parts = functools.partial(_top_k.top_k_by_blocks, k=k, length=_LENGTH, top_k=of_row, lookup=_lookup)
    return lax.platform_dependent(x, cpu=by_parts, default=mode) if k == 1 else by_parts(x)


@jax.custom_jvp
def mode(x: Array) -> Pair:
    """The largest x and the first place that has it, by two reductions. Parts of rows, which are faster on CPU, a TPU
    would copy twice to lay them out."""
    best = jnp.max(x, 1, keepdims=True)
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return best, jnp.min(jnp.where(x == best, places, x.shape[1] - 1), 1, keepdims=True)


@mode.defjvp
def _mode_jvp(primals: Any, tangents: Any) -> tuple[Pair, Any]:
    """ẋ at that place alone. JAX's derivative of a maximum is shared out among equal x."""
    best, place = mode(*primals)
    no_rate = np.zeros(place.shape, jax.dtypes.float0)
    return (best, place), (jnp.take_along_axis(tangents[0], place, 1), no_rate)


def top_of_parts(x: Pair, classes: Pair, plan: Plan | None) -> Pair:
    """The k largest x of two parts of a row, each with its own k largest, and their classes."""
    if x[0].shape[1] == 1:
        second = (x[1] > x[0]) | jnp.isnan(x[1])  # the first of equals; NaN before all
        return jnp.where(second, x[1], x[0]), jnp.where(second, classes[1], classes[0])
    return top_with_classes(jnp.concatenate(x, 1), jnp.concatenate(classes, 1), x[0].shape[1], plan)


def top_with_classes(x: Array, classes: Array, k: int, plan: Plan | None) -> Pair:
    """The k largest x `[N, k]`, the first of equals first, and their classes."""
    best, places = _row_top_k(x, k, plan)
    return best, _lookup(classes, places)


def _row_top_k(x: Array, k: int, plan: Plan | None) -> Pair:
    """The k largest and their places. For k = 1, argmax costs less than a sort.

    For shards of one array all numbers are sorted, because XLA would gather the argument of `lax.top_k`.
    """
    if k == 1:
        places = jnp.argmax(x, 1, keepdims=True)
    elif plan is None or plan.axis_name != SHARDS:
        return _top_k.top_k(x, k)
    else:
        descending = jnp.where(jnp.isnan(x), -jnp.inf, -lax.stop_gradient(x))
        places = lax.sort_key_val(descending, lax.broadcasted_iota(jnp.int32, x.shape, 1), 1)[1][:, :k]
    return jnp.take_along_axis(x, places, 1), places.astype(jnp.int32)


def _lookup(a: Array, places: Array) -> Array:
    """The numbers of `[N, m]` at the places `[N, k]`. A TPU takes ten kernels for a lookup, and one for comparisons."""

    def by_comparison(a: Array, places: Array) -> Array:
        here = places[:, :, None] == jnp.arange(a.shape[1], dtype=places.dtype)[None, None]
        return jnp.sum(jnp.where(here, a[:, None, :], 0), 2, dtype=a.dtype)

    if a.shape[1] * places.shape[1] > _COMPARISONS:
        return _top_k.lookup(a, places)
    return lax.platform_dependent(a, places, tpu=by_comparison, default=_top_k.lookup)
