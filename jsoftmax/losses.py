"""Losses of scores and labels, unreduced as in optax, for every φ (MATH 7)."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import _arguments, maps
from jsoftmax._arguments import Axis
from jsoftmax.maps import class_sum, normalize
from jsoftmax.phi import Phi, exp

# --- −l_y with its one rule ----------------------------------------------------------------------------------


@jax.jit
def negative_log_p(x: Array, label: Array) -> Array:
    """−l_y over the last axis of `x`, for labels `[..., 1]` in [0, K)."""
    return _negative_log_p(x, label)


@jax.custom_jvp
def _negative_log_p(x: Array, label: Array) -> Array:
    """−l_y = log1p(rest) + (max x − x_y): two terms that are not negative  (MATH 7.1)."""
    _, _, rest, peak = maps.centre(x, (x.ndim - 1,))
    return jnp.log1p(jnp.where(rest == -1, 0, rest)) + (peak - jnp.take_along_axis(x, label, -1))


@_negative_log_p.defjvp
def _negative_log_p_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Σ (p − 1_y) ẋ  (MATH 7.1); one array is kept for the backward pass, and nothing is scattered."""
    (x, label), (x_dot, _) = primals, tangents
    axis = (x.ndim - 1,)
    rate = normalize(x, axis).p - _is_label(x, label)
    return negative_log_p(x, label), class_sum(rate * x_dot, axis)


def _is_label(x: Array, label: Array) -> Array:
    """1_y in the dtype of x; XLA fuses it, and no one-hot array is built."""
    return (lax.broadcasted_iota(label.dtype, x.shape, x.ndim - 1) == label).astype(x.dtype)


# --- the loss in x, classes last -----------------------------------------------------------------------------


class _Options(NamedTuple):
    """Checked: φ and what goes with the scores, classes last; None for what is not asked for."""

    phi: Phi
    where: Array | None
    log_weights: Array | None
    margin: Array | None
    label_smoothing: Array | None
    z_loss: Array | None
    class_weights: Array | None


@functools.partial(jax.jit, static_argnames="by_label")
def _cross_entropy(options: _Options, z: Array, labels: Array, rows: Array | None, by_label: bool) -> Array:
    """MATH 7.2 for labels, integers `[...]` or distributions `[..., K]`; `rows` `[...]` are those that count."""
    if rows is not None:
        z = maps.where_not(~rows[..., None], z)  # a row that does not count may hold anything
    x, loss = _of_labels(options, z, labels) if by_label else _of_distributions(options, z, labels)
    if options.z_loss is not None:
        L = normalize(x, (x.ndim - 1,)).log_normalizer
        loss = loss + options.z_loss * jnp.where(jnp.isneginf(L), 0, L) ** 2
    loss = loss[..., 0]
    return loss if rows is None else jnp.where(rows, loss, 0)


def _of_labels(options: _Options, z: Array, labels: Array) -> tuple[Array, Array]:
    """x and (1 − a) α_y (−l_y) + (a/K) Σ α_k (−l_k), NaN for a label out of range."""
    valid = ((labels >= 0) & (labels < z.shape[-1]))[..., None]
    label = jnp.where(valid, labels[..., None], 0)
    if options.margin is not None:
        z = z - options.margin * _is_label(z, label)
    x = maps.weighted_scores(options.phi, z, options.where, options.log_weights)
    loss, weights, smoothing = negative_log_p(x, label), options.class_weights, options.label_smoothing
    if weights is not None:
        loss = loss * weights[label]
    if smoothing is not None:
        kept, axis = ~jnp.isneginf(x), (x.ndim - 1,)
        spread = jnp.where(kept, -normalize(x, axis).log_p, 0)
        if weights is not None:
            spread = spread * weights
        loss = (1 - smoothing) * loss + smoothing * class_sum(spread, axis) / _count(kept, x.dtype)
    return x, jnp.where(valid, 1, jnp.nan).astype(x.dtype) * loss


