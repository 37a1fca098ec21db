"""Gradients through classes that were drawn: conditional noise, Rao–Blackwell, ReinMax (MATH 10.9 to 10.11)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from jsoftmax import maps
from jsoftmax.checks.arguments import broadcast_number, is_int, public
from jsoftmax.checks.sampling import check_index, check_key
from jsoftmax.gumbel import _noise
from jsoftmax.gumbel._categorical import categorical
from jsoftmax.gumbel._concrete import relaxed, straight_through
from jsoftmax.maps import normalize
from jsoftmax.phi import Phi, exp
from jsoftmax.sums import has_bad_score


@jax.jit
def conditional(key: Any, x: Array, index: Array, maximum: Array | None) -> Array:
    """x + g, given that the maximum is at the index. Derivatives treat the noise as a constant  (MATH 10.9)."""
    kept = ~jnp.isneginf(x)
    scores = jnp.where(kept, x, 0)
    fixed = lax.stop_gradient(scores)
    noise = _noise.gumbel(key, x.shape, x.dtype)
    chosen = _noise.is_chosen(index, x)
    if maximum is None:
        L = maps.log_sum(lax.stop_gradient(x), (x.ndim - 1,))
        top = L + jnp.sum(jnp.where(chosen, noise, 0), -1, keepdims=True)
    else:
        top = lax.stop_gradient(maximum)
    free = fixed + noise
    below = jnp.minimum(free, top) - jnp.log1p(jnp.exp(-jnp.abs(free - top)))  # −log(e^−free + e^−top)
    below = jnp.minimum(below, jnp.nextafter(top, jnp.full_like(top, -jnp.inf)))  # so rounding makes no tie
    perturbed = straight_through(jnp.where(chosen, top, below), scores)
    impossible = ~jnp.any(chosen, -1, keepdims=True) & jnp.any(kept, -1, keepdims=True)
    bad = impossible | has_bad_score(x, (x.ndim - 1,))
    return jnp.where(bad, jnp.nan, jnp.where(kept, perturbed, -jnp.inf))


def given_maximum(key: Any, x: Array, maximum: Array) -> Array:
    """x + g, given the largest of a row, `[...]`. The class that has it is drawn  (MATH 10.9)."""
    of_index, of_noise = jax.random.split(key)
    return conditional(of_noise, x, categorical(of_index, x), maximum[..., None])


@public
def conditional_gumbels(
    key: PRNGKeyArray | ArrayLike,
    z: ArrayLike,
    index: Integer[ArrayLike, "..."],
    axis: int = -1,
    *,
    maximum: ArrayLike | None = None,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Perturbed scores x + g, given that the class `index` has the largest.

    M = L + g_index at the index, elsewhere −log(e^{−x − g} + e^{−M});   x = ψ(z) + log w     (MATH 10.9)

    With `index` drawn from p they have the distribution of x + g: what is known of the noise once a class was drawn.

    Args:
      key: a PRNG key.
      z: scores `[..., K]`, any floating dtype; integers promote.
      index: integers `[...]`, the class of each row.
      axis: int: the classes' axis.
      maximum: M, given as well: a number or an array that broadcasts to `[...]`. None: drawn.
      phi, where, log_weights: as in `jsoftmax.softmax`.
    Returns: the shape and dtype of `z` (in float32 and wider the largest is always at the index). The noise is a
      constant: the derivatives are those of x. A class left out: −inf. An index that is out of range or left out:
      NaN, and so is a row with a score of NaN or +inf.
    Raises: as `jsoftmax.softmax`; TypeError or ValueError for an index of another dtype or shape.
    Source: Maddison, Tarlow & Minka 2014, section 3; Paulus, Maddison & Krause 2021, appendix B.

    >>> int(jnp.argmax(conditional_gumbels(jax.random.key(0), jnp.array([5., 1., 0.]), jnp.array(2))))
    2
    """
    function = "conditional_gumbels"
    check_key(function, key)
    given = _noise.check(function, z, axis, where, phi, log_weights)
    top = None
    if maximum is not None:
        batch = given.x.shape[:-1]
        top = broadcast_number(function, "maximum", maximum, batch, "the scores without their classes,")
        top = top.astype(given.x.dtype)[..., None]
    return given.restore(conditional(key, given.x, check_index(function, index, given.x), top))


