"""φ, the positive map of one score, and ψ = log φ with its one derivative rule.

Every function that takes a φ depends on the scores only through x = ψ(z) = log φ(z) (MATH 1), so a φ is known by ψ, its
slope s = ψ' and its curvature t = ψ''. A new φ is one class, one factory and one entry in `PHIS` (CONTRIBUTING.md).
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jsoftmax._pytree import jvp_of_live, pytree_class, without_zeros
from jsoftmax.checks.arguments import (
    accumulation_dtype,
    all_known,
    as_number,
    as_scores,
    broadcasts_to,
    is_concrete_number,
)


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

    def __call__(self, z: ArrayLike | None = None) -> Float[Array, "..."]:
        """φ(z) = e^ψ(z) elementwise.

        >>> exp(1.)
        Array(2.71828..., dtype=float32)
        """
        if z is None:
            raise TypeError(
                f"{self}: z must be an array of scores; got none. {self} is a φ already: pass it as phi=…, or call it "
                "with scores to get φ(z)."
            )
        z = as_scores(str(self), "z", z)
        return jnp.exp(log_phi(self, z.astype(accumulation_dtype(z.dtype)))).astype(z.dtype)

    def __repr__(self) -> str:
        values = [_number(getattr(self, f.name)) for f in dataclasses.fields(self)]  # pyright: ignore[reportArgumentType]
        return f"{self.name}({', '.join(values)})" if values else self.name


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else repr(value)


# --- ψ with its one rule -------------------------------------------------------------------------------------


def log_phi(phi: Phi, z: Array) -> Array:
    """ψ(z) with the edges of MATH 5, for floating `z` in the accumulation dtype. For `exp` it is z, at no cost."""
    if isinstance(phi, Exponential):
        return z
    for name, shape in array_parameters(phi).items():
        if not broadcasts_to(shape, z.shape):
            raise ValueError(
                f"{phi.name}: {name} must be one number, or an array that broadcasts to the scores' shape {z.shape}; "
                f"got shape {shape}. A value for each row ends in an axis of length 1: {name}[..., None]."
            )
    return _traced_log(phi, z)


def array_parameters(phi: Phi) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are arrays with axes, by name. Those of a user's function do not count."""
    values = {f.name: getattr(phi, f.name) for f in dataclasses.fields(phi)}  # pyright: ignore[reportArgumentType]
    return {name: tuple(a.shape) for name, a in values.items() if getattr(a, "ndim", 0)}


# These are compiled by themselves, as `maps.normalize` is: rules call them many times, and JAX keeps their traces.
@jax.jit
def _traced_log(phi: Phi, z: Array) -> Array:
    return _log(_cast(phi, z.dtype), z)


@jax.jit
def slope(phi: Phi, z: Array) -> Array:
    """s = ψ'(z), and 0 where a score is infinite. Its derivative rule uses t."""
    return _slope(_cast(phi, z.dtype), z)


@jax.jit
def curvature(phi: Phi, z: Array) -> Array:
    """t = ψ''(z), and 0 where a score is infinite."""
    finite = is_finite(z)
    return jnp.where(finite, _elementwise(phi, _cast(phi, z.dtype).curvature, jnp.where(finite, z, 0)), 0)


def is_finite(z: Array) -> Array:
    """|z| < ∞, by a comparison: XLA for GPUs does not fuse `isfinite` into the kernel of a row."""
    return jnp.abs(z) < jnp.inf


@jax.custom_jvp
def _log(phi: Phi, z: Array) -> Array:
    finite = is_finite(z)
    return jnp.where(finite, _elementwise(phi, phi.log_phi, jnp.where(finite, z, 0)), z)


@functools.partial(_log.defjvp, symbolic_zeros=True)
def _log_jvp(primals: tuple[Phi, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """ψ̇ = s ż + (∂ψ/∂θ) θ̇  (MATH 1.9)."""
    return _log(*primals), _tangent(_log.fun, slope, primals, tangents)


@jax.custom_jvp
def _slope(phi: Phi, z: Array) -> Array:
    finite = is_finite(z)
    return jnp.where(finite, _elementwise(phi, phi.slope, jnp.where(finite, z, 0)), 0)


@functools.partial(_slope.defjvp, symbolic_zeros=True)
def _slope_jvp(primals: tuple[Phi, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    """ṡ = t ż + (∂s/∂θ) θ̇  (MATH 1.10)."""
    return _slope(*primals), _tangent(_slope.fun, curvature, primals, tangents)


def _tangent(f: Callable[..., Array], rate: Callable[..., Array], primals: Any, tangents: Any) -> Array:
    """rate(φ, z) ż + (∂f/∂θ) θ̇. A term whose tangent is a symbolic zero is left out, because 0 · inf is NaN."""
    (phi, z), (phi_dot, z_dot) = primals, tangents
    # checkpointed, so that the backward pass keeps only the scores, which it has anyway, and computes the rate again
    product = jax.checkpoint(lambda phi, z, z_dot: rate(phi, z) * z_dot, prevent_cse=False)
    total = jnp.zeros_like(z) if isinstance(z_dot, SymbolicZero) else product(phi, z, z_dot)
    live = without_zeros(phi_dot)
    if jax.tree.leaves(live):
        total = total + jvp_of_live(lambda phi: f(phi, z), phi, live)[1]
    return total


def _cast(phi: Phi, dtype: Any) -> Phi:
    """φ with its floating parameters in the accumulation dtype of the scores, which alone decide the dtype of the
    result."""
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


# --- exp, which needs no ψ -----------------------------------------------------------------------------------


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


# --- what factories ask of parameters ------------------------------------------------------------------------


def check_parameter(function: str, argument: str, value: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
    """A number as a float (an int cannot be differentiated), an array as it is, unless it is out of range."""
    if not all_known(value, np.vectorize(fits, otypes=[bool])):
        raise ValueError(f"{function}: {argument} must be {wanted}; got {value}. Choose a number in that range.")
    if is_concrete_number(value):  # not made an array, because an import must not start a backend
        return float(value)
    return as_number(function, argument, value)
