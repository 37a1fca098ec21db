"""Kullback–Leibler and Jensen–Shannon divergences, for every φ. The heads use its functions of one class too."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps, sums
from jsoftmax._pytree import without_zeros
from jsoftmax._series import excess_series, expm1
from jsoftmax.checks.arguments import Axis, accumulation_dtype, option_if_given, public, widened
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName
from jsoftmax.sums import FAR, SURE, class_sum

_NEAR = 0.5

# --- class by class ------------------------------------------------------------------------------------------


def excess(p: Array, r: Array, m: Array) -> Array:
    """p (e^−r − 1 + r) ≥ 0, r = log (p/m), and m where p is 0  (MATH 6.3)."""
    near = jnp.abs(r) < _NEAR
    r_near = jnp.where(near, r, 0)
    return jnp.where(near & (p > 0), p * r_near**2 * excess_series(r_near), p * r - p + m)


def log_ratio(log_p: Array, log_q: Array, impossible: Array) -> Array:
    """r = log p − log q, always finite. It is 0 where `impossible` says that q is 0; the caller treats these classes.

    A log p below −FAR counts as −FAR, so that p r is 0 where p is 0.
    """
    return jnp.where(impossible, 0, jnp.maximum(log_p, -FAR) - jnp.where(impossible, 0, log_q))


def shares(beta: Array | None) -> tuple[Array | float, Array | float]:
    """β and 1 − β; ½ and ½ for None, of which the compiler knows more than of an array."""
    return (0.5, 0.5) if beta is None else (beta, 1 - beta)


def share_or_nan(beta: Array) -> Array:
    """β, and NaN for a traced β that is out of [0, 1]."""
    return jnp.where((beta >= 0) & (beta <= 1), beta, jnp.nan)


def log_ratios_to_mean(p: Array, q: Array, beta: Array | None, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """log (p/m) and log (q/m), m = β p + (1 − β) q, exactly 0 where p = q  (MATH 6.8). beta: None for ½.

    The first is 0 where p is 0, and the second where q is 0. At an end of β, m may be 0 where p or q is positive: then
    the logarithm is 0 too, because β or 1 − β gives its class no weight.
    """
    there = ~(jnp.isneginf(log_p) & jnp.isneginf(log_q))
    r_p, r_q = _log_ratios(jnp.where(there, log_p, 0) - jnp.where(there, log_q, 0), beta)
    return jnp.where((p == 0) | jnp.isinf(r_p), 0, r_p), jnp.where((q == 0) | jnp.isinf(r_q), 0, r_q)


@jax.custom_jvp
def _log_ratios(delta: Array, beta: Array | None) -> tuple[Array, Array]:
    """log (p/m) and log (q/m) of δ = log p − log q  (MATH 6.8)."""
    of_p, of_q = shares(beta)
    return _log_ratio_to_mean(delta, of_p, of_q), _log_ratio_to_mean(-delta, of_q, of_p)


@functools.partial(_log_ratios.defjvp, symbolic_zeros=True)
def _log_ratios_jvp(primals: Any, tangents: Any) -> Any:
    return _log_ratios(*primals), _rates_of_logs(_ratios(*primals), primals[1], tangents)


def _exponent_bound(dtype: jnp.dtype) -> float:
    """A number whose exponential does not overflow, with some room: 80 for float32."""
    return 0.9 * math.log(jnp.finfo(dtype).max)


def _log_ratio_to_mean(delta: Array, own: Array | float, other: Array | float) -> Array:
    """log (p/m) = −log(own + other e^−δ), δ = log p − log q, own + other = 1  (MATH 6.8)."""
    nothing = math.log(2 / jnp.finfo(delta.dtype).eps)  # beyond this log b − log a, a + b is b to the dtype's digits
    if isinstance(other, float):  # ½, where nothing cancels, and e^−δ is large before it overflows
        grown = other * expm1(-jnp.maximum(delta, -nothing))
        return jnp.where(delta < -nothing, delta - math.log(other), -jnp.log1p(grown))
    bound, (log_own, log_other) = _exponent_bound(delta.dtype), map(jnp.log, lax.stop_gradient((own, other)))
    far = (other > 0) & (delta <= log_other - log_own - nothing)  # own is nothing beside other e^−δ
    at_far, near = jnp.where(far, delta, 0), jnp.where(far, 0, delta)
    r_far = at_far - jnp.log(other + own * jnp.exp(jnp.minimum(at_far, bound)))
    # For δ < −bound the rest of e^−δ comes after `other`, since e^−δ alone may overflow.
    grown = other * expm1(-jnp.maximum(near, -bound)) * jnp.exp(-jnp.clip(near + bound, -bound, 0))
    cancels = (near > _NEAR) & (other > 0.5)
    shift = jnp.where(log_own < -40, 40, 0)  # beside so small an `own`, e^−δ counts where it would underflow
    total = own * jnp.exp(shift) + other * jnp.exp(shift - jnp.where(cancels, near, 0))
    logarithm = jnp.where(cancels, jnp.log(total) - shift, jnp.log1p(jnp.where(cancels, 0, grown)))
    return jnp.where(far, r_far, -logarithm)


@jax.custom_jvp
def _ratios(delta: Array, beta: Array | None) -> tuple[Array, Array]:
    """p/m and q/m of δ = log p − log q. At an end of β, m is p or q alone, and the ratio of the other may overflow: it
    is then 0, since what it is multiplied by is 0: β or 1 − β, or, in derivatives in β, p or q."""
    (of_p, of_q), bound = shares(beta), _exponent_bound(delta.dtype)
    half = jnp.clip(delta / 2, -bound, bound)
    p, q = jnp.exp(half), jnp.exp(-half)  # over the root of their product
    p_over_m, q_over_m = (a / (of_p * p + of_q * q) for a in (p, q))
    return jnp.where(jnp.isinf(p_over_m), 0, p_over_m), jnp.where(jnp.isinf(q_over_m), 0, q_over_m)


@functools.partial(_ratios.defjvp, symbolic_zeros=True)
def _ratios_jvp(primals: Any, tangents: Any) -> Any:
    ratios = _ratios(*primals)
    rates = _rates_of_logs(ratios, primals[1], tangents)
    return ratios, tuple(ratio * rate for ratio, rate in zip(ratios, rates, strict=True))


def _rates_of_logs(ratios: tuple[Array, Array], beta: Array | None, tangents: Any) -> tuple[Array, Array]:
    """ṙ_p = (1 − β) (q/m) δ̇ + (q/m − p/m) β̇,   ṙ_q = −β (p/m) δ̇ + (q/m − p/m) β̇     (MATH 6.8).

    For 0 < β < 1 all factors are bounded, where autodiff of the logarithm would square e^−δ, which overflows.
    """
    (p_over_m, q_over_m), (of_p, of_q), (delta_dot, beta_dot) = ratios, shares(beta), without_zeros(tangents)
    by_beta = jnp.zeros_like(p_over_m) if beta_dot is None else (q_over_m - p_over_m) * beta_dot
    if delta_dot is None:
        return by_beta, by_beta
    return of_q * q_over_m * delta_dot + by_beta, by_beta - of_p * p_over_m * delta_dot


def divergence_terms(p: Array, q: Array, beta: Array | None, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    """The non-negative terms of D(p‖m) and D(q‖m), m = β p + (1 − β) q  (MATH 6.8)."""
    r_p, r_q = log_ratios_to_mean(p, q, beta, log_p, log_q)
    of_p, of_q = shares(beta)
    m = of_p * p + of_q * q
    return excess(p, r_p, m), excess(q, r_q, m)


def zero_where_not_nan(left_out: Array, a: Array) -> Array:
    """a, and 0 where it is left out, unless it is NaN."""
    return jnp.where(left_out & ~jnp.isnan(a), 0, a)


# --- Kullback–Leibler ----------------------------------------------------------------------------------------


def _has_no_class(x: Array, L: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """Whether all classes of a row are left out, as L = −∞ says.

    GPUs ask the scores instead, of rows that they read once: where L is read outside the kernel of a row, XLA computes
    what leads to it in kernels of its own.
    """
    if axis_name is not None or not sums.is_read_once(x, axis):
        return jnp.isneginf(L)

    def of_scores(x: Array, _: Array) -> Array:
        return jnp.all(jnp.isneginf(x), axis, keepdims=True)

    return sums.by_platform(x, L, on_gpus=of_scores, otherwise=lambda _, L: jnp.isneginf(L))


def _read_again(x: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """x for a rule, as `sums.read_again` gives it."""
    again = sums.read_again(x, axis, axis_name)
    return x if again is None else again


def _minus_mean(r: Array, log_p: Array, p: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """r − Σ p r, for a class of p > ¾ as (1 − p) r minus the sum over the others, with the digits of 1 − p  (MATH 4.5).

    Both sums are made in one pass over the row, unlike those of `sums.reference.minus_mean`.
    """
    mean = class_sum(p * r, axis, axis_name)
    if axis_name is not None:
        return r - mean
    of_others = class_sum(jnp.where(p > SURE, 0, p * r), axis)
    return jnp.where(p > SURE, -expm1(log_p) * r - of_others, r - mean)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _kl(x_p: Array, x_q: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """D = Σ p r, r = log p − log q, summed as Σ p (e^−r − 1 + r), which is equal since Σ q − Σ p = 0  (MATH 6.3)."""
    (log_p, p, L_p), (log_q, q, _) = (normalize(x, axis, axis_name) for x in (x_p, x_q))
    impossible = jnp.isneginf(x_q)
    D = class_sum(excess(p, log_ratio(log_p, log_q, impossible), q), axis, axis_name)
    infinite = class_sum((impossible & (x_p > -jnp.inf)).astype(D.dtype), axis, axis_name) > 0
    D = jnp.where(infinite & ~jnp.isnan(D), jnp.inf, D)
    return zero_where_not_nan(_has_no_class(x_p, L_p, axis, axis_name), D)


@_kl.defjvp
def _kl_jvp(axis: tuple[int, ...], axis_name: AxisName, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Ḋ = Σ p (r − Σ p r) ẋ_p + Σ (q − p) ẋ_q  (MATH 6.4). Finite where D is not, because r is 0 where q is."""
    D = _kl(*primals, axis, axis_name)
    x_p, x_q = (_read_again(x, axis, axis_name) for x in primals)
    x_p_dot, x_q_dot = map(widened, tangents)
    (log_p, p, L_p), (log_q, q, _) = (normalize(x, axis, axis_name) for x in (x_p, x_q))
    impossible = jnp.isneginf(x_q)
    r = log_ratio(log_p, log_q, impossible)
    by_p = p * _minus_mean(r, log_p, p, axis, axis_name)
    # where both are above ½, r has the digits of q − p; elsewhere e^−r may overflow, and 0 · ∞ is NaN backwards
    near = (p > 0.5) & (q > 0.5)
    q_minus_p = jnp.where(near, p * expm1(-jnp.where(near, r, 0)), q - p)
    by_q = zero_where_not_nan(impossible | jnp.isneginf(L_p), q_minus_p)
    rate = by_p * x_p_dot + by_q * x_q_dot
    return D, class_sum(rate, axis, axis_name)


