"""Checked arguments of an adaptive softmax, its scores, and loops over blocks of rows (MATH 12.5)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax import maps, sums
from jsoftmax._loops import cut
from jsoftmax._precision import precise
from jsoftmax.checks.arguments import accumulation_dtype, as_floating
from jsoftmax.heads.adaptive._blocks import block_length, lay_out
from jsoftmax.heads.adaptive._params import AdaptiveParams, Tail, check_params
from jsoftmax.phi import Phi, log_phi


def check(function: str, params: Any, hidden: Any, phi: Any) -> tuple[AdaptiveParams, Array, tuple[int, ...]]:
    """The weights and the hidden vectors `[rows, d]` in the accumulation dtype, and the shape of the batch.

    The weights of the tails keep their dtype. They are widened chunk by chunk.
    """
    maps.check_phi_of_blocks(function, phi)
    params = check_params(function, params)
    h = as_floating(function, "hidden", hidden, "Convert it: hidden.astype(float).")
    d = params.head.shape[1]
    if not h.ndim or h.shape[-1] != d:
        raise ValueError(
            f"{function}: hidden must have {d} numbers along its last axis, as the head has; got shape {h.shape}. "
            "Transpose it, or make weights of that d."
        )
    dtype = accumulation_dtype(functools.reduce(jnp.promote_types, [h.dtype, params.head.dtype]))
    tails = tuple(Tail(tail.projection.astype(dtype), tail.weight) for tail in params.tails)
    bias = None if params.bias is None else params.bias.astype(dtype)
    return AdaptiveParams(params.head.astype(dtype), bias, tails), h.reshape(-1, d).astype(dtype), h.shape[:-1]


def common_dtype(params: AdaptiveParams, hidden: Any) -> Any:
    """The widest of the factors' dtypes."""
    return functools.reduce(jnp.promote_types, [jnp.asarray(a).dtype for a in jax.tree.leaves((params, hidden))])


def head_scores(params: AdaptiveParams, phi: Phi, hidden: Array) -> Array:
    """x = ψ of the frequent classes, then of the tails."""
    o = precise(hidden, params.head.T)
    return log_phi(phi, o if params.bias is None else o + params.bias[None])


def tail_scores(tail: Tail, phi: Phi, hidden: Array) -> Array:
    """x = ψ of a tail's classes."""
    a = precise(hidden, tail.projection.T)
    return log_phi(phi, precise(a, tail.weight.astype(a.dtype).T))


def class_axis(x: Array) -> tuple[int, ...]:
    """The last axis, which has the classes."""
    return (x.ndim - 1,)


def map_blocks(f: Callable[..., Any], *rows: Array) -> Any:
    """f of one block of rows after the other, because the scores of all rows would not fit in memory."""
    count = rows[0].shape[0]
    blocks = tuple(cut(a, block_length(count)) for a in rows)
    made = lax.map(jax.checkpoint(lambda given: f(*given)), blocks)
    return jax.tree.map(lambda a: lax.collapse(a, 0, 2)[:count], made)


def map_selected(f: Callable[..., Any], wanted: Array, *rows: Array) -> Any:
    """f of the wanted rows, sorted into blocks. Blocks without one are skipped; other rows may hold anything."""
    layout = lay_out(jnp.where(wanted, 0, 1), 1, block_length(wanted.shape[0]))

    def place(a: Array) -> Array:
        return sums.zero_where(~layout.taken.reshape(*layout.taken.shape, *[1] * (a.ndim - 1)), a[layout.row])

    def skip(*given: Array) -> Any:
        zeros = [jnp.zeros_like(a, jnp.int32, shape=()) for a in given]  # sharded as the rows are
        zero = functools.reduce(jnp.add, zeros)
        return jax.tree.map(lambda a: jnp.broadcast_to(zero.astype(a.dtype), a.shape), jax.eval_shape(f, *given))

    def block(given: Any) -> Any:
        is_active, *given = given
        return lax.cond(is_active, f, skip, *given)

    made = lax.map(jax.checkpoint(block), (layout.group == 0, *map(place, rows)))
    return jax.tree.map(lambda a: lax.collapse(a, 0, 2)[layout.place], made)
