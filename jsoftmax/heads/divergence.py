"""Divergences of two heads over one vocabulary, in two passes, with their rules (MATH 11.6, 11.8)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from jsoftmax._pytree import jvp_of_live, without_zeros
from jsoftmax.checks.arguments import check_option, public
from jsoftmax.divergence import (
    divergence_terms,
    excess,
    log_ratio,
    log_ratios_to_mean,
    share_or_nan,
    zero_where_not_nan,
)
from jsoftmax.heads import _check
from jsoftmax.heads._head import Head, Heads, Plan, block_scores, map_shards, scan_classes
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName, match_varying_axes, psum
from jsoftmax.sums import difference


class _TokenConstants(NamedTuple):
    """Numbers of each token, from which log p, log q and D are computed."""

    peak_p: Array
    log_total_p: Array
    peak_q: Array
    log_total_q: Array
    empty: Array
    """Whether no class is left for p; in 11.8, for p or for q."""
    mean: Any = None
    """Σ p r with the r of the rule; or D(p‖m) and D(q‖m)."""
    beta: Any = None

    def log_probs(self, x_p: Array, x_q: Array) -> tuple[Array, Array]:
        log_p = difference(x_p, self.peak_p[:, None]) - self.log_total_p[:, None]
        return log_p, difference(x_q, self.peak_q[:, None]) - self.log_total_q[:, None]


def _token_constants(p: Head, q: Head, plan: Plan, beta: Array | None = None) -> _TokenConstants:
    of_p, of_q = (statistics(head, Extras(), plan) for head in (p, q))
    empty = jnp.isneginf(of_p.log_normalizer)
    if beta is not None:
        empty, beta = empty | jnp.isneginf(of_q.log_normalizer), jnp.broadcast_to(beta, empty.shape)
    return _TokenConstants(of_p.peak, of_p.log_total, of_q.peak, of_q.log_total, empty, beta=beta)


def _scores_and_rates(blocks: Heads, dots: Heads, start: Array, plan: Plan) -> list[tuple[Array, Array]]:
    """x and ẋ of a block, for both heads."""
    return [
        jvp_of_live(lambda block: block_scores(block, start, plan), block, dot)
        for block, dot in zip(blocks, dots, strict=True)
    ]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _divergence(p: Head, q: Head, plan: Plan) -> tuple[Array, Array]:
    """D = Σ p r, r = log p − log q; and the same sum over the classes that both have, which is finite where D is not.

    D is summed as Σ p (e^−r − 1 + r), whose terms are not negative, after both normalisers are known  (MATH 11.6).
    """

    def step(blocks: Heads, _: Heads, *, start: Array, known: _TokenConstants, state: Any, plan: Plan) -> Any:
        x_p, x_q = (block_scores(block, start, plan) for block in blocks)
        log_p, log_q = known.log_probs(x_p, x_q)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        impossible = jnp.isneginf(log_q)
        r = log_ratio(log_p, log_q, impossible)
        infinite = impossible & (log_p > -jnp.inf)
        # one array, which takes fewer kernels than three
        return state + jnp.stack([jnp.sum(a, 1) for a in (excess(p, r, q), p * r, infinite.astype(p.dtype))], 1)

    known = _token_constants(p, q, plan)
    own = match_varying_axes(known, p.weight, plan.axis_name)
    state = jnp.stack([jnp.zeros_like(own.peak_p)] * 3, 1)
    sums = scan_classes(step, (p, q), (Head(), Head()), own, state, plan)
    D, mean, infinite = psum(sums, plan.axis_name).T
    finite = jnp.where(known.empty, 0, jnp.where(infinite > 0, jnp.inf, D))
    return jnp.where(jnp.isnan(D), D, finite), jnp.where(infinite > 0, mean, D)


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    """Ḋ = Σ p (r − Σ p r) ẋ_p + Σ (q − p) ẋ_q, where r is 0 for q = 0  (MATH 6.4)."""
    p, q = primals
    D, mean = _divergence(p, q, plan)

    def step(blocks: Heads, dots: Heads, *, start: Array, known: _TokenConstants, state: Array, plan: Plan) -> Array:
        (x_p, x_p_dot), (x_q, x_q_dot) = _scores_and_rates(blocks, dots, start, plan)
        log_p, log_q = known.log_probs(x_p, x_q)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        r = log_ratio(log_p, log_q, jnp.isneginf(log_q))
        c = r - known.mean[:, None]
        by_q = zero_where_not_nan(jnp.isneginf(x_q) | known.empty[:, None], q - p)
        return state + jnp.sum(p * c * x_p_dot + by_q * x_q_dot, 1)

    own = match_varying_axes(_token_constants(p, q, plan)._replace(mean=mean), p.weight, plan.axis_name)
    part = scan_classes(step, (p, q), without_zeros(tangents), own, jnp.zeros_like(own.peak_p), plan)
    rate = psum(part, plan.axis_name)
    return (D, mean), (rate, rate)


def divergence(heads: Heads, plan: Plan) -> Array:
    """D  (MATH 11.6)."""
    return _divergence(*heads, plan)[0]


def _means(p: Head, q: Head, beta: Array, plan: Plan) -> tuple[Array, Array]:
    """D(p‖m) and D(q‖m)  (MATH 6.8)."""

    def step(blocks: Heads, _: Heads, *, start: Array, known: _TokenConstants, state: Any, plan: Plan) -> Any:
        x_p, x_q = (block_scores(block, start, plan) for block in blocks)
        log_p, log_q = known.log_probs(x_p, x_q)
        p, q, beta = jnp.exp(log_p), jnp.exp(log_q), known.beta[:, None]
        made = tuple(jnp.sum(a, 1) for a in divergence_terms(p, q, beta, log_p, log_q))
        return jax.tree.map(jnp.add, state, made)

    own = match_varying_axes(_token_constants(p, q, plan, beta), p.weight, plan.axis_name)
    zero = jnp.zeros_like(own.peak_p)
    sums = psum(scan_classes(step, (p, q), (Head(), Head()), own, (zero, zero), plan), plan.axis_name)
    of_p, of_q = (zero_where_not_nan(own.empty, D) for D in sums)
    return of_p, of_q


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _jensen_shannon(p: Head, q: Head, beta: Array, plan: Plan) -> tuple[Array, Array, Array]:
    """β D(p‖m) + (1 − β) D(q‖m), and the two divergences  (MATH 6.8)."""
    of_p, of_q = _means(p, q, beta, plan)
    return beta * of_p + (1 - beta) * of_q, of_p, of_q


@functools.partial(_jensen_shannon.defjvp, symbolic_zeros=True)
def _jensen_shannon_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    """Σ β p (r_p − D(p‖m)) ẋ_p + Σ (1 − β) q (r_q − D(q‖m)) ẋ_q + (D(p‖m) − D(q‖m)) β̇  (MATH 6.8)."""
    p, q, beta = primals
    dots = without_zeros(tangents)
    out = _jensen_shannon(p, q, beta, plan)
    _, of_p, of_q = out

    def step(blocks: Heads, dots: Heads, *, start: Array, known: _TokenConstants, state: Array, plan: Plan) -> Array:
        (x_p, x_p_dot), (x_q, x_q_dot) = _scores_and_rates(blocks, dots, start, plan)
        log_p, log_q = known.log_probs(x_p, x_q)
        p, q, beta = jnp.exp(log_p), jnp.exp(log_q), known.beta[:, None]
        r_p, r_q = log_ratios_to_mean(p, q, beta, log_p, log_q)
        of_p, of_q = (mean[:, None] for mean in known.mean)
        return state + jnp.sum(beta * p * (r_p - of_p) * x_p_dot + (1 - beta) * q * (r_q - of_q) * x_q_dot, 1)

    known = _token_constants(p, q, plan, beta)._replace(mean=(of_p, of_q))
    own = match_varying_axes(known, p.weight, plan.axis_name)
    part = scan_classes(step, (p, q), dots[:2], own, jnp.zeros_like(own.peak_p), plan)
    rate = jnp.where(own.empty & ~jnp.isnan(out[0]), 0, psum(part, plan.axis_name))
    if dots[2] is not None:
        rate = rate + (of_p - of_q) * dots[2]
    means = jvp_of_live(lambda given: _means(given[0], given[1], given[2], plan), (p, q, beta), dots)[1]
    return out, (rate, *means)


def jensen_shannon(given: tuple[Head, Head, Array], plan: Plan) -> Array:
    """The divergence  (MATH 11.8)."""
    return _jensen_shannon(*given, plan)[0]


def _check_both(function: str, of_p: Any, of_q: Any, options: dict[str, Any]) -> tuple[_check.CheckedHead, Heads, Plan]:
    """Two heads with the same vocabulary, in their common dtype."""
    p = _check.check(function, *of_p, **options, names=("hidden_p", "weight_p", "bias_p"))
    q = _check.check(function, *of_q, **options, names=("hidden_q", "weight_q", "bias_q"))
    _check.check_pair(function, p, q)
    dtype = jnp.result_type(p.plan.dtype, q.plan.dtype)
    return p, (p.in_dtype(dtype), q.in_dtype(dtype)), p.plan._replace(dtype=dtype)


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
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    banned: Integer[ArrayLike, "..."] | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
) -> Float[Array, "..."]:
    """Kullback–Leibler divergence of the softmaxes of two linear heads, in nats, without logits.

    It equals

        z_p, z_q = hidden_p @ weight_p.T + bias_p, hidden_q @ weight_q.T + bias_q     bent by soft_cap, over temperature
        kl_divergence(z_p, z_q, where=where, phi=φ, log_weights=log w)          (MATH 11.6)

    It takes two passes and four products, so that small divergences keep their digits and none is negative. For a
    frozen reference pass `jax.lax.stop_gradient` of its arrays; their derivatives then cost nothing.

    Args:
      hidden_p, hidden_q: `[..., d]`, the same tokens; each head may have its own d.
      weight_p, weight_q: `[V, d]`, the same classes.
      bias_p, bias_q: `[V]`, or None.
      phi, soft_cap, temperature, where, log_weights, banned, block_size, precision, axis_name, shards: as in
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
        "temperature": temperature,
        "where": where,
        "log_weights": log_weights,
        "banned": banned,
        "block_size": block_size,
        "precision": precision,
        "axis_name": axis_name,
        "shards": shards,
    }
    given, heads, plan = _check_both(function, (hidden_p, weight_p, bias_p), (hidden_q, weight_q, bias_q), options)
    return given.restore(map_shards(divergence, heads, plan))


