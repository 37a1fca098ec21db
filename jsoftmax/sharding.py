"""Sums and maxima over classes that are sharded over a named axis of `jax.shard_map` or `jax.vmap` (MATH 13)."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

AxisName = str | tuple[str, ...] | None


def check_axis_name(function: str, axis_name: Any) -> AxisName:
    """Checks that `axis_name` is a name, or several, and bound where the function is called."""
    if axis_name is None:
        return None
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise TypeError(
            f"{function}: axis_name must be None, the name of a mesh axis or a tuple of different names; got "
            f"{axis_name!r}. Use a name of the mesh of jax.shard_map, or that of jax.vmap(axis_name=…)."
        )
    try:
        lax.axis_size(axis_name)
    except NameError:
        bound = jax.sharding.get_abstract_mesh().manual_axes
        names = f"; jax.shard_map has bound {', '.join(map(repr, bound))} here" if bound else ""
        raise ValueError(
            f"{function}: axis_name must be bound where the function is called; got {axis_name!r}{names}. Call it "
            "inside jax.shard_map over a mesh with that axis, or jax.vmap(axis_name=…); elsewhere leave axis_name out."
        ) from None
    return axis_name


def shard_count(axis_name: AxisName) -> int:
    """The number of shards of the classes. Public functions ask for it when they are called, because JAX may trace a
    rule again where the name is no longer bound."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def shard_index(axis_name: AxisName) -> Array:
    """The number of this shard, int32."""
    return jnp.zeros((), jnp.int32) if axis_name is None else lax.axis_index(axis_name)


def place_in_block(label: Array, start: Array, classes: int) -> tuple[Array, Array]:
    """The place of a label among `classes` classes that begin at `start`, 0 if it is not among them; and whether it
    is."""
    place = label - start.astype(label.dtype)
    inside = (place >= 0) & (place < classes)
    return jnp.where(inside, place, 0), inside


def local_label(label: Array, classes: int, axis_name: AxisName) -> tuple[Array, Array]:
    """The place of a label among this shard's classes, 0 if it is on another shard; and whether it is on this one. If
    the classes are not sharded, it is the label itself, which must be in range."""
    if axis_name is None:
        return label, jnp.ones((), bool)
    return place_in_block(label, shard_index(axis_name) * classes, classes)


def is_label(shape: tuple[int, ...], label: Array, axis_name: AxisName = None, start: Array | None = None) -> Array:
    """Whether a class is the label `[..., 1]`, as an array of that shape with the classes last. start: the number of
    the first class, where the array is a block or a shard. XLA fuses the comparison, so no one-hot array is stored."""
    if axis_name is not None:
        start = shard_index(axis_name) * shape[-1]
    if start is not None:
        label = label - start.astype(label.dtype)
    return lax.broadcasted_iota(label.dtype, shape, len(shape) - 1) == label


def has_label(a: Array, labels: Array) -> Array:
    """Whether a class of `[..., K]` is among the labels `[..., m]`. A label of K stands for no class."""

    def scattered(a: Array, labels: Array) -> Array:
        return jnp.put_along_axis(jnp.zeros(a.shape, bool), labels, True, -1, inplace=False, mode="drop")

    return reshard_like(apply_to_rows(scattered, a, labels), a)


def local_value_at_label(pick: Callable[[Array], Array], label: Array, classes: int, axis_name: AxisName) -> Array:
    """pick(label) on the shard that has the label, 0 on the others."""
    own, inside = local_label(label, classes, axis_name)
    return jnp.where(inside, pick(own), 0)


def keeps_label(kept: Callable[[Array], Array], label: Array, classes: int, axis_name: AxisName) -> Array:
    """Whether a mask keeps the class of a label. kept(label) reads this shard's part of the mask."""

    def count(own: Array) -> Array:
        return kept(own).astype(jnp.int32)

    return psum(local_value_at_label(count, label, classes, axis_name), axis_name) > 0


