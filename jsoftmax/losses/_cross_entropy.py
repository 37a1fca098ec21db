"""Cross-entropy, focal and Poly-1 loss: functions of −l_y, which has one derivative rule (MATH 7.1 to 7.4)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax._series import expm1, expm1_ratio
from jsoftmax.checks.arguments import Axis, check_option, option_if_given, public, read
from jsoftmax.checks.labels import Labelled, check_labelled, reject_given
from jsoftmax.checks.top_targets import TopTargets, reject_per_class_options
from jsoftmax.losses._terms import mean_of_kept, negative_log_p, terms
from jsoftmax.losses._top import top_row
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName, apply_to_rows, is_label, local_value_at_label, psum
from jsoftmax.sums import class_sum, not_negative, zero_where

# --- what losses and heads make of them ----------------------------------------------------------------------


def zero_weightless(loss: Array, weight: Array) -> Array:
    """The loss, 0 instead of +∞ where its weight is 0: 0 · ∞ is 0."""
    return jnp.where((weight == 0) & jnp.isposinf(loss), 0, loss)


def regularized(loss: Array, mean: Any, L: Array, smoothing: Array | None, z_loss: Array | None) -> Array:
    """(1 − a) loss + a mean + z_loss L², with the mean of −l over the classes that are kept  (MATH 7.2). An option that
    is None costs nothing; without smoothing, `mean` may be None."""
    if smoothing is not None:
        loss = (1 - smoothing) * zero_weightless(loss, 1 - smoothing) + smoothing * mean
    if z_loss is not None:
        loss = loss + z_loss * jnp.where(jnp.isneginf(L), 0, L) ** 2
    return loss


# --- cross-entropy and its kin -------------------------------------------------------------------------------


def _weighted(given: Labelled, loss: Array, label: Array, axis_name: AxisName) -> Array:
    """α_y times the loss, and 0 where the label is on a class that the mask leaves out."""
    if given.class_weights is not None:
        weights = given.class_weights if given.classes else jnp.ones(1, loss.dtype)  # nothing can be taken from none

        def of_label(own: Array) -> Array:
            return apply_to_rows(lambda own, weights: weights[own], own, weights, axis_name=axis_name)

        weight = psum(local_value_at_label(of_label, label, given.classes, axis_name), axis_name)
        loss = weight * zero_weightless(loss, weight)
    if given.where is not None:
        loss = jnp.where(given.keeps(label, axis_name), loss, 0)
    return loss


def _against(given: Labelled, x: Array, axis_name: AxisName) -> tuple[Array, Array, AxisName]:
    """The scores of a row, its targets times class weights, and the axis name over which both are sharded."""
    if given.by_top:
        return *top_row(given, x, axis_name), None
    q = given.targets()
    if given.class_weights is not None:
        q = q * lax.broadcast_to_rank(given.class_weights, q.ndim)
        # a weight may be infinite where the mask is False
        q = q if given.where is None else zero_where(~given.where, q)
    return x, q, axis_name


def expected(q: Array, x: Array, n: Array) -> Array:
    """Σ q n over the last axis; +inf if q > 0 on a class that is impossible. (q is 0 where a mask leaves a class
    out.)"""
    impossible = jnp.where(q == 0, 0, jnp.inf).astype(q.dtype)
    return class_sum(jnp.where(jnp.isneginf(x), impossible, q * n), (x.ndim - 1,))


def minus_log_p(x: Array, axis_name: AxisName = None) -> Array:
    """−l, and 0 where a class is left out."""
    return jnp.where(jnp.isneginf(x), 0, not_negative(-maps.log_p(x, (x.ndim - 1,), axis_name)))


@functools.partial(jax.jit, static_argnames="axis_name")
def _cross_entropy(  # noqa: PLR0917  (as the public function has them)
    given: Labelled,
    phi: Phi,
    margin: Array | None,
    smoothing: Array | None,
    z_loss: Array | None,
    axis_name: AxisName,
) -> Array:
    """MATH 7.2. An option that is not used is None, and costs nothing."""
    z, (label, valid) = given.scores(), given.label(axis_name)
    # then x is read once, and may stay narrow
    alone = given.by_label and (smoothing is None or given.class_weights is None)
    z = z if alone and margin is None else read(z)
    if margin is not None:
        z = z - margin * is_label(z.shape, label, axis_name).astype(z.dtype)
    x = maps.weighted_scores(phi, z, given.where, given.log_weights)
    if alone:
        loss, L, spread = terms(x, label, axis_name, smoothing is not None)
    else:
        row, q, name = (x, None, axis_name) if given.by_label else _against(given, x, axis_name)
        n = minus_log_p(row, name)
        weights = 1 if given.class_weights is None else lax.broadcast_to_rank(given.class_weights, n.ndim)
        spread = None if smoothing is None else mean_of_kept(weights * n, row, name)
        if q is None:
            loss, L, _ = terms(x, label, axis_name)
        else:
            loss, L = psum(expected(q, row, n), name), maps.log_sum(row, (x.ndim - 1,), name)
    if given.by_label:
        loss = _weighted(given, loss, label, axis_name)
    return given.finish(regularized(loss, spread, L, smoothing, z_loss), valid)


@functools.partial(jax.jit, static_argnames=("f", "axis_name"))
def _of_log_p(
    f: Callable[[Array, Array], Array], given: Labelled, phi: Phi, parameter: Array, axis_name: AxisName
) -> Array:
    """α_y f(−l_y) for labels, or Σ α q f(−l) for distributions."""
    label, valid = given.label(axis_name)
    x = maps.weighted_scores(phi, given.scores(), given.where, given.log_weights)
    if given.by_label:
        loss = f(negative_log_p(x, label, axis_name), parameter)
        return given.finish(_weighted(given, loss, label, axis_name), valid)
    row, q, name = _against(given, x, axis_name)
    loss = expected(q, row, f(minus_log_p(row, name), parameter))
    return given.finish(psum(loss, name), valid)


def _focal(n: Array, gamma: Array) -> Array:
    """(1 − p)^γ n for n = −log p, p = e^−n; n itself where p has underflowed  (MATH 7.3).

    Near 0 it is computed as n^{γ+1} ((1 − p)/n)^γ, whose derivatives are right at n = 0, too.
    """
    near, far = n < 0.5, n > 800
    n_near, n_mid = jnp.where(near, n, 0), jnp.where(near | far, 1, n)
    mid = n_mid * (-expm1(-n_mid)) ** gamma
    return jnp.where(near, n_near ** (gamma + 1) * expm1_ratio(-n_near) ** gamma, jnp.where(far, n, mid))


def _poly(n: Array, epsilon: Array) -> Array:
    """n + ε (1 − p)  (MATH 7.4)."""
    return n - epsilon * expm1(-n)


# --- the public functions ------------------------------------------------------------------------------------


@public
def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | TopTargets,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    margin: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Cross-entropy of labels under p = w φ(z) / Σ w φ(z), in nats, not reduced.

    loss = (1 − a) α_y (−l_y) + (a/K) Σ α_k (−l_k) + z_loss · L²,   x = ψ(z − m 1_y) + log w     (MATH 7.2)
    ∂(−l_y)/∂z = (p − 1_y) s     (MATH 7.1)

    With phi=taylor(2) it is the log-Taylor softmax's loss, with phi=spherical(ε) the log-spherical softmax's; with a
    margin the soft-margin softmax's, and with margin and phi=taylor(n) SM-Taylor's. For a temperature T
    pass logits / T.

    Args:
      logits: scores `[..., K]`, of a floating dtype. Many classes in bfloat16 are read without a wider copy if phi=exp
        and there is neither a margin nor log_weights.
      labels: integers `[...]`, the class y; or, if floating, distributions q `[..., K]`: then −l_y is −Σ q l, and
        q takes part in the derivatives; or `TopTargets`, k classes of each row and the rest as one, without
        label_smoothing     (MATH 7.8). Over several class axes an integer is a flat index, as in optax.
      axis: int, tuple or None (all): the classes' axis.
      where: bool; with as many dimensions as the logits it leaves classes out of the whole computation, with as many
        as the loss it leaves rows out. The table below says what a label there gives.
      phi: the positive map φ.
      margin: m, subtracted from the label's score before φ; with integer labels.
      label_smoothing: a in [0, 1], shared by the K classes that are kept.
      z_loss: factor of L², L the log-normaliser of x: keeps logits from drifting.
      class_weights: α, of the class axes' shape; the loss of a distribution is then −Σ α q l. Not with `TopTargets`,
        whose rest has none.
      ignore_label: rows with that label have loss 0.
      log_weights: log w, broadcastable to the logits, e.g. log class frequencies for logit adjustment.
      axis_name: as in `jsoftmax.softmax`, where the classes are sharded: each device gives its part of the logits, of
        the class weights and of labels that are distributions; integers count over all devices, the first of several
        class axes being the sharded one.
    Returns: `[...]`, in the logits' dtype, but float32 for narrower ones; without smoothing, it and its gradient have
      the digits of `jsoftmax.log_softmax`, also for a confident right answer (MATH 4). A class with q = 0 adds 0.
      A score of +inf or NaN: NaN in that row alone. Otherwise, as in every loss and head (MATH 5):

      | the label, or mass of q | loss | derivatives |
      |---|---|---|
      | in a row that `where` or `ignore_label` leaves out, or of which `where` leaves no class | 0 | 0 |
      | on a class that `where` leaves out | that mass counts 0 | 0 |
      | on a class with score or log-weight −inf, or φ = 0 | +inf; 0 if its weight, of α or 1 − a, is 0 | finite |
      | out of range, in a row that is not left out | NaN | 0 |
    Raises: TypeError or ValueError for shapes or dtypes that do not fit, an option out of range, or one that does not
      go with distributions.
    Source: Banerjee et al. 2020 and Liang et al. 2017 (margin); de Brébisson & Vincent 2016 (φ); Szegedy et al. 2016
      (smoothing); Menon et al. 2021 (logit adjustment).

    >>> cross_entropy(jnp.array([[0., -20.], [1., 2.]]), jnp.array([0, 1]))
    Array([2.06115...e-09, 3.13261...e-01], dtype=float32)
    """
    function = "cross_entropy"
    options = {"log_weights": log_weights, "class_weights": class_weights, "ignore_label": ignore_label}
    given = check_labelled(function, logits, labels, axis, where, phi=phi, axis_name=axis_name, **options)
    option = functools.partial(option_if_given, function, dtype=given.dtype)
    m = option(margin, margin=(-math.inf, math.inf))
    if not given.by_label:
        reject_given(function, {"margin": m})
    a = option(label_smoothing, label_smoothing=(0.0, 1.0))
    if given.by_top:
        reject_per_class_options(function, label_smoothing=a)
    return _cross_entropy(given, phi, m, a, option(z_loss, z_loss=(0.0, math.inf)), axis_name)


