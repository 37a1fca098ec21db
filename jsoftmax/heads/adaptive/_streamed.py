"""The loss in programs for GPUs and TPUs: the head and each tail are streaming heads, in few large kernels
(MATH 12.5, 11.2)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._precision import full_precision
from jsoftmax.heads import _check, _head
from jsoftmax.heads._head import Head, Plan, map_shards
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.heads.adaptive._params import AdaptiveParams, Tail
from jsoftmax.phi import Phi

_FEW = 4
"""A tail with at most a quarter of the rows computes a quarter of them; a tail with more computes all rows."""

_SCORES = 2**27
"""The number of scores of a block: 512 MiB of float32."""


class Rows(NamedTuple):
    """For each row `[rows]`: its column in the head, its tail, and its class within the tail, 0 for rows of no tail."""

    column: Array
    tail: Array
    """The tail; for rows of no tail, the number of tails."""
    inside: Array


def streamed_loss(params: AdaptiveParams, phi: Phi, hidden: Array, rows: Rows, *, dtype: Any) -> Array:
    """−l_y `[rows]`. dtype: of the factors of products."""
    count = hidden.shape[0]
    if not count:
        return jnp.zeros(0, hidden.dtype)
    loss = _loss(Head(hidden, rows.column[:, None], weight=params.head.astype(dtype), bias=params.bias, phi=phi), dtype)
    order = jnp.argsort(rows.tail, stable=True)
    for i, tail in enumerate(params.tails):
        loss = loss + _tail_loss(tail, phi, hidden, rows, i, order, dtype=dtype)
    return loss


def _tail_loss(  # noqa: PLR0917  (what a tail takes)
    tail: Tail, phi: Phi, hidden: Array, rows: Rows, number: int, order: Array, *, dtype: Any
) -> Array:
    """−l^i_y `[rows]` for rows of the tail, and 0 for others. It computes no rows, few rows or all, as needed."""
    count = hidden.shape[0]
    few = -(-count // _FEW)
    own = rows.tail == number
    size = jnp.sum(own, dtype=jnp.int32)
    first = jnp.sum(rows.tail < number, dtype=jnp.int32)

    def of(hidden: Array, own: Array, inside: Array, tail: Tail, phi: Phi) -> Array:
        a = _head.products(hidden, tail.projection, _plan(hidden.shape[0], 1, dtype))
        # scores of other rows might lie outside φ's domain, so these rows become copies of the first row of the tail
        spare = jnp.where(own[jnp.argmax(own)], lax.stop_gradient(a[jnp.argmax(own)]), 0)
        a = jnp.where(own[:, None], a, spare)
        return jnp.where(own, _loss(Head(a, inside[:, None], weight=tail.weight, phi=phi), dtype), 0)

    def of_none(hidden: Array, own: Array, inside: Array, tail: Tail, phi: Phi) -> Array:
        return jnp.zeros_like(hidden[:, 0])

    def of_few(hidden: Array, own: Array, inside: Array, tail: Tail, phi: Phi) -> Array:
        here = lax.dynamic_slice_in_dim(order, first, few)
        loss = of(hidden[here], own[here], inside[here], tail, phi)
        return jnp.zeros_like(hidden[:, 0]).at[here].set(loss, unique_indices=True)

    branch = jnp.where(size == 0, 0, jnp.where(size <= few, 1, 2))
    return lax.switch(branch, (of_none, of_few, of), hidden, own, rows.inside, tail, phi)


def _loss(head: Head, dtype: Any) -> Array:
    plan = _plan(head.hidden.shape[0], head.weight.shape[0], dtype)
    found: Any = map_shards(statistics, head, plan, Extras())
    return found.loss[:, 0]


def _plan(rows: int, classes: int, dtype: Any) -> Plan:
    """All rows by blocks of classes."""
    plan = Plan(rows, _check.classes_of_block(rows, classes, _SCORES), dtype, full_precision(dtype))
    return plan.on_accelerators()
