"""Sums of the rows of a large array, in the forms that XLA's CPU compiler makes fast (benchmarks/NOTES.md)."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax.checks.arguments import read
from jsoftmax.sharding import AxisName, apply_to_rows, pmax, psum
from jsoftmax.sums.cpu.paths import (
    MANY_SCORES,
    SHORT,
    Form,
    Want,
    adds_slices,
    choose_form,
    row_block_length,
    serves_rules,
)
from jsoftmax.sums.reference import (
    FAR,
    ExpSums,
    Normalized,
    class_sum,
    is_empty,
    not_negative,
    rest_of,
)

# --- the functions of the reference --------------------------------------------------------------------------


def normalized(x: Array, axis: tuple[int, ...], axis_name: AxisName, want: Want, order: int) -> Normalized:
    """`reference.normalized`, in the form that is fastest for what is wanted."""
    how = choose_form(x, want, order)
    u, e, rest, total, peak, empty = _shifted_sums(x, axis, axis_name, how)
    log_total = jnp.log1p(rest)
    log_p = u - log_total
    if serves_rules(how):  # the derivative is 0 where a class is left out
        log_p = jnp.where(jnp.isneginf(x), lax.stop_gradient(log_p), log_p)
    # log_total is added to −∞, too: in a row with a NaN, XLA's maximum may be −∞, and log_total is NaN
    L = jnp.where(jnp.isposinf(peak), peak, jnp.where(empty, -jnp.inf, peak) + log_total)
    return Normalized(log_p, e / total, L)


def centred(x: Array, axis: tuple[int, ...], axis_name: AxisName, want: Want, order: int) -> tuple[Array, Array]:
    """`reference.centred`."""
    how, x = choose_form(x, want, order), read(x)
    u, e, rest, total, peak, _ = _shifted_sums(x, axis, axis_name, how)
    m = _careful_sum(_gap_terms, x, peak, axis, axis_name, how) / total
    return jnp.where(e == 0, 0, u + m), not_negative(jnp.log1p(rest) + m)


def exp_sums(x: Array, row_sums: Any, axis: tuple[int, ...], axis_name: AxisName, order: int) -> ExpSums:
    """`reference.exp_sums`."""
    _, _, rest, _, peak, _ = _shifted_sums(x, axis, axis_name, choose_form(x, "loss", order))
    return ExpSums(peak, rest, psum(row_sums, axis_name))


def gap_sum(x: Array, peak: Array, axis: tuple[int, ...]) -> Array:
    """`reference.gap_sum`."""
    return _careful_sum(_gap_terms, x, peak, axis, None, Form("H"))


# --- u = x − max x, e^u and their sums -----------------------------------------------------------------------


class _ShiftedSums(NamedTuple):
    """As `reference.Shifted`. All but u and e keep the reduced axes with length 1."""

    u: Array
    e: Array
    rest: Array
    total: Array
    """Σ e^u to divide by, not 0 for an empty row. The rules of L and log p compute it without `rest`."""
    peak: Array
    """max x; for an empty row, the least finite number."""
    empty: Array
    """Whether a row has no class."""


def _shifted_sums(given: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form) -> _ShiftedSums:
    """`reference.shifted` of x as it is given, before it is widened.

    Both sums and the result read one array e^u. Where e^u is not needed, a long axis is cut into blocks; few classes
    are cut into slices. Plain automatic differentiation of the body is right, too. For sharded classes, one maximum is
    taken over all devices, and one sum of both parts.
    """
    x = read(given)
    if adds_slices(x, axis, form):
        return _shifted_sums_of_slices(x, axis, axis_name, form)
    length = row_block_length(x, axis, form)
    if length:
        rest, peak = apply_to_rows(lambda given: _sum_without_one_by_blocks(given, length, axis_name, form), given)
        # without the barrier the kernel of many rows would need x widened
        total = 1 + (_fusion_barrier(rest) if form.bfloat16 else rest)
        u = _difference(x, peak, form)
        return _ShiftedSums(u, jnp.exp(u), rest, total, peak, is_empty(rest))
    short = axis == (x.ndim - 1,) and x.shape[-1] <= SHORT
    top = pmax(_maximum(x, axis, short), axis_name)
    peak = jnp.maximum(top, jnp.finfo(x.dtype).min) if short else top
    e = jnp.exp(_difference(x, peak, form))
    ones = jnp.floor(e)
    # rules of L and log p divide by Σ e^u itself, which saves a sum where the value is not needed
    by_one_sum = form.in_rule_of_sum and x.size >= MANY_SCORES
    counted = short and not by_one_sum  # else two sums would read the ones, and XLA would write them
    small, summed = class_sum(e - ones, axis), class_sum(ones if counted else e, axis)
    small, summed = psum((small, summed), axis_name)
    rest = _rest(small, summed if counted else jnp.round(summed - small), peak, form)
    # a little is added so that an empty row does not divide by zero; it leaves sums of at least 1 unchanged, and unlike
    # a maximum it does not drop a NaN
    total = 1 + rest
    if by_one_sum:
        little = float(jnp.finfo(x.dtype).eps) / 4
        total = summed + (little + (peak - peak) if form.keeps_small_results else little)
    # rules of log p and H read u and e^u in different kernels, so x − max x is computed twice; rules of L read no u,
    # and p as a result is one kernel
    u = _difference(x, _distinct_copy(peak, 1) if form.want in ("H", "log_p") and form.order else peak, form)
    # for short rows `rest` must have one reader only, or XLA would write the ones
    return _ShiftedSums(u, e, rest, total, peak, jnp.isneginf(top) if short else is_empty(rest))


def _shifted_sums_of_slices(x: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form) -> _ShiftedSums:
    """`_shifted_sums` for few classes, taken one by one."""
    parts = _class_slices(x, axis[0])
    top = pmax(_reduce_by_halves(jnp.maximum, [lax.stop_gradient(part) for part in parts]), axis_name)
    peak = jnp.maximum(top, jnp.finfo(x.dtype).min)
    e = [jnp.exp(_difference(part, peak, form)) for part in parts]
    ones = [jnp.floor(part) for part in e]
    small = _reduce_by_halves(jnp.add, [a - b for a, b in zip(e, ones, strict=True)])
    small, count = psum((small, _reduce_by_halves(jnp.add, ones)), axis_name)
    rest = _rest(small, count, peak, form)
    # if `rest` has two readers, XLA writes e^u of each slice, unless a select stands between them or, in rules of L and
    # log p, a logarithm, which XLA does not compute twice
    total = jnp.exp(jnp.log1p(rest)) if form.in_rule_of_sum else 1 + _fusion_barrier(rest)
    u = _difference(x, lax.optimization_barrier(peak), form)
    return _ShiftedSums(u, jnp.exp(u), rest, total, peak, jnp.isneginf(top))


def _sum_without_one_by_blocks(given: Array, length: int, axis_name: AxisName, form: Form) -> tuple[Array, Array]:
    """Σ e^u − 1 and max x over the last axis, in blocks.

    Only the block with the maximum needs the careful sum. The barriers keep XLA from fusing its gather and its sums
    into the pass over all classes, which would then not be vectorised.
    """
    x = read(given)
    cut, tail = _split(x, length)
    still = lax.stop_gradient(cut)
    if form.bfloat16:
        still = _in_bfloat16(given, length)
        cut = _widened(cut, still)
    blocks = cut.shape[-2]
    block_peak = lax.optimization_barrier(jnp.max(still, -1).astype(x.dtype))
    tail_peak = jnp.max(lax.stop_gradient(tail), -1, keepdims=True, initial=-jnp.inf)
    peak = jnp.maximum(jnp.max(block_peak, -1, keepdims=True), tail_peak)
    peak = pmax(jnp.maximum(peak, jnp.finfo(x.dtype).min), axis_name)
    block_sum = lax.optimization_barrier(jnp.sum(jnp.exp(_difference(cut, peak[..., None], form)), -1))
    even = not tail.shape[-1]
    total = _sum_by_halves(block_sum, jnp.exp(_difference(tail, peak, form)), even=even)
    numbers = lax.broadcast_to_rank(jnp.arange(blocks), peak.ndim)
    # the number of the block with the maximum; any number where the tail has the maximum
    best = jnp.min(jnp.where(block_peak == peak, numbers, blocks - 1), -1, keepdims=True)
    others = jnp.where(numbers == best, 0, block_sum)
    if form.bfloat16:  # taken from x itself: if both read one array, XLA would write it in float32
        block = jnp.take_along_axis(x, best * length + lax.broadcast_to_rank(jnp.arange(length), peak.ndim), -1)
    else:
        block = jnp.take_along_axis(cut, best[..., None], -2)[..., 0, :]
    e = jnp.exp(_difference(jnp.concatenate([block, tail], -1), peak, form))
    e, others = lax.optimization_barrier((e - jnp.floor(e), others))
    small = _sum_by_halves(e, others, even=even)
    small, total = psum((small, total), axis_name)
    ones = jnp.round(total - small)  # a whole number; the rounding is exact up to sums where 1 is less than an ulp
    return _rest(small, ones, peak, form), peak


def _careful_sum(  # noqa: PLR0917  (as `_shifted_sums` has them)
    f: Callable[[Array], Array], x: Array, peak: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form
) -> Array:
    """Σ f(x − peak), summed in the way in which `_shifted_sums` sums e^u in this form."""
    if adds_slices(x, axis, form):
        return psum(
            _reduce_by_halves(jnp.add, [f(_difference(part, peak, form, True)) for part in _class_slices(x, axis[0])]),
            axis_name,
        )
    length = row_block_length(x, axis, form)
    if not length:
        if not form.order:
            return class_sum(f(_difference(x, peak, form, True)), axis, axis_name)
        return _fusion_barrier(class_sum(f(_difference(x, _distinct_copy(peak, 2), form, True)), axis, axis_name))

    def of_rows(x: Array, peak: Array) -> Array:
        cut, tail = _split(x, length)
        # without the barrier XLA would share e^u with `_shifted_sums`, and write it to memory
        peak = lax.optimization_barrier(peak)
        block_sum = _fusion_barrier(jnp.sum(f(_difference(cut, peak[..., None], form, True)), -1))
        return psum(
            _sum_by_halves(block_sum, f(_difference(tail, peak, form, True)), even=not tail.shape[-1]), axis_name
        )

    return apply_to_rows(of_rows, x, peak)


def _gap_terms(u: Array) -> Array:
    """e^u (−u), with 0 · log 0 = 0 and its derivatives 0."""
    return jnp.exp(u) * -jnp.maximum(u, -FAR)


def _difference(x: Array, peak: Array, form: Form, apart: bool = False) -> Array:
    """x − max x.

    Where results may be small, a minimum with the largest finite number keeps the subtraction apart from a product that
    made x (MATH 4.1). It changes no x but +∞, and `_rest` makes such a row NaN. The barrier makes XLA leave the
    constant as the first operand: where it makes one kernel of many rows, only a NaN of the second operand survives.
    apart: hides from XLA that another difference has the same minimum, because XLA writes to memory what two kernels
    share.
    """
    if not form.keeps_small_results:
        return x - peak
    largest = lax.optimization_barrier(jnp.array(jnp.finfo(x.dtype).max, x.dtype))
    if apart:
        largest = jnp.maximum(largest, peak)
    return jnp.minimum(largest, x) - peak


def _rest(small: Array, ones: Array, peak: Array, form: Form) -> Array:
    """Σ e^u − 1; NaN where the maximum is infinite and small results are wanted."""
    rest = rest_of(small, ones)
    return rest + (peak - peak) if form.keeps_small_results else rest


# --- pieces ----------------------------------------------------------------------------------------------------


def _maximum(x: Array, axis: tuple[int, ...], short: bool) -> Array:
    """The maximum. Over a long axis, an empty row gives the least finite number in the same step: after a second step
    XLA would not fuse the reduction with e^u."""
    x, least = lax.stop_gradient(x), jnp.array(jnp.finfo(x.dtype).min, x.dtype)
    if short:
        return jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    if math.prod(x.shape[i] for i in axis) <= 1:  # XLA drops the start value of a reduction over one class
        return jnp.maximum(jnp.max(x, axis, keepdims=True, initial=-jnp.inf), least)
    return jnp.expand_dims(lax.reduce(x, least, lax.max, axis), axis)


def _distinct_copy(peak: Array, number: int) -> Array:
    """A copy that XLA cannot recognise as identical; distinct numbers give distinct copies. Without it, two kernels
    would share x − peak, and XLA would write it to memory."""
    return jnp.where(peak == number, number, peak)


def _fusion_barrier(a: Array) -> Array:
    """The same array behind a select, where XLA on CPU ends a kernel: fused with what follows, it would not be
    vectorised."""
    # −a, because jax_debug_nans would stop at a constant NaN
    return jnp.where(jnp.isnan(a), -lax.stop_gradient(a), a)


def _class_slices(a: Array, axis: int) -> list[Array]:
    """The classes as separate slices of length 1."""
    return [lax.slice_in_dim(a, i, i + 1, axis=axis) for i in range(a.shape[axis])]


def _reduce_by_halves(op: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [*map(op, parts[:half], parts[half : 2 * half]), *parts[2 * half :]]
    return parts[0]


def _split(x: Array, length: int) -> tuple[Array, Array]:
    """The last axis cut into blocks, and the tail that is left over."""
    blocks = x.shape[-1] // length
    return x[..., : blocks * length].reshape(*x.shape[:-1], blocks, length), x[..., blocks * length :]


def _in_bfloat16(x: Array, length: int) -> Array:
    """The blocks of an x in bfloat16. They are cut as integers: jax 0.10 would widen an array in bfloat16 to cut it,
    and XLA would drop the rounding of scores that are made in the same program."""
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint16)
    return lax.bitcast_convert_type(_split(bits, length)[0], jnp.bfloat16)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _widened(a: Array, narrow: Array) -> Array:
    """The value of a, read from the same numbers in bfloat16. It is checkpointed because jax 0.10, in a scan, would
    differentiate the body of the rule, and integers have no derivative."""
    return _as_read(a, narrow)


@jax.custom_jvp
def _as_read(a: Array, narrow: Array) -> Array:
    return narrow.astype(a.dtype)


@_as_read.defjvp
def _as_read_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _widened(*primals), tangents[0]


def _sum_by_halves(*given: Array, even: bool) -> Array:
    """Σ over the last axis of all given arrays, by halves: the rounding error grows as log n, not as n.

    even: the blocks leave no tail. Then each array is summed by halves within up to 16 parts, and the parts are added
    one after the other. So under plain `jit` each device adds up its own blocks, and the devices' sums are added once.
    """
    if not even:
        return _pairwise_sum(jnp.concatenate(given, -1))

    def in_parts(a: Array) -> Array:
        parts = math.gcd(a.shape[-1], 16)
        return jnp.sum(_pairwise_sum(a.reshape(*a.shape[:-1], parts, a.shape[-1] // parts)), -2)

    return functools.reduce(jnp.add, (in_parts(a) for a in given if a.shape[-1]))


def _pairwise_sum(a: Array) -> Array:
    while a.shape[-1] > 1:
        half = a.shape[-1] // 2
        a = jnp.concatenate([a[..., :half] + a[..., half : 2 * half], a[..., 2 * half :]], -1)
    return a
