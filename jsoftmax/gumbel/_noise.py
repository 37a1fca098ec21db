"""Gumbel noise, and the checks that all functions of the Gumbel route share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax import maps
from jsoftmax._top_k import top_k, top_k_of_many
from jsoftmax.checks.arguments import one_axis, per_row
from jsoftmax.checks.sampling import check_positive, check_shape
from jsoftmax.sharding import AxisName, apply_to_rows, concatenate_shards, shard_count, shard_index


def gumbel(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """g = −log E, E = −log1p(−U). U has its finest steps near 0, where the largest g come from  (MATH 10.1)."""
    digits = jnp.finfo(dtype).nmant + 1
    if digits == 53:
        U = ((jax.random.bits(key, shape, "uint64") >> 11).astype(dtype) + 0.5) * 2.0**-53
    else:  # signed integers convert to floats faster
        U = ((jax.random.bits(key, shape, "uint32") >> 1).astype(jnp.int32).astype(dtype) + 0.5) * 2.0**-31
    return -jnp.log(-jnp.log1p(-jnp.minimum(U, 1 - 2.0**-digits)))


class Scores(NamedTuple):
    """Checked scores: x = ψ(z) + log w with the classes last, in the accumulation dtype; and how to restore a
    result."""

    x: Array
    axis: int
    """The class axis of the arguments and of results, counted from the end."""
    dtype: Any

    def samples(self, function: str, shape: Any) -> "Scores":
        """The scores repeated for each sample. shape: that of the samples, without their classes."""
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
        """A result with classes: their axis is moved to where the scores have it, and the dtype is that of the
        scores."""
        return jnp.moveaxis(a, -1, self.axis).astype(self.dtype)


def check(  # noqa: PLR0917  (as the public functions have them)
    function: str, z: Any, axis: Any, where: Any, phi: Any, log_weights: Any, axis_name: Any = None
) -> Scores:
    """The checked scores of a function with one class axis."""
    arguments = maps.check(function, {"z": z}, axis, where, phi, log_weights, axis_name)
    at = one_axis(function, axis, arguments.axis)
    x = maps.weighted_scores(phi, arguments.scores[0], arguments.where, arguments.log_weights)
    return Scores(jnp.moveaxis(x, at, -1), at - x.ndim, arguments.dtype)


def check_relaxed(  # noqa: PLR0917  (as the public functions have them)
    function: str, z: Any, temperature: Any, axis: Any, where: Any, phi: Any, log_weights: Any
) -> tuple[Scores, Array]:
    """The checked scores, and τ as `[..., 1]`: one number, or one for each row."""
    given = check(function, z, axis, where, phi, log_weights)
    check_positive(function, temperature)
    shape = jnp.moveaxis(given.x, -1, given.axis).shape
    axes = (given.axis + given.x.ndim,)
    tau = per_row(function, "temperature", temperature, shape, axes=axes, dtype=given.x.dtype)
    return given, jnp.moveaxis(tau, given.axis, -1)


def top_perturbed(key: Any, a: Array, k: int, axis_name: AxisName = None) -> tuple[Array, Array]:
    """The k largest of a + g and their classes, over all shards. Each shard draws its own noise."""
    if axis_name is None:
        return apply_to_rows(lambda a, key: top_k_of_many(a + gumbel(key, a.shape, a.dtype), k), a, key)
    own, shards = a.shape[-1], shard_count(axis_name)
    g = gumbel(jax.random.fold_in(key, shard_index(axis_name)), a.shape, a.dtype)
    best, index = top_k_of_many(a + g, min(k, own))
    best = concatenate_shards(best, shards, axis_name)
    index = concatenate_shards(index + shard_index(axis_name) * own, shards, axis_name)
    best, at = top_k(best, k)
    return best, jnp.take_along_axis(index, at, -1)


def is_chosen(index: Array, x: Array) -> Array:
    """Whether a class `[..., K]` is that of the index. It is so nowhere if the index is out of range or left out."""
    classes = lax.broadcast_to_rank(jnp.arange(x.shape[-1], dtype=index.dtype), x.ndim)
    return (index[..., None] == classes) & ~jnp.isneginf(x)


def one_hot(index: Array, x: Array) -> Array:
    """1_index `[..., K]` in the dtype of x."""
    return is_chosen(index, x).astype(x.dtype)
