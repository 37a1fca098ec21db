"""A small recurrent network over a fixed number of words, without its head."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

CONTEXT = 32
"""Words in a window: the first is predicted from one word, the last from all 32."""
EMBEDDING, UNITS, FEATURES = 128, 192, 129
"""Widths. The last feature is always 1, so that each head has its bias in its weight."""
DROPOUT = 0.2


class Network(NamedTuple):
    """A gated recurrent unit (Cho et al. 2014) with its embedding and a linear layer above it."""

    embedding: Array
    inputs: Array
    states: Array
    bias: Array
    outputs: Array
    shift: Array


def initial(key: Array, classes: int) -> Network:
    """Initial weights, such that inputs and outputs of each layer have a variance of about 1."""
    keys = jax.random.split(key, 4)

    def normal(i: int, *shape: int) -> Array:
        return jax.random.normal(keys[i], shape) / shape[0] ** 0.5

    return Network(
        jax.random.normal(keys[3], (classes, EMBEDDING)) / 2,
        normal(0, EMBEDDING, 3 * UNITS),
        normal(1, UNITS, 3 * UNITS),
        jnp.zeros(3 * UNITS),
        normal(2, UNITS, FEATURES - 1),
        jnp.zeros(FEATURES - 1),
    )


def hidden(network: Network, contexts: Array, key: Array | None = None) -> Array:
    """h `[windows · CONTEXT, FEATURES]` of contexts `[windows, CONTEXT]`. If a key is given, dropout is on."""
    x = network.embedding[contexts.T] @ network.inputs + network.bias

    def step(h: Array, x: Array) -> tuple[Array, Array]:
        g = h @ network.states
        reset, update = jnp.split(jax.nn.sigmoid(x[:, : 2 * UNITS] + g[:, : 2 * UNITS]), 2, -1)
        new = jnp.tanh(x[:, 2 * UNITS :] + reset * g[:, 2 * UNITS :])
        h = update * h + (1 - update) * new
        return h, h

    h = lax.scan(step, jnp.zeros((len(contexts), UNITS)), x)[1].swapaxes(0, 1)
    if key is not None:
        h = jnp.where(jax.random.bernoulli(key, 1 - DROPOUT, h.shape), h / (1 - DROPOUT), 0)
    h = (h @ network.outputs + network.shift).reshape(-1, FEATURES - 1)
    return jnp.concatenate([h, jnp.ones((len(h), 1))], -1)


class Windows(NamedTuple):
    """A text cut into windows, `[windows, CONTEXT]` each: the words before, the words, and which of them count."""

    contexts: np.ndarray
    labels: np.ndarray
    counts: np.ndarray


def windows(text: np.ndarray, end: int) -> Windows:
    """Windows that have each word of a text once. The first word follows an end, and the last window is filled up."""
    length = -(-len(text) // CONTEXT) * CONTEXT
    filled = np.concatenate([[end], text, np.full(length - len(text), end)]).astype(np.int32)
    counts = np.arange(length) < len(text)
    return Windows(*(a.reshape(-1, CONTEXT) for a in (filled[:-1], filled[1:], counts)))
