"""Scores of a block of queries and a block of keys, and the loops over blocks (MATH 14.1)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax import maps
from jsoftmax._loops import checkpointed_scan, cut
from jsoftmax._precision import tangent_precision
from jsoftmax._pytree import without_zeros
from jsoftmax.sharding import AxisName, shard_index


class Inputs(NamedTuple):
    """Checked arguments, or their tangents, in the accumulation dtype. What is not given is None, and costs nothing.

    B is the batch, K the heads of keys, G the heads of queries for each of these, T the queries, S the keys of this
    shard, and H the features.
    """

    query: Any = None
    """`[B, K, G, T, H]`."""
    key: Any = None
    """`[B, K, S, H]`."""
    value: Any = None
    """`[B, K, S, H']`."""
    bias: Any = None
    """`[B, K, G, T, S]`, where each axis may have length 1 instead."""
    mask: Any = None
    """bool, of such a shape."""
    query_lengths: Any = None
    """Integers `[B]`."""
    key_lengths: Any = None
    """Integers `[B]`, lengths that count the keys of all shards."""
    scale: Any = None
    soft_cap: Any = None
    sink: Any = None
    """`[K, G]`."""
    phi: Any = None

    def only(self, *names: str) -> "Inputs":
        """Inputs with these fields only."""
        return Inputs(**{name: getattr(self, name) for name in names})

    def with_wide_bias(self, dtype: Any) -> "Inputs":
        """The same inputs, with the bias in the accumulation dtype."""
        return self if self.bias is None else self._replace(bias=self.bias.astype(dtype))

    def with_fields(self, part: "Inputs") -> "Inputs":
        """These inputs, with the fields that `part` has taken from `part`."""
        return Inputs(*(a if b is None else b for a, b in zip(self, part, strict=True)))


class Plan(NamedTuple):
    """Everything that is not an array: the sizes of blocks, which keys a query may see, and how products are
    computed."""

    queries: int
    """How many queries a block has."""
    keys: int
    """How many keys a block has."""
    shape: tuple[int, int]
    """The number of all queries, and of the keys of this shard."""
    dtype: Any
    """The dtype of the factors of a product; sums are in the accumulation dtype."""
    precision: Any
    is_causal: bool = False
    window: tuple[int, int] | None = None
    """How many keys before and after its own position a query sees."""
    axis_name: AxisName = None
    """The axis over which the keys are sharded."""
    skips: bool = True
    """Whether blocks in which no query sees a key are skipped. Not where `jax.vmap(axis_name=…)` maps over their
    positions: that turns a `lax.cond` into a select, of which JAX has no transpose."""
    accelerator_block: tuple[int, int] | None = None
    """Queries and keys of a block in programs for GPUs and TPUs. None: those of the plan itself."""
    tangent_precision: Any = None
    """The precision of products of tangents (backwards, of cotangents) where it differs from that of the scores."""

    def on_accelerators(self) -> "Plan":
        """The plan for GPUs and TPUs, where tangents are rounded to the dtype of narrow factors."""
        queries, keys = self.accelerator_block or (self.queries, self.keys)
        narrow = tangent_precision(self.dtype, self.precision)
        return self._replace(queries=queries, keys=keys, tangent_precision=narrow)


class Place(NamedTuple):
    """The position of a block: its first query, its first key, and the number of this key among those of all shards."""

    query: Any
    key: Any
    key_of_all: Any


# --- products and scores of one block ------------------------------------------------------------------------


def _dot(a: Array, b: Array, axis: int, precision: Any, dtype: Any = None) -> Array:
    dtype = a.dtype if dtype is None else dtype
    return lax.dot_general(a, b, (((3,), (axis,)), ((0, 1), (0, 1))), precision, preferred_element_type=dtype)


def tangent_product(a: Array, b: Array, axis: int, plan: Plan) -> Array:
    """As `product`, of which a factor is a tangent: that is not narrowed on CPU."""
    return _dot(a, b, axis, plan.precision if plan.tangent_precision is None else plan.tangent_precision)


def rounded_tangent(a: Array, plan: Plan) -> Array:
    """The tangent as `tangent_product` will take it: rounded to the dtype of narrow factors on GPUs and TPUs.

    Not by casts there and back, which XLA may drop.
    """
    if plan.tangent_precision is None:
        return a
    narrow = jnp.finfo(plan.dtype)
    return lax.reduce_precision(a, narrow.nexp, narrow.nmant)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _narrow_product(a: Array, b: Array, axis: int, plan: Plan) -> Array:
    return _dot(a.astype(plan.dtype), b.astype(plan.dtype), axis, plan.precision, a.dtype)


@functools.partial(_narrow_product.defjvp, symbolic_zeros=True)
def _narrow_product_jvp(axis: int, plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """On CPU tangents are not narrowed; neither are, backwards, the sums over blocks."""
    (a, b), (a_dot, b_dot) = primals, without_zeros(tangents)
    terms = [] if a_dot is None else [tangent_product(a_dot, b, axis, plan)]
    terms += [] if b_dot is None else [tangent_product(a, b_dot, axis, plan)]
    return _narrow_product(a, b, axis, plan), sum(terms[1:], terms[0])


def product(a: Array, b: Array, axis: int, plan: Plan) -> Array:
    """The product of a `[B, K, R, n]` and b `[B, K, S, H]` over n, which is an axis of b, with factors in the plan's
    dtype."""
    if plan.dtype == a.dtype:
        return _dot(a, b, axis, plan.precision)
    return _narrow_product(a, b, axis, plan)


def block_scores(block: Inputs, place: Place, plan: Plan) -> Array:
    """x = ψ(s) `[B, K, R, S]`, −∞ where a query does not see a key;  s = c tanh((scale q·k + b)/c)  (MATH 14.1)."""
    if plan.dtype == block.query.dtype:
        s = product(block.query * block.scale, block.key, 3, plan)
    else:  # narrow factors stay as they are
        s = product(block.query, block.key, 3, plan) * block.scale
    rows = functools.partial(_in_rows, groups=s.shape[2] // plan.queries, queries=plan.queries)
    kept, bias = _kept(block, place, plan), block.bias
    if bias is not None and block.soft_cap is not None:
        kept = _both(kept, bias != -jnp.inf)  # −∞ leaves a key out under the cap, too
        bias = jnp.where(kept, bias, 0)  # where a key is left out the bias may be NaN, and 0 · NaN is NaN
    if bias is not None:
        s = s + rows(bias)
    if block.soft_cap is not None:
        s = block.soft_cap * jnp.tanh(s / block.soft_cap)
    return maps.weighted_scores(block.phi, s, None if kept is None else rows(kept), None)


def _in_rows(a: Array, groups: int, queries: int) -> Array:
    """An array with five axes that broadcasts to `[B, K, G, T, S]`, with groups and queries merged into one axis."""
    if groups > 1:
        a = jnp.broadcast_to(a, (*a.shape[:2], groups, queries, a.shape[4]))
    return a.reshape(*a.shape[:2], a.shape[2] * a.shape[3], a.shape[4])


def _kept(block: Inputs, place: Place, plan: Plan) -> Array | None:
    """Which keys the queries of a block see, as a mask that broadcasts to `[B, K, G, T, S]`; None if they see all."""
    query = place.query + lax.broadcasted_iota(jnp.int32, (1, 1, 1, plan.queries, 1), 3)
    key = place.key_of_all + lax.broadcasted_iota(jnp.int32, (1, 1, 1, 1, plan.keys), 4)
    kept = block.mask
    if plan.is_causal:
        kept = _both(kept, key <= query)
    if plan.window is not None:
        kept = _both(kept, (query <= key + plan.window[0]) & (query >= key - plan.window[1]))
    if block.query_lengths is not None:
        kept = _both(kept, query < _of_batch(block.query_lengths))
    if block.key_lengths is not None:
        kept = _both(kept, key < _of_batch(block.key_lengths))
    queries, keys = plan.shape
    if queries % plan.queries:  # leaves out the padding of `cut`
        kept = _both(kept, query < queries)
    if keys % plan.keys:
        kept = _both(kept, key - place.key_of_all + place.key < keys)
    return kept


def _of_batch(a: Array) -> Array:
    return a[:, None, None, None, None]


def _both(a: Array | None, b: Array | None) -> Any:
    return b if a is None else a if b is None else a & b


def _may_see(place: Place, plan: Plan) -> Any:
    """Whether, by their positions, any query of the block may see any key of it; None if this is always so."""
    first, key = place.query, place.key_of_all
    last, last_key = first + plan.queries - 1, key + plan.keys - 1
    sees = None
    if not plan.skips:
        return sees
    if plan.is_causal:
        sees = key <= last
    if plan.window is not None:
        sees = _both(sees, (first <= last_key + plan.window[0]) & (last >= key - plan.window[1]))
    return sees


# --- loops ---------------------------------------------------------------------------------------------------

QUERY_AXIS = {"query": 3, "bias": 3, "mask": 3}
BIAS_KEY_AXIS = {"bias": 4, "mask": 4}

Step = Callable[..., Any]
Pair = tuple[Inputs, Inputs]
"""Arguments, and their tangents."""


def over_blocks(step: Step, pair: Pair, known: Any, initial: Any, plan: Plan) -> Any:
    """The state `[B, K, G, T, …]` of all queries after all keys, by the blocks for the platform that the program is
    compiled for.

    The state of a block of queries begins as `initial(block)` `[B, K, R, …]`, R = G · T, and each block of keys changes
    it by step(block, its tangents, place=, known=, state=, plan=). `known` has numbers of the queries that are known
    already.
    """
    other_plan = plan.on_accelerators()
    on_cpu, elsewhere = (functools.partial(_over_queries, step, initial, plan=p) for p in (plan, other_plan))
    if other_plan == plan:
        return on_cpu(pair, known)
    return lax.platform_dependent(pair, known, cpu=on_cpu, default=elsewhere)


def _over_queries(step: Step, initial: Any, pair: Pair, known: Any, *, plan: Plan) -> Any:
    """Blocks of queries are the outer loop, so that the state of one block stays in the cache."""
    query = pair[0].query
    groups, queries = query.shape[2:4]
    of_keys = jax.tree.map(lambda a: cut(a, plan.keys, 2), [tree.only("key", "value") for tree in pair])

    def in_rows(a: Any) -> Any:
        return None if a is None else a.reshape(*a.shape[:2], groups * plan.queries, *a.shape[4:])

    def in_groups(a: Array) -> Array:
        return a.reshape(*a.shape[:2], groups, plan.queries, *a.shape[3:])

    def body(first: Array, xs: Any) -> tuple[Array, Any]:
        parts, of_queries = xs
        parts = [part._replace(query=in_rows(part.query)) for part in parts]
        rows = [tree.with_fields(part).with_wide_bias(query.dtype) for tree, part in zip(pair, parts, strict=True)]
        over_keys = functools.partial(_over_keys, step, known=jax.tree.map(in_rows, of_queries), plan=plan)
        return first + plan.queries, jax.tree.map(in_groups, over_keys(rows, of_keys, first, initial(rows[0])))

    of_blocks = jax.tree.map(lambda a: cut(a, plan.queries, 3), (_cut_fields(pair, QUERY_AXIS), known))
    _, states = checkpointed_scan(body, jnp.zeros((), jnp.int32), of_blocks)
    return jax.tree.map(lambda a: joined(a, queries, 3), states)


def _over_keys(step: Step, rows: Any, of_keys: Any, first: Array, state: Any, *, known: Any, plan: Plan) -> Any:
    """The state of a block of queries. Blocks of keys in which they see none are skipped."""
    of_shard = shard_index(plan.axis_name) * rows[0].key.shape[2]
    of_both = jax.tree.map(lambda a: cut(a, plan.keys, 4), _cut_fields(rows, BIAS_KEY_AXIS))

    def body(carry: Any, xs: Any) -> tuple[Any, None]:
        start, old = carry
        block, dots = (tree.with_fields(a).with_fields(b) for tree, a, b in zip(rows, *xs, strict=True))
        place = Place(first, start, of_shard + start)

        def run(old: Any) -> Any:
            return step(block, dots, place=place, known=known, state=old, plan=plan)

        sees = _may_see(place, plan)
        new = run(old) if sees is None else lax.cond(sees, run, lambda old: old, old)
        return (start + plan.keys, new), None

    return checkpointed_scan(body, (jnp.zeros((), jnp.int32), state), (of_keys, of_both))[0][1]


def _cut_fields(pair: Any, axes: dict[str, int]) -> list[Inputs]:
    """Of arguments and tangents, the fields with an axis to be cut; a bias or a mask may have length 1 there."""

    def has(name: str) -> bool:
        a = getattr(pair[0], name)
        return name == "query" or (a is not None and a.shape[axes[name]] > 1)

    names = [name for name in axes if has(name)]
    return [tree.only(*names) for tree in pair]


def joined(a: Array, length: int, axis: int) -> Array:
    """The blocks joined to one axis again, without the padding of `cut`."""
    a = jnp.moveaxis(a, 0, axis)
    a = a.reshape(*a.shape[:axis], a.shape[axis] * a.shape[axis + 1], *a.shape[axis + 2 :])
    return lax.slice_in_dim(a, 0, length, axis=axis)
