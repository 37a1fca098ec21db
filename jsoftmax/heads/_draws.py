"""Classes drawn from a head, and their log-probabilities, by chunks of classes (MATH 11.7)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax._loops import cut
from jsoftmax._pytree import jvp_of_live, without_zeros
from jsoftmax._top_k import top_k
from jsoftmax.gumbel import _noise, categorical
from jsoftmax.gumbel._estimators import conditional
from jsoftmax.heads import _head
from jsoftmax.heads._head import Head, Heads, Plan, scan_classes
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.maps import normalize
from jsoftmax.sharding import concatenate_shards, psum, shard_index
from jsoftmax.truncation import truncate

CHUNK = 128
"""Classes of a chunk; fixed, so that a draw does not depend on the sizes of blocks."""


class Wanted(NamedTuple):
    """What is drawn."""

    draws: int
    """How many classes of each token."""
    replace: bool
    top_k: int | None
    """How many classes stay."""
    log_prob: bool
    """Whether their log-probabilities, too."""


class Draws(NamedTuple):
    """Of each token, `[draws, N]`."""

    classes: Array
    """−1 where a row is bad, or has no class left."""
    log_prob: Array | None
    """log p of the truncated law; NaN where a row is bad, −inf where it has no class left."""


def draw(given: tuple[Any, Head, Array | None], wanted: Wanted, plan: Plan) -> Draws:
    """Draws with a key from a head whose classes with p < min_p · max p are left out."""
    key, head, min_p = given
    if wanted.top_k is not None:
        return _draw_from_top(key, head, min_p, wanted, plan)
    if min_p is not None:
        head = _with_cut(head, min_p, plan)
    return _draw_by_chunks(key, head, wanted, plan)


def _with_cut(head: Head, min_p: Array, plan: Plan) -> Head:
    """The head with the classes that stay, constants for derivatives: x ≥ max x + log min_p, found by a pass of its
    own."""
    found: Any = statistics(jax.tree.map(lax.stop_gradient, head), Extras(top=1), plan)
    least = found.peak + jnp.minimum(jnp.log(lax.stop_gradient(min_p)), 0)
    return head._replace(least=least[:, None], mode=found.top_class)


def _draw_from_top(key: Any, head: Head, min_p: Array | None, wanted: Wanted, plan: Plan) -> Draws:
    """Draws from the k classes with the largest p: their scores are all that is needed."""
    found: Any = statistics(head, Extras(top=wanted.top_k or 0), plan)
    u = -found.top
    u = u if min_p is None else truncate(u, min_p=min_p)
    shape = (wanted.draws, u.shape[0])
    place = categorical(key, lax.stop_gradient(u), shape=shape, replace=wanted.replace)
    at = jnp.maximum(place, 0).T
    classes = jnp.where(place >= 0, jnp.take_along_axis(found.top_class, at, 1).T, -1)
    if not wanted.log_prob:
        return Draws(classes, None)
    log_prob = jnp.take_along_axis(normalize(u, (1,), None, "log_p").log_p, at, 1).T
    return Draws(classes, _where_drawn(log_prob, classes, ~(found.peak < jnp.inf)))


def _where_drawn(log_prob: Array, classes: Array, bad: Array) -> Array:
    """The log-probability of what was drawn; otherwise NaN of a bad row, −inf of one that has no class left."""
    return jnp.where(classes >= 0, log_prob, jnp.where(bad, jnp.nan, -jnp.inf).astype(log_prob.dtype))


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
    first = _head.first_class(head, plan)

    def of_token(xs: tuple[Head, Array]) -> Array:
        token, number = xs
        here = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), chunks)
        whole = head.merge_fields(here.widened(token.hidden.dtype))
        whole = whole.merge_fields(jax.tree.map(lambda a: a[None], token))._replace(least=None, mode=None)
        x = _head.block_scores(whole, first + number * CHUNK, plan)[0]
        if token.least is None:
            return x
        # a chunk that is drawn has a class that stays, but scores that are made again may be rounded otherwise
        return jnp.where(x < jnp.minimum(token.least, jnp.max(x)), -jnp.inf, x)

    def of_tokens(chunk: Array) -> Array:
        on_cpu, elsewhere = (functools.partial(lax.map, of_token, batch_size=size) for size in (64, 512))
        return lax.platform_dependent((head.only(*_head.PER_TOKEN), chunk), cpu=on_cpu, default=elsewhere)

    return of_tokens


def _draw_by_chunks(key: Any, given: Head, wanted: Wanted, plan: Plan) -> Draws:
    """A chunk of classes by its log-normaliser, and a class of it by its scores, which are made again."""
    head = jax.tree.map(lax.stop_gradient, given)
    of_chunks, of_classes = jax.random.split(key)
    own, scores_of = _chunk_normalizers(head, plan), _scores_of(head, plan)
    classes, chunks, shard = head.weight.shape[0], own.shape[1], shard_index(plan.axis_name)
    L = concatenate_shards(own, plan.shards, plan.axis_name)
    bad = ~(jnp.max(L, 1) < jnp.inf)

    def here(chunk: Array) -> tuple[Array, Array]:
        """Whether chunks are this shard's, and their numbers in it."""
        number = chunk - shard * chunks
        return (number >= 0) & (number < chunks), jnp.clip(number, 0, chunks - 1)

    def with_log_prob(drawn: Array, chunk: Array, within: Any) -> Draws:
        """log p = log p of the chunk + log p within it, `[draws, N]` as the draws are."""
        if not wanted.log_prob:
            return Draws(drawn, None)
        of_chunk = jnp.take_along_axis(normalize(L, (1,), None, "log_p").log_p, jnp.maximum(chunk, 0).T, 1).T
        log_prob = _where_drawn(of_chunk + within, drawn, bad)
        return Draws(drawn, _with_rates(log_prob, given._replace(labels=jnp.maximum(drawn, 0).T), plan))

    if wanted.replace:
        chunk = categorical(of_chunks, L, shape=(wanted.draws, L.shape[0]))
        inside, number = here(chunk)

        def within(xs: tuple[Any, Array]) -> tuple[Array, Array | None]:
            key, number = xs
            x = scores_of(number)
            place = categorical(key, x)
            return place, _log_prob_at(x, place[:, None])[:, 0] if wanted.log_prob else None

        place, log_prob = lax.map(within, (jax.random.split(of_classes, wanted.draws), number))
        drawn = jnp.where(place >= 0, _head.first_class(head, plan) + number * CHUNK + place, -1)
        drawn, log_prob = psum(jax.tree.map(lambda a: jnp.where(inside, a, 0), (drawn, log_prob)), plan.axis_name)
        return with_log_prob(jnp.where(chunk >= 0, drawn, -1), chunk, log_prob)
    # the largest x + g of a chunk is a Gumbel variable at its L; the n chunks with the largest have the n largest
    best, chunk = top_k(L + _noise.gumbel(of_chunks, L.shape, L.dtype), min(wanted.draws, L.shape[1]))
    inside, number = here(chunk)
    x = jnp.where(inside[:, :, None], jnp.moveaxis(lax.map(scores_of, number.T), 0, 1), 0)
    x = psum(x, plan.axis_name)
    of_place, of_noise = jax.random.split(of_classes)
    perturbed = conditional(of_noise, x, categorical(of_place, x), best[..., None]).reshape(x.shape[0], -1)
    best, at = top_k(perturbed, wanted.draws)
    chunk = jnp.take_along_axis(chunk, at // CHUNK, 1)
    first = chunk // chunks * classes + chunk % chunks * CHUNK
    drawn = jnp.where(bad[:, None] | ~(best > -jnp.inf), -1, first + at % CHUNK).T
    return with_log_prob(drawn, chunk.T, _log_prob_at(x, at).T if wanted.log_prob else None)


def _log_prob_at(x: Array, place: Array) -> Array:
    """log p of the classes of each token's chunk, or chunks, at places `[N, n]`."""
    log_p = normalize(x, (x.ndim - 1,), None, "log_p").log_p
    return jnp.take_along_axis(log_p.reshape(x.shape[0], -1), jnp.maximum(place, 0), 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _with_rates(log_prob: Array, head: Head, plan: Plan) -> Array:
    """Log-probabilities `[draws, N]` of the head's labels `[N, draws]`, which are known, with their derivatives."""
    return log_prob


@functools.partial(_with_rates.defjvp, symbolic_zeros=True)
def _with_rates_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """l̇_y = ẋ_y − Σ p ẋ  (MATH 11.3); 0 where nothing was drawn."""
    log_prob, head = primals
    dots = without_zeros(tangents[1])
    _, rate = jvp_of_live(lambda head: statistics(head, Extras(), plan).loss, head, dots)
    return _with_rates(log_prob, head, plan), jnp.where(log_prob > -jnp.inf, -rate.T, 0)
