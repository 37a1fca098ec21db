"""Losses that need only the sum, the sum of squares and the label's score of a row of V scores (MATH 12.1, 12.3)."""

import abc
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from jsoftmax._pytree import pytree_class
from jsoftmax._series import log1p_exp
from jsoftmax.checks.arguments import check_option, is_concrete_number
from jsoftmax.checks.matrices import check_quadratic
from jsoftmax.phi import Phi, log_phi


class SphericalLoss(abc.ABC):
    """ℓ(Σ o, Σ o², o_y, V) for a row of V scores o; made by `log_loss` or `z_loss`, or a pytree of your own."""

    name: str

    @abc.abstractmethod
    def of(self, first: Array, square: Array, score: Array, classes: int) -> Array:
        """ℓ elementwise; autodiff takes its derivatives."""

    def __repr__(self) -> str:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))  # pyright: ignore[reportArgumentType]
        return f"{self.name}({', '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)})"


@pytree_class
class LogLoss(SphericalLoss):
    """log Σ φ(o) − log φ(o_y)."""

    phi: Phi
    name = "log_loss"

    def of(self, first: Array, square: Array, score: Array, classes: int) -> Array:
        coefficients: Any = self.phi.quadratic
        a0, a1, a2 = (jnp.asarray(a).astype(score.dtype) for a in coefficients)
        return jnp.log(classes * a0 + a1 * first + a2 * square) - log_phi(self.phi, score)


@pytree_class
class ZLoss(SphericalLoss):
    """(1/a) log(1 + e^{a (b − t)}), t = (o_y − μ)/σ."""

    scale: Any
    shift: Any
    name = "z_loss"

    def of(self, first: Array, square: Array, score: Array, classes: int) -> Array:
        a, b = (jnp.asarray(number).astype(score.dtype) for number in (self.scale, self.shift))
        mean = first / classes
        variance = square / classes - mean**2
        flat = variance <= 0  # all scores are equal within rounding
        t = jnp.where(flat, 0, (score - mean) / jnp.sqrt(jnp.where(flat, 1, variance)))
        return log1p_exp(a * (b - t)) / a


def log_loss(phi: Phi) -> SphericalLoss:
    """Cross-entropy under an order-2 φ, as a loss of this module.

    ℓ = log (V a0 + a1 S + a2 q₂) − log φ(o_y),   S = Σ o,  q₂ = Σ o²     (MATH 12.1)

    Args:
      phi: taylor(2), spherical(ε) or quadratic(a0, a1, a2), with one number for all classes in each place.
    Raises: ValueError for a φ of another order, TypeError for what is no φ.
    Source: de Brébisson & Vincent 2016, section 3.

    >>> from jsoftmax import taylor
    >>> log_loss(taylor(2))
    log_loss(taylor(2))
    """
    return LogLoss(check_quadratic("log_loss", phi))


def z_loss(scale: ArrayLike = 1.0, shift: ArrayLike = 0.0) -> SphericalLoss:
    """The Z-loss, as a loss of this module: softplus of the label's standardised score.

    ℓ = (1/a) log(1 + e^{a (b − (o_y − μ)/σ)}),   μ = S/V,  σ² = q₂/V − μ²     (MATH 12.3)

    `losses.spherical_z_loss` of the scores. σ² cancels where the mean of the scores is much larger than their spread;
    where that leaves nothing, the standardised score is taken as 0, with derivatives 0.

    Args:
      scale: a > 0; shift: b. Numbers, may be traced.
    Raises: ValueError if a number is out of range.
    Source: de Brébisson & Vincent, arXiv:1604.08859, equation 6.

    >>> z_loss(scale=2.)
    z_loss(2, 0)
    """
    tiny, dtype = float(jnp.finfo(jnp.float32).tiny), jnp.result_type(float)
    check_option("z_loss", scale, dtype, scale=(tiny, math.inf))
    check_option("z_loss", shift, dtype, shift=(-math.inf, math.inf))
    numbers: tuple[Any, Any] = scale, shift  # as floats: an int cannot be differentiated
    return ZLoss(*(float(number) if is_concrete_number(number) else number for number in numbers))
