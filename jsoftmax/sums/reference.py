"""Σ e^x over the classes and what is computed from it, with every digit: MATH 4 as it is written there.

GPUs and TPUs run these functions, and small arrays run them everywhere. x = −∞ leaves a class out. Results that reduce
the classes keep the class axes with length 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax.checks.arguments import read, widened
from jsoftmax.sharding import AxisName, pmax, psum

FAR = 1e4
"""e^−FAR is 0, in float64 too. −u is limited to FAR in e^u (−u), which would be 0 · ∞ for an infinite −u."""

SURE = 0.75
"""A probability that only one class of a row exceeds, however p is rounded."""


@jax.custom_jvp
def not_below(x: Array) -> Array:
    """x, with −∞ replaced by the least finite number. No other x changes, and no derivative does.

    If x is a product, this keeps the compiler from contracting it with the subtraction that follows (MATH 4.1).
    """
    return jnp.maximum(x, jnp.finfo(x.dtype).min)


@jax.custom_jvp
def not_above(x: Array) -> Array:
    """x, with +∞ replaced by the largest finite number, for the same reason."""
    return jnp.minimum(x, jnp.finfo(x.dtype).max)


for _limit in (not_below, not_above):  # where both are equal, JAX's derivative of a maximum would be half of this
    _limit.defjvps(lambda x_dot, _, x: x_dot)


class Normalized(NamedTuple):
    """l = log p, p and L = log Σ e^x, which keeps the reduced axes with length 1."""

    log_p: Array
    p: Array
    log_normalizer: Array


class ExpSums(NamedTuple):
    """The parts of log Σ e^x = peak + log1p(rest)."""

    peak: Array
    """max x; for a row without classes, the least finite number."""
    rest: Array
    """Σ e^u − 1, u = x − max x, without cancellation."""
    row_sums: Any
    """What the caller gave, one number for each row, summed over the shards in the same exchange."""


class Shifted(NamedTuple):
    """u = x − max x, e^u, Σ e^u − 1 and max x  (MATH 4.1)."""

    u: Array
    e: Array
    rest: Array
    peak: Array
    row_sums: Any


def shifted(x: Array, axis: tuple[int, ...], axis_name: AxisName = None, row_sums: Any = None) -> Shifted:
    """u, e^u and Σ e^u − 1 = Σ (e − [e]) + (Σ [e] − 1), [e] the nearest whole number  (MATH 4.1).

    x ← max(x, least finite number) is taken before the subtraction. If x is a product made in the same program, the
    compiler can then not fuse both into one operation with one rounding, so u is exactly 0 at the maximum. Derivatives
    treat the maximum of x and [e] as constants.
    """
    x = read(x)
    peak = pmax(jnp.max(lax.stop_gradient(x), axis, keepdims=True, initial=-jnp.inf), axis_name)
    u = not_below(x) - not_below(peak)
    e = exponential(x, u)
    rest, row_sums = sum_without_one(e, axis, axis_name, row_sums)
    return Shifted(u, e, rest, peak, row_sums)


def exponential(x: Array, u: Array) -> Array:
    """e^u, and 0 where x = −∞. A NaN in x gives NaN, even if `jnp.maximum` has dropped it from u.

    What replaces u is made of constants, not x itself: with x, XLA for GPUs reads the row three times, not once, if an
    axis of length 1 stands before the scores.
    """
    return jnp.exp(jnp.where(x > -jnp.inf, u, jnp.where(jnp.isnan(x), jnp.nan, -jnp.inf)))


def sum_without_one(
    e: Array, axis: tuple[int, ...], axis_name: AxisName = None, row_sums: Any = None
) -> tuple[Array, Any]:
    """Σ e − 1, and row_sums summed over the shards."""
    whole = jnp.round(e)
    small, ones = (jnp.sum(a, axis, keepdims=True) for a in (e - whole, whole))
    small, ones, row_sums = psum((small, ones, row_sums), axis_name)
    return rest_of(small, ones), row_sums


def rest_of(small: Array, ones: Array) -> Array:
    """Σ e^u − 1. For a row without classes it is a little more than −1, so that 1 + rest is not 0 (see `is_empty`)."""
    return small + (jnp.maximum(ones, jnp.finfo(small.dtype).eps) - 1)


def is_empty(rest: Array) -> Array:
    """Whether a row has no class, recognised by its `rest`."""
    return rest == float(jnp.finfo(rest.dtype).eps) - 1


def has_bad_score(x: Array, axis: tuple[int, ...]) -> Array:
    """Whether a row has a score of +∞ or NaN. Its maximum does not tell, since XLA may drop a NaN from it."""
    return jnp.any(~(x < jnp.inf), axis, keepdims=True)


def not_negative(a: Array) -> Array:
    """a, and 0 where only rounding made it negative. The derivatives are those of a."""
    return a + lax.stop_gradient(jnp.maximum(-a, 0))


def normalized(x: Array, axis: tuple[int, ...], axis_name: AxisName = None, in_one_sum: bool = False) -> Normalized:
    """l = u − log1p(rest), p = e^u / (1 + rest), L = max x + log1p(rest)  (MATH 4.2).

    in_one_sum: whether p is e^u / Σ e^u, with a sum of its own. Where a row is not added up one by one, p is then as
    exact, and a program that wants p alone makes one sum of each row, not two.
    """
    u, e, rest, peak, _ = shifted(x, axis, axis_name)
    log_total = jnp.log1p(rest)
    L = jnp.where(peak == jnp.inf, peak, peak + log_total)
    total = jnp.maximum(class_sum(e, axis), jnp.finfo(e.dtype).eps) if in_one_sum else 1 + rest
    return Normalized(log_p_of(x, u, log_total), e / total, L)


def log_p_of(x: Array, u: Array, log_total: Array) -> Array:
    """l = u − log Σ e^u, and −∞ where a class is left out, but NaN in a row that is NaN."""
    return jnp.where(x > -jnp.inf, u - log_total, -jnp.inf - lax.stop_gradient(log_total))


def centred(x: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> tuple[Array, Array]:
    """c = log p + H = u + m, 0 where p is 0, and H = log1p(rest) + m, m = Σ p (−u)  (MATH 4.3)."""
    u, e, rest, *_ = shifted(x, axis, axis_name)
    m = class_sum(e * -jnp.maximum(u, -FAR), axis, axis_name) / (1 + rest)
    return jnp.where(e == 0, 0, u + m), not_negative(jnp.log1p(rest) + m)


def exp_sums(x: Array, row_sums: Any, axis: tuple[int, ...], axis_name: AxisName = None) -> ExpSums:
    """max x and Σ e^u − 1  (MATH 4.1)."""
    _, _, rest, peak, row_sums = shifted(x, axis, axis_name, row_sums)
    return ExpSums(jnp.maximum(peak, jnp.finfo(peak.dtype).min), rest, row_sums)


def gap_sum(x: Array, peak: Array, axis: tuple[int, ...]) -> Array:
    """Σ e^u (−u), u = x − peak, with 0 · ∞ = 0  (MATH 4.3)."""
    u = difference(x, peak)
    return class_sum(jnp.exp(u) * -jnp.maximum(u, -FAR), axis)


def difference(x: Array, peak: Array) -> Array:
    """x − max x, with the subtraction kept apart from a product as in `shifted`; −∞ for a class that is left out.

    In a row with +∞ all differences are −∞, too: the caller recognises such a row by its maximum.
    """
    return not_above(x) - not_below(peak)


def minus_mean(a: Array, p: Array, axis: tuple[int, ...]) -> Array:
    """a − Σ p a.

    In a row with a class of p > ¾, a is taken relative to that of this class, which changes nothing but rounding:
    what is left of that class is the sum of p a over the others, not a − p a, which would lose the digits of a small
    1 − p  (MATH 4.5). Its own a is an exact 0, so that the same is true backwards.
    """
    is_top = p > SURE
    a = jnp.where(is_top, 0, a - class_sum(jnp.where(is_top, a, 0), axis))
    return a - class_sum(p * a, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def probabilities(x: Array, axis: tuple[int, ...]) -> Array:
    """p for the rules below, computed from many scores again, in one sum. Its derivative is one of them, so that a GPU
    reads a row once for derivatives of them, too.
    """
    return normalized(x, axis, in_one_sum=True).p


@probabilities.defjvp
def _probabilities_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x,), (x_dot,) = primals, tangents
    p = probabilities(x, axis)
    return p, p_rate(x, p, widened(x_dot), axis)


def _sharded_rate(x: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName) -> tuple[Array, Array, Array]:
    """ẋ − Σ p ẋ, e^u and Σ e^u. Σ e^u ẋ does not wait for Σ e^u, so that devices exchange both at once.

    Sharded classes do not get the care of `minus_mean`, which would take one more exchange (MATH 4.5).
    """
    _, e, rest, *_ = shifted(x, axis, axis_name)
    return x_dot - class_sum(e * x_dot, axis, axis_name) / (1 + rest), e, 1 + rest


def centred_rate(x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """ẋ − Σ p ẋ."""
    if axis_name is not None:
        return _sharded_rate(x, x_dot, axis, axis_name)[0]
    return minus_mean(x_dot, p, axis)


def p_rate(x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """ṗ = p (ẋ − Σ p ẋ)  (MATH 1.2).

    In a row with a class of p > ¾, ẋ is taken relative to that of this class, as in `minus_mean`.
    """
    if axis_name is not None:
        difference, e, total = _sharded_rate(x, x_dot, axis, axis_name)
        return e * difference / total
    is_top = p > SURE
    of_top, of_others = class_sum(jnp.where(is_top, x_dot, 0), axis), jnp.where(is_top, 0, p)
    # not of_others (ẋ − ẋ_top): in this form XLA for GPUs makes one kernel of its derivatives, too
    w = of_others * x_dot - of_others * of_top
    return w - p * class_sum(w, axis)


def log_p_rate(x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """l̇ = ẋ − Σ p ẋ, 0 where a class is left out  (MATH 1.4)."""
    return jnp.where(jnp.isneginf(x), 0, centred_rate(x, p, x_dot, axis, axis_name))


def weighted_deviations(w: Array, x_dot: Array, axis: tuple[int, ...]) -> Array:
    """w (ẋ − Σ w̄ ẋ), w̄ = w / Σ w, 0 in a row without weight  (MATH 8.3)."""
    return w * minus_mean(x_dot, w / total_weight(w, axis), axis)


def total_weight(w: Array, axis: tuple[int, ...]) -> Array:
    """Σ w, and 1 for a row without weight, so that it can be divided by."""
    total = class_sum(w, axis)
    return jnp.where(total == 0, 1, total)


class LabelRates(NamedTuple):
    """Derivatives along ẋ, over the last axis of this shard; the caller adds them up over all shards."""

    label: Array
    """Of −l_y."""
    log_normalizer: Array
    """Of L."""
    kept: Array | None
    """Σ ẋ over the classes that are kept; None where no mask was given."""


def label_rates(p: Array, kept: Array | None, at_label: Array, x_dot: Array, is_label: Array) -> LabelRates:
    """Σ p ẋ with the coefficient p_y − 1 at the label, Σ p ẋ, and Σ ẋ  (MATH 7.1, 7.2)."""

    def total(a: Array) -> Array:
        return jnp.sum(a, -1, keepdims=True)

    coefficients = jnp.where(is_label, at_label, p)
    of_kept = None if kept is None else total(jnp.where(kept, x_dot, 0))
    return LabelRates(total(coefficients * x_dot), total(p * x_dot), of_kept)


def class_sum(a: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """Σ over the classes; their axes keep length 1."""
    return psum(jnp.sum(a, axis, keepdims=True), axis_name)
