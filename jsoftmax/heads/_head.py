"""The scores of a linear layer, block by block, and the loops of the streaming heads over the blocks (MATH 11.1)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax import maps
from jsoftmax._loops import checkpointed_scan, cut, pack_columns
from jsoftmax._precision import tangent_precision
from jsoftmax.sharding import AxisName, has_label, is_label, match_varying_axes, place_in_block, shard_index


class Head(NamedTuple):
    """Checked arguments, or their tangents, with the tokens as one axis. What is not given is None, and costs
    nothing."""

    hidden: Any = None
    """`[N, d]` in the accumulation dtype."""
    labels: Any = None
    """Integers `[N, m]`: m labels for each token."""
    targets: Any = None
    """Distributions `[N, V]`."""
    counted: Any = None
    """The number of tokens that count; they come first."""
    weight: Any = None
    """`[V, d]` in the dtype in which it is given: it is widened one block at a time."""
    bias: Any = None
    """`[V]`."""
    log_weights: Any = None
    """`[V]`."""
    where: Any = None
    """bool `[V]`."""
    banned: Any = None
    """Integers `[N, m]`, classes that each token leaves out. A number out of range bans no class."""
    least: Any = None
    """`[N, 1]`: classes with a smaller x are left out, except the mode."""
    mode: Any = None
    """Integers `[N, 1]`, a class that is always kept, however its x is rounded when it is computed again."""
    phi: Any = None
    soft_cap: Any = None
    temperature: Any = None
    margin: Any = None
    rounded: Any = None
    """`[N, d]`: `hidden` in the dtype of the factors of products, rounded once before a loop. It has no derivative."""

    def only(self, *names: str) -> "Head":
        """A head with these fields only."""
        return Head(**{name: getattr(self, name) for name in names})

    def widened(self, wide: Any) -> "Head":
        """Weight and bias in the accumulation dtype."""
        weight, bias = (None if a is None else a.astype(wide) for a in (self.weight, self.bias))
        return self._replace(weight=weight, bias=bias)

    def merge_fields(self, part: "Head") -> "Head":
        """This head, with the fields that `part` has taken from `part`."""
        return Head(*(a if b is None else b for a, b in zip(self, part, strict=True)))


class Plan(NamedTuple):
    """Everything that is not an array: the sizes of blocks, and how products are computed."""

    tokens: int
    classes: int
    dtype: Any
    """The dtype of the factors of a product; sums are in the accumulation dtype."""
    precision: Any
    axis_name: AxisName = None
    """The axis over which the classes are sharded; the head then has one part of them."""
    shards: int = 1
    """The number of parts that the classes have, or are to be cut into."""
    accelerator_block: Any = None
    """Tokens and classes of a block in programs for GPUs and TPUs. None: those of the plan itself."""
    tangent_precision: Any = None
    """The precision of products of tangents (backwards, of cotangents) where it differs from that of the scores."""
    kernel: bool = False
    """Whether the value's pass over the classes is the kernel for TPUs."""

    def on_accelerators(self) -> "Plan":
        """The plan for GPUs and TPUs: all tokens at once by blocks of classes, or the caller's blocks. Tangents are
        rounded to the dtype of narrow factors."""
        tokens, classes = self.accelerator_block or (self.tokens, self.classes)
        narrow = tangent_precision(self.dtype, self.precision)
        return self._replace(tokens=tokens, classes=classes, tangent_precision=narrow)


# --- scores of one block -------------------------------------------------------------------------------------


def wide_products(hidden: Array, weight: Array, precision: Any, wide: Any) -> Array:
    """h Wᵀ, with sums in the dtype `wide`."""
    return lax.dot_general(hidden, weight, (((1,), (1,)), ((), ())), precision, preferred_element_type=wide)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _narrow_products(hidden: Array, rounded: Array, weight: Array, plan: Plan) -> Array:
    return wide_products(rounded, weight.astype(plan.dtype), plan.precision, hidden.dtype)


