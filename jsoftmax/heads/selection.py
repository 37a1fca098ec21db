"""The most probable classes of a head, and classes drawn from it, without logits (MATH 11.2, 11.7)."""

import math
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, PRNGKeyArray

from jsoftmax import maps
from jsoftmax.checks.arguments import check_flag, check_option, is_int, public
from jsoftmax.checks.sampling import check_count, check_key, check_shape
from jsoftmax.gumbel._categorical import check_distinct
from jsoftmax.heads import _check, _head
from jsoftmax.heads._draws import CHUNK, DrawOptions, draw
from jsoftmax.heads._head import map_shards
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName


class LinearTopK(NamedTuple):
    """The k classes with the largest p of each token, in descending order, `[..., k]`."""

    log_prob: Array
    """log p."""
    indices: Array
    """The classes, int32. If fewer than k are kept, the places after them have −1, and −inf in log_prob."""


@public
def linear_top_k(
    hidden: ArrayLike,
    weight: ArrayLike,
    k: int,
    bias: ArrayLike | None = None,
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
) -> LinearTopK:
    """The k most probable classes of each token and their log-probabilities, without logits.

    It equals

        z = c tanh((hidden @ weight.T + bias) / c) / τ          without soft_cap  z = (hidden @ weight.T + bias) / τ
        jax.lax.top_k(log_softmax(z, where=where, phi=φ, log_weights=log w), k)          (MATH 11.1, 11.2)

    Args:
      hidden, weight, bias, phi, soft_cap, temperature, where, log_weights, banned, block_size, precision, axis_name,
        shards: as in `linear_cross_entropy`.
      k: how many, an int in [1, V]; part of the compiled program.
    Returns: `LinearTopK(log_prob, indices)`, `[..., k]`, in descending order; equal classes keep their order. log_prob
      is float32 at least, and differentiable. If fewer than k classes are kept, the places after them have −inf and
      −1. A token with NaN among its scores: NaN and −1.
    Raises: as `linear_cross_entropy`; ValueError for a k out of range.
    Source: MATH 11.2.

    >>> import jax.numpy as jnp
    >>> linear_top_k(jnp.ones((1, 2)), jnp.array([[0., 1.], [3., 0.], [1., 1.]]), 2).indices
    Array([[1, 2]], dtype=int32)
    """
    function = "linear_top_k"
    if not is_int(k):
        raise TypeError(
            f"{function}: k must be an int known at trace time, after hidden and weight; got {type(k).__name__}. It "
            "shapes the result; bias comes after it."
        )
    given = _check.check(
        function,
        hidden,
        weight,
        bias,
        phi=phi,
        soft_cap=soft_cap,
        temperature=temperature,
        where=where,
        log_weights=log_weights,
        banned=banned,
        block_size=block_size,
        precision=precision,
        axis_name=axis_name,
        shards=shards,
    )
    k = check_count(function, k, _head.vocabulary(given.head, given.plan))
    found: Any = map_shards(statistics, given.head, given.plan, Extras(top=k))
    log_prob = maps.constant_at_impossible(-(found.log_total[:, None] + found.top))
    return LinearTopK(given.restore(log_prob), given.restore(found.top_class))


