"""A mean under p, streamed over the keys, with its one rule (MATH 14.2, 14.3)."""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._pytree import jvp_of_live, without_zeros
from jsoftmax.attention._blocks import (
    Inputs,
    Place,
    Plan,
    block_scores,
    over_blocks,
    product,
    rounded_tangent,
    tangent_product,
)
from jsoftmax.phi import log_phi
from jsoftmax.sharding import match_varying_axes, pmax, psum
from jsoftmax.sums import FAR, difference, is_empty, shifted


class Results(enum.Enum):
    """What is computed of each query. Each one has what those before it have."""

    OUTPUT = 1
    LOG_NORMALIZER = 2
    ENTROPY = 3


class Mean(NamedTuple):
    """Numbers of each query `[B, K, G, T]`, with u = x − peak. The sink counts as a key with the value 0."""

    output: Array
    """Σ p v `[B, K, G, T, H]`."""
    peak: Array
    """max x; 0 for an empty row. Derivatives treat it as a constant."""
    log_total: Array
    """log Σ e^u. A small one has its digits where the log-normaliser is computed."""
    log_normalizer: Any = None
    """L = peak + log_total."""
    gap: Any = None
    """Σ p (−u): the entropy is log_total + gap."""


class Running(NamedTuple):
    """Sums over the blocks so far, relative to their own peak, which is −∞ while there is no key  (MATH 14.2)."""

    peak: Array
    rest: Array
    """Σ e^u − 1."""
    weighted: Array
    """Σ e^u v."""
    gap: Any = None
    """Σ e^u (−u)."""


def initial(block: Inputs, results: Results) -> Running:
    """The state before the first key. The zeros are made from the arguments, not from shapes, so that they are sharded
    in the same way."""
    zero = jnp.zeros_like(block.query[..., 0])
    weighted = jnp.zeros_like(block.query, shape=(*zero.shape, block.value.shape[-1]))
    return Running(zero - jnp.inf, zero - 1, weighted, zero if results is Results.ENTROPY else None)


def of_block(block: Inputs, place: Place, results: Results, plan: Plan) -> Running:
    """The sums of a block, relative to its own peak.

    The two sums of `shifted` keep the digits of a small log Σ e^u. The output does not need them, so for it alone there
    is one sum, which is faster on CPU; XLA drops the other two.
    """
    u, e, rest, peak, _ = shifted(block_scores(block, place, plan), (3,))
    if results is Results.OUTPUT:
        rest = jnp.sum(e, 3, keepdims=True) - 1
    rest = jnp.where(is_empty(rest), -1, rest)[..., 0]
    gap = jnp.sum(e * -jnp.maximum(u, -FAR), 3) if results is Results.ENTROPY else None
    return Running(peak[..., 0], rest, product(e, block.value, 2, plan), gap)


def moved(part: Running, peak: Array) -> Running:
    """The sums relative to another peak, which must not be lower. The field `rest` is then Σ e^u  (MATH 14.2)."""
    fall = jnp.where(part.peak == peak, 0, peak - part.peak)
    factor, total = jnp.exp(-fall), 1 + part.rest
    gap = None if part.gap is None else factor * (part.gap + total * jnp.minimum(fall, FAR))
    return Running(peak, factor * total, factor[..., None] * part.weighted, gap)


def merged(a: Running, b: Running) -> Running:
    """Two parts of a row merged, relative to the higher peak. No digit of a small sum is lost."""
    peak = jnp.maximum(a.peak, b.peak)
    a_moved, b_moved = moved(a, peak), moved(b, peak)
    rest = jnp.where(a.peak >= b.peak, a.rest + b_moved.rest, b.rest + a_moved.rest)
    gap = None if a.gap is None else a_moved.gap + b_moved.gap
    return Running(peak, rest, a_moved.weighted + b_moved.weighted, gap)


def over_shards(part: Running, plan: Plan) -> Running:
    """The parts of all shards merged, by one maximum for the peak and one sum for everything else  (MATH 13.1)."""
    if plan.axis_name is None:
        return part
    peak = pmax(part.peak, plan.axis_name)
    has_peak = (part.peak == peak) & (peak > -jnp.inf)
    here = moved(part, peak)
    rest = jnp.where(has_peak, part.rest, here.rest)  # so no digit of a small sum is lost beside a 1
    ones = has_peak.astype(peak.dtype)
    rest, ones, weighted, gap = psum((rest, ones, here.weighted, here.gap), plan.axis_name)
    rest = rest + (ones - 1)
    # the maximum over devices may have dropped a NaN
    return Running(jnp.where(jnp.isnan(rest) & ~jnp.isposinf(peak), jnp.nan, peak), rest, weighted, gap)


def own(tree: Inputs, given: Inputs, plan: Plan) -> Inputs:
    """Gives each device its own copy of what is the same on all devices, along the axes over which keys or queries are
    sharded. The sink is left out, because it is not a key of one device."""
    of_keys = tree.only("key", "value")
    others = tree._replace(key=None, value=None, sink=None)
    return match_varying_axes(others, given.key, plan.axis_name).with_fields(match_varying_axes(of_keys, given.query))


def sink_scores(given: Inputs) -> Array:
    """ψ(sink) for each query; −∞ for queries beyond their length."""
    x = jnp.broadcast_to(log_phi(given.phi, given.sink)[None, :, :, None], given.query.shape[:-1])
    if given.query_lengths is None:
        return x
    query = lax.broadcasted_iota(jnp.int32, x.shape, 3)
    return jnp.where(query < given.query_lengths[:, None, None, None], x, -jnp.inf)


