"""Cross-entropy, focal and Poly-1: functions of −l_y and its one rule (MATH 7.1 to 7.4)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import _arguments, _labels, maps
from jsoftmax._arguments import Axis
from jsoftmax._collectives import AxisName, all_sum, by_rows, pick
from jsoftmax._labels import Labelled
from jsoftmax._series import expm1_ratio
from jsoftmax._sums import OF_L, Form, centre, class_sum
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp

# --- −l_y with its one rule ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(2, 3))
def negative_log_p(x: Array, label: Array, axis_name: AxisName = None, form: Form = OF_L) -> Array:
    """−l_y over the last axis of `x`, for labels `[..., 1]` in [0, K)."""
    return _negative_log_p(x, label, axis_name, form)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _negative_log_p(x: Array, label: Array, axis_name: AxisName, form: Form) -> Array:
    """−l_y = log1p(rest) + (max x − x_y): two terms that are not negative  (MATH 7.1)."""
    sums = centre(x, (x.ndim - 1,), axis_name, form)
    x_y = all_sum(_share_at_label(x, label, axis_name), axis_name)
    return jnp.log1p(sums.rest) + (sums.peak - x_y)


@_negative_log_p.defjvp
def _negative_log_p_jvp(axis_name: AxisName, form: Form, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Σ p ẋ − ẋ_y  (MATH 7.1); one array is kept for the backward pass.

    XLA on CPU scatters the label's −1 into the array that is written anyway, where comparing each class with it would
    take 1.6 times as long; for a few classes, or where that array would be narrowed afterwards, comparing is faster
    (benchmarks/NOTES.md).
    """
    (x, label), (x_dot, _) = primals, tangents
    axis = (x.ndim - 1,)
    form = form.of_rule()
    p = normalize(x, axis, axis_name, form).p
    if x.shape[-1] <= 16 or form.bfloat16:
        rate = class_sum((p - _is_label(x, label, axis_name)) * x_dot, axis)
    else:
        rate = class_sum(p * x_dot, axis) - _share_at_label(x_dot, label, axis_name)
    return negative_log_p(x, label, axis_name, form), all_sum(rate, axis_name)


def _is_label(x: Array, label: Array, axis_name: AxisName) -> Array:
    """1_y in the dtype of x; XLA fuses it, and no one-hot array is built."""
    own, inside = _labels.own_label(label, x.shape[-1], axis_name)
    return ((lax.broadcasted_iota(label.dtype, x.shape, x.ndim - 1) == own) & inside).astype(x.dtype)


