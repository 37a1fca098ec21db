"""Entropies, varentropy and the entropy's second-order expansion, for every φ."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps, sums
from jsoftmax._orders import renyi, tsallis
from jsoftmax._rules import compiled_rule
from jsoftmax.checks.arguments import Axis, all_known, check_flag, is_int, per_row, public, widened
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, curvature, exp, slope
from jsoftmax.sharding import AxisName
from jsoftmax.sums import Want, class_sum


@compiled_rule("axis", "axis_name", "want", "order")
def centred_log_p(  # noqa: PLR0917  (as rules, which have no keywords, call it)
    x: Array,
    axis: tuple[int, ...],
    axis_name: AxisName = None,
    want: Want = "all",
    order: int = 0,
    again: Array | None = None,
) -> tuple[Array, Array]:
    """c = log p + H, with 0 where p is 0; and H, with the reduced axes kept. want, order, again: as in
    `maps.normalize`."""
    return sums.centred(x, axis, axis_name, want, order)


@centred_log_p.defjvp
def _centred_log_p_jvp(  # noqa: PLR0917  (a rule has no keywords)
    axis: tuple[int, ...], axis_name: AxisName, want: Want, order: int, primals: Any, tangents: Any
) -> tuple[Any, Any]:
    """Ḣ = −Σ p c ẋ, ċ = ẋ − Σ p ẋ + Ḣ  (MATH 1.5)."""
    (x, again), (x_dot, _) = primals, tangents
    x_dot = widened(x_dot)
    following = sums.next_order(x, order, axis_name)
    out = centred_log_p(x, axis, axis_name, want, following, again)
    c, x = sums.value_again(lambda x: centred_log_p(x, axis, axis_name, want, following)[0], out[0], x, again)
    p = normalize(x, axis, axis_name, want, following).p
    H_dot = -class_sum(p * c * x_dot, axis, axis_name)
    return out, (sums.centred_rate(x, p, x_dot, axis, axis_name) + H_dot, H_dot)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _varentropy(x: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """V = Σ p c²  (MATH 6.1)."""
    c, _ = centred_log_p(x, axis, axis_name)
    return class_sum(normalize(x, axis, axis_name).p * c**2, axis, axis_name)


@_varentropy.defjvp
def _varentropy_jvp(axis: tuple[int, ...], axis_name: AxisName, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """V̇ = Σ p (c² + 2c − V) ẋ  (MATH 6.2)."""
    (x,), (x_dot,) = primals, tangents
    x_dot = widened(x_dot)
    out, again = _varentropy(x, axis, axis_name), sums.read_again(x, axis, axis_name)
    V, x = sums.value_again(lambda x: _varentropy(x, axis, axis_name), out, x, again)
    (c, _), p = centred_log_p(x, axis, axis_name), normalize(x, axis, axis_name).p
    return out, class_sum(p * (c**2 + 2 * c - V) * x_dot, axis, axis_name)


@functools.partial(jax.jit, static_argnames=("axis", "axis_name", "order"))
@functools.partial(jax.checkpoint, static_argnums=(1, 2, 6), prevent_cse=False)
def _expansion(  # noqa: PLR0917  (as `maps.Arguments` has them)
    scores: tuple[Array, ...],
    axis: tuple[int, ...],
    axis_name: AxisName,
    where: Array | None,
    log_weights: Array | None,
    phi: Phi,
    order: int,
) -> Array:
    """H − Σ p c s Δ − ½ Σ p (1+c) ((sΔ)~)² − ½ Σ p c t Δ²  (MATH 6.5).

    It has no rule of its own. It is checkpointed, because the backward pass would otherwise keep some hundred arrays.
    """
    z, dz = scores
    x = maps.weighted_scores(phi, z, where, log_weights)
    c, H = centred_log_p(x, axis, axis_name)
    p = normalize(x, axis, axis_name).p
    out = jnp.isneginf(x) | (p == 0)  # also where p underflows, since 0 · inf would be NaN
    z, dz = jnp.where(out, 0, z), jnp.where(out, 0, dz)
    y = slope(phi, z) * dz
    centred = y - class_sum(p * y, axis, axis_name)
    change = p * c * centred
    if order == 2:
        change = change + p * ((1 + c) * centred**2 + c * curvature(phi, z) * dz**2) / 2
    return H - class_sum(change, axis, axis_name)


def shannon(x: Array, axis: tuple[int, ...], axis_name: AxisName = None, again: Array | None = None) -> Array:
    """H alone, with the reduced axes kept. again: as in `maps.normalize`."""
    return centred_log_p(x, axis, axis_name, "H", again=again)[1]


@public
def entropy(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
    axis_name: AxisName = None,
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
      axis_name: as in `jsoftmax.softmax`, where the classes are sharded.
    Returns: `[...]` in [0, log K], in the dtype of `z`, but float32 for narrower scores; within |u| + 4 ulp, also on
      almost one-hot rows; u = x − max x of the classes that contribute most (MATH 4). Finite derivatives of every
      order where p = 0. One class or none left: 0. A score of +inf or NaN, or one outside φ's domain: NaN in that row
      alone.
    Raises: TypeError or ValueError for a `phi` that is no φ, an `axis` out of range, a mask that is not boolean or
      does not broadcast.
    Source: Shannon 1948; the gradient for φ ≠ exp: MATH 1.5.

    >>> entropy(jnp.array([0., -20.]))
    Array(4.3284...e-08, dtype=float32)
    >>> jax.grad(entropy)(jnp.array([0., -jnp.inf]))
    Array([-0., -0.], dtype=float32)
    """
    arguments = maps.check("entropy", {"z": z}, axis, where, phi, log_weights, axis_name)
    return maps.reduce_classes(shannon, arguments, phi, check_flag("entropy", "keepdims", keepdims), reads_again=True)


