"""The target of each token: a label, several labels, a distribution, or the k classes of `TopTargets`."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jsoftmax.checks.arguments import as_array, wide_integers
from jsoftmax.checks.labels import check_ignore_label, check_labels, reject_given
from jsoftmax.checks.top_targets import TopTargets, check_top_targets, reject_top_targets
from jsoftmax.heads._head import Head
from jsoftmax.sharding import AxisName, check_parts

SEVERAL, TOP = "several labels", "TopTargets"


class Labels(NamedTuple):
    """A head with its labels or targets."""

    head: Head
    rows: Array | None
    """bool `[N]`: which tokens count."""
    top: TopTargets | None
    several: tuple[int, ...] | None
    """The axes of several labels of each token, which come before the tokens' axes."""
    counted: Array | None
    """bool `[N, m]`: which labels count."""


def add_labels(  # noqa: PLR0917  (what they are checked against)
    function: str,
    labels: Any,
    head: Head,
    batch: tuple[int, ...],
    axis_name: AxisName,
    ignore_label: Any,
    per_token: Any,
) -> Labels:
    """The head with its labels or targets, checked."""
    tokens, classes, wide = math.prod(batch), head.weight.shape[0], head.hidden.dtype
    if isinstance(labels, TopTargets):
        if TOP not in per_token:
            reject_top_targets(function, "labels", labels)
        reject_given(function, {"ignore_label": ignore_label, "margin": head.margin})
        top = check_top_targets(function, "labels", labels, batch, wide)
        return Labels(head._replace(labels=top.indices.reshape(tokens, top.indices.shape[-1])), None, top, None, None)
    if axis_name is not None and np.ndim(labels) > len(batch):
        check_parts(function, (*batch, classes), (len(batch),), axis_name, labels=labels)
    labels, several = _check_labels(function, labels, batch, classes, SEVERAL in per_token)
    check_ignore_label(function, ignore_label, "give them all one number by jnp.where(…, ignored, labels).")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        reject_given(function, {"ignore_label": ignore_label, "margin": head.margin})
        targets = labels.astype(wide).reshape(tokens, classes)
        return Labels(head._replace(targets=targets), None, None, None, None)
    if several is not None:
        _check_no_margin(function, head.margin, several, batch)
    head = head._replace(labels=labels.reshape(math.prod(several or ()), tokens).T)
    counted = None if ignore_label is None else head.labels != ignore_label
    return Labels(head, None if counted is None else jnp.any(counted, 1), None, several, counted)


def _check_labels(
    function: str, labels: Any, batch: tuple[int, ...], classes: int, several: bool
) -> tuple[Array, tuple[int, ...] | None]:
    """Integers of the tokens' shape, or distributions, with the classes as one more last axis; and the axes of several
    labels of each token, which come first."""
    shape, of = np.shape(labels), "the shape of hidden without its last axis"
    way_out = "Each row of hidden is one token with one label: slice both in the same way"
    if len(shape) > len(batch) and shape[len(shape) - len(batch) :] == batch:
        array = as_array(function, "labels", labels)
        if several and jnp.issubdtype(array.dtype, jnp.integer):
            return wide_integers(array), shape[: len(shape) - len(batch)]
        wanted = ", ".join(map(str, (*shape, "d")))
        way_out = f"For several labels of each token write jnp.broadcast_to(hidden, ({wanted}))"
    array = check_labels(
        function,
        "labels",
        labels,
        batch,
        of=f"{of},",
        way_out=way_out,
        distributions=(*batch, classes),
        of_distributions=f"{of}, with the classes added at the end,",
    )
    return array, None


def _check_no_margin(function: str, margin: Any, several: tuple[int, ...], batch: tuple[int, ...]) -> None:
    """Several labels of a token share its scores, and a margin would change them for each label."""
    if margin is not None:
        wanted = ", ".join(map(str, (*several, *batch, "d")))
        raise ValueError(
            f"{function}: margin must be left out where a token has several labels; got {margin}. A margin "
            f"gives each label other scores: repeat the tokens by jnp.broadcast_to(hidden, ({wanted}))."
        )


def check_banned(function: str, banned: Any, batch: tuple[int, ...]) -> Array | None:
    """Classes that each token leaves out, `[N, m]`; None where there are none."""
    if banned is None:
        return None
    array = as_array(function, "banned", banned)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{function}: banned must be integers, the classes that each token leaves out; got dtype {array.dtype}. "
            "A mask of classes for all tokens is where=…."
        )
    if not array.ndim or array.shape[:-1] != batch:
        wanted = ", ".join([*map(str, batch), "m"])
        raise ValueError(
            f"{function}: banned must have m classes for each token, shape ({wanted}); got shape {array.shape}. Fill "
            "shorter lists up with −1; classes that all tokens leave out go into where=…."
        )
    return wide_integers(array).reshape(math.prod(batch), array.shape[-1]) if array.shape[-1] else None