def _of_distributions(options: _Options, z: Array, q: Array) -> tuple[Array, Array]:
    """x and Σ ((1 − a) q + a/K) (−l)."""
    x = maps.weighted_scores(options.phi, z, options.where, options.log_weights)
    kept, axis, smoothing = ~jnp.isneginf(x), (x.ndim - 1,), options.label_smoothing
    impossible = jnp.where(q == 0, 0, jnp.inf).astype(x.dtype)
    if smoothing is not None:
        q = (1 - smoothing) * q + smoothing / _count(kept, x.dtype)
    terms = jnp.where(kept, q * -jnp.where(kept, normalize(x, axis).log_p, 0), impossible)
    return x, class_sum(terms, axis)


def _count(kept: Array, dtype: Any) -> Array:
    """How many classes there are to share the smoothing, at least 1."""
    return jnp.maximum(jnp.sum(kept, -1, keepdims=True), 1).astype(dtype)


# --- the public functions ------------------------------------------------------------------------------------


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    margin: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    class_weights: ArrayLike | None = None,
    ignore_label: int | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Cross-entropy of labels under p = w φ(z) / Σ w φ(z), in nats, not reduced.

    loss = (1 − a) α_y (−l_y) + (a/K) Σ α_k (−l_k) + z_loss · L²,   x = ψ(z − m 1_y) + log w     (MATH 7.2)
    ∂(−l_y)/∂z = (p − 1_y) s     (MATH 7.1)

    With phi=taylor(2) it is the log-Taylor softmax's loss, with phi=spherical(ε) the log-spherical softmax's; with a
    margin the soft-margin softmax's, and with margin and phi=taylor(n) SM-Taylor's. A temperature is logits / T.

    Args:
      logits: scores `[..., K]`, any floating dtype; integers promote.
      labels: integers `[...]`, the class y; or, if floating, distributions q `[..., K]`: then −l_y is −Σ q l, and
        q takes part in the derivatives. Over several class axes an integer is a flat index, as in optax.
      axis: int, tuple or None (all): the classes' axis.
      where: bool; with as many dimensions as the logits it leaves classes out, with as many as the loss it leaves rows
        out, whose loss is 0.
      phi: the positive map φ.
      margin: m, subtracted from the label's score before φ.
      label_smoothing: a in [0, 1], shared by the K classes that are kept.
      z_loss: factor of L², L the log-normaliser of x: keeps logits from drifting.
      class_weights: α, of the class axes' shape. Like `margin`, it goes with integer labels.
      ignore_label: rows with that label have loss 0.
      log_weights: log w, broadcastable to the logits, e.g. log class frequencies for logit adjustment.
    Returns: `[...]`, in the logits' dtype, but float32 for narrower ones; without smoothing within |u| + 4 ulp, of the
      loss of a confident right answer too (MATH 4). A label out of range: NaN; one on a class left out: +inf, with
      finite derivatives. A class with q = 0 adds 0. A score of +inf or NaN: NaN in that row alone.
    Raises: TypeError or ValueError for shapes or dtypes that do not fit, an option out of range, or one that does not
      go with distributions.
    Source: Banerjee et al. 2020 and Liang et al. 2017 (margin); de Brébisson & Vincent 2016 (φ); Szegedy et al. 2016
      (smoothing); Menon et al. 2021 (logit adjustment).

    >>> cross_entropy(jnp.array([[0., -20.], [1., 2.]]), jnp.array([0, 1]))
    Array([2.06115...e-09, 3.13261...e-01], dtype=float32)
    """
    function = "cross_entropy"
    maps.check_phi(function, phi)
    z = _arguments.as_scores(function, "logits", logits)
    z = z.astype(_arguments.accumulation_dtype(z.dtype))
    axes = _arguments.canonical_axis(function, axis, z.ndim)
    batch = tuple(length for i, length in enumerate(z.shape) if i not in axes)
    by_label, labels = _check_labels(function, labels, z, batch, axes)
    class_mask, rows = _check_mask(function, where, z.shape, batch)

    def last(a: Array) -> Array:
        """The class axes as one, the last."""
        moved = jnp.moveaxis(jnp.broadcast_to(a, z.shape), axes, range(len(batch), z.ndim))
        return moved.reshape(*batch, math.prod(z.shape[i] for i in axes))

    log_w = _arguments.check_log_weights(function, log_weights, z.shape, z.dtype)
    class_mask, log_w = jax.tree.map(last, (class_mask, log_w))  # None stays None
    options = _Options(
        phi,
        class_mask,
        log_w,
        _option(function, margin, z.dtype, margin=(-math.inf, math.inf)),
        _option(function, label_smoothing, z.dtype, label_smoothing=(0.0, 1.0)),
        _option(function, z_loss, z.dtype, z_loss=(0.0, math.inf)),
        _check_class_weights(function, class_weights, tuple(z.shape[i] for i in axes), z.dtype),
    )
    if not by_label:
        of_labels = {"margin": options.margin, "class_weights": class_weights, "ignore_label": ignore_label}
        _reject_given(function, of_labels)
        labels = last(labels)
    elif ignore_label is not None:
        known = labels != ignore_label
        rows = known if rows is None else rows & known
    return _cross_entropy(options, last(z), labels, rows, by_label)


def _check_labels(
    function: str, labels: Any, z: Array, batch: tuple[int, ...], axes: tuple[int, ...]
) -> tuple[bool, Array]:
    """Whether labels are integers, and they as an array of the right shape."""
    if isinstance(labels, list | tuple | str) or labels is None:
        raise TypeError(f"{function}: labels must be an array; got {type(labels).__name__}. Write jnp.asarray(labels).")
    array = jnp.asarray(labels)
    if jnp.issubdtype(array.dtype, jnp.integer):
        if array.shape != batch:
            raise ValueError(
                f"{function}: integer labels must have the logits' shape without the classes, {batch}; got shape "
                f"{array.shape}. The classes of {z.shape} are the axes {axes}: name others by axis=…."
            )
        return True, array
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{function}: labels must be integers or floating distributions; got dtype {array.dtype}. Convert them, "
            "e.g. labels.astype(int)."
        )
    if array.shape != z.shape:
        raise ValueError(
            f"{function}: labels that are distributions must have the logits' shape {z.shape}; got shape "
            f"{array.shape}. Class numbers are passed as integers: labels.astype(int)."
        )
    return False, array.astype(z.dtype)


def _reject_given(function: str, options: dict[str, Any]) -> None:
    """Options that go with integer labels only."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{function}: {name} must be left out where labels are distributions; got {value}. It goes with "
                "integer labels only."
            )


