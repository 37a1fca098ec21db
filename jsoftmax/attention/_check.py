"""Checks the arguments of attention, lays them out as `Inputs`, and chooses the sizes of blocks."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax import maps
from jsoftmax._precision import default_precision
from jsoftmax.attention._blocks import Inputs, Plan
from jsoftmax.checks import arguments
from jsoftmax.sharding import (
    AxisName,
    check_axis_name,
    check_not_explicit,
    check_parts,
    check_same,
    check_sharded,
    shard_index,
)


class CheckedArguments(NamedTuple):
    """Checked arguments."""

    inputs: Inputs
    plan: Plan
    dtype: Any
    """The dtype of the output."""
    has_batch: bool

    def restore(self, a: Array) -> Array:
        """A result `[B, K, G, T, …]` as `[B, T, N, …]`, without the batch if the query has none."""
        a = jnp.moveaxis(a, 3, 1)
        a = a.reshape(*a.shape[:2], a.shape[2] * a.shape[3], *a.shape[4:])
        return a if self.has_batch else a[0]


def check(
    function: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any,
    mask: Any,
    scale: Any,
    is_causal: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: Any,
    phi: Any,
    soft_cap: Any,
    sink: Any,
    block_size: Any,
    axis_name: Any,
) -> CheckedArguments:
    """All arguments as `Inputs`, in the accumulation dtype. Only a bias `[…, T, S]` is widened later, block by
    block."""
    maps.check_phi_of_blocks(function, phi)
    query, key, value = (
        _check_floating(function, name, a) for name, a in (("query", query), ("key", key), ("value", value))
    )
    has_batch = query.ndim == 4
    query, key, value = _check_shapes(function, query, key, value)
    axis_name = _check_axis_name(function, axis_name, query, key, value)
    dtype = jnp.result_type(query, key, value)
    wide = arguments.accumulation_dtype(dtype)
    (batch, queries, heads, width), (keys, key_heads) = query.shape, key.shape[1:3]
    groups = heads // key_heads
    shape = (batch, heads, queries, keys)
    bias, mask = _check_bias(function, bias, shape, axis_name), _check_mask(function, mask, shape, axis_name)
    query_lengths = _check_lengths(function, "query_seq_lengths", query_seq_lengths, batch)
    key_lengths = _check_lengths(function, "key_value_seq_lengths", key_value_seq_lengths, batch)
    # beyond the lengths the arrays may hold NaN, and 0 · NaN is NaN
    query = _within(query, query_lengths, 0)
    first = shard_index(axis_name) * keys
    key, value = (_within(a, key_lengths, first) for a in (key, value))
    scale = jnp.asarray(width**-0.5, wide) if scale is None else _check_number(function, "scale", scale, wide)
    cap = None if soft_cap is None else arguments.check_option(function, soft_cap, wide, soft_cap=(1e-37, math.inf))
    causal = arguments.check_flag(function, "is_causal", is_causal)
    window = _check_window(function, local_window_size)
    if bias is not None and (bias.shape[2] == 1 or jnp.finfo(bias.dtype).bits > jnp.finfo(wide).bits):
        bias = bias.astype(wide)
    inputs = Inputs(
        query=query.reshape(batch, queries, key_heads, groups, width).transpose(0, 2, 3, 1, 4).astype(wide),
        key=key.swapaxes(1, 2).astype(wide),
        value=value.swapaxes(1, 2).astype(wide),
        bias=None if bias is None else _in_groups(bias, key_heads, groups),
        mask=None if mask is None else _in_groups(mask, key_heads, groups),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        scale=scale,
        soft_cap=cap,
        sink=_check_sink(function, sink, key_heads, groups, wide),
        phi=phi,
    )
    names = set(axis_name if isinstance(axis_name, tuple) else () if axis_name is None else (axis_name,))
    skips = names <= set(jax.sharding.get_abstract_mesh().manual_axes)
    plan = Plan(1, 1, (queries, keys), dtype, default_precision(dtype), causal, window, axis_name, skips)
    plan = _with_blocks(function, plan, block_size, batch * heads)
    return CheckedArguments(inputs, plan, dtype, has_batch)


def _check_floating(function: str, argument: str, a: Any) -> Array:
    way_out = f"Convert it first: {argument}.astype(float)."
    return arguments.as_floating(function, argument, a, way_out, "real and floating")


def _check_shapes(function: str, query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """The three arrays, with a batch axis."""
    for name, a in (("query", query), ("key", key), ("value", value)):
        if a.ndim not in (3, 4) or a.ndim != query.ndim:
            raise ValueError(
                f"{function}: {name} must have the axes [batch, length, heads, features]; or, without a batch, all "
                "three arrays must have the last three axes; got shape "
                f"{a.shape}{'' if name == 'query' else f' beside a query {query.shape}'}. For several batch axes use "
                "jax.vmap, or reshape them into one."
            )
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{function}: value must have the shape of key except for the last axis, {key.shape[:3]}; got shape "
            f"{value.shape}. Each key has one value."
        )
    if key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{function}: key must have the batch {query.shape[0]} and the features {query.shape[3]} of query; got "
            f"shape {key.shape}. The axes are [batch, length, heads, features]; repeat keys that are "
            "shared by jnp.broadcast_to."
        )
    if not query.shape[3]:
        raise ValueError(
            f"{function}: query and key must have at least one feature; got shape {query.shape}. The axes are [batch, "
            "length, heads, features]."
        )
    if not key.shape[2] or not query.shape[2] or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"{function}: query must have a multiple of the heads of key, {key.shape[2]}, and at least one; got "
            f"{query.shape[2]}. The heads are the second-to-last axis: swap them with the length if that is there."
        )
    return query, key, value


def _check_axis_name(function: str, axis_name: Any, query: Array, key: Array, value: Array) -> AxisName:
    axis_name = check_axis_name(function, axis_name)
    for name, a in (("query", query), ("key", key), ("value", value)):
        check_not_explicit(function, name, a)
    check_sharded(function, "key", key, axis_name)
    check_sharded(function, "value", value, axis_name)
    check_same(function, "query", query, axis_name)
    return axis_name


def _broadcast_to_scores(function: str, argument: str, a: Array, shape: tuple[int, ...], axis_name: AxisName) -> Array:
    """The array with four axes, which broadcast to `[B, N, T, S]`."""
    check_parts(function, shape, (3,), axis_name, **{argument: a})
    wide = a.reshape(*[1] * (4 - a.ndim), *a.shape)
    if wide.ndim != 4 or any(n not in (1, m) for n, m in zip(wide.shape, shape, strict=True)):
        raise ValueError(
            f"{function}: {argument} must broadcast to [batch, heads, queries, keys], {shape}; got shape {a.shape}. "
            f"Use axes of length 1 where it is the same for all; for padding write {argument}[:, None, None, :]."
        )
    return wide


def _check_bias(function: str, bias: Any, shape: tuple[int, ...], axis_name: AxisName) -> Array | None:
    if bias is None:
        return None
    array = arguments.as_array(function, "bias", bias)
    if array.dtype == jnp.bool_:
        raise TypeError(
            f"{function}: bias must be numbers that are added to the scores; got dtype {array.dtype}. Pass a boolean "
            "array as mask=…."
        )
    return _broadcast_to_scores(function, "bias", arguments.as_scores(function, "bias", array), shape, axis_name)


def _check_mask(function: str, mask: Any, shape: tuple[int, ...], axis_name: AxisName) -> Array | None:
    if mask is None:
        return None
    array = arguments.as_array(function, "mask", mask)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"{function}: mask must be boolean, True where a query sees a key; got dtype {array.dtype}. Compare first, "
            "e.g. mask > 0, or pass numbers that are to be added to the scores as bias=…."
        )
    return _broadcast_to_scores(function, "mask", array, shape, axis_name)


def _in_groups(a: Array, key_heads: int, groups: int) -> Array:
    """`[B, N, T, S]` as `[B, K, G, T, S]`."""
    heads = (1, 1) if a.shape[1] == 1 else (key_heads, groups)
    return a.reshape(a.shape[0], *heads, *a.shape[2:])


def _check_lengths(function: str, argument: str, lengths: Any, batch: int) -> Array | None:
    if lengths is None:
        return None
    array = arguments.as_array(function, argument, lengths)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{function}: {argument} must be integers; got dtype {array.dtype}. Write lengths.astype(int), or pass a "
            "mask of positions as mask[:, None, None, :]."
        )
    if array.shape != (batch,):
        raise ValueError(
            f"{function}: {argument} must have one length for each sequence of the batch, shape {(batch,)}; got shape "
            f"{array.shape}. If all have the length n, write jnp.full({batch}, n)."
        )
    return array.astype(jnp.int32)


def _within(a: Array, lengths: Array | None, first: Any) -> Array:
    """The array `[B, length, …]` with 0 beyond the lengths. first: the number of its first position."""
    if lengths is None:
        return a
    place = first + lax.broadcasted_iota(jnp.int32, (1, a.shape[1], 1, 1), 1)
    return jnp.where(place < lengths[:, None, None, None], a, 0)


def _check_number(function: str, argument: str, value: Any, wide: Any) -> Array:
    return arguments.check_option(function, value, wide, **{argument: (-math.inf, math.inf)})


def _check_window(function: str, window: Any) -> tuple[int, int] | None:
    if window is None:
        return None
    pair = window if isinstance(window, tuple) else (window, window)
    if len(pair) != 2 or not all(arguments.is_int(n) and n >= 0 for n in pair):
        raise ValueError(
            f"{function}: local_window_size must be an int >= 0, or a pair of them (left, right), known at trace time; "
            f"got {window!r}. (n, 0) lets a query see the key at its own position and the n keys before it."
        )
    return int(pair[0]), int(pair[1])


def _check_sink(function: str, sink: Any, key_heads: int, groups: int, wide: Any) -> Array | None:
    if sink is None:
        return None
    array = arguments.as_number(function, "sink", sink).astype(wide)
    heads = key_heads * groups
    if array.shape not in ((), (heads,)):
        raise ValueError(
            f"{function}: sink must be one score, or one for each head of query, shape {(heads,)}; got shape "
            f"{array.shape}. The sink is a class without a value; append keys that have values to key and value."
        )
    return jnp.broadcast_to(array, (heads,)).reshape(key_heads, groups)


# --- blocks --------------------------------------------------------------------------------------------------

_KEYS = {"cpu": 256, "elsewhere": 1024}
_SCORES = 2**23
"""The number of scores of a block: 32 MiB of float32."""
_FEWEST, _MOST = 64, 512
"""The fewest and the most queries of a block on CPU."""
_BLOCKS = 1024
"""The most blocks of a program for GPUs and TPUs; blocks grow to keep to it, up to _LARGEST scores."""
_LARGEST = 2**26


def _with_blocks(function: str, plan: Plan, block_size: Any, heads: int) -> Plan:
    """The plan with the caller's blocks on all platforms; if there are none, with blocks that suit each platform."""
    queries, keys = plan.shape
    if block_size is None:
        of_keys = near_divisor(keys, _KEYS["cpu"])
        of_queries = min(_MOST, max(_FEWEST, _SCORES // max(1, heads * of_keys)))
        plan = plan._replace(queries=near_divisor(queries, of_queries), keys=of_keys)
        scores = min(_LARGEST, max(_SCORES, heads * queries * keys // _BLOCKS))
        of_keys = near_divisor(keys, _KEYS["elsewhere"])
        of_queries = near_divisor(queries, max(1, scores // max(1, heads * of_keys)))
        return plan._replace(accelerator_block=(of_queries, of_keys))
    pair = block_size if isinstance(block_size, tuple) else (queries, block_size)
    if len(pair) != 2 or not all(arguments.is_int(n) and (n > 0 or n == queries) for n in pair):
        raise ValueError(
            f"{function}: block_size must be a positive int, the keys of a block, or a pair (queries, keys); got "
            f"{block_size!r}. Leave it out to have it chosen for you."
        )
    return plan._replace(queries=max(1, min(queries, pair[0])), keys=max(1, min(keys, pair[1])))


def near_divisor(length: int, wanted: int) -> int:
    """The length itself if it is at most 5/4 of what is wanted; else its largest divisor from more than half of what is
    wanted up to that; if there is none, what is wanted."""
    if length <= wanted * 5 // 4:
        return max(1, length)
    return next((n for n in range(wanted, wanted // 2, -1) if length % n == 0), wanted)
