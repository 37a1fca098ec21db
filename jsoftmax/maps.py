"""Softmax, log-softmax and log-normaliser of every φ: one rule for (log p, p, L), in x = ψ(z) + log w."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import _arguments
from jsoftmax._arguments import Axis
from jsoftmax.phi import Phi, exp, log_phi

_SHORT_BLOCK, _FEW = 64, 16


class Normalized(NamedTuple):
    """l = log p, p and L; L keeps the reduced axes with length 1."""

    log_p: Array
    p: Array
    log_normalizer: Array


class Centred(NamedTuple):
    """What MATH 4 builds everything of; all but u keep the reduced axes."""

    u: Array
    """x − max x."""
    e: Array
    """e^u."""
    rest: Array
    """Σ e^u − 1 without cancellation: −1 for an empty row."""
    peak: Array
    """max x, 0 for an empty row."""


def centre(x: Array, axis: tuple[int, ...]) -> Centred:
    """u = x − max x, e^u, and Σ e^u − 1 without cancellation (MATH 4.1).

    Ones are counted apart from what is smaller than one, so no small term is lost beside a 1. That takes a second sum,
    which is slow on CPU over many classes; so a long axis is cut into blocks, and only the block that holds the
    maximum, and what the blocks leave over, are summed with that care. The barriers keep XLA from fusing that block's
    gather and sums into the pass over all classes, which it would then not vectorise. Where e^u would not stay in a
    cache it is computed twice rather than written and read (benchmarks/NOTES.md).
    Right under plain autodiff too: the maximum carries no derivative, and counting has none.
    """
    length = _block_length(x, axis)
    if not length:
        parts = _slices(x, axis[0]) if _has_few(x, axis) else [x]
        top = [jnp.max(lax.stop_gradient(part), axis, keepdims=True, initial=-jnp.inf) for part in parts]
        peak = _peak(_by_halves(jnp.maximum, top))
        e = [jnp.exp(part - peak) for part in parts]
        ones = [jnp.floor(part) for part in e]
        small = _by_halves(jnp.add, [jnp.sum(a - b, axis, keepdims=True) for a, b in zip(e, ones, strict=True)])
        rest = small + (_by_halves(jnp.add, [jnp.sum(part, axis, keepdims=True) for part in ones]) - 1)
        u = x - lax.optimization_barrier(peak)
        return Centred(u, jnp.exp(u), rest, peak)
    cut, tail = _cut(x, length)
    blocks = cut.shape[-2]
    block_peak = lax.optimization_barrier(jnp.max(lax.stop_gradient(cut), -1))
    tail_peak = jnp.max(lax.stop_gradient(tail), -1, keepdims=True, initial=-jnp.inf)
    peak = _peak(jnp.maximum(jnp.max(block_peak, -1, keepdims=True), tail_peak))
    e_cut, e_tail = jnp.exp(cut - peak[..., None]), jnp.exp(tail - peak)
    block_sum = lax.optimization_barrier(jnp.sum(e_cut, -1))
    total = _pairwise_sum(jnp.concatenate([block_sum, e_tail], -1))
    # the block of the maximum; any, where the tail has it
    best = jnp.min(jnp.where(block_peak == peak, jnp.arange(blocks), blocks - 1), -1, keepdims=True)
    others = jnp.where(jnp.arange(blocks) == best, 0, block_sum)
    block = jnp.take_along_axis(cut, best[..., None], -2)[..., 0, :]
    e = jnp.exp(jnp.concatenate([block, tail], -1) - peak)
    small = _pairwise_sum(lax.optimization_barrier(jnp.concatenate([e - jnp.floor(e), others], -1)))
    ones = jnp.round(total - small)  # an integer of at least 1: exact until an error of 1 is below rounding
    u = x - peak
    shared = jnp.concatenate([e_cut.reshape(*x.shape[:-1], -1), e_tail], -1)
    return Centred(u, shared if length == _SHORT_BLOCK else jnp.exp(u), small + (ones - 1), peak)


def careful_sum(f: Callable[[Array], Array], x: Array, peak: Array, axis: tuple[int, ...]) -> Array:
    """Σ f(x − peak), over a long axis by blocks and halves."""
    length = _block_length(x, axis)
    if not length:
        return class_sum(f(x - peak), axis)
    cut, tail = _cut(x, length)
    peak = lax.optimization_barrier(peak)  # else XLA writes the e^u that `centre` computes too, for both to read
    block_sum = lax.optimization_barrier(jnp.sum(f(cut - peak[..., None]), -1))
    return _pairwise_sum(jnp.concatenate([block_sum, f(tail - peak)], -1))


def class_sum(a: Array, axis: tuple[int, ...]) -> Array:
    """Σ over the classes, whose axes keep length 1."""
    if _has_few(a, axis) and axis[0] < a.ndim - 1:
        return _by_halves(jnp.add, _slices(a, axis[0]))
    return jnp.sum(a, axis, keepdims=True)


def _has_few(a: Array, axis: tuple[int, ...]) -> bool:
    return len(axis) == 1 and 1 < a.shape[axis[0]] <= _FEW


def _slices(a: Array, axis: int) -> list[Array]:
    """A few classes one by one: XLA on CPU adds them faster than it reduces a short or a leading axis (NOTES.md)."""
    return [lax.slice_in_dim(a, i, i + 1, axis=axis) for i in range(a.shape[axis])]


def _by_halves(op: Callable[[Array, Array], Array], parts: list[Array]) -> Array:
    while len(parts) > 1:
        half = len(parts) // 2
        parts = [*map(op, parts[:half], parts[half : 2 * half]), *parts[2 * half :]]
    return parts[0]


def _block_length(x: Array, axis: tuple[int, ...]) -> int:
    """How many classes a block of a long last axis has; 0 for a short axis or another."""
    if not x.ndim or axis != (x.ndim - 1,) or x.shape[-1] <= 256:
        return 0
    return _SHORT_BLOCK if x.shape[-1] < 4096 else 256


def _cut(x: Array, length: int) -> tuple[Array, Array]:
    """The last axis as blocks, and the tail that they leave over."""
    split = x.shape[-1] - x.shape[-1] % length
    return x[..., :split].reshape(*x.shape[:-1], -1, length), x[..., split:]


def _pairwise_sum(a: Array) -> Array:
    """Σ over the last axis by halves: its rounding error grows as log n, where that of a running sum grows as n."""
    while a.shape[-1] > 1:
        half = a.shape[-1] // 2
        a = jnp.concatenate([a[..., :half] + a[..., half : 2 * half], a[..., 2 * half :]], -1)
    return a


def _peak(peak: Array) -> Array:
    """The maximum, 0 for an empty row, so that −inf − peak is no NaN."""
    return jnp.where(jnp.isneginf(peak), 0, peak)


@functools.partial(jax.jit, static_argnums=1)
def normalize(x: Array, axis: tuple[int, ...]) -> Normalized:
    """l = log p, p and L; x = −inf leaves a class out.

    Compiled by itself: rules call it again and again, and JAX keeps its trace.
    """
    return _normalize(x, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _normalize(x: Array, axis: tuple[int, ...]) -> Normalized:
    """l = u − log1p(rest), p = e^u/(1 + rest), L = max x + log1p(rest)  (MATH 4.2)."""
    u, e, rest, peak = centre(x, axis)
    empty = rest == -1
    log_total = jnp.log1p(jnp.where(empty, 0, rest))
    # the derivative of l is 0 where a class is left out, under plain autodiff too
    log_p = u - jnp.where(jnp.isneginf(x), lax.stop_gradient(log_total), log_total)
    infinite = jnp.where(empty, -jnp.inf, jnp.inf)
    L = jnp.where(empty | jnp.isposinf(peak), infinite, peak + log_total)
    return Normalized(log_p, e / jnp.where(empty, 1, 1 + rest), L)


@_normalize.defjvp
def _normalize_jvp(axis: tuple[int, ...], primals: Any, tangents: Any) -> tuple[Normalized, Normalized]:
    """l̇ = ẋ − Σ p ẋ, ṗ = p (ẋ − Σ p ẋ), L̇ = Σ p ẋ  (MATH 1.2 to 1.4)."""
    (x,), (x_dot,) = primals, tangents
    out = normalize(x, axis)
    mean = class_sum(out.p * x_dot, axis)
    centred = x_dot - mean
    return out, Normalized(where_not(jnp.isneginf(x), centred), out.p * centred, mean)


@functools.partial(jax.checkpoint, prevent_cse=False)
def where_not(left_out: Array, a: Array) -> Array:
    """a, and 0 where a class is left out; checkpointed, for the backward pass would keep the zeros too."""
    return jnp.where(left_out, 0, a)


def weighted_scores(phi: Phi, z: Array, where: Array | None, log_weights: Array | None) -> Array:
    """x = ψ(z) + log w, −inf where a class is left out (MATH 1.1): by a mask, a weight of 0 or a score of −inf."""
    if where is None and log_weights is None:
        return log_phi(phi, z)
    kept = jnp.ones((), bool) if where is None else where
    if log_weights is not None:
        kept = kept & ~jnp.isneginf(log_weights) & ~jnp.isneginf(z)
    x = log_phi(phi, jnp.where(kept, z, -jnp.inf))
    return x if log_weights is None else x + jnp.where(kept, log_weights, 0)


class Arguments(NamedTuple):
    """Checked: scores of one shape in the accumulation dtype, the axes, the mask, log w, the scores' dtype."""

    scores: tuple[Array, ...]
    axis: tuple[int, ...]
    where: Array | None
    log_weights: Array | None
    dtype: Any


