"""Log-probabilities and the entropy of an adaptive softmax (MATH 12.5)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from jsoftmax import maps, sums
from jsoftmax.checks.arguments import check_where, public
from jsoftmax.checks.labels import check_ignore_label, in_range
from jsoftmax.checks.matrices import check_row_labels
from jsoftmax.entropy import centred_log_p, shannon
from jsoftmax.heads.adaptive import _blocks
from jsoftmax.heads.adaptive._params import AdaptiveParams
from jsoftmax.heads.adaptive._rows import check, class_axis, common_dtype, head_scores, map_blocks, tail_scores
from jsoftmax.heads.adaptive._streamed import Rows, streamed_loss
from jsoftmax.losses._terms import negative_log_p
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp


@functools.partial(jax.jit, static_argnames="dtype")
def row_log_prob(  # noqa: PLR0917  (as its caller has them)
    params: AdaptiveParams, phi: Phi, hidden: Array, labels: Array, where: Array | None, dtype: Any
) -> Array:
    """log p of the labels `[rows]`. dtype: that of the factors of products on GPUs and TPUs."""
    *starts, classes = params.cutoffs
    if where is not None:  # rows left out may hold anything
        hidden, labels = sums.zero_where(~where[:, None], hidden), jnp.where(where, labels, 0)
    known, valid = in_range(labels, classes)
    kept = valid if where is None else valid & where
    cluster = sum(((labels >= start).astype(jnp.int32) for start in starts), jnp.zeros(labels.shape, jnp.int32))
    known = known.astype(jnp.int32)
    in_tail = kept & (cluster > 0)
    tail = jnp.maximum(cluster - 1, 0)
    column = jnp.where(in_tail, params.cutoffs[0] + tail, jnp.where(valid & (cluster == 0), known, 0))
    inside = known - jnp.asarray(starts, jnp.int32)[tail] if starts else known
    rows = Rows(column, jnp.where(in_tail, tail, len(params.tails)), jnp.where(in_tail, inside, 0))
    elsewhere = functools.partial(streamed_loss, dtype=dtype)
    loss = lax.platform_dependent(params, phi, hidden, rows, cpu=_loss_in_blocks, default=elsewhere)
    log_prob = jnp.where(valid, -loss, jnp.nan)
    return log_prob if where is None else jnp.where(where, log_prob, 0)


def _loss_in_blocks(params: AdaptiveParams, phi: Phi, hidden: Array, rows: Rows) -> Array:
    """−l_y `[rows]`. Each block has rows of one tail only."""
    count = len(params.tails)
    loss = negative_log_p(head_scores(params, phi, hidden), rows.column[:, None])[:, 0]
    if count and loss.size:
        layout = _blocks.lay_out(rows.tail, count, _blocks.block_length(loss.size))
        inside = jnp.where(layout.taken, rows.inside[layout.row], 0)
        of_blocks = sums.zero_where(~layout.taken[..., None], hidden[layout.row])
        by_block = jnp.zeros(layout.row.shape, loss.dtype)
        for i, (projection, weight) in enumerate(params.tails):
            active = layout.group == i
            a = _blocks.project(projection, of_blocks, active)
            by_block = by_block + _blocks.tail_loss(weight, phi, a, inside, active).loss
        loss = loss + jnp.where(rows.tail < count, jnp.where(layout.taken, by_block, 0).reshape(-1)[layout.place], 0)
    return loss


@public
def log_prob(
    params: AdaptiveParams,
    hidden: ArrayLike,
    labels: Integer[ArrayLike, "..."],
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    ignore_label: int | None = None,
) -> Float[Array, "..."]:
    """Log-probability of labels under an adaptive softmax: the negative loss, in time that depends on the labels.

    l_y = l^head_y for a frequent class;   l_y = l^head_{tail i} + l^{tail i}_y otherwise,
    each l of its own softmax of ψ(scores)     (MATH 12.5)

    Rows are sorted by tail into blocks, and the classes of a tail are multiplied with its own blocks only. No row is
    dropped, whatever the labels are, and empty blocks cost almost nothing, in the derivatives too. GPUs and TPUs use a
    few large kernels: a tail without rows costs nothing, a tail with at most a quarter of the rows computes a quarter
    of them, and any other tail computes all rows. Under jax.vmap nothing is skipped: give batches leading axes
    instead.

    Args:
      params: as `init` makes them; differentiable.
      hidden: h `[..., d]`, floating; differentiable.
      labels: integers `[...]`, classes sorted by frequency, the most frequent is 0.
      where: bool, broadcastable to the labels; False leaves a row out, whose result is 0 and which may hold anything.
      phi: the positive map φ of every score.
      ignore_label: rows with that label are left out too.
    Returns: `[...]` ≤ 0, in the common dtype of `hidden` and the head, but float32 for narrower ones. Log-probabilities
      near 0 keep their digits, as in `jsoftmax.losses.cross_entropy`. If the weights are narrower than float32, then on
      GPUs and TPUs the products have factors in that dtype, and the projected vectors are rounded to it. A label out
      of range: NaN, with derivatives 0. A score of +inf or NaN in the head, or in the label's tail: NaN in that row
      alone.
    Raises: TypeError or ValueError for `params`, shapes or dtypes that do not fit.
    Source: Grave, Joulin, Cissé, Grangier, Jégou 2017, section 4.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> log_prob(params, jnp.ones((3, 64)), jnp.array([7, 250, 999])).shape
    (3,)
    """
    function = "log_prob"
    given, h, shape = check(function, params, hidden, phi)
    y = check_row_labels(function, labels, shape)
    mask = check_where(function, where, shape, "the labels' shape")
    check_ignore_label(function, ignore_label, "mask their rows by where=….")
    if ignore_label is not None:
        mask = y != ignore_label if mask is None else mask & (y != ignore_label)
    mask = None if mask is None else jnp.broadcast_to(mask, shape).reshape(-1)
    return row_log_prob(given, phi, h, y.reshape(-1), mask, common_dtype(params, hidden)).reshape(shape)


@jax.jit
def _log_probs(params: AdaptiveParams, phi: Phi, hidden: Array) -> Array:
    x = head_scores(params, phi, hidden)
    head, first = maps.log_p(x, class_axis(x)), params.cutoffs[0]
    parts = [head[:, :first]]
    for i, tail in enumerate(params.tails):
        x = tail_scores(tail, phi, hidden)
        parts.append(head[:, first + i, None] + maps.log_p(x, class_axis(x)))
    return jnp.concatenate(parts, -1)


@public
def log_probs(params: AdaptiveParams, hidden: ArrayLike, *, phi: Phi = exp) -> Float[Array, "..."]:
    """Log-probabilities of all classes, in O(V) time and memory for each row.

    l of `log_prob` for every y     (MATH 12.5)

    Args:
      params, hidden, phi: as in `log_prob`.
    Returns: `[..., V]`, whose exponentials sum to 1; dtype and edges as in `log_prob`.
    Raises: as `log_prob`.
    Source: Grave et al. 2017.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> jnp.exp(log_probs(params, jnp.ones(64))).sum().round(4)
    Array(1., dtype=float32)
    """
    given, h, shape = check("log_probs", params, hidden, phi)
    return _log_probs(given, phi, h).reshape(*shape, given.cutoffs[-1])


@jax.jit
def _entropy(params: AdaptiveParams, phi: Phi, hidden: Array) -> Array:
    def block(h: Array) -> Array:
        x = head_scores(params, phi, h)
        H = centred_log_p(x, class_axis(x))[1][:, 0]  # computed from the same sums as p
        p = normalize(x, class_axis(x)).p[:, params.cutoffs[0] :]
        for i, tail in enumerate(params.tails):
            x = tail_scores(tail, phi, h)
            H = H + p[:, i] * shannon(x, class_axis(x))[:, 0]
        return H

    return map_blocks(block, hidden)


@public
def entropy(params: AdaptiveParams, hidden: ArrayLike, *, phi: Phi = exp) -> Float[Array, "..."]:
    """Entropy of the distribution over all classes, in nats, without an array of all probabilities.

    H = H(head) + Σ_i p^head_{tail i} H(tail i)     (MATH 12.5)

    Args:
      params, hidden, phi: as in `log_prob`. Differentiable.
    Returns: `[...]` in [0, log V], dtype as in `log_prob`. It is a sum of terms that are not negative, so small
      entropies keep their digits. Each row takes O(V) time. A score of +inf or NaN: NaN in that row alone.
    Raises: as `log_prob`.
    Source: Shannon 1948 (the chain rule of entropy).

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> bool(entropy(params, jnp.ones(64)) < jnp.log(1000))
    True
    """
    given, h, shape = check("entropy", params, hidden, phi)
    return _entropy(given, phi, h).reshape(shape)
