"""Polynomials: taylor, spherical and quadratic, in forms that neither overflow nor cancel (MATH 3.2, 3.3, 3.11)."""

import functools
import math
import operator
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax._pytree import pytree_class, static
from jsoftmax.checks.arguments import is_concrete_number
from jsoftmax.phi.base import Phi, check_parameter


def _scaled(coefficients: list[Any], z: Array) -> Array:
    """Σ a_j z^j, divided by z^degree where |z| > 1. So a ratio of two of the same degree never overflows."""
    far = jnp.abs(z) > 1
    x = jnp.where(far, 1 / jnp.where(far, z, 1), z)
    return jnp.where(far, _horner(coefficients[::-1], x), _horner(coefficients, x))


def _horner(coefficients: list[Any], x: Array) -> Array:
    """Σ a_j x^j."""
    return functools.reduce(lambda total, a_j: total * x + a_j, reversed(coefficients), jnp.zeros_like(x))


def _log_polynomial(coefficients: list[Any], z: Array) -> Array:
    """log Σ a_j z^j = degree · log|z| + log(Σ a_j z^j / |z|^degree), for an even degree."""
    far = jnp.abs(z) > 1
    return (len(coefficients) - 1) * jnp.log(jnp.where(far, jnp.abs(z), 1)) + jnp.log(_scaled(coefficients, z))


@pytree_class
class Taylor(Phi):
    """φ(z) = Σ_{k≤n} z^k / k!, n even (MATH 3.2)."""

    order: int = static()
    name = "taylor"

    def definition(self, z: Any, xp: Any) -> Any:
        return sum(z**k / math.factorial(k) for k in range(self.order + 1))

    @property
    def _a(self) -> list[float]:
        return [1 / math.factorial(j) for j in range(self.order + 1)]

    def log_phi(self, z: Array) -> Array:  # beyond `limit` the last term alone counts, within rounding
        n, limit = self.order, 8 * self.order / float(jnp.finfo(z.dtype).eps)
        if limit**n > float(jnp.finfo(z.dtype).max):
            return _log_polynomial(self._a, z)
        far = jnp.abs(z) > limit
        total = _horner(self._a, jnp.where(far, 0, z))
        log = jnp.log(jnp.where(far, jnp.abs(z), total))
        return jnp.where(far, n * log + math.log(self._a[n]), log)

    def slope(self, z: Array) -> Array:  # s = φ_{n−1} / φ_n
        return _scaled([*self._a[:-1], 0.0], z) / _scaled(self._a, z)

    def curvature(self, z: Array) -> Array:  # t = −(z^{n−1}/n! / φ_n) (Σ_{k<n} φ_k / φ_n): no cancellation
        n, a = self.order, self._a
        term = _scaled([0.0] * (n - 1) + [a[n], 0.0], z) / _scaled(a, z)
        return -term * (_scaled([(n - j) * a[j] for j in range(n)] + [0.0], z) / _scaled(a, z))

    @property
    def quadratic(self) -> tuple[Any, Any, Any] | None:
        return (1.0, 1.0, 0.5) if self.order == 2 else None


def taylor(order: int) -> Phi:
    """The Taylor polynomial of the exponential: the log-Taylor softmax's φ.

    φ(z) = Σ_{k≤n} z^k / k!,   s = φ_{n−1}/φ_n,   t = −z^{n−1} Σ_{k<n} φ_k / (n! φ_n²)     (MATH 3.2)

    Positive for every score because n is even, with minimum 1/2 at −1 for n = 2. Not monotone: it decreases left of
    one point (−1 for n = 2, −1.60 for n = 4), so very negative scores attract mass and the argmax of p need not be the
    argmax of z. ψ ~ n log|z| for large |z| and nothing overflows.

    Args:
      order: n, an even int in [2, 16]; part of the compiled program. For negative scores the terms cancel: ψ in float32
        is within 2e-6 for n ≤ 4, 7e-6 for 8, 6e-5 for 12, 5e-4 for 16.
    Raises: TypeError if `order` is no int, ValueError if it is odd or out of range.
    Source: de Brébisson & Vincent 2016, section 3.2 (n = 2); Banerjee et al. 2020, equations 3 and 4.

    >>> taylor(2)(jnp.array([-1., 0., 2.]))
    Array([0.5, 1. , 5. ], dtype=float32)
    """
    try:
        order = operator.index(order)
    except TypeError:
        raise TypeError(
            f"taylor: order must be an even Python int >= 2; got {type(order).__name__}. It shapes the program and "
            "cannot be traced: write taylor(2)."
        ) from None
    if order < 2 or order % 2 or order > 16:
        raise ValueError(
            "taylor: order must be an even integer in [2, 16] (an odd order makes φ negative for some scores, and "
            f"beyond 16 cancellation leaves float32 few digits); got {order}. Write e.g. taylor(2), or phi=exp."
        )
    return Taylor(order)


@pytree_class
class Spherical(Phi):
    """φ(z) = z² + ε (MATH 3.3)."""

    epsilon: Any
    name = "spherical"

    def definition(self, z: Any, xp: Any) -> Any:
        return z**2 + self.epsilon

    @property
    def _a(self) -> list[Any]:
        return [self.epsilon, 0.0, 1.0]

    def log_phi(self, z: Array) -> Array:
        return _log_polynomial(self._a, z)

    def slope(self, z: Array) -> Array:  # s = 2z/φ
        return _scaled([0.0, 2.0, 0.0], z) / _scaled(self._a, z)

    def curvature(self, z: Array) -> Array:  # t = (2/φ) (ε − z²)/φ
        a = _scaled(self._a, z)
        return _scaled([2.0, 0.0, 0.0], z) / a * (_scaled([self.epsilon, 0.0, -1.0], z) / a)

    @property
    def quadratic(self) -> tuple[Any, Any, Any] | None:
        return (self.epsilon, 0.0, 1.0)


