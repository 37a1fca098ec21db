"""Checks of linear heads: matrices, labels of rows, and a φ of order 2."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax.checks.arguments import as_array, as_floating
from jsoftmax.checks.labels import check_labels
from jsoftmax.checks.top_targets import reject_top_targets
from jsoftmax.maps import check_phi
from jsoftmax.phi import Phi


def check_matrix(function: str, argument: str, value: Any, wanted: str, ndim: int | None = None) -> Array:
    """A floating array with `ndim` dimensions, or with at least one if that is None. None of its last `ndim` axes (or
    its last one) is empty."""
    way_out = f"Convert integers by {argument}.astype(float)."
    array = as_floating(function, argument, value, way_out, f"floating, {wanted}")
    if not array.ndim or (ndim is not None and array.ndim != ndim) or not math.prod(array.shape[-(ndim or 1) :]):
        raise ValueError(
            f"{function}: {argument} must have shape {wanted}; got shape {array.shape}. The weight has a row for each "
            "class, and its rows are as long as the last axis of hidden."
        )
    return array


def check_width(function: str, hidden: Array, width: int) -> None:
    """Checks that the last axis of `hidden` is as long as the rows of the weight."""
    if hidden.shape[-1] != width:
        raise ValueError(
            f"{function}: hidden must end with the width {width} of the weight's rows; got shape {hidden.shape}. The "
            "weight is [V, d], a row for each class: transpose it if it is [d, V]."
        )


def check_row_labels(function: str, labels: Any, batch: tuple[int, ...]) -> Array:
    """Integers, one for each row of `hidden`."""
    reject_top_targets(function, "labels", labels, "integers")
    of = "the shape of hidden without its last axis,"
    return check_labels(function, "labels", labels, batch, of=of, way_out="Give each row one label")


def check_quadratic(function: str, phi: Any) -> Phi:
    """A φ of the second order, whose three numbers are the same for all classes."""
    check_phi(function, phi)
    numbers = phi.quadratic
    if numbers is None:
        raise ValueError(
            f"{function}: phi must be of the second order: taylor(2), spherical(ε) or quadratic(a0, a1, a2); got "
            f"{phi}. For any other φ use losses.cross_entropy on the scores hidden @ weight.T, or "
            "heads.linear_cross_entropy, which never stores them all."
        )
    shapes = [jnp.shape(a) for a in numbers]
    if any(shapes):
        raise ValueError(
            f"{function}: phi must have parameters that are one number for all classes; got shapes {shapes} in "
            f"{phi.name}. For parameters that differ between classes use losses.cross_entropy."
        )
    return phi


def check_per_class(function: str, argument: str, value: Any, dtype: Any, length: int) -> Array:
    """An array `[V]` with one entry for each class."""
    array = as_array(function, argument, value)
    if not jnp.issubdtype(array.dtype, dtype):
        what = "boolean" if dtype == jnp.bool_ else "floating"
        way_out = "Compare first, e.g. where=mask > 0." if dtype == jnp.bool_ else f"Write {argument}.astype(float)."
        raise TypeError(f"{function}: {argument} must be {what}; got dtype {array.dtype}. {way_out}")
    if array.shape != (length,):
        raise ValueError(
            f"{function}: {argument} must have one entry for each class, shape ({length},); got shape {array.shape}. "
            "Its entries belong to the rows of the weight, not to those of hidden."
        )
    return array
