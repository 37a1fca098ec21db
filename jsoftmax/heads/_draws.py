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
from jsoftmax.gumbel._estimators import given_maximum
from jsoftmax.heads import _head
from jsoftmax.heads._head import Head, Heads, Plan, scan_classes
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.maps import normalize
from jsoftmax.sharding import concatenate_shards, psum, shard_index
from jsoftmax.truncation import truncate

CHUNK = 128
"""The number of classes of a chunk. It is fixed, so that a draw does not depend on the size of blocks."""


class DrawOptions(NamedTuple):
    """What to draw, and what to return."""

    draws: int
    """The number of draws of each token."""
    replace: bool
    top_k: int | None
    """The number of classes with the largest p that may be drawn; None: all."""
    log_prob: bool
    """Whether to compute the log-probabilities of the draws."""


class Draws(NamedTuple):
    """The draws of each token, `[draws, N]`."""

    classes: Array
    """−1 for a row with NaN or +inf, or without a class left."""
    log_prob: Array | None
    """log p after the cuts; NaN for a row with NaN or +inf, −inf for one without a class left."""


def draw(given: tuple[Any, Head, Array | None], options: DrawOptions, plan: Plan) -> Draws:
    """Draws with a key from a head whose classes with p < min_p · max p are left out."""
    key, head, min_p = given
    if options.top_k is not None:
        return _draw_from_top(key, head, min_p, options, plan)
    if min_p is not None:
        head = _cut_head(head, min_p, plan)
    return _draw_by_chunks(key, head, options, plan)


def _cut_head(head: Head, min_p: Array, plan: Plan) -> Head:
    """The head that keeps the classes with x ≥ max x + log min_p. A pass of its own finds max x. Derivatives treat this
    choice of classes as a constant."""
    found: Any = statistics(jax.tree.map(lax.stop_gradient, head), Extras(top=1), plan)
    least = found.peak + jnp.minimum(jnp.log(lax.stop_gradient(min_p)), 0)
    return head._replace(least=least[:, None], mode=found.top_class)


def _draw_from_top(key: Any, head: Head, min_p: Array | None, options: DrawOptions, plan: Plan) -> Draws:
    """Draws from the k classes with the largest p. Only their scores are needed."""
    found: Any = statistics(head, Extras(top=options.top_k or 0), plan)
    u = -found.top
    u = u if min_p is None else truncate(u, min_p=min_p)
    shape = (options.draws, u.shape[0])
    place = categorical(key, lax.stop_gradient(u), shape=shape, replace=options.replace)
    at = jnp.maximum(place, 0).T
    classes = jnp.where(place >= 0, jnp.take_along_axis(found.top_class, at, 1).T, -1)
    if not options.log_prob:
        return Draws(classes, None)
    log_prob = jnp.take_along_axis(normalize(u, (1,), None, "log_p").log_p, at, 1).T
    return Draws(classes, _mark_undrawn(log_prob, classes, ~(found.peak < jnp.inf)))


def _mark_undrawn(log_prob: Array, classes: Array, bad: Array) -> Array:
    """The log-probability of each draw; where nothing was drawn, NaN for a bad row, −inf for one without a class."""
    return jnp.where(classes >= 0, log_prob, jnp.where(bad, jnp.nan, -jnp.inf).astype(log_prob.dtype))


