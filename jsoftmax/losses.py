"""Losses of scores and labels, unreduced as in optax, for every φ (MATH 7)."""

import math
from typing import Any

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


# --- the losses in x, classes last ---------------------------------------------------------------------------


@jax.jit
def _of_labels(options: dict[str, Any], z: Array, label: Array, rows: Array | None) -> Array:
    """MATH 7.2 for integer labels `[...]`; `rows` `[...]` are those that count, None for all."""
    valid = (label >= 0) & (label < z.shape[-1])
    safe = jnp.where(valid, label, 0)[..., None]
    z = _counting(rows, z)
    if options["margin"] is not None:
        z = z - options["margin"] * _is_label(z, safe)
    x = maps.weighted_scores(options["phi"], z, options["where"], options["log_weights"])
    loss = negative_log_p(x, safe)
    weights = options["class_weights"]
    if weights is not None:
        loss = loss * weights[safe]
    if options["label_smoothing"] is not None:
        kept, smoothing = ~jnp.isneginf(x), options["label_smoothing"]
        spread = jnp.where(kept, -normalize(x, (x.ndim - 1,)).log_p, 0)
        if weights is not None:
            spread = spread * weights
        loss = (1 - smoothing) * loss + smoothing * class_sum(spread, (x.ndim - 1,)) / _count(kept)
    loss = jnp.where(valid, 1, jnp.nan).astype(loss.dtype) * _with_penalty(loss, x, options)[..., 0]
    return loss if rows is None else jnp.where(rows, loss, 0)


@jax.jit
def _of_distributions(options: dict[str, Any], z: Array, q: Array, rows: Array | None) -> Array:
    """MATH 7.2 for distributions `[..., K]`."""
    z = _counting(rows, z)
    x = maps.weighted_scores(options["phi"], z, options["where"], options["log_weights"])
    kept, axis = ~jnp.isneginf(x), (x.ndim - 1,)
    impossible = jnp.where(q == 0, 0, jnp.inf).astype(x.dtype)
    if options["label_smoothing"] is not None:
        q = (1 - options["label_smoothing"]) * q + options["label_smoothing"] / _count(kept)
    terms = jnp.where(kept, q * -jnp.where(kept, normalize(x, axis).log_p, 0), impossible)
    loss = _with_penalty(class_sum(terms, axis), x, options)[..., 0]
    return loss if rows is None else jnp.where(rows, loss, 0)


def _counting(rows: Array | None, z: Array) -> Array:
    """z, and 0 in rows that do not count, which may hold anything."""
    return z if rows is None else maps.where_not(~rows[..., None], z)


def _count(kept: Array) -> Array:
    """How many classes there are to share the smoothing, at least 1."""
    return jnp.maximum(jnp.sum(kept, -1, keepdims=True), 1).astype(jnp.float32)


def _with_penalty(loss: Array, x: Array, options: dict[str, Any]) -> Array:
    if options["z_loss"] is None:
        return loss
    L = normalize(x, (x.ndim - 1,)).log_normalizer
    return loss + options["z_loss"] * jnp.where(jnp.isneginf(L), 0, L) ** 2


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
    if not by_label:
        _no_labels(function, margin=margin, class_weights=class_weights, ignore_label=ignore_label)
    class_mask, rows = _check_mask(function, where, z.shape, batch)

    def last(a: Array | None) -> Array | None:
        """The class axes as one, the last."""
        if a is None:
            return None
        moved = jnp.moveaxis(jnp.broadcast_to(a, z.shape), axes, range(len(batch), z.ndim))
        return moved.reshape(*batch, math.prod(z.shape[i] for i in axes))

    options = {
        "phi": phi,
        "where": last(class_mask),
        "log_weights": last(_arguments.check_log_weights(function, log_weights, z.shape, z.dtype)),
        "margin": _option(function, margin, z.dtype, margin=(-math.inf, math.inf)),
        "label_smoothing": _option(function, label_smoothing, z.dtype, label_smoothing=(0.0, 1.0)),
        "z_loss": _option(function, z_loss, z.dtype, z_loss=(0.0, math.inf)),
        "class_weights": _check_class_weights(function, class_weights, tuple(z.shape[i] for i in axes), z.dtype),
    }
    scores = last(z)
    if not by_label:
        return _of_distributions(options, scores, last(labels), rows)
    if ignore_label is not None:
        known = labels != ignore_label
        rows = known if rows is None else rows & known
    return _of_labels(options, scores, labels, rows)


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


def _no_labels(function: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None and not (_arguments.is_concrete_number(value) and value == 0 and name == "margin"):
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
