"""Classes drawn from p, by the inverse of its distribution function in whole numbers, or by noise (MATH 10.2)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, PRNGKeyArray

from jsoftmax.checks.arguments import check_flag, public
from jsoftmax.checks.sampling import check_key, check_shape
from jsoftmax.gumbel import _noise
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import (
    AxisName,
    apply_to_rows,
    check_same,
    concatenate_shards,
    even_length,
    local_value_at_label,
    pick,
    psum,
    shard_count,
    shard_index,
)
from jsoftmax.sums import by_platform, has_bad_score, is_read_once

_TOTAL = float(2**31 - 2**7)  # the largest float32 that int32 holds
_GROUPS = 16
_GOLDEN = 0x9E3779B9  # 2^32 times the golden section


def _whole_numbers(key: Any, x: Array, axis_name: AxisName) -> Array:
    """w `[..., K]`, whole numbers with mean 2^31 p. Each is rounded up or down at random, so that small p are right,
    too: a row has one random offset, which steps by the golden section from class to class  (MATH 10.2)."""
    share = normalize(x, (x.ndim - 1,), axis_name).p * _TOTAL
    whole = jnp.floor(share)
    first = shard_index(axis_name).astype(jnp.uint32) * x.shape[-1]
    steps = (first + jnp.arange(x.shape[-1], dtype=jnp.uint32)) * jnp.uint32(_GOLDEN)
    offset = (jax.random.bits(key, (*x.shape[:-1], 1), "uint32") + lax.broadcast_to_rank(steps, x.ndim)) >> 8
    up = share - whole > offset.astype(jnp.int32).astype(x.dtype) * 2.0**-24
    return (whole.astype(jnp.int32) + up.astype(jnp.int32)).astype(jnp.uint32)


def _cumulative(w: Array) -> Array:
    """Cumulative sums over the last axis, in groups that divide it: XLA on CPU takes groups of 16, and is slow if they
    leave a remainder."""
    length = w.shape[-1]
    few = max(n for n in range(1, 17) if length % n == 0)
    F = jnp.cumsum(w.reshape(*w.shape[:-1], length // few, few), -1)
    totals = F[..., -1]
    before = jnp.cumsum(totals, -1) - totals
    return (F + before[..., None]).reshape(w.shape)


def _high_word(a: Array, b: Array) -> Array:
    """⌊a b / 2^32⌋ for 32-bit a and b, computed from halves of 16 bits."""
    (a_high, a_low), (b_high, b_low) = ((c >> 16, c & 0xFFFF) for c in (a, b))
    middle = a_high * b_low + (a_low * b_low >> 16)
    return a_high * b_high + (middle >> 16) + ((middle & 0xFFFF) + a_low * b_high >> 16)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(key: Any, x: Array, draws: int, axis_name: AxisName) -> Array:
    """Drawn classes `[..., draws]`, numbered over all shards.

    Each shard adds up its own w, in groups, so that classes that are sharded under plain `jit` are not gathered,
    either. Then it finds the draws that fall to it: first the block of a few classes, by the sums of blocks, then the
    class within the block. So no number is stored for each class. For many draws, blocks have one class.
    """
    of_rounding, of_draws = jax.random.split(key)
    w = _whole_numbers(of_rounding, lax.stop_gradient(x), axis_name)
    classes = x.shape[-1]
    groups = math.gcd(classes, _GROUPS)
    few = draws * _GROUPS <= classes
    length = _block_length(classes // groups, groups * draws) if few else 1
    blocks = _in_blocks(w.reshape(*x.shape[:-1], groups, classes // groups), length)
    F = _cumulative(jnp.sum(blocks, -1, dtype=jnp.uint32))
    totals = concatenate_shards(F[..., -1], shard_count(axis_name), axis_name)
    ends = jnp.cumsum(totals, -1)
    before = lax.dynamic_slice_in_dim(ends - totals, shard_index(axis_name) * groups, groups, -1)
    if not few:  # searching every group would take longer than adding them up
        F, groups = (F + (before - before[..., :1])[..., None]).reshape(*x.shape[:-1], 1, classes), 1
        before = before[..., :1]
    r = _high_word(jax.random.bits(of_draws, (*x.shape[:-1], draws), "uint32"), ends[..., -1:])
    own = r[..., None, :] - before[..., None]  # for draws of an earlier group this wraps round to a large number
    inside = own < F[..., -1:]
    own = jnp.where(inside, own, 0)
    drawn = _search(F, own)
    if length > 1:
        left = own - jnp.where(drawn > 0, jnp.take_along_axis(F, drawn - 1, -1), 0)
        drawn = drawn * length + _within(jnp.take_along_axis(blocks, drawn[..., None], -2), left)
    first = shard_index(axis_name) * classes + classes // groups * jnp.arange(groups, dtype=jnp.int32)
    drawn = lax.broadcast_to_rank(first[:, None], drawn.ndim) + drawn
    return psum(jnp.sum(jnp.where(inside, drawn, 0), -2, dtype=jnp.int32), axis_name)


def _block_length(classes: int, searches: int) -> int:
    """How many classes a block has: about the square root of the group's, or 1 where that many searches within blocks
    would take longer than adding up all classes."""
    length = 2 ** round(math.log2(classes) / 2)
    return length if length > 4 and searches * length <= classes * _GROUPS else 1


def _in_blocks(w: Array, length: int) -> Array:
    """`[..., classes]` as `[..., blocks, length]`, padded with w = 0 where blocks do not divide the classes."""
    blocks = -(-w.shape[-1] // length)
    if w.shape[-1] % length:
        w = jnp.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, blocks * length - w.shape[-1])])
    return w.reshape(*w.shape[:-1], blocks, length)


def _within(w: Array, left: Array) -> Array:
    """The first class of each block `[..., length]` with F > left. A compiler may compute w twice and round it
    differently; `left` is limited to the sum found here, so that the class has w > 0 all the same."""
    F = jnp.cumsum(w, -1)
    left = jnp.minimum(left, jnp.maximum(F[..., -1], 1) - 1)
    return jnp.sum(left[..., None] >= F, -1, dtype=jnp.int32)


def _search(F: Array, r: Array) -> Array:
    """The first class of each row with F > r."""
    search = functools.partial(jnp.searchsorted, side="right")
    for _ in range(F.ndim - 1):
        search = jax.vmap(search)
    return search(F, r).astype(jnp.int32)


def _keep_possible(drawn: Array, x: Array, axis_name: AxisName) -> Array:
    """The draws `[..., n]`, with −1 where the class is left out or the row has a NaN or +inf."""
    bad = has_bad_score(x, (x.ndim - 1,))

    def left_out(own: Array) -> Array:
        return (~(pick(x, own) > -jnp.inf)).astype(jnp.int32)

    out = local_value_at_label(left_out, drawn, x.shape[-1], axis_name)
    impossible = psum(bad.astype(jnp.int32) + out, axis_name) > 0
    return jnp.where(impossible, -1, drawn)


_BLOCK = 128
"""The length of the blocks in which a GPU compares the classes of a row."""


@functools.partial(jax.jit, static_argnames="in_blocks")
def _draw_by_noise(key: Any, x: Array, in_blocks: bool = False) -> Array:
    """The class of the largest x + g, `[..., 1]`; −1 in a row without classes, or with a score of NaN or +inf.

    GPUs and TPUs read x once, and compute the noise meanwhile. Two classes are compared by differences, of x and of g,
    so that an x far from 0 does not round the noise away. in_blocks: the best class of each block is found first. XLA
    for GPUs would write the noise to memory for few rows, which it compares with few threads.
    """
    x = lax.stop_gradient(x)
    classes = jnp.where(jnp.abs(x) < jnp.inf, lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1), -1)

    def larger(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        (x_a, g_a, k_a), (x_b, g_b, k_b) = a, b
        ahead, behind = x_a - x_b, g_b - g_a
        # a NaN or +inf wins, and makes the row bad
        first = (ahead > behind) | ((ahead == behind) & (k_a < k_b)) | ~(x_a < jnp.inf)
        return tuple(jnp.where(first, one, other) for one, other in zip(a, b, strict=True))

    start = jnp.array(-jnp.inf, x.dtype), jnp.zeros((), x.dtype), jnp.full((), -1, jnp.int32)
    best = x, _noise.gumbel(key, x.shape, x.dtype), classes
    if length := in_blocks and even_length(x.shape[-1], _BLOCK):
        best = tuple(a.reshape(*x.shape[:-1], x.shape[-1] // length, length) for a in best)
        best = lax.reduce(best, start, larger, (x.ndim,))
    return lax.reduce(best, start, larger, (x.ndim - 1,))[2][..., None]


@public
def categorical(  # noqa: PLR0917  (as jax.random has them)
    key: PRNGKeyArray | ArrayLike,
    z: ArrayLike,
    axis: int = -1,
    shape: tuple[int, ...] | None = None,
    replace: bool = True,
    mode: str | None = None,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Integer[Array, "..."]:
    """Classes drawn from p = w φ(z) / Σ w φ(z).

    P(k) = p_k;   k is the first class with F_k > U F_K,  F the cumulative sums of p, U uniform     (MATH 10.2)

    It takes one random number for each draw and computes p once; `jax.random.categorical` takes one for each draw and
    class. So a million draws from one row need no array of draws × classes. For a single draw of each row, GPUs and
    TPUs take one random number for each class, which is faster there; the same key then gives another draw than on CPU.

    Args:
      key: a PRNG key.
      z: scores `[..., K]`, any floating dtype; integers promote.
      axis: int: the classes' axis.
      shape: the result's, which ends in the scores' shape without the classes, `[...]`: what stands before counts the
        draws of each row. None: one draw.
      replace: False: the draws of one row are distinct, in the order of a draw without replacement (`gumbel_top_k`).
      mode: None, or 'low' or 'high': by `jax.random.categorical` with Gumbel noise of that resolution, with its draws.
      phi, where, log_weights: as in `jsoftmax.softmax`.
      axis_name: as there, where the classes are sharded; the classes drawn count over all devices. With replacement the
        draws are those of the whole row, but for the rounding of p; without, the device's number is folded into the
        key, which is the same on all. Not with `mode`.
    Returns: int32 of the given shape. Each class is drawn with its p, within the rounding of p or 2^-32, whichever is
      more. A call rounds each p at random to one of the two nearest multiples of 2^-31, and takes all its draws from
      the rounded p; averaged over keys, a class is drawn at the right rate however small its p is. A single draw on
      GPUs and TPUs never gives a class with p far below 2^-32. A class with p = 0 is never drawn. A row without
      classes, or with a score of NaN or +inf, gives −1, and so do draws without replacement beyond the classes that are
      left. There are no derivatives.
    Raises: as `jsoftmax.softmax`; ValueError for a `shape` that does not end so, more distinct draws than classes, or
      another `mode`.
    Source: Devroye 1986, section III.2 (inversion); Gumbel 1954 (the noise).

    >>> draws = categorical(jax.random.key(0), jnp.log(jnp.array([0.1, 0.9])), shape=(10_000,))
    >>> float(jnp.mean(draws == 1)).__round__(1)
    0.9
    """
    function = "categorical"
    check_key(function, key)
    given = _noise.check(function, z, axis, where, phi, log_weights, axis_name)
    batch = given.x.shape[:-1]
    prefix = check_shape(function, shape, batch)
    count, replace = math.prod(prefix), check_flag(function, "replace", replace)
    if mode not in (None, "low", "high"):
        raise ValueError(f"{function}: mode must be None, 'low' or 'high'; got {mode!r}. Leave it out for the default.")
    check_same(function, "key", key, axis_name)
    if mode is not None and axis_name is not None:
        raise ValueError(f"{function}: mode must be None with axis_name; got {mode!r}. Leave it out.")
    check_distinct(function, replace, count, given.x.shape[-1] * shard_count(axis_name))
    if not given.x.shape[-1]:
        return jnp.full((*prefix, *batch), -1, jnp.int32)
    if mode is not None:
        drawn = jax.random.categorical(key, given.x, -1, (*prefix, *batch), replace, mode)
        drawn = jnp.moveaxis(drawn.reshape(count, *batch), 0, -1).astype(jnp.int32)
        drawn = _keep_possible(drawn, given.x, axis_name)
    elif replace:

        def by_sums(x: Array, key: Any) -> Array:
            return _keep_possible(_draw(key, x, count, axis_name), x, axis_name)

        def of_rows(x: Array, key: Any) -> Array:
            if count != 1 or axis_name is not None:
                return by_sums(x, key)
            by_noise = functools.partial(_draw_by_noise, key)
            on_gpus = functools.partial(by_noise, in_blocks=is_read_once(x, (x.ndim - 1,)))
            return by_platform(x, on_cpu=lambda x: by_sums(x, key), on_gpus=on_gpus, otherwise=by_noise)

        drawn = apply_to_rows(of_rows, given.x, key, axis_name=axis_name)
    else:
        _, drawn = _noise.top_perturbed(key, given.x, count, axis_name)
        drawn = _keep_possible(drawn, given.x, axis_name)
    return jnp.moveaxis(drawn, -1, 0).reshape(*prefix, *batch)


def check_distinct(function: str, replace: bool, count: int, classes: int) -> None:
    """Checks that there are at least as many classes as distinct draws."""
    if not replace and count > classes:
        raise ValueError(
            f"{function}: shape must ask for no more draws than there are classes, {classes}, with replace=False; got "
            f"{count}. Draw fewer, or draw with replacement."
        )
