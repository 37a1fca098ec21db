"""Losses and sparse maps beside their peers: optax, and where they are installed PyTorch's package entmax."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax as js
from benchmarks import measure
from benchmarks.measure import Case, F, normal
from jsoftmax import losses


def mean(f: F) -> F:
    return lambda z, labels: jnp.mean(f(z, labels))


def mean_and_gradient(f: F) -> F:
    return jax.value_and_grad(mean(f))


def in_float32(f: F) -> F:
    """The loss of widened logits, as a trainer writes it for a peer that sums in the logits' dtype."""
    return lambda z, labels: f(z.astype(jnp.float32), labels)


def loss_cases() -> list[Case]:
    cases = []
    for shape in ((4096, 32768), (1024, 1024), (1_000_000, 8)):
        z, labels = normal(0, shape), jax.random.randint(jax.random.key(1), shape[:1], 0, shape[1])
        pair = {"ours": losses.cross_entropy, "optax": optax.softmax_cross_entropy_with_integer_labels}
        both = {name: mean_and_gradient(f) for name, f in pair.items()}
        cases.append(Case("losses", "cross_entropy, value and gradient", shape, both, (z, labels)))
    z, labels = normal(0, (1024, 32768), "bfloat16"), jax.random.randint(jax.random.key(1), (1024,), 0, 32768)
    narrow = {**pair, "optax, float32": in_float32(optax.softmax_cross_entropy_with_integer_labels)}
    for name, form in (("value", mean), ("value and gradient", mean_and_gradient)):
        candidates = {peer: form(f) for peer, f in narrow.items()}
        cases.append(Case("losses", f"cross_entropy, {name}", z.shape, candidates, (z, labels), "bfloat16"))
    z = normal(0, (1024, 32768))
    smoothed = {
        "ours": lambda z, labels: losses.cross_entropy(z, labels, label_smoothing=0.1),
        "optax": lambda z, labels: optax.softmax_cross_entropy(
            z, optax.smooth_labels(jax.nn.one_hot(labels, 32768), 0.1)
        ),
    }
    both = {name: mean_and_gradient(f) for name, f in smoothed.items()}
    cases.append(Case("losses", "cross_entropy, smoothing, value and gradient", z.shape, both, (z, labels)))
    return cases


def forward_and_backward(f: F) -> F:
    def both(z: jax.Array, g: jax.Array) -> Any:
        p, pull = jax.vjp(f, z)
        return p, pull(g)

    return both


def torch_calls(z: jax.Array, g: jax.Array) -> dict[str, dict[str, F]]:
    """The package's forward and backward pass by the name of our map; nothing where it is not installed."""
    torch = measure.torch()
    try:
        import entmax  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  (a peer)
    except ImportError:
        return {}
    x, cotangent = (torch.tensor(np.asarray(a)) for a in (z, g))

    def call(f: F) -> F:
        def both() -> None:
            given = x.detach().requires_grad_()
            torch.autograd.grad(f(given), given, cotangent)

        return both

    def bisection(alpha: float) -> F:
        return call(lambda x: entmax.entmax_bisect(x, alpha, -1))

    return {
        "sparsemax": {
            "entmax": call(lambda x: entmax.sparsemax(x, -1)),
            "entmax k=100": call(lambda x: entmax.sparsemax(x, -1, k=100)),
            "bisection": bisection(2.0),
        },
        "entmax15": {
            "entmax": call(lambda x: entmax.entmax15(x, -1)),
            "entmax k=100": call(lambda x: entmax.entmax15(x, -1, k=100)),
            "bisection": bisection(1.5),
        },
        "entmax(1.5)": {"bisection": bisection(1.5)},
        "entmax(1.3)": {"bisection": bisection(1.3)},
    }


def sparse_cases() -> list[Case]:
    maps: dict[str, F] = {
        "sparsemax": js.sparsemax,
        "entmax15": js.entmax15,
        "entmax(1.5)": functools.partial(js.entmax, alpha=1.5),
        "entmax(1.3)": functools.partial(js.entmax, alpha=1.3),
    }
    cases = []
    for shape in ((1024, 1024), (64, 32768)):
        z, g = normal(0, shape) / 3, normal(1, shape)
        calls = torch_calls(z, g)
        for name, f in maps.items():
            candidates = {"ours": forward_and_backward(f)}
            if name == "sparsemax":
                candidates["optax"] = forward_and_backward(jax.vmap(optax.projections.projection_simplex))
            label = f"{name}, forward and backward"
            cases.append(Case("sparse", label, shape, candidates, (z, g), calls=calls.get(name, {})))
    return cases


def run(output: pathlib.Path) -> None:
    measure.run([*loss_cases(), *sparse_cases()], output)