@public
def kl_divergence(
    z_p: ArrayLike,
    z_q: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Kullback–Leibler divergence D(p‖q) of p = w φ(z_p)/Σ and q = w φ(z_q)/Σ, in nats.

    D = Σ p (log p − log q);   ∂D/∂z_p = p (log p − log q − D) s,   ∂D/∂z_q = (q − p) s     (MATH 6.3, 6.4)

    Args:
      z_p, z_q: scores `[..., K]` that broadcast together.
      axis: int, tuple or None (all): the classes' axis, reduced.
      where, phi, log_weights, axis_name: as in `entropy`, for both distributions.
    Returns: `[...]` ≥ 0, in the scores' common dtype, but float32 for narrower ones. A class with p = 0 adds 0. A class
      with q = 0 < p makes D = +inf; the derivatives of the other classes stay finite. If no class is left for p, D = 0.
      A score of +inf or NaN gives NaN in that row alone.
    Raises: as `entropy`, and ValueError if the scores do not broadcast together.
    Source: Kullback & Leibler 1951.

    >>> kl_divergence(jnp.array([0., 1.]), jnp.array([1., 0.]))
    Array(0.46211..., dtype=float32)
    """
    return maps.reduce_classes(
        _kl, maps.check("kl_divergence", {"z_p": z_p, "z_q": z_q}, axis, where, phi, log_weights, axis_name), phi
    )


# --- Jensen–Shannon ------------------------------------------------------------------------------------------


def _sum_of_divergences(  # noqa: PLR0917  (what two laws with a weight each need)
    x_p: Array,
    x_q: Array,
    beta: Array | None,
    w_p: Array | float,
    w_q: Array | float,
    axis: tuple[int, ...],
    axis_name: AxisName,
) -> Array:
    """w_p D(p‖m) + w_q D(q‖m), m = β p + (1 − β) q, of non-negative terms; 0 if no class is left for p or q.

    Both are added up in one sum: for two sums XLA for GPUs would write the terms to memory.
    """
    (log_p, p, L_p), (log_q, q, L_q) = (normalize(x, axis, axis_name) for x in (x_p, x_q))
    a, b = divergence_terms(p, q, beta, log_p, log_q)
    return zero_where_not_nan(jnp.isneginf(L_p) | jnp.isneginf(L_q), class_sum(w_p * a + w_q * b, axis, axis_name))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _jensen_shannon(x_p: Array, x_q: Array, beta: Array | None, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """β D(p‖m) + (1 − β) D(q‖m)  (MATH 6.8). beta: None for ½."""
    return _sum_of_divergences(x_p, x_q, beta, *shares(beta), axis, axis_name)


@functools.partial(_jensen_shannon.defjvp, symbolic_zeros=True)
def _jensen_shannon_jvp(axis: tuple[int, ...], axis_name: AxisName, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Σ β p (r_p − D(p‖m)) ẋ_p + Σ (1 − β) q (r_q − D(q‖m)) ẋ_q + (D(p‖m) − D(q‖m)) β̇  (MATH 6.8)."""
    (x_p, x_q, beta), (x_p_dot, x_q_dot, beta_dot) = primals, without_zeros(tangents)
    D, rates = _jensen_shannon(x_p, x_q, beta, axis, axis_name), []
    x_p, x_q = (_read_again(x, axis, axis_name) for x in (x_p, x_q))
    of_both = [normalize(x, axis, axis_name) for x in (x_p, x_q)]
    r = log_ratios_to_mean(of_both[0].p, of_both[1].p, beta, of_both[0].log_p, of_both[1].log_p)
    for of, r_of, share, dot in zip(of_both, r, shares(beta), (x_p_dot, x_q_dot), strict=True):
        if dot is not None:
            # NaN also for a law without classes beside one that is NaN
            centred = jnp.where(jnp.isnan(D), jnp.nan, _minus_mean(r_of, of.log_p, of.p, axis, axis_name))
            rates.append(share * of.p * centred * widened(dot))
    D_dot = jnp.zeros_like(D)
    if rates:
        empty = jnp.isneginf(of_both[0].log_normalizer) | jnp.isneginf(of_both[1].log_normalizer)
        D_dot = class_sum(functools.reduce(jnp.add, rates), axis, axis_name)
        D_dot = jnp.where(empty & ~jnp.isnan(D), 0, D_dot)
    if beta_dot is not None:
        D_dot = D_dot + _sum_of_divergences(x_p, x_q, beta, 1.0, -1.0, axis, axis_name) * beta_dot
    return D, D_dot


@public
def jensen_shannon_divergence(
    z_p: ArrayLike,
    z_q: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    beta: ArrayLike = 0.5,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Generalised Jensen–Shannon divergence of p = w φ(z_p)/Σ and q = w φ(z_q)/Σ, in nats.

    D = β D(p‖m) + (1 − β) D(q‖m),   m = β p + (1 − β) q;   ∂D/∂z_p = β p (log (p/m) − D(p‖m)) s(z_p)     (MATH 6.8)

    β = ½ is the Jensen–Shannon divergence. D is 0 at both ends of β. Near them it is β or 1 − β times a
    Kullback–Leibler divergence: D/β → `kl_divergence(z_p, z_q)` for β → 0, and D/(1 − β) → `kl_divergence(z_q, z_p)`
    for β → 1. `heads.linear_jsd` computes it for two linear heads without their logits.

    Args:
      z_p, z_q, axis, where, phi, log_weights, axis_name: as in `kl_divergence`.
      beta: β in [0, 1], one number, which may be traced. Differentiable. A traced one out of range gives NaN.
    Returns: `[...]` in [0, log 2], in the scores' common dtype, but float32 for narrower ones. D and its derivatives
      are finite where p or q is 0; at an end of β, the derivative in β leaves out the classes where only one of p and q
      is 0. Small divergences keep their digits, and equal scores give 0. Derivatives do not keep theirs where p and q
      hardly overlap: they are near 0 there (MATH 6.8). D = 0 if no class is left for p, or none for q. A score of +inf
      or NaN gives NaN in that row alone.
    Raises: as `kl_divergence`, and ValueError if β is known at trace time and outside [0, 1].
    Source: Lin 1991, equation 5.1 (weights β, 1 − β).

    >>> jensen_shannon_divergence(jnp.array([0., 1.]), jnp.array([1., 0.]))
    Array(0.1109..., dtype=float32)
    """
    function = "jensen_shannon_divergence"
    arguments = maps.check(function, {"z_p": z_p, "z_q": z_q}, axis, where, phi, log_weights, axis_name)
    share = option_if_given(function, beta, accumulation_dtype(arguments.dtype), default=0.5, beta=(0.0, 1.0))
    share = None if share is None else share_or_nan(share)
    return maps.reduce_classes(_jensen_shannon, arguments, phi, parameters=(share,))