def check(  # noqa: PLR0917  (as the public functions have them)
    function: str,
    scores: dict[str, Any],
    axis: Any,
    where: Any,
    phi: Any,
    log_weights: Any,
) -> Arguments:
    """The arguments of a public function, checked, promoted and broadcast; `scores` by the names users know."""
    check_phi(function, phi)
    arrays = {name: _arguments.as_scores(function, name, z) for name, z in scores.items()}
    shape = _arguments.joint_shape(function, arrays)
    narrow = jnp.result_type(*arrays.values())
    dtype = _arguments.accumulation_dtype(narrow)
    return Arguments(
        tuple(jnp.broadcast_to(z.astype(dtype), shape) for z in arrays.values()),
        _arguments.canonical_axis(function, axis, len(shape)),
        _arguments.check_where(function, where, shape),
        _arguments.check_log_weights(function, log_weights, shape, dtype),
        narrow,
    )


@functools.partial(jax.jit, static_argnames=("f", "axis"))
def _of_weighted_scores(  # noqa: PLR0917  (as `Arguments` has them)
    f: Callable[..., Array],
    scores: tuple[Array, ...],
    axis: tuple[int, ...],
    where: Array | None,
    log_weights: Array | None,
    phi: Phi,
    parameters: tuple[Array, ...] = (),
) -> Array:
    return f(*(weighted_scores(phi, z, where, log_weights) for z in scores), *parameters, axis)