@public
def focal_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | TopTargets,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    gamma: ArrayLike = 2.0,
    phi: Phi = exp,
    class_weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Focal loss: cross-entropy that down-weights rows that are already classified correctly.

    loss = α_y (1 − p_y)^γ (−l_y);  for distributions Σ q (1 − p)^γ (−l)     (MATH 7.3)

    Args:
      logits, labels, axis, where, phi, ignore_label, log_weights, axis_name: as in `cross_entropy`.
      gamma: γ ≥ 0, one number, may be traced; 0 is cross-entropy.
      class_weights: α, of the class axes' shape, as in `cross_entropy`. The factor (1 − p_y)^γ does not depend on them.
    Returns: `[...]`, as `cross_entropy`; 1 − p_y keeps its digits. For 0 < γ < 1 the second derivative is infinite
      where p_y = 1.
    Raises: as `cross_entropy`.
    Source: Lin et al. 2017, equation 5.

    >>> focal_cross_entropy(jnp.array([[3., 0.], [1., 2.]]), jnp.array([0, 1]))
    Array([0.00010..., 0.02265...], dtype=float32)
    """
    function = "focal_cross_entropy"
    options = {"log_weights": log_weights, "class_weights": class_weights, "ignore_label": ignore_label}
    given = check_labelled(function, logits, labels, axis, where, phi=phi, axis_name=axis_name, **options)
    gamma = check_option(function, gamma, given.dtype, gamma=(0.0, math.inf))
    return _of_log_p(_focal, given, phi, gamma, axis_name)


@public
def poly_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike | TopTargets,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    epsilon: ArrayLike = 2.0,
    phi: Phi = exp,
    class_weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Poly-1 cross-entropy: another weight for the first term of its series in 1 − p.

    loss = α_y (−l_y + ε (1 − p_y));  for distributions Σ q (−l + ε (1 − p))     (MATH 7.4)

    Args:
      logits, labels, axis, where, phi, ignore_label, log_weights, axis_name: as in `cross_entropy`.
      epsilon: ε, one number, may be traced; 0 is cross-entropy.
      class_weights: α, of the class axes' shape, as in `cross_entropy`; p_y does not depend on them.
    Returns: `[...]`, as `cross_entropy`; 1 − p_y keeps its digits.
    Raises: as `cross_entropy`.
    Source: Leng et al. 2022, equation 6.

    >>> poly_cross_entropy(jnp.array([[3., 0.], [1., 2.]]), jnp.array([0, 1]))
    Array([0.14343..., 0.85114...], dtype=float32)
    """
    function = "poly_cross_entropy"
    options = {"log_weights": log_weights, "class_weights": class_weights, "ignore_label": ignore_label}
    given = check_labelled(function, logits, labels, axis, where, phi=phi, axis_name=axis_name, **options)
    epsilon = check_option(function, epsilon, given.dtype, epsilon=(-math.inf, math.inf))
    return _of_log_p(_poly, given, phi, epsilon, axis_name)
