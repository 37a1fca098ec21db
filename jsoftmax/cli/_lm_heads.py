"""The heads of `python -m jsoftmax lm`, each with the same five parts, and how one is trained."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jsoftmax import PHIS, exp, heads, log_softmax, losses, taylor
from jsoftmax.cli import _lm_network as network
from jsoftmax.cli._corpus import Corpus
from jsoftmax.cli._lm_network import FEATURES, Network
from jsoftmax.heads import adaptive, factored
from jsoftmax.phi import Phi

SAMPLES = 512
OF_ORDER_2 = ("quadratic", "factored")
PHI_CHOICES = [str(phi) for phi in PHIS if phi.domain == (-np.inf, np.inf)]
"""Scores of a linear layer may be any numbers."""


class Draw(NamedTuple):
    """What a head that samples classes needs."""

    key: Array
    log_frequencies: Array


class Head(NamedTuple):
    """The weights above the network, and two losses of hidden `[N, d]` and labels `[N]`."""

    initial: Callable[[Array, np.ndarray], Any]
    """(key, counts of the words) ↦ weights."""
    loss: Any
    """(weights, hidden, labels, φ, draw) ↦ the mean loss; None for the head with its own descent."""
    log_prob: Callable[..., Array]
    """(weights, hidden, labels, φ) ↦ log p_y `[N]`, with all classes."""
    rate: float
    """Adam's learning rate at the beginning; it falls to 0 linearly."""
    sgd_rate: float = 0.0
    """The learning rate of the factored head's own descent."""


def _weight(key: Array, counts: np.ndarray) -> Array:
    return jax.random.normal(key, (len(counts), FEATURES)) / FEATURES**0.5 / 2