def keep_classes(f: Callable[..., Array], arguments: Arguments, phi: Phi, parameters: tuple[Array, ...] = ()) -> Array:
    """f(x, …, *parameters, axis) of x = ψ(z) + log w, in the scores' dtype. Compiled as one: what f drops is not
    computed."""
    *given, dtype = arguments
    return _of_weighted_scores(f, *given, phi, parameters).astype(dtype)


def reduce_classes(
    f: Callable[..., Array],
    arguments: Arguments,
    phi: Phi,
    keepdims: bool = False,
    parameters: tuple[Array, ...] = (),
) -> Array:
    """f(x, …, *parameters, axis) for an f that reduces the classes, in the accumulation dtype."""
    *given, _ = arguments
    result = _of_weighted_scores(f, *given, phi, parameters)
    return result if keepdims else jnp.squeeze(result, arguments.axis)


def check_phi(function: str, phi: Any) -> None:
    """A φ is a `Phi`; anything else raises and names the way out."""
    if isinstance(phi, Phi):
        return
    name = getattr(phi, "__name__", "")
    if getattr(phi, "__module__", "").startswith("jsoftmax."):
        way_out = f"Call {name} with its parameters: phi=jsoftmax.{name}(…)."
    else:
        way_out = "Wrap a function of your own: phi=jsoftmax.from_callable(f)."
    raise TypeError(f"{function}: phi must be a φ such as jsoftmax.exp or jsoftmax.taylor(2); got {phi!r}. {way_out}")