@public
def linear_jsd(  # noqa: PLR0917  (two heads, each by position as in `linear_cross_entropy`)
    hidden_p: ArrayLike,
    weight_p: ArrayLike,
    hidden_q: ArrayLike,
    weight_q: ArrayLike,
    bias_p: ArrayLike | None = None,
    bias_q: ArrayLike | None = None,
    *,
    beta: ArrayLike = 0.5,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    banned: Integer[ArrayLike, "..."] | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
) -> Float[Array, "..."]:
    """Generalised Jensen–Shannon divergence of the softmaxes of two linear heads, in nats, without logits.

    It equals

        jensen_shannon_divergence(z_p, z_q, where=where, beta=β, phi=φ, log_weights=log w)          (MATH 11.8)

    of the scores of `linear_kl`. At β = 0 and 1 it is 0. Some libraries give a Kullback–Leibler divergence there: call
    `linear_kl` for it.

    Args:
      hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q, phi, soft_cap, temperature, where, log_weights, banned,
        block_size, precision, axis_name, shards: as in `linear_kl`, with as many passes and products.
      beta: β in [0, 1], one number, which may be traced. Differentiable. A traced one out of range gives NaN.
    Returns: `[...]` in [0, log 2], float32 at least; edges as in `jensen_shannon_divergence`.
    Raises: as `linear_kl`.
    Source: Lin 1991, equation 5.1 (weights β, 1 − β); Agarwal et al. 2024 (distillation).

    >>> linear_jsd(jnp.ones((1, 2)), jnp.eye(3, 2), jnp.ones((1, 2)), jnp.zeros((3, 2)))
    Array([0.02...], dtype=float32)
    """
    function = "linear_jsd"
    options = {
        "phi": phi,
        "soft_cap": soft_cap,
        "temperature": temperature,
        "where": where,
        "log_weights": log_weights,
        "banned": banned,
        "block_size": block_size,
        "precision": precision,
        "axis_name": axis_name,
        "shards": shards,
    }
    given, heads, plan = _check_both(function, (hidden_p, weight_p, bias_p), (hidden_q, weight_q, bias_q), options)
    b = share_or_nan(check_option(function, beta, heads[0].hidden.dtype, beta=(0.0, 1.0)))
    return given.restore(map_shards(jensen_shannon, (*heads, b), plan))
