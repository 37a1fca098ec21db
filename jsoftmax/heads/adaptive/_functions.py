"""What an adaptive softmax is asked for: log-probabilities, the mode, the entropy (MATH 12.5)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from jsoftmax import maps
from jsoftmax._loops import cut
from jsoftmax._precision import precise
from jsoftmax.checks.arguments import accumulation_dtype, as_floating, check_where, public
from jsoftmax.checks.labels import check_ignore_label, in_range
from jsoftmax.checks.matrices import check_row_labels
from jsoftmax.entropy import centred_log_p, shannon
from jsoftmax.heads.adaptive import _blocks
from jsoftmax.heads.adaptive._params import AdaptiveParams, Tail, check_params
from jsoftmax.heads.adaptive._streamed import Rows, streamed_loss
from jsoftmax.losses._cross_entropy import negative_log_p
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp, log_phi


def _check(function: str, params: Any, hidden: Any, phi: Any) -> tuple[AdaptiveParams, Array, tuple[int, ...]]:
    """The weights and hidden vectors `[rows, d]` in the accumulation dtype, and the shape of the rows.

    The tails' own weights keep their dtype, and are widened chunk by chunk.
    """
    maps.check_phi(function, phi)
    params = check_params(function, params)
    h = as_floating(function, "hidden", hidden, "Convert it: hidden.astype(float).")
    d = params.head.shape[1]
    if not h.ndim or h.shape[-1] != d:
        raise ValueError(
            f"{function}: hidden must have {d} numbers along its last axis, as the head has; got shape {h.shape}. "
            "Transpose it, or make weights of that d."
        )
    dtype = accumulation_dtype(functools.reduce(jnp.promote_types, [h.dtype, params.head.dtype]))
    tails = tuple(Tail(tail.projection.astype(dtype), tail.weight) for tail in params.tails)
    bias = None if params.bias is None else params.bias.astype(dtype)
    return AdaptiveParams(params.head.astype(dtype), bias, tails), h.reshape(-1, d).astype(dtype), h.shape[:-1]


def _dtype(params: AdaptiveParams, hidden: Any) -> Any:
    """The widest of the factors' dtypes."""
    return functools.reduce(jnp.promote_types, [jnp.asarray(a).dtype for a in jax.tree.leaves((params, hidden))])


def _head_scores(params: AdaptiveParams, phi: Phi, hidden: Array) -> Array:
    """x = ψ of the frequent classes, then of the tails."""
    o = precise(hidden, params.head.T)
    return log_phi(phi, o if params.bias is None else o + params.bias)


def _tail_scores(tail: Tail, phi: Phi, hidden: Array) -> Array:
    """x = ψ of a tail's classes."""
    a = precise(hidden, tail.projection.T)
    return log_phi(phi, precise(a, tail.weight.astype(a.dtype).T))


def _last(x: Array) -> tuple[int, ...]:
    return (x.ndim - 1,)


@functools.partial(jax.jit, static_argnames="dtype")
def _log_prob(  # noqa: PLR0917  (as its caller has them)
    params: AdaptiveParams, phi: Phi, hidden: Array, labels: Array, where: Array | None, dtype: Any
) -> Array:
    """`[rows]`; products on GPUs and TPUs are of factors in the dtype."""
    *starts, classes = params.cutoffs
    if where is not None:  # rows left out may hold anything
        hidden, labels = maps.zero_where(~where[:, None], hidden), jnp.where(where, labels, 0)
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
    """−l_y `[rows]`; the rows of each tail in blocks of their own."""
    count = len(params.tails)
    loss = negative_log_p(_head_scores(params, phi, hidden), rows.column[:, None])[:, 0]
    if count and loss.size:
        layout = _blocks.lay_out(rows.tail, count, _blocks.block_length(loss.size))
        inside = jnp.where(layout.taken, rows.inside[layout.row], 0)
        of_blocks = maps.zero_where(~layout.taken[..., None], hidden[layout.row])
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
    """Log-probability of labels under an adaptive softmax: the negative loss, in time that follows the labels.

    l_y = l^head_y for a frequent class;   l_y = l^head_{tail i} + l^{tail i}_y otherwise,
    each l of its own softmax of ψ(scores)     (MATH 12.5)

    Rows are sorted by tail into blocks, and a tail's classes are multiplied with its own blocks only: no row is dropped
    whatever the labels are, and blocks that are empty cost next to nothing, in the derivatives too. On GPUs and TPUs a
    tail without rows costs nothing, one with at most a quarter of them that quarter, and another all rows, in a few
    large kernels. Under jax.vmap that is lost: give batches leading axes instead.

    Args:
      params: as `init` makes them; differentiable.
      hidden: h `[..., d]`, floating; differentiable.
      labels: integers `[...]`, classes sorted by frequency, the most frequent is 0.
      where: bool, broadcastable to the labels; False leaves a row out, whose result is 0 and which may hold anything.
      phi: the positive map φ of every score.
      ignore_label: rows with that label are left out too.
    Returns: `[...]` ≤ 0, in the common dtype of `hidden` and the head, but float32 for narrower ones; log-probabilities
      near 0 keep their digits, as in `jsoftmax.losses.cross_entropy`; of narrower weights on GPUs and TPUs those of
      products in their dtype, the projected vectors rounded to it. A label out of range: NaN, with derivatives 0.
      A score of +inf or NaN in the head, or in the label's tail: NaN in that row alone.
    Raises: TypeError or ValueError for `params`, shapes or dtypes that do not fit.
    Source: Grave, Joulin, Cissé, Grangier, Jégou 2017, section 4.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> log_prob(params, jnp.ones((3, 64)), jnp.array([7, 250, 999])).shape
    (3,)
    """
    function = "log_prob"
    given, h, shape = _check(function, params, hidden, phi)
    y = check_row_labels(function, labels, shape)
    mask = check_where(function, where, shape, "the labels' shape")
    check_ignore_label(function, ignore_label, "mask their rows: where=….")
    if ignore_label is not None:
        mask = y != ignore_label if mask is None else mask & (y != ignore_label)
    mask = None if mask is None else jnp.broadcast_to(mask, shape).reshape(-1)
    return _log_prob(given, phi, h, y.reshape(-1), mask, _dtype(params, hidden)).reshape(shape)