@public
def varentropy(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Varentropy: the variance of log p under p, in nats².

    V = Σ p c²,  c = log p + H;   ∂V/∂z = p (c² + 2c − V) s     (MATH 6.1, 6.2)

    Args:
      z, axis, where, phi, log_weights, keepdims, axis_name: as in `entropy`.
    Returns: `[...]` ≥ 0, in the dtype of `z`, but float32 for narrower scores. One class or none left: 0; uniform: 0.
      A score of +inf or NaN: NaN in that row alone.
    Raises: as `entropy`.
    Source: Kontoyiannis & Verdú 2013.

    >>> varentropy(jnp.array([0., 1.]))
    Array(0.196611..., dtype=float32)
    """
    arguments = maps.check("varentropy", {"z": z}, axis, where, phi, log_weights, axis_name)
    return maps.reduce_classes(_varentropy, arguments, phi, check_flag("varentropy", "keepdims", keepdims))


@public
def tsallis_entropy(
    z: ArrayLike,
    alpha: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Tsallis entropy of p = w φ(z) / Σ w φ(z); Shannon's for α = 1, the Gini impurity for α = 2.

    S = (1 − Σ p^α)/(α − 1) = Σ b,  b = (p − p^α)/(α − 1);   ∂S/∂z = α (b − p S) s     (MATH 6.6)

    S/α is −Ω of `jsoftmax.fenchel_young_loss`.

    Args:
      z, axis, where, phi, log_weights, keepdims, axis_name: as in `entropy`.
      alpha: α ≥ 0, a number, or an array with one for each row, of length 1 along the classes; differentiable, through
        α = 1 too.
    Returns: as `entropy`: `[...]` ≥ 0, with the digits of small results. One class or none left: 0.
    Raises: as `entropy`, and ValueError if α is known at trace time and negative or infinite, or if its shape does not
      fit.
    Source: Tsallis 1988.

    >>> tsallis_entropy(jnp.log(jnp.array([0.5, 0.25, 0.25])), 2)
    Array(0.625, dtype=float32)
    """
    return _of_order("tsallis_entropy", tsallis, z, alpha, axis, where, phi, log_weights, keepdims, axis_name)


@public
def renyi_entropy(
    z: ArrayLike,
    alpha: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Rényi entropy of p = w φ(z) / Σ w φ(z), in nats; Shannon's for α = 1, the logarithm of the support's size for 0.

    R = log Σ p^α / (1 − α);   ∂R/∂z = α/(1 − α) (r − p) s,  r = p^α / Σ p^α     (MATH 6.7)

    Args:
      z, alpha, axis, where, phi, log_weights, keepdims, axis_name: as in `tsallis_entropy`. For α = ∞, the
        min-entropy, take −jnp.max(log_softmax(z), -1).
    Returns: as `entropy`: `[...]` in [0, log K].
    Raises: as `tsallis_entropy`.
    Source: Rényi 1961.

    >>> renyi_entropy(jnp.log(jnp.array([0.5, 0.25, 0.25])), 2)  # −log 3/8
    Array(0.98082..., dtype=float32)
    """
    return _of_order("renyi_entropy", renyi, z, alpha, axis, where, phi, log_weights, keepdims, axis_name)


def _of_order(function: str, f: Any, z: Any, alpha: Any, *options: Any) -> Array:
    axis, where, phi, log_weights, keepdims, axis_name = options
    if not all_known(alpha, lambda a: (a >= 0) & (a < math.inf)):
        raise ValueError(
            f"{function}: alpha must be >= 0 and finite; got {alpha}. 1 gives Shannon's entropy; 2 is usual."
        )
    arguments = maps.check(function, {"z": z}, axis, where, phi, log_weights, axis_name)
    (scores,) = arguments.scores
    order = per_row(function, "alpha", alpha, scores.shape, axes=arguments.axis, dtype=scores.dtype)
    return maps.reduce_classes(f, arguments, phi, check_flag(function, "keepdims", keepdims), (order,))


@public
def entropy_expansion(
    z: ArrayLike,
    dz: ArrayLike,
    order: int = 2,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Taylor expansion of the entropy about z, at z + Δ, with an error of O(|Δ|^{order+1}).

    H − Σ p c s Δ − ½ Σ p (1+c) ((sΔ)~)² − ½ Σ p c t Δ²,  x̃ = x − Σ p x     (MATH 6.5; the article's: MATH 2.2)

    Args:
      z, dz: scores `[..., K]` and their changes Δ, which broadcast together.
      order: 1 or 2.
      axis, where, phi, log_weights, axis_name: as in `entropy`.
    Returns: `[...]`, in the common dtype of `z` and `dz`, but float32 for narrower ones. Changes of classes that are
      left out do not count. Edges as in `entropy`.
    Raises: as `entropy`, and ValueError if `order` is neither 1 nor 2 or the shapes do not broadcast together.
    Source: the article, section 6.1, corrected.

    >>> z, dz = jnp.array([0., 1., 2.]), jnp.array([0.1, 0., -0.1])
    >>> entropy_expansion(z, dz), entropy(z + dz)
    (Array(0.87445..., dtype=float32), Array(0.87434..., dtype=float32))
    """
    if not is_int(order) or order not in (1, 2):
        raise ValueError(
            f"entropy_expansion: order must be 1 or 2, known at trace time; got {order!r}. "
            "For higher orders differentiate entropy itself, e.g. with nested jax.jvp."
        )
    arguments = maps.check("entropy_expansion", {"z": z, "dz": dz}, axis, where, phi, log_weights, axis_name)
    result = _expansion(arguments.scores, *arguments[1:], phi, int(order))
    return jnp.squeeze(result, arguments.axis)
