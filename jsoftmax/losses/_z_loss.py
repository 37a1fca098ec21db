"""The Z-loss of the spherical family (MATH 7.6)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax._series import log1p_exp
from jsoftmax.checks.arguments import Axis, check_option, public, read
from jsoftmax.checks.labels import Labelled, check_labelled
from jsoftmax.checks.top_targets import reject_top_targets
from jsoftmax.sharding import pick
from jsoftmax.sums import difference, has_bad_score


@jax.custom_jvp
def _standardized(z: Array, kept: Array) -> tuple[Array, Array]:
    """t = (z − μ)/σ over the last axis, 0 where a class is left out or σ is 0; and 1/σ, 0 where σ is 0  (MATH 7.6)."""
    peak = jnp.max(jnp.where(kept, lax.stop_gradient(z), -jnp.inf), -1, keepdims=True, initial=-jnp.inf)
    shifted = jnp.where(kept, difference(z, peak), 0)  # subtracted first, so that a shift costs no digits
    centred = jnp.where(kept, shifted - _mean(shifted, kept), 0)
    # divided by the largest before squaring, since squares may overflow or underflow
    size = lax.stop_gradient(jnp.max(jnp.abs(centred), -1, keepdims=True, initial=0))
    flat = size == 0
    unit = centred / jnp.where(flat, 1, size)
    inverse = jnp.where(flat, 0, 1 / jnp.sqrt(jnp.where(flat, 1, _mean(unit**2, kept))))
    return unit * inverse, inverse / jnp.where(flat, 1, size)


@_standardized.defjvp
def _standardized_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """ṫ = (ż − mean ż − t mean(t ż))/σ; the derivative of 1/σ is −mean(t ż)/σ²  (MATH 7.6)."""
    (z, kept), (z_dot, _) = primals, tangents
    t, inverse = _standardized(z, kept)
    along = _mean(t * z_dot, kept)
    t_dot = jnp.where(kept, z_dot - _mean(z_dot, kept) - t * along, 0) * inverse
    return (t, inverse), (t_dot, -along * inverse**2)


def _mean(a: Array, kept: Array) -> Array:
    """The mean over the classes that are kept."""
    count = jnp.maximum(jnp.sum(kept, -1, keepdims=True), 1).astype(a.dtype)
    return jnp.sum(jnp.where(kept, a, 0), -1, keepdims=True) / count


@jax.jit
def _z_loss(given: Labelled, scale: Array, shift: Array) -> Array:
    z, (label, valid) = read(given.scores()), given.label()
    kept = ~jnp.isneginf(z) if given.where is None else given.where & ~jnp.isneginf(z)
    z = jnp.where(kept, z, 0)
    t, _ = _standardized(z, kept)
    loss = log1p_exp(scale * (shift - pick(t, label))) / scale
    loss = jnp.where(pick(kept, label), loss, jnp.inf)
    loss = loss * jnp.where(has_bad_score(z, (z.ndim - 1,)), jnp.nan, 1)  # a factor, so that derivatives are NaN too
    if given.where is not None:
        loss = jnp.where(given.keeps(label), loss, 0)
    return given.finish(loss, valid)


@public
def spherical_z_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    scale: ArrayLike = 1.0,
    shift: ArrayLike = 0.0,
    ignore_label: int | None = None,
) -> Float[Array, "..."]:
    """The Z-loss of the spherical family: softplus of the label's standardised score.

    loss = (1/a) log(1 + e^{a (b − t_y)}),   t = (z − μ)/σ;   ∂t_y/∂z_k = (1_{k=y} − 1/K − t_y t_k/K)/σ     (MATH 7.6)

    μ and σ² are mean and variance of the row's K scores: shift and scale of a row change nothing. It gives no
    probabilities, and has nothing to do with the penalty `z_loss` of `cross_entropy`.

    Args:
      logits, labels, axis, where, ignore_label: as in `cross_entropy`, with integer labels.
      scale: a > 0; shift: b. Numbers, may be traced.
    Returns: `[...]`, in the logits' dtype, but float32 for narrower ones. A row whose scores are all equal, to
      the last bit, has t = 0 and derivatives 0. Scores whose differences overflow: NaN. Labels out of range or left
      out, rows without classes, and bad scores, as in `cross_entropy`.
    Raises: as `cross_entropy`; TypeError for labels that are no integers.
    Source: de Brébisson & Vincent, arXiv:1604.08859, equation 6.

    >>> spherical_z_loss(jnp.array([3., 0., 0.]), jnp.array(0))
    Array(0.21762..., dtype=float32)
    """
    function = "spherical_z_loss"
    reject_top_targets(function, "labels", labels)
    given = check_labelled(function, logits, labels, axis, where, ignore_label=ignore_label)
    if not given.by_label:
        raise TypeError(
            f"{function}: labels must be integers; got dtype {given.labels.dtype}. For a distribution take its mode, "
            "jnp.argmax(labels, axis)."
        )
    tiny = float(jnp.finfo(given.dtype).tiny)
    a = check_option(function, scale, given.dtype, scale=(tiny, math.inf))
    return _z_loss(given, a, check_option(function, shift, given.dtype, shift=(-math.inf, math.inf)))
