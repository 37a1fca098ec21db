"""Truncated laws: scores cut to the k largest, to a share of the probability, or relative to the mode (MATH 9.4)."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax.checks import arguments
from jsoftmax.checks.arguments import Axis, public
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import reshard_rows
from jsoftmax.sums import class_sum, difference, has_bad_score


def _ordered_bits(x: Array) -> Array:
    """Whole numbers in the order of the floats: their bits, inverted for negative numbers. −0 counts as 0."""
    length = jnp.finfo(x.dtype).bits
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{length}"))
    sign = jnp.array(1, bits.dtype) << (length - 1)
    # compared as bits, since a comparison of floats may take subnormal numbers for 0
    bits = jnp.where(bits == sign, 0, bits)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _threshold(bits: Array, weights: Array, limit: Array, axis: tuple[int, ...]) -> Array:
    """The least b with Σ_{bits > b} weight < limit, in each row, found digit by digit from the highest.

    This is exact, and needs no sort: each digit takes one pass over the row. On a CPU the comparisons cost most, which
    are fewest for digits of one bit. On GPUs and TPUs the passes cost most, of which digits of 3 bits take a third: XLA
    makes one kernel of their seven sums, but two of the fifteen sums of 4 bits.
    """
    length = jnp.iinfo(bits.dtype).bits

    def search(digit: int, bits: Array, weights: Array, limit: Array) -> Array:
        def advance(found: Array, shift: Array, values: int) -> Array:
            rest = (jnp.array(1, bits.dtype) << shift) - 1
            passed = jnp.zeros_like(found)
            for value in range(values - 1):  # the digit is the number of values that are passed
                below = found | (jnp.array(value, bits.dtype) << shift) | rest  # the largest number with this digit
                above = class_sum(jnp.where(bits > below, weights, 0), axis)
                passed += jnp.where(above < limit, 0, 1).astype(bits.dtype)
            return found | (passed << shift)

        first, start = length % digit, jnp.max(bits, axis, keepdims=True, initial=0) & 0  # sharded as the rows are
        rest = length - first
        if first:
            start = advance(start, jnp.array(rest, bits.dtype), 2**first)
        return lax.fori_loop(
            0,
            rest // digit,
            lambda i, found: advance(found, (rest - digit * (i + 1)).astype(bits.dtype), 2**digit),
            start,
        )

    on_cpu, otherwise = (functools.partial(search, digit) for digit in (1, 3))
    return lax.platform_dependent(bits, weights, limit, cpu=on_cpu, default=otherwise)


@functools.partial(jax.jit, static_argnames="axis")
def _is_kept(x: Array, axis: tuple[int, ...], top_k: Array | None, top_p: Array | None, min_p: Array | None) -> Array:
    """Whether a class stays: it must be among the k largest, then within the mass top_p, then have e^u ≥ min_p.

    x may be narrow: its bits are in the same order as those of the wider numbers, and there are fewer of them.
    """
    x = lax.stop_gradient(x)
    bits, x = _ordered_bits(x), arguments.read(x)
    peak = jnp.max(x, axis, keepdims=True, initial=-jnp.inf)
    u = difference(x, peak)
    kept = x > -jnp.inf
    if top_k is not None:
        kept &= bits >= _threshold(bits, jnp.array(1), jnp.maximum(top_k, 1), axis)
    if top_p is not None:
        e = jnp.where(kept, jnp.exp(u), 0)
        tiny = float(jnp.finfo(x.dtype).tiny)
        least = _threshold(bits, e, jnp.maximum(top_p * class_sum(e, axis), tiny), axis)
        kept &= (bits >= least) | (top_p >= 1)
    if min_p is not None:
        kept &= u >= jnp.minimum(jnp.log(min_p), 0)  # the mode stays
    return kept | has_bad_score(x, axis) | (x == peak)


def _reject_cuts_by_position(z: Any, axis: Any, where: Any) -> None:
    """Rejects cuts that are given by position, where `axis` and `where` are."""
    far = isinstance(axis, float) or (arguments.is_int(axis) and axis >= np.ndim(z))
    cuts = [value for value, is_cut in ((axis, far), (where, arguments.is_concrete_number(where))) if is_cut]
    if cuts:
        named = ", ".join(f"{'top_k' if arguments.is_int(value) else 'top_p'}={value}" for value in cuts)
        raise ValueError(
            f"truncate: axis must be an axis of z, and where a mask; got axis {axis} and where {where} for scores with "
            f"{np.ndim(z)} dimension(s). If cuts are meant, name them: {named}."
        )


@public
def truncate(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    top_k: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Scores with −inf where the law p = w φ(z) / Σ w φ(z) is cut, for every function of scores that follows.

    The cuts, made one after the other, keep     (MATH 9.4)

        top_k   the k classes with the largest p
        top_p   the fewest of these with the largest p whose p, of those kept so far, sum up to top_p or more
        min_p   of these the ones with p ≥ min_p · max p

    `softmax`, `log_softmax`, `entropy`, `gumbel.categorical` and the losses of the result are those of the truncated
    law. Classes with equal p stay or go together: of a tie for the last place all stay.

    Args:
      z: scores `[..., K]`, any floating dtype; integers promote.
      axis: int, tuple or None (all): the classes' axis.
      where: bool, broadcastable to `z`; False leaves a class out, of the result too.
      top_k: an integer ≥ 1, or one for each row, of length 1 along the classes; like the others it may be traced.
      top_p: in (0, 1], likewise; the class that crosses it stays, and 1 keeps all.
      min_p: in [0, 1], likewise.
      phi, log_weights: as in `jsoftmax.softmax`; they order the classes. Give them to the functions that follow, too.
    Returns: the shape and dtype of `z`: z where it is kept, with derivative 1, else −inf, with derivative 0. The cuts
      are constants for derivatives. Exact up to the rounding of the mass in float32, without a sort. At least one class
      stays, for traced numbers out of range too. A row with a score of NaN or +inf stays as it is.
    Raises: as `jsoftmax.softmax`; TypeError or ValueError for numbers out of range.
    Source: Fan, Lewis & Dauphin 2018 (top_k); Holtzman et al. 2020 (top_p); Nguyen et al. 2025 (min_p).

    >>> from jsoftmax import softmax
    >>> z = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    >>> softmax(truncate(z, top_p=0.75)).round(2)
    Array([0.62, 0.38, 0.  , 0.  ], dtype=float32)
    >>> truncate(jnp.array([1., 3., 2., 3.]), top_k=1)
    Array([-inf,   3., -inf,   3.], dtype=float32)
    """
    function = "truncate"
    _reject_cuts_by_position(z, axis, where)
    given = maps.check(function, {"z": z}, axis, where, phi, log_weights)
    (z,), axes = given.given, given.axis
    x = maps.weighted_scores(phi, z, given.where, given.log_weights)
    wide = arguments.accumulation_dtype(x.dtype)

    def number(argument: str, value: Any, low: float, high: float, dtype: Any) -> Array | None:
        if value is None:
            return None
        if not arguments.all_known(value, lambda a: (a >= low) & (a <= high)):
            bounds = "an integer >= 1" if math.isinf(high) else f"in {'(' if low else '['}0, 1]"
            raise ValueError(f"{function}: {argument} must be {bounds}; got {value}. Leave it out to cut nothing.")
        if arguments.is_int(value):
            value = min(value, 2**31 - 1)
        return reshard_rows(arguments.per_row(function, argument, value, x.shape, axes=axes, dtype=dtype), x, axes)

    if top_k is not None and not jnp.issubdtype(jnp.result_type(top_k), jnp.integer):
        raise TypeError(
            f"{function}: top_k must be an integer, or integers; got {top_k!r}. For a share of the probability "
            "use top_p."
        )
    kept = _is_kept(
        x,
        axes,
        number("top_k", top_k, 1.0, math.inf, jnp.int32),
        number("top_p", top_p, float(jnp.finfo(wide).tiny), 1.0, wide),
        number("min_p", min_p, 0.0, 1.0, wide),
    )
    return jnp.where(kept if given.where is None else kept & given.where, z, -jnp.inf)