def spherical(epsilon: Any) -> Phi:
    """The spherical softmax's φ; its cross-entropy is the log-spherical softmax.

    φ(z) = z² + ε,   s = 2z/φ,   t = 2(ε − z²)/φ²     (MATH 3.3)

    Even, so not monotone: −3 and 3 have one probability, and the argmax of p is that of |z|. Invariant to a change of
    sign of all scores.

    Args:
      epsilon: ε > 0, a number or an array that broadcasts to the scores (in heads and attention a number); may be
        traced, vmapped and learned. A traced ε < 0 gives NaN; so learn its logarithm: spherical(jnp.exp(a)).
    Raises: ValueError if ε is known at trace time and not positive.
    Source: de Brébisson & Vincent 2016, section 3.1; ε keeps log p finite at z = 0.

    >>> spherical(1.).log(2.)
    Array(1.60943..., dtype=float32)
    """
    return Spherical(check_parameter("spherical", "epsilon", epsilon, "> 0 and finite", lambda e: 0 < e < math.inf))


@pytree_class
class Quadratic(Phi):
    """φ(z) = a0 + a1 z + a2 z² = a2 (x² + r²), x = z + a1/(2 a2) (MATH 3.11)."""

    a0: Any
    a1: Any
    a2: Any
    name = "quadratic"

    def definition(self, z: Any, xp: Any) -> Any:
        return self.a0 + self.a1 * z + self.a2 * z**2

    def _square(self, z: Array) -> tuple[Array, Any, list[Any]]:
        """x = z + h, h, and the coefficients of x² + r²: a sum of two squares, in which nothing cancels."""
        h = self.a1 / (2 * self.a2)
        return z + h, h, [self.a0 / self.a2 - h**2, 0.0, 1.0]

    def log_phi(self, z: Array) -> Array:
        x, _, a = self._square(z)
        return jnp.log(self.a2) + _log_polynomial(a, x)

    def slope(self, z: Array) -> Array:  # s = 2x/(x² + r²)
        x, _, a = self._square(z)
        return _scaled([0.0, 2.0, 0.0], x) / _scaled(a, x)

    def curvature(self, z: Array) -> Array:  # t = −2 (x − r)(x + r)/(x² + r²)², with x ∓ r as z minus a root
        x, h, a = self._square(z)
        r, size, over = jnp.sqrt(a[0]), _scaled(a, x), _scaled([1.0, 0.0], x)
        below, above = ((z - root) * over / size * over for root in (r - h, -r - h))
        return -2 * below * above

    @property
    def quadratic(self) -> tuple[Any, Any, Any] | None:
        return (self.a0, self.a1, self.a2)


def quadratic(a0: Any, a1: Any, a2: Any) -> Phi:
    """Any positive polynomial of the second order: the φ whose sum over classes the heads of MATH 12 take at once.

    φ(z) = a0 + a1 z + a2 z²,   s = (a1 + 2 a2 z)/φ,   t = (2 a0 a2 − a1² − 2 a1 a2 z − 2 a2² z²)/φ²     (MATH 3.11)

    (1, 1, 1/2) is taylor(2), (ε, 0, 1) is spherical(ε). Not monotone: φ decreases left of −a1/(2 a2) and is even about
    it, with the minimum a0 − a1²/(4 a2) there. The ratios of the three numbers alone change probabilities.

    Args:
      a0, a1, a2: numbers or arrays that broadcast to the scores, a2 > 0 and a1² < 4 a0 a2; may be traced, vmapped and
        learned. Traced ones out of range give NaN: learn a0 = (a1² + e^b)/(4 a2) and a2 = e^c. The smaller
        1 − a1²/(4 a0 a2), the fewer digits the lowest scores keep: in float32 at least 1e-5 of it should be left.
    Raises: ValueError if they are numbers and φ is not positive everywhere.
    Source: the spherical family of Vincent et al. 2015 and de Brébisson & Vincent 2016, section 3.

    >>> quadratic(1., 1., 0.5)(jnp.array([-1., 0., 2.]))
    Array([0.5, 1. , 5. ], dtype=float32)
    """
    numbers = a0, a1, a2
    a0 = check_parameter("quadratic", "a0", a0, "> 0 and finite", lambda a: 0 < a < math.inf)
    a1 = check_parameter("quadratic", "a1", a1, "finite", math.isfinite)
    a2 = check_parameter("quadratic", "a2", a2, "> 0 and finite", lambda a: 0 < a < math.inf)
    if all(map(is_concrete_number, numbers)) and not a1 / a0 * (a1 / a2) < 4:
        raise ValueError(
            f"quadratic: a0, a1, a2 must have a1² < 4 a0 a2, or φ is not positive everywhere; got {a0:g}, {a1:g}, "
            f"{a2:g}. Take a0 above a1²/(4 a2) = {a1 / 4 * (a1 / a2):g}."
        )
    return Quadratic(a0, a1, a2)
