"""The statistics of each token that one pass over the vocabulary finds, with their one rule (MATH 11.2, 11.3)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import zero_from_primal
from jaxtyping import Array

from jsoftmax._pytree import jvp_of_live, without_zeros
from jsoftmax._series import expm1
from jsoftmax.heads._head import Head, Heads, Plan, block_scores, scan_classes, without_labels
from jsoftmax.heads._top import block_top_k, top_of_parts, top_with_classes
from jsoftmax.sharding import (
    is_label,
    local_label,
    match_varying_axes,
    place_in_block,
    pmax,
    psum,
    shard_slot,
)
from jsoftmax.sums import FAR, SURE, difference, exp_sums, gap_sum, is_empty, not_negative


class Extras(NamedTuple):
    """What is computed in addition to the log-normaliser and to what the labels or targets need."""

    entropy: bool = False
    spread: bool = False
    top: int = 0
    """How many of the classes with the largest p are wanted."""
    others: bool = False
    """Whether the statistics are those of the classes that are no label, beside the labels' own scores."""


class Statistics(NamedTuple):
    """Numbers of each token `[N]`; None if not wanted. Sums are over the classes that are kept, and u = x − peak."""

    peak: Array
    """max x; 0 for an empty row. Derivatives treat it as a constant."""
    log_total: Array
    """log1p(rest) = log Σ e^u."""
    log_normalizer: Array
    """L = peak + log_total."""
    gap: Any = None
    """Σ p (−u): the entropy is log_total + gap."""
    loss: Any = None
    """−l_y `[N, m]`, or Σ q (−l) `[N, 1]`."""
    label: Any = None
    """x_y `[N, m]`; the statistics are then those of the other classes."""
    mass: Any = None
    """Σ q over the classes that are kept."""
    spread: Any = None
    """Σ (−u)."""
    kept_count: Any = None
    """Σ 1."""
    top: Any = None
    """−u of the k largest p `[N, k]`, in descending order of p."""
    top_class: Any = None
    """The numbers of these classes, int32; −1 beyond the classes that are kept."""


class PartialStatistics(NamedTuple):
    """Sums over the blocks so far, relative to their own peak, which is −inf while there is no class  (MATH 11.2)."""

    peak: Array
    rest: Array
    """Σ e^u − 1."""
    gap: Any = None
    """Σ e^u (−u)."""
    label: Any = None
    """x_y `[N, m]`."""
    below: Any = None
    """Σ q (−u)."""
    mass: Any = None
    """Σ q."""
    spread: Any = None
    kept_count: Any = None
    top: Any = None
    """The k largest x; −inf beyond the classes that are kept."""
    top_class: Any = None


def initial(head: Head, wanted: Extras) -> PartialStatistics:
    """The state before the first class. The zeros are made from the arguments, not from shapes, so that they are
    sharded in the same way."""
    zero = jnp.zeros_like(head.hidden[:, 0])
    return PartialStatistics(
        zero - jnp.inf,
        zero - 1,
        zero if wanted.entropy else None,
        zero[:, None] - jnp.full((1, head.labels.shape[1]), jnp.inf, zero.dtype) if head.labels is not None else None,
        zero if head.targets is not None else None,
        zero if head.targets is not None else None,
        zero if wanted.spread else None,
        zero if wanted.spread else None,
        zero[:, None] - jnp.full((1, wanted.top), jnp.inf, zero.dtype) if wanted.top else None,
        zero.astype(jnp.int32)[:, None] - jnp.ones((1, wanted.top), jnp.int32) if wanted.top else None,
    )


def label_scores(labels: Array, start: Array, x: Array) -> Array:
    """x_y of labels `[N, m]` that are in this block; −∞ for the others."""
    label, inside = place_in_block(labels, start, x.shape[1])
    return jnp.where(inside, jnp.take_along_axis(x, label, 1), -jnp.inf)