@public
def linear_categorical(
    key: PRNGKeyArray | ArrayLike,
    hidden: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    replace: bool = True,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    banned: Integer[ArrayLike, "..."] | None = None,
    top_k: int | None = None,
    min_p: ArrayLike | None = None,
    return_log_prob: bool = False,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
) -> Any:
    """Classes drawn from the softmax of a linear layer, without logits.

    It equals in distribution

        z = c tanh((hidden @ weight.T + bias) / c) / τ          without soft_cap  z = (hidden @ weight.T + bias) / τ
        z = truncate(z, top_k=top_k, min_p=min_p, where=where, phi=φ, log_weights=log w)
        gumbel.categorical(key, z, shape=shape, replace=replace, phi=φ, log_weights=log w)

    One pass gives the log-normaliser of each chunk of 128 classes. A chunk is drawn, and then a class of it, whose
    scores are computed again     (MATH 11.7). Except for rounding, the draw does not depend on `block_size`. Without
    replacement, tokens × draws × 128 scores are in memory. With `min_p`, an earlier pass finds the largest score. With
    `top_k`, the pass is that of `linear_top_k`, and the draw is made from its k scores.

    Args:
      key: a PRNG key.
      hidden, weight, bias, phi, soft_cap, temperature, where, log_weights, banned, precision, axis_name, shards: as in
        `linear_cross_entropy`. A sharded draw is the same as an unsharded one if each shard has whole chunks.
      shape: the shape of the result. It ends in `[...]`, and the axes before are the draws of each token. None: one
        draw.
      replace: False: the draws of one token are distinct, in the order of a draw without replacement.
      top_k: an int in [1, V], part of the compiled program. Only the k classes with the largest p are drawn, those of
        `linear_top_k`. None: all. For another cut, such as `top_p`, apply `jsoftmax.truncate` to the log_prob of
        `linear_top_k`, and then `jsoftmax.gumbel.categorical`.
      min_p: one number in [0, 1], which may be traced. Of the classes that `top_k` keeps, only those with p ≥ min_p ·
        max p are drawn; the mode always is one of them. None: all.
      return_log_prob: whether to return log p of the drawn classes, too.
      block_size: as in `linear_cross_entropy`, rounded up to whole chunks.
    Returns: int32 of the given shape, with the probabilities to the accuracy of `jsoftmax.gumbel.categorical`. −1
      for a token without classes, or with NaN or +inf among its scores, and for draws without replacement after all
      kept classes have been drawn. No derivatives.
      With `return_log_prob`, also their log-probabilities after the cuts, of the same shape, float32 at least. Without
      replacement, each is the log-probability of that class in a first draw. −inf where nothing was left to draw; NaN
      for a token with NaN or +inf. They are differentiable; the cuts and the classes count as constants, and the
      derivative takes passes of its own     (MATH 11.3). Without cuts they equal the result of `linear_statistics` with
      the draws as several labels of each token.
    Raises: as `linear_cross_entropy` and `jsoftmax.gumbel.categorical`; TypeError or ValueError for cuts out of range.
    Source: Devroye 1986, section III.2; without replacement: Maddison et al. 2014 (the largest of a group of Gumbel
      variables), Kool et al. 2019; the cuts: as in `jsoftmax.truncate`.

    >>> import jax.numpy as jnp
    >>> weight = jnp.array([[0., 0.], [1., 1.]])
    >>> draws = linear_categorical(jax.random.key(0), jnp.ones((1, 2)), weight, shape=(10_000, 1))
    >>> float(jnp.mean(draws)).__round__(1)  # 0.88
    0.9
    >>> linear_categorical(jax.random.key(0), jnp.ones((1, 2)), weight, min_p=0.5, return_log_prob=True)
    (Array([1], dtype=int32), Array([0.], dtype=float32))
    """
    function = "linear_categorical"
    check_key(function, key)
    given = _check.check(
        function,
        hidden,
        weight,
        bias,
        phi=phi,
        soft_cap=soft_cap,
        temperature=temperature,
        where=where,
        log_weights=log_weights,
        banned=banned,
        block_size=block_size,
        precision=precision,
        axis_name=axis_name,
        shards=shards,
        chunk=CHUNK,
    )
    prefix = check_shape(function, shape, given.batch)
    count = math.prod(prefix)
    replace = check_flag(function, "replace", replace)
    classes = _head.vocabulary(given.head, given.plan)
    top_k = None if top_k is None else check_count(function, top_k, classes, "top_k")
    min_p = None if min_p is None else check_option(function, min_p, given.head.hidden.dtype, min_p=(0.0, 1.0))
    with_log_prob = check_flag(function, "return_log_prob", return_log_prob)
    check_distinct(function, replace, count, top_k or classes)
    options = DrawOptions(count, replace, top_k, with_log_prob)
    drawn = map_shards(draw, (key, given.head, min_p), given.plan, options)

    def restored(a: Array) -> Array:
        return jax.vmap(given.restore)(a).reshape(*prefix, *given.batch)

    return (restored(drawn.classes), restored(drawn.log_prob)) if with_log_prob else restored(drawn.classes)