def with_sink(part: Running, given: Inputs) -> Running:
    """The sums with the sink merged in: one more class, whose value is 0."""
    if given.sink is None:
        return part
    x = sink_scores(given)
    peak, left_out = lax.stop_gradient(x), jnp.isneginf(x)
    u = jnp.where(left_out, 0, difference(x, peak))  # 0, with its derivative
    rest = jnp.where(left_out, -1, jnp.exp(u) - 1)
    gap = None if part.gap is None else jnp.exp(u) * -u
    return merged(part, Running(peak, rest, jnp.zeros_like(part.weighted), gap))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def mean(given: Inputs, results: Results, plan: Plan) -> Mean:
    """One pass over the keys: the sums of each block, relative to its own peak, are merged."""

    def step(block: Inputs, _: Inputs, *, place: Place, known: None, state: Running, plan: Plan) -> Running:
        return merged(state, of_block(block, place, results, plan))

    start = functools.partial(initial, results=results)
    blocks = over_blocks(step, (own(given, given, plan), Inputs()), None, start, plan)
    done = with_sink(over_shards(blocks, plan), given)
    empty = jnp.isneginf(done.peak)
    peak = lax.stop_gradient(jnp.where(empty, 0, done.peak))
    rest = jnp.where(empty, 0, done.rest)
    log_total = jnp.log1p(rest)
    infinite = jnp.where(empty, -jnp.inf, jnp.inf).astype(peak.dtype)
    return Mean(
        done.weighted / (1 + rest)[..., None],
        peak,
        log_total,
        None if results is Results.OUTPUT else jnp.where(empty | jnp.isposinf(peak), infinite, peak + log_total),
        None if done.gap is None else done.gap / (1 + rest),
    )


class QueryConstants(NamedTuple):
    """Numbers of each query that the rule takes from the value."""

    peak: Array
    log_total: Array
    gap: Any = None


class Rates(NamedTuple):
    """Sums for each query: Σ (p v)˙ at a fixed Σ e^x, Σ p ẋ, and −Σ p (1 + u + gap) ẋ."""

    weighted: Array
    log_total: Any = None
    gap: Any = None


@functools.partial(mean.defjvp, symbolic_zeros=True)
def _mean_jvp(results: Results, plan: Plan, primals: Any, tangents: Any) -> tuple[Mean, Mean]:
    """L̇ = Σ p ẋ, (Σ p v)˙ = Σ p (v̇ + ẋ v) − (Σ p v) L̇, gap˙ = −Σ p (1 + u + gap) ẋ  (MATH 14.3)."""
    (given,), dots = primals, without_zeros(tangents[0])
    out = mean(given, results, plan)
    known = match_varying_axes(QueryConstants(out.peak, out.log_total, out.gap), given.key, plan.axis_name)

    def step(block: Inputs, dots: Inputs, *, place: Place, known: QueryConstants, state: Rates, plan: Plan) -> Rates:
        return jax.tree.map(jnp.add, state, block_rates(block, dots, place, known, plan))

    def start(block: Inputs) -> Rates:
        zeros = initial(block, results)
        return Rates(zeros.weighted, jnp.zeros_like(zeros.rest), zeros.gap)

    pair = own(given, given, plan), own(dots, given, plan)
    rates = psum(over_blocks(step, pair, known, start, plan), plan.axis_name)
    if given.sink is not None and (dots.sink is not None or jax.tree.leaves(dots.phi)):
        fields = given.only("sink", "phi")
        x, x_dot = jvp_of_live(lambda fields: sink_scores(given.with_fields(fields)), fields, dots.only("sink", "phi"))
        _, of_log_total, of_gap = score_terms(x, x_dot, QueryConstants(out.peak, out.log_total, out.gap))
        rates = rates._replace(
            log_total=rates.log_total + of_log_total, gap=None if rates.gap is None else rates.gap + of_gap
        )
    return out, Mean(
        rates.weighted - out.output * rates.log_total[..., None],
        jnp.zeros_like(out.peak),
        rates.log_total,
        None if results is Results.OUTPUT else rates.log_total,
        rates.gap,
    )


class Terms(NamedTuple):
    """Terms of each score: p, p ẋ and −p (1 + u + gap) ẋ."""

    p: Array
    of_log_total: Array
    of_gap: Any


def score_terms(x: Array, x_dot: Array, known: QueryConstants) -> Terms:
    """The terms of the rule that depend on the scores alone, not on the values."""
    u = difference(x, known.peak)
    p = jnp.exp(u - known.log_total)
    w = p * x_dot
    return Terms(p, w, None if known.gap is None else -(1 + jnp.where(p == 0, 0, u) + known.gap) * w)


def block_rates(block: Inputs, dots: Inputs, place: Place, known: QueryConstants, plan: Plan) -> Rates:
    """The share of a block in the sums of the rule."""
    x, x_dot = jvp_of_live(lambda block: block_scores(block, place, plan), block, dots._replace(value=None))
    terms = score_terms(x, x_dot, jax.tree.map(lambda a: a[..., None], known))
    # One rounding for both sums: beside a p near 1, what they have in common cancels.
    terms = terms._replace(of_log_total=rounded_tangent(terms.of_log_total, plan))
    weighted = tangent_product(terms.of_log_total, block.value, 2, plan)
    if dots.value is not None:
        weighted = weighted + product(terms.p, dots.value, 2, plan)
    return Rates(weighted, *(None if a is None else jnp.sum(a, 3) for a in terms[1:]))
