"""Sums over classes to the last digits, and where they are sharded, over all shards (MATH 4.1, 13.2)."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._collectives import AxisName, all_max, all_sum, by_rows, in_type

_SHORT, _LONG = 256, 4096
"""Of more classes than the one, an axis is summed in other ways; of as many as the other, e^u is computed again."""

_MANY_ROWS = 4096
"""From here on XLA on CPU makes one kernel of a whole softmax."""

_MANY_SCORES = 4096
"""Of fewer, XLA on CPU adds 32 and 32, one after the other, and loses what is small beside a 1."""


class Form(NamedTuple):
    """How `centre` sums, the fastest for each use (benchmarks/NOTES.md)."""

    result: Literal["L", "H", "l", "p"]
    """What is wanted: L, or −l_y; H; l = log p; p."""
    order: int = 0
    """0 for the value, 1 in its rule, 2 in rules of higher order."""
    bfloat16: bool = False
    """Whether bfloat16 holds every x, which is then read as such: XLA on CPU would write a wider array first."""

    def of_rule(self) -> "Form":
        """The form within the rule of a function that has this one."""
        return self._replace(order=min(self.order + 1, 2))

    @property
    def in_rule_of_sum(self) -> bool:
        """Whether this is a rule of L or l, whose p is no result and has no digits to keep."""
        return self.result in ("L", "l") and self.order > 0


OF_P, OF_LOG_P, OF_H, OF_L = Form("p"), Form("l"), Form("H"), Form("L")

FAR = 1e4
"""e^−FAR is 0, in float64 too; for products with e^u in which a larger −u would be 0 · ∞."""


class Centred(NamedTuple):
    """What MATH 4 builds everything of; all but u keep the reduced axes."""

    u: Array
    """x − max x."""
    e: Array
    """e^u."""
    rest: Array
    """Σ e^u − 1 without cancellation, 0 for an empty row."""
    total: Array
    """Σ e^u, not 0 for an empty row, for what divides by it: in rules of L and l without `rest`."""
    peak: Array
    """max x, the least finite number for an empty row."""
    empty: Array
    """Whether a row has no class, provided that its rest is 0: not NaN, nor so large that the count of ones is lost."""


def centre(x: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form) -> Centred:
    """u = x − max x, e^u, and Σ e^u − 1 without cancellation (MATH 4.1).

    Ones are counted apart from what is smaller than one, so no small term is lost beside a 1. Both sums and the result
    read one e^u, but where that is not wanted a long axis is cut into blocks; few classes are cut into slices.
    Right under plain autodiff too: the maximum carries no derivative, and counting has none. Of sharded classes one
    maximum is taken over all devices and one sum of both parts, so nothing is lost there either.
    """
    if _by_slices(x, axis, form):
        return _of_slices(x, axis, axis_name, form)
    length = _block_length(x, axis, form)
    if length:
        rest, peak, empty = by_rows(lambda x: _by_blocks(x, length, axis_name, form), x)
        total = 1 + (_behind_select(rest) if form.bfloat16 else rest)  # many rows' kernel would want x widened
        return Centred(x - peak, jnp.exp(x - peak), rest, total, peak, empty)
    short = axis == (x.ndim - 1,) and x.shape[-1] <= _SHORT
    top = all_max(_maximum(x, axis, short), axis_name)
    peak = jnp.maximum(top, jnp.finfo(x.dtype).min) if short else top
    e = jnp.exp(x - peak)
    ones = jnp.floor(e)
    # rules of L and l divide by Σ e^u itself, a sum less where the value is not wanted
    by_one_sum = form.in_rule_of_sum and x.size >= _MANY_SCORES
    counted = short and not by_one_sum  # else XLA would write the ones, for two sums to read them
    small, summed = class_sum(e - ones, axis), class_sum(ones if counted else e, axis)
    small, summed = all_sum((small, summed), axis_name)
    count = summed if counted else jnp.round(summed - small)
    rest = _rest(small, count)
    empty = jnp.isneginf(top) if short else count == 0  # of a short row, XLA would write the ones for a second use
    # of no class not 0, by a step that changes no sum from 1 on; a maximum would drop a NaN there
    total = summed + float(jnp.finfo(x.dtype).eps) / 4 if by_one_sum else 1 + rest
    # rules of l and H read u and e^u in different kernels, those of L no u, and p as a result is one kernel
    u = x - (_apart(peak, 1) if form.result in ("H", "l") and form.order else peak)
    return Centred(u, e, rest, total, peak, empty)


def _of_slices(x: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form) -> Centred:
    """`centre` of few classes, one by one."""
    parts = _slices(x, axis[0])
    top = all_max(_by_halves(jnp.maximum, [lax.stop_gradient(part) for part in parts]), axis_name)
    peak = jnp.maximum(top, jnp.finfo(x.dtype).min)
    e = [jnp.exp(part - peak) for part in parts]
    ones = [jnp.floor(part) for part in e]
    small = _by_halves(jnp.add, [a - b for a, b in zip(e, ones, strict=True)])
    small, count = all_sum((small, _by_halves(jnp.add, ones)), axis_name)
    rest = _rest(small, count)
    # XLA writes e^u of each slice for two readers of rest, unless a select is between them or, in rules of L and l, a
    # logarithm, which it does not take twice
    total = jnp.exp(jnp.log1p(rest)) if form.in_rule_of_sum else 1 + _behind_select(rest)
    u = x - lax.optimization_barrier(peak)
    return Centred(u, jnp.exp(u), rest, total, peak, jnp.isneginf(top))


def _rest(small: Array, count: Array) -> Array:
    """Σ e^u − 1 of what is smaller than one and of the count of ones; 0 of no class, with no derivative halved."""
    return small + (jnp.maximum(count, 1) - 1)


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
    long = is_long(x, axis)
    if axis != (x.ndim - 1,) or (form.order and not long) or (form.result == "p" and not (form.bfloat16 and long)):
        return 0
    if form.result in ("p", "l") and math.prod(x.shape[:-1]) >= _MANY_ROWS:
        return 0
    return block_length(x.shape[-1])


def is_long(x: Array, axis: tuple[int, ...]) -> bool:
    """Whether the classes are the last axis, and too many for a row to stay in a cache."""
    return axis == (x.ndim - 1,) and x.shape[-1] >= _LONG


def within_rules(form: Form) -> bool:
    """Whether rules use this form, too: there JAX may differentiate what has it, not apply the rule again."""
    return form.result == "p" or form.order > 0


def _by_blocks(x: Array, length: int, axis_name: AxisName, form: Form) -> tuple[Array, Array, Array]:
    """Σ e^u − 1, max x and whether there is no class, over the last axis, in blocks.

    The barriers keep XLA from fusing the careful block's gather and sums into the pass over all classes, which it would
    then not vectorise.
    """
    cut, tail = _cut(x, length)
    still = lax.stop_gradient(cut)
    if form.bfloat16:
        still = _in_bfloat16(x, length)
        cut = _widened(cut, still)
    blocks = cut.shape[-2]
    block_peak = lax.optimization_barrier(jnp.max(still, -1).astype(x.dtype))
    tail_peak = jnp.max(lax.stop_gradient(tail), -1, keepdims=True, initial=-jnp.inf)
    peak = jnp.maximum(jnp.max(block_peak, -1, keepdims=True), tail_peak)
    peak = all_max(jnp.maximum(peak, jnp.finfo(x.dtype).min), axis_name)
    block_sum = lax.optimization_barrier(jnp.sum(jnp.exp(cut - peak[..., None]), -1))
    even = not tail.shape[-1]
    total = _sum_by_halves(block_sum, jnp.exp(tail - peak), even=even)
    # the block of the maximum; any, where the tail has it
    best = jnp.min(jnp.where(block_peak == peak, jnp.arange(blocks), blocks - 1), -1, keepdims=True)
    others = jnp.where(jnp.arange(blocks) == best, 0, block_sum)
    if form.bfloat16:  # from x itself, or both would read one wider array
        block = jnp.take_along_axis(x, best * length + jnp.arange(length), -1)
    else:
        block = jnp.take_along_axis(cut, best[..., None], -2)[..., 0, :]
    e = jnp.exp(jnp.concatenate([block, tail], -1) - peak)
    e, others = lax.optimization_barrier((e - jnp.floor(e), others))
    small = _sum_by_halves(e, others, even=even)
    small, total = all_sum((small, total), axis_name)
    ones = jnp.round(total - small)  # an integer, exact until an error of 1 is below rounding
    return _rest(small, ones), peak, ones == 0


def careful_sum(  # noqa: PLR0917  (as `centre` has them)
    f: Callable[[Array], Array], x: Array, peak: Array, axis: tuple[int, ...], axis_name: AxisName, form: Form
) -> Array:
    """Σ f(x − peak), summed as `centre` sums e^u in that form."""
    if _by_slices(x, axis, form):
        return all_sum(_by_halves(jnp.add, [f(part - peak) for part in _slices(x, axis[0])]), axis_name)
    length = _block_length(x, axis, form)
    if not length:
        if not form.order:
            return class_sum(f(x - peak), axis, axis_name)
        return _behind_select(class_sum(f(x - _apart(peak, 2)), axis, axis_name))

    def of_rows(x: Array, peak: Array) -> Array:
        cut, tail = _cut(x, length)
        peak = lax.optimization_barrier(peak)  # else XLA writes the e^u that `centre` computes too, for both to read
        block_sum = _behind_select(jnp.sum(f(cut - peak[..., None]), -1))
        return all_sum(_sum_by_halves(block_sum, f(tail - peak), even=not tail.shape[-1]), axis_name)

    return by_rows(of_rows, x, peak)


def class_sum(a: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """Σ over the classes, whose axes keep length 1."""
    return all_sum(jnp.sum(a, axis, keepdims=True), axis_name)


def beside_classes(a: Array, x: Array, axis: tuple[int, ...], form: Form) -> Array:
    """One number a row, for what has one a class: where those are few, copies beside each other, so that the transpose
    adds slices, and behind a select of −a for NaN, at which XLA ends their kernel."""
    if axis == (x.ndim - 1,) and _by_slices(x, axis, form):
        return jnp.concatenate([jnp.where(jnp.isnan(x[..., :1]), -a, a)] * x.shape[-1], -1)
    return a


def _by_slices(x: Array, axis: tuple[int, ...], form: Form) -> bool:
    """Where XLA on CPU adds a few slices faster than it reduces an axis (NOTES.md): the first axis, on jax 0.10, and
    the last one, up to rules of the first order."""
    if len(axis) != 1 or x.shape[axis[0]] < 2 or in_type(x):
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
    if classes <= _SHORT:
        return 0
    return even_length(classes, 64) if classes < _LONG else even_length(classes, 256) or 256


@functools.cache
def even_length(classes: int, usual: int) -> int:
    """About the usual length, one that leaves no class over and a number of blocks with a factor of 8 or 16, so that an
    axis that is sharded over as many devices is cut within each, and not across; 0 where there is none."""
    lengths = range(max(1, 3 * usual // 4), 8 * usual)
    even = [length for length in lengths if classes % (8 * length) == 0]

    def fitness(length: int) -> tuple[int, float]:
        return math.gcd(classes // length, 16), -max(length / usual, usual / length)

    return max(even, key=fitness, default=0)


def _cut(x: Array, length: int) -> tuple[Array, Array]:
    """The last axis as blocks, and the tail that they leave over."""
    blocks = x.shape[-1] // length
    return x[..., : blocks * length].reshape(*x.shape[:-1], blocks, length), x[..., blocks * length :]


def _in_bfloat16(x: Array, length: int) -> Array:
    """The blocks of an x that bfloat16 holds, in bfloat16; cut as integers, for jax 0.10 would widen what it cuts."""
    bits = lax.bitcast_convert_type(lax.stop_gradient(x).astype(jnp.bfloat16), jnp.uint16)
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
    x = lax.stop_gradient(x)
    if short:
        return jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    least = jnp.array(jnp.finfo(x.dtype).min, x.dtype)
    return jnp.expand_dims(lax.reduce(x, least, lax.max, axis), axis)
