"""Entropy, varentropy, Kullback–Leibler divergence and the entropy's second-order expansion, for every φ."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import _arguments, maps
from jsoftmax._arguments import Axis
from jsoftmax._series import excess_ratio, expm1_ratio, log1p_deficit
from jsoftmax.maps import class_sum, normalize
from jsoftmax.phi import Phi, curvature, exp, slope


@functools.partial(jax.jit, static_argnums=1)
def centred_log_p(x: Array, axis: tuple[int, ...]) -> tuple[Array, Array]:
    """c = log p + H, 0 where p is 0, and H, which keeps the reduced axes."""
    return _centred_log_p(x, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _centred_log_p(x: Array, axis: tuple[int, ...]) -> tuple[Array, Array]:
    """c = u + Σ p (−u) and H = log1p(rest) + Σ p (−u)  (MATH 4.3)."""
    u, e, rest, peak = maps.centre(x, axis)
    rest = jnp.where(rest == -1, 0, rest)  # an empty row has H = 0
    spread = gap_sum(x, peak, axis) / (1 + rest)
    return jnp.where(e == 0, 0, u + spread), jnp.log1p(rest) + spread


def gap_sum(x: Array, peak: Array, axis: tuple[int, ...]) -> Array:
    """Σ e^u (−u), u = x − peak."""
    return maps.careful_sum(_gap, x, peak, axis)


def _gap(u: Array) -> Array:
    """e^u (−u), and 0 · log 0 = 0, its derivatives too."""
    return jnp.exp(u) * -jnp.maximum(u, jnp.finfo(u.dtype).min)


@_centred_log_p.defjvp
def _centred_log_p_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Ḣ = −Σ p c ẋ, ċ = ẋ − Σ p ẋ + Ḣ  (MATH 1.5)."""
    (x,), (x_dot,) = primals, tangents
    c, H = centred_log_p(x, axis)
    p = normalize(x, axis).p
    H_dot = -class_sum(p * c * x_dot, axis)
    return (c, H), (x_dot - class_sum(p * x_dot, axis) + H_dot, H_dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _varentropy(x: Array, axis: tuple[int, ...]) -> Array:
    """V = Σ p c²  (MATH 6.1)."""
    c, _ = centred_log_p(x, axis)
    return class_sum(normalize(x, axis).p * c**2, axis)


@_varentropy.defjvp
def _varentropy_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """V̇ = Σ p (c² + 2c − V) ẋ  (MATH 6.2)."""
    (x,), (x_dot,) = primals, tangents
    (c, _), p, V = centred_log_p(x, axis), normalize(x, axis).p, _varentropy(x, axis)
    return V, class_sum(p * (c**2 + 2 * c - V) * x_dot, axis)


def _surprise(log_p: Array, p: Array, alpha: Array) -> Array:
    """−p log_α p = (p − p^α)/(α − 1) ≥ 0, −p log p for α = 1; 0 where a class is left out  (MATH 6.6)."""
    safe = jnp.where(jnp.isneginf(log_p), 0, log_p)
    far = (alpha - 1) * safe > 1  # for α < 1 a p that underflows still counts
    powers = (jnp.exp(alpha * safe) - p) / jnp.where(far, 1 - alpha, 1)
    return jnp.where(far, powers, -p * safe * expm1_ratio(jnp.where(far, 0, (alpha - 1) * safe)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _tsallis(x: Array, alpha: Array, axis: tuple[int, ...]) -> Array:
    """S = Σ b, b = −p log_α p: terms that are not negative  (MATH 6.6)."""
    log_p, p, _ = normalize(x, axis)
    return class_sum(_surprise(log_p, p, alpha), axis)


@functools.partial(_tsallis.defjvp, symbolic_zeros=True)
def _tsallis_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Ṡ = α Σ (b − p S) ẋ + Σ (∂b/∂α) α̇  (MATH 6.6)."""
    (x, alpha), (x_dot, alpha_dot) = primals, tangents
    log_p, p, _ = normalize(x, axis)
    b, S = _surprise(log_p, p, alpha), _tsallis(x, alpha, axis)
    S_dot = jnp.zeros_like(S)
    if not isinstance(x_dot, SymbolicZero):
        S_dot = class_sum(alpha * (b - p * S) * x_dot, axis)
    if not isinstance(alpha_dot, SymbolicZero):
        S_dot = S_dot + class_sum(jax.jvp(lambda a: _surprise(log_p, p, a), (alpha,), (alpha_dot,))[1], axis)
    return S, S_dot


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _renyi(x: Array, alpha: Array, axis: tuple[int, ...]) -> Array:
    """R = log Σ p^α / (1 − α); near α = 1 of Tsallis' S, as log1p((1 − α) S)/(1 − α)  (MATH 6.7)."""
    log_p, _, L = normalize(x, axis)
    S = _tsallis(x, alpha, axis)
    a = (1 - alpha) * S
    near = jnp.abs(a) <= 0.5
    far = normalize(_times(alpha, log_p), axis).log_normalizer / jnp.where(near, 1, 1 - alpha)
    return jnp.where(jnp.isneginf(L), 0, jnp.where(near, S * (1 - log1p_deficit(jnp.where(near, a, 0))), far))


def _times(alpha: Array, log_p: Array) -> Array:
    """α log p, and no NaN where a class is left out."""
    out = jnp.isneginf(log_p)
    return jnp.where(out, -jnp.inf, alpha * jnp.where(out, 0, log_p))


@functools.partial(_renyi.defjvp, symbolic_zeros=True)
def _renyi_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Ṙ = α Σ (r − p)/(1 − α) ẋ − D(r‖p)/(1 − α)² α̇, r = p^α / Σ p^α; by y = (α − 1) (l + R) = log r/p where it is
    small  (MATH 6.7)."""
    (x, alpha), (x_dot, alpha_dot) = primals, tangents
    log_p, p, _ = normalize(x, axis)
    r, R = normalize(_times(alpha, log_p), axis).p, _renyi(x, alpha, axis)
    d = jnp.where(jnp.isneginf(log_p), 0, log_p + R)
    y = (alpha - 1) * d
    near = jnp.abs(y) < 0.5
    y_near, gap = jnp.where(near, y, 0), jnp.where(near, 1, 1 - alpha)
    R_dot = jnp.zeros_like(R)
    if not isinstance(x_dot, SymbolicZero):
        R_dot = class_sum(alpha * jnp.where(near, -p * d * expm1_ratio(y_near), (r - p) / gap) * x_dot, axis)
    if not isinstance(alpha_dot, SymbolicZero):
        divergence = jnp.where(near, r * d**2 * excess_ratio(y_near), (p - r + r * y) / gap**2)
        R_dot = R_dot - class_sum(divergence, axis) * alpha_dot
    return R, R_dot


def log_ratio(log_p: Array, p: Array, log_q: Array) -> tuple[Array, Array]:
    """r = log p − log q, and where p and q are positive; elsewhere r is 0, and those classes are dealt with apart.

    p underflows where log p is finite, and r may overflow there: 0 · inf would be NaN.
    """
    both = (p > 0) & (log_q > -jnp.inf) | jnp.isnan(log_p) | jnp.isnan(log_q)
    return jnp.where(both, log_p, 0) - jnp.where(both, log_q, 0), both


def kl_terms(log_p: Array, p: Array, log_q: Array, q: Array) -> tuple[Array, Array]:
    """p (e^−r − 1 + r) ≥ 0, and r = log p − log q, 0 where one of them is 0  (MATH 6.3)."""
    r, both = log_ratio(log_p, p, log_q)
    near = both & (jnp.abs(r) < 0.5)
    r_near = jnp.where(near, r, 0)
    return jnp.where(near, p * r_near**2 * excess_ratio(r_near), p * r - p + q), r


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl(x_p: Array, x_q: Array, axis: tuple[int, ...]) -> Array:
    """D = Σ p r, r = log p − log q, summed as p (e^−r − 1 + r) ≥ 0, since Σ q − Σ p = 0  (MATH 6.3)."""
    (log_p, p, L_p), (log_q, q, _) = normalize(x_p, axis), normalize(x_q, axis)
    D = class_sum(kl_terms(log_p, p, log_q, q)[0], axis)
    impossible = jnp.any(jnp.isneginf(log_q) & (log_p > -jnp.inf), axis, keepdims=True)
    return jnp.where(jnp.isnan(D), D, jnp.where(jnp.isneginf(L_p), 0, jnp.where(impossible, jnp.inf, D)))


@_kl.defjvp
def _kl_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Ḋ = Σ p (r − Σ p r) ẋ_p + Σ (q − p) ẋ_q  (MATH 6.4); finite where D is not: those classes have r = 0."""
    (x_p, x_q), (x_p_dot, x_q_dot) = primals, tangents
    (log_p, p, L_p), (log_q, q, _) = normalize(x_p, axis), normalize(x_q, axis)
    r, _ = log_ratio(log_p, p, log_q)
    by_q = jnp.where(jnp.isneginf(x_q) | (jnp.isneginf(L_p) & ~jnp.isnan(q)), 0, q - p)
    rate = p * (r - class_sum(p * r, axis)) * x_p_dot + by_q * x_q_dot
    return _kl(x_p, x_q, axis), class_sum(rate, axis)


@functools.partial(jax.jit, static_argnames=("axis", "order"))
@functools.partial(jax.checkpoint, static_argnums=(1, 5), prevent_cse=False)
def _expansion(  # noqa: PLR0917  (as `maps.Arguments` has them)
    scores: tuple[Array, Array],
    axis: tuple[int, ...],
    where: Array | None,
    log_weights: Array | None,
    phi: Phi,
    order: int,
) -> Array:
    """H − Σ p c s Δ − ½ Σ p (1+c) ((sΔ)~)² − ½ Σ p c t Δ²  (MATH 6.5).

    Without a rule of its own; checkpointed, for the backward pass would keep some hundred arrays.
    """
    z, dz = scores
    x = maps.weighted_scores(phi, z, where, log_weights)
    c, H = centred_log_p(x, axis)
    p = normalize(x, axis).p
    out = jnp.isneginf(x) | (p == 0)  # with p underflowed, too: 0 · inf would be NaN
    z, dz = jnp.where(out, 0, z), jnp.where(out, 0, dz)
    y = slope(phi, z) * dz
    centred = y - class_sum(p * y, axis)
    change = p * c * centred
    if order == 2:
        change = change + p * ((1 + c) * centred**2 + c * curvature(phi, z) * dz**2) / 2
    return H - class_sum(change, axis)


def _entropy(x: Array, axis: tuple[int, ...]) -> Array:
    return centred_log_p(x, axis)[1]


def entropy(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """Shannon entropy of p = w φ(z) / Σ w φ(z), in nats.

    H = −Σ p log p;   ∂H/∂z = −p c s,  c = log p + H     (MATH 1.5; not −1 + p: MATH 2.1)

    The perplexity is jnp.exp(entropy(z)), the mode jnp.argmax(softmax(z), -1), the entropy in bits entropy(z) / log 2.

    Args:
      z: scores `[..., K]`, any floating dtype; integers promote as in `jax.nn.softmax`.
      axis: int, tuple or None (all): the classes' axis, reduced.
      where: bool, broadcastable to `z`; False leaves a class out.
      phi: the positive map φ.
      log_weights: log w, broadcastable to `z`; −inf leaves a class out.
      keepdims: keep the reduced axes with length 1.
    Returns: `[...]` in [0, log K], in the dtype of `z`, but float32 for narrower scores; within |u| + 4 ulp, also on
      almost one-hot rows (MATH 4). Finite derivatives of every order where p = 0. One class or none left: 0. A score
      of +inf or NaN, or one outside φ's domain: NaN in that row alone.
    Raises: TypeError or ValueError for a `phi` that is no φ, an `axis` out of range, a mask that is not boolean or
      does not broadcast.
    Source: Shannon 1948; the gradient for φ ≠ exp: MATH 1.5.

    >>> entropy(jnp.array([0., -20.]))
    Array(4.3284...e-08, dtype=float32)
    >>> jax.grad(entropy)(jnp.array([0., -jnp.inf]))
    Array([-0., -0.], dtype=float32)
    """
    arguments = maps.check("entropy", {"z": z}, axis, where, phi, log_weights)
    return maps.reduce_classes(_entropy, arguments, phi, keepdims)


def varentropy(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """Varentropy: the variance of log p under p, in nats².

    V = Σ p c²,  c = log p + H;   ∂V/∂z = p (c² + 2c − V) s     (MATH 6.1, 6.2)

    Args:
      z, axis, where, phi, log_weights, keepdims: as in `entropy`.
    Returns: `[...]` ≥ 0, in the dtype of `z`, but float32 for narrower scores. One class or none left: 0; uniform: 0.
      A score of +inf or NaN: NaN in that row alone.
    Raises: as `entropy`.
    Source: Kontoyiannis & Verdú 2013.

    >>> varentropy(jnp.array([0., 1.]))
    Array(0.196611..., dtype=float32)
    """
    arguments = maps.check("varentropy", {"z": z}, axis, where, phi, log_weights)
    return maps.reduce_classes(_varentropy, arguments, phi, keepdims)


def tsallis_entropy(
    z: ArrayLike,
    alpha: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """Tsallis entropy of p = w φ(z) / Σ w φ(z); Shannon's for α = 1, the Gini impurity for α = 2.

    S = (1 − Σ p^α)/(α − 1) = Σ b,  b = (p − p^α)/(α − 1);   ∂S/∂z = α (b − p S) s     (MATH 6.6)

    S/α is −Ω of `jsoftmax.fenchel_young_loss`.

    Args:
      z, axis, where, phi, log_weights, keepdims: as in `entropy`.
      alpha: α ≥ 0, a number, or an array with one for each row, of length 1 along the classes; differentiable, through
        α = 1 too.
    Returns: as `entropy`: `[...]` ≥ 0, with the digits of small results. One class or none left: 0.
    Raises: as `entropy`, and ValueError if α is a number and negative or infinite, or of a shape that does not fit.
    Source: Tsallis 1988.

    >>> tsallis_entropy(jnp.log(jnp.array([0.5, 0.25, 0.25])), 2)
    Array(0.625, dtype=float32)
    """
    return _of_order("tsallis_entropy", _tsallis, z, alpha, axis, where, phi, log_weights, keepdims)


def renyi_entropy(
    z: ArrayLike,
    alpha: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """Rényi entropy of p = w φ(z) / Σ w φ(z), in nats; Shannon's for α = 1, the logarithm of the support's size for 0.

    R = log Σ p^α / (1 − α);   ∂R/∂z = α/(1 − α) (r − p) s,  r = p^α / Σ p^α     (MATH 6.7)

    Args:
      z, alpha, axis, where, phi, log_weights, keepdims: as in `tsallis_entropy`. For α = ∞, the min-entropy, take
        −jnp.max(log_softmax(z), -1).
    Returns: as `entropy`: `[...]` in [0, log K].
    Raises: as `tsallis_entropy`.
    Source: Rényi 1961.

    >>> renyi_entropy(jnp.log(jnp.array([0.5, 0.25, 0.25])), 2)  # −log 3/8
    Array(0.98082..., dtype=float32)
    """
    return _of_order("renyi_entropy", _renyi, z, alpha, axis, where, phi, log_weights, keepdims)


def _of_order(function: str, f: Any, z: Any, alpha: Any, *options: Any) -> Array:
    axis, where, phi, log_weights, keepdims = options
    if _arguments.is_concrete_number(alpha) and not 0 <= alpha < math.inf:
        raise ValueError(f"{function}: alpha must be >= 0 and finite; got {alpha}. 1 is Shannon's entropy, 2 is usual.")
    arguments = maps.check(function, {"z": z}, axis, where, phi, log_weights)
    (scores,) = arguments.scores
    order = _arguments.per_row(function, "alpha", alpha, scores.shape, arguments.axis, scores.dtype)
    return maps.reduce_classes(f, arguments, phi, keepdims, (order,))


def kl_divergence(
    z_p: ArrayLike,
    z_q: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Kullback–Leibler divergence D(p‖q) of p = w φ(z_p)/Σ and q = w φ(z_q)/Σ, in nats.

    D = Σ p (log p − log q);   ∂D/∂z_p = p (log p − log q − D) s,   ∂D/∂z_q = (q − p) s     (MATH 6.3, 6.4)

    Args:
      z_p, z_q: scores `[..., K]` that broadcast together.
      axis: int, tuple or None (all): the classes' axis, reduced.
      where, phi, log_weights: as in `entropy`, for both distributions.
    Returns: `[...]` ≥ 0, in the scores' common dtype, but float32 for narrower ones. A class with p = 0 adds 0; one
      with q = 0 < p makes D = +inf, with finite derivatives for the other classes. No class left for p: 0. A score of
      +inf or NaN: NaN in that row alone.
    Raises: as `entropy`, and ValueError if the scores do not broadcast together.
    Source: Kullback & Leibler 1951.

    >>> kl_divergence(jnp.array([0., 1.]), jnp.array([1., 0.]))
    Array(0.46211..., dtype=float32)
    """
    return maps.reduce_classes(
        _kl, maps.check("kl_divergence", {"z_p": z_p, "z_q": z_q}, axis, where, phi, log_weights), phi
    )


def entropy_expansion(
    z: ArrayLike,
    dz: ArrayLike,
    order: int = 2,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Taylor expansion of the entropy about z, at z + Δ, with an error of O(|Δ|^{order+1}).

    H − Σ p c s Δ − ½ Σ p (1+c) ((sΔ)~)² − ½ Σ p c t Δ²,  x̃ = x − Σ p x     (MATH 6.5; the article's: MATH 2.2)

    Args:
      z, dz: scores `[..., K]` and their changes Δ, which broadcast together.
      order: 1 or 2.
      axis, where, phi, log_weights: as in `entropy`.
    Returns: `[...]`, in the common dtype of `z` and `dz`, but float32 for narrower ones. Changes of classes that are
      left out count nothing. Edges as in `entropy`.
    Raises: as `entropy`, and ValueError if `order` is neither 1 nor 2 or the shapes do not broadcast together.
    Source: the article, section 6.1, corrected.

    >>> z, dz = jnp.array([0., 1., 2.]), jnp.array([0.1, 0., -0.1])
    >>> entropy_expansion(z, dz), entropy(z + dz)
    (Array(0.87445..., dtype=float32), Array(0.87434..., dtype=float32))
    """
    if not _arguments.is_int(order) or order not in (1, 2):
        raise ValueError(
            f"entropy_expansion: order must be 1 or 2, known at trace time; got {order!r}. "
            "For higher orders differentiate entropy itself, e.g. with nested jax.jvp."
        )
    arguments = maps.check("entropy_expansion", {"z": z, "dz": dz}, axis, where, phi, log_weights)
    result = _expansion((arguments.scores[0], arguments.scores[1]), *arguments[1:4], phi, int(order))
    return jnp.squeeze(result, arguments.axis)
