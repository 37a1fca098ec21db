"""The temperature at which the entropy takes a wanted value (MATH 9.3)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax.checks.arguments import Axis, broadcast_number, public
from jsoftmax.entropy import centred_log_p
from jsoftmax.maps import normalize
from jsoftmax.phi import Exponential, Phi, exp, log_phi, slope
from jsoftmax.sums import difference

_WIDTH = 25.0  # log t is searched within ± 25 of the logarithm of the scores' spread


def _entropy_at(phi: Phi, z: Array, log_t: Array) -> tuple[Array, Array]:
    """H of the scores z/t, and ∂H/∂ log t = Σ p c s z/t  (MATH 9.3)."""
    out = jnp.isneginf(z)
    scaled = jnp.where(out, 0, z) * jnp.exp(-log_t)
    x = log_phi(phi, jnp.where(out, -jnp.inf, scaled))
    axis = (z.ndim - 1,)
    c, H = centred_log_p(x, axis)
    p = normalize(x, axis).p
    terms = jnp.where(p == 0, 0, p * c * slope(phi, scaled) * jnp.where(p == 0, 0, scaled))
    return H, jnp.sum(terms, -1, keepdims=True)


def _newton(phi: Phi, z: Array, target: Array, log_t: Array) -> tuple[Array, Array]:
    """A Newton step in log t, and H − target. Where H is small the step is taken on log H; where H is flat it is
    infinite."""
    H, rate = _entropy_at(phi, z, log_t)
    small = (H < 1) & (H > 0) & (target > 0)
    ratio = jnp.where(small, H, 1)
    miss = jnp.where(small, ratio * jnp.log(jnp.where(small, target, 1) / ratio), target - H)
    return jnp.where(rate == 0, jnp.inf, miss / jnp.where(rate == 0, 1, rate)), H - target


@jax.jit
def _solve(phi: Phi, z: Array, target: Array) -> Array:
    """log t, by Newton's steps inside a bracket; NaN where no t gives the entropy."""
    fixed_phi, fixed_z, fixed_target = lax.stop_gradient((phi, z, target))
    kept = ~jnp.isneginf(fixed_z)
    if isinstance(phi, Exponential):  # a shift changes no probability, and the differences lose no digits
        peak = jnp.max(fixed_z, -1, keepdims=True, initial=-jnp.inf)
        fixed_z = jnp.where(kept, difference(fixed_z, peak), -jnp.inf)
    spread = jnp.max(jnp.where(kept, jnp.abs(fixed_z), 0), -1, keepdims=True, initial=0)
    centre = jnp.log(jnp.where(spread > 0, spread, 1))
    low, high = centre - _WIDTH, centre + _WIDTH
    reach = [_entropy_at(fixed_phi, fixed_z, end)[0] - fixed_target for end in (low, high)]
    found = ~(reach[0] >= 0) & (reach[1] > 0)  # a NaN at a small t lies beyond φ's domain
    eps = float(jnp.finfo(z.dtype).eps)

    def is_open(low: Array, high: Array, step: Array) -> Array:
        return found & (high - low > eps) & (jnp.abs(step) > eps)

    def go_on(state: Any) -> Array:
        _, low, high, step, count = state
        return jnp.any(is_open(low, high, step)) & (count < 200)

    def advance(state: Any) -> Any:
        log_t, low, high, last, count = state
        still = is_open(low, high, last)  # a row that is done stays as it is, however long others take
        step, miss = _newton(fixed_phi, fixed_z, fixed_target, log_t)
        low, high = jnp.where(miss >= 0, low, log_t), jnp.where(miss >= 0, log_t, high)
        new = log_t + step
        inside = (low <= new) & (new <= high) & (jnp.abs(step) < 2)
        new = jnp.where(still, jnp.where(inside, new, (low + high) / 2), log_t)
        return new, low, high, jnp.where(still, new - log_t, last), count + 1

    state = (centre, low, high, jnp.full_like(centre, jnp.inf), 0)
    log_t = lax.stop_gradient(lax.while_loop(go_on, advance, state)[0])
    step = jnp.zeros_like(log_t)
    for _ in range(2):  # steps from a constant give derivatives up to order three where JAX drops the rule
        step, _ = _newton(phi, z, target, log_t)
        log_t = log_t + jnp.where(jnp.isinf(step), 0, step)
    # where the entropy jumps over the target there is no solution
    return jnp.where(found & (jnp.abs(step) < 1e-2), log_t, jnp.nan)


