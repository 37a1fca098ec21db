"""The pass over the classes as one kernel for TPUs, an experiment: scores never leave the chip (MATH 11.2).

The kernel runs `block_statistics` and `merge`, as the loop of the XLA form does. It differs in where a block's scores
are: XLA writes them to memory and reads them again for each reduction; here they are in the chip's own memory, its
VMEM. This module is imported only where the kernel is asked for, because Pallas takes half a second to import.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jsoftmax.heads._head import PER_CLASS, PER_TOKEN, Head, Plan, first_class, scores_from_products, wide_products
from jsoftmax.heads._statistics import Extras, PartialStatistics, block_statistics, initial, merge
from jsoftmax.heads._top import mode
from jsoftmax.sharding import is_label, shape_like, varying_axes

Loop = Callable[[Head], PartialStatistics]

VMEM = 64 * 2**20
"""What the kernel may take of the chip's memory. A v5p and a v7x have 64 MiB, a v5e and a v6e 128. A v4 has 16, too few
for it."""

TOKENS, CLASSES, WEIGHT = 2048, 512, 2**21
"""The most tokens and classes of a block, and the most bytes of its part of the weight; hidden states may take four
times as many."""


def partial_statistics(head: Head, wanted: Extras, plan: Plan, loop: Loop) -> PartialStatistics:
    """What the loop over blocks gives.

    Programs for CPUs interpret the kernel, slowly; but where `jax.shard_map` checks along which axes arrays differ,
    JAX cannot interpret it, and the loop runs. There is no form for GPUs, which `_implementation` refuses.
    """
    if not all(a.size for a in jax.tree.leaves(head)):
        return loop(head)
    varies = any(varying_axes(a) for a in jax.tree.leaves(head))
    on_tpu, interpreted = (functools.partial(_run_kernel, wanted, plan, on_cpu) for on_cpu in (False, True))
    return lax.platform_dependent(head, tpu=on_tpu, cpu=loop if varies else interpreted)


def block_sizes(tokens: int, classes: int, features: int, dtype: Any) -> tuple[int, int]:
    """Tokens and classes of a block: whole tiles of 16 × 128 numbers."""

    def whole(tile: int, wanted: int, *limits: int) -> int:
        return max(tile, min(-(-wanted // tile) * tile, *(limit // tile * tile for limit in limits)))

    row = features * jnp.dtype(dtype).itemsize
    return whole(16, tokens, TOKENS, 4 * WEIGHT // row), whole(128, classes, CLASSES, WEIGHT // row)


def _run_kernel(wanted: Extras, plan: Plan, interpreted: bool, head: Head) -> PartialStatistics:
    first = first_class(head, plan)
    labels = None if head.labels is None else (head.labels - first).astype(jnp.int32)
    head = head._replace(counted=None, labels=labels)
    (tokens, features), classes, wide = head.hidden.shape, head.weight.shape[0], head.hidden.dtype
    of_tokens, of_classes = block_sizes(tokens, classes, features, plan.dtype)
    state = jax.eval_shape(lambda head: initial(head, wanted), head)
    given, kept = _as_matrices(head._replace(hidden=head.hidden.astype(plan.dtype))), _as_columns(state, head.hidden)

    def kernel(*refs: Any) -> None:
        arrays, sums = refs[: len(given)], jax.tree.unflatten(jax.tree.structure(state), refs[len(given) :])
        block = jax.tree.unflatten(jax.tree.structure(head), [ref[...] for ref in arrays])
        number = pl.program_id(1)
        start = number * of_classes
        inside = start + lax.broadcasted_iota(jnp.int32, (1, of_classes), 1) < classes
        if block.where is not None:
            block = block._replace(where=inside & (block.where != 0))
        elif classes % of_classes:  # the last block is not full, and what pads it is no class
            block = block._replace(where=inside)

        @pl.when(number == 0)
        def _() -> None:
            _write(sums, initial(block._replace(hidden=block.hidden[:, :1].astype(wide)), wanted))

        o = wide_products(block.hidden, block.weight.astype(plan.dtype), plan.precision, wide)
        x = scores_from_products(block.widened(wide), start, o)
        new = block_statistics(block, wanted, start, x, plan, _label_scores, lambda x, k, plan: mode(x))
        old = jax.tree.map(lambda ref, a: ref[...] if a.ndim == 2 else ref[...][:, 0], sums, state)
        _write(sums, merge(old, new, plan))

    def specification(name: str, columns: int) -> pl.BlockSpec:
        if name == "weight":
            return pl.BlockSpec((of_classes, columns), lambda i, j: (j, 0))
        if name in PER_CLASS:
            return pl.BlockSpec((1, of_classes), lambda i, j: (0, j))
        if name in PER_TOKEN:
            return pl.BlockSpec((of_tokens, columns), lambda i, j: (i, 0))
        return pl.BlockSpec((1, 1), lambda i, j: (0, 0))

    grid = pl.cdiv(tokens, of_tokens), pl.cdiv(classes, of_classes)
    moved = [a.size * a.dtype.itemsize * (grid[0] if name in PER_CLASS else 1) for name, a in given]
    found = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[specification(name, a.shape[1]) for name, a in given],
        out_specs=[specification("hidden", a.shape[1]) for a in kept],
        out_shape=kept,
        interpret=interpreted,
        name="statistics",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * classes * features,
            transcendentals=tokens * classes,
            bytes_accessed=sum(moved) + sum(a.size * a.dtype.itemsize for a in kept),
        ),
    )(*(a for _, a in given))
    shaped = [a if like.ndim == 2 else a[:, 0] for a, like in zip(found, jax.tree.leaves(state), strict=True)]
    done = jax.tree.unflatten(jax.tree.structure(state), shaped)
    return done if done.top_class is None else done._replace(top_class=first + done.top_class)


def _label_scores(labels: Array, start: Array, x: Array) -> Array:
    """x_y of labels in the block, by comparisons, since a kernel cannot pick."""
    here = [is_label(x.shape, labels[:, i : i + 1], start=start) for i in range(labels.shape[1])]
    return jnp.concatenate([jnp.max(jnp.where(is_here, x, -jnp.inf), 1, keepdims=True) for is_here in here], 1)


def _as_matrices(head: Head) -> list[tuple[str, Array]]:
    """The arrays of a head with two axes, by their fields' names: classes `[1, V]`, numbers `[1, 1]`."""

    def matrix(name: str, a: Any) -> Array:
        a = jnp.asarray(a)
        a = a.astype(jnp.int32) if name == "where" else a
        return a if a.ndim == 2 else a.reshape(1, a.size)

    return [(path[0].name, matrix(path[0].name, a)) for path, a in jax.tree.leaves_with_path(head)]


def _as_columns(state: PartialStatistics, hidden: Array) -> list[jax.ShapeDtypeStruct]:
    """The shapes of the state with two axes: numbers of tokens `[N, 1]`."""
    shapes = [(a.shape[0], a.shape[1] if a.ndim == 2 else 1) for a in jax.tree.leaves(state)]
    return [shape_like(shape, a.dtype, hidden) for shape, a in zip(shapes, jax.tree.leaves(state), strict=True)]


def _write(refs: Any, values: PartialStatistics) -> None:
    for ref, a in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = a.reshape(ref.shape)
