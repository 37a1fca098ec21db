"""Kullback–Leibler divergence of two heads over one vocabulary, in two passes, with its one rule (MATH 11.6)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax._series import excess_ratio
from jsoftmax.entropy import log_ratio
from jsoftmax.heads._head import Head, Heads, Plan, block_scores, jvp_of_live, over_classes, without_zeros
from jsoftmax.heads._statistics import Wanted, statistics


class _Known(NamedTuple):
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
        log_p = x_p - self.peak_p[:, None] - self.log_total_p[:, None]
        return log_p, x_q - self.peak_q[:, None] - self.log_total_q[:, None]


def _known(p: Head, q: Head, plan: Plan) -> _Known:
    of_p, of_q = (statistics(head, Wanted(), plan) for head in (p, q))
    return _Known(of_p.peak, of_p.log_total, of_q.peak, of_q.log_total, jnp.isneginf(of_p.log_normalizer))


def divergence(p: Head, q: Head, plan: Plan) -> Array:
    """D  (MATH 11.6)."""
    return _divergence(p, q, plan)[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _divergence(p: Head, q: Head, plan: Plan) -> tuple[Array, Array]:
    """D = Σ p r, r = log p − log q, in terms p (e^−r − 1 + r) ≥ 0: so both normalisers come first; and Σ p r over the
    classes that both have, which is finite where D is not  (MATH 11.6)."""

    def step(blocks: Heads, _: Heads, start: Array, known: _Known, state: Any) -> Any:
        x_p, x_q = (block_scores(block, start, plan) for block in blocks)
        log_p, log_q = known.log_probs(x_p, x_q)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        r, both = log_ratio(log_p, p, log_q)
        near = both & (jnp.abs(r) < 0.5)
        r_near = jnp.where(near, r, 0)
        terms = jnp.where(near, p * r_near**2 * excess_ratio(r_near), p * r - p + q)
        impossible = jnp.isneginf(log_q) & (log_p > -jnp.inf)
        made = (jnp.sum(terms, 1), jnp.sum(p * r, 1), jnp.sum(impossible, 1, dtype=jnp.int32))
        return jax.tree.map(jnp.add, state, made)

    known = _known(p, q, plan)
    zero = jnp.zeros_like(known.peak_p)
    state = (zero, zero, zero.astype(jnp.int32))
    D, mean, impossible = over_classes(step, (p, q), (Head(), Head()), known, state, plan)
    finite = jnp.where(known.empty, 0, jnp.where(impossible > 0, jnp.inf, D))
    return jnp.where(jnp.isnan(D), D, finite), jnp.where(impossible > 0, mean, D)


@functools.partial(_divergence.defjvp, symbolic_zeros=True)
def _divergence_jvp(plan: Plan, primals: Any, tangents: Any) -> Any:
    """Ḋ = Σ p (r − Σ p r) ẋ_p + Σ (q − p) ẋ_q, where r is 0 for p = 0 and q = 0  (MATH 6.4)."""
    p, q = primals
    D, mean = _divergence(p, q, plan)

    def step(blocks: Heads, dots: Heads, start: Array, known: _Known, state: Array) -> Array:
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

    known = _known(p, q, plan)._replace(mean=mean)
    rate = over_classes(step, (p, q), without_zeros(tangents), known, jnp.zeros_like(D), plan)
    return (D, mean), (rate, rate)
