"""The most probable classes of an adaptive softmax, and classes drawn from it (MATH 12.5)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Integer, PRNGKeyArray

from jsoftmax import maps
from jsoftmax._top_k import top_k as row_top_k
from jsoftmax.checks.arguments import check_flag, public
from jsoftmax.checks.sampling import check_count, check_key, check_shape
from jsoftmax.gumbel import _noise
from jsoftmax.gumbel._categorical import categorical as draw_of_scores
from jsoftmax.gumbel._categorical import check_distinct
from jsoftmax.gumbel._estimators import given_maximum
from jsoftmax.heads._top import block_top_k
from jsoftmax.heads.adaptive._functions import row_log_prob
from jsoftmax.heads.adaptive._params import AdaptiveParams, Tail
from jsoftmax.heads.adaptive._rows import (
    check,
    class_axis,
    common_dtype,
    head_scores,
    map_blocks,
    map_selected,
    tail_scores,
)
from jsoftmax.heads.selection import LinearTopK
from jsoftmax.phi import Phi, exp
from jsoftmax.sums import has_bad_score


def _keys(key: Any, number: Array) -> Array:
    """A key for each row, made from its number, so that its draws do not depend on other rows."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, number)


# --- the k largest l, or l + g -------------------------------------------------------------------------------


def _largest(a: Array, k: int) -> tuple[Array, Array]:
    """The k largest and their places. If there are fewer than k, −inf follows."""
    found = min(k, a.shape[1])
    best, at = block_top_k(a, found)
    return jnp.pad(best, [(0, 0), (0, k - found)], constant_values=-jnp.inf), jnp.pad(at, [(0, 0), (0, k - found)])


@functools.partial(jax.jit, static_argnames="k")
def _top_k(params: AdaptiveParams, phi: Phi, hidden: Array, key: Any, k: int) -> tuple[Array, Array]:
    """The k largest l of each row and their classes `[rows, k]`; with a key the k largest l + g  (MATH 12.5).

    A tail is searched only for the rows where its bound is above the k-th largest found so far. The bound is l^head of
    the tail; with noise it is l^head + g, which is the largest l + g of its classes. The places after all possible
    classes have −inf and −1. A row has NaN and −1 where a searched score is NaN or +inf.
    """
    first, count = params.cutoffs[0], len(params.tails)
    of_columns, *of_tails = [None] * (1 + count) if key is None else jax.random.split(key, 1 + count)
    numbers = jnp.arange(hidden.shape[0], dtype=jnp.int32)

    def of_head(h: Array, number: Array) -> tuple[Array, ...]:
        x = head_scores(params, phi, h)
        log_p = a = maps.log_p(x, class_axis(x))
        if key is not None:
            a = log_p + jax.vmap(lambda key: _noise.gumbel(key, log_p.shape[1:], log_p.dtype))(
                _keys(of_columns, number)
            )
        return *_largest(a[:, :first], k), log_p[:, first:], a[:, first:]

    best, index, log_p, bound = map_blocks(of_head, hidden, numbers)
    for i, (tail, of_classes) in enumerate(zip(params.tails, of_tails, strict=True)):

        def of_tail(  # noqa: PLR0917  (arguments with rows, then those without)
            h: Array, log_p: Array, bound: Array, number: Array, tail: Tail = tail, of_classes: Any = of_classes
        ) -> tuple[Array, Array]:
            x = tail_scores(tail, phi, h)
            a = log_p[:, None] + maps.log_p(x, class_axis(x))
            if of_classes is not None:
                a = jax.vmap(given_maximum)(_keys(of_classes, number), a, bound)
            return _largest(a, k)

        wanted = bound[:, i] > best[:, -1]
        found, at = map_selected(of_tail, wanted, hidden, log_p[:, i], bound[:, i], numbers)
        found = jnp.where(wanted[:, None], found, -jnp.inf)
        best, place = row_top_k(jnp.concatenate([best, found], 1), k)  # of equals, those of the head come first
        index = jnp.take_along_axis(jnp.concatenate([index, params.cutoffs[i] + at], 1), place, 1)
    bad = jnp.any(jnp.isnan(best), 1, keepdims=True) | jnp.any(jnp.isnan(bound), 1, keepdims=True)
    return jnp.where(bad, jnp.nan, best), jnp.where(bad | ~(best > -jnp.inf), -1, index)


