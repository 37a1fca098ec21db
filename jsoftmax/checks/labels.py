"""Checks of scores with labels, which all losses share; and which rows count."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jsoftmax import maps, sums
from jsoftmax.checks.arguments import (
    SCORES_SHAPE,
    accumulation_dtype,
    as_array,
    as_floating,
    as_scores,
    canonical_axis,
    check_log_weights,
    check_where,
    is_int,
    wide_integers,
)
from jsoftmax.checks.top_targets import TopTargets, check_top_targets, mass_is_in_range, reject_per_class_options
from jsoftmax.phi import exp
from jsoftmax.sharding import (
    AxisName,
    check_axis_name,
    check_not_explicit,
    check_parts,
    check_sharded,
    keeps_label,
    pick,
    reshard_like,
    shard_count,
)

NO_LABELS: Any = object()
"""Stands for the labels of a function that has none, or checks them itself."""


class Labelled(NamedTuple):
    """Checked arguments, with the class axes merged into one, the last. All but the scores are in the accumulation
    dtype; what is not given is None."""

    logits: Array
    """Scores `[..., K]`, in their own dtype."""
    labels: Any
    """Integers `[...]`, distributions `[..., K]` or `TopTargets` `[..., k]`."""
    rows: Array | None
    """bool `[...]`: which rows count."""
    where: Array | None
    """bool `[..., K]`: which classes are kept."""
    log_weights: Array | None
    """`[..., K]`."""
    class_weights: Array | None
    """`[K]`."""

    @property
    def by_label(self) -> bool:
        """Whether the labels are integers."""
        return not self.by_top and jnp.issubdtype(self.labels.dtype, jnp.integer)

    @property
    def by_top(self) -> bool:
        """Whether the labels are `TopTargets`, which name some classes of a distribution."""
        return isinstance(self.labels, TopTargets)

    @property
    def dtype(self) -> Any:
        """The accumulation dtype."""
        return accumulation_dtype(self.logits.dtype)

    @property
    def classes(self) -> int:
        """The number of classes of this shard."""
        return self.logits.shape[-1]

    def scores(self) -> Array:
        """The scores, with 0 in rows that do not count. Such rows may hold NaN, and backwards 0 · NaN would be NaN."""
        return self.logits if self.rows is None else sums.zero_where(~self.rows[..., None], self.logits)

    def targets(self) -> Array:
        """The distributions, with 0 in rows that do not count and on classes that the mask leaves out."""
        q = self.labels if self.rows is None else sums.zero_where(~self.rows[..., None], self.labels)
        return q if self.where is None else sums.zero_where(~self.where, q)

    def top(self) -> TopTargets:
        """The `TopTargets`, with mass 0 in rows that do not count."""
        top: TopTargets = self.labels
        if self.rows is None:
            return top
        return TopTargets(top.indices, sums.zero_where(~self.rows[..., None], top.probabilities), top.tail)

    def label(self, axis_name: AxisName = None) -> tuple[Array, Array]:
        """Labels `[..., 1]`, with 0 for those out of range, and whether they are in range. For distributions the labels
        are 0; they are valid if all classes with mass are in range."""
        if self.by_top:
            valid = mass_is_in_range(self.labels, in_range(self.labels.indices, self.classes, axis_name)[1])
            return jnp.zeros(valid.shape, jnp.int32), valid
        if not self.by_label:
            rows = self.labels.shape[:-1]
            return jnp.zeros((*rows, 1), jnp.int32), jnp.ones((*rows, 1), bool)
        labels = self.labels if self.rows is None else jnp.where(self.rows, self.labels, 0)
        label, valid = in_range(labels, self.classes, axis_name)
        return label[..., None], valid[..., None]

    def keeps(self, label: Array, axis_name: AxisName = None) -> Array:
        """Whether the mask keeps the class of a label."""
        where: Any = self.where
        return keeps_label(lambda own: pick(where, own), label, self.classes, axis_name)

    def finish(self, loss: Array, valid: Array) -> Array:
        """The loss `[..., 1]` as `[...]`: 0 in rows that do not count, and NaN for a label out of range. The
        derivatives of that NaN are 0, so that a caller may mask the row afterwards."""
        loss = jnp.where(valid, loss, jnp.nan)[..., 0]
        return loss if self.rows is None else jnp.where(self.rows, loss, 0)


def check_labelled(
    function: str,
    logits: Any,
    labels: Any,
    axis: Any,
    where: Any,
    *,
    phi: Any = exp,
    log_weights: Any = None,
    class_weights: Any = None,
    ignore_label: Any = None,
    axis_name: Any = None,
    names: tuple[str, str] = ("logits", "labels"),
) -> Labelled:
    """Checks the arguments of a loss. `where` masks classes or rows, `ignore_label` rows."""
    maps.check_phi(function, phi)
    z = check_logits(function, names[0], logits)
    check_sharded(function, names[0], z, check_axis_name(function, axis_name))
    dtype = accumulation_dtype(z.dtype)
    axes = canonical_axis(function, axis, z.ndim)
    maps.check_phi_moves(function, phi, axes, z.ndim)
    batch = tuple(length for i, length in enumerate(z.shape) if i not in axes)
    of_classes = tuple(z.shape[i] for i in axes)
    if len(axes) > 1:
        check_not_explicit(function, names[0], z)
    if axis_name is not None:
        by_class = {n: a for n, a in (("where", where), (names[1], labels)) if np.ndim(a) == z.ndim}
        check_parts(function, z.shape, axes, axis_name, log_weights=log_weights, **by_class)
        check_parts(function, of_classes, tuple(range(len(axes))), axis_name, class_weights=class_weights)
    way_out = f"The class axes of {z.shape} are {axes}: name others by axis=…"
    if axis_name is not None and np.size(labels) * shard_count(axis_name) == math.prod(batch):
        way_out = f"Labels are the same on all devices along axis_name={axis_name!r}: leave it out of their in_specs"
    by_top = isinstance(labels, TopTargets)
    if labels is NO_LABELS:
        labels = jnp.zeros(batch, jnp.int32)
    elif by_top:
        labels = check_top_targets(function, names[1], labels, batch, dtype)
    else:
        labels = check_labels(
            function,
            names[1],
            labels,
            batch,
            of="the logits' shape without the classes,",
            way_out=way_out,
            distributions=z.shape,
            of_distributions="the logits' shape",
        )
    check_ignore_label(function, ignore_label, "mask their rows by where=….")
    classes, rows = check_mask(function, where, z.shape, batch)
    log_weights = check_log_weights(function, log_weights, z.shape, dtype)

    def last(a: Array | None) -> Any:
        if a is None:
            return None
        moved = jnp.moveaxis(jnp.broadcast_to(a, z.shape), axes, range(len(batch), z.ndim))
        return moved.reshape(*batch, math.prod(of_classes))

    if by_top or not jnp.issubdtype(labels.dtype, jnp.integer):
        reject_given(function, {"ignore_label": ignore_label})
        if by_top:
            reject_per_class_options(function, class_weights=class_weights)
        labels = labels if by_top else last(reshard_like(labels.astype(dtype), z))
    elif ignore_label is not None:
        known = labels != ignore_label
        rows = known if rows is None else rows & known
    weights = _check_class_weights(function, class_weights, of_classes, dtype)
    return Labelled(last(z), labels, rows, last(classes), last(log_weights), weights)


def check_ignore_label(function: str, ignore_label: Any, way_out: str) -> None:
    """Checks that `ignore_label` is an int or None."""
    if ignore_label is not None and not is_int(ignore_label):
        raise TypeError(
            f"{function}: ignore_label must be an int or None; got {ignore_label!r}. To ignore several labels, "
            f"{way_out}"
        )


def check_logits(function: str, argument: str, logits: Any) -> Array:
    """Scores of a floating dtype, as optax requires. Integers are rejected: they may be labels in the wrong place."""
    way_out = f"Scores come first, then labels. Convert scores that are integers by {argument}.astype(float)."
    return as_floating(function, argument, logits, way_out)


def reject_given(function: str, options: dict[str, Any]) -> None:
    """Rejects options that can be used with integer labels only."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{function}: {name} must be left out where labels are distributions; got {value}. It can be "
                "used with integer labels only."
            )


