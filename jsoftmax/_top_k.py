"""The k largest of a row without a sort of the whole row. Of equal numbers the first comes first."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax.sharding import even_length

TopK = Callable[[Array, int], tuple[Array, Array]]
"""Maps rows and k to the k largest of each row, in descending order, and their places."""


def top_k(a: Array, k: int) -> tuple[Array, Array]:
    """The k largest and their places. Without the barriers XLA on CPU would sort the whole row if a caller takes
    slices.

    There is one barrier for each result, because XLA aborts at one barrier around both under `jax.shard_map` (jax
    0.10).
    """
    best, index = lax.top_k(a, k)
    return lax.optimization_barrier(best), lax.optimization_barrier(index)


lookup = functools.partial(jnp.take_along_axis, axis=-1)
"""The numbers of rows `[..., m]` at places `[..., k]`."""


def top_k_by_blocks(
    a: Array, k: int, length: int, top_k: TopK = top_k, lookup: Callable[[Array, Array], Array] = lookup
) -> tuple[Array, Array]:
    """The same, for rows without NaN, or of NaN only. The k largest are in the k blocks with the largest maxima.
    lookup: as `lookup`, where another form of it is faster."""
    padding = -a.shape[-1] % length
    if padding:
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, padding)], constant_values=-jnp.inf)
    blocks = a.reshape(*a.shape[:-1], a.shape[-1] // length, length)
    _, chosen = top_k(jnp.max(lax.stop_gradient(blocks), -1), k)
    chosen = jnp.sort(chosen, -1)  # in order, so that of equal scores the first comes first
    # the places are in range, and without a check of that a TPU needs fewer kernels
    candidates = jnp.take_along_axis(blocks, chosen[..., None], -2, mode="promise_in_bounds")
    best, at = top_k(candidates.reshape(*a.shape[:-1], k * length), k)
    return best, lookup(chosen, at // length) * length + at % length


def top_k_of_many(a: Array, k: int) -> tuple[Array, Array]:
    """The same, by blocks where that is faster. They have even lengths, so that no sharded row is gathered for them."""
    classes = a.shape[-1]
    length = even_length(classes, math.isqrt(classes // max(k, 1))) or even_length(classes, 256)
    if not length or 2 * (classes // length + k * length) > classes:
        return top_k(a, k)
    return top_k_by_blocks(a, k, length)