@public
def top_k(params: AdaptiveParams, hidden: ArrayLike, k: int, *, phi: Phi = exp) -> LinearTopK:
    """The k most probable classes of each row and their log-probabilities, without an array of all of them.

    jax.lax.top_k(log_probs(params, hidden), k);   l_y ≤ l^head_{tail i} for every class of tail i     (MATH 12.5)

    The head is searched first. A tail is searched only for the rows where the tail as a whole is more probable than the
    k-th class found so far.

    Args:
      params, hidden, phi: as in `log_prob`.
      k: how many, an int in [1, V]; part of the compiled program.
    Returns: `jsoftmax.heads.LinearTopK(log_prob, indices)`, `[..., k]`, in descending order; equal classes keep their
      order. log_prob is differentiable and has the dtype of `log_prob`. If fewer than k classes are possible, the
      places after them have −inf and −1. A row with NaN or +inf among the searched scores: NaN and −1.
    Raises: as `log_prob`; TypeError or ValueError if k is no int in [1, V].
    Source: Grave et al. 2017.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> found = adaptive.top_k(params, jnp.ones((3, 64)), 5)
    >>> bool(jnp.all(found.indices == jax.lax.top_k(adaptive.log_probs(params, jnp.ones((3, 64))), 5)[1]))
    True
    """
    function = "top_k"
    given, h, shape = check(function, params, hidden, phi)
    k = check_count(function, k, given.cutoffs[-1])
    best, index = _top_k(given, phi, h, None, k)
    return LinearTopK(maps.constant_at_impossible(best).reshape(*shape, k), index.reshape(*shape, k))


@public
def predict(params: AdaptiveParams, hidden: ArrayLike, *, phi: Phi = exp) -> Integer[Array, "..."]:
    """The most probable class, the first of `top_k`; a tail is searched only where it may have it.

    arg max_y l_y;   l_y ≤ l^head_{tail i} for every class of tail i     (MATH 12.5)

    Args:
      params, hidden, phi: as in `log_prob`.
    Returns: int32 `[...]`; of equal classes the first. −1 for a row without classes, or with NaN or +inf among the
      searched scores. No derivatives.
    Raises: as `log_prob`.
    Source: Grave et al. 2017; torch.nn.AdaptiveLogSoftmaxWithLoss.predict.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> h = jnp.ones((3, 64))
    >>> bool(jnp.all(predict(params, h) == jnp.argmax(adaptive.log_probs(params, h), -1)))
    True
    """
    given, h, shape = check("predict", params, hidden, phi)
    return _top_k(*jax.tree.map(lax.stop_gradient, (given, phi, h)), None, 1)[1].reshape(shape)


# --- draws ---------------------------------------------------------------------------------------------------

_NONE, _BAD = -1, -2


def _draws(key: Any, number: Array, x: Array, count: int) -> Array:
    """`[rows, count]` classes; _NONE for a row without classes, _BAD for one with NaN or +inf."""
    bad = has_bad_score(x, class_axis(x))
    drawn = jax.vmap(lambda key, x: draw_of_scores(key, x, shape=(count,)))(_keys(key, number), x)
    return jnp.where(bad, _BAD, drawn)


@functools.partial(jax.jit, static_argnames=("count", "replace"))
def _draw(  # noqa: PLR0917  (as its caller has them)
    key: Any, params: AdaptiveParams, phi: Phi, hidden: Array, count: int, replace: bool
) -> Array:
    """`[rows, count]` classes: a column of the head, and if it stands for a tail, a class of the tail  (MATH 12.5)."""
    if not count:
        return jnp.zeros((hidden.shape[0], 0), jnp.int32)
    if not replace:
        best, index = _top_k(params, phi, hidden, key, count)
        return jnp.where(jnp.isnan(best), _BAD, index)
    of_head, *of_tails = jax.random.split(key, 1 + len(params.tails))
    numbers = jnp.arange(hidden.shape[0], dtype=jnp.int32)
    column = map_blocks(lambda h, n: _draws(of_head, n, head_scores(params, phi, h), count), hidden, numbers)
    drawn = column
    for i, (tail, of_tail) in enumerate(zip(params.tails, of_tails, strict=True)):

        def within(h: Array, number: Array, tail: Tail = tail, of_tail: Any = of_tail) -> Array:
            return _draws(of_tail, number, tail_scores(tail, phi, h), count)

        inside = column == params.cutoffs[0] + i
        place = map_selected(within, jnp.any(inside, 1), hidden, numbers)
        drawn = jnp.where(inside, jnp.where(place < 0, place, params.cutoffs[i] + place), drawn)
    return drawn


