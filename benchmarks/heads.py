"""Heads over huge vocabularies beside all logits, optax and, where it is installed, PyTorch; time and memory."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax as js
from benchmarks import measure
from benchmarks.measure import Case, F
from jsoftmax import heads, losses
from jsoftmax.heads import adaptive, factored

TOKENS, FEATURES, CLASSES = 2048, 512, 131_072


def arrays(tokens: int, features: int, classes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores of about ±1, and labels."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, features))
    weight = jax.random.normal(keys[1], (classes, features)) / features**0.5
    return hidden, weight, jax.random.randint(keys[2], (tokens,), 0, classes)


def materialised(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weight.T, labels).mean()


def streaming(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    return heads.linear_cross_entropy(hidden, weight, labels).mean()


def summed(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    return heads.linear_cross_entropy_sum(hidden, weight, labels) / hidden.shape[0]


def with_entropy(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    found = heads.linear_statistics(hidden, weight, labels)
    return (0.1 * found.entropy - found.log_prob).mean()


def half_ignored(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    labels = jnp.where(jnp.arange(labels.shape[0]) % 2 == 0, labels, -100)
    return heads.linear_cross_entropy(hidden, weight, labels, ignore_label=-100).mean()


def gradient(f: F) -> F:
    return jax.value_and_grad(f, (0, 1))


def hessian_product(f: F) -> F:
    def of(hidden: jax.Array, weight: jax.Array, labels: jax.Array, *along: jax.Array) -> Any:
        return jax.jvp(jax.grad(lambda h, W: f(h, W, labels), (0, 1)), (hidden, weight), along)[1]

    return of


def jax_cce() -> dict[str, F]:
    """The loss of the package jax_cce with its gradient; nothing if it is not installed."""
    try:
        import jax_cce  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  (a peer)
    except ImportError:
        return {}
    return {"jax-cce": gradient(jax_cce.linear_cross_entropy)}


def torch_calls(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> dict[str, F]:
    """PyTorch's cross-entropy of all logits with its gradient; nothing if it is not installed."""
    torch = measure.torch()
    if torch is None:
        return {}
    h, W = (torch.tensor(np.asarray(a), requires_grad=True) for a in (hidden, weight))
    y = torch.tensor(np.asarray(labels)).long()

    def call() -> Any:
        h.grad = W.grad = None
        torch.nn.functional.cross_entropy(h @ W.T, y).backward()
        return W.grad

    return {"torch": call}


def dense_sgd(weight: jax.Array, hidden: jax.Array, labels: jax.Array) -> jax.Array:
    def loss(weight: jax.Array) -> jax.Array:
        return losses.cross_entropy(hidden @ weight.T, labels, phi=js.taylor(2)).mean()

    return weight - 0.1 * jax.grad(loss)(weight)


def value_and_gradient(classes: int, *wanted: str) -> list[Case]:
    """Losses whose value and gradient are taken; all of them if none is named."""
    given, shape = arrays(TOKENS, FEATURES, classes), (TOKENS, FEATURES, classes)
    torch = torch_calls(*given)
    return [
        Case("heads", f"{name}, value and gradient", shape, {"ours": gradient(f), **peers}, given, calls=calls)
        for name, f, peers, calls in (
            ("linear_cross_entropy", streaming, {"optax": gradient(materialised), **jax_cce()}, torch),
            ("linear_cross_entropy_sum", summed, {"optax": gradient(materialised)}, torch),
            ("linear_statistics", with_entropy, {"linear_cross_entropy": gradient(streaming)}, {}),
            ("half the tokens ignored", half_ignored, {"linear_cross_entropy": gradient(streaming)}, {}),
        )
        if not wanted or name in wanted
    ]


def cases() -> list[Case]:
    made = value_and_gradient(CLASSES)
    made += value_and_gradient(CLASSES // 4, "linear_cross_entropy", "linear_cross_entropy_sum")
    both = {"ours": hessian_product(streaming), "optax": hessian_product(materialised)}
    fewer = arrays(TOKENS // 4, FEATURES, CLASSES)
    fewer = (*fewer, jnp.cos(fewer[0]), jnp.cos(fewer[1]))
    made.append(Case("heads", "linear_cross_entropy, HVP", (TOKENS // 4, FEATURES, CLASSES), both, fewer))
    return made


def structured() -> list[Case]:
    """The exact shortcut of an order-2 φ, and the adaptive softmax on Zipf's labels beside PyTorch's."""
    phi = js.taylor(2)
    many = arrays(8192, 256, CLASSES)

    def quadratic(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
        return heads.quadratic_cross_entropy(hidden, weight, labels, phi=phi).mean()

    candidates = {"ours": quadratic, "linear_cross_entropy": streaming}
    made = [Case("heads", "quadratic_cross_entropy, value", (8192, 256, CLASSES), candidates, many)]
    cutoffs = (2000, 20_000)
    rng = np.random.default_rng(0)
    p = 1 / np.arange(1, CLASSES + 1)
    labels = jnp.asarray(rng.choice(CLASSES, TOKENS, p=p / p.sum()))
    hidden = jax.random.normal(jax.random.key(1), (TOKENS, FEATURES))
    params = adaptive.init(jax.random.key(2), FEATURES, CLASSES, cutoffs)

    def loss(params: Any, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        return -adaptive.log_prob(params, hidden, labels).mean()

    calls = torch_adaptive(params, hidden, labels, cutoffs)
    given = (params, hidden, labels)
    name, shape = "adaptive.log_prob, value and gradient", (TOKENS, FEATURES, CLASSES)
    return [*made, Case("heads", name, shape, {"ours": gradient(loss)}, given, calls=calls)]


def torch_adaptive(params: Any, hidden: jax.Array, labels: jax.Array, cutoffs: tuple[int, ...]) -> dict[str, F]:
    """PyTorch's adaptive softmax with its gradients."""
    torch = measure.torch()
    if torch is None:
        return {}
    module = torch.nn.AdaptiveLogSoftmaxWithLoss(FEATURES, CLASSES, list(cutoffs))
    module.load_state_dict(adaptive.to_torch(params))
    h, y = torch.tensor(np.asarray(hidden), requires_grad=True), torch.tensor(np.asarray(labels)).long()

    def call() -> Any:
        module.zero_grad()
        h.grad = None
        module(h, y).loss.backward()
        return h.grad

    return {"torch": call}


def run(output: pathlib.Path) -> None:
    made = [*structured(), *cases()]
    measure.run(made, output, fewest=3)
    steps()


def steps() -> None:
    """The factored head's step, its state donated, beside dense SGD; milliseconds against V."""
    for classes in (10_000, 100_000, 1_000_000):
        hidden, weight, labels = arrays(128, 256, classes)
        state, loss = factored.init(weight), factored.log_loss(js.taylor(2))

        def step(state: Any, loss: Any = loss, hidden: Any = hidden, labels: Any = labels) -> Any:
            return factored.loss_and_update(state, hidden, labels, 0.1, loss=loss)

        program = jax.jit(step, donate_argnums=0)
        dense = jax.jit(dense_sgd, donate_argnums=0)
        ours, theirs = [], []
        for _ in range(20):
            milliseconds, (_, _, state) = measure.timed(program, state)
            ours.append(milliseconds)
        for _ in range(3):
            milliseconds, weight = measure.timed(dense, weight, hidden, labels)
            theirs.append(milliseconds)
        medians = [sorted(t[1:])[len(t[1:]) // 2] for t in (ours, theirs)]
        print(f"V = {classes:9,}: factored {medians[0]:.2f} ms a step, dense {medians[1]:.1f} ms", flush=True)
