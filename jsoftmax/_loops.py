"""Loops over the blocks of an array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def checkpointed_scan(body: Callable[..., Any], state: Any, xs: Any) -> Any:
    """`lax.scan` whose backward pass keeps nothing that the body computes. Without the checkpoint, jax 0.10 would also
    drop the body's derivative rules at second order."""
    return lax.scan(jax.checkpoint(body, prevent_cse=False), state, xs)


def cut(a: Array, length: int, axis: int = 0) -> Array:
    """An axis cut into blocks, whose number is a new first axis; padded with zeros if they do not divide it."""
    padding = -a.shape[axis] % length
    if padding:
        a = jnp.pad(a, [(0, padding if i == axis else 0) for i in range(a.ndim)])
    count = a.shape[axis] // length  # not -1, which cannot be inferred for an array without elements
    return jnp.moveaxis(a.reshape(*a.shape[:axis], count, length, *a.shape[axis + 1 :]), axis, 0)
