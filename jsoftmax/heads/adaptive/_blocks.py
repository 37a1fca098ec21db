"""Rows sorted by tail, in blocks of fixed size, and the loss of a tail, which skips the blocks of others (MATH 12.5).

A tail's scores `[classes, rows]` never exist as a whole. Its classes are taken in chunks, which stay in the cache, and
a chunk takes only the blocks of rows that belong to the tail. So the time depends on which labels occur.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jsoftmax._loops import cut
from jsoftmax._precision import full_precision, precise
from jsoftmax._pytree import jvp_of_live, without_zeros
from jsoftmax._series import expm1
from jsoftmax.heads._statistics import PartialStatistics, exp_part, merge
from jsoftmax.phi import Phi, log_phi, slope
from jsoftmax.sums import difference, exp_sums, not_negative

_CHUNK = 2**19  # numbers in a block of scores or of weights: 2 MB in float32


class Layout(NamedTuple):
    """The places of rows in blocks. Each block has rows of one group."""

    group: Array
    """`[blocks]`: the group of each block; for an empty block, the number of groups."""
    row: Array
    """`[blocks, length]`: the row in each place."""
    taken: Array
    """`[blocks, length]`: whether there is a row in the place."""
    place: Array
    """`[rows]`: the place of each row among blocks × length; 0 for rows of no group."""


def lay_out(groups: Array, count: int, length: int) -> Layout:
    """The layout of rows of groups 0 … count − 1 in blocks. Rows of other groups are in no block.

    Every group may leave one block unfilled, so ⌈rows/length⌉ + count − 1 blocks hold them whatever the groups are.
    """
    rows = groups.shape[0]
    blocks = -(-rows // length) + count - 1
    size = jnp.sum(groups[:, None] == jnp.arange(count, dtype=jnp.int32)[None], 0, dtype=jnp.int32)
    start = jnp.cumsum(size, dtype=jnp.int32) - size
    end_block = jnp.cumsum(-(-size // length), dtype=jnp.int32)
    first_block = jnp.concatenate([jnp.zeros(1, jnp.int32), end_block[:-1]])
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    rank = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
    block = jnp.arange(blocks, dtype=jnp.int32)
    group = jnp.searchsorted(end_block, block, side="right").astype(jnp.int32)
    known = jnp.minimum(group, count - 1)
    within = ((block - first_block[known]) * length)[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    taken = (within < size[known][:, None]) & (group < count)[:, None]
    row = order[jnp.where(taken, start[known][:, None] + within, 0)]
    known = jnp.minimum(groups, count - 1)
    place = first_block[known] * length + rank - start[known]
    return Layout(group, row, taken, jnp.where(groups < count, place, 0))


def block_length(rows: int) -> int:
    """The number of rows of a block: about a 32nd of all, as a power of two in [16, 256]. Larger blocks are multiplied
    faster, but leave more places empty."""
    return min(max(1 << (max(rows // 32, 1) - 1).bit_length(), 16), 256)


def project(projection: Array, hidden: Array, active: Array) -> Array:
    """a = h Pᵀ of the active blocks, `[blocks, length, width]`; 0 elsewhere."""

    def block(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
        is_active, h = given
        multiply = jax.checkpoint(lambda h: precise(h, projection.T))
        skip = jax.checkpoint(lambda h: jnp.zeros((h.shape[0], projection.shape[0]), h.dtype))
        return None, lax.cond(is_active, multiply, skip, h)

    return lax.scan(jax.checkpoint(block), None, (active, hidden))[1]


class TailLoss(NamedTuple):
    """`[blocks, length]` or `[rows]`: −l_y within the tail, and L = max x + log1p(rest) in its two parts."""

    loss: Array
    log_total: Array
    peak: Array


def tail_loss(weight: Array, phi: Phi, a: Array, label: Array, active: Array) -> TailLoss:
    """−l_y for a `[blocks, length, width]` and labels in [0, classes), in the active blocks; 0 in the others."""
    return _tail_loss(weight, phi, a, label, active, _chunk_length(weight.shape[0], max(a.shape[1], a.shape[2])))


def _chunk_length(classes: int, width: int) -> int:
    """How many classes a chunk has. If possible it is a divisor, because otherwise the weights are copied to pad
    them."""
    target = max(_CHUNK // width, 1)
    if classes <= target:
        return classes
    near = range(target, target // 2, -1)
    return next((n for n in near if classes % n == 0), -(-classes // -(-classes // target)))


def _scores(weight: Array, phi: Phi, a: Array, start: Array, classes: int) -> tuple[Array, Array]:
    """o and x = ψ(o), `[classes, rows]`; x is −inf past the last class.

    The classes are the first axis, so that the products with the cotangent, for the weights and for a, are fast in XLA
    on CPU.
    """
    o = _product(weight, a)
    x = log_phi(phi, o)
    if classes % weight.shape[0]:
        x = jnp.where((start + jnp.arange(weight.shape[0], dtype=jnp.int32) < classes)[:, None], x, -jnp.inf)
    return o, x


def _product(weight: Array, a: Array) -> Array:
    return lax.dot_general(weight.astype(a.dtype), a, (((1,), (1,)), ((), ())), full_precision(weight.dtype))


def _statistics_of_chunk(x: Array) -> PartialStatistics:
    """The statistics of a chunk whose classes are the first axis."""
    peak, rest, _ = exp_sums(x, (0,))
    return PartialStatistics(*(a[0] for a in exp_part(peak, rest)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
def _tail_loss(  # noqa: PLR0917  (a rule has no keywords)
    weight: Array, phi: Phi, a: Array, label: Array, active: Array, length: int
) -> TailLoss:
    """−l_y = log1p(rest) + (max x − x_y), chunk by chunk  (MATH 12.5)."""
    classes = weight.shape[0]

    def chunk(state: Any, given: tuple[Array, Array]) -> tuple[Any, None]:
        start, w = given

        def add(a: Array, label: Array, state: Any) -> Any:
            so_far, x_label = state
            _, x = _scores(w, phi, a, start, classes)
            inside = (label >= start) & (label < start + length)
            here = jnp.take_along_axis(x, jnp.where(inside, label - start, 0)[None], 0)[0]
            return merge(so_far, _statistics_of_chunk(x)), jnp.where(inside, here, x_label)

        def block(_: None, given: Any) -> tuple[None, Any]:
            is_active, *rows = given
            return None, lax.cond(is_active, add, lambda a, label, state: state, *rows)

        return lax.scan(block, None, (active, a, label, state))[1], None

    zero = jnp.zeros_like(a[..., 0])
    starts = length * jnp.arange(-(-classes // length), dtype=jnp.int32)
    nothing = PartialStatistics(zero - jnp.inf, zero - 1)
    ((m, rest, *_), x_label), _ = lax.scan(chunk, (nothing, zero), (starts, cut(weight, length)))
    # an empty row has peak 0, so that x − peak is −inf; +inf makes its row NaN
    peak = jnp.where(jnp.isneginf(m), 0, jnp.where(jnp.isposinf(m), jnp.nan, m))
    log_total = jnp.log1p(jnp.where(rest == -1, 0, rest))
    loss = not_negative(log_total - difference(x_label, peak))
    return TailLoss(*(jnp.where(active[:, None], v, 0) for v in (loss, log_total, peak)))


@functools.partial(_tail_loss.defjvp, symbolic_zeros=True)
def _tail_loss_jvp(length: int, primals: Any, tangents: Any) -> tuple[TailLoss, TailLoss]:
    """Σ (p − 1_y) ẋ, and Σ p ẋ for L  (MATH 12.5). JAX drops the one that is not used."""
    out = _tail_loss(*primals, length)
    along = functools.partial(_along, primals, tangents, out, length)
    return out, TailLoss(along(True), along(False), jnp.zeros_like(out.peak))


def _along(primals: Any, tangents: Any, out: TailLoss, length: int, by_label: bool) -> Array:
    """Σ q ẋ, q = p or p − 1_y, ẋ = s (W ȧ + Ẇ a) + (∂ψ/∂θ) θ̇, as ȧ · Σ q s W + Σ q s Ẇ a + Σ q (∂ψ/∂θ) θ̇.

    Its transpose is the gradient of the weights. Ẇ goes through the loop as a carry that no block changes. Its
    cotangent is then a sum that a skipped block hands on as it is; if Ẇ were a constant of the loop, a skipped block
    would add zeros. A skipped block computes with no rows, because the backward pass keeps what a branch reads: if both
    branches read the same, JAX keeps no copies. The barrier in it keeps JAX from treating the carry as a constant.
    """
    weight, phi, a, label, active = primals
    weight_dot, phi_dot, a_dot = (_instantiate(dot, primal) for dot, primal in zip(tangents[:3], primals, strict=False))
    classes = weight.shape[0]
    live = without_zeros(phi_dot)

    def chunk(total: Array, given: tuple[Array, Array, Array]) -> tuple[Array, None]:
        start, w, w_dot = given

        @jax.checkpoint
        def rate(w: Array, w_dot: Array, *rows: Any) -> Array:
            a, a_dot, label, out = rows
            o, x = _scores(w, phi, a, start, classes)
            q = jnp.exp(difference(x, out.peak[None]) - out.log_total[None])
            if by_label:  # p_y − 1 from −l_y
                hit = jnp.arange(length, dtype=label.dtype)[:, None] == (label - start)[None]
                q = jnp.where(hit, expm1(-out.loss)[None], q)
            by_score = q * slope(phi, o)
            mean = lax.dot_general(w.astype(a.dtype), by_score, (((0,), (0,)), ((), ())), full_precision(w.dtype))
            result = jnp.sum(mean.T * a_dot, -1) + jnp.sum(by_score * _product(w_dot, a), 0)
            if not jax.tree.leaves(live):
                return result
            x_dot = jvp_of_live(lambda phi: log_phi(phi, o), phi, live)[1]
            return result + jnp.sum(jnp.where(q == 0, 0, q) * x_dot, 0)

        def add(w: Array, w_dot: Array, total: Array, *rows: Any) -> tuple[Array, Array]:
            return w_dot, total + rate(w, w_dot, *rows)

        def skip(w: Array, w_dot: Array, total: Array, *rows: Any) -> tuple[Array, Array]:
            nothing = rate(w, w_dot, *jax.tree.map(lambda row: row[:0], rows))
            return lax.optimization_barrier(w_dot), jnp.concatenate([nothing, total])

        def block(w_dot: Array, given: Any) -> tuple[Array, Array]:
            is_active, *rows = given
            return lax.cond(is_active, add, skip, w, w_dot, *rows)

        return lax.scan(jax.checkpoint(block), w_dot, (active, total, a, a_dot, label, out))[1], None

    starts = length * jnp.arange(-(-classes // length), dtype=jnp.int32)
    chunks = (starts, cut(weight, length), cut(weight_dot.astype(a.dtype), length))
    return lax.scan(jax.checkpoint(chunk), jnp.zeros_like(a[..., 0]), chunks)[0]


def _instantiate(dot: Any, primal: Any) -> Any:
    """A tangent as an array. Tangents of φ stay as they are."""
    return jnp.zeros_like(primal) if isinstance(dot, SymbolicZero) else dot
