"""The closed-form Jacobians, Hessians and second-derivative tensors by name, for every φ. Classes are the last axis."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax.checks.arguments import public
from jsoftmax.entropy import centred_log_p
from jsoftmax.maps import normalize
from jsoftmax.operators import DiagonalPlusLowRank
from jsoftmax.phi import Exponential, Phi, curvature, exp, slope


class _Parts(NamedTuple):
    """p, c = log p + H, slope s and curvature t, each `[..., K]`; s and t are 0 where a class is left out."""

    p: Array
    c: Array
    s: Array
    t: Array


@functools.partial(jax.jit, static_argnames="form")
def _of_parts(
    form: Callable[..., Any],
    scores: tuple[Array, ...],
    where: Array | None,
    log_weights: Array | None,
    phi: Phi,
) -> Any:
    z, *others = scores
    x = maps.weighted_scores(phi, z, where, log_weights)
    axis, out = (x.ndim - 1,), jnp.isneginf(x)
    z, *others = (jnp.where(out, 0, a) for a in (z, *others))
    s, t = (jnp.where(out, 0, rate(phi, z)) for rate in (slope, curvature))
    return form(_Parts(normalize(x, axis).p, centred_log_p(x, axis)[0], s, t), phi, *others)


def _closed_form(  # noqa: PLR0917  (as the public functions have them)
    function: str, form: Callable[..., Any], scores: dict[str, Any], where: Any, phi: Any, log_weights: Any
) -> Any:
    """form(parts, φ, *others). scores: z and other arrays that broadcast with it; they are set to 0 where a class is
    left out."""
    arguments = maps.check(function, scores, -1, where, phi, log_weights)
    return _of_parts(form, arguments.scores, arguments.where, arguments.log_weights, phi)


def _low_rank(
    d: Array, columns: list[tuple[Array, Array]], symmetric: bool = True, covariance: bool = False
) -> DiagonalPlusLowRank:
    left, right = (jnp.stack(side, -1) for side in zip(*columns, strict=True))
    return DiagonalPlusLowRank(d, left, right, symmetric, covariance)


def _jacobian(parts: _Parts, phi: Phi) -> DiagonalPlusLowRank:
    p, _, s, _ = parts
    is_exp = isinstance(phi, Exponential)
    return _low_rank(p * s, [(-p, p * s)], symmetric=is_exp, covariance=is_exp)


@public
def softmax_jacobian(
    z: ArrayLike, where: Bool[ArrayLike, "..."] | None = None, *, phi: Phi = exp, log_weights: ArrayLike | None = None
) -> DiagonalPlusLowRank:
    """The Jacobian of the softmax, ∂p_i/∂z_j.

    J = diag(p s) − p (p s)ᵀ     (MATH 1.6)

    Args:
      z: scores `[..., K]`, any floating dtype; integers promote. The classes are the last axis.
      where, phi, log_weights: as in `jsoftmax.softmax`.
    Returns: an operator, one matrix `[K, K]` for each row, in the dtype of `z` but float32 at least: `J.mv(v)` costs
      O(K), `J.as_matrix()` is dense. For phi=exp it is symmetric and `J.pinv_mv` is its pseudo-inverse. Rows and
      columns of classes left out are 0, all of an empty row; a score of +inf or NaN makes its row's matrix NaN.
    Raises: as `jsoftmax.softmax`.
    Source: the article, section 2; φ ≠ exp: its section 3.

    >>> softmax_jacobian(jnp.array([0., 1.])).as_matrix()
    Array([[ 0.19661..., -0.19661...],
           [-0.19661...,  0.19661...]], dtype=float32)
    """
    return _closed_form("softmax_jacobian", _jacobian, {"z": z}, where, phi, log_weights)


def _second_cumulant(parts: _Parts, phi: Phi) -> DiagonalPlusLowRank:
    p, _, s, t = parts
    return _low_rank(p * s**2 + p * t, [(-p * s, p * s)], covariance=isinstance(phi, Exponential))


@public
def log_normalizer_hessian(
    z: ArrayLike, where: Bool[ArrayLike, "..."] | None = None, *, phi: Phi = exp, log_weights: ArrayLike | None = None
) -> DiagonalPlusLowRank:
    """The Hessian of the log-normaliser L; with phi=exp the covariance of the classes, the scores' Fisher information.

    ∇²L = diag(s) (diag(p) − p pᵀ) diag(s) + diag(p t)     (MATH 1.7; what the article takes for ∇²H: MATH 2.2)

    Args:
      z, where, phi, log_weights: as in `softmax_jacobian`.
    Returns: a symmetric operator `[..., K, K]`, as in `softmax_jacobian`; positive semi-definite for phi=exp.
    Raises: as `jsoftmax.softmax`.
    Source: the cumulants of the categorical distribution; φ ≠ exp: MATH 1.7.

    >>> log_normalizer_hessian(jnp.array([0., 1.])).trace()
    Array(0.39322..., dtype=float32)
    """
    return _closed_form("log_normalizer_hessian", _second_cumulant, {"z": z}, where, phi, log_weights)


def _fisher(parts: _Parts, phi: Phi) -> DiagonalPlusLowRank:
    a = parts.p * parts.s
    return _low_rank(a * parts.s, [(-a, a)], covariance=isinstance(phi, Exponential))


@public
def fisher_information(
    z: ArrayLike, where: Bool[ArrayLike, "..."] | None = None, *, phi: Phi = exp, log_weights: ArrayLike | None = None
) -> DiagonalPlusLowRank:
    """The Fisher information of the scores, positive semi-definite for every φ.

    F = Σ_y p_y ∇l_y ∇l_yᵀ = diag(s) (diag(p) − p pᵀ) diag(s)     (MATH 1.15)

    Args:
      z, where, phi, log_weights: as in `jsoftmax.softmax_jacobian`.
    Returns: a symmetric operator `[..., K, K]`, as in `jsoftmax.softmax_jacobian`. With phi=exp it is
      `jsoftmax.log_normalizer_hessian`.
    Raises: as `jsoftmax.softmax`.
    Source: Amari 1998; MATH 1.15.

    >>> fisher_information(jnp.array([0., 1.])).trace()
    Array(0.39322..., dtype=float32)
    """
    return _closed_form("fisher_information", _fisher, {"z": z}, where, phi, log_weights)


def _entropy_gradient(parts: _Parts, phi: Phi) -> Array:
    return -parts.p * parts.c * parts.s


@public
def entropy_gradient(
    z: ArrayLike, where: Bool[ArrayLike, "..."] | None = None, *, phi: Phi = exp, log_weights: ArrayLike | None = None
) -> Float[Array, "..."]:
    """The gradient of the entropy.

    ∂H/∂z = −p c s,  c = log p + H     (MATH 1.5; not −1 + p: MATH 2.1)

    Args:
      z, where, phi, log_weights: as in `softmax_jacobian`.
    Returns: `[..., K]`, in the dtype of `z` but float32 at least; the same digits as `jax.grad` of `jsoftmax.entropy`
      (MATH 4). 0 for classes left out.
    Raises: as `jsoftmax.softmax`.
    Source: MATH 1.5; the article's section 6.1, corrected.

    >>> entropy_gradient(jnp.array([0., 1., 2.]))
    Array([ 0.14181...,  0.14077..., -0.28258...], dtype=float32)
    """
    return _closed_form("entropy_gradient", _entropy_gradient, {"z": z}, where, phi, log_weights)


def _entropy_hessian(parts: _Parts, phi: Phi) -> DiagonalPlusLowRank:
    p, c, s, t = parts
    a = p * s
    return _low_rank(-a * s * (1 + c) - p * c * t, [(a, a * (1 + c)), (a * c, a)])


@public
def entropy_hessian(
    z: ArrayLike, where: Bool[ArrayLike, "..."] | None = None, *, phi: Phi = exp, log_weights: ArrayLike | None = None
) -> DiagonalPlusLowRank:
    """The Hessian of the entropy, in general indefinite.

    ∇²H = diag(s) [ −diag(p (1 + c)) + p pᵀ + (p c) pᵀ + p (p c)ᵀ ] diag(s) − diag(p c t)     (MATH 1.8)

    Args:
      z, where, phi, log_weights: as in `softmax_jacobian`.
    Returns: a symmetric operator `[..., K, K]` of rank 2 beside its diagonal, as in `softmax_jacobian`.
    Raises: as `jsoftmax.softmax`.
    Source: MATH 1.8; the article's section 6.1 has the Hessian of L instead (MATH 2.2).

    >>> entropy_hessian(jnp.array([0., 1.])).as_matrix()
    Array([[-0.10575...,  0.10575...],
           [ 0.10575..., -0.10575...]], dtype=float32)
    """
    return _closed_form("entropy_hessian", _entropy_hessian, {"z": z}, where, phi, log_weights)


def _cross_entropy_hessian(parts: _Parts, phi: Phi, q: Array) -> DiagonalPlusLowRank:
    p, _, s, t = parts
    Q = jnp.sum(q, -1, keepdims=True)
    return _low_rank(Q * p * s**2 + t * (Q * p - q), [(-Q * p * s, p * s)])


@public
def cross_entropy_hessian(
    z: ArrayLike,
    q: ArrayLike,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> DiagonalPlusLowRank:
    """The Hessian in z of the cross-entropy −Σ q log p with targets q.

    ∇²CE = Q diag(s) (diag(p) − p pᵀ) diag(s) + diag(t (Q p − q)),   Q = Σ q     (MATH 1.14)

    Args:
      z: scores `[..., K]`; q: targets that broadcast with them, a distribution (Q = 1) or any weights. A class
        left out does not count, nor does its target.
      where, phi, log_weights: as in `softmax_jacobian`.
    Returns: a symmetric operator `[..., K, K]`, as in `softmax_jacobian`. For phi=exp and Q = 1 it does not depend on q
      and is ∇²L.
    Raises: as `jsoftmax.softmax`, ValueError if z and q do not broadcast together, TypeError for integers q, which
      would be labels.
    Source: MATH 1.14.

    >>> cross_entropy_hessian(jnp.array([0., 1.]), jnp.array([0., 1.])).as_matrix()
    Array([[ 0.19661..., -0.19661...],
           [-0.19661...,  0.19661...]], dtype=float32)
    """
    scores = {"z": z, "q": q}
    dtype = getattr(q, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"cross_entropy_hessian: q must be floating weights of the classes; got dtype {dtype}. Convert "
            "labels by jax.nn.one_hot(labels, K), and weights by q.astype(float)."
        )
    return _closed_form("cross_entropy_hessian", _cross_entropy_hessian, scores, where, phi, log_weights)


def _second_derivative(parts: _Parts, phi: Phi) -> Array:
    """T_ijk = p_i [ b_ij b_ik + a_j a_k + δ_jk ((δ_ij − p_j) t_j − a_j s_j) ],  a = p s,  b_ij = δ_ij s_j − a_j."""
    p, _, s, t = parts
    a, same = p * s, lax.broadcast_to_rank(jnp.eye(p.shape[-1], dtype=bool), p.ndim + 1)
    b = jnp.where(same, s[..., None, :], 0) - a[..., None, :]
    twice = p[..., None] * (jnp.where(same, t[..., None, :], 0) - (p * t + a * s)[..., None, :])
    p_b, p_a = p[..., None] * b, p[..., :, None] * a[..., None, :]
    products = p_b[..., :, :, None] * b[..., :, None, :] + p_a[..., :, :, None] * a[..., None, None, :]
    return products + jnp.where(same[..., None, :, :], twice[..., :, :, None], 0)


@public
def softmax_second_derivative(
    z: ArrayLike, where: Bool[ArrayLike, "..."] | None = None, *, phi: Phi = exp, log_weights: ArrayLike | None = None
) -> Float[Array, "..."]:
    """The second derivatives of the softmax, ∂²p_i/∂z_j∂z_k, as a dense tensor.

    T_ijk = [p_i (δ_ij − p_j) (δ_ik − p_k) − p_i p_j (δ_jk − p_k)] s_j s_k + p_i (δ_ij − p_j) δ_jk t_j     (MATH 1.8)

    For phi=exp, case by case: p_i (1 − p_i) (1 − 2p_i) where i = j = k; p_i p_k (2p_i − 1) where i = j ≠ k;
    p_i p_j (2p_i − 1) where i = k ≠ j; p_i p_j (2p_j − 1) where j = k ≠ i (the article has 2p_i − 1: MATH 2.3);
    2 p_i p_j p_k where all differ.

    Args:
      z, where, phi, log_weights: as in `softmax_jacobian`.
    Returns: `[..., K, K, K]` with axes i, j, k, in the dtype of `z` but float32 at least; K³ numbers a row. For its
      products with two vectors there is `softmax_second_derivative_product`, in O(K). 0 for classes left out.
    Raises: as `jsoftmax.softmax`.
    Source: the article, section 2, corrected.

    >>> softmax_second_derivative(jnp.array([0., 1.]))[0]
    Array([[ 0.09085..., -0.09085...],
           [-0.09085...,  0.09085...]], dtype=float32)
    """
    return _closed_form("softmax_second_derivative", _second_derivative, {"z": z}, where, phi, log_weights)


def _second_derivative_product(parts: _Parts, phi: Phi, v: Array, w: Array) -> Array:
    p, _, s, t = parts

    def centred(a: Array) -> Array:
        return a - jnp.sum(p * a, -1, keepdims=True)

    return p * centred(centred(s * v) * centred(s * w) + t * v * w)


@public
def softmax_second_derivative_product(
    z: ArrayLike,
    v: ArrayLike,
    w: ArrayLike,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """The second derivative of the softmax along two directions, Σ_jk ∂²p_i/∂z_j∂z_k v_j w_k, in O(K).

    p [ (s v)~ (s w)~ + t v w ]~,   x̃ = x − Σ p x     (MATH 1.2)

    Args:
      z, v, w: scores and two directions `[..., K]`, which broadcast together; directions of classes left out do not
        count.
      where, phi, log_weights: as in `softmax_jacobian`.
    Returns: `[..., K]`, in the common dtype but float32 at least. 0 for classes left out.
    Raises: as `jsoftmax.softmax`, and ValueError if the arrays do not broadcast together.
    Source: MATH 1.2.

    >>> z = jnp.array([0., 1.])
    >>> softmax_second_derivative_product(z, jnp.array([1., 0.]), jnp.array([0., 1.]))
    Array([-0.09085...,  0.09085...], dtype=float32)
    """
    scores = {"z": z, "v": v, "w": w}
    return _closed_form(
        "softmax_second_derivative_product", _second_derivative_product, scores, where, phi, log_weights
    )
