"""Relaxed samples, whose derivatives in scores and temperature exist, and their densities (MATH 10.4 to 10.8)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jsoftmax import maps
from jsoftmax._series import expm1, log1p_exp
from jsoftmax.checks.arguments import (
    as_scores,
    broadcast_number,
    canonical_axis,
    check_flag,
    joint_shape,
    one_axis,
    public,
)
from jsoftmax.checks.sampling import check_count, check_int, check_key, check_positive
from jsoftmax.gumbel import _noise
from jsoftmax.maps import Normalized, normalize
from jsoftmax.phi import Phi, exp
from jsoftmax.phi.base import is_finite
from jsoftmax.sums import not_below

# --- relaxed samples -----------------------------------------------------------------------------------------


@jax.jit
def relaxed(perturbed: Array, temperature: Array) -> Normalized:
    """log p and p of perturbed/τ, over the last axis."""
    return normalize(_divide(perturbed, temperature), (perturbed.ndim - 1,), is_shifted=True)


def _divide(perturbed: Array, temperature: Array) -> Array:
    """(a − max a)/τ. The maximum is subtracted first, so that a small τ costs no digits. Classes that are left out give
    −inf, and so do those so far below the maximum that a derivative in τ would overflow."""
    peak = jnp.max(lax.stop_gradient(perturbed), -1, keepdims=True, initial=-jnp.inf)
    # `not_below` keeps the subtraction apart from a product that made the scores (MATH 4.1)
    below = not_below(perturbed) - jnp.where(is_finite(peak), peak, 0)
    temperature = lax.broadcast_to_rank(temperature, below.ndim)  # the same one for all samples of a row
    out = below < -1e18 * temperature
    return jnp.where(out, -jnp.inf, jnp.where(out, 0, below) / temperature)


@jax.custom_jvp
def straight_through(hard: Array, soft: Array) -> Array:
    """The value of `hard`, exactly, with the derivatives of `soft`; NaN where `soft` is NaN."""
    return jnp.where(jnp.isnan(soft), soft, hard)


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return straight_through(*primals), tangents[1]


@public
def gumbel_softmax(
    key: PRNGKeyArray | ArrayLike,
    z: ArrayLike,
    temperature: ArrayLike,
    axis: int = -1,
    shape: tuple[int, ...] | None = None,
    *,
    hard: bool = False,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """A relaxed sample from p = w φ(z) / Σ w φ(z): the Gumbel-softmax, or Concrete, distribution.

    softmax((x + g)/τ),   x = ψ(z) + log w,  g = −log(−log U);   one-hot, drawn from p, as τ → 0     (MATH 10.4)

    Args:
      key: a PRNG key.
      z: scores `[..., K]`, any floating dtype; integers promote.
      temperature: τ > 0, a number, or an array with one for each row, of length 1 along the classes; may be traced and
        learned.
      axis: int: the classes' axis.
      shape: that of the samples without their classes, which ends in `[...]`, the scores' shape without theirs: what
        stands before counts the samples of each row, as in `categorical`. None: one sample.
      hard: True: straight-through, the value exactly one-hot, the derivatives those of the relaxed sample.
      phi, where, log_weights: as in `jsoftmax.softmax`; differentiable.
    Returns: the shape of `z`, with the axes of `shape` that count samples in front, and its dtype; computed in float32
      at least. The noise is a constant. Values and derivatives are finite for small τ, down to 1e-12 or so; a traced τ
      ≤ 0 gives nonsense: learn jnp.exp(t). A class left out has 0, and so has one 10^18 τ below the largest. A score of
      NaN or +inf: NaN in that row alone.
    Raises: as `jsoftmax.softmax`; ValueError if τ is known at trace time and not positive: for τ = 0 draw with
      `categorical`.
    Source: Jang, Gu & Poole 2017, equation 2; Maddison, Mnih & Teh 2017, equation 10.

    >>> gumbel_softmax(jax.random.key(0), jnp.array([0., 1., 9.]), 0.5, hard=True)
    Array([0., 0., 1.], dtype=float32)
    """
    function = "gumbel_softmax"
    check_key(function, key)
    given, tau = _noise.check_relaxed(function, z, temperature, axis, where, phi, log_weights)
    perturbed = given.samples(function, shape).perturbed(key)
    soft = relaxed(perturbed, tau).p
    if check_flag(function, "hard", hard):
        best = jnp.argmax(perturbed, -1) if perturbed.shape[-1] else jnp.full(perturbed.shape[:-1], -1)
        soft = straight_through(_noise.one_hot(best, perturbed), soft)
    return given.restore(soft)


@public
def exp_concrete(
    key: PRNGKeyArray | ArrayLike,
    z: ArrayLike,
    temperature: ArrayLike,
    axis: int = -1,
    shape: tuple[int, ...] | None = None,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """The logarithm of a relaxed sample, which does not round to 0 or 1 at its corners.

    log softmax((x + g)/τ)     (MATH 10.4); its density: `exp_concrete_log_density`

    Args:
      key, z, temperature, axis, shape, phi, where, log_weights: as in `gumbel_softmax`.
    Returns: as there; −inf for a class left out. A score of NaN or +inf: NaN in that row alone.
    Raises: as `gumbel_softmax`.
    Source: Maddison, Mnih & Teh 2017, appendix C.3.

    >>> exp_concrete(jax.random.key(0), jnp.array([0., 1., 9.]), 0.5).shape
    (3,)
    """
    function = "exp_concrete"
    check_key(function, key)
    given, tau = _noise.check_relaxed(function, z, temperature, axis, where, phi, log_weights)
    return given.restore(relaxed(given.samples(function, shape).perturbed(key), tau).log_p)


@public
def subset_softmax(  # noqa: PLR0917  (as the others have them)
    key: PRNGKeyArray | ArrayLike,
    z: ArrayLike,
    k: int,
    temperature: ArrayLike,
    axis: int = -1,
    shape: tuple[int, ...] | None = None,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """A relaxed sample of k distinct classes: numbers that are not negative, with the sum k.

    Σ_i p_i,  p_i = softmax(a_i/τ),  a_1 = x + g,  a_{i+1} = a_i + log(1 − p_i)     (MATH 10.5)

    As τ → 0, the k-hot vector of `gumbel_top_k`'s sample with the same key; for larger τ a number may be above 1.

    Args:
      key, z, temperature, axis, shape, phi, where, log_weights: as in `gumbel_softmax`.
      k: how many, an int in [1, K].
    Returns: as there. A row with one class has 1 there; with fewer than k, classes count more than once. A class
      left out has 0. A score of NaN or +inf: NaN in that row alone.
    Raises: as `gumbel_softmax`; ValueError or TypeError if `k` is no int in [1, K].
    Source: Xie & Ermon 2019, algorithm 1 (after Plötz & Roth 2018).

    >>> subset_softmax(jax.random.key(0), jnp.array([0., 1., 99., 99.]), 2, 0.1).round(1)
    Array([0., 0., 1., 1.], dtype=float32)
    """
    function = "subset_softmax"
    check_key(function, key)
    check_int(function, "k", k)
    given, tau = _noise.check_relaxed(function, z, temperature, axis, where, phi, log_weights)
    count = check_count(function, k, given.x.shape[-1])
    return given.restore(_subset(given.samples(function, shape).perturbed(key), tau, count))


@functools.partial(jax.jit, static_argnums=2)
def _subset(perturbed: Array, temperature: Array, k: int) -> Array:
    """MATH 10.5. log(1 − p) of the largest p is computed from the other classes, so that value and derivative keep
    their digits. Once one class alone is left, it is left out of the next steps."""

    classes = lax.broadcast_to_rank(jnp.arange(perturbed.shape[-1]), perturbed.ndim)

    @jax.checkpoint  # else jax 0.10 and 0.11 drop derivative rules at order 2 inside a scan
    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        a, total = carry
        x, axis = _divide(a, temperature), (a.ndim - 1,)
        log_p, p, L = normalize(x, axis)[:3]
        top = classes == jnp.argmax(x, -1, keepdims=True)
        of_others = maps.log_sum(jnp.where(top, -jnp.inf, x), axis)
        out, alone = jnp.isneginf(x), jnp.isneginf(of_others)
        of_rest = jnp.log(-expm1(jnp.where(out | top, -1, log_p)))
        log_rest = jnp.where(top, jnp.where(alone, 0, of_others) - jnp.where(alone, 0, L), of_rest)
        return (jnp.where(out | (top & alone), -jnp.inf, a + log_rest), total + p), None

    return lax.scan(step, (perturbed, jnp.zeros_like(perturbed)), length=k)[0][1]


# --- densities -----------------------------------------------------------------------------------------------


@jax.jit
def _log_density(log_x: Array, x: Array, temperature: Array) -> Array:
    """log Γ(K) + (K−1) log τ + Σ log softmax(x − τ log_x), over the K classes that are kept  (MATH 10.6)."""
    kept = ~jnp.isneginf(x)
    count = jnp.sum(kept, -1).astype(x.dtype)
    vanished = jnp.any(kept & jnp.isneginf(log_x), -1)
    stray = jnp.any(~kept & (log_x > -jnp.inf), -1)
    d = jnp.where(kept, x, 0) - temperature * jnp.where(jnp.isneginf(log_x) | ~kept, 0, log_x)
    log_p = maps.log_p(jnp.where(kept, d, -jnp.inf), (x.ndim - 1,))
    sums = jnp.sum(jnp.where(kept, log_p, 0), -1)
    count = jnp.maximum(count, 1)
    log_factorial = jnp.where(count > 2, lax.lgamma(count), 0)  # XLA's lgamma(1) is 5e-7, not 0
    density = log_factorial + (count - 1) * jnp.log(temperature[..., 0]) + sums
    return jnp.where((vanished & (count > 1) | stray) & ~jnp.isnan(density), -jnp.inf, density)


def _check_sample(  # noqa: PLR0917  (as the public functions have them)
    function: str, x: Any, z: Any, temperature: Any, axis: Any, where: Any, phi: Any, log_weights: Any
) -> tuple[Array, _noise.Scores, Array]:
    """Samples `[..., K]`, the scores and τ, broadcast together; the axis is the scores', counted from the end."""
    arrays = {"x": as_scores(function, "x", x), "z": as_scores(function, "z", z)}
    shape = joint_shape(function, arrays)
    sample, scores = arrays.values()
    at = one_axis(function, axis, canonical_axis(function, axis, scores.ndim)) - scores.ndim
    if sample.shape[at:][:1] != scores.shape[at:][:1]:
        raise ValueError(
            f"{function}: x must have the classes of z, {scores.shape[at]} along axis {at}; got shape {sample.shape} "
            f"for scores of shape {scores.shape}. Move them there: jnp.moveaxis."
        )
    scores = jnp.broadcast_to(scores, shape)
    given, tau = _noise.check_relaxed(function, scores, temperature, at, where, phi, log_weights)
    return jnp.moveaxis(jnp.broadcast_to(sample.astype(given.x.dtype), shape), at, -1), given, tau


