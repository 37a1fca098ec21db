"""The divergence of target probabilities q from the p of the scores (MATH 7.5)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax._series import excess_series, expm1
from jsoftmax.checks.arguments import Axis, public, widened
from jsoftmax.checks.labels import Labelled, check_labelled
from jsoftmax.checks.top_targets import TopTargets
from jsoftmax.divergence import log_ratio
from jsoftmax.losses._top import top_row
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp
from jsoftmax.sums import SURE, class_sum


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _kl_to_target(x: Array, q: Array, axis: tuple[int, ...]) -> Array:
    """D = Σ q r, r = log q − log p, as Σ (q r − q + p) + Σ q − Σ p  (MATH 7.5)."""
    log_p, p, L = normalize(x, axis)
    impossible = jnp.isneginf(x)
    r = log_ratio(_log(q), log_p, impossible)
    near = jnp.abs(r) < 0.5
    r_near = jnp.where(near, r, 0)
    terms = jnp.where(near, q * r_near**2 * excess_series(r_near), jnp.where(q == 0, p, q * r - q + p))
    D = class_sum(terms, axis) + (class_sum(q, axis) - jnp.where(jnp.isneginf(L), 0, 1))
    infinite = jnp.any(impossible & (q > 0), axis, keepdims=True)
    return jnp.where(infinite & ~jnp.isnan(D), jnp.inf, D)


@_kl_to_target.defjvp
def _kl_to_target_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Ḋ = Σ (Q p − q) ẋ + Σ (r + 1) q̇, Q = Σ q. The first term is 0 for a class left out, the second where q = 0
    (MATH 7.5)."""
    (x, q), (x_dot, q_dot) = primals, tangents
    log_p, p, _ = normalize(x, axis)
    # where p > ¾, Q p − q is computed from the other classes and from 1 − p, which keeps its digits
    first, Q = p > SURE, class_sum(q, axis)
    of_others = class_sum(jnp.where(first, 0, q), axis)
    excess = jnp.where(first, of_others + Q * expm1(jnp.where(first, log_p, 0)), Q * p - q)
    by_x = jnp.where(jnp.isneginf(x), 0, excess)
    by_q = jnp.where(q == 0, 0, log_ratio(_log(q), log_p, jnp.isneginf(x)) + 1)
    return _kl_to_target(x, q, axis), class_sum(by_x * widened(x_dot) + by_q * q_dot, axis)


def _log(q: Array) -> Array:
    """log q, −inf where q is 0."""
    return jnp.where(q == 0, -jnp.inf, jnp.log(jnp.where(q == 0, 1, q)))


@jax.jit
def _to_target(given: Labelled, phi: Phi) -> Array:
    x = maps.weighted_scores(phi, given.scores(), given.where, given.log_weights)
    _, valid = given.label()
    row, q = top_row(given, x, None) if given.by_top else (x, given.targets())
    return given.finish(_kl_to_target(row, q, (x.ndim - 1,)), valid)


@public
def kl_to_target(
    logits: ArrayLike,
    targets: ArrayLike | TopTargets,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Kullback–Leibler divergence D(q‖p) of target probabilities q from p = w φ(z) / Σ w φ(z), in nats.

    D = Σ q (log q − log p);   ∂D/∂z = (Q p − q) s, Q = Σ q;   ∂D/∂q = log q − log p + 1     (MATH 7.5)

    Cross-entropy less the target's own entropy: 0 where p = q, and small differences keep their digits. For a target
    given by scores use `jsoftmax.kl_divergence`.

    Args:
      logits, axis, where, phi, log_weights: as in `cross_entropy`.
      targets: q `[..., K]`, floating, not negative; taken as they are, not normalised. Differentiable. Or
        `TopTargets`, whose rest is one class for p and q; "ignore" gives the terms of the k classes alone.
    Returns: `[...]`, in the logits' dtype, but float32 for narrower ones. A class with q = 0 adds 0, and its derivative
      in q is 0 by convention; so it is for a class that `where` leaves out. One that is impossible (score or log-weight
      −inf) with q > 0 makes D = +inf, with finite derivatives. A negative q: NaN. A score of +inf or NaN: NaN in that
      row alone.
    Raises: as `cross_entropy`; TypeError for targets that are no floating distributions.
    Source: Kullback & Leibler 1951.

    >>> kl_to_target(jnp.array([0., 1.]), jnp.array([0., 1.]))
    Array(0.31326..., dtype=float32)
    """
    function = "kl_to_target"
    names = ("logits", "targets")
    given = check_labelled(function, logits, targets, axis, where, phi=phi, log_weights=log_weights, names=names)
    if given.by_label:
        raise TypeError(
            f"{function}: targets must be floating distributions; got dtype {given.labels.dtype}. For class numbers "
            "use cross_entropy, which is the same for them."
        )
    return _to_target(given, phi)
