"""Mixtures of softmaxes, and softmax with a sink (MATH 9)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax._series import expm1, sigmoid
from jsoftmax.checks.arguments import Axis, as_scores, per_row, public
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName
from jsoftmax.sums import class_sum


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _mix(log_p: Array, log_weights: Array, axis: tuple[int, ...]) -> Array:
    """log Σ π p over the components. Near 0 it is computed as log1p(Σ π (p − 1)), to keep its digits  (MATH 9.1)."""
    far = maps.log_sum(log_p + log_weights, axis)
    near = far > -0.5
    deficit = class_sum(jnp.exp(log_weights) * expm1(log_p), axis)
    return jnp.where(near, jnp.log1p(jnp.where(near, deficit, 0)), far)


@_mix.defjvp
def _mix_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Σ r (l̇ + (log π)˙), r = π p / Σ π p  (MATH 9.1)."""
    (log_p, log_weights), (log_p_dot, log_weights_dot) = primals, tangents
    r = normalize(log_p + log_weights, axis).p
    return _mix(log_p, log_weights, axis), class_sum(r * (log_p_dot + log_weights_dot), axis)


@public
def mixture_log_softmax(
    z: ArrayLike, mixture_logits: ArrayLike, axis: int = -1, *, phi: Phi = exp
) -> Float[Array, "..."]:
    """Log-probabilities of a mixture of softmaxes: a head whose log-probabilities have a higher rank than its scores.

    l_k = log Σ_m π_m p_mk,  p_m = φ(z_m)/Σ φ(z_m),  π = softmax(mixture_logits);   l̇_k = Σ_m r_mk (l̇_mk + (log π_m)˙)
    (MATH 9.1)

    Args:
      z: scores `[..., m, K]` of m components, any floating dtype; integers promote.
      mixture_logits: `[..., m]`, that broadcast to `z` without its classes.
      axis: int: the axis of the classes in `z`; the components are the last of the others.
      phi: the positive map φ of the components.
    Returns: `[..., K]`, the components reduced, in the dtype of `z`; log-probabilities near 0 keep their digits. A
      class left out of all components (a score of −inf) has −inf with derivatives 0. A bad score in one component, +inf
      or NaN, makes the row NaN.
    Raises: as `jsoftmax.softmax`; ValueError if there are no two axes or the shapes do not fit.
    Source: Yang et al. 2018, equation 3.

    >>> mixture_log_softmax(jnp.array([[0., 1.], [2., 0.]]), jnp.array([0., 0.]))
    Array([-0.55361..., -0.85535...], dtype=float32)
    """
    function = "mixture_log_softmax"
    arguments = maps.check(function, {"z": z}, axis, None, phi, None)
    (scores,), axes = arguments.scores, arguments.axis
    logits = as_scores(function, "mixture_logits", mixture_logits).astype(scores.dtype)
    if len(axes) != 1 or scores.ndim < 2:
        raise ValueError(
            f"{function}: z must have one class axis and one of components; got shape {scores.shape} and axis {axis}. "
            "Write z of shape [..., m, K], e.g. z[None] for one component."
        )
    maps.check_phi_moves(function, phi, axes, scores.ndim)
    moved = jnp.moveaxis(scores, axes[0], -1)
    try:
        logits = jnp.broadcast_to(logits, moved.shape[:-1])
    except ValueError:
        raise ValueError(
            f"{function}: mixture_logits must broadcast to the shape of z without its classes, {moved.shape[:-1]}; got "
            f"shape {logits.shape}. Add axes of length 1, e.g. mixture_logits[..., None, :]."
        ) from None
    return jnp.moveaxis(_mixture(moved, logits, phi), -1, min(axes[0], moved.ndim - 2)).astype(arguments.dtype)


@jax.jit
def _mixture(z: Array, logits: Array, phi: Phi) -> Array:
    log_p = maps.log_p(maps.weighted_scores(phi, z, None, None), (z.ndim - 1,))
    log_weights = maps.log_p(logits, (logits.ndim - 1,))[..., None]
    return _mix(log_p, log_weights, (z.ndim - 2,))[..., 0, :]


@public
def sink_softmax(
    z: ArrayLike, sink: ArrayLike = 0.0, axis: Axis = -1, where: Bool[ArrayLike, "..."] | None = None
) -> Float[Array, "..."]:
    """Softmax with a sink: one more class takes its share of the probability, and is dropped.

    p = e^z / (e^sink + Σ e^z) = softmax(z) σ(L − sink)     (MATH 9.2)

    Attention that may attend to nothing: with sink = 0 'softmax plus one'; with a learned sink for each head, attention
    sinks.

    Args:
      z: scores `[..., K]`, any floating dtype; integers promote.
      sink: the score of the class that is dropped: a number, or an array with one for each row, of length 1 along the
        classes; differentiable. −inf is the softmax.
      axis: int, tuple or None (all): the classes' axis.
      where: bool, broadcastable to `z`; False leaves a class out.
    Returns: the shape and dtype of `z`, with a sum below 1; no overflow for any finite scores. An empty row has p = 0.
      A score of +inf or NaN makes its row NaN.
    Raises: as `jsoftmax.softmax`, and ValueError if `sink` does not fit.
    Source: Miller 2023, 'Attention is off by one'; Xiao et al. 2024 (sinks).

    >>> sink_softmax(jnp.array([0., 0., -jnp.inf]))
    Array([0.33333..., 0.33333..., 0.        ], dtype=float32)
    """
    arguments = maps.check("sink_softmax", {"z": z}, axis, where, exp, None)
    (scores,) = arguments.scores
    sinks = per_row("sink_softmax", "sink", sink, scores.shape, axes=arguments.axis, dtype=scores.dtype)
    return maps.keep_classes(_with_sink, arguments, exp, (sinks,))


def _with_sink(x: Array, sink: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    _, p, L = normalize(x, axis, axis_name)
    empty = jnp.isneginf(L)
    gap = jnp.where(empty, 0, L) - jnp.where(empty, 0, sink)
    return p * sigmoid(gap)
