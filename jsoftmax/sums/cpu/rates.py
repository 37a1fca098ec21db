"""Derivatives of the sums of a large array (benchmarks/NOTES.md)."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax.checks.arguments import widened
from jsoftmax.sharding import AxisName, has_explicit_sharding
from jsoftmax.sums.cpu.paths import Form, Want, adds_slices, is_long
from jsoftmax.sums.reference import LabelRates, class_sum, total_weight


def centred_rate(_: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """`reference.centred_rate` without its care for p > ¾: such a class has an absolute error of some ulp of ẋ."""
    return x_dot - class_sum(p * x_dot, axis, axis_name)


def p_rate(  # noqa: PLR0917  (as rules, which have no keywords, hand them on)
    x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName, want: Want, order: int
) -> Array:
    """`reference.p_rate`, in the same way. Long rows take p ẋ − p Σ p ẋ: softmax's Hessian product at (256, 32768) went
    from 0.96 to 0.74 of jax.nn ("e^u once or twice")."""
    p_x_dot = p * x_dot
    mean = class_sum(p_x_dot, axis, axis_name)
    # the pullback is p (g − Σ p g), or else p g − p Σ p g. For the latter XLA writes p g, and yet it is faster as long
    # as p g stays in the cache
    in_one_kernel = want == "p" and is_long(p, axis)
    return (
        p_x_dot - p * mean
        if in_one_kernel
        else p * (x_dot - broadcast_to_classes(mean, x, x_dot, axis, Form(want, order)))
    )


def log_p_rate(  # noqa: PLR0917  (as rules, which have no keywords, hand them on)
    x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName, order: int
) -> Array:
    """`reference.log_p_rate`, from p, in the same way."""
    mean = class_sum(p * x_dot, axis, axis_name)
    return jnp.where(jnp.isneginf(x), 0, x_dot - broadcast_to_classes(mean, x, x_dot, axis, Form("log_p", order)))


def broadcast_to_classes(a: Array, x: Array, x_dot: Array, axis: tuple[int, ...], form: Form) -> Array:
    """One number for each row, repeated for its classes. For few classes the copies are concatenated, so that the
    transpose adds slices: log_softmax's vjp at (10⁶, 8) went from 2.0 to 0.55 of jax.nn ("Few classes"). The select of
    −a for NaN changes nothing, but XLA ends a kernel there."""
    if axis == (x.ndim - 1,) and adds_slices(x_dot, axis, form):
        return jnp.concatenate([jnp.where(jnp.isnan(x[..., :1]), -a, a)] * x.shape[-1], -1)
    return a


def weighted_deviations(w: Array, x_dot: Array, axis: tuple[int, ...]) -> Array:
    """`reference.weighted_deviations`, in the same way."""
    return w * (x_dot - class_sum(w / total_weight(w, axis) * x_dot, axis))


def compares_labels(x_dot: Array) -> bool:
    """Whether comparing each class with the label is the fast way on CPU too. It is for few classes (a million rows of
    eight take 33 ms, and 41 by a scatter), where the gradient will be narrowed (bfloat16 at (1024, 32768): 54 ms, not
    75), and for sharded classes, which a scatter would gather ("Cross-entropy of labels", "Scores in bfloat16")."""
    return x_dot.shape[-1] <= 16 or x_dot.dtype == jnp.bfloat16 or has_explicit_sharding(x_dot)


def label_rates(  # noqa: PLR0917  (as rules, which have no keywords, hand them on)
    p: Array, kept: Array | None, p_y: Array, at_label: Array, x_dot: Array, own: Array, inside: Array
) -> LabelRates:
    """`reference.label_rates`. Backwards, XLA writes an array and then sets the label's entry in place; comparing each
    class with the label would take 1.6 times as long."""
    x_dot = widened(x_dot)
    rows = [lax.broadcasted_iota(own.dtype, own.shape, i) for i in range(own.ndim - 1)]
    place = jnp.where(inside, own, x_dot.shape[-1])  # an index beyond the end: nothing is set there
    others = x_dot.at[(*rows, place)].set(0, mode="drop", unique_indices=True)
    x_dot_y = jnp.where(inside, jnp.take_along_axis(x_dot, own, -1), 0)

    def total(a: Array) -> Array:
        return jnp.sum(a, -1, keepdims=True)

    of_others, of_kept = total(p * others), None
    if kept is not None:
        of_kept = total(jnp.where(kept, others, 0)) + jnp.where(jnp.take_along_axis(kept, own, -1), x_dot_y, 0)
    return LabelRates(of_others + at_label * x_dot_y, of_others + p_y * x_dot_y, of_kept)
