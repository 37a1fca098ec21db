"""Softmax, log-softmax and log-normaliser of every φ: one rule for (log p, p, L), in x = ψ(z) + log w."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import sums
from jsoftmax._rules import compiled_rule
from jsoftmax.checks.arguments import (
    Axis,
    accumulation_dtype,
    as_scores,
    canonical_axis,
    check_flag,
    check_log_weights,
    check_where,
    joint_shape,
    public,
    read,
    widened,
)
from jsoftmax.phi import Exponential, Phi, array_parameters, exp, log_phi
from jsoftmax.sharding import AxisName, check_axis_name, check_parts, check_sharded
from jsoftmax.sums import Normalized, Want


@compiled_rule("axis", "axis_name", "want", "order", "is_shifted")
def normalize(  # noqa: PLR0917  (as rules, which have no keywords, call it)
    x: Array,
    axis: tuple[int, ...],
    axis_name: AxisName = None,
    want: Want = "all",
    order: int = 0,
    is_shifted: bool = False,
    again: Array | None = None,
) -> Normalized:
    """l = log p, p and L; x = −inf leaves a class out. want: what is wanted; order: of the derivative; is_shifted:
    whether the maximum of each row is known to be 0. again: x once more, for the rule, computed from what
    `sums.read_again` gives; None if the rule should use x itself. It must have the values and the derivatives of x: the
    rule takes ẋ from x, and derivatives of the rule from `again`."""
    return sums.normalized(x, axis, axis_name, want, order, is_shifted)


@normalize.defjvp
def _normalize_jvp(  # noqa: PLR0917  (a rule has no keywords)
    axis: tuple[int, ...],
    axis_name: AxisName,
    want: Want,
    order: int,
    is_shifted: bool,
    primals: Any,
    tangents: Any,
) -> tuple[Normalized, Normalized]:
    """l̇ = ẋ − Σ p ẋ, ṗ = p (ẋ − Σ p ẋ), L̇ = Σ p ẋ  (MATH 1.2 to 1.4)."""
    (x, again), (x_dot, _) = primals, tangents
    out = normalize(x, axis, axis_name, want, sums.next_order(x, order, axis_name), is_shifted, again)
    x, x_dot = x if again is None else again, widened(x_dot)
    return out, Normalized(
        sums.log_p_rate(x, out.p, x_dot, axis, axis_name, order),
        sums.p_rate(x, out.p, x_dot, axis, axis_name, want, order),
        sums.class_sum(out.p * x_dot, axis, axis_name),
    )


def constant_at_impossible(log_p: Array) -> Array:
    """log p, with derivatives 0 where it is −∞."""
    return jnp.where(jnp.isneginf(log_p), lax.stop_gradient(log_p), log_p)


def weighted_scores(phi: Phi, z: Array, where: Array | None, log_weights: Array | None) -> Array:
    """x = ψ(z) + log w; −inf where a mask, a weight of 0 or a score of −inf leaves a class out (MATH 1.1).

    x is in the accumulation dtype, unless it is z itself, which then stays as narrow as it is given.
    """
    if log_weights is not None or not isinstance(phi, Exponential):
        z = read(z)
    if where is None and log_weights is None:
        return log_phi(phi, z)
    kept = jnp.ones((), bool) if where is None else where
    if log_weights is not None:
        kept = kept & ~jnp.isneginf(log_weights) & ~jnp.isneginf(z)
    x = log_phi(phi, jnp.where(kept, z, -jnp.inf))
    return x if log_weights is None else x + jnp.where(kept, log_weights, 0)


class Arguments(NamedTuple):
    """Checked arguments."""

    given: tuple[Array, ...]
    """The arrays of scores, of one shape, in their common dtype."""
    axis: tuple[int, ...]
    axis_name: AxisName
    where: Array | None
    log_weights: Array | None

    @property
    def dtype(self) -> Any:
        """The dtype of the scores."""
        return self.given[0].dtype

    @property
    def scores(self) -> tuple[Array, ...]:
        """The scores in the accumulation dtype."""
        return tuple(read(z) for z in self.given)


def check(  # noqa: PLR0917  (as the public functions have them)
    function: str,
    scores: dict[str, Any],
    axis: Any,
    where: Any,
    phi: Any,
    log_weights: Any,
    axis_name: Any = None,
) -> Arguments:
    """The arguments of a public function, checked, promoted and broadcast. scores: arrays by the names that users
    know."""
    check_phi(function, phi)
    arrays = {name: as_scores(function, name, z) for name, z in scores.items()}
    check_axis_name(function, axis_name)
    for name, z in arrays.items():
        check_sharded(function, name, z, axis_name)
        if z.ndim == max(a.ndim for a in arrays.values()):
            check_parts(function, z.shape, canonical_axis(function, axis, z.ndim), axis_name, **arrays)
    shape = joint_shape(function, arrays)
    narrow = jnp.result_type(*arrays.values())
    axes = tuple(sorted(canonical_axis(function, axis, len(shape))))
    check_parts(function, shape, axes, axis_name, where=where, log_weights=log_weights)
    return Arguments(
        tuple(jnp.broadcast_to(z.astype(narrow), shape) for z in arrays.values()),
        axes,
        axis_name,
        check_where(function, where, shape),
        check_log_weights(function, log_weights, shape, accumulation_dtype(narrow)),
    )


@functools.partial(jax.jit, static_argnames=("f", "axis", "axis_name", "reads_again"))
def _of_weighted_scores(  # noqa: PLR0917  (as `Arguments` has them)
    f: Callable[..., Array],
    given: tuple[Array, ...],
    axis: tuple[int, ...],
    axis_name: AxisName,
    where: Array | None,
    log_weights: Array | None,
    phi: Phi,
    parameters: tuple[Array | None, ...],
    reads_again: bool = False,
) -> Array:
    def x(z: Array) -> Array:
        return weighted_scores(phi, z, where, log_weights)

    scores = [sums.read_again(z, axis, axis_name) for z in given] if reads_again else []
    again = [None if z is None else x(z) for z in scores]
    return f(*map(x, given), *parameters, axis, axis_name, *again)


def keep_classes(
    f: Callable[..., Array],
    arguments: Arguments,
    phi: Phi,
    parameters: tuple[Array | None, ...] = (),
    *,
    reads_again: bool = False,
) -> Array:
    """f(x, …, *parameters, axis, axis_name) for x = ψ(z) + log w, with a result in the dtype of the scores.

    All is compiled as one program, so that results that f drops are not computed, and narrow scores need not be stored
    in a wide dtype. reads_again: whether f, after its other arguments, may get each x a second time, for its rule, as
    `normalize` has it.
    """
    return _of_weighted_scores(f, *arguments, phi, parameters, reads_again).astype(arguments.dtype)


def reduce_classes(
    f: Callable[..., Array],
    arguments: Arguments,
    phi: Phi,
    keepdims: bool = False,
    parameters: tuple[Array | None, ...] = (),
    *,
    reads_again: bool = False,
) -> Array:
    """The same for an f that reduces the classes; the result is in the accumulation dtype."""
    result = _of_weighted_scores(f, *arguments, phi, parameters, reads_again)
    return result if keepdims else jnp.squeeze(result, arguments.axis)


def check_phi(function: str, phi: Any) -> None:
    """Checks that `phi` is a `Phi`. For anything else the error names the way out."""
    if isinstance(phi, Phi):
        return
    name = getattr(phi, "__name__", "")
    if getattr(phi, "__module__", "").startswith("jsoftmax."):
        way_out = f"Call {name} with its parameters: phi=jsoftmax.{name}(…)."
    else:
        way_out = "Wrap a function of your own: phi=jsoftmax.from_callable(f)."
    raise TypeError(f"{function}: phi must be a φ such as jsoftmax.exp or jsoftmax.taylor(2); got {phi!r}. {way_out}")


def check_phi_of_blocks(function: str, phi: Any) -> None:
    """`check_phi` for a function that computes scores in blocks, which arrays of parameters would not fit."""
    check_phi(function, phi)
    for name, shape in array_parameters(phi).items():
        raise ValueError(
            f"{function}: the parameters of phi must be single numbers, since scores are computed in blocks; got "
            f"{phi.name} with {name} of shape {shape}. For a value of each row or class compute all scores and use a "
            "function of scores; for several models or heads use jax.vmap."
        )


def check_phi_moves(function: str, phi: Phi, axes: tuple[int, ...], ndim: int) -> None:
    """Checks a φ for a function that moves the classes to the last axis, where arrays of parameters do not follow."""
    arrays = {} if axes == (ndim - 1,) else array_parameters(phi)
    for name, shape in arrays.items():
        raise ValueError(
            f"{function}: with parameters of phi that are arrays the classes must be the last axis; got "
            f"{phi.name} with {name} of shape {shape} and classes on {axes}. Move them: jnp.moveaxis(…, axis, -1)."
        )


@public
def softmax(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
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
      axis_name: the axis of `jax.shard_map` or `jax.vmap(axis_name=…)` over which the classes are sharded. Each device
        gives its own part of `z`, `where` and `log_weights` and gets its part of the result; devices exchange only a
        few numbers for each row (MATH 13.2). Gradients taken inside shard_map are right with check_vma, its default.
        Without it, and inside vmap, they are those of the sum over the devices; an array that must be the same on all
        devices then counts once for each of them.
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
    arguments = check("softmax", {"z": z}, axis, where, phi, log_weights, axis_name)
    return keep_classes(_p, arguments, phi, reads_again=True)


@public
def log_softmax(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """Log-probabilities l = log p, small ones and ones near 0 alike to the last digits.

    l_k = x_k − L,  x = ψ(z) + log w;   ∂l_i/∂z_j = (δ_ij − p_j) s_j     (MATH 1.4)

    Args:
      z, axis, where, phi, log_weights, axis_name: as in `softmax`.
    Returns: the shape and dtype of `z`; within |u| + 4 ulp, u = x − max x (MATH 4).
      −inf, with derivatives 0, for a class left out. A score of +inf or NaN makes its row NaN.
    Raises: as `softmax`.
    Source: de Brébisson & Vincent 2016, equation 3 (any φ).

    >>> log_softmax(jnp.array([0., -20.]))
    Array([-2.06115...e-09, -2.00000...e+01], dtype=float32)
    """
    arguments = check("log_softmax", {"z": z}, axis, where, phi, log_weights, axis_name)
    return keep_classes(log_p, arguments, phi, reads_again=True)


@public
def log_normalizer(
    z: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    phi: Phi = exp,
    log_weights: ArrayLike | None = None,
    keepdims: bool = False,
    axis_name: AxisName = None,
) -> Float[Array, "..."]:
    """The log-normaliser L = log Σ w φ(z); with phi=exp the log-sum-exp, whose derivatives are cumulants.

    L = log Σ e^x,  x = ψ(z) + log w;   ∂L/∂z_j = p_j s_j     (MATH 1.3)

    Args:
      z, axis, where, phi, log_weights, axis_name: as in `softmax`; `axis` is reduced.
      keepdims: keep the reduced axes with length 1.
    Returns: `[...]` in the dtype of `z`, but float32 for narrower scores (`jax.nn.logsumexp` keeps them narrow);
      within 4 ulp of max(|max x|, |L|) (MATH 4). An empty row: −inf with derivatives 0. A score of +inf: +inf with
      NaN derivatives. NaN: NaN in that row alone.
    Raises: as `softmax`.
    Source: log-sum-exp of log φ; cumulants: MATH 1.3.

    >>> log_normalizer(jnp.array([0., -20.]))
    Array(2.06115...e-09, dtype=float32)
    """
    arguments = check("log_normalizer", {"z": z}, axis, where, phi, log_weights, axis_name)
    return reduce_classes(log_sum, arguments, phi, check_flag("log_normalizer", "keepdims", keepdims))


def _p(x: Array, axis: tuple[int, ...], axis_name: AxisName, again: Array | None = None) -> Array:
    return normalize(x, axis, axis_name, "p", again=again).p


def log_p(x: Array, axis: tuple[int, ...], axis_name: AxisName = None, again: Array | None = None) -> Array:
    """log p only. again: as in `normalize`; of a caller that has none it is made from x."""
    again = sums.read_again(x, axis, axis_name) if again is None else again
    return normalize(x, axis, axis_name, "log_p", again=again).log_p


def log_sum(x: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """L only; it keeps the reduced axes with length 1."""
    return normalize(x, axis, axis_name, "L").log_normalizer