def in_range(labels: Array, classes: int, axis_name: AxisName = None) -> tuple[Array, Array]:
    """The labels, with 0 for those out of range; and whether they are in range. classes: the number on each shard."""
    valid = (labels >= 0) & (labels < classes * shard_count(axis_name))
    return jnp.where(valid, labels, 0), valid


def check_labels(
    function: str,
    argument: str,
    labels: Any,
    shape: tuple[int, ...],
    *,
    of: str,
    way_out: str,
    distributions: tuple[int, ...] | None = None,
    of_distributions: str = "",
) -> Array:
    """Class numbers of a shape, in 32 bits at least; or floating numbers of the shape `distributions`, if it is given.

    of, of_distributions: what these shapes are, for the messages. way_out: the advice if the given shape suggests none.
    """
    array = as_array(function, argument, labels)
    whole = jnp.issubdtype(array.dtype, jnp.integer)
    if not whole and (distributions is None or not jnp.issubdtype(array.dtype, jnp.floating)):
        wanted = "integers" if distributions is None else "integers or floating distributions"
        raise TypeError(
            f"{function}: {argument} must be {wanted}; got dtype {array.dtype}. Convert class numbers by "
            f"{argument}.astype(int); from one-hot vectors and distributions take jnp.argmax({argument}, axis)."
        )
    wanted = shape if whole or distributions is None else distributions
    if array.shape == wanted:
        return wide_integers(array) if whole else array
    if whole and array.shape == distributions:
        way_out = f"One-hot vectors and distributions must be floating: {argument}.astype(float)"
    elif not whole and array.shape == shape:
        way_out = f"Class numbers must be integers: {argument}.astype(int)"
    elif array.size == math.prod(wanted):
        way_out = f"Write {argument}.reshape{wanted}"
    elif not whole:
        way_out = f"To repeat it, write jnp.broadcast_to({argument}, {wanted})"
    kind = f"integer {argument}" if whole else f"{argument} that are distributions"
    raise ValueError(
        f"{function}: {argument if distributions is None else kind} must have {of if whole else of_distributions} "
        f"{wanted}; got shape {array.shape}. {way_out}."
    )


