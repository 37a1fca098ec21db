"""The functions of `reference` for large arrays, in the forms that XLA's CPU compiler makes fast (benchmarks/NOTES.md).

They differ in how the classes are cut, and in what is computed twice and what is written; the mathematics is that of
`reference`, whose functions these equal but for rounding and the care of MATH 4.5. What a compiler needs beyond it
stands here alone: slices, blocks, barriers, selects that change nothing. Each threshold has its row in
benchmarks/NOTES.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._arguments import read, widened
from jsoftmax._collectives import AxisName, all_max, all_sum, by_rows, even_length, in_type
from jsoftmax.sums.reference import (
    FAR,
    ExpSums,
    LabelRates,
    Normalized,
    class_sum,
    complement_of,
    is_empty,
    not_negative,
    rest_of,
    total_weight,
)

LARGE = 2**17
"""From as many scores on an array is large; smaller ones are not cut into blocks or slices, which would take XLA two to
three times as long to compile."""

SHORT, _LONG = 256, 4096
"""Above SHORT classes the summation method changes; from _LONG on, e^u is computed again instead of stored."""

_MANY_ROWS = 4096
"""From here on XLA on CPU makes one kernel of a whole softmax."""

_MANY_SCORES = 4096
"""Of fewer scores XLA on CPU adds 32 and 32, one after the other, and loses what is small beside a 1."""


Want = Literal["all", "p", "log_p", "L", "H", "loss"]
"""What is wanted: all of log p, p, L and 1 − p, or one of them; the entropy; the sums of a loss. It changes no result
but by rounding, only the way to it."""


class Form(NamedTuple):
    """How `_shifted` sums: the fastest for each use."""

    want: Want
    order: int = 0
    """0 for the value, 1 in its rule, 2 in rules of higher order."""
    large: bool = True
    """Whether many scores are summed, where a guard costs time."""
    bfloat16: bool = False
    """Whether x is given in bfloat16, and is then read as such: XLA on CPU would write a wider array first."""

    @property
    def in_rule_of_sum(self) -> bool:
        """Whether this is a rule of L or log p, whose p is no result and has no digits to keep."""
        return self.want in ("L", "log_p", "loss") and self.order > 0

    @property
    def keeps_small_results(self) -> bool:
        """Whether what is wanted may be small beside the scores, where a residue of their rounding would be seen.

        Few scores are guarded whatever is wanted.
        """
        return self.want in ("all", "log_p", "H", "loss") or not self.large


def is_large(x: Array) -> bool:
    """Whether an array has many scores."""
    return x.size >= LARGE


def _may_be_large(x: Array) -> bool:
    """A row alone counts as large, too: under `jax.vmap` it may be one of many."""
    return is_large(x) or x.ndim == 1


def form(x: Array, want: Want, order: int) -> Form:
    """The form for an x as it is given, before it is widened."""
    # a row alone is guarded in rules, whose 1 − p may be small
    large = is_large(x) if order else _may_be_large(x)
    return Form(want, min(order, 2), large, x.dtype == jnp.bfloat16 and want in ("p", "log_p", "L", "loss"))


# --- the functions of the reference --------------------------------------------------------------------------


def normalized(x: Array, axis: tuple[int, ...], axis_name: AxisName, want: Want, order: int) -> Normalized:
    """`reference.normalized`, fastest for what is wanted of it."""
    how = form(x, want, order)
    u, e, rest, total, peak, empty = _shifted(x, axis, axis_name, how)
    log_total = jnp.log1p(rest)
    infinite = jnp.where(empty, -jnp.inf, jnp.inf)
    log_p = u - log_total
    if _within_rules(how):  # the derivative is 0 where a class is left out
        log_p = jnp.where(jnp.isneginf(x), lax.stop_gradient(log_p), log_p)
    L = jnp.where(empty | jnp.isposinf(peak), infinite, peak + log_total)
    return Normalized(log_p, e / total, L, complement_of(e, rest))


def centred(x: Array, axis: tuple[int, ...], axis_name: AxisName, want: Want, order: int) -> tuple[Array, Array]:
    """`reference.centred`."""
    how, x = form(x, want, order), read(x)
    u, e, rest, total, peak, _ = _shifted(x, axis, axis_name, how)
    m = _careful_sum(_gap, x, peak, axis, axis_name, how) / total
    return jnp.where(e == 0, 0, u + m), not_negative(jnp.log1p(rest) + m)


def exp_sums(x: Array, beside: Any, axis: tuple[int, ...], axis_name: AxisName, order: int) -> ExpSums:
    """`reference.exp_sums`."""
    _, _, rest, _, peak, _ = _shifted(x, axis, axis_name, form(x, "loss", order))
    return ExpSums(peak, rest, all_sum(beside, axis_name))


def gap_sum(x: Array, peak: Array, axis: tuple[int, ...]) -> Array:
    """`reference.gap_sum`."""
    return _careful_sum(_gap, x, peak, axis, None, Form("H"))


def centred_rate(_: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """`reference.centred_rate`, without its care of p > ¾: that class has an absolute error of some ulp of ẋ."""
    return x_dot - class_sum(p * x_dot, axis, axis_name)


def p_rate(  # noqa: PLR0917  (as rules, which have no keywords, hand them on)
    x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName, want: Want, order: int
) -> Array:
    """`reference.p_rate`, in the same way."""
    p_x_dot = p * x_dot
    mean = class_sum(p_x_dot, axis, axis_name)
    # pulled back p (g − Σ p g), or p g − p Σ p g, whose p g XLA writes, but which is faster where that is in a cache
    in_one_kernel = want == "p" and _is_long(p, axis)
    return (
        p_x_dot - p * mean if in_one_kernel else p * (x_dot - _beside_classes(mean, x, x_dot, axis, Form(want, order)))
    )


def log_p_rate(  # noqa: PLR0917  (as rules, which have no keywords, hand them on)
    x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName, order: int
) -> Array:
    """`reference.log_p_rate`, from p, in the same way."""
    mean = class_sum(p * x_dot, axis, axis_name)
    return jnp.where(jnp.isneginf(x), 0, x_dot - _beside_classes(mean, x, x_dot, axis, Form("log_p", order)))


def weighed_differences(w: Array, x_dot: Array, axis: tuple[int, ...]) -> Array:
    """`reference.weighed_differences`, in the same way."""
    return w * (x_dot - class_sum(w / total_weight(w, axis) * x_dot, axis))


def compares_labels(x_dot: Array) -> bool:
    """Whether comparing each class with the label is the fast way here too: for a few classes, where a gradient will be
    narrowed, and along sharded classes, which a scatter would gather."""
    return x_dot.shape[-1] <= 16 or x_dot.dtype == jnp.bfloat16 or in_type(x_dot)


def label_rates(  # noqa: PLR0917  (as rules, which have no keywords, hand them on)
    p: Array, kept: Array | None, p_y: Array, at_label: Array, x_dot: Array, own: Array, inside: Array
) -> LabelRates:
    """`reference.label_rates`. Backwards XLA writes an array and sets the label's number in place, where comparing each
    class with it would take 1.6 times as long."""
    x_dot = widened(x_dot)
    rows = [lax.broadcasted_iota(own.dtype, own.shape, i) for i in range(own.ndim - 1)]
    place = jnp.where(inside, own, x_dot.shape[-1])  # beyond the end, where nothing is set
    others = x_dot.at[(*rows, place)].set(0, mode="drop", unique_indices=True)
    x_dot_y = jnp.where(inside, jnp.take_along_axis(x_dot, own, -1), 0)

    def total(a: Array) -> Array:
        return jnp.sum(a, -1, keepdims=True)

    of_others, of_kept = total(p * others), None
    if kept is not None:
        of_kept = total(jnp.where(kept, others, 0)) + jnp.where(jnp.take_along_axis(kept, own, -1), x_dot_y, 0)
    return LabelRates(of_others + at_label * x_dot_y, of_others + p_y * x_dot_y, of_kept)


# --- u = x − max x, e^u and their sums -----------------------------------------------------------------------


class _Shifted(NamedTuple):
    """As `reference.Shifted`; all but u and e keep the reduced axes."""

    u: Array
    e: Array
    rest: Array
    total: Array
    """Σ e^u, or a little for an empty row, for what divides by it: in rules of L and log p without `rest`."""
    peak: Array
    """max x, the least finite number for an empty row."""
    empty: Array
    """Whether a row has no class."""


def _shifted(given: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form) -> _Shifted:
    """`reference.shifted` of an x as it is given.

    Both sums and the result read one e^u, but where that is not wanted a long axis is cut into blocks; few classes are
    cut into slices. Right under plain autodiff too. Of sharded classes one maximum is taken over all devices and one
    sum of both parts.
    """
    x = read(given)
    if _by_slices(x, axis, form):
        return _of_slices(x, axis, axis_name, form)
    length = _block_length(x, axis, form)
    if length:
        rest, peak = by_rows(lambda given: _by_blocks(given, length, axis_name, form), given)
        total = 1 + (_behind_select(rest) if form.bfloat16 else rest)  # many rows' kernel would want x widened
        u = _difference(x, peak, form)
        return _Shifted(u, jnp.exp(u), rest, total, peak, is_empty(rest))
    short = axis == (x.ndim - 1,) and x.shape[-1] <= SHORT
    top = all_max(_maximum(x, axis, short), axis_name)
    peak = jnp.maximum(top, jnp.finfo(x.dtype).min) if short else top
    e = jnp.exp(_difference(x, peak, form))
    ones = jnp.floor(e)
    # rules of L and log p divide by Σ e^u itself, a sum less where the value is not wanted
    by_one_sum = form.in_rule_of_sum and x.size >= _MANY_SCORES
    counted = short and not by_one_sum  # else XLA would write the ones, for two sums to read them
    small, summed = _sum_in_parts(e - ones, axis), _sum_in_parts(ones if counted else e, axis)
    small, summed = all_sum((small, summed), axis_name)
    rest = _rest(small, summed if counted else jnp.round(summed - small), peak, form)
    # of no class not 0, by a step that changes no sum from 1 on; a maximum would drop a NaN there
    total = 1 + rest
    if by_one_sum:
        little = float(jnp.finfo(x.dtype).eps) / 4
        total = summed + (little + (peak - peak) if form.keeps_small_results else little)
    # rules of log p and H read u and e^u in different kernels, those of L no u, and p as a result is one kernel
    u = _difference(x, _apart(peak, 1) if form.want in ("H", "log_p") and form.order else peak, form)
    # of a short row XLA would write the ones for a second reader of `rest`
    return _Shifted(u, e, rest, total, peak, jnp.isneginf(top) if short else is_empty(rest))


def _of_slices(x: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form) -> _Shifted:
    """`_shifted` of few classes, one by one."""
    parts = _slices(x, axis[0])
    top = all_max(_by_halves(jnp.maximum, [lax.stop_gradient(part) for part in parts]), axis_name)
    peak = jnp.maximum(top, jnp.finfo(x.dtype).min)
    e = [jnp.exp(_difference(part, peak, form)) for part in parts]
    ones = [jnp.floor(part) for part in e]
    small = _by_halves(jnp.add, [a - b for a, b in zip(e, ones, strict=True)])
    small, count = all_sum((small, _by_halves(jnp.add, ones)), axis_name)
    rest = _rest(small, count, peak, form)
    # XLA writes e^u of each slice for two readers of rest, unless a select is between them or, in rules of L and log p,
    # a logarithm, which it does not take twice
    total = jnp.exp(jnp.log1p(rest)) if form.in_rule_of_sum else 1 + _behind_select(rest)
    u = _difference(x, lax.optimization_barrier(peak), form)
    return _Shifted(u, jnp.exp(u), rest, total, peak, jnp.isneginf(top))


def _difference(x: Array, peak: Array, form: Form, apart: bool = False) -> Array:
    """x − max x.

    Where small results are wanted, a minimum with the largest finite number keeps a product that x may be and the
    subtraction apart (MATH 4.1). It changes no x but +∞, whose row `_rest` makes NaN. Behind the barrier XLA leaves the
    constant first: where it makes one kernel of many rows, only the second operand's NaN is kept. apart: XLA shall not
    see that another difference has the same minimum, for it would write what two kernels share.
    """
    if not form.keeps_small_results:
        return x - peak
    largest = lax.optimization_barrier(jnp.array(jnp.finfo(x.dtype).max, x.dtype))
    if apart:
        largest = jnp.maximum(largest, peak)
    return jnp.minimum(largest, x) - peak


def _rest(small: Array, ones: Array, peak: Array, form: Form) -> Array:
    """Σ e^u − 1, and NaN where the maximum is infinite."""
    rest = rest_of(small, ones)
    return rest + (peak - peak) if form.keeps_small_results else rest


def _gap(u: Array) -> Array:
    """e^u (−u), and 0 · log 0 = 0, its derivatives too."""
    return jnp.exp(u) * -jnp.maximum(u, -FAR)


def _apart(peak: Array, number: int) -> Array:
    """The same array, which XLA does not know, another for each number: it would write x − peak where two kernels read
    it."""
    return jnp.where(peak == number, number, peak)


def _behind_select(a: Array) -> Array:
    """The same array; at a select XLA on CPU ends a kernel, which it would not vectorise with what follows."""
    return jnp.where(jnp.isnan(a), -lax.stop_gradient(a), a)  # a constant NaN would stop jax_debug_nans


def _block_length(x: Array, axis: tuple[int, ...], form: Form) -> int:
    """The length of the blocks that the last axis is cut into, 0 where it is not.

    It is where e^u is not wanted, or would not stay in a cache once it is written, or would be written wide for a
    narrow p. p and log p of many rows are one kernel.
    """
    long = _is_long(x, axis)
    if (
        axis != (x.ndim - 1,)
        or (form.order and not long)
        or (form.want in ("p", "all") and not (form.bfloat16 and long))
    ):
        return 0
    if form.want in ("p", "all", "log_p") and math.prod(x.shape[:-1]) >= _MANY_ROWS:
        return 0
    return block_length(x.shape[-1])


def _is_long(x: Array, axis: tuple[int, ...]) -> bool:
    """Whether the classes are the last axis, and too many for a row to stay in a cache."""
    return axis == (x.ndim - 1,) and x.shape[-1] >= _LONG


def _within_rules(form: Form) -> bool:
    """Whether rules use this form, too: there JAX may differentiate what has it, not apply the rule again."""
    return form.want in ("p", "all") or form.order > 0


def _by_blocks(given: Array, length: int, axis_name: AxisName, form: Form) -> tuple[Array, Array]:
    """Σ e^u − 1 and max x over the last axis, in blocks.

    The barriers keep XLA from fusing the careful block's gather and sums into the pass over all classes, which it would
    then not vectorise.
    """
    x = read(given)
    cut, tail = _cut(x, length)
    still = lax.stop_gradient(cut)
    if form.bfloat16:
        still = _in_bfloat16(given, length)
        cut = _widened(cut, still)
    blocks = cut.shape[-2]
    block_peak = lax.optimization_barrier(jnp.max(still, -1).astype(x.dtype))
    tail_peak = jnp.max(lax.stop_gradient(tail), -1, keepdims=True, initial=-jnp.inf)
    peak = jnp.maximum(jnp.max(block_peak, -1, keepdims=True), tail_peak)
    peak = all_max(jnp.maximum(peak, jnp.finfo(x.dtype).min), axis_name)
    block_sum = lax.optimization_barrier(jnp.sum(jnp.exp(_difference(cut, peak[..., None], form)), -1))
    even = not tail.shape[-1]
    total = _sum_by_halves(block_sum, jnp.exp(_difference(tail, peak, form)), even=even)
    # the block of the maximum; any, where the tail has it
    best = jnp.min(jnp.where(block_peak == peak, jnp.arange(blocks), blocks - 1), -1, keepdims=True)
    others = jnp.where(jnp.arange(blocks) == best, 0, block_sum)
    if form.bfloat16:  # from x itself, or both would read one wider array
        block = jnp.take_along_axis(x, best * length + jnp.arange(length), -1)
    else:
        block = jnp.take_along_axis(cut, best[..., None], -2)[..., 0, :]
    e = jnp.exp(_difference(jnp.concatenate([block, tail], -1), peak, form))
    e, others = lax.optimization_barrier((e - jnp.floor(e), others))
    small = _sum_by_halves(e, others, even=even)
    small, total = all_sum((small, total), axis_name)
    ones = jnp.round(total - small)  # an integer, exact until an error of 1 is below rounding
    return _rest(small, ones, peak, form), peak


def _careful_sum(  # noqa: PLR0917  (as `_shifted` has them)
    f: Callable[[Array], Array], x: Array, peak: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form
) -> Array:
    """Σ f(x − peak), summed as `_shifted` sums e^u in that form."""
    if _by_slices(x, axis, form):
        return all_sum(
            _by_halves(jnp.add, [f(_difference(part, peak, form, True)) for part in _slices(x, axis[0])]), axis_name
        )
    length = _block_length(x, axis, form)
    if not length:
        if not form.order:
            return all_sum(_sum_in_parts(f(_difference(x, peak, form, True)), axis), axis_name)
        return _behind_select(all_sum(_sum_in_parts(f(_difference(x, _apart(peak, 2), form, True)), axis), axis_name))

    def of_rows(x: Array, peak: Array) -> Array:
        cut, tail = _cut(x, length)
        peak = lax.optimization_barrier(peak)  # else XLA writes the e^u that `_shifted` computes too, for both to read
        block_sum = _behind_select(jnp.sum(f(_difference(cut, peak[..., None], form, True)), -1))
        return all_sum(
            _sum_by_halves(block_sum, f(_difference(tail, peak, form, True)), even=not tail.shape[-1]), axis_name
        )

    return by_rows(of_rows, x, peak)


def _sum_in_parts(a: Array, axis: tuple[int, ...]) -> Array:
    """Σ over the classes; many classes of few rows in parts of 8, for XLA on CPU would add them up one by one.

    First the classes are cut into up to 16 equal parts, so that under plain `jit` each device adds up its own.
    """
    classes = a.shape[-1]
    if axis != (a.ndim - 1,) or classes <= SHORT or _may_be_large(a) or in_type(a):
        return class_sum(a, axis)
    a = a.reshape(*a.shape[:-1], math.gcd(classes, 16), -1)
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, -a.shape[-1] % 8)])
    parts = _behind_select(jnp.sum(a.reshape(*a.shape[:-1], -1, 8), -1))  # else XLA makes one sum of both
    return jnp.sum(_pairwise_sum(parts), -2)


def _beside_classes(a: Array, x: Array, x_dot: Array, axis: tuple[int, ...], form: Form) -> Array:
    """One number a row, for what has one a class: where those are few, copies beside each other, so that the transpose
    adds slices, and behind a select of −a for NaN, at which XLA ends their kernel."""
    if axis == (x.ndim - 1,) and _by_slices(x_dot, axis, form):
        return jnp.concatenate([jnp.where(jnp.isnan(x[..., :1]), -a, a)] * x.shape[-1], -1)
    return a


def _by_slices(x: Array, axis: tuple[int, ...], form: Form) -> bool:
    """Where XLA on CPU adds a few slices faster than it reduces an axis (NOTES.md): the first axis, on jax 0.10, and
    the last one, up to rules of the first order."""
    if len(axis) != 1 or x.shape[axis[0]] < 2 or in_type(x) or not _may_be_large(x):
        return False
    if axis[0] < x.ndim - 1:
        return axis[0] == 0 and x.shape[0] <= 16
    return form.order < 2 and x.shape[-1] <= 8


def _slices(a: Array, axis: int) -> list[Array]:
    """A few classes one by one."""
    return [lax.slice_in_dim(a, i, i + 1, axis=axis) for i in range(a.shape[axis])]


def _by_halves(op: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [*map(op, parts[:half], parts[half : 2 * half]), *parts[2 * half :]]
    return parts[0]


def block_length(classes: int) -> int:
    """How many classes a block of a long axis has, about 64 or 256; 0 for a short axis.

    Few or no classes are left over: XLA on CPU is slow with them.
    """
    if classes <= SHORT:
        return 0
    return even_length(classes, 64) if classes < _LONG else even_length(classes, 256) or 256


def _cut(x: Array, length: int) -> tuple[Array, Array]:
    """The last axis as blocks, and the tail that they leave over."""
    blocks = x.shape[-1] // length
    return x[..., : blocks * length].reshape(*x.shape[:-1], blocks, length), x[..., blocks * length :]


def _in_bfloat16(x: Array, length: int) -> Array:
    """The blocks of an x in bfloat16; cut as integers, for jax 0.10 would widen what it cuts, and XLA would drop the
    rounding of what is made in the same program."""
    bits = lax.bitcast_convert_type(lax.stop_gradient(x), jnp.uint16)
    return lax.bitcast_convert_type(_cut(bits, length)[0], jnp.bfloat16)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _widened(a: Array, narrow: Array) -> Array:
    """a, read from the same numbers in bfloat16. Checkpointed, for in a scan jax 0.10 would differentiate the body, and
    there is no derivative of integers."""
    return _as_read(a, narrow)


@jax.custom_jvp
def _as_read(a: Array, narrow: Array) -> Array:
    return narrow.astype(a.dtype)


@_as_read.defjvp
def _as_read_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _widened(*primals), tangents[0]


def _sum_by_halves(*given: Array, even: bool) -> Array:
    """Σ over the last axis of all given, by halves: the rounding error grows as log n, that of a running sum as n.

    Of even blocks, without a tail, each array by halves within up to 16 parts, which are added one after the other: so
    under plain `jit` each device adds up its own blocks, and the devices' sums are added once.
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


def _maximum(x: Array, axis: tuple[int, ...], short: bool) -> Array:
    """The maximum; of a long axis the least finite number for an empty row, in one step, for XLA does not fuse the e^u
    of a long axis with two."""
    x, least = lax.stop_gradient(x), jnp.array(jnp.finfo(x.dtype).min, x.dtype)
    if short:
        return jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    if math.prod(x.shape[i] for i in axis) <= 1:  # XLA forgets the start value of a single class
        return jnp.maximum(jnp.max(x, axis, keepdims=True, initial=-jnp.inf), least)
    return jnp.expand_dims(lax.reduce(x, least, lax.max, axis), axis)