@jax.jit
def _log_probs(params: AdaptiveParams, phi: Phi, hidden: Array) -> Array:
    x = _head_scores(params, phi, hidden)
    head, first = maps.log_p(x, _last(x)), params.cutoffs[0]
    parts = [head[:, :first]]
    for i, tail in enumerate(params.tails):
        x = _tail_scores(tail, phi, hidden)
        parts.append(head[:, first + i, None] + maps.log_p(x, _last(x)))
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
    given, h, shape = _check("log_probs", params, hidden, phi)
    return _log_probs(given, phi, h).reshape(*shape, given.cutoffs[-1])


def _in_blocks(f: Callable[[Array], Array], hidden: Array) -> Array:
    """f of blocks of rows one after the other: scores of all rows at once would not fit."""
    rows, length = hidden.shape[0], _blocks.block_length(hidden.shape[0])
    return lax.map(jax.checkpoint(f), cut(hidden, length)).reshape(-1)[:rows]


@jax.jit
def _predict(params: AdaptiveParams, phi: Phi, hidden: Array) -> Array:
    """The head decides where its largest l is a class; else the tails whose l is larger than any class's."""
    first = params.cutoffs[0]

    def block(h: Array) -> Array:
        x = _head_scores(params, phi, h)
        head = maps.log_p(x, _last(x))
        best, index = jnp.max(head[:, :first], -1), jnp.argmax(head[:, :first], -1).astype(jnp.int32)
        shortlist = best
        for i, tail in enumerate(params.tails):
            above = head[:, first + i]

            def search(best: Array, index: Array, i: int = i, tail: Tail = tail, above: Array = above) -> Any:
                x = _tail_scores(tail, phi, h)
                log_p = above[:, None] + maps.log_p(x, _last(x))
                top, at = jnp.max(log_p, -1), jnp.argmax(log_p, -1).astype(jnp.int32)
                better = ~(top <= best)  # a NaN is
                return jnp.where(better, top, best), jnp.where(better, params.cutoffs[i] + at, index)

            wanted = jnp.any(~(above <= shortlist))
            best, index = lax.cond(wanted, search, lambda best, index: (best, index), best, index)
        return jnp.where(jnp.isnan(best), -1, index)

    return _in_blocks(block, lax.stop_gradient(hidden))


@public
def predict(params: AdaptiveParams, hidden: ArrayLike, *, phi: Phi = exp) -> Integer[Array, "..."]:
    """The most probable class; a tail is searched only where it is more probable than every frequent class.

    arg max_y l_y;   l_y ≤ l^head_{tail i} for every class of tail i     (MATH 12.5)

    Args:
      params, hidden, phi: as in `log_prob`.
    Returns: int32 `[...]`, the lowest of classes that are equal. A row with a score of NaN or +inf, in what was
      searched: −1. No derivatives.
    Raises: as `log_prob`.
    Source: Grave et al. 2017; torch.nn.AdaptiveLogSoftmaxWithLoss.predict.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> h = jnp.ones((3, 64))
    >>> bool(jnp.all(predict(params, h) == jnp.argmax(log_probs(params, h), -1)))
    True
    """
    given, h, shape = _check("predict", params, hidden, phi)
    return _predict(jax.tree.map(lax.stop_gradient, given), phi, h).reshape(shape)


@jax.jit
def _entropy(params: AdaptiveParams, phi: Phi, hidden: Array) -> Array:
    def block(h: Array) -> Array:
        x = _head_scores(params, phi, h)
        H = centred_log_p(x, _last(x))[1][:, 0]  # of the sums that p is made of
        p = normalize(x, _last(x)).p[:, params.cutoffs[0] :]
        for i, tail in enumerate(params.tails):
            x = _tail_scores(tail, phi, h)
            H = H + p[:, i] * shannon(x, _last(x))[:, 0]
        return H

    return _in_blocks(block, hidden)


@public
def entropy(params: AdaptiveParams, hidden: ArrayLike, *, phi: Phi = exp) -> Float[Array, "..."]:
    """Entropy of the distribution over all classes, in nats, without an array of all their probabilities.

    H = H(head) + Σ_i p^head_{tail i} H(tail i)     (MATH 12.5)

    Args:
      params, hidden, phi: as in `log_prob`. Differentiable.
    Returns: `[...]` in [0, log V], dtype as in `log_prob`; a sum of terms that are not negative, so that small
      entropies keep their digits. O(V) time for each row. A score of +inf or NaN: NaN in that row alone.
    Raises: as `log_prob`.
    Source: Shannon 1948 (the chain rule of entropy).

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> bool(entropy(params, jnp.ones(64)) < jnp.log(1000))
    True
    """
    given, h, shape = _check("entropy", params, hidden, phi)
    return _entropy(given, phi, h).reshape(shape)
