"""A target that names k classes, as a row of k + 1 classes: the named ones, and the rest as one class (MATH 7.8)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax import maps
from jsoftmax.checks.arguments import read
from jsoftmax.checks.labels import Labelled, in_range
from jsoftmax.checks.top_targets import TopTargets
from jsoftmax.sharding import AxisName, has_label, local_label, pick, psum
from jsoftmax.sums import class_sum


def top_row(given: Labelled, x: Array, axis_name: AxisName) -> tuple[Array, Array]:
    """Scores and targets `[..., k + 1]` from scores `[..., K]`. The classes of x may be sharded; those of the result
    are not."""
    top: TopTargets = given.labels
    x = read(x)
    label, valid = in_range(top.indices, given.classes, axis_name)
    own, inside = local_label(label, given.classes, axis_name)
    inside = jnp.broadcast_to(inside, own.shape) & valid
    mask = jnp.ones(x.shape, bool) if given.where is None else given.where

    def value(a: Array) -> Array:
        return psum(jnp.where(inside, pick(a, own), 0), axis_name)

    others = ~has_label(x, jnp.where(inside, own, x.shape[-1]))
    rest = maps.log_sum(jnp.where(others, x, -jnp.inf), (x.ndim - 1,), axis_name)
    count = psum(jnp.sum(mask, -1, keepdims=True, dtype=jnp.int32), axis_name)
    return combine(given.top(), value(x), value(mask.astype(jnp.int32)) > 0, rest, count)


def combine(top: TopTargets, x: Array, kept: Array, rest: Array, count: Any) -> tuple[Array, Array]:
    """Scores of the k classes `[..., k]` and log Σ e^x of the rest `[..., 1]`, with their targets  (MATH 7.8).

    kept: which of the k classes are in range and kept by the mask; count: how many of all classes the mask keeps. Mass
    that no class has counts as 0, and so does a rest of rounding size if the other classes are impossible.
    """
    given = top.probabilities.astype(x.dtype)
    total = class_sum(given, (given.ndim - 1,))
    any_other = count > jnp.sum(kept, -1, keepdims=True, dtype=jnp.int32)
    eps, given_eps = (float(jnp.finfo(a.dtype).eps) for a in (total, top.probabilities))
    by_rounding = jnp.isneginf(rest) & (1 - total <= (given.shape[-1] + 8) * eps + given_eps)
    any_mass = any_other & (total < 1) & ~by_rounding
    left = jnp.where(any_mass, 1 - total, 0) if top.tail == "class" else jnp.zeros_like(total)
    if top.tail == "renormalise":
        given = _ratio(given, jnp.where(total == 0, 1, total))
    q = jnp.concatenate([jnp.where(kept, given, 0), left], -1)
    return jnp.concatenate([jnp.where(kept, x, -jnp.inf), rest], -1), q


@jax.custom_jvp
def _ratio(a: Array, b: Array) -> Array:
    """a/b. JAX's own derivative contains 1/b², which overflows for a b of 1e-20."""
    return a / b


@_ratio.defjvp
def _ratio_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """(ȧ − (a/b) ḃ)/b."""
    (a, b), (a_dot, b_dot) = primals, tangents
    ratio = _ratio(a, b)
    return ratio, _ratio(a_dot - ratio * b_dot, b)
