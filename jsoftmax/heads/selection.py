"""The most probable classes of a head, and classes drawn from it; no logits (MATH 11.2, 11.7)."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from jsoftmax._loops import cut
from jsoftmax._top_k import top_k
from jsoftmax.checks.arguments import check_flag, is_int, public
from jsoftmax.checks.sampling import check_count, check_key, check_shape
from jsoftmax.gumbel import _noise, categorical
from jsoftmax.gumbel._categorical import check_distinct
from jsoftmax.gumbel._estimators import conditional
from jsoftmax.heads import _check, _head
from jsoftmax.heads._head import Head, Heads, Plan, map_shards, scan_classes
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName, concatenate_shards, psum, shard_index

CHUNK = 128
"""Classes of a chunk; fixed, so that a draw does not depend on the sizes of blocks."""


def _chunk_normalizers(head: Head, plan: Plan) -> Array:
    """log Σ e^x over each chunk of this shard `[N, chunks]`: 1/128 of the scores' numbers."""
    sizes = (plan.classes, plan.classes if plan.accelerator_block is None else plan.accelerator_block[1])
    chunks = max(-(-head.weight.shape[0] // classes) * classes for classes in sizes) // CHUNK
    first = _head.first_class(head, plan)

    def step(blocks: Heads, _: Heads, *, start: Array, known: None, state: Array, plan: Plan) -> Array:
        x = _head.block_scores(blocks[0], start, plan)
        L = normalize(x.reshape(x.shape[0], -1, CHUNK), (2,)).log_normalizer[..., 0]
        return lax.dynamic_update_slice_in_dim(state, L, (start - first) // CHUNK, 1)

    state = jnp.zeros_like(head.hidden, shape=(head.hidden.shape[0], chunks))
    L = scan_classes(step, (head,), (Head(),), None, state, plan)
    return L[:, : -(-head.weight.shape[0] // CHUNK)]


def _scores_of(head: Head, plan: Plan) -> Callable[[Array], Array]:
    """A function of one chunk of this shard for each token `[N]`: its x `[N, CHUNK]`."""
    head = _head.with_padding(head, plan._replace(classes=CHUNK))
    chunks = jax.tree.map(lambda a: cut(a, CHUNK), head.only(*_head.PER_CLASS))

    def of_token(xs: tuple[Array, Array]) -> Array:
        hidden, number = xs
        here = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), chunks)
        whole = head.merge_fields(here.widened(hidden.dtype))._replace(hidden=hidden[None])
        return _head.block_scores(whole, number * CHUNK, plan)[0]

    def of_tokens(chunk: Array) -> Array:
        on_cpu, elsewhere = (functools.partial(lax.map, of_token, batch_size=size) for size in (64, 512))
        return lax.platform_dependent((head.hidden, chunk), cpu=on_cpu, default=elsewhere)

    return of_tokens


def _draw(given: tuple[Any, Head], count: int, replace: bool, plan: Plan) -> Array:
    """Classes `[count, N]`; −1 where a row is bad, or has no class left."""
    key, head = given[0], jax.tree.map(lax.stop_gradient, given[1])
    of_chunks, of_classes = jax.random.split(key)
    own, scores_of = _chunk_normalizers(head, plan), _scores_of(head, plan)
    classes, chunks, shard = head.weight.shape[0], own.shape[1], shard_index(plan.axis_name)
    L = concatenate_shards(own, plan.shards, plan.axis_name)

    def here(chunk: Array) -> tuple[Array, Array]:
        """Whether chunks are this shard's, and their numbers in it."""
        number = chunk - shard * chunks
        return (number >= 0) & (number < chunks), jnp.clip(number, 0, chunks - 1)

    if replace:
        chunk = categorical(of_chunks, L, shape=(count, L.shape[0]))
        inside, number = here(chunk)

        def within(xs: tuple[Any, Array]) -> Array:
            key, number = xs
            return categorical(key, scores_of(number))

        place = lax.map(within, (jax.random.split(of_classes, count), number))
        drawn = jnp.where(place >= 0, _head.first_class(head, plan) + number * CHUNK + place, -1)
        return jnp.where(chunk >= 0, psum(jnp.where(inside, drawn, 0), plan.axis_name), -1)
    # the largest x + g of a chunk is a Gumbel variable at its L; those of `count` chunks have the `count` largest
    best, chunk = top_k(L + _noise.gumbel(of_chunks, L.shape, L.dtype), min(count, L.shape[1]))
    inside, number = here(chunk)
    x = jnp.where(inside[:, :, None], jnp.moveaxis(lax.map(scores_of, number.T), 0, 1), 0)
    x = psum(x, plan.axis_name)
    of_place, of_noise = jax.random.split(of_classes)
    perturbed = conditional(of_noise, x, categorical(of_place, x), best[..., None]).reshape(x.shape[0], -1)
    best, at = top_k(perturbed, count)
    chunk = jnp.take_along_axis(chunk, at // CHUNK, 1)
    bad = ~(jnp.max(L, 1, keepdims=True) < jnp.inf)
    first = chunk // chunks * classes + chunk % chunks * CHUNK
    return jnp.where(bad | ~(best > -jnp.inf), -1, first + at % CHUNK).T


class LinearTopK(NamedTuple):
    """Of each token, the k classes with the largest p, in descending order, `[..., k]`."""

    log_prob: Array
    """log p."""
    indices: Array
    """Which classes, int32; −1, with log_prob −inf, beyond the classes kept."""


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
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
) -> LinearTopK:
    """The k most probable classes of each token and their log-probabilities; no logits.

    It equals

        z = c tanh((hidden @ weight.T + bias) / c) / τ          without soft_cap  z = (hidden @ weight.T + bias) / τ
        jax.lax.top_k(log_softmax(z, where=where, phi=φ, log_weights=log w), k)          (MATH 11.1, 11.2)

    Args:
      hidden, weight, bias, phi, soft_cap, temperature, where, log_weights, block_size, precision, axis_name, shards: as
        in `linear_cross_entropy`.
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
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
) -> Int[Array, "..."]:
    """Classes drawn from the softmax of a linear layer; no logits.

    It equals in distribution

        z = c tanh((hidden @ weight.T + bias) / c) / τ          without soft_cap  z = (hidden @ weight.T + bias) / τ
        gumbel.categorical(key, z, shape=shape, replace=replace, where=where, phi=φ, log_weights=log w)

    One pass gives the log-normaliser of each 128 classes; one of these chunks is drawn, then a class of it from scores
    that are computed again     (MATH 11.7). But for rounding the draw does not depend on `block_size`. Without
    replacement tokens × draws × 128 scores are held.

    Args:
      key: a PRNG key.
      hidden, weight, bias, phi, soft_cap, temperature, where, log_weights, precision, axis_name, shards: as in
        `linear_cross_entropy`. The draw is the same sharded where a shard has whole chunks.
      shape: the result's, which ends in `[...]`: what stands before counts the draws of each token. None: one draw.
      replace: False: the draws of one token are distinct, in the order of a draw without replacement.
      block_size: as in `linear_cross_entropy`, rounded up to whole chunks.
    Returns: int32 of the given shape, each class at its rate (`jsoftmax.gumbel.categorical`). A token without classes,
      or with NaN or +inf: −1; so are draws without replacement beyond the classes that are kept. No derivatives.
      Their log-probabilities: `linear_statistics` takes the draws as several labels of each token.
    Raises: as `linear_cross_entropy` and `jsoftmax.gumbel.categorical`.
    Source: Devroye 1986, section III.2; without replacement: Maddison et al. 2014 (the largest of a group of Gumbel
      variables), Kool et al. 2019.

    >>> weight = jnp.array([[0., 0.], [1., 1.]])
    >>> draws = linear_categorical(jax.random.key(0), jnp.ones((1, 2)), weight, shape=(10_000, 1))
    >>> float(jnp.mean(draws)).__round__(1)  # 0.88
    0.9
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
        block_size=block_size,
        precision=precision,
        axis_name=axis_name,
        shards=shards,
        chunk=CHUNK,
    )
    prefix = check_shape(function, shape, given.batch)
    count = math.prod(prefix)
    replace = check_flag(function, "replace", replace)
    check_distinct(function, replace, count, _head.vocabulary(given.head, given.plan))
    drawn = map_shards(_draw, (key, given.head), given.plan, count, replace)
    return jax.vmap(given.restore)(drawn).reshape(*prefix, *given.batch)