def psum(tree: Any, axis_name: AxisName) -> Any:
    """Σ over the shards, for all leaves in one collective."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def pmax(a: Array, axis_name: AxisName) -> Array:
    """The maximum over the shards. It is a constant for derivatives, since JAX does not differentiate `lax.pmax`."""
    return a if axis_name is None else lax.pmax(lax.stop_gradient(a), axis_name)


def shard_slot(a: Array, shards: int, axis_name: AxisName) -> Array:
    """This shard's `[..., k]` in its place in an array `[..., shards · k]` for all shards; 0 elsewhere."""
    own = jnp.arange(shards, dtype=jnp.int32)[:, None] == shard_index(axis_name)
    return jnp.where(own, a[..., None, :], 0).reshape(*a.shape[:-1], shards * a.shape[-1])


def concatenate_shards(a: Array, shards: int, axis_name: AxisName) -> Array:
    """The `[..., k]` of all shards one after the other, `[..., shards · k]`. It is made by a sum, so that it is the
    same on all shards, and has the right derivatives with check_vma and without."""
    return a if axis_name is None else psum(shard_slot(a, shards, axis_name), axis_name)


def check_sharded(function: str, argument: str, a: Array, axis_name: AxisName) -> None:
    """Rejects an array that `jax.shard_map` knows to be the same on every device: every device would count it again."""
    if axis_name is None:
        return
    missing = varying_axes(lax.axis_index(axis_name)) - varying_axes(a)  # empty where JAX does not keep account
    if missing:
        raise ValueError(
            f"{function}: {argument} must be sharded over axis_name={axis_name!r}, each device with its own classes; "
            f"got one that is the same along {sorted(missing)}. Shard it by in_specs of jax.shard_map, or leave "
            "axis_name out."
        )


def check_parts(
    function: str, shape: tuple[int, ...], axis: tuple[int, ...], axis_name: AxisName, **arrays: Any
) -> None:
    """Rejects masks, weights and distributions that have the classes of all devices where scores have those of one."""
    shards = shard_count(axis_name)
    if shards == 1:
        return
    for name, a in arrays.items():
        got = np.shape(a)
        for i in range(max(0, len(shape) - len(got)), len(shape)):
            length = got[i - len(shape)]
            if i in axis and length != shape[i] and length == shape[i] * shards:
                raise ValueError(
                    f"{function}: {name} must have this device's classes, {shape[i]} in each; got shape {got}, with "
                    f"those of all devices along axis_name={axis_name!r}. Shard it along that axis, too, by in_specs "
                    "of jax.shard_map."
                )


def check_same(function: str, argument: str, a: Any, axis_name: AxisName) -> None:
    """Rejects an array that `jax.shard_map` knows to differ between devices, where all must have the same."""
    if axis_name is None:
        return
    different = varying_axes(lax.axis_index(axis_name)) & varying_axes(a)
    if different:
        raise ValueError(
            f"{function}: {argument} must be the same on all devices along axis_name={axis_name!r}; got one that "
            f"differs along {sorted(different)}. Pass it into jax.shard_map with in_specs of PartitionSpec(), "
            "and do not fold the device's number into it."
        )


def check_not_explicit(function: str, argument: str, a: Array) -> None:
    """Rejects an array that is sharded in its type: JAX cannot trace loops over blocks, or reshapes, along such an
    axis."""
    if has_explicit_sharding(a):
        raise ValueError(
            f"{function}: {argument} must not be sharded over mesh axes of type AxisType.Explicit; got sharding "
            f"{jax.typeof(a).sharding.spec}. Call the function inside jax.shard_map, with axis_name=… if the classes "
            "are sharded; or wrap it (a head with shards=…) by jax.sharding.auto_axes(f, out_sharding=…)."
        )


def has_explicit_sharding(a: Array) -> bool:
    """Whether an array is sharded over a mesh axis of type `AxisType.Explicit`, and so in its type."""
    return any(part is not None for part in jax.typeof(a).sharding.spec)