@public
def categorical(
    key: PRNGKeyArray | ArrayLike,
    params: AdaptiveParams,
    hidden: ArrayLike,
    *,
    shape: tuple[int, ...] | None = None,
    replace: bool = True,
    phi: Phi = exp,
    return_log_prob: bool = False,
) -> Any:
    """Classes drawn from an adaptive softmax, without an array of all probabilities.

    P(y) = p^head_y for a frequent class;   P(y) = p^head_{tail i} p^{tail i}_y otherwise     (MATH 12.5)

    A column of the head is drawn, and if it stands for a tail, a class of that tail. The scores of a tail are computed
    only for the rows that have drawn it. The draws of a row depend on the key, its number and its own scores.

    Args:
      key: a PRNG key.
      params, hidden, phi: as in `log_prob`.
      shape: the shape of the result. It ends in `[...]`, and the axes before are the draws of each row. None: one draw.
      replace: False: the draws of one row are distinct, in the order of a draw without replacement. A tail is searched
        only for the rows where its largest l + g may be among them.
      return_log_prob: whether to return log p of the drawn classes, too.
    Returns: int32 of the given shape, with the probabilities to the accuracy of `jsoftmax.gumbel.categorical`. −1
      for a row without classes, or with NaN or +inf among the scores that it draws from, and for draws without
      replacement after all possible classes have been drawn. No derivatives.
      With `return_log_prob`, also their log-probabilities, of the same shape, as `log_prob` gives them. They are
      differentiable; the classes count as constants. Without replacement, each is the log-probability of that class in
      a first draw. −inf where nothing was left to draw; NaN for a row with NaN or +inf.
    Raises: as `log_prob` and `jsoftmax.gumbel.categorical`.
    Source: Grave et al. 2017; without replacement: Maddison et al. 2014 (the largest of a group of Gumbel variables),
      Kool et al. 2019.

    >>> from jsoftmax.heads import adaptive
    >>> params = adaptive.init(jax.random.key(0), 64, 1000, (100, 400))
    >>> draws = adaptive.categorical(jax.random.key(1), params, jnp.ones((3, 64)), shape=(1000, 3))
    >>> rare = jnp.exp(adaptive.log_probs(params, jnp.ones(64)))[400:].sum()
    >>> bool(jnp.abs(jnp.mean(draws >= 400) - rare) < 0.05)
    True
    """
    function = "categorical"
    check_key(function, key)
    given, h, batch = check(function, params, hidden, phi)
    prefix = check_shape(function, shape, batch)
    count, replace = math.prod(prefix), check_flag(function, "replace", replace)
    with_log_prob = check_flag(function, "return_log_prob", return_log_prob)
    check_distinct(function, replace, count, given.cutoffs[-1])
    drawn = _draw(key, *jax.tree.map(lax.stop_gradient, (given, phi, h)), count, replace).T
    classes = jnp.maximum(drawn, -1).reshape(*prefix, *batch)
    if not with_log_prob:
        return classes
    rows = jnp.broadcast_to(h, (*drawn.shape, h.shape[1])).reshape(drawn.size, h.shape[1])
    log_p = row_log_prob(given, phi, rows, drawn.reshape(-1), drawn.reshape(-1) >= 0, common_dtype(params, hidden))
    log_p = jnp.where(drawn == _NONE, -jnp.inf, jnp.where(drawn == _BAD, jnp.nan, log_p.reshape(drawn.shape)))
    return classes, log_p.reshape(*prefix, *batch)