@functools.partial(jax.jit, static_argnums=4)
def _rao_blackwellised(key: Any, x: Array, index: Array, temperature: Array, samples: int) -> Array:
    """The mean of relaxed samples under conditional noise  (MATH 10.10)."""
    keys = jax.random.split(key, samples)
    perturbed = jax.vmap(conditional, (0, None, None, None))(keys, x, index, None)
    return jnp.mean(relaxed(perturbed, temperature).p, 0)


@public
def rao_blackwellised(  # noqa: PLR0917  (as `gumbel_softmax` has them)
    key: PRNGKeyArray | ArrayLike,
    z: ArrayLike,
    index: Integer[ArrayLike, "..."],
    temperature: ArrayLike,
    samples: int,
    axis: int = -1,
    *,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """A class that was drawn, as a one-hot vector, with the straight-through gradient averaged over the noise that
    could have led to it: less variance than `gumbel_softmax(…, hard=True)`, the same mean.

    value 1_index;   derivative that of mean_s softmax((x + g_s)/τ),  x + g_s conditional Gumbels     (MATH 10.10)

    Args:
      key, z, index, axis, phi, where, log_weights: as in `conditional_gumbels`; draw the index from p first.
      temperature: as in `gumbel_softmax`.
      samples: how many draws of noise to average over, an int ≥ 1; needs memory for as many arrays like `z`.
    Returns: the shape and dtype of `z`; the value exactly one-hot. Edges as in `conditional_gumbels`.
    Raises: as `conditional_gumbels` and `gumbel_softmax`; TypeError or ValueError if `samples` is no int ≥ 1.
    Source: Paulus, Maddison & Krause 2021, equation 8.

    >>> rao_blackwellised(jax.random.key(0), jnp.array([0., 1., 2.]), jnp.array(1), 0.5, 10)
    Array([0., 1., 0.], dtype=float32)
    """
    function = "rao_blackwellised"
    check_key(function, key)
    given, tau = _noise.check_relaxed(function, z, temperature, axis, where, phi, log_weights)
    index = check_index(function, index, given.x)
    if not is_int(samples) or samples < 1:
        kind = ValueError if is_int(samples) else TypeError
        raise kind(f"{function}: samples must be an int >= 1, known at trace time; got {samples!r}. 10 is usual.")
    soft = _rao_blackwellised(key, given.x, index, tau, int(samples))
    return given.restore(straight_through(_noise.one_hot(index, given.x), soft))


@public
def reinmax(
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
    """A class drawn from p, as a one-hot vector D, with a straight-through gradient of second order: by Heun's rule.

    value D;   derivative 2 J(½ (D + softmax(x/τ))) − ½ J(p),   J(q) = diag(q) − q qᵀ,  x = ψ(z) + log w   (MATH 10.11)

    Args:
      key, z, axis, shape, phi, where, log_weights: as in `gumbel_softmax`.
      temperature: τ > 0 as in `gumbel_softmax`, but a constant: the rule has no derivative in it. τ ≥ 1 is usual.
    Returns: as `gumbel_softmax`; the value exactly one-hot. A class left out has 0. A score of NaN or +inf: NaN
      in that row alone.
    Raises: as `gumbel_softmax`.
    Source: Liu, Dong, Liu, Yu & Gao 2023, theorem 3.2 and section 4.

    >>> reinmax(jax.random.key(0), jnp.array([0., 1., 99.]), 1.)
    Array([0., 0., 1.], dtype=float32)
    """
    function = "reinmax"
    check_key(function, key)
    given, tau = _noise.check_relaxed(function, z, temperature, axis, where, phi, log_weights)
    x = given.samples(function, shape).x
    hard = _noise.one_hot(categorical(key, lax.stop_gradient(x)), x)
    return given.restore(straight_through(hard, _heun(x, hard, tau)))


@jax.jit
def _heun(x: Array, hard: Array, temperature: Array) -> Array:
    """2 q − ½ p, where q = ½ (D + softmax(x/τ)) has the derivative of a softmax in x  (MATH 10.11)."""
    axis = (x.ndim - 1,)
    q = (hard + relaxed(lax.stop_gradient(x), lax.stop_gradient(temperature)).p) / 2
    present = q != 0
    log_q = straight_through(jnp.log(jnp.where(present, q, 1)), jnp.where(present, x, 0))
    return 2 * normalize(jnp.where(present, log_q, -jnp.inf), axis).p - normalize(x, axis).p / 2
