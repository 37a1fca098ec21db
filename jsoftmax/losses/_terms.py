"""−l_y, the mean of −l, and L: what losses of labels are made of, with their one derivative rule (MATH 7.1, 7.2)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax import sums
from jsoftmax._rules import compiled_rule
from jsoftmax._series import expm1
from jsoftmax.checks.arguments import read
from jsoftmax.maps import normalize
from jsoftmax.sharding import AxisName, is_label, local_value_at_label, pick, psum
from jsoftmax.sums import class_sum, difference, is_empty, not_negative


class Terms(NamedTuple):
    """The parts of a loss of labels. Each keeps the class axis with length 1."""

    label: Array
    """−l_y."""
    log_normalizer: Array
    """L."""
    mean: Array | None
    """The mean of −l over the classes that are kept, 0 if there are none; None where it is not wanted."""


@compiled_rule("axis_name", "mean", "order")
def terms(x: Array, label: Array, axis_name: AxisName = None, mean: bool = False, order: int = 0) -> Terms:
    """−l_y, L and, if wanted, the mean of −l over the last axis of `x`, for labels `[..., 1]` in [0, K).

    −l_y = log1p(rest) + (max x − x_y), and the mean of such terms: none of them is negative  (MATH 7.1, 7.2).
    """
    by_label = functools.partial(_terms_by_label, axis_name=axis_name, mean=mean, order=order)
    if axis_name is not None or not sums.is_read_once(x, (x.ndim - 1,)):
        return by_label(x, label)
    by_class = functools.partial(_terms_by_class, mean=mean)
    return sums.by_platform(x, label, on_gpus=by_class, otherwise=by_label)


def _terms_by_label(x: Array, label: Array, axis_name: AxisName, mean: bool, order: int) -> Terms:
    """`terms` from the maximum, the sum, and the label's score, which is picked out of the row."""
    axis = (x.ndim - 1,)
    share = local_value_at_label(lambda own: pick(x, own), label, x.shape[-1], axis_name)
    peak, rest, x_y = sums.exp_sums(x, axis, axis_name, order, read(share))
    x = read(x)
    log_total = jnp.log1p(rest)
    return Terms(
        not_negative(log_total - difference(x_y, peak)),
        jnp.where(is_empty(rest), -jnp.inf, jnp.where(peak == jnp.inf, peak, peak + log_total)),
        not_negative(log_total - mean_of_kept(difference(x, peak), x, axis_name)) if mean else None,
    )


def _terms_by_class(x: Array, label: Array, mean: bool) -> Terms:
    """`terms` from −l of every class, by sums over the classes. On a GPU this is one kernel, which reads a row once."""
    axis = (x.ndim - 1,)
    out = sums.normalized(x, axis)
    n, x = not_negative(-out.log_p), read(x)
    at_label = jnp.where(is_label(x.shape, label), n, 0)
    return Terms(class_sum(at_label, axis), out.log_normalizer, mean_of_kept(n, x, None) if mean else None)


@terms.defjvp
def _terms_jvp(axis_name: AxisName, mean: bool, order: int, primals: Any, tangents: Any) -> tuple[Terms, Terms]:
    """Σ p ẋ − ẋ_y, with the coefficient expm1(l_y) at the label; Σ p ẋ; and Σ p ẋ − (1/K) Σ ẋ  (MATH 7.1, 7.2)."""
    (x, label), (x_dot, _) = primals, tangents
    following = sums.next_order(x, order, axis_name)
    out = terms(x, label, axis_name, mean, following)
    p = normalize(x, (x.ndim - 1,), axis_name, "loss", following).p
    kept = ~jnp.isneginf(x) if mean else None
    along: Any = functools.partial(_terms_rate, axis_name, axis_name is not None and order > 0)
    given: Any = p, kept, out.label, label, x_dot
    if axis_name is None and sums.is_read_in_parts(x, (x.ndim - 1,)):
        given = *given, x
    if axis_name is None and not order and sums.is_read_once(x, (x.ndim - 1,)):
        along, given = functools.partial(_terms_rate_of_many, along), (x, *given)
    return out, jax.checkpoint(along, prevent_cse=False)(*given)


def _terms_rate_of_many(along: Callable[..., Terms], x: Array, *given: Any) -> Terms:
    """`_terms_rate`, for GPUs from x alone. From a copy they compute p and −l_y again, in one kernel with the
    derivative; from x itself XLA would write the maximum for both, and read x three times."""

    def again(x: Array, *given: Any) -> Terms:
        _, kept, _, label, x_dot = given
        x = sums.distinct_copy(x)
        n, p = negative_log_p(x, label, order=1), normalize(x, (x.ndim - 1,), None, "p", 1).p
        return along(p, None if kept is None else ~jnp.isneginf(x), n, label, x_dot)

    return sums.by_platform(x, *given, on_gpus=again, otherwise=lambda _, *given: along(*given))


def _terms_rate(  # noqa: PLR0917  (what `jax.checkpoint` keeps has no keywords)
    axis_name: AxisName,
    of_sharded: bool,
    p: Array,
    kept: Array | None,
    n: Array,
    label: Array,
    x_dot: Array,
    x: Array | None = None,
) -> Terms:
    """The rule of `terms`, linear in ẋ. of_sharded: p_y is read from p, since −l_y would take one more exchange.

    The caller checkpoints it, and so keeps only p, a mask if the mean is wanted, and one number for each row; of many
    scores, x too.
    """
    p_y, at_label = jnp.exp(-n), expm1(-n)
    if of_sharded:
        p_y = local_value_at_label(lambda own: pick(p, own), label, p.shape[-1], axis_name)
        at_label = p_y - 1
    rates = sums.label_rates(p, kept, p_y, at_label, x_dot, label, axis_name, x)
    count = None if kept is None else _count(kept, p.dtype)
    (label_rate, L_dot, of_kept), count = psum((rates, count), axis_name)
    return Terms(label_rate, L_dot, None if kept is None else L_dot - of_kept / jnp.maximum(count, 1))


def negative_log_p(x: Array, label: Array, axis_name: AxisName = None, order: int = 0) -> Array:
    """−l_y over the last axis of `x`, for labels `[..., 1]` in [0, K)."""
    return terms(x, label, axis_name, order=order).label


def mean_of_kept(a: Array, x: Array, axis_name: AxisName) -> Array:
    """The mean of a over the classes with x > −∞, 0 if there are none."""
    kept, axis = ~jnp.isneginf(x), (x.ndim - 1,)
    total, count = psum((class_sum(jnp.where(kept, a, 0), axis), _count(kept, a.dtype)), axis_name)
    return total / jnp.maximum(count, 1)


def _count(kept: Array, dtype: Any) -> Array:
    if kept.shape[-1] and kept.shape[-1] % 32 == 0:
        kept = jnp.sum(kept.reshape(*kept.shape[:-1], -1, 32), -1)
    return jnp.sum(kept, -1, keepdims=True).astype(dtype)