def softmax(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Probabilities p = w φ(z) / Σ w φ(z); with phi=exp the softmax.

    p_k = e^{x_k − L},  x = ψ(z) + log w;   ∂p_i/∂z_j = p_i (δ_ij − p_j) s_j     (MATH 1.2)

    Args:
      z: scores `[..., K]`, any floating dtype; integers promote as in `jax.nn.softmax`.
      axis: int, tuple or None (all): the classes' axis.
      where: bool, broadcastable to `z`; False leaves a class out.
      phi: the positive map φ.
      log_weights: log w, broadcastable to `z`: a prior, a reference measure, a sampling correction; −inf leaves a
        class out. Differentiable.
    Returns: the shape and dtype of `z`; computed in float32 at least; within |u| + 4 ulp, u = x − max x (MATH 4).
      A class left out, or with a score of −inf, has p = 0 and derivatives 0; so have all classes of an empty row
      (jax.nn gives NaN). A score of +inf or NaN, or one outside φ's domain, makes its row NaN.
    Raises: TypeError or ValueError for a `phi` that is no φ, an `axis` out of range, a mask that is not boolean or
      does not broadcast.
    Source: Bridle 1990; φ ≠ exp: de Brébisson & Vincent 2016, equation 2.

    >>> from jsoftmax import taylor
    >>> softmax(jnp.array([0., 1., 2.]))
    Array([0.09003..., 0.24472..., 0.66524...], dtype=float32)
    >>> softmax(jnp.array([0., 1., 2.]), phi=taylor(2))
    Array([0.11764..., 0.29411..., 0.58823...], dtype=float32)
    """
    return keep_classes(_p, check("softmax", {"z": z}, axis, where, phi, log_weights), phi)


def log_softmax(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Log-probabilities l = log p, small ones and ones near 0 alike to the last digits.

    l_k = x_k − L,  x = ψ(z) + log w;   ∂l_i/∂z_j = (δ_ij − p_j) s_j     (MATH 1.4)

    Args:
      z, axis, where, phi, log_weights: as in `softmax`.
    Returns: the shape and dtype of `z`; within |u| + 4 ulp, u = x − max x (MATH 4).
      −inf, with derivatives 0, for a class left out. A score of +inf or NaN makes its row NaN.
    Raises: as `softmax`.
    Source: de Brébisson & Vincent 2016, equation 3 (any φ).

    >>> log_softmax(jnp.array([0., -20.]))
    Array([-2.06115...e-09, -2.00000...e+01], dtype=float32)
    """
    return keep_classes(_log_p, check("log_softmax", {"z": z}, axis, where, phi, log_weights), phi)


def log_normalizer(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
) -> Float[Array, "..."]:
    """The log-normaliser L = log Σ w φ(z); with phi=exp the log-sum-exp, whose derivatives are cumulants.

    L = log Σ e^x,  x = ψ(z) + log w;   ∂L/∂z_j = p_j s_j     (MATH 1.3)

    Args:
      z, axis, where, phi, log_weights: as in `softmax`; `axis` is reduced.
      keepdims: keep the reduced axes with length 1.
    Returns: `[...]` in the dtype of `z`, but float32 for narrower scores (`jax.nn.logsumexp` keeps them narrow);
      within 4 ulp of max(|max x|, |L|) (MATH 4). An empty row: −inf with derivatives 0. A score of +inf: +inf with
      NaN derivatives. NaN: NaN in that row alone.
    Raises: as `softmax`.
    Source: log-sum-exp of log φ; cumulants: MATH 1.3.

    >>> log_normalizer(jnp.array([0., -20.]))
    Array(2.06115...e-09, dtype=float32)
    """
    arguments = check("log_normalizer", {"z": z}, axis, where, phi, log_weights)
    return reduce_classes(_log_normalizer, arguments, phi, keepdims)


def _p(x: Array, axis: tuple[int, ...]) -> Array:
    return normalize(x, axis).p


def _log_p(x: Array, axis: tuple[int, ...]) -> Array:
    return normalize(x, axis).log_p


def _log_normalizer(x: Array, axis: tuple[int, ...]) -> Array:
    return normalize(x, axis).log_normalizer
