"""Sums over classes to the last digits, and where they are sharded, over all shards (MATH 4.1, 13.2)."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._collectives import AxisName, all_max, all_sum, by_rows, in_type

_FEW, _MANY = 16, 4096


class Centred(NamedTuple):
    """What MATH 4 builds everything of; all but u keep the reduced axes."""

    u: Array
    """x − max x."""
    e: Array
    """e^u."""
    rest: Array
    """Σ e^u − 1 without cancellation: −1 for an empty row."""
    peak: Array
    """max x, 0 for an empty row."""


def centre(x: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Centred:
    """u = x − max x, e^u, and Σ e^u − 1 without cancellation (MATH 4.1).

    Ones are counted apart from what is smaller than one, so no small term is lost beside a 1. That takes a second sum,
    which is slow on CPU over many classes; so a long axis is cut into blocks, and only the block that holds the
    maximum, and what the blocks leave over, are summed with that care. The barriers keep XLA from fusing that block's
    gather and sums into the pass over all classes, which it would then not vectorise. Where e^u would not stay in a
    cache it is computed twice rather than written and read (benchmarks/NOTES.md).
    Right under plain autodiff too: the maximum carries no derivative, and counting has none.
    Of sharded classes one maximum is taken over all devices and one sum of both parts, so nothing is lost there either.
    """
    length = _length(x, axis)
    if not length:
        parts = _slices(x, axis[0]) if _has_few(x, axis) else [x]
        top = [jnp.max(lax.stop_gradient(part), axis, keepdims=True, initial=-jnp.inf) for part in parts]
        peak = _peak(_by_halves(jnp.maximum, top), axis_name)
        e = [jnp.exp(part - peak) for part in parts]
        ones = [jnp.floor(part) for part in e]
        small = _by_halves(jnp.add, [jnp.sum(a - b, axis, keepdims=True) for a, b in zip(e, ones, strict=True)])
        count = _by_halves(jnp.add, [jnp.sum(part, axis, keepdims=True) for part in ones])
        small, count = all_sum((small, count), axis_name)
        u = x - lax.optimization_barrier(peak)
        rest = small + (count - 1)
        if len(parts) > 1:  # else XLA writes e^u of each slice, for rest and all that is made of it (jax 0.12)
            rest = lax.optimization_barrier(rest)
        return Centred(u, jnp.exp(u), rest, peak)
    if in_type(x):
        rest, peak = by_rows(lambda x: centre(x, axis, axis_name)[2:], x)
        return Centred(x - peak, jnp.exp(x - peak), rest, peak)
    cut, tail = _cut(x, length)
    blocks = cut.shape[-2]
    block_peak = lax.optimization_barrier(jnp.max(lax.stop_gradient(cut), -1))
    tail_peak = jnp.max(lax.stop_gradient(tail), -1, keepdims=True, initial=-jnp.inf)
    peak = _peak(jnp.maximum(jnp.max(block_peak, -1, keepdims=True), tail_peak), axis_name)
    e_cut, e_tail = jnp.exp(cut - peak[..., None]), jnp.exp(tail - peak)
    block_sum = lax.optimization_barrier(jnp.sum(e_cut, -1))
    even = not tail.shape[-1]
    total = _sum_by_halves(block_sum, e_tail, even=even)
    # the block of the maximum; any, where the tail has it
    best = jnp.min(jnp.where(block_peak == peak, jnp.arange(blocks), blocks - 1), -1, keepdims=True)
    others = jnp.where(jnp.arange(blocks) == best, 0, block_sum)
    block = jnp.take_along_axis(cut, best[..., None], -2)[..., 0, :]
    e = jnp.exp(jnp.concatenate([block, tail], -1) - peak)
    e, others = lax.optimization_barrier((e - jnp.floor(e), others))
    small = _sum_by_halves(e, others, even=even)
    ones = jnp.round(total - small)  # an integer: exact until an error of 1 is below rounding
    small, ones = all_sum((small, ones), axis_name)
    u = x - peak
    shared = e_cut.reshape(*x.shape[:-1], blocks * length)
    shared = shared if even else jnp.concatenate([shared, e_tail], -1)
    return Centred(u, shared if x.shape[-1] < _MANY else jnp.exp(u), small + (ones - 1), peak)


def careful_sum(
    f: Callable[[Array], Array], x: Array, peak: Array, axis: tuple[int, ...], axis_name: AxisName = None
) -> Array:
    """Σ f(x − peak), over a long axis by blocks and halves."""
    length = _length(x, axis)
    if not length:
        return class_sum(f(x - peak), axis, axis_name)
    if in_type(x):
        return by_rows(lambda x, peak: careful_sum(f, x, peak, axis, axis_name), x, peak)
    cut, tail = _cut(x, length)
    peak = lax.optimization_barrier(peak)  # else XLA writes the e^u that `centre` computes too, for both to read
    block_sum = lax.optimization_barrier(jnp.sum(f(cut - peak[..., None]), -1))
    return all_sum(_sum_by_halves(block_sum, f(tail - peak), even=not tail.shape[-1]), axis_name)


def class_sum(a: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """Σ over the classes, whose axes keep length 1."""
    if _has_few(a, axis) and axis[0] < a.ndim - 1:
        return all_sum(_by_halves(jnp.add, _slices(a, axis[0])), axis_name)
    return all_sum(jnp.sum(a, axis, keepdims=True), axis_name)


def _has_few(a: Array, axis: tuple[int, ...]) -> bool:
    return len(axis) == 1 and 1 < a.shape[axis[0]] <= _FEW


def _slices(a: Array, axis: int) -> list[Array]:
    """A few classes one by one: XLA on CPU adds them faster than it reduces a short or a leading axis (NOTES.md)."""
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
    if classes <= 256:
        return 0
    usual = 64 if classes < _MANY else 256
    return even_length(classes, usual) or usual


@functools.cache
def even_length(classes: int, usual: int) -> int:
    """About the usual length, one that leaves no class over and a number of blocks with a factor of 8 or 16, so that an
    axis that is sharded over as many devices is cut within each, and not across; 0 where there is none."""
    lengths = range(max(1, 3 * usual // 4), 8 * usual)
    even = [length for length in lengths if classes % (8 * length) == 0]

    def fitness(length: int) -> tuple[int, float]:
        return math.gcd(classes // length, 16), -max(length / usual, usual / length)

    return max(even, key=fitness, default=0)


def _length(x: Array, axis: tuple[int, ...]) -> int:
    """The length of the blocks that a sum over an axis is cut into, 0 where it is not."""
    return block_length(x.shape[-1]) if x.ndim and axis == (x.ndim - 1,) else 0


def _cut(x: Array, length: int) -> tuple[Array, Array]:
    """The last axis as blocks, and the tail that they leave over."""
    blocks = x.shape[-1] // length
    return x[..., : blocks * length].reshape(*x.shape[:-1], blocks, length), x[..., blocks * length :]


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


def _peak(own: Array, axis_name: AxisName) -> Array:
    """The maximum, 0 for an empty row, so that −inf − peak is no NaN."""
    peak = all_max(own, axis_name)
    return jnp.where(jnp.isneginf(peak), 0, peak)
