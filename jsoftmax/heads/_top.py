"""The k largest scores of each token within a block of classes, of several blocks, and of several shards."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._top_k import top_k, top_k_by_blocks
from jsoftmax.heads._head import SHARDS, Plan


def top_k_of_rows(x: Array, k: int, plan: Plan | None) -> tuple[Array, Array]:
    """The k largest, the first of equals first, and their places. For k = 1, argmax costs less than a sort.

    For shards of one array all numbers are sorted, because XLA would gather the argument of `lax.top_k`.
    """
    if k == 1:
        places = jnp.argmax(x, 1, keepdims=True)
    elif plan is None or plan.axis_name != SHARDS:
        return top_k(x, k)
    else:
        descending = jnp.where(jnp.isnan(x), -jnp.inf, -lax.stop_gradient(x))
        places = lax.sort_key_val(descending, lax.broadcasted_iota(jnp.int32, x.shape, 1), 1)[1][:, :k]
    return jnp.take_along_axis(x, places, 1), places.astype(jnp.int32)


def top_k_of_block(x: Array, k: int, plan: Plan | None) -> tuple[Array, Array]:
    """The same for a block of classes."""

    def of_parts(x: Array) -> tuple[Array, Array]:
        if k * _TOP_K_LENGTH >= x.shape[1]:
            return top_k_of_rows(x, k, plan)
        return top_k_by_blocks(x, k, _TOP_K_LENGTH, functools.partial(top_k_of_rows, plan=plan))

    if plan is not None and plan.kernel:
        return largest(x)
    return lax.platform_dependent(x, cpu=of_parts, default=largest) if k == 1 else of_parts(x)


_TOP_K_LENGTH = 64


def largest(x: Array) -> tuple[Array, Array]:
    """The largest and the first place that has it, by two reductions. Parts of rows, which are faster on CPU, a TPU
    would copy twice to lay them out."""
    best = jnp.max(x, 1, keepdims=True)
    places = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return best, jnp.min(jnp.where(x == best, places, x.shape[1] - 1), 1, keepdims=True)
