"""Sums and maxima over classes that are sharded over a named axis of `jax.shard_map` or `jax.vmap` (MATH 13)."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

AxisName = str | tuple[str, ...] | None


def check_axis_name(function: str, axis_name: Any) -> AxisName:
    """A name, or several, bound where the function is called."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is None:
        return None
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{function}: axis_name must be None, the name of a mesh axis or a tuple of names; got {axis_name!r}. "
            "It is that of the mesh of jax.shard_map, or of jax.vmap(axis_name=…)."
        )
    try:
        lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{function}: axis_name must be bound where the function is called; got {axis_name!r}. Call it inside "
            "jax.shard_map over a mesh with that axis, or jax.vmap(axis_name=…); elsewhere leave axis_name out."
        ) from None
    return axis_name


def shard_count(axis_name: AxisName) -> int:
    """How many shards the classes have."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def shard_index(axis_name: AxisName) -> Array:
    """Which of them this is, int32."""
    return jnp.zeros((), jnp.int32) if axis_name is None else lax.axis_index(axis_name)


def all_sum(tree: Any, axis_name: AxisName) -> Any:
    """Σ over the shards, of all leaves in one collective."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def all_max(a: Array, axis_name: AxisName) -> Array:
    """The maximum over the shards, a constant for derivatives: `lax.pmax` has none, at any order."""
    return a if axis_name is None else lax.pmax(lax.stop_gradient(a), axis_name)
