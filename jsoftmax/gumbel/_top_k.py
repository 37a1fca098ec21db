"""Gumbel top-k: k distinct classes, and how likely each was to be among them (MATH 10.3)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from jsoftmax import maps
from jsoftmax._series import expm1_ratio
from jsoftmax.checks.arguments import accumulation_dtype, as_scores, joint_shape, public
from jsoftmax.checks.sampling import check_count, check_int, check_key
from jsoftmax.gumbel import _noise
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName, check_same, has_explicit_sharding, shard_count
from jsoftmax.sums import class_sum, difference, shifted


class TopK(NamedTuple):
    """A sample without replacement, by descending perturbed log-probability."""

    indices: Integer[Array, "..."]
    """The classes, k along the scores' axis; −1 where none is left."""
    perturbed: Float[Array, "..."]
    """Their log p + g."""
    threshold: Float[Array, "..."]
    """The (k+1)-th perturbed log-probability, without the classes' axis; −inf where all classes are in the sample."""


@public
def gumbel_top_k(
    key: PRNGKeyArray | ArrayLike,
    z: ArrayLike,
    k: int,
    axis: int = -1,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> TopK:
    """k distinct classes, drawn one after the other without replacement from p = w φ(z) / Σ w φ(z).

    The k largest of log p + g, g = −log(−log U);   P(order) as in `jsoftmax.losses.plackett_luce_log_prob`  (MATH 10.3)

    Estimates from the sample weigh its classes by how likely they were to be in it (`log_inclusion_probability`).

    Args:
      key: a PRNG key.
      z: scores `[..., K]`, any floating dtype; integers promote.
      k: how many, an int in [1, K].
      axis: int: the classes' axis, in the results that of the k.
      phi, where, log_weights: as in `jsoftmax.softmax`.
      axis_name: as there, where the classes are sharded; K, and the classes in the result, count over all devices. The
        key is the same on all; the device's number is folded into it, so the sample depends on how many there are.
    Returns: `TopK(indices, perturbed, threshold)`: int32 and float32 at least. `perturbed` and `threshold` are
      differentiable; the noise is a constant. A row with fewer than k classes: −1 and −inf beyond them; a row with a
      score of NaN or +inf: −1 and NaN.
    Raises: as `jsoftmax.softmax`; ValueError or TypeError if `k` is no int in [1, K].
    Source: Vieira 2014; Kool, van Hoof & Welling 2019, section 3.

    >>> sample = gumbel_top_k(jax.random.key(0), jnp.log(jnp.array([0.5, 0.3, 0.2])), 2)
    >>> sample.indices.shape, bool(sample.perturbed[1] > sample.threshold)
    ((2,), True)
    """
    function = "gumbel_top_k"
    check_key(function, key)
    check_int(function, "k", k)
    given = _noise.check(function, z, axis, where, phi, log_weights, axis_name)
    check_same(function, "key", key, axis_name)
    classes = given.x.shape[-1] * shard_count(axis_name)
    count = check_count(function, k, classes)
    by_log_p = functools.partial(_by_log_p, k=count, classes=classes, axis_name=axis_name)
    if axis_name is not None or has_explicit_sharding(given.x):
        sample = by_log_p(given.x, key)
    else:
        by_rows = functools.partial(_by_rows, k=count)
        sample = lax.platform_dependent(given.x, key, cpu=by_log_p, default=by_rows)
    return sample._replace(
        indices=jnp.moveaxis(sample.indices, -1, given.axis), perturbed=jnp.moveaxis(sample.perturbed, -1, given.axis)
    )


def _by_log_p(x: Array, key: Any, k: int, classes: int, axis_name: AxisName) -> TopK:
    """The sample of `gumbel_top_k`, classes last."""
    log_p = maps.log_p(x, (x.ndim - 1,), axis_name)
    best, index = _noise.top_perturbed(key, log_p, min(k + 1, classes), axis_name)
    index = jnp.where(best > -jnp.inf, index, -1)
    last = jnp.where(jnp.isnan(best[..., 0]), jnp.nan, -jnp.inf).astype(best.dtype)
    return TopK(index[..., :k], best[..., :k], best[..., k] if k < classes else last)


def _by_rows(x: Array, key: Any, k: int) -> TopK:
    """The same from numbers of each row, which come first: GPUs and TPUs then write neither log p nor the noise where
    the k largest are found by blocks. How many classes are left says which indices are −1."""
    log_p, log_total, left = _log_p_by_rows(x)
    best, index = _noise.top_perturbed(key, log_p, min(k + 1, x.shape[-1]))
    index = jnp.where(lax.broadcasted_iota(left.dtype, index.shape, index.ndim - 1) < left, index, -1)
    last = best[..., k] if k < x.shape[-1] else jnp.where(jnp.isnan(log_total[..., 0]), jnp.nan, -jnp.inf)
    return TopK(index[..., :k], best[..., :k], last.astype(best.dtype))


@jax.custom_jvp
def _log_p_by_rows(x: Array) -> tuple[Array, Array, Array]:
    """log p, log Σ e^u and the number of classes that are left, 0 in a row that is NaN. The numbers of a row are
    computed before any log p."""
    axis = (x.ndim - 1,)
    _, _, rest, peak, _ = shifted(x, axis)
    log_total = jnp.log1p(rest)
    left = class_sum((difference(x, peak) > -jnp.inf).astype(x.dtype), axis)
    left = jnp.where(jnp.isnan(log_total), 0, left)
    peak, log_total, left = lax.optimization_barrier((peak, log_total, left))
    return difference(x, peak) - log_total, log_total, left


@_log_p_by_rows.defjvp
def _log_p_by_rows_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The rule of log p."""
    out = _log_p_by_rows(*primals)
    rate = jax.jvp(lambda x: maps.log_p(x, (x.ndim - 1,)), primals, tangents)[1]
    return out, (rate, *(jnp.zeros_like(a) for a in out[1:]))


@public
def log_inclusion_probability(log_p: ArrayLike, threshold: ArrayLike) -> Float[Array, "..."]:
    """Log-probability that a perturbed log-probability is above a threshold: the weights of estimates by Gumbel top-k.

    log q = log(1 − e^{−e^{log p − κ}})     (MATH 10.3)

    For a sample of `gumbel_top_k` and its threshold, Σ_{k in the sample} p_k f_k / q_k has the mean Σ p f.

    Args:
      log_p: log-probabilities of the sample's classes, any shape; integers promote.
      threshold: κ, broadcastable to `log_p`: for k along the last axis, `sample.threshold[..., None]`.
    Returns: the joint shape, float32 at least. A threshold of −inf: 0. A class with p = 0: −inf. NaN gives NaN.
    Raises: TypeError or ValueError for what is no array of numbers, or shapes that do not broadcast.
    Source: Kool, van Hoof & Welling 2019, section 4.2, after Duffield, Lund & Thorup 2007.

    >>> from jsoftmax import log_softmax
    >>> log_p, f = log_softmax(jnp.array([0., 1., 2.])), jnp.array([1., 4., 9.])
    >>> sample = gumbel_top_k(jax.random.key(0), log_p, 2)
    >>> log_q = log_inclusion_probability(log_p[sample.indices], sample.threshold)
    >>> estimate = jnp.sum(jnp.exp(log_p[sample.indices] - log_q) * f[sample.indices])
    >>> estimate.shape
    ()
    """
    function = "log_inclusion_probability"
    arrays = {"log_p": as_scores(function, "log_p", log_p)}
    arrays["threshold"] = as_scores(function, "threshold", threshold)
    shape = joint_shape(function, arrays)
    dtype = accumulation_dtype(jnp.result_type(*arrays.values()))
    return _log_q(*(jnp.broadcast_to(a.astype(dtype), shape) for a in arrays.values()))


@jax.jit
def _log_q(log_p: Array, threshold: Array) -> Array:
    """log(1 − e^−m), m = e^y, y = log p − κ; y + log((1 − e^−m)/m) where m is small  (MATH 10.3)."""
    sure, never = jnp.isneginf(threshold), jnp.isneginf(log_p)
    y = jnp.where(sure | never, 0, log_p - jnp.where(sure, 0, threshold))
    small = y < 0
    m = jnp.exp(jnp.minimum(y, 5))  # e^−m is 0 beyond
    m_small, m_large = jnp.where(small, m, 0), jnp.where(small, 1, m)
    log_q = jnp.where(small, y + jnp.log(expm1_ratio(-m_small)), jnp.log1p(-jnp.exp(-m_large)))
    return jnp.where(never & ~jnp.isnan(threshold), -jnp.inf, jnp.where(sure & ~jnp.isnan(log_p), 0, log_q))