def _share_at_label(a: Array, label: Array, axis_name: AxisName) -> Array:
    """a_y on the shard that has y, 0 on the others."""
    return _labels.share_at_label(lambda own: pick(a, own), label, a.shape[-1], axis_name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mean_negative_log_p(x: Array, axis_name: AxisName, form: Form) -> Array:
    """The mean of −l over the last axis, over the classes that are kept; 0 of none."""
    return _of_mean(x, axis_name, form)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _of_mean(x: Array, axis_name: AxisName, form: Form) -> Array:
    """log1p(rest) + (1/K) Σ (max x − x), two terms that are not negative  (MATH 7.2)."""
    axis = (x.ndim - 1,)
    sums = centre(x, axis, axis_name, form)
    return jnp.log1p(sums.rest) + _mean_of_kept(sums.peak - x, x, axis_name)


@_of_mean.defjvp
def _of_mean_jvp(axis_name: AxisName, form: Form, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Σ p ẋ − (1/K) Σ ẋ  (MATH 7.2)."""
    (x,), (x_dot,) = primals, tangents
    axis = (x.ndim - 1,)
    form = form.of_rule()
    rate = class_sum(normalize(x, axis, axis_name, form).p * x_dot, axis, axis_name)
    return _mean_negative_log_p(x, axis_name, form), rate - _mean_of_kept(x_dot, x, axis_name)


def _mean_of_kept(a: Array, x: Array, axis_name: AxisName) -> Array:
    kept, axis = ~jnp.isneginf(x), (x.ndim - 1,)
    total, count = all_sum((class_sum(jnp.where(kept, a, 0), axis), _count(kept, x.dtype)), axis_name)
    return total / jnp.maximum(count, 1)


def _count(kept: Array, dtype: Any) -> Array:
    return jnp.sum(kept, -1, keepdims=True).astype(dtype)


# --- cross-entropy and its kin -------------------------------------------------------------------------------


def _expected(  # noqa: PLR0917  (as its callers have them)
    given: Labelled,
    x: Array,
    labels: Array,
    axis_name: AxisName,
    form: Form,
    f: Callable[[Array], Array] = lambda n: n,
) -> Array:
    """α_y f(−l_y), NaN for a label out of range, 0 in rows that do not count; for distributions Σ q f(−l), +inf if
    q > 0 on a class left out."""
    if given.by_label:
        label, valid = _labels.in_range(labels, x.shape[-1], axis_name)
        loss = f(negative_log_p(x, label, axis_name, form))
        weights = jnp.where(valid, 1, jnp.nan).astype(x.dtype)
        if given.class_weights is not None:

            def of_label(own: Array) -> Array:
                return by_rows(lambda own, weights: weights[own], own, given.class_weights, axis_name=axis_name)

            share = _labels.share_at_label(of_label, label, x.shape[-1], axis_name)
            weights = weights * all_sum(share, axis_name)
        if given.rows is not None:
            weights = jnp.where(given.rows[..., None], weights, 0)
        if given.class_weights is not None or given.rows is not None:
            loss = jnp.where((weights == 0) & jnp.isposinf(loss), 0, loss)  # 0 · ∞ is 0
        return weights * loss
    axis, kept = (x.ndim - 1,), ~jnp.isneginf(x)
    impossible = jnp.where(labels == 0, 0, jnp.inf).astype(x.dtype)
    n = jnp.where(kept, -maps.log_p(x, axis, axis_name), 0)
    return class_sum(jnp.where(kept, labels * f(n), impossible), axis, axis_name)


@functools.partial(jax.jit, static_argnames="axis_name")
def _cross_entropy(  # noqa: PLR0917  (as the public function has them)
    given: Labelled,
    phi: Phi,
    margin: Array | None,
    smoothing: Array | None,
    z_loss: Array | None,
    axis_name: AxisName,
) -> Array:
    """MATH 7.2; None for what is not asked for, which costs nothing."""
    z, labels = given.counted()
    axis = (z.ndim - 1,)
    form = OF_L
    if margin is None:
        form = maps.form_for(OF_L, given.logits, phi, given.log_weights)
    else:
        z = z - margin * _is_label(z, _labels.in_range(labels, z.shape[-1], axis_name)[0], axis_name)
    x = maps.weighted_scores(phi, z, given.where, given.log_weights)
    loss = _expected(given, x, labels, axis_name, form)
    if smoothing is not None:
        if given.class_weights is None:
            spread = _mean_negative_log_p(x, axis_name, form)
        else:
            spread = _mean_of_kept(-maps.log_p(x, axis, axis_name) * given.class_weights, x, axis_name)
        loss = jnp.where((smoothing == 1) & jnp.isposinf(loss), 0, loss)
        loss = (1 - smoothing) * loss + smoothing * spread
    if z_loss is not None:
        L = maps.log_sum(x, axis, axis_name, form)
        loss = loss + z_loss * jnp.where(jnp.isneginf(L), 0, L) ** 2
    return given.keep_rows(loss)


@functools.partial(jax.jit, static_argnames=("f", "axis_name"))
def _of_log_p(
    f: Callable[[Array, Array], Array], given: Labelled, phi: Phi, parameter: Array, axis_name: AxisName
) -> Array:
    """α_y f(−l_y), or Σ q f(−l)."""
    z, labels = given.counted()
    x = maps.weighted_scores(phi, z, given.where, given.log_weights)
    form = maps.form_for(OF_L, given.logits, phi, given.log_weights)
    return given.keep_rows(_expected(given, x, labels, axis_name, form, lambda n: f(n, parameter)))


def _focal(n: Array, gamma: Array) -> Array:
    """(1 − p)^γ n for n = −log p, p = e^−n; n itself where p is no longer seen  (MATH 7.3).

    Near 0 it is n^{γ+1} ((1 − p)/n)^γ: so n = 0 has its derivatives.
    """
    near, far = n < 0.5, n > 800
    n_near, n_mid = jnp.where(near, n, 0), jnp.where(near | far, 1, n)
    mid = n_mid * (-jnp.expm1(-n_mid)) ** gamma
    return jnp.where(near, n_near ** (gamma + 1) * expm1_ratio(-n_near) ** gamma, jnp.where(far, n, mid))


def _poly(n: Array, epsilon: Array) -> Array:
    """n + ε (1 − p)  (MATH 7.4)."""
    return n - epsilon * jnp.expm1(-n)


# --- the public functions ------------------------------------------------------------------------------------


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
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
    margin the soft-margin softmax's, and with margin and phi=taylor(n) SM-Taylor's. A temperature is logits / T.

    Args:
      logits: scores `[..., K]`, of a floating dtype. Of many classes in bfloat16 no wider copy is made, with phi=exp
        and neither margin nor log_weights.
      labels: integers `[...]`, the class y; or, if floating, distributions q `[..., K]`: then −l_y is −Σ q l, and
        q takes part in the derivatives. Over several class axes an integer is a flat index, as in optax.
      axis: int, tuple or None (all): the classes' axis.
      where: bool; with as many dimensions as the logits it leaves classes out, with as many as the loss it leaves rows
        out, whose loss is 0.
      phi: the positive map φ.
      margin: m, subtracted from the label's score before φ.
      label_smoothing: a in [0, 1], shared by the K classes that are kept.
      z_loss: factor of L², L the log-normaliser of x: keeps logits from drifting.
      class_weights: α, of the class axes' shape. Like `margin`, it goes with integer labels.
      ignore_label: rows with that label have loss 0.
      log_weights: log w, broadcastable to the logits, e.g. log class frequencies for logit adjustment.
      axis_name: as in `jsoftmax.softmax`, where the classes are sharded: each device gives its part of the logits, of
        the class weights and of labels that are distributions; integers count over all devices, the first of several
        class axes being the sharded one.
    Returns: `[...]`, in the logits' dtype, but float32 for narrower ones; without smoothing within |u| + 4 ulp, of the
      loss of a confident right answer too (MATH 4). A label out of range: NaN; one on a class left out: +inf, with
      finite derivatives, but 0 if its weight (of class_weights, or 1 − a) is 0. A class with q = 0 adds 0. A score of
      +inf or NaN: NaN in that row alone.
    Raises: TypeError or ValueError for shapes or dtypes that do not fit, an option out of range, or one that does not
      go with distributions.
    Source: Banerjee et al. 2020 and Liang et al. 2017 (margin); de Brébisson & Vincent 2016 (φ); Szegedy et al. 2016
      (smoothing); Menon et al. 2021 (logit adjustment).

    >>> cross_entropy(jnp.array([[0., -20.], [1., 2.]]), jnp.array([0, 1]))
    Array([2.06115...e-09, 3.13261...e-01], dtype=float32)
    """
    function = "cross_entropy"
    options = {"log_weights": log_weights, "class_weights": class_weights, "ignore_label": ignore_label}
    given = _labels.check(function, logits, labels, axis, where, phi=phi, axis_name=axis_name, **options)

    def option(value: ArrayLike, **limits: tuple[float, float]) -> Array | None:
        checked = _labels.check_option(function, value, given.dtype, **limits)
        return None if _arguments.is_concrete_number(value) and value == 0 else checked

    m = option(margin, margin=(-math.inf, math.inf))
    if not given.by_label:
        _labels.reject_given(function, {"margin": m})
    a = option(label_smoothing, label_smoothing=(0.0, 1.0))
    return _cross_entropy(given, phi, m, a, option(z_loss, z_loss=(0.0, math.inf)), axis_name)


def focal_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
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
    """Focal loss: cross-entropy that counts the rows less that are right already.

    loss = α_y (1 − p_y)^γ (−l_y);  for distributions Σ q (1 − p)^γ (−l)     (MATH 7.3)

    Args:
      logits, labels, axis, where, phi, ignore_label, log_weights, axis_name: as in `cross_entropy`.
      gamma: γ ≥ 0, one number, may be traced; 0 is cross-entropy.
      class_weights: α, of the class axes' shape, with integer labels. The factor (1 − p_y)^γ knows nothing of them.
    Returns: `[...]`, as `cross_entropy`; 1 − p_y keeps its digits. For 0 < γ < 1 the second derivative is infinite
      where p_y = 1.
    Raises: as `cross_entropy`.
    Source: Lin et al. 2017, equation 5.

    >>> focal_cross_entropy(jnp.array([[3., 0.], [1., 2.]]), jnp.array([0, 1]))
    Array([0.00010..., 0.02265...], dtype=float32)
    """
    function = "focal_cross_entropy"
    options = {"log_weights": log_weights, "class_weights": class_weights, "ignore_label": ignore_label}
    given = _labels.check(function, logits, labels, axis, where, phi=phi, axis_name=axis_name, **options)
    gamma = _labels.check_option(function, gamma, given.dtype, gamma=(0.0, math.inf))
    return _of_log_p(_focal, given, phi, gamma, axis_name)


def poly_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
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
    """Poly-1 cross-entropy: the first term of its series in 1 − p has another weight.

    loss = α_y (−l_y + ε (1 − p_y));  for distributions Σ q (−l + ε (1 − p))     (MATH 7.4)

    Args:
      logits, labels, axis, where, phi, ignore_label, log_weights, axis_name: as in `cross_entropy`.
      epsilon: ε, one number, may be traced; 0 is cross-entropy.
      class_weights: α, of the class axes' shape, with integer labels; p_y knows nothing of them.
    Returns: `[...]`, as `cross_entropy`; 1 − p_y keeps its digits.
    Raises: as `cross_entropy`.
    Source: Leng et al. 2022, equation 6.

    >>> poly_cross_entropy(jnp.array([[3., 0.], [1., 2.]]), jnp.array([0, 1]))
    Array([0.14343..., 0.85114...], dtype=float32)
    """
    function = "poly_cross_entropy"
    options = {"log_weights": log_weights, "class_weights": class_weights, "ignore_label": ignore_label}
    given = _labels.check(function, logits, labels, axis, where, phi=phi, axis_name=axis_name, **options)
    epsilon = _labels.check_option(function, epsilon, given.dtype, epsilon=(-math.inf, math.inf))
    return _of_log_p(_poly, given, phi, epsilon, axis_name)