@_narrow_products.defjvp
def _narrow_products_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """On CPU tangents are not narrowed; neither are, backwards, the sums over blocks."""
    (hidden, _, weight), (hidden_dot, _, weight_dot) = primals, tangents
    precision = plan.precision if plan.tangent_precision is None else plan.tangent_precision
    product = functools.partial(wide_products, precision=precision, wide=hidden.dtype)
    dot = product(hidden_dot, weight) + product(hidden, weight_dot)
    if plan.tangent_precision is not None:
        dot = dot.astype(plan.dtype).astype(dot.dtype)
    return _narrow_products(*primals, plan), dot


def products(hidden: Array, weight: Array, plan: Plan, rounded: Array | None = None) -> Array:
    """h Wᵀ, with factors in the plan's dtype and sums in the dtype of `hidden`. rounded: h in the plan's dtype, if the
    caller has it."""
    if plan.dtype == hidden.dtype:
        return wide_products(hidden, weight, plan.precision, plan.dtype)
    rounded = lax.stop_gradient(hidden).astype(plan.dtype) if rounded is None else rounded
    return _narrow_products(hidden, rounded, weight, plan)


def block_scores(head: Head, start: Array, plan: Plan) -> Array:
    """x of a widened block whose first class is `start`  (MATH 11.1)."""
    return scores_from_products(head, start, products(head.hidden, head.weight, plan, head.rounded))


def scores_from_products(head: Head, start: Array, o: Array) -> Array:
    """x = ψ(z) + log w,  z = c tanh((o + b)/c)/τ − m 1_y,  o = h Wᵀ  (MATH 11.1)."""
    per_class = (head.bias, head.where, head.log_weights)
    bias, where, log_weights = (None if a is None else lax.broadcast_to_rank(a, o.ndim) for a in per_class)
    if bias is not None:
        o = o + bias
    if head.soft_cap is not None:
        o = head.soft_cap * jnp.tanh(o / head.soft_cap)
    if head.temperature is not None:
        o = o / head.temperature
    if head.margin is not None:
        o = o - jnp.where(is_label(o.shape, head.labels, start=start), head.margin, 0)
    x = maps.weighted_scores(head.phi, o, where, log_weights)
    if head.banned is not None:
        x = without_labels(x, head.banned, start)
    if head.least is not None:
        x = jnp.where((x < head.least) & ~is_label(x.shape, head.mode, start=start), -jnp.inf, x)
    return x


def without_labels(a: Array, labels: Any, start: Array, value: float = -jnp.inf) -> Array:
    """a, which belongs to the classes of a block, with −inf (or another value) at the labels."""
    place, inside = place_in_block(labels, start, a.shape[1])
    return jnp.where(has_label(a, jnp.where(inside, place, a.shape[1])), value, a)


PER_CLASS = ("weight", "bias", "log_weights", "where")
PER_TOKEN = ("hidden", "rounded", "labels", "targets", "banned", "least", "mode")

# --- shards of the classes -----------------------------------------------------------------------------------


def map_shards(f: Callable[..., Any], given: Any, plan: Plan, *static: Any) -> Any:
    """f(given, *static, plan) for the heads' parts of one shard; f itself merges the shards over `plan.axis_name`.

    With `shards`, the shards of one array are mapped over, all at once. Where XLA has cut the array over devices
    nothing is moved, and each device works on its own part. The function is compiled by itself, except inside the
    caller's `jax.vmap(axis_name=…)`: there JAX would trace a rule of the compiled program again where the name is no
    longer bound.
    """
    if plan.axis_name is not None:
        return f(_own(given, plan.axis_name), *static, plan)
    return _compiled(f, given, plan, static)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _compiled(f: Callable[..., Any], given: Any, plan: Plan, static: tuple[Any, ...]) -> Any:
    if plan.shards == 1:
        return f(_own(given, None), *static, plan)
    leaves, structure = jax.tree.flatten(given)
    parts = [_part_of_shard(path, a, plan.shards) for path, a in jax.tree.leaves_with_path(given)]

    def of_shard(parts: list[Array]) -> Any:
        return f(jax.tree.unflatten(structure, parts), *static, plan._replace(axis_name=SHARDS))

    axes = [None if part is a else 0 for part, a in zip(parts, leaves, strict=True)]
    return jax.vmap(of_shard, in_axes=(axes,), out_axes=None, axis_name=SHARDS)(parts)