@public
def exp_concrete_log_density(
    x: ArrayLike,
    z: ArrayLike,
    temperature: ArrayLike,
    axis: int = -1,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Log-density of `exp_concrete`'s samples: of a relaxed sample in log space, right at the corners, too.

    log Γ(K) + (K−1) log τ + Σ_k log softmax(ψ(z) + log w − τ x)_k     (MATH 10.6)

    The measure: Lebesgue's in the K − 1 log-ratios x_k − x_K. In the coordinates x_1 … x_{K−1} of normalised samples
    the density is this one divided by e^{x_K}. For K = 2, with (y, 0) and (z, 0), it is the density of a relaxed
    Bernoulli variable in the logit y.

    Args:
      x: log-samples `[..., K]`, which broadcast with the scores: many of one row, `[n, K]` beside `[K]`. They need not
        be normalised: only their differences count.
      z: scores `[..., K]`, any floating dtype; integers promote.
      temperature, axis, phi, where, log_weights: as in `gumbel_softmax`. K counts the classes that are kept.
    Returns: `[...]`, the joint shape without the classes, in the dtype of `z`, but float32 for narrower scores;
      differentiable in all arguments. A sample with −inf at a class that is kept, or without it at one that is left
      out: −inf. One class left: 0. NaN and +inf: NaN in that row alone.
    Raises: as `gumbel_softmax`; ValueError if x does not broadcast with `z`, or has other classes.
    Source: Maddison, Mnih & Teh 2017, equation 23 (appendix C.3).

    >>> z = jnp.array([0., 1., 9.])
    >>> exp_concrete_log_density(exp_concrete(jax.random.key(0), z, 0.5), z, 0.5).shape
    ()
    """
    function = "exp_concrete_log_density"
    sample, given, tau = _check_sample(function, x, z, temperature, axis, where, phi, log_weights)
    return _log_density(sample, given.x, tau)


@public
def concrete_log_density(
    x: ArrayLike,
    z: ArrayLike,
    temperature: ArrayLike,
    axis: int = -1,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Log-density of `gumbel_softmax`'s samples, on the simplex. Prefer `exp_concrete_log_density`: at corners, where
    small τ put most samples, this one is unbounded, and samples round to 0.

    log Γ(K) + (K−1) log τ + Σ_k log softmax(ψ(z) + log w − τ log x)_k − Σ log x     (MATH 10.7)

    The measure: Lebesgue's in x_1 … x_{K−1}.

    Args:
      x: samples, which broadcast with the scores: positive, with the sum 1 along the classes.
      z, temperature, axis, phi, where, log_weights: as in `exp_concrete_log_density`.
    Returns: `[...]`, as `exp_concrete_log_density`. An x below the smallest normal number counts as that number, with
      derivatives 0: so a sample that was rounded to a corner gives a finite number, no infinity and no NaN.
    Raises: as `exp_concrete_log_density`.
    Source: Maddison, Mnih & Teh 2017, equation 11.

    >>> concrete_log_density(jnp.array([0.5, 0.5]), jnp.array([0., 0.]), 1.)
    Array(0., dtype=float32)
    """
    function = "concrete_log_density"
    sample, given, tau = _check_sample(function, x, z, temperature, axis, where, phi, log_weights)
    kept = ~jnp.isneginf(given.x)
    log_x = jnp.where(kept | (sample > 0) | jnp.isnan(sample), _log_of_sample(sample), -jnp.inf)
    return _log_density(log_x, given.x, tau) - jnp.sum(jnp.where(kept, log_x, 0), -1)


def _log_of_sample(x: Array) -> Array:
    """log x, where an x below the smallest normal number counts as that number."""
    tiny = float(jnp.finfo(x.dtype).tiny)
    return jnp.log(jnp.where(x < tiny, tiny, x))


@public
def binary_concrete_log_density(
    x: ArrayLike,
    z: ArrayLike,
    temperature: ArrayLike,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Log-density of relaxed Bernoulli variables with the odds w φ(z), elementwise.

    log τ + y − 2 log(1 + e^y) − log x − log(1 − x),   y = ψ(z) + log w − τ log(x/(1 − x))     (MATH 10.8)

    The measure: Lebesgue's in x. For samples that may round to 0 or 1 take the density in the logit, by
    `exp_concrete_log_density`.

    Args:
      x: samples in (0, 1), broadcastable with `z`.
      z: scores, any shape and floating dtype; integers promote. With phi=exp the logits.
      temperature: τ > 0, a number or an array that broadcasts to the scores; may be traced and learned.
      phi, where, log_weights: as in `jsoftmax.softmax`; the odds of what is left out are 0, and its density counts 1.
    Returns: the joint shape of `x` and `z`, float32 at least; differentiable in all arguments. What `x` lacks to 0 or 1
      counts as the smallest normal number at least. NaN and +inf give NaN.
    Raises: as `exp_concrete_log_density`.
    Source: Maddison, Mnih & Teh 2017, equation 16 (appendix B).

    >>> binary_concrete_log_density(0.5, 0., 1.)
    Array(0., dtype=float32)
    """
    function = "binary_concrete_log_density"
    arguments = maps.check(function, {"x": x, "z": z}, None, where, phi, log_weights)
    sample, scores = arguments.scores
    check_positive(function, temperature)
    tau = broadcast_number(function, "temperature", temperature, sample.shape, "the scores' shape")
    x = maps.weighted_scores(phi, scores, arguments.where, arguments.log_weights)
    return _binary(sample, x, tau.astype(sample.dtype))


@jax.jit
def _binary(sample: Array, x: Array, temperature: Array) -> Array:
    log_x, log_rest = _log_of_sample(sample), _log_of_sample(1 - sample)
    left_out = jnp.isneginf(x)
    y = jnp.where(left_out, 0, x) - temperature * (log_x - log_rest)
    density = jnp.log(temperature) - log1p_exp(-y) - log1p_exp(y) - log_x - log_rest
    bad = jnp.isnan(sample) | (x == jnp.inf)
    return jnp.where(bad, jnp.nan, jnp.where(left_out, 0, density))
