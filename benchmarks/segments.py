"""Softmax of a graph's edges beside jraph's, where it is installed, and beside its formula in plain JAX."""

import pathlib

import jax
import jax.numpy as jnp

from benchmarks import measure
from benchmarks.measure import Case, F, normal
from jsoftmax import segments

EDGES, NODES, HEADS = 1_000_000, 100_000, 4


def plain(z: jax.Array, ids: jax.Array) -> jax.Array:
    """jraph's formula in plain JAX."""
    peak = jax.ops.segment_max(z, ids, NODES)
    e = jnp.exp(z - peak[ids])
    return e / jax.ops.segment_sum(e, ids, NODES)[ids]


def ours(z: jax.Array, ids: jax.Array) -> jax.Array:
    return segments.segment_softmax(z, ids, NODES)


def peers() -> dict[str, F]:
    """jraph, if it is installed, and the plain formula."""
    try:
        from jraph import segment_softmax  # noqa: PLC0415  # pyright: ignore[reportMissingImports]  (a peer)
    except ImportError:
        return {"plain": plain}
    return {"jraph": lambda z, ids: segment_softmax(z, ids, NODES), "plain": plain}


def with_gradient(f: F) -> F:
    """Value and vjp along the scores themselves."""

    def call(z: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda z: f(z, ids), z)
        return value, pull(z)[0]

    return call


def cases() -> list[Case]:
    z, of_heads = normal(0, (EDGES,)), normal(2, (EDGES, HEADS))
    ids = jax.random.randint(jax.random.key(1), (EDGES,), 0, NODES)
    forms: dict[str, F] = {"ours": ours, **peers()}
    gradients = {name: with_gradient(f) for name, f in forms.items()}
    return [
        Case("segments", "segment_softmax", (EDGES, NODES), forms, (z, ids)),
        Case("segments", "segment_softmax, value and vjp", (EDGES, NODES), gradients, (z, ids)),
        Case("segments", "segment_softmax of heads", (EDGES, HEADS, NODES), forms, (of_heads, ids)),
        Case("segments", "segment_softmax of heads, value and vjp", (EDGES, HEADS, NODES), gradients, (of_heads, ids)),
    ]


def run(output: pathlib.Path) -> None:
    measure.run(cases(), output)