def _part_of_shard(path: Any, a: Array, shards: int) -> Array:
    """An array of classes is cut into shards, along a new first axis; another array with a derivative is copied for
    each shard; everything else stays as it is.

    Backwards, the shares of the copies are summed once, after the loops.
    """
    names = {key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)}.intersection(Head._fields)
    if not names.isdisjoint(PER_CLASS):
        return cut(a, a.shape[0] // shards)
    if "targets" in names:
        return cut(a, a.shape[1] // shards, 1)
    return jnp.broadcast_to(a, (shards, *a.shape)) if names and jnp.issubdtype(a.dtype, jnp.floating) else a


def _is_head(leaf: Any) -> bool:
    return isinstance(leaf, Head)


def _own(given: Any, axis_name: AxisName) -> Any:
    """Gives each device its own copy of what is the same on all devices, along the axes over which the classes or
    tokens of a head are sharded."""

    def own(head: Any) -> Any:
        if not _is_head(head):
            return head
        of_classes = head.only(*PER_CLASS, "targets")
        others = head._replace(**dict.fromkeys((*PER_CLASS, "targets")))
        others = match_varying_axes(others, head.weight, axis_name)
        return others.merge_fields(match_varying_axes(of_classes, others.hidden))

    return jax.tree.map(own, given, is_leaf=_is_head)


SHARDS = "jsoftmax_shards"


def first_class(head: Head, plan: Plan) -> Array:
    """The number of this shard's first class among the classes of all shards."""
    return shard_index(plan.axis_name) * head.weight.shape[0]


def vocabulary(head: Head, plan: Plan) -> int:
    """The number of classes of all shards together."""
    return head.weight.shape[0] * (1 if plan.axis_name is None else plan.shards)


# --- loops ---------------------------------------------------------------------------------------------------

Heads = tuple[Head, ...]


def scan_classes(  # noqa: PLR0917  (what a loop over blocks takes)
    step: Callable[..., Any], heads: Heads, dots: Heads, known: Any, state: Any, plan: Plan, *, pack_state: bool = False
) -> Any:
    """The state after all classes, by the blocks for the platform that the program is compiled for.

    pack_state: on GPUs and TPUs the state's numbers of tokens go through the loop as columns of one array.
    """
    other_plan = plan.on_accelerators()
    on_cpu, elsewhere = (functools.partial(_scan_blocks, step, plan=p) for p in (plan, other_plan))
    if pack_state:
        elsewhere = functools.partial(_scan_packed, step, plan=other_plan)
    if other_plan == plan:  # it is that of accelerators already, where it rounds tangents, or the same everywhere
        return (on_cpu if plan.tangent_precision is None else elsewhere)(heads, dots, known, state)
    return lax.platform_dependent(heads, dots, known, state, cpu=on_cpu, default=elsewhere)


def _scan_packed(  # noqa: PLR0917  (as `scan_classes` has them)
    step: Callable[..., Any], heads: Heads, dots: Heads, known: Any, state: Any, plan: Plan
) -> Any:
    """As `_scan_blocks`, with the state's numbers of tokens as columns of one array. With fewer than three columns a
    GPU needs more kernels this way."""
    packed, unpack = pack_columns(state)
    if packed[0].shape[1] < 3:
        return _scan_blocks(step, heads, dots, known, state, plan)

    def packed_step(*args: Any, state: Any, **options: Any) -> Any:
        return pack_columns(step(*args, state=unpack(state), **options))[0]

    return unpack(_scan_blocks(packed_step, heads, dots, known, packed, plan))


def _scan_blocks(  # noqa: PLR0917  (as `scan_classes` has them)
    step: Callable[..., Any], heads: Heads, dots: Heads, known: Any, state: Any, plan: Plan
) -> Any:
    """The state `[N, …]` after step(blocks, their tangents, start=, known=, state=, plan=) for each block of classes
    and tokens.

    The heads have the same vocabulary and the same tokens; `known` has numbers of the tokens that are known already.
    Blocks of classes are the outer loop, so that the gradient of a block's weight is summed over the tokens before it
    is narrowed. If blocks divide the vocabulary, the weight is read in place; otherwise it is copied to be padded. If
    the classes are sharded, the loop is over those of this shard, and `start` counts the classes of all shards.
    """
    classes, wide = heads[0].weight.shape[0], heads[0].hidden.dtype
    heads = tuple(_with_rounded(with_padding(head, plan), plan) for head in heads)
    blocks = jax.tree.map(lambda a: cut(a, plan.classes), [_select_fields(trees, PER_CLASS) for trees in (heads, dots)])
    padded = [jax.tree.map(lambda q: jnp.pad(q, [(0, 0), (0, -classes % plan.classes)]), h.targets) for h in heads]
    rates = [jax.tree.map(lambda q: cut(q, plan.classes, 1), d.targets) for d in dots]
    starts = jnp.arange(0, classes, plan.classes, dtype=jnp.int32)
    first = first_class(heads[0], plan)

    def body(state: Any, xs: Any) -> tuple[Any, None]:
        (of_heads, of_dots), rates, start = xs
        (of_heads, of_dots) = (tuple(part.widened(wide) for part in parts) for parts in (of_heads, of_dots))
        targets = jax.tree.map(lambda q: lax.dynamic_slice_in_dim(q, start, plan.classes, 1), padded)
        whole = _merge_fields(heads, [h._replace(targets=q) for h, q in zip(of_heads, targets, strict=True)])
        whole_dots = _merge_fields(dots, [d._replace(targets=q) for d, q in zip(of_dots, rates, strict=True)])
        return _scan_tokens(
            functools.partial(step, start=first + start, plan=plan), whole, whole_dots, known, state, plan
        ), None

    return checkpointed_scan(body, state, (blocks, rates, starts))[0]


def _scan_tokens(  # noqa: PLR0917  (as `scan_classes` has them)
    step: Any, heads: Heads, dots: Heads, known: Any, state: Any, plan: Plan
) -> Any:
    """The state after the step for each block of tokens. Blocks in which no token counts are skipped."""
    tokens, counted = heads[0].hidden.shape[0], heads[0].counted
    if tokens == plan.tokens:
        return step(heads, dots, known=known, state=state)

    def body(first: Array, xs: Any) -> tuple[Array, Any]:
        rows, rows_dots, known, old = xs

        def run(old: Any) -> Any:
            return step(_merge_fields(heads, rows), _merge_fields(dots, rows_dots), known=known, state=old)

        new = run(old) if counted is None else lax.cond(first < counted, run, lambda old: old, old)
        return first + plan.tokens, new

    rows = (_select_fields(heads, PER_TOKEN), _select_fields(dots, PER_TOKEN), known, state)
    xs = jax.tree.map(lambda a: cut(a, plan.tokens), rows)
    _, new = checkpointed_scan(body, jnp.zeros((), jnp.int32), xs)
    return jax.tree.map(lambda a: a.reshape(tokens, *a.shape[2:]), new)


def _select_fields(heads: Heads, names: tuple[str, ...]) -> Heads:
    return tuple(head.only(*names) for head in heads)


def _merge_fields(heads: Heads, parts: Any) -> Heads:
    return tuple(head.merge_fields(part) for head, part in zip(heads, parts, strict=True))


def _with_rounded(head: Head, plan: Plan) -> Head:
    """The head, with hidden states that are rounded once, not again for each block, where tangents are rounded."""
    if plan.tangent_precision is None:
        return head
    return head._replace(rounded=lax.stop_gradient(head.hidden).astype(plan.dtype))


def with_padding(head: Head, plan: Plan) -> Head:
    """The head, with a mask if blocks do not divide the vocabulary: it leaves out the zeros that `cut` adds."""
    classes = head.weight.shape[0]
    if classes % plan.classes and head.where is None:
        return head._replace(where=jnp.ones(classes, bool))
    return head
