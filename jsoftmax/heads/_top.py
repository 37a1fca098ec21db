"""The classes with the k largest x of each token, of a block and of two parts of a row (MATH 11.2)."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax import _top_k
from jsoftmax.heads._head import SHARDS, Plan

_LENGTH = 64
"""The classes of a short block. The k largest are in the k short blocks with the largest maxima."""


def largest(x: Array, classes: Array, k: int, plan: Plan | None = None) -> tuple[Array, Array]:
    """The k largest x `[N, k]`, the first of equals first, and their classes."""
    best, places = _top_of_row(x, k, plan)
    return best, _at(classes, places)


def largest_of_block(x: Array, start: Array, k: int, plan: Plan | None = None) -> tuple[Array, Array]:
    """The same for a block of classes that begins at `start`. A row has no NaN, or NaN only."""
    top_k = functools.partial(_top_of_row, k=k, plan=plan)
    if k * _LENGTH < x.shape[1]:
        of_row = functools.partial(_top_of_row, plan=plan)
        top_k = functools.partial(_top_k.top_k_by_blocks, k=k, length=_LENGTH, top_k=of_row, lookup=_at)
    if plan is not None and plan.kernel:
        best, places = mode(x)
    elif k == 1:
        best, places = lax.platform_dependent(x, cpu=top_k, default=mode)
    else:
        best, places = top_k(x)
    return best, start + places


def mode(x: Array) -> tuple[Array, Array]:
    """The largest and the first place that has it, by two reductions. Parts of rows, which are faster on CPU, a TPU
    would copy twice to lay them out."""
    best = jnp.max(x, 1, keepdims=True)
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return best, jnp.min(jnp.where(x == best, places, x.shape[1] - 1), 1, keepdims=True)


def _top_of_row(x: Array, k: int, plan: Plan | None) -> tuple[Array, Array]:
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


def _at(a: Array, places: Array) -> Array:
    """The numbers of `[N, m]` at the places `[N, k]`. A TPU takes ten kernels for a lookup, and one for comparisons."""

    def by_comparison(a: Array, places: Array) -> Array:
        here = places[:, :, None] == jnp.arange(a.shape[1], dtype=places.dtype)
        return jnp.sum(jnp.where(here, a[:, None, :], 0), 2, dtype=a.dtype)

    by_lookup = functools.partial(jnp.take_along_axis, axis=1)
    return lax.platform_dependent(a, places, tpu=by_comparison, default=by_lookup)
