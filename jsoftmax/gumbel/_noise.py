"""Gumbel noise, and what every function of the Gumbel route asks of its arguments."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax import _arguments, _labels, maps
from jsoftmax._collectives import AxisName, by_rows, shard_count, shard_index, side_by_side
from jsoftmax._top_k import top_k, top_k_of_many


def gumbel(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """g = −log E, E = −log1p(−U), with U resolved best near 0, where the largest g come from  (MATH 10.1)."""
    digits = jnp.finfo(dtype).nmant + 1
    if digits == 53:
        U = ((jax.random.bits(key, shape, "uint64") >> 11).astype(dtype) + 0.5) * 2.0**-53
    else:  # signed integers are converted faster
        U = ((jax.random.bits(key, shape, "uint32") >> 1).astype(jnp.int32).astype(dtype) + 0.5) * 2.0**-31
    return -jnp.log(-jnp.log1p(-jnp.minimum(U, 1 - 2.0**-digits)))


class Scores(NamedTuple):
    """Checked: x = ψ(z) + log w with the classes last, in the accumulation dtype; how to hand a result back."""

    x: Array
    axis: int
    """Where the classes are in what is given and handed back, counted from the end."""
    dtype: Any

    def samples(self, function: str, shape: Any) -> "Scores":
        """As many copies of the scores as there are samples in a result of that shape without its classes."""
        prefix = check_shape(function, shape, self.batch)
        return self._replace(x=jnp.broadcast_to(self.x, (*prefix, *self.x.shape)))

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of the scores without their classes."""
        return self.x.shape[:-1]

    def perturbed(self, key: Any) -> Array:
        """x + g."""
        return self.x + gumbel(key, self.x.shape, self.x.dtype)

    def restore(self, a: Array) -> Array:
        """A result with classes, their axis where the scores have it, in the scores' dtype."""
        return jnp.moveaxis(a, -1, self.axis).astype(self.dtype)


def check(  # noqa: PLR0917  (as the public functions have them)
    function: str, z: Any, axis: Any, where: Any, phi: Any, log_weights: Any, axis_name: Any = None
) -> Scores:
    """The scores of a function with one class axis."""
    arguments = maps.check(function, {"z": z}, axis, where, phi, log_weights, axis_name)
    at = _arguments.one_axis(function, axis, arguments.axis)
    x = maps.weighted_scores(phi, arguments.scores[0], arguments.where, arguments.log_weights)
    return Scores(jnp.moveaxis(x, at, -1), at - x.ndim, arguments.dtype)


def check_relaxed(  # noqa: PLR0917  (as the public functions have them)
    function: str, z: Any, temperature: Any, axis: Any, where: Any, phi: Any, log_weights: Any
) -> tuple[Scores, Array]:
    """The scores, and τ as `[..., 1]`: one number, or one for each row."""
    given = check(function, z, axis, where, phi, log_weights)
    check_positive(function, temperature)
    shape = jnp.moveaxis(given.x, -1, given.axis).shape
    axes = (given.axis + given.x.ndim,)
    tau = _arguments.per_row(function, "temperature", temperature, shape, axes=axes, dtype=given.x.dtype)
    return given, jnp.moveaxis(tau, given.axis, -1)


def check_positive(function: str, temperature: Any) -> None:
    """A temperature that is known at trace time."""
    if not _arguments.all_known(temperature, lambda t: (t > 0) & (t < math.inf)):
        raise ValueError(
            f"{function}: temperature must be > 0 and finite; got {temperature}. For samples without relaxation, "
            "the limit 0, take jsoftmax.gumbel.categorical."
        )


def check_shape(function: str, shape: Any, batch: tuple[int, ...]) -> tuple[int, ...]:
    """What stands before the batch in the shape of the result."""
    if shape is None:
        return ()
    whole = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if not all(_arguments.is_int(length) and length >= 0 for length in whole):
        raise TypeError(f"{function}: shape must be a tuple of ints >= 0, not traced; got {shape!r}. Write (n,).")
    split = len(whole) - len(batch)
    if split < 0 or whole[split:] != batch:
        several = ", ".join(["n", *map(str, batch)]) if batch else "n,"
        raise ValueError(
            f"{function}: shape must end in the scores' shape without the classes, {batch}; got {whole}. For n draws "
            f"of each row write shape=({several})."
        )
    return whole[:split]


def check_key(function: str, key: Any) -> None:
    """One PRNG key, of the new kind or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return
    if dtype == jnp.uint32 and shape in ((2,), (4,)):
        return
    got = type(key).__name__ if dtype is None else f"dtype {dtype} and shape {shape}"
    raise TypeError(
        f"{function}: key must be one PRNG key, the first argument; got {got}. Make one by jax.random.key(seed), and "
        "map over several: jax.vmap."
    )


def check_int(function: str, argument: str, k: Any) -> None:
    """An int known at trace time, told before the scores are looked at: they may stand in its place."""
    if not _arguments.is_int(k):
        got = repr(k) if jnp.ndim(k) == 0 else f"an array of shape {jnp.shape(k)}"
        raise TypeError(
            f"{function}: {argument} must be an int, known at trace time, which shapes the result; got {got}. Pass a "
            "Python int, static in jit, behind the scores."
        )


def check_count(function: str, k: Any, classes: int) -> int:
    """How many of the classes, an int in [1, K]."""
    check_int(function, "k", k)
    if not classes:
        raise ValueError(f"{function}: there must be at least one class; got none, and k={k!r}. Leave the call out.")
    if not 1 <= k <= classes:
        raise ValueError(
            f"{function}: k must be an int in [1, {classes}]; got {k!r}. Ask for one to all of the classes."
        )
    return int(k)


def check_index(function: str, index: Any, x: Array) -> Array:
    """Classes `[...]`, one for each row."""
    of, way_out = "the scores' shape without the classes,", "For several draws of one row map over them: jax.vmap"
    return _labels.check_labels(function, "index", index, x.shape[:-1], of=of, way_out=way_out)


def top_perturbed(key: Any, a: Array, k: int, axis_name: AxisName = None) -> tuple[Array, Array]:
    """The k largest of a + g and which classes they are, over all shards, each with noise of its own."""
    if axis_name is None:
        return by_rows(lambda a, key: top_k_of_many(a + gumbel(key, a.shape, a.dtype), k), a, key)
    own, shards = a.shape[-1], shard_count(axis_name)
    g = gumbel(jax.random.fold_in(key, shard_index(axis_name)), a.shape, a.dtype)
    best, index = top_k_of_many(a + g, min(k, own))
    best = side_by_side(best, shards, axis_name)
    index = side_by_side(index + shard_index(axis_name) * own, shards, axis_name)
    best, at = top_k(best, k)
    return best, jnp.take_along_axis(index, at, -1)


def is_chosen(index: Array, x: Array) -> Array:
    """Whether a class `[..., K]` is that of the index; nowhere for an index that is out of range or left out."""
    return (index[..., None] == jnp.arange(x.shape[-1], dtype=index.dtype)) & ~jnp.isneginf(x)


def one_hot(index: Array, x: Array) -> Array:
    """1_index `[..., K]` in the dtype of x."""
    return is_chosen(index, x).astype(x.dtype)