def apply_to_rows(f: Callable[..., Any], a: Array, *others: Any, axis_name: AxisName = None) -> Any:
    """f(a, …) for rows `[..., K]`. The rows of its results `[..., k]` are sharded as those of a; k is not sharded.

    Along an axis that is sharded in an array's type, JAX gathers and reshapes only if it is told how to; its
    partitioner, to which this function leaves it, does so by itself. With an `axis_name` each device has its classes
    whole.
    """
    typed = [b for b in (a, *others) if has_explicit_sharding(b)]
    if axis_name is not None or not typed:
        return f(a, *others)
    mesh = jax.typeof(typed[0]).sharding.mesh
    axes = tuple(n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit)
    out = NamedSharding(mesh, PartitionSpec(*jax.typeof(a).sharding.spec[:-1]))
    return jax.sharding.auto_axes(f, axes=axes, out_sharding=out)(a, *others)


def reshard_like(a: Array, like: Array) -> Array:
    """The same numbers, sharded in their type as `like` is, which has the same shape."""
    return jax.sharding.reshard(a, jax.typeof(like).sharding) if has_explicit_sharding(like) else a


def reshard_rows(a: Array, like: Array, axes: tuple[int, ...]) -> Array:
    """Numbers of rows (length 1 along the class axes), sharded in their type as the rows of `like` are."""
    if not has_explicit_sharding(like):
        return a
    sharding = jax.typeof(like).sharding
    spec = PartitionSpec(*(None if i in axes else part for i, part in enumerate(sharding.spec)))
    return jax.sharding.reshard(a, NamedSharding(sharding.mesh, spec))


@functools.cache
def even_length(classes: int, usual: int) -> int:
    """A length of blocks near the usual one that leaves no class over, and gives a number of blocks that 8 or 16
    divides; 0 if there is none. So an axis that is sharded over as many devices is cut within devices, not across
    them."""
    lengths = range(max(1, 3 * usual // 4), 8 * usual)
    even = [length for length in lengths if classes % (8 * length) == 0]

    def fitness(length: int) -> tuple[int, float]:
        return math.gcd(classes // length, 16), -max(length / usual, usual / length)

    return max(even, key=fitness, default=0)


def pick(a: Array, index: Array) -> Array:
    """`jnp.take_along_axis(a, index, -1)`, for rows that may be sharded."""
    return apply_to_rows(lambda a, index: jnp.take_along_axis(a, index, -1), a, index)


def varying_axes(a: Any) -> frozenset[str]:
    """The names of the mesh axes along which `jax.shard_map(check_vma=True)` regards an array as differing."""
    return getattr(getattr(jax.typeof(a), "mat", None), "varying", frozenset())


def match_varying_axes(tree: Any, like: Array, axis_name: AxisName = None) -> Any:
    """The same numbers, as each device's own copies along the axes over which `like` is sharded.

    Integers stay as they are. Backwards, the shares of the copies are then summed once, here, and not for every block
    in the loop that uses them. This works inside `jax.vmap(axis_name=…)` and without check_vma too, where `lax.pcast`
    is an error or does nothing.
    """

    def typed(a: Any) -> Any:
        if not isinstance(a, jax.Array) or not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        if axis_name is None and varying_axes(like) <= varying_axes(a):
            return a
        dtype = like.dtype if a.weak_type else a.dtype
        return jnp.where(True, a, jnp.zeros_like(like, dtype, shape=()))

    return jax.tree.map(typed, tree)


def shape_like(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """A shape that differs along the mesh axes along which `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=getattr(jax.typeof(like), "mat", None))


def first_shard_share(a: Array, axis_name: AxisName) -> Array:
    """An array that is the same on all shards: on the first shard as it is, on the others 0.

    A gradient of this that is taken inside is each shard's share of the gradient, whether `lax.psum` is transposed to
    itself (`jax.vmap(axis_name=…)`, `check_vma=False`) or to copies (`check_vma=True`).
    """
    return a if axis_name is None else jnp.where(lax.axis_index(axis_name) == 0, a, 0)
