"""φ, the positive map of one score, and ψ = log φ with its one derivative rule.

Every function of the library is a function of x = ψ(z) = log φ(z) (MATH 1), so a φ is known by ψ, its slope
s = ψ' and its curvature t = ψ''. A new φ is one class, one factory and one entry in `PHIS` (CONTRIBUTING.md).
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jsoftmax._pytree import jvp_of_live, pytree_class, without_zeros
from jsoftmax.checks.arguments import accumulation_dtype, as_scores


class Phi(abc.ABC):
    """A positive map φ: R → R⁺ of one score; p = φ(z) / Σ φ(z).

    Subclasses are frozen dataclasses and pytrees with a `name` and four methods. `log_phi`, `slope` and `curvature`
    are ψ, ψ' and ψ'' as closed forms for finite scores, in the dtype of `z`; where φ(z) = 0 they are −inf, 0, 0.
    Users call `phi(z)` and `phi.log(z)`, which add the edges of MATH 5: a score of ±inf gives ψ = ±inf for every φ.
    Not checked: that φ is positive, and that the three formulas belong together (`python -m jsoftmax verify` does).
    """

    name: str
    """The factory's name, for tables and messages."""

    @abc.abstractmethod
    def definition(self, z: Any, xp: Any) -> Any:
        """φ(z) as the textbook writes it, for `jax.numpy` or the oracle's many-digit namespace."""

    @abc.abstractmethod
    def log_phi(self, z: Array) -> Array:
        """ψ = log φ(z)."""

    @abc.abstractmethod
    def slope(self, z: Array) -> Array:
        """s = ψ'(z) = φ'/φ."""

    @abc.abstractmethod
    def curvature(self, z: Array) -> Array:
        """t = ψ''(z)."""

    @property
    def domain(self) -> tuple[float, float]:
        """The open interval of scores on which φ is defined and positive."""
        return (-math.inf, math.inf)

    @property
    def quadratic(self) -> tuple[Any, Any, Any] | None:
        """(a0, a1, a2) of a φ = a0 + a1 z + a2 z², whose sum over all classes needs no score (MATH 12.1); or None."""
        return None

    def log(self, z: ArrayLike) -> Float[Array, "..."]:
        """ψ(z) = log φ(z) elementwise, computed in float32 at least, in the dtype of `z` (integers promote).

        >>> from jsoftmax import spherical
        >>> spherical(1.).log(jnp.array([0., 1e30])).round(2)
        Array([  0.  , 138.16], dtype=float32)
        """
        z = as_scores(f"{self}.log", "z", z)
        return log_phi(self, z.astype(accumulation_dtype(z.dtype))).astype(z.dtype)

    def __call__(self, z: ArrayLike) -> Float[Array, "..."]:
        """φ(z) = e^ψ(z) elementwise.

        >>> exp(1.)
        Array(2.71828..., dtype=float32)
        """
        z = as_scores(str(self), "z", z)
        return jnp.exp(log_phi(self, z.astype(accumulation_dtype(z.dtype)))).astype(z.dtype)

    def __repr__(self) -> str:
        values = [_number(getattr(self, f.name)) for f in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        return f"{self.name}({', '.join(values)})" if values else self.name


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else repr(value)


# --- ψ with its one rule -------------------------------------------------------------------------------------


def log_phi(phi: Phi, z: Array) -> Array:
    """ψ(z) with the edges of MATH 5, for floating `z` in the accumulation dtype; `exp` costs nothing."""
    return z if isinstance(phi, Exponential) else _traced_log(phi, z)


# Compiled by themselves, as `maps.normalize` is: a rule calls them again and again, and JAX keeps their traces.
@jax.jit
def _traced_log(phi: Phi, z: Array) -> Array:
    return _log(_cast(phi, z.dtype), z)


@jax.jit
def slope(phi: Phi, z: Array) -> Array:
    """s = ψ'(z), 0 where a score is infinite; its rule is t."""
    return _slope(_cast(phi, z.dtype), z)


@jax.jit
def curvature(phi: Phi, z: Array) -> Array:
    """t = ψ''(z), 0 where a score is infinite."""
    finite = _is_finite(z)
    return jnp.where(finite, _elementwise(phi, _cast(phi, z.dtype).curvature, jnp.where(finite, z, 0)), 0)


def _is_finite(z: Array) -> Array:
    """|z| < ∞; XLA for GPUs does not fuse `isfinite` into the kernel of a row."""
    return jnp.abs(z) < jnp.inf


@jax.custom_jvp
def _log(phi: Phi, z: Array) -> Array:
    finite = _is_finite(z)
    return jnp.where(finite, _elementwise(phi, phi.log_phi, jnp.where(finite, z, 0)), z)


@functools.partial(_log.defjvp, symbolic_zeros=True)
def _log_jvp(primals: tuple[Phi, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """ψ̇ = s ż + (∂ψ/∂θ) θ̇  (MATH 1.9)."""
    return _log(*primals), _tangent(_log.fun, slope, primals, tangents)


@jax.custom_jvp
def _slope(phi: Phi, z: Array) -> Array:
    finite = _is_finite(z)
    return jnp.where(finite, _elementwise(phi, phi.slope, jnp.where(finite, z, 0)), 0)


@functools.partial(_slope.defjvp, symbolic_zeros=True)
def _slope_jvp(primals: tuple[Phi, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """ṡ = t ż + (∂s/∂θ) θ̇  (MATH 1.10)."""
    return _slope(*primals), _tangent(_slope.fun, curvature, primals, tangents)


def _tangent(f: Callable[..., Array], rate: Callable[..., Array], primals: Any, tangents: Any) -> Array:
    """rate(φ, z) ż + (∂f/∂θ) θ̇, each term only where its tangent is not a symbolic zero: 0 · inf is NaN."""
    (phi, z), (phi_dot, z_dot) = primals, tangents
    # checkpointed: the backward pass keeps the scores, which it has anyway, and computes the rate from them
    product = jax.checkpoint(lambda phi, z, z_dot: rate(phi, z) * z_dot, prevent_cse=False)
    total = jnp.zeros_like(z) if isinstance(z_dot, SymbolicZero) else product(phi, z, z_dot)
    live = without_zeros(phi_dot)
    if jax.tree.leaves(live):
        total = total + jvp_of_live(lambda phi: f(phi, z), phi, live)[1]
    return total


def _cast(phi: Phi, dtype: Any) -> Phi:
    """φ with its floating parameters in the scores' accumulation dtype: the scores alone decide the result's."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf).astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf,
        phi,
    )


def _elementwise(phi: Phi, f: Callable[[Array], Array], z: Array) -> Array:
    result = f(z)
    if result.shape != z.shape:
        raise ValueError(
            f"{phi.name}: φ must map scores one by one; scores of shape {z.shape} gave {result.shape}. Parameters that "
            "are arrays must broadcast to the scores; for one parameter a row use jax.vmap over φ."
        )
    return result.astype(z.dtype)


# --- the two φ that need no file of their own: exp, and a function of the user's -------------------------------


@pytree_class
class Exponential(Phi):
    """φ(z) = e^z: the softmax itself; s = 1, t = 0 (MATH 3.1)."""

    name = "exp"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.exp(z)

    def log_phi(self, z: Array) -> Array:
        return z

    def slope(self, z: Array) -> Array:
        return jnp.ones_like(z)

    def curvature(self, z: Array) -> Array:
        return jnp.zeros_like(z)


exp = Exponential()


@pytree_class
class FromCallable(Phi):
    """A user's φ or ψ; slope and curvature by autodiff where they are not given (MATH 3.10)."""

    of_phi: Any
    of_log_phi: Any
    of_slope: Any
    of_curvature: Any
    name = "from_callable"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.exp(self.of_log_phi(z)) if self.of_phi is None else self.of_phi(z)

    def log_phi(self, z: Array) -> Array:
        if self.of_phi is None:
            return self.of_log_phi(z)
        value = self.of_phi(z)
        zero = value == 0
        return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, value)))

    def slope(self, z: Array) -> Array:
        if self.of_slope is not None:
            return self.of_slope(z)
        psi, s = jax.jvp(self.log_phi, (z,), (jnp.ones_like(z),))
        return jnp.where(jnp.isneginf(psi), 0, s)

    def curvature(self, z: Array) -> Array:
        if self.of_curvature is not None:
            return self.of_curvature(z)
        return jax.jvp(self.slope, (z,), (jnp.ones_like(z),))[1]

    def __eq__(self, other: object) -> bool:  # functools.partial compares by identity
        return isinstance(other, FromCallable) and jax.tree.flatten(self) == jax.tree.flatten(other)

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self)
        return hash((tuple(leaves), structure))

    def __repr__(self) -> str:
        given = self.of_log_phi if self.of_phi is None else self.of_phi
        function = getattr(given, "func", given)
        return f"{self.name}({'log_phi=' if self.of_phi is None else ''}{getattr(function, '__name__', function)})"


def from_callable(
    phi: Callable[..., Any] | None = None,
    *,
    log_phi: Callable[..., Any] | None = None,
    slope: Callable[..., Any] | None = None,
    curvature: Callable[..., Any] | None = None,
) -> Phi:
    """A φ from a function of your own: `phi`, or better its logarithm `log_phi`.

    s = ψ' and t = ψ'' come from autodiff where they are not given     (MATH 3.10)

    The function maps an array elementwise and is written in jax.numpy. Positivity is your promise: where φ is negative
    its row is NaN, where it is 0 the class is left out. Give `log_phi` if φ may overflow. Learnable parameters enter
    through `jax.tree_util.Partial(f, parameters)`, called as f(parameters, z); they are differentiated. A plain
    function is part of the compiled program: define it once, since every new lambda compiles again; it must not close
    over traced values. At 0, where scores that are left out are put, ψ's derivatives in the parameters must be finite:
    for ψ = a log z write jnp.where(z > 0, a * jnp.log(jnp.where(z > 0, z, 1)), -jnp.inf).

    Args:
      phi, log_phi: exactly one of them.
      slope, curvature: s and t as functions of z, where you have closed forms.
    Raises: TypeError if something given is no function, fails on an array or closes over a traced value, ValueError
      unless exactly one of `phi` and `log_phi` is given.

    >>> bell = from_callable(log_phi=lambda z: -z**2 / 2)
    >>> bell.log(jnp.array([0., 1., 2.]))
    Array([-0. , -0.5, -2. ], dtype=float32)
    """
    for argument, f in (("phi", phi), ("log_phi", log_phi), ("slope", slope), ("curvature", curvature)):
        if f is not None and (isinstance(f, Phi) or not callable(f)):
            raise TypeError(
                f"from_callable: {argument} must be a function of an array of scores; got {type(f).__name__}. "
                "Ready-made φ such as jsoftmax.softplus are passed as they are: phi=jsoftmax.softplus."
            )
    if (phi is None) == (log_phi is None):
        got = "neither" if phi is None else "both"
        raise ValueError(
            f"from_callable: exactly one of phi and log_phi is wanted; got {got}. "
            "Write from_callable(f) for φ, or from_callable(log_phi=f) for ψ = log φ."
        )
    made = [_as_pytree(f) for f in (phi, log_phi, slope, curvature)]
    if any(_closes_over_tracers(f) for f in made if f is not None):
        raise TypeError(
            "from_callable: the functions must not close over traced values, whose derivatives would be lost; got one "
            "that does. Pass them as parameters: from_callable(jax.tree_util.Partial(f, parameters)), called as "
            "f(parameters, z)."
        )
    return FromCallable(*made)


def _closes_over_tracers(f: Any) -> bool:
    """Whether f, traced with its parameters as arguments, reads traced values from elsewhere."""
    leaves, structure = jax.tree.flatten(f)
    z = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        program = jax.make_jaxpr(lambda leaves, z: jax.tree.unflatten(structure, leaves)(z))(leaves, z)
    except Exception as error:  # whatever a function of the user's raises
        raise TypeError(
            "from_callable: the functions must map an array of scores elementwise, in jax.numpy; got one that raised "
            f"{type(error).__name__}. It is called as f(z), a jax.tree_util.Partial(f, parameters) as f(parameters, z)."
        ) from error
    return any(isinstance(value, Tracer) for value in program.consts)


def _as_pytree(f: Callable[..., Any] | None) -> Any:
    """A function as a pytree: callables that are pytrees with their parameters stay, others become static."""
    return f if f is None or not jax.tree_util.all_leaves([f]) else jax.tree_util.Partial(f)
