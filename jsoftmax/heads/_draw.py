"""Classes drawn from a head: a chunk of the vocabulary by its share, then a class of the chunk (MATH 11.7)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax.gumbel import _noise, categorical
from jsoftmax.heads import _head
from jsoftmax.heads._head import Head, Heads, Plan, over_classes
from jsoftmax.maps import normalize

CHUNK = 128
"""Classes of a chunk; fixed, so that a draw does not depend on the sizes of blocks."""


def _chunk_normalizers(head: Head, plan: Plan) -> Array:
    """log Σ e^x over each chunk `[N, chunks]`: 1/128 of the scores' numbers."""
    chunks = -(-head.weight.shape[0] // plan.classes) * plan.classes // CHUNK

    def step(blocks: Heads, _: Heads, start: Array, known: None, state: Array) -> Array:
        x = _head.block_scores(blocks[0], start, plan)
        L = normalize(x.reshape(x.shape[0], -1, CHUNK), (2,)).log_normalizer[..., 0]
        return lax.dynamic_update_slice_in_dim(state, L, start // CHUNK, 1)

    state = jnp.zeros_like(head.hidden, shape=(head.hidden.shape[0], chunks))
    return over_classes(step, (head,), (Head(),), None, state, plan)


def _scores_within(head: Head, chunk: Array, plan: Plan) -> Array:
    """x of one chunk for each token `[N]`, `[N, CHUNK]`."""
    head = _head.with_padding(head, plan._replace(classes=CHUNK))
    chunks = jax.tree.map(lambda a: _head.cut(a, CHUNK), head.only(*_head.PER_CLASS))

    def of_token(xs: tuple[Array, Array]) -> Array:
        hidden, number = xs
        here = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), chunks)
        return _head.block_scores(head.with_fields(here)._replace(hidden=hidden[None]), number * CHUNK, plan)[0]

    return lax.map(of_token, (head.hidden, chunk), batch_size=64)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def draw(key: Any, head: Head, plan: Plan, count: int, replace: bool) -> Array:
    """Classes `[count, N]`; −1 where a row is bad, or has no class left."""
    head = jax.tree.map(lax.stop_gradient, head)
    of_chunks, of_classes = jax.random.split(key)
    L = _chunk_normalizers(head, plan)
    if replace:
        chunk = categorical(of_chunks, L, shape=(count, L.shape[0]))
        drawn = lax.map(lambda c: _scores_within(head, jnp.maximum(c, 0), plan), chunk)
        place = categorical(of_classes, drawn)
        return jnp.where((chunk >= 0) & (place >= 0), chunk * CHUNK + place, -1)
    # the largest x + g of a chunk is a Gumbel variable at its L; those of `count` chunks have the `count` largest
    best, chunk = _noise.top_k(L + _noise.gumbel(of_chunks, L.shape, L.dtype), min(count, L.shape[1]))
    x = jnp.stack([_scores_within(head, c, plan) for c in chunk.T], 1)
    perturbed = _given_largest(of_classes, x, best).reshape(x.shape[0], -1)
    best, at = _noise.top_k(perturbed, count)
    classes = jnp.take_along_axis(chunk, at // CHUNK, 1) * CHUNK + at % CHUNK
    bad = ~(jnp.max(L, 1, keepdims=True) < jnp.inf)
    return jnp.where(bad | ~(best > -jnp.inf), -1, classes).T


def _given_largest(key: Any, x: Array, largest: Array) -> Array:
    """x + g `[..., K]`, given that the largest of a row is `largest`  (MATH 10.9)."""
    of_place, of_noise = jax.random.split(key)
    place = categorical(of_place, x)[..., None]
    free = x + _noise.gumbel(of_noise, x.shape, x.dtype)
    below = -jnp.logaddexp(-free, -largest[..., None])
    return jnp.where(jnp.arange(x.shape[-1]) == place, largest[..., None], jnp.where(jnp.isneginf(x), x, below))
