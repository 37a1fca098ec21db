"""Correct digits of small results in float32, beside JAX's own formulas, optax and distrax where it is installed."""

import importlib
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jsoftmax as js
from benchmarks.measure import F, about
from jsoftmax import losses, verify

ROWS, CLASSES = 100, 10
GAPS = tuple(range(0, 41, 2))
"""How far the first score is above the mean of the others."""
CHANGES = tuple(10 ** -(k / 2) for k in range(11))
"""The size of the difference between the scores of the two distributions."""


def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (ROWS, CLASSES)).astype(np.float32)


def confident(gap: float) -> np.ndarray:
    z = scores() - np.float32(gap)
    z[:, 0] = 0
    return z


def exact(z: np.ndarray) -> tuple[Any, Any, Any]:
    """log p, p and Σ_{k>0} p_k, with many digits."""
    xp = verify.ManyDigits()
    z = xp.array(z)
    weights = xp.exp(z)
    total = weights.sum(-1, keepdims=True)
    return z - xp.log(total), weights / total, weights[:, 1:].sum(-1) / total[:, 0]


def exact_of_row(z: np.ndarray) -> dict[str, Any]:
    log_p, p, others = exact(z)
    return {
        "entropy": -(p * log_p).sum(-1),
        "loss of the leading class": -log_p[:, 0],
        "its gradient at that class": -others,
    }


def categorical() -> Any:
    """distrax's distribution, or None where it is not installed."""
    try:
        return importlib.import_module("distrax").Categorical
    except ImportError:
        return None


def first(loss: F) -> F:
    """The loss where class 1 is the label."""
    return lambda z: loss(z, jnp.zeros(z.shape[:1], int))


def slope(loss: F) -> F:
    return lambda z: jax.grad(lambda z: jnp.sum(first(loss)(z)))(z)[:, 0]


def plain_entropy(z: jax.Array) -> jax.Array:
    return -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z), -1)


def plain_divergence(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.softmax(a) * (jax.nn.log_softmax(a) - jax.nn.log_softmax(b)), -1)


def of_row() -> dict[str, dict[str, F]]:
    theirs = optax.softmax_cross_entropy_with_integer_labels
    made: dict[str, dict[str, F]] = {
        "entropy": {"jsoftmax": js.entropy, "−Σ p log p, jax.nn": plain_entropy},
        "loss of the leading class": {"jsoftmax": first(losses.cross_entropy), "optax": first(theirs)},
        "its gradient at that class": {"jsoftmax": slope(losses.cross_entropy), "optax": slope(theirs)},
    }
    if distribution := categorical():
        made["entropy"]["distrax"] = lambda z: distribution(z).entropy()
    return made


def of_two() -> dict[str, F]:
    made: dict[str, F] = {"jsoftmax": js.kl_divergence, "Σ p log(p/q), jax.nn": plain_divergence}
    if distribution := categorical():
        made["distrax"] = lambda a, b: distribution(a).kl_divergence(distribution(b))
    return made


def digits(ours: Any, true: Any) -> float:
    """Correct decimal digits of the worst row: none where a result is NaN, 0 or worse; at most those of float32."""
    worst = max(
        abs((float(a) - float(b)) / float(b)) if math.isfinite(a) else 1.0 for a, b in zip(ours, true, strict=True)
    )
    return round(min(max(0.0, -math.log10(max(worst, 1e-9))), 7.2), 2)


def panels() -> list[dict[str, Any]]:
    made = []
    for name, candidates in of_row().items():
        found: dict[str, list[float]] = {peer: [] for peer in candidates}
        for gap in GAPS:
            z = confident(gap)
            for peer, f in candidates.items():
                found[peer].append(digits(np.asarray(jax.jit(f)(z)), exact_of_row(z)[name]))
        made.append({"name": name, "x": list(GAPS), "digits": found})
    candidates = of_two()
    found = {peer: [] for peer in candidates}
    for change in CHANGES:
        a = scores()
        b = (a + np.float32(change) * np.random.default_rng(1).normal(0, 1, a.shape)).astype(np.float32)
        (log_p, p, _), (log_q, _, _) = exact(a), exact(b)
        for peer, f in candidates.items():
            found[peer].append(digits(np.asarray(jax.jit(f)(a, b)), (p * (log_p - log_q)).sum(-1)))
    made.append({"name": "divergence of close rows", "x": list(CHANGES), "digits": found})
    return made


def example() -> dict[str, Any]:
    """The scores (0, −20): what each formula says."""
    z = np.array([[0, -20]], np.float32)
    said = {name: {peer: float(jax.jit(f)(z)[0]) for peer, f in of_row()[name].items()} for name in of_row()}
    return {name: {"exact": float(exact_of_row(z)[name][0]), **by} for name, by in said.items()}


def run(output: pathlib.Path) -> None:
    found = {**about(), "rows_each": ROWS, "classes": CLASSES, "example": example(), "panels": panels()}
    output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for panel in found["panels"]:
        print(panel["name"], {peer: min(by) for peer, by in panel["digits"].items()})
    print(json.dumps(found["example"], indent=1, ensure_ascii=False), f"\nwritten: {output}")