def _cut(key: Array, counts: np.ndarray) -> adaptive.AdaptiveParams:
    """Two tails, beyond the first tenth and the first third of the words. It works for tiny texts, too."""
    classes = len(counts)
    return adaptive.init(key, FEATURES, classes, (max(classes // 10, 1), max(classes // 3, 2)))


def _dense(weight: Array, hidden: Array, labels: Array, phi: Phi, draw: Draw) -> Array:
    return losses.cross_entropy(hidden @ weight.T, labels, phi=phi).mean()


def _dense_log_prob(weight: Array, hidden: Array, labels: Array, phi: Phi) -> Array:
    return jnp.take_along_axis(log_softmax(hidden @ weight.T, phi=phi), labels[:, None], -1)[:, 0]


def _streaming(weight: Array, hidden: Array, labels: Array, phi: Phi, draw: Draw) -> Array:
    return heads.linear_cross_entropy_sum(hidden, weight, labels, phi=phi) / len(labels)


def _streaming_log_prob(weight: Array, hidden: Array, labels: Array, phi: Phi) -> Array:
    return -heads.linear_cross_entropy(hidden, weight, labels, phi=phi)


def _adaptive(params: Any, hidden: Array, labels: Array, phi: Phi, draw: Draw) -> Array:
    return -adaptive.log_prob(params, hidden, labels, phi=phi).mean()


def _adaptive_log_prob(params: Any, hidden: Array, labels: Array, phi: Phi) -> Array:
    return adaptive.log_prob(params, hidden, labels, phi=phi)


def _quadratic(weight: Array, hidden: Array, labels: Array, phi: Phi, draw: Draw) -> Array:
    return heads.quadratic_cross_entropy(hidden, weight, labels, phi=phi).mean()


def _quadratic_log_prob(weight: Array, hidden: Array, labels: Array, phi: Phi) -> Array:
    return -heads.quadratic_cross_entropy(hidden, weight, labels, phi=phi)


def _factored_log_prob(state: Any, hidden: Array, labels: Array, phi: Phi) -> Array:
    return -factored.loss(state, hidden, labels, loss=factored.log_loss(phi))


def _sampled(weight: Array, hidden: Array, labels: Array, phi: Phi, draw: Draw) -> Array:
    return heads.sampled_cross_entropy(
        draw.key, hidden, weight, labels, SAMPLES, log_proposal=draw.log_frequencies, phi=phi
    ).mean()


# The rates are the best of `python -m benchmarks lm`, which raises them until the perplexity rises, on 200,000 words of
# numpy and scipy, with scikit-learn held out: numpy, the test, has no say. Streaming is the same loss as dense.
HEADS = {
    "dense": Head(_weight, _dense, _dense_log_prob, 6e-3),
    "streaming": Head(_weight, _streaming, _streaming_log_prob, 6e-3),
    "adaptive": Head(_cut, _adaptive, _adaptive_log_prob, 6e-3),
    "quadratic": Head(_weight, _quadratic, _quadratic_log_prob, 1.2e-2),
    "factored": Head(lambda *given: factored.init(_weight(*given)), None, _factored_log_prob, 6e-3, 100.0),
    "sampled": Head(_weight, _sampled, _streaming_log_prob, 6e-3),
}


def choose_phi(head: str, name: str | None) -> Phi:
    """φ by its name. Without a name it is exp, or taylor(2) for the heads that need order 2."""
    if name is None:
        return taylor(2) if head in OF_ORDER_2 else exp
    phi = next(phi for phi in PHIS if str(phi) == name)
    if head in OF_ORDER_2 and phi.quadratic is None:
        possible = [str(phi) for phi in PHIS if phi.quadratic is not None]
        raise ValueError(
            f"lm: --phi must be of order 2 for the head {head}, which takes its sum from sums of squares; got {name}. "
            f"Take {' or '.join(possible)}, or another head."
        )
    return phi


class Trainer:
    """One head with its network. `step` trains on a batch of windows, and `log_prob` evaluates one."""

    def __init__(self, name: str, phi: Phi, corpus: Corpus, steps: int, rates: tuple[float, float]) -> None:
        head = HEADS[name]
        own_descent = head.loss is None
        keys = jax.random.split(jax.random.key(0), 3)
        counts = corpus.counts
        self._dropout = keys[2]
        log_q = jnp.log(jnp.asarray(np.maximum(counts, 1) / np.maximum(counts, 1).sum(), jnp.float32))
        rate, sgd_rate = (optax.linear_schedule(rate, 0.0, steps) for rate in rates)
        adam = optax.adam(rate)
        below, above = network.initial(keys[0], len(counts)), head.initial(keys[1], counts)
        self.state = (below, above, adam.init(below if own_descent else (below, above)))

        def together(state: Any, contexts: Array, labels: Array, key: Array) -> tuple[Any, Array]:
            below, above, moments = state

            def loss(learned: tuple[Network, Any]) -> Array:
                h = network.hidden(learned[0], contexts, key)
                return head.loss(learned[1], h, labels, phi, Draw(jax.random.fold_in(key, 1), log_q))

            value, gradient = jax.value_and_grad(loss)((below, above))
            updates, moments = adam.update(gradient, moments)
            learned: Any = optax.apply_updates((below, above), updates)
            return (*learned, moments), value

        def factored_step(state: Any, contexts: Array, labels: Array, key: Array) -> tuple[Any, Array]:
            below, above, moments = state
            h, pull = jax.vjp(lambda below: network.hidden(below, contexts, key), below)
            eta = sgd_rate(moments[0].count)
            value, by_hidden, above = factored.loss_and_update(above, h, labels, eta, loss=factored.log_loss(phi))
            updates, moments = adam.update(pull(by_hidden)[0], moments)
            return (optax.apply_updates(below, updates), above, moments), value

        def step(state: Any, contexts: Array, labels: Array, turn: Array) -> tuple[Any, Array]:
            key = jax.random.fold_in(self._dropout, turn)
            return (factored_step if own_descent else together)(state, contexts, labels.reshape(-1), key)

        def log_prob(state: Any, contexts: Array, labels: Array) -> Array:
            h = network.hidden(state[0], contexts)
            return head.log_prob(state[1], h, labels.reshape(-1), phi).reshape(labels.shape)

        self.step = jax.jit(step, donate_argnums=0)
        self._log_prob = jax.jit(log_prob)

    def perplexity(self, text: np.ndarray, end: int, batch: int) -> float:
        """exp of the mean of −log p over all words of a text, in batches of windows."""
        contexts, labels, counts = network.windows(text, end)
        batch = min(batch, len(contexts))
        fill = ((0, -len(contexts) % batch), (0, 0))
        contexts, labels, counts = (np.pad(a, fill).reshape(-1, batch, a.shape[1]) for a in (contexts, labels, counts))
        total = 0.0
        for context, label, counted in zip(contexts, labels, counts, strict=True):
            total += np.sum(np.asarray(self._log_prob(self.state, context, label), np.float64), where=counted)
        return float(np.exp(-total / len(text)))
