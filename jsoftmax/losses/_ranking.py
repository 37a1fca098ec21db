"""Plackett–Luce: the probability of a ranking (MATH 7.7)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from jsoftmax import maps, sums
from jsoftmax._series import log1p_exp
from jsoftmax.checks.arguments import as_array, one_axis, public, wide_integers
from jsoftmax.checks.labels import check_logits, check_mask
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import apply_to_rows
from jsoftmax.sums import has_bad_score


def _log_add(a: Array, b: Array) -> Array:
    """log(e^a + e^b), with derivatives of every order, also where a or b is −inf."""
    top = lax.stop_gradient(jnp.maximum(a, b))
    none = jnp.isneginf(top)
    top = jnp.where(none, 0, top)
    return jnp.where(none, -jnp.inf, top + jnp.log(jnp.where(none, 1, jnp.exp(a - top) + jnp.exp(b - top))))


@jax.jit
def _plackett_luce(x: Array, order: Array) -> Array:
    """−Σ_i log(1 + e^{R_{i+1} − x_{o_i}}), R_{i+1} over the classes that come after o_i  (MATH 7.7)."""
    inside = (order >= 0) & (order < x.shape[-1])
    index = jnp.where(inside, order, 0)
    ordered = jnp.sort(order, -1)
    valid = jnp.all(inside, -1) & jnp.all(ordered[..., 1:] != ordered[..., :-1], -1)
    bad = has_bad_score(x, (x.ndim - 1,))[..., 0]
    chosen = jnp.put_along_axis(jnp.zeros(x.shape, bool), index, True, -1, inplace=False)
    never = maps.log_sum(jnp.where(chosen, -jnp.inf, x), (x.ndim - 1,))
    y = jnp.take_along_axis(x, index, -1)
    R = lax.associative_scan(_log_add, jnp.concatenate([y, never], -1), reverse=True, axis=y.ndim - 1)[..., 1:]
    out, last = jnp.isneginf(y), jnp.isneginf(R)
    terms = jnp.where(last, 0, log1p_exp(jnp.where(out | last, 0, R) - jnp.where(out, 0, y)))
    log_prob = -jnp.sum(jnp.where(out, jnp.inf, terms), -1) * jnp.where(bad, jnp.nan, 1).astype(x.dtype)
    return jnp.where(valid, log_prob, jnp.nan)


@public
def plackett_luce_log_prob(
    scores: ArrayLike,
    order: Integer[ArrayLike, "..."],
    axis: int = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Log-probability of a ranking: classes drawn one after the other without replacement, each from p of what is left.

    log P = Σ_i (x_{o_i} − log Σ_{not yet chosen} e^x),   x = ψ(z) + log w     (MATH 7.7)

    Args:
      scores: z `[..., K]`, of a floating dtype.
      order: integers `[..., k]`, the classes in the order of their choice, best first; k < K is a partial order.
      axis: int: the axis of the classes in `scores`, and of the choices in `order`.
      where: bool; with as many dimensions as the scores it leaves classes out, with as many as the result it leaves
        rows out, whose result is 0.
      phi, log_weights: as in `jsoftmax.softmax`.
    Returns: `[...]` ≤ 0, in the scores' dtype, but float32 for narrower ones. A class twice or out of range: NaN. One
      left out: −inf, with finite derivatives. A score of +inf or NaN: NaN in that row alone.
    Raises: as `jsoftmax.softmax`; TypeError if `order` is not of integers, ValueError if its other axes do not fit.
    Source: Luce 1959; Plackett 1975.

    >>> plackett_luce_log_prob(jnp.log(jnp.array([1., 2., 3.])), jnp.array([2, 1]))  # 3/6 · 2/3
    Array(-1.09861..., dtype=float32)
    """
    function = "plackett_luce_log_prob"
    arguments = maps.check(function, {"scores": check_logits(function, "scores", scores)}, axis, None, phi, log_weights)
    chosen = as_array(function, "order", order)
    z, *_ = arguments.scores
    at = one_axis(function, axis, arguments.axis)
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise TypeError(
            f"{function}: order must be integers, the classes by rank; got dtype {chosen.dtype}. From scores make it "
            "by jnp.argsort(scores, descending=True)."
        )
    if chosen.ndim != z.ndim or any(chosen.shape[i] != z.shape[i] for i in range(z.ndim) if i != at):
        raise ValueError(
            f"{function}: order must have the scores' shape {z.shape} except for the length of axis {at}; got shape "
            f"{chosen.shape}. If many rows have the same order, use jnp.broadcast_to."
        )
    classes, rows = check_mask(function, where, z.shape, z.shape[:at] + z.shape[at + 1 :])
    if rows is not None:  # rows that are left out may hold anything
        out = ~jnp.expand_dims(rows, at)
        z, chosen = (
            sums.zero_where(out, z),
            jnp.where(out, lax.broadcasted_iota(chosen.dtype, chosen.shape, at), chosen),
        )
    x = maps.weighted_scores(phi, z, classes, arguments.log_weights)
    in_rows = jnp.moveaxis(x, at, -1), jnp.moveaxis(wide_integers(chosen), at, -1)
    log_prob = apply_to_rows(lambda x, order: _plackett_luce(x, order)[..., None], *in_rows)[..., 0]
    return log_prob if rows is None else jnp.where(rows, log_prob, 0)