def block_statistics(  # noqa: PLR0917  (what a block has, and how it is searched)
    head: Head,
    wanted: Extras,
    start: Array,
    x: Array,
    plan: Plan,
    label_scores: Callable[..., Array] = label_scores,
    block_top_k: Callable[..., Any] = block_top_k,
) -> PartialStatistics:
    """The statistics of a block with the scores x, relative to its own peak  (MATH 11.2)."""
    axis = (1,)
    made: dict[str, Any] = {}
    if head.labels is not None:
        made["label"] = label_scores(head.labels, start, x)
    if wanted.others:
        x = without_labels(x, head.labels, start)
    peak, rest, _ = exp_sums(x, axis)
    part = exp_part(peak, rest)
    if wanted.entropy:
        made["gap"] = gap_sum(x, peak, axis)[:, 0]
    if head.targets is not None or wanted.spread:
        kept = ~jnp.isneginf(x)
        below = jnp.where(kept, -difference(x, peak), 0)
        if head.targets is not None:
            q = head.targets if head.where is None else jnp.where(lax.broadcast_to_rank(head.where, 2), head.targets, 0)
            q = q if head.banned is None else without_labels(q, head.banned, start, 0.0)
            impossible = jnp.where(q == 0, 0, jnp.inf).astype(x.dtype)
            made["below"] = jnp.sum(jnp.where(kept, q * below, impossible), 1)
            made["mass"] = jnp.sum(jnp.where(kept, q, 0), 1)
        if wanted.spread:
            made["spread"] = jnp.sum(below, 1)
            made["kept_count"] = jnp.sum(kept, 1, dtype=jnp.int32).astype(x.dtype)
    if wanted.top:
        made["top"], places = block_top_k(x, min(wanted.top, x.shape[1]), plan)
        made["top_class"] = start + places
    return PartialStatistics(*(a[:, 0] for a in part), **made)


def exp_part(peak: Array, rest: Array) -> tuple[Array, Array]:
    """max x and Σ e^u − 1 of `exp_sums` as a part of a row has them: −∞ and −1 if it has no class."""
    empty = is_empty(rest)
    return jnp.where(empty, -jnp.inf, peak), jnp.where(empty, -1, rest)


def merge(a: PartialStatistics, b: PartialStatistics, plan: Plan | None = None) -> PartialStatistics:
    """Two parts of a row merged, relative to the higher peak. No digit of a small sum is lost  (MATH 11.2)."""
    peak = jnp.maximum(a.peak, b.peak)
    falls = [jnp.where(part.peak == peak, 0, peak - part.peak) for part in (a, b)]

    def moved(part: PartialStatistics, fall: Array) -> Array:
        return (1 + part.rest) * jnp.exp(-fall)

    rest = jnp.where(a.peak >= b.peak, a.rest + moved(b, falls[1]), b.rest + moved(a, falls[0]))

    def total(f: Any) -> Array:
        return f(a, falls[0]) + f(b, falls[1])

    made: dict[str, Any] = {}
    if a.gap is not None:
        made["gap"] = total(_moved_gap)
    if a.label is not None:
        made["label"] = jnp.maximum(a.label, b.label)
    if a.below is not None:
        made["below"] = total(lambda part, fall: _moved_sum(part.below, part.mass, fall))
        made["mass"] = total(lambda part, _: part.mass)
    if a.spread is not None:
        made["spread"] = total(lambda part, fall: _moved_sum(part.spread, part.kept_count, fall))
        made["kept_count"] = total(lambda part, _: part.kept_count)
    if a.top is not None:
        made["top"], made["top_class"] = top_of_parts((a.top, b.top), (a.top_class, b.top_class), plan)
    return PartialStatistics(peak, rest, **made)


def _moved_gap(part: Any, fall: Array) -> Array:
    return jnp.exp(-fall) * (part.gap + (1 + part.rest) * jnp.minimum(fall, FAR))


def _moved_sum(total: Any, weight: Any, fall: Array) -> Array:
    """Σ q (−u) relative to a peak that is higher by `fall`. weight: Σ q."""
    return total + jnp.where(weight == 0, 0, weight * fall)


