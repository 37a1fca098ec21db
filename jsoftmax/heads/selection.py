"""The most probable classes of a head, and classes drawn from it, without logits (MATH 11.2, 11.7)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, PRNGKeyArray

from jsoftmax.checks.arguments import check_flag, check_option, is_int, public
from jsoftmax.checks.sampling import check_count, check_key, check_shape
from jsoftmax.gumbel._categorical import check_distinct
from jsoftmax.heads import _check, _head
from jsoftmax.heads._draws import CHUNK, Wanted, draw
from jsoftmax.heads._head import map_shards
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName


class LinearTopK(NamedTuple):
    """The k classes with the largest p of each token, in descending order, `[..., k]`."""

    log_prob: Array
    """log p."""
    indices: Array
    """The classes, int32; −1, with log_prob −inf, beyond the classes that are kept."""


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
    Returns: `LinearTopK(log_prob, indices)`, `[..., k]`, in descending order, the first of equals first; log_prob,
      float32 at least, is differentiable. Beyond the classes that are kept: −inf and −1. A token with NaN: NaN and −1.
    Raises: as `linear_cross_entropy`; ValueError for a k out of range.
    Source: MATH 11.2.

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
    log_prob = -(found.log_total[:, None] + found.top)
    left_out = jnp.isneginf(log_prob)  # its derivative is 0
    log_prob = jnp.where(left_out, lax.stop_gradient(log_prob), log_prob)
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

    One pass gives the log-normaliser of each 128 classes; one of these chunks is drawn, then a class of it from scores
    that are computed again     (MATH 11.7). But for rounding the draw does not depend on `block_size`. Without
    replacement tokens × draws × 128 scores are held. With `min_p` the largest score comes first, by a pass of its own;
    `top_k` takes the one pass of `linear_top_k`, and draws from its k scores.

    Args:
      key: a PRNG key.
      hidden, weight, bias, phi, soft_cap, temperature, where, log_weights, banned, precision, axis_name, shards: as in
        `linear_cross_entropy`. The draw is the same sharded where a shard has whole chunks.
      shape: the result's, which ends in `[...]`: what stands before counts the draws of each token. None: one draw.
      replace: False: the draws of one token are distinct, in the order of a draw without replacement.
      top_k: only the k classes with the largest p are drawn, of a tie for the last place the first, as `linear_top_k`
        has them; an int in [1, V], part of the compiled program. None: all. Another cut of these k, such as `top_p`, is
        `jsoftmax.truncate` on the log_prob of `linear_top_k`, then `jsoftmax.gumbel.categorical`.
      min_p: then only those with p ≥ min_p · max p; one number in [0, 1], which may be traced. The mode stays. None:
        all.
      return_log_prob: whether to return log p of the classes drawn, too.
      block_size: as in `linear_cross_entropy`, rounded up to whole chunks.
    Returns: int32 of the given shape, each class at its rate (`jsoftmax.gumbel.categorical`). A token without classes,
      or with NaN or +inf: −1; so are draws without replacement beyond the classes that are kept. No derivatives.
      With return_log_prob the classes and, of the same shape, in float32 at least, their log-probabilities in the law
      that is drawn from, its cuts made; without replacement each by itself, as a first draw's. Where nothing was left
      to draw −inf, of a token with NaN or +inf NaN. They are differentiable, the cuts and the classes constants; the
      derivative takes passes of its own     (MATH 11.3). Without cuts they are those of `linear_statistics` with the
      draws as several labels of each token.
    Raises: as `linear_cross_entropy` and `jsoftmax.gumbel.categorical`; TypeError or ValueError for cuts out of range.
    Source: Devroye 1986, section III.2; without replacement: Maddison et al. 2014 (the largest of a group of Gumbel
      variables), Kool et al. 2019; the cuts: as `jsoftmax.truncate`.

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
    wanted = Wanted(count, replace, top_k, with_log_prob)
    drawn = map_shards(draw, (key, given.head, min_p), given.plan, wanted)

    def restored(a: Array) -> Array:
        return jax.vmap(given.restore)(a).reshape(*prefix, *given.batch)

    return (restored(drawn.classes), restored(drawn.log_prob)) if with_log_prob else restored(drawn.classes)