def check_mask(
    function: str, where: Any, shape: tuple[int, ...], batch: tuple[int, ...]
) -> tuple[Array | None, Array | None]:
    """`where` as a mask of classes or a mask of rows `[...]`, by its number of dimensions; the other one is None."""
    if where is None:
        return None, None
    of_rows = np.ndim(where) == len(batch)
    what = f"the logits' shape {shape}, to leave classes out, or to the loss's," if of_rows else SCORES_SHAPE
    mask: Any = check_where(function, where, batch if of_rows else shape, what)
    if of_rows:
        return None, jnp.broadcast_to(mask, batch)
    if np.ndim(where) != len(shape):
        raise ValueError(
            f"{function}: where must have as many dimensions as the logits ({len(shape)}), to leave classes out, or as "
            f"the loss ({len(batch)}), to leave rows out; got shape {np.shape(where)}. Add axes of length 1."
        )
    return mask, None


def _check_class_weights(function: str, weights: Any, shape: tuple[int, ...], dtype: Any) -> Array | None:
    if weights is None:
        return None
    array = as_scores(function, "class_weights", weights)
    if array.shape != shape:
        raise ValueError(
            f"{function}: class_weights must have the shape of the class axes {shape}; got shape {array.shape}. "
            "To weight rows, multiply the loss."
        )
    return array.astype(dtype).reshape(-1)