def merge_shards(part: PartialStatistics, head: Head, plan: Plan) -> PartialStatistics:
    """The parts of all shards merged, by one maximum for the peak and one sum for everything else  (MATH 13.1)."""
    if plan.axis_name is None:
        return part
    peak = pmax(part.peak, plan.axis_name)
    falls = jnp.where(part.peak == peak, 0, peak - part.peak)
    has_peak = (part.peak == peak) & (peak > -jnp.inf)
    moved = (1 + part.rest) * jnp.exp(-falls)
    made: dict[str, Any] = {
        "rest": jnp.where(has_peak, part.rest, moved),  # so no digit of a small sum is lost beside a 1
        "ones": has_peak.astype(peak.dtype),
    }
    if part.gap is not None:
        made["gap"] = _moved_gap(part, falls)
    if part.label is not None:
        made["label"] = jnp.where(local_label(head.labels, head.weight.shape[0], plan.axis_name)[1], part.label, 0)
    if part.below is not None:
        made |= {"below": _moved_sum(part.below, part.mass, falls), "mass": part.mass}
    if part.spread is not None:
        made |= {"spread": _moved_sum(part.spread, part.kept_count, falls), "kept_count": part.kept_count}
    if part.top is not None:
        made["top"], made["top_class"] = (
            shard_slot(a, plan.shards, plan.axis_name) for a in (part.top, part.top_class)
        )
    made = psum(made, plan.axis_name)
    if part.top is not None:
        made["top"], made["top_class"] = top_with_classes(made["top"], made["top_class"], part.top.shape[1], plan)
    made["rest"] = made["rest"] + (made.pop("ones") - 1)
    # the maximum over devices may have dropped a NaN
    return PartialStatistics(jnp.where(jnp.isnan(made["rest"]) & ~jnp.isposinf(peak), jnp.nan, peak), **made)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def statistics(head: Head, wanted: Extras, plan: Plan) -> Statistics:
    """One pass over the classes: the statistics of each block, relative to its own peak, are merged."""

    def step(
        blocks: Heads, _: Heads, *, start: Array, known: None, state: PartialStatistics, plan: Plan
    ) -> PartialStatistics:
        (block,) = blocks
        return merge(state, block_statistics(block, wanted, start, block_scores(block, start, plan), plan), plan)

    def loop(head: Head) -> PartialStatistics:
        # with further sums, XLA would make more kernels of a state in one array, not fewer
        pack_state = wanted == Extras()
        return scan_classes(step, (head,), (Head(),), None, initial(head, wanted), plan, pack_state=pack_state)

    if plan.kernel:
        from jsoftmax.heads import _kernel  # noqa: PLC0415  (it imports this module, and Pallas, in half a second)

        running = _kernel.partial_statistics(head, wanted, plan, loop)
    else:
        running = loop(head)
    return finish(merge_shards(running, head, plan), wanted)


def finish(done: PartialStatistics, wanted: Extras) -> Statistics:
    """The statistics that follow from the merged blocks."""
    empty = jnp.isneginf(done.peak)
    peak = lax.stop_gradient(jnp.where(empty, 0, done.peak))
    rest = jnp.where(empty, 0, done.rest)
    log_total = jnp.log1p(rest)
    infinite = jnp.where(empty, -jnp.inf, jnp.inf).astype(peak.dtype)
    known = ((peak < jnp.inf) & ~jnp.isnan(rest))[:, None]  # a maximum may have dropped a NaN
    loss = None
    if done.label is not None and not wanted.others:
        loss = not_negative(log_total[:, None] - difference(done.label, peak[:, None]))
    elif done.below is not None:
        loss = not_negative(done.mass * log_total + done.below)[:, None]
    return Statistics(
        peak,
        log_total,
        jnp.where(empty | jnp.isposinf(peak), infinite, peak + log_total),
        None if done.gap is None else done.gap / (1 + rest),
        loss,
        done.label if wanted.others else None,
        done.mass,
        done.spread,
        done.kept_count,
        None if done.top is None else -difference(done.top, peak[:, None]),
        None if done.top is None else jnp.where((done.top > -jnp.inf) & known, done.top_class, -1),
    )


@functools.partial(statistics.defjvp, symbolic_zeros=True)
def _statistics_jvp(wanted: Extras, plan: Plan, primals: Any, tangents: Any) -> tuple[Statistics, Statistics]:
    """L̇ = Σ p ẋ, (Σ p (−u))˙ = −Σ p (1 + u + gap) ẋ, (−l_y)˙ = Σ p ẋ − ẋ_y, (Σ q (−l))˙ = Σ (Q p − q) ẋ − Σ q̇ l
    (MATH 11.3)."""
    (head,), dots = primals, without_zeros(tangents[0])
    out = statistics(head, wanted, plan)

    own = match_varying_axes(out, head.weight, plan.axis_name)
    known = TokenConstants.of(own)
    zero = jnp.zeros_like(out.peak)
    zeros = jax.tree.map(jnp.zeros_like, Rates(*[getattr(own, name) for name in Rates._fields]))

    rates = psum(rates_along(head, dots, known, zeros, plan), plan.axis_name)
    return out, Statistics(
        zero,
        rates.log_total,
        rates.log_total,
        rates.gap,
        rates.loss,
        rates.label,
        rates.mass,
        rates.spread,
        None if out.kept_count is None else zero,
        rates.top,
        None if out.top_class is None else zero_from_primal(out.top_class, symbolic_zeros=True),
    )


