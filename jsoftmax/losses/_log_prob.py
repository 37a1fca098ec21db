"""Log-probabilities of labels, such as draws. The scores of a row are read once for all its labels (MATH 7.1)."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax.checks.arguments import Axis, as_array, public, read, wide_integers
from jsoftmax.checks.labels import NO_LABELS, Labelled, check_labelled, in_range
from jsoftmax.checks.top_targets import reject_top_targets
from jsoftmax.losses._terms import negative_log_p
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName, pick


@functools.partial(jax.jit, static_argnames="axis_name")
def _log_prob(given: Labelled, labels: Array, phi: Phi, axis_name: AxisName) -> Array:
    """l_y for labels whose shape ends in that of the rows."""
    shape = labels.shape
    front = len(shape) - given.logits.ndim + 1
    several = math.prod(shape[:front])
    x = maps.weighted_scores(phi, read(given.scores()), given.where, given.log_weights)
    x = jnp.broadcast_to(x, (*shape[front:], x.shape[-1]))
    label, valid = in_range(labels, given.classes, axis_name)
    if front == 0:
        log_p = -negative_log_p(x, label[..., None], axis_name)[..., 0]
    elif axis_name is not None:
        # beside a p near 1 the rule of one label keeps its digits; that of all classes does not
        of_one = jax.vmap(lambda label: -negative_log_p(x, label[..., None], axis_name)[..., 0])
        log_p = of_one(label.reshape(several, *shape[front:])).reshape(shape)
    else:
        last = jnp.moveaxis(label.reshape(several, *shape[front:]), 0, -1)  # the labels of a row side by side
        every = maps.log_p(x, (x.ndim - 1,))
        found = pick(every, last)
        log_p = jnp.moveaxis(found, -1, 0).reshape(shape)
    log_p = jnp.where(valid, maps.constant_at_impossible(log_p), jnp.nan)
    return log_p if given.rows is None else jnp.where(given.rows, log_p, 0)


@public
def log_prob(
    z: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Log-probability of each label, or of several labels of each row, such as draws.

    l_y = x_y − L,  x = ψ(z) + log w;   ∂l_y/∂z = (1_y − p) s     (MATH 7.1)

    The negative of `cross_entropy`; but a class that is left out has −inf, as in `log_softmax`.

    Args:
      z, axis, where, phi, log_weights, axis_name: as `logits`, … in `cross_entropy`.
      labels: integers, of a shape that ends in `[...]`, that of the scores without the classes: `[k, N]`, as
        `gumbel.categorical(key, z, shape=(k, N))` draws them, beside scores `[N, K]`, which are not repeated. Scores
        `[1, K]` are those of every label.
    Returns: the shape of the labels, in the scores' dtype, but float32 for narrower ones; with the digits of
      `jsoftmax.log_softmax`, of a value near 0 too (MATH 4). Rows that `where` leaves out: 0. A label on a class that
      is left out or impossible, or in a row without classes: −inf, with derivatives 0. Out of range: NaN, with
      derivatives 0. A score of +inf or NaN: NaN in that row alone.
    Raises: as `cross_entropy`; TypeError for labels that are no integers.
    Source: Bridle 1990.

    >>> log_prob(jnp.array([[0., -20.], [1., 2.]]), jnp.array([[0, 1], [1, 1]]))
    Array([[-2.06115...e-09, -3.13261...e-01],
           [-2.00000...e+01, -3.13261...e-01]], dtype=float32)
    """
    function = "log_prob"
    reject_top_targets(function, "labels", labels)
    array = as_array(function, "labels", labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{function}: labels must be integers; got dtype {array.dtype}. Convert class numbers by "
            "labels.astype(int); for distributions use cross_entropy."
        )
    options = {"phi": phi, "log_weights": log_weights, "axis_name": axis_name}
    given = check_labelled(function, z, NO_LABELS, axis, where, **options, names=("z", "labels"))
    batch = given.logits.shape[:-1]
    own = array.shape[max(0, array.ndim - len(batch)) :]
    if array.ndim < len(batch) or any(rows not in (1, n) for n, rows in zip(own, batch, strict=True)):
        raise ValueError(
            f"{function}: labels must end in the scores' shape without the classes, {batch}; got shape {array.shape}. "
            "Several labels of each row are an axis in front, [k, …]; one label for all rows is "
            f"jnp.full({batch}, label)."
        )
    return _log_prob(given, wide_integers(array), phi, axis_name)
