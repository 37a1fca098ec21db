"""The loss in programs for GPUs and TPUs: the head and each tail are streaming heads, in few large kernels
(MATH 12.5, 11.2)."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._precision import full_precision
from jsoftmax._pytree import without_zeros
from jsoftmax._series import expm1
from jsoftmax.heads import _check, _head
from jsoftmax.heads._head import Head, Plan, map_shards
from jsoftmax.heads._statistics import Extras, Rates, TokenConstants, rates_along, statistics
from jsoftmax.heads.adaptive._blocks import TailLoss
from jsoftmax.heads.adaptive._params import AdaptiveParams
from jsoftmax.phi import Phi
from jsoftmax.sharding import match_varying_axes

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
    if not params.tails:
        return loss
    order = jnp.argsort(rows.tail, stable=True)
    projections = jnp.concatenate([tail.projection for tail in params.tails])
    projected = _head.products(hidden, projections, _plan(count, 1, dtype))
    ends = list(itertools.accumulate(tail.projection.shape[0] for tail in params.tails))
    for i, (tail, a) in enumerate(zip(params.tails, jnp.split(projected, ends[:-1], 1), strict=True)):
        loss = loss + _tail_loss(tail.weight, phi, a, rows, i, order, dtype=dtype)
    return loss


class _TailRows(NamedTuple):
    """For each row `[rows]` whether it is of the tail, and its class within it; which rows are computed."""

    own: Array
    inside: Array
    few: Array
    """A quarter of the rows, which has those of the tail if there are so few."""
    branch: Array
    """0: no row is computed, 1: few rows, 2: all."""


def _tail_loss(  # noqa: PLR0917  (what a tail takes)
    weight: Array, phi: Phi, a: Array, rows: Rows, number: int, order: Array, *, dtype: Any
) -> Array:
    """−l^i_y `[rows]` for rows of the tail, and 0 for others. It computes no rows, few rows or all, as needed."""
    few = -(-a.shape[0] // _FEW)
    own = rows.tail == number
    size = jnp.sum(own, dtype=jnp.int32)
    first = jnp.sum(rows.tail < number, dtype=jnp.int32)
    branch = jnp.where(size == 0, 0, jnp.where(size <= few, 1, 2))
    taken = _TailRows(own, rows.inside, lax.dynamic_slice_in_dim(order, first, few), branch)
    weight, phi, taken = match_varying_axes((weight, phi, taken), a)
    return jnp.where(own, _tail_losses(weight, phi, a, taken, dtype).loss, 0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _tail_losses(weight: Array, phi: Phi, a: Array, rows: _TailRows, dtype: Any) -> TailLoss:
    """The loss of the rows that are computed, with its parts; 0 for the others."""

    def tail_loss(weight: Array, phi: Phi, rows: _TailRows, a: Array) -> TailLoss:
        found = statistics(_tail_head(weight, phi, rows, a), Extras(), _plan(a.shape[0], weight.shape[0], dtype))
        return TailLoss(found.loss[:, 0], found.log_total, found.peak)

    zero = jnp.zeros_like(a[:, 0])
    return _switch_rows(tail_loss, TailLoss(zero, zero, zero), weight, phi, rows, a)


@functools.partial(_tail_losses.defjvp, symbolic_zeros=True)
def _tail_losses_jvp(dtype: Any, primals: Any, tangents: Any) -> tuple[TailLoss, TailLoss]:
    """(−l_y)˙ = Σ p ẋ − ẋ_y and L̇ = Σ p ẋ  (MATH 11.3, 12.5).

    Backwards, `lax.switch` keeps what its branches read, and fills in zeros for what only other branches read. The
    checkpoint makes that the same for all that compute something: their arguments.
    """
    weight, phi, a, rows = primals
    weight_dot, phi_dot, a_dot, _ = without_zeros(tangents)
    out = _tail_losses(*primals, dtype)

    def tail_rates(shared: Any, phi: Phi, rows: _TailRows, per_row: Any) -> tuple[Array, Array]:
        (weight, weight_dot, phi_dot), (a, a_dot, out) = shared, per_row
        head = _tail_head(weight, phi, rows, a)
        a_dot = None if a_dot is None else jnp.where(rows.own[:, None], a_dot, 0)
        known = TokenConstants(out.peak, out.log_total, at_label=expm1(-out.loss[:, None]))
        zeros = Rates(log_total=jnp.zeros_like(out.peak), loss=jnp.zeros_like(out.loss[:, None]))
        dots = Head(a_dot, weight=weight_dot, phi=phi_dot)
        rates = rates_along(head, dots, known, zeros, _plan(a.shape[0], weight.shape[0], dtype))
        return rates.loss[:, 0], rates.log_total

    zero = jnp.zeros_like(out.peak)
    loss, log_total = _switch_rows(tail_rates, (zero, zero), (weight, weight_dot, phi_dot), phi, rows, (a, a_dot, out))
    return out, TailLoss(loss, log_total, zero)


def _switch_rows(  # noqa: PLR0917  (as the branches of `lax.switch` take them)
    f: Callable[..., Any], zeros: Any, shared: Any, phi: Phi, rows: _TailRows, per_row: Any
) -> Any:
    """f(shared, phi, rows, per_row) of no rows, few rows or all; 0 for rows that are not computed."""

    def of_none(*_: Any) -> Any:
        return zeros

    def of_few(shared: Any, phi: Phi, rows: _TailRows, per_row: Any) -> Any:
        own, inside, taken = jax.tree.map(lambda a: a[rows.few], (rows.own, rows.inside, per_row))
        made = f(shared, phi, rows._replace(own=own, inside=inside), taken)
        return jax.tree.map(lambda zero, a: zero.at[rows.few].set(a, unique_indices=True), zeros, made)

    branches = [jax.checkpoint(branch, prevent_cse=False) for branch in (of_few, f)]
    return lax.switch(rows.branch, (of_none, *branches), shared, phi, rows, per_row)


def _tail_head(weight: Array, phi: Phi, rows: _TailRows, a: Array) -> Head:
    """The head of a tail. Scores of rows of other tails might lie outside φ's domain, so these rows become copies of
    the first row of the tail."""
    first = jnp.argmax(rows.own)
    spare = jnp.where(rows.own[first], lax.stop_gradient(a[first]), 0)
    return Head(jnp.where(rows.own[:, None], a, spare), rows.inside[:, None], weight=weight, phi=phi)


def _loss(head: Head, dtype: Any) -> Array:
    plan = _plan(head.hidden.shape[0], head.weight.shape[0], dtype)
    found: Any = map_shards(statistics, head, plan, Extras())
    return found.loss[:, 0]


def _plan(rows: int, classes: int, dtype: Any) -> Plan:
    """All rows by blocks of classes."""
    plan = Plan(rows, _check.classes_of_block(rows, classes, _SCORES), dtype, full_precision(dtype))
    return plan.on_accelerators()
