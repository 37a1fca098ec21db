"""Loops over the blocks of an array."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def checkpointed_scan(body: Callable[..., Any], state: Any, xs: Any) -> Any:
    """`lax.scan` whose backward pass keeps nothing of the body; jax 0.10 would drop its rules at second order, too."""
    return lax.scan(jax.checkpoint(body, prevent_cse=False), state, xs)


def cut(a: Array, length: int, axis: int = 0) -> Array:
    """An axis as blocks, which come first; zeros where they do not divide it."""
    padding = -a.shape[axis] % length
    if padding:
        a = jnp.pad(a, [(0, padding if i == axis else 0) for i in range(a.ndim)])
    count = a.shape[axis] // length  # not -1, of which there is none in an array without elements
    return jnp.moveaxis(a.reshape(*a.shape[:axis], count, length, *a.shape[axis + 1 :]), axis, 0)
