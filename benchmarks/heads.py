"""Heads over huge vocabularies beside all logits, optax and, where it is installed, PyTorch; time and memory."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax as js
from benchmarks import measure
from benchmarks.measure import Case, F
from jsoftmax import heads
from jsoftmax.heads import factored

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
    def of(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> Any:
        along = (jnp.cos(hidden), jnp.cos(weight))
        return jax.jvp(jax.grad(lambda h, W: f(h, W, labels), (0, 1)), (hidden, weight), along)[1]

    return of


def torch_calls(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> dict[str, F]:
    """PyTorch's cross-entropy of all logits, with its gradient; nothing where it is not installed."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # its idle threads would spin on the cores that JAX needs
    try:
        import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  (a peer)
    except ImportError:
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
        return js.losses.cross_entropy(hidden @ weight.T, labels, phi=js.taylor(2)).mean()

    return weight - 0.1 * jax.grad(loss)(weight)


def cases() -> list[Case]:
    given = arrays(TOKENS, FEATURES, CLASSES)
    shape = (TOKENS, FEATURES, CLASSES)
    torch = torch_calls(*given)
    made = [
        Case("heads", f"{name}, value and gradient", shape, {"ours": gradient(f), **peers}, given, calls=calls)
        for name, f, peers, calls in (
            ("linear_cross_entropy", streaming, {"optax": gradient(materialised)}, torch),
            ("linear_cross_entropy_sum", summed, {"optax": gradient(materialised)}, torch),
            ("linear_statistics", with_entropy, {"linear_cross_entropy": gradient(streaming)}, {}),
            ("half the tokens ignored", half_ignored, {"linear_cross_entropy": gradient(streaming)}, {}),
        )
    ]
    both = {"ours": hessian_product(streaming), "optax": hessian_product(materialised)}
    made.append(Case("heads", "linear_cross_entropy, HVP", shape, both, given))
    return made


def run(output: pathlib.Path) -> None:
    made = cases()
    measure.run(made, output, fewest=5)
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
