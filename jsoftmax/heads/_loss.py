"""The loss of each token, from what a pass over the vocabulary has found (MATH 11.4, 7.8)."""

from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax import maps
from jsoftmax.checks.labels import in_range
from jsoftmax.checks.top_targets import TopTargets, mass_is_in_range
from jsoftmax.heads._check import CheckedHead, is_valid
from jsoftmax.heads._head import Head, Plan, vocabulary
from jsoftmax.heads._statistics import Statistics
from jsoftmax.losses._cross_entropy import expected, minus_log_p, regularized
from jsoftmax.losses._top import combine
from jsoftmax.sharding import keeps_label, psum


def token_losses(
    head: Head, plan: Plan, found: Statistics, smoothing: Array | None = None, z_loss: Array | None = None
) -> Array:
    """(1 − a) (−l_y) + (a/K) Σ (−l) + z_loss L² `[N, m]`; with q, Σ q (−l) replaces −l_y, `[N, 1]`  (MATH 11.4).

    A label on a class that the mask or its token leaves out has loss 0; one out of range has NaN, with derivatives 0.
    """
    loss: Any = found.loss
    if head.labels is not None and head.where is not None:
        loss = jnp.where(_keeps(head, plan, head.labels), loss, 0)
    if head.labels is not None and head.banned is not None:
        banned = head.banned[:, None].astype(head.labels.dtype)
        loss = jnp.where(jnp.any(head.labels[:, :, None] == banned, -1), 0, loss)
    mean = None
    if smoothing is not None:
        mean = (found.log_total + found.spread / jnp.maximum(found.kept_count, 1))[:, None]
    return mark_out_of_range(regularized(loss, mean, found.log_normalizer[:, None], smoothing, z_loss), head, plan)


def top_target_losses(given: CheckedHead, found: Statistics, z_loss: Array | None) -> Array:
    """Σ q (−l) + z_loss L² over the k classes of `TopTargets` and the rest  (MATH 7.8). A token has NaN, with
    derivatives 0, if a class that is out of range has mass. A token that is left out has 0."""
    head, plan, top = given.head, given.plan, cast("TopTargets", given.top)
    label, valid = in_range(top.indices, vocabulary(head, plan))
    kept, count = valid, vocabulary(head, plan)
    if head.where is not None:
        kept, count = valid & _keeps(head, plan, label), psum(jnp.sum(head.where, dtype=jnp.int32), plan.axis_name)
    x, q = combine(top, given.restore(found.label), kept, given.restore(found.log_normalizer)[..., None], count)
    loss, L = expected(q, x, minus_log_p(x)), maps.log_sum(x, (x.ndim - 1,))
    loss = jnp.where(mass_is_in_range(top, valid), regularized(loss, None, L, None, z_loss), jnp.nan)[..., 0]
    return loss if given.rows is None else jnp.where(given.rows.reshape(loss.shape), loss, 0)


def _keeps(head: Head, plan: Plan, labels: Array) -> Array:
    return keeps_label(lambda own: head.where[own], labels, head.weight.shape[0], plan.axis_name)


def mark_out_of_range(a: Array, head: Head, plan: Plan) -> Array:
    """a, which has one number for each label, with NaN, and derivatives 0, for labels out of range."""
    return a if head.labels is None else jnp.where(is_valid(head, plan), a, jnp.nan)
