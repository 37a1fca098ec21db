"""Kullback–Leibler divergence of two heads over one vocabulary, in two passes, with its one rule (MATH 11.6)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax._pytree import jvp_of_live, without_zeros
from jsoftmax.checks.arguments import public
from jsoftmax.entropy import kl_terms, log_ratio
from jsoftmax.heads import _check
from jsoftmax.heads._head import Head, Heads, Plan, block_scores, map_shards, scan_classes
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName, match_varying_axes, psum
from jsoftmax.sums import difference


class _TokenConstants(NamedTuple):
    """Of each token: what makes x − L, and D."""

    peak_p: Array
    log_total_p: Array
    peak_q: Array
    log_total_q: Array
    empty: Array
    """Whether no class is left for p."""
    mean: Array | None = None
    """Σ p r, r of the rule."""

    def log_probs(self, x_p: Array, x_q: Array) -> tuple[Array, Array]:
        log_p = difference(x_p, self.peak_p[:, None]) - self.log_total_p[:, None]
        return log_p, difference(x_q, self.peak_q[:, None]) - self.log_total_q[:, None]


def _known(p: Head, q: Head, plan: Plan) -> _TokenConstants:
    of_p, of_q = (statistics(head, Extras(), plan) for head in (p, q))
    return _TokenConstants(of_p.peak, of_p.log_total, of_q.peak, of_q.log_total, jnp.isneginf(of_p.log_normalizer))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _divergence(p: Head, q: Head, plan: Plan) -> tuple[Array, Array]:
    """D = Σ p r, r = log p − log q, in terms p (e^−r − 1 + r) ≥ 0: so both normalisers come first; and Σ p r over the
    classes that both have, which is finite where D is not  (MATH 11.6)."""

    def step(blocks: Heads, _: Heads, *, start: Array, known: _TokenConstants, state: Any, plan: Plan) -> Any:
        x_p, x_q = (block_scores(block, start, plan) for block in blocks)
        log_p, log_q = known.log_probs(x_p, x_q)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        terms, r = kl_terms(log_p, p, log_q, q)
        impossible = jnp.isneginf(log_q) & (log_p > -jnp.inf)
        made = (jnp.sum(terms, 1), jnp.sum(p * r, 1), jnp.sum(impossible, 1, dtype=jnp.int32))
        return jax.tree.map(jnp.add, state, made)

    known = _known(p, q, plan)
    own = match_varying_axes(known, p.weight, plan.axis_name)
    zero = jnp.zeros_like(own.peak_p)
    state = (zero, zero, zero.astype(jnp.int32))
    sums = scan_classes(step, (p, q), (Head(), Head()), own, state, plan)
    D, mean, impossible = psum(sums, plan.axis_name)
    finite = jnp.where(known.empty, 0, jnp.where(impossible > 0, jnp.inf, D))
    return jnp.where(jnp.isnan(D), D, finite), jnp.where(impossible > 0, mean, D)


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    """Ḋ = Σ p (r − Σ p r) ẋ_p + Σ (q − p) ẋ_q, where r is 0 for p = 0 and q = 0  (MATH 6.4)."""
    p, q = primals
    D, mean = _divergence(p, q, plan)

    def step(blocks: Heads, dots: Heads, *, start: Array, known: _TokenConstants, state: Array, plan: Plan) -> Array:
        (x_p, x_p_dot), (x_q, x_q_dot) = (
            jvp_of_live(lambda block: block_scores(block, start, plan), block, dot)
            for block, dot in zip(blocks, dots, strict=True)
        )
        log_p, log_q = known.log_probs(x_p, x_q)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        r, _ = log_ratio(log_p, p, log_q)
        c = r - known.mean[:, None]  # pyright: ignore[reportOptionalSubscript]
        by_q = jnp.where(jnp.isneginf(x_q) | (known.empty[:, None] & ~jnp.isnan(q)), 0, q - p)
        return state + jnp.sum(p * c * x_p_dot + by_q * x_q_dot, 1)

    own = match_varying_axes(_known(p, q, plan)._replace(mean=mean), p.weight, plan.axis_name)
    part = scan_classes(step, (p, q), without_zeros(tangents), own, jnp.zeros_like(own.peak_p), plan)
    rate = psum(part, plan.axis_name)
    return (D, mean), (rate, rate)


def divergence(heads: Heads, plan: Plan) -> Array:
    """D  (MATH 11.6)."""
    return _divergence(*heads, plan)[0]


@public
def linear_kl(  # noqa: PLR0917  (two heads, each by position as in `linear_cross_entropy`)
    hidden_p: ArrayLike,
    weight_p: ArrayLike,
    hidden_q: ArrayLike,
    weight_q: ArrayLike,
    bias_p: ArrayLike | None = None,
    bias_q: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
) -> Float[Array, "..."]:
    """Kullback–Leibler divergence of two linear heads' softmaxes, in nats; no logits.

    It equals

        z_p, z_q = hidden_p @ weight_p.T + bias_p, hidden_q @ weight_q.T + bias_q          bent by soft_cap
        kl_divergence(z_p, z_q, where=where, phi=φ, log_weights=log w)          (MATH 11.6)

    Two passes, four products: small divergences keep their digits, and none is negative. A frozen reference is
    `jax.lax.stop_gradient` of its arrays, whose derivatives then cost nothing.

    Args:
      hidden_p, hidden_q: `[..., d]`, the same tokens; each head may have its own d.
      weight_p, weight_q: `[V, d]`, the same classes.
      bias_p, bias_q: `[V]`, or None.
      phi, soft_cap, where, log_weights, block_size, precision, axis_name, shards: as in
        `linear_cross_entropy`, for both heads.
    Returns: `[...]` ≥ 0, float32 at least; edges as in `kl_divergence`.
    Raises: as `linear_cross_entropy`; ValueError where tokens or classes differ.
    Source: Kullback & Leibler 1951.

    >>> linear_kl(jnp.ones((1, 2)), jnp.eye(3, 2), jnp.ones((1, 2)), jnp.zeros((3, 2)))
    Array([0.08125...], dtype=float32)
    """
    function = "linear_kl"
    options = {
        "phi": phi,
        "soft_cap": soft_cap,
        "where": where,
        "log_weights": log_weights,
        "block_size": block_size,
        "precision": precision,
        "axis_name": axis_name,
        "shards": shards,
    }
    p = _check.check(function, hidden_p, weight_p, bias_p, **options, names=("hidden_p", "weight_p", "bias_p"))
    q = _check.check(function, hidden_q, weight_q, bias_q, **options, names=("hidden_q", "weight_q", "bias_q"))
    _check.check_pair(function, p, q)
    dtype = jnp.result_type(p.plan.dtype, q.plan.dtype)
    heads = (p.in_dtype(dtype), q.in_dtype(dtype))
    return p.restore(map_shards(divergence, heads, p.plan._replace(dtype=dtype)))
