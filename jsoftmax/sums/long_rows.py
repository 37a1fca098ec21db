"""The rules of p and log p for rows that GPUs read in several kernels: equal to the reference, function by function.

XLA writes to memory what two such kernels share, unless it is cheap to compute twice. A comparison of e^u and a
quotient for each class are not cheap. So the leading class is known by x = max x, what belongs to it alone is a number
of the row, and a product with 1/Σ e^u takes the place of the quotient (benchmarks/NOTES.md).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax.checks.arguments import read, widened
from jsoftmax.sums.reference import (
    SURE,
    LabelRates,
    Normalized,
    class_sum,
    is_empty,
    log_p_of,
    shifted,
    sum_without_one,
)


def normalized_of_shifted(x: Array, axis: tuple[int, ...]) -> Normalized:
    """`reference.normalized` where the maximum of each row with classes is 0, and so need not be sought."""
    x = read(x)
    rest, _ = sum_without_one(jnp.exp(x), axis)
    log_total = jnp.log1p(rest)
    log_p = log_p_of(x, x, log_total)
    return Normalized(log_p, jnp.exp(log_p), jnp.where(is_empty(rest), -jnp.inf, log_total))


def is_sure(rest: Array) -> Array:
    """Whether a row has a class with p > ¾, by its `rest`."""
    return rest < 1 / SURE - 1


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def exp_about_top(x: Array, axis: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """e^u, Σ e^u − 1 and max x, +∞ for a row without classes; with derivatives relative to those of the class with
    p > ¾, where a row has one."""
    _, e, rest, peak, _ = shifted(x, axis)
    return e, rest, jnp.where(jnp.isneginf(peak), jnp.inf, peak)


@exp_about_top.defjvp
def _exp_about_top_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """(e^u)˙ = e^u (ẋ − ẋ_top), (Σ e^u − 1)˙ = Σ_{k ≠ top} e^u ẋ − (Σ e^u − 1) ẋ_top, for u̇_top = 0."""
    (x,), (x_dot,) = primals, tangents
    e, rest, peak = exp_about_top(x, axis)
    x_dot, is_top = widened(x_dot), read(x) >= peak
    of_top, of_others = _sums_apart(is_top, e, x_dot, axis)
    sure = is_sure(rest)
    e_dot = jnp.where(is_top, jnp.where(sure, 0, x_dot), e * (x_dot - jnp.where(sure, of_top, 0)))
    return (e, rest, peak), (e_dot, of_others + of_top * jnp.where(sure, -rest, 1), jnp.zeros_like(peak))


def _sums_apart(is_top: Array, e: Array, x_dot: Array, axis: tuple[int, ...]) -> tuple[Array, Array]:
    """Σ e^u ẋ over the classes with the maximum, and over the others."""
    e_x_dot = e * x_dot
    return class_sum(jnp.where(is_top, e_x_dot, 0), axis), class_sum(jnp.where(is_top, 0, e_x_dot), axis)


def centred_tangent(x: Array, x_dot: Array, axis: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """ẋ − Σ p ẋ, e^u and Σ e^u. Of a class with p > ¾ it is ((Σ e^u − 1) ẋ − Σ_{k ≠ top} e^u ẋ) / Σ e^u."""
    e, rest, peak = exp_about_top(x, axis)
    is_top, total = read(x) >= peak, 1 + rest
    of_top, of_others = _sums_apart(is_top, e, x_dot, axis)
    sure, mean = is_sure(rest), (of_top + of_others) / total
    at_top = jnp.where(sure, (rest * of_top - of_others) / total, -mean)
    # two selects, so that, transposed, the sums over a row do not wait for `sure`
    return jnp.where(is_top, jnp.where(sure, 0, x_dot), x_dot) + jnp.where(is_top, at_top, -mean), e, total


def centred_rate(x: Array, x_dot: Array, axis: tuple[int, ...]) -> Array:
    """`reference.centred_rate`."""
    return centred_tangent(x, x_dot, axis)[0]


def p_rate(x: Array, x_dot: Array, axis: tuple[int, ...]) -> Array:
    """`reference.p_rate`."""
    difference, e, total = centred_tangent(x, x_dot, axis)
    return e * difference * (1 / total)


def log_p_rate(x: Array, x_dot: Array, axis: tuple[int, ...]) -> Array:
    """`reference.log_p_rate`."""
    return jnp.where(x > -jnp.inf, centred_tangent(x, x_dot, axis)[0], 0)


def label_rates(  # noqa: PLR0917  (as `sums.label_rates` has them)
    x: Array, kept: Array | None, p_y: Array, at_label: Array, x_dot: Array, is_label: Array
) -> LabelRates:
    """`reference.label_rates`, from sums of e^u ẋ, which need not wait for Σ e^u. XLA adds them up beside those of
    `exp_about_top` if the label is left out of ẋ, not of the product."""
    axis = (x.ndim - 1,)
    e, rest, _ = exp_about_top(x, axis)
    of_others = class_sum(e * jnp.where(is_label, 0, x_dot), axis) / (1 + rest)
    of_label = class_sum(jnp.where(is_label, x_dot, 0), axis)
    of_kept = None if kept is None else class_sum(jnp.where(kept, x_dot, 0), axis)
    return LabelRates(of_others + at_label * of_label, of_others + p_y * of_label, of_kept)