@jax.custom_jvp
def _temperature(phi: Phi, z: Array, target: Array) -> Array:
    return jnp.exp(_solve(phi, z, target))


@_temperature.defjvp
def _temperature_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """ṫ = t (target˙ − Ḣ)/(∂H/∂ log t), Ḣ at a fixed t  (MATH 9.3)."""
    (phi, z, target), (phi_dot, z_dot, target_dot) = primals, tangents
    t = _temperature(phi, z, target)
    log_t = jnp.log(t)
    _, H_dot = jax.jvp(lambda phi, z: _entropy_at(phi, z, log_t)[0], (phi, z), (phi_dot, z_dot))
    return t, t * (target_dot - H_dot) / _entropy_at(phi, z, log_t)[1]


@public
def temperature_for_entropy(
    z: ArrayLike,
    target: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
) -> Float[Array, "..."]:
    """The temperature t at which the softmax of z/t has a wanted entropy.

    entropy(z/t) = target;   ∂H/∂ log t = Σ p c s z/t, ∂t/∂target = t/(∂H/∂ log t)     (MATH 9.3)

    For t-SNE's perplexity (target = log perplexity), or exploration that keeps its randomness. To calibrate a
    classifier, fit t to held-out labels instead: minimise the mean of `losses.cross_entropy(logits / t, labels)`.

    Args:
      z: scores `[..., K]`, any floating dtype; integers promote.
      target: the entropy in nats, a number or an array that broadcasts to `[...]`; differentiable.
      axis: int, tuple or None (all): the classes' axis, reduced.
      where: bool, broadcastable to `z`; False leaves a class out.
      phi: the positive map φ.
    Returns: t > 0, `[...]`, in the dtype of `z`, but float32 for narrower scores; with derivatives of every order in
      `z`, `target` and φ's parameters. NaN unless the target lies between the limits of the entropy for t → 0 and for t
      → ∞. The latter is log K. The former is, for phi=exp, the log of the number of classes that share the maximum. For
      a φ that grows like a power, taylor(m) or spherical (m = 2), it is the entropy of |z|^m / Σ |z|^m; for softplus,
      elu1 (m = 1) and relu_power(m, ε), that of the positive scores alone, if there are any. Where the entropy is not
      monotone in t, as for a φ that is not, t is one of the solutions. A score of +inf or NaN: NaN in that row alone.
    Raises: as `jsoftmax.entropy`, and ValueError if `target` does not broadcast.
    Source: van der Maaten & Hinton 2008 (perplexity), there by bisection.

    >>> from jsoftmax import entropy
    >>> z = jnp.array([0., 1., 3.])
    >>> t = temperature_for_entropy(z, 0.5)
    >>> t, entropy(z / t).round(5)
    (Array(0.96648..., dtype=float32), Array(0.5, dtype=float32))
    """
    function = "temperature_for_entropy"
    arguments = maps.check(function, {"z": z}, axis, where, phi, None)
    (scores,), axes, mask = arguments.scores, arguments.axis, arguments.where
    maps.check_phi_moves(function, phi, axes, scores.ndim)
    batch = tuple(length for i, length in enumerate(scores.shape) if i not in axes)
    wanted = broadcast_number(function, "target", target, batch, "the scores without their classes,")
    wanted = wanted.astype(scores.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    flat = jnp.moveaxis(scores, axes, range(-len(axes), 0))
    flat = flat.reshape(*batch, math.prod(flat.shape[len(batch) :]))
    return _temperature(phi, flat, wanted[..., None])[..., 0]
