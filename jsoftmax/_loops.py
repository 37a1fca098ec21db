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


def pack_columns(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Floating leaves `[N]` and `[N, 1]` side by side in one array `[N, columns]`, beside the other leaves; and the
    function that undoes it. A TPU copies each array of a loop's state to the chip and back in each turn."""
    leaves, structure = jax.tree.flatten(tree)
    is_column = [jnp.issubdtype(a.dtype, jnp.floating) and a.shape[1:] in ((), (1,)) for a in leaves]
    columns = [a.reshape(-1, 1) for a, column in zip(leaves, is_column, strict=True) if column]
    others = [a for a, column in zip(leaves, is_column, strict=True) if not column]

    def unpack(packed: Any) -> Any:
        table, others = packed
        columns, rest = iter(jnp.split(table, table.shape[1], 1)), iter(others)
        unpacked = [
            next(columns).reshape(-1, *a.shape[1:]) if column else next(rest)
            for a, column in zip(leaves, is_column, strict=True)
        ]
        return jax.tree.unflatten(structure, unpacked)

    return (jnp.concatenate(columns, 1), others), unpack