def rates_along(head: Head, dots: Head, known: "TokenConstants", zeros: "Rates", plan: Plan) -> "Rates":
    """The rates along the tangents, for the fields that `zeros` has, summed over the classes of this shard."""

    def step(blocks: Heads, dots: Heads, *, start: Array, known: TokenConstants, state: Rates, plan: Plan) -> Rates:
        (block,), (block_dots,) = blocks, dots
        x, x_dot = jvp_of_live(lambda block: block_scores(block, start, plan), block, block_dots)
        return jax.tree.map(jnp.add, state, block_rates(block, block_dots, start, known, state, x, x_dot))

    return scan_classes(step, (head,), (dots,), known, zeros, plan)


class TokenConstants(NamedTuple):
    """Numbers of each token that the rule takes from the value."""

    peak: Array
    log_total: Array
    gap: Any = None
    at_label: Any = None
    """p_y − 1."""
    top_class: Any = None
    mass: Any = None
    """Σ q."""

    @staticmethod
    def of(found: Statistics) -> "TokenConstants":
        at_label = None if found.loss is None else expm1(-found.loss)
        return TokenConstants(found.peak, found.log_total, found.gap, at_label, found.top_class, found.mass)


class Rates(NamedTuple):
    """Derivatives of the fields of `Statistics` for each token; None as there."""

    log_total: Any = None
    gap: Any = None
    loss: Any = None
    label: Any = None
    mass: Any = None
    spread: Any = None
    top: Any = None


def block_rates(  # noqa: PLR0917  (a partial function of ẋ, which comes last, is transposed)
    block: Head, dots: Head, start: Array, known: TokenConstants, like: Rates, x: Array, x_dot: Array
) -> Rates:
    """A block's terms of the rule, for the fields that `like` has. They are linear in ẋ and in the targets' tangent."""
    made: dict[str, Any] = {}
    if like.label is not None:
        made["label"] = _rate_at(block.labels, start, x_dot)
        x = without_labels(x, block.labels, start)
    u = difference(x, known.peak[:, None])
    log_p = u - known.log_total[:, None]
    p = jnp.exp(log_p)

    def total(a: Array) -> Array:
        return jnp.sum(a, 1)

    if like.log_total is not None:
        made["log_total"] = total(p * x_dot)
    if like.gap is not None:
        c = jnp.where(p == 0, 0, u) + known.gap[:, None]
        made["gap"] = -total(p * (1 + c) * x_dot)
    if like.spread is not None:
        made["spread"] = -total(jnp.where(jnp.isneginf(x), 0, x_dot))
    if like.loss is not None and block.labels is not None:
        at_label = known.at_label
        if block.labels.shape[1] == 1:
            rate = total(jnp.where(is_label(x.shape, block.labels, start=start), at_label, p) * x_dot)
            made["loss"] = rate[:, None]
        else:
            # Σ p ẋ leaves out the class with p > ¾, which is added where it is not the label: so p_y − 1 keeps its
            # digits
            sure, at = p > SURE, _rate_at(block.labels, start, x_dot)
            of_sure = total(jnp.where(sure, p * x_dot, 0))[:, None]
            of_label = jnp.where(at_label > _SURE_LABEL - 1, at_label * at, of_sure - at)
            made["loss"] = total(jnp.where(sure, 0, p * x_dot))[:, None] + of_label
    elif like.loss is not None:
        kept = ~jnp.isneginf(x)
        q = jnp.where(kept, block.targets, 0)
        excess = jnp.where(p > 0.5, expm1(log_p) + (1 - q), p - q)  # p − 1 keeps its digits
        made["loss"] = total((excess + (known.mass[:, None] - 1) * p) * x_dot)[:, None]
        if dots.targets is not None:
            made["loss"] = made["loss"] - total(jnp.where(kept, log_p, 0) * dots.targets)[:, None]
            made["mass"] = total(jnp.where(kept, dots.targets, 0))
    if like.mass is not None:
        made.setdefault("mass", jnp.zeros_like(like.mass))
    if like.top is not None:
        made["top"] = -_rate_at(known.top_class, start, x_dot)
    return Rates(**made)


def _rate_at(classes: Array, start: Array, x_dot: Array) -> Array:
    """ẋ of classes `[N, m]` that are in this block; 0 for the others."""
    place, inside = place_in_block(classes, start, x_dot.shape[1])
    return jnp.where(inside, jnp.take_along_axis(x_dot, place, 1), 0)


_SURE_LABEL = 0.8
"""A p_y above this is above SURE, too, however it is rounded."""