def _chunk_normalizers(head: Head, plan: Plan) -> Array:
    """log Σ e^x over each chunk of this shard `[N, chunks]`: one number for 128 scores."""
    sizes = (plan.classes, plan.classes if plan.accelerator_block is None else plan.accelerator_block[1])
    chunks = max(-(-head.weight.shape[0] // classes) * classes for classes in sizes) // CHUNK
    first = _head.first_class(head, plan)

    def step(blocks: Heads, _: Heads, *, start: Array, known: None, state: Array, plan: Plan) -> Array:
        x = _head.block_scores(blocks[0], start, plan)
        L = normalize(x.reshape(x.shape[0], x.shape[1] // CHUNK, CHUNK), (2,)).log_normalizer[..., 0]
        return lax.dynamic_update_slice_in_dim(state, L, (start - first) // CHUNK, 1)

    state = jnp.zeros_like(head.hidden, shape=(head.hidden.shape[0], chunks))
    L = scan_classes(step, (head,), (Head(),), None, state, plan)
    return L[:, : -(-head.weight.shape[0] // CHUNK)]


def _chunk_scorer(head: Head, plan: Plan) -> Callable[[Array], Array]:
    """The function that computes x `[N, CHUNK]` from the number `[N]` of one chunk of this shard for each token."""
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
        # A drawn chunk has a class above the bound. Scores that are computed again may be rounded differently, so its
        # largest score always counts.
        return jnp.where(x < jnp.minimum(token.least, jnp.max(x)), -jnp.inf, x)

    def of_tokens(chunk: Array) -> Array:
        on_cpu, elsewhere = (functools.partial(lax.map, of_token, batch_size=size) for size in (64, 512))
        return lax.platform_dependent((head.only(*_head.PER_TOKEN), chunk), cpu=on_cpu, default=elsewhere)

    return of_tokens


def _draw_by_chunks(key: Any, given: Head, options: DrawOptions, plan: Plan) -> Draws:
    """Draws a chunk by its log-normaliser, and then a class of it by its scores, which are computed again."""
    head = jax.tree.map(lax.stop_gradient, given)
    of_chunks, of_classes = jax.random.split(key)
    own, chunk_scores = _chunk_normalizers(head, plan), _chunk_scorer(head, plan)
    classes, chunks, shard = head.weight.shape[0], own.shape[1], shard_index(plan.axis_name)
    L = concatenate_shards(own, plan.shards, plan.axis_name)
    bad = ~(jnp.max(L, 1) < jnp.inf)

    def here(chunk: Array) -> tuple[Array, Array]:
        """Whether chunks are this shard's, and their numbers in it."""
        number = chunk - shard * chunks
        return (number >= 0) & (number < chunks), jnp.clip(number, 0, chunks - 1)

    def complete(drawn: Array, chunk: Array, within: Any) -> Draws:
        """The draws with log p = log p of the chunk + log p within it, `[draws, N]`."""
        if not options.log_prob:
            return Draws(drawn, None)
        of_chunk = jnp.take_along_axis(normalize(L, (1,), None, "log_p").log_p, jnp.maximum(chunk, 0).T, 1).T
        log_prob = _mark_undrawn(of_chunk + within, drawn, bad)
        return Draws(drawn, _attach_rule(log_prob, given._replace(labels=jnp.maximum(drawn, 0).T), plan))

    if options.replace:
        chunk = categorical(of_chunks, L, shape=(options.draws, L.shape[0]))
        inside, number = here(chunk)

        def within(xs: tuple[Any, Array]) -> tuple[Array, Array | None]:
            key, number = xs
            x = chunk_scores(number)
            place = categorical(key, x)
            return place, _log_prob_at(x, place[:, None])[:, 0] if options.log_prob else None

        place, log_prob = lax.map(within, (jax.random.split(of_classes, options.draws), number))
        drawn = jnp.where(place >= 0, _head.first_class(head, plan) + number * CHUNK + place, -1)
        drawn, log_prob = psum(jax.tree.map(lambda a: jnp.where(inside, a, 0), (drawn, log_prob)), plan.axis_name)
        return complete(jnp.where(chunk >= 0, drawn, -1), chunk, log_prob)
    # The largest x + g of a chunk is a Gumbel variable at L. The n chunks where it is largest have the n largest x + g.
    best, chunk = top_k(L + _noise.gumbel(of_chunks, L.shape, L.dtype), min(options.draws, L.shape[1]))
    inside, number = here(chunk)
    x = jnp.where(inside[:, :, None], jnp.moveaxis(lax.map(chunk_scores, number.T), 0, 1), 0)
    x = psum(x, plan.axis_name)
    perturbed = lax.collapse(given_maximum(of_classes, x, best), 1)
    best, at = top_k(perturbed, options.draws)
    chunk = jnp.take_along_axis(chunk, at // CHUNK, 1)
    first = chunk // chunks * classes + chunk % chunks * CHUNK
    drawn = jnp.where(bad[:, None] | ~(best > -jnp.inf), -1, first + at % CHUNK).T
    return complete(drawn, chunk.T, _log_prob_at(x, at).T if options.log_prob else None)


def _log_prob_at(x: Array, place: Array) -> Array:
    """log p within its chunk of each class at the places `[N, n]` in the chunks of its token."""
    log_p = normalize(x, (x.ndim - 1,), None, "log_p").log_p
    return jnp.take_along_axis(lax.collapse(log_p, 1), jnp.maximum(place, 0), 1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _attach_rule(log_prob: Array, head: Head, plan: Plan) -> Array:
    """The given log-probabilities `[draws, N]`, with the derivatives of those of the head's labels `[N, draws]`."""
    return log_prob


@functools.partial(_attach_rule.defjvp, symbolic_zeros=True)
def _attach_rule_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """l̇_y = ẋ_y − Σ p ẋ  (MATH 11.3); 0 where nothing was drawn."""
    log_prob, head = primals
    dots = without_zeros(tangents[1])
    _, rate = jvp_of_live(lambda head: statistics(head, Extras(), plan).loss, head, dots)
    return _attach_rule(log_prob, head, plan), jnp.where(log_prob > -jnp.inf, -rate.T, 0)
