"""Checks of sampling: keys, shapes, counts, temperatures and drawn classes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax.checks.arguments import all_known, is_int
from jsoftmax.checks.labels import check_labels


def check_key(function: str, key: Any) -> None:
    """Checks that `key` is one PRNG key, typed or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return
    if dtype == jnp.uint32 and shape in ((2,), (4,)):
        return
    got = type(key).__name__ if dtype is None else f"dtype {dtype} and shape {shape}"
    raise TypeError(
        f"{function}: key must be one PRNG key, the first argument; got {got}. Make one by jax.random.key(seed); for "
        "several keys use jax.vmap."
    )


def check_int(function: str, argument: str, k: Any) -> None:
    """Checks that k is an int known at trace time. This comes before the checks of the scores, which a caller may have
    passed in its place."""
    if not is_int(k):
        got = repr(k) if jnp.ndim(k) == 0 else f"an array of shape {jnp.shape(k)}"
        raise TypeError(
            f"{function}: {argument} must be an int known at trace time, because it shapes the result; got {got}. Pass "
            "a Python int after the scores, and make it static in jit."
        )


def check_count(function: str, k: Any, classes: int, argument: str = "k") -> int:
    """How many of the classes, an int in [1, K]."""
    check_int(function, argument, k)
    if not classes:
        raise ValueError(
            f"{function}: there must be at least one class; got none, and {argument}={k!r}. Leave the call out."
        )
    if not 1 <= k <= classes:
        raise ValueError(
            f"{function}: {argument} must be an int in [1, {classes}]; got {k!r}. Ask for one to all of the classes."
        )
    return int(k)


def check_shape(function: str, shape: Any, batch: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of the result's shape that come before the batch, and count the samples of each row."""
    if shape is None:
        return ()
    whole = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if not all(is_int(length) and length >= 0 for length in whole):
        raise TypeError(
            f"{function}: shape must be a tuple of ints >= 0, not traced; got {shape!r}. For n draws write (n,)."
        )
    split = len(whole) - len(batch)
    if split < 0 or whole[split:] != batch:
        several = ", ".join(["n", *map(str, batch)]) if batch else "n,"
        raise ValueError(
            f"{function}: shape must end in the scores' shape without the classes, {batch}; got {whole}. For n draws "
            f"of each row write shape=({several})."
        )
    return whole[:split]


def check_positive(function: str, temperature: Any) -> None:
    """Checks that a temperature is positive and finite, if it is known at trace time."""
    if not all_known(temperature, lambda t: (t > 0) & (t < math.inf)):
        raise ValueError(
            f"{function}: temperature must be > 0 and finite; got {temperature}. For the limit 0, samples "
            "without relaxation, use jsoftmax.gumbel.categorical."
        )


def check_index(function: str, index: Any, x: Array) -> Array:
    """The class of each row, as integers `[...]`."""
    of, way_out = "the scores' shape without the classes,", "For several draws of one row use jax.vmap"
    return check_labels(function, "index", index, x.shape[:-1], of=of, way_out=way_out)