def _check_mask(
    function: str, where: Any, shape: tuple[int, ...], batch: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """The mask of classes, or that of rows `[...]`, whichever it is."""
    if where is None:
        return None, None
    mask: Any = _arguments.check_where(function, where, batch if np.ndim(where) == len(batch) else shape)
    if mask.ndim == len(batch):
        return None, jnp.broadcast_to(mask, batch)
    if mask.ndim != len(shape):
        raise ValueError(
            f"{function}: where must have as many dimensions as the logits ({len(shape)}), to leave classes out, or as "
            f"the loss ({len(batch)}), to leave rows out; got shape {mask.shape}. Add axes of length 1."
        )
    return mask, None


def _option(function: str, value: Any, dtype: Any, **limits: tuple[float, float]) -> Array | None:
    """A scalar in the accumulation dtype, checked where it is a plain number; None for 0, which costs nothing."""
    ((argument, (low, high)),) = limits.items()
    if _arguments.is_concrete_number(value):
        if not (low <= value <= high and math.isfinite(value)):
            raise ValueError(
                f"{function}: {argument} must be in [{low:g}, {high:g}]; got {value}. Take one in that range."
            )
        if value == 0:
            return None
    array = _arguments.as_scores(function, argument, value)
    if array.ndim:
        raise ValueError(f"{function}: {argument} must be one number; got shape {array.shape}. Map over it: jax.vmap.")
    return array.astype(dtype)


def _check_class_weights(function: str, weights: Any, shape: tuple[int, ...], dtype: Any) -> Array | None:
    if weights is None:
        return None
    array = _arguments.as_scores(function, "class_weights", weights)
    if array.shape != shape:
        raise ValueError(
            f"{function}: class_weights must have the shape of the class axes {shape}; got shape {array.shape}. "
            "To weigh rows multiply the loss."
        )
    return array.astype(dtype).reshape(-1)
