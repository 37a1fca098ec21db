"""The φ that come with the library, each a class with its closed forms and the name that users write, and `PHIS`."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jsoftmax._pytree import pytree_class, static
from jsoftmax._series import log1p_deficit, log1p_exp, sigmoid
from jsoftmax.checks.arguments import all_known, as_number, is_concrete_number
from jsoftmax.phi import Phi, exp, from_callable


def _parameter(function: str, argument: str, value: Any, wanted: str, fits: Callable[[Any], bool]) -> Any:
    """A number as a float (an int cannot be differentiated), an array as it is, unless it is out of range."""
    if not all_known(value, np.vectorize(fits, otypes=[bool])):
        raise ValueError(f"{function}: {argument} must be {wanted}; got {value}. Choose one in that range.")
    if is_concrete_number(value):  # no array: an import must not start a backend
        return float(value)
    return as_number(function, argument, value)


# --- polynomials ---------------------------------------------------------------------------------------------


def _scaled(coefficients: list[Any], z: Array) -> Array:
    """Σ a_j z^j, over z^degree where |z| > 1: a ratio of two of one degree never overflows."""
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

    def log_phi(self, z: Array) -> Array:  # beyond `limit` all terms but the last are below rounding
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
      epsilon: ε > 0, a number or an array that broadcasts to the scores; may be traced, vmapped and learned. A traced
        ε < 0 gives NaN; so learn its logarithm: spherical(jnp.exp(a)).
    Raises: ValueError if ε is known at trace time and not positive.
    Source: de Brébisson & Vincent 2016, section 3.1; ε keeps log p finite at z = 0.

    >>> spherical(1.).log(2.)
    Array(1.60943..., dtype=float32)
    """
    return Spherical(_parameter("spherical", "epsilon", epsilon, "> 0 and finite", lambda e: 0 < e < math.inf))


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
        """x = z + h, h, and x² + r² by its coefficients: a sum of squares does not cancel."""
        h = self.a1 / (2 * self.a2)
        return z + h, h, [self.a0 / self.a2 - h**2, 0.0, 1.0]

    def log_phi(self, z: Array) -> Array:
        x, _, a = self._square(z)
        return jnp.log(self.a2) + _log_polynomial(a, x)

    def slope(self, z: Array) -> Array:  # s = 2x/(x² + r²)
        x, _, a = self._square(z)
        return _scaled([0.0, 2.0, 0.0], x) / _scaled(a, x)

    def curvature(self, z: Array) -> Array:  # t = −2 (x − r)(x + r)/(x² + r²)²; x − r as z − its root, which may be 0
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
    a0 = _parameter("quadratic", "a0", a0, "> 0 and finite", lambda a: 0 < a < math.inf)
    a1 = _parameter("quadratic", "a1", a1, "finite", math.isfinite)
    a2 = _parameter("quadratic", "a2", a2, "> 0 and finite", lambda a: 0 < a < math.inf)
    if all(map(is_concrete_number, numbers)) and not a1 / a0 * (a1 / a2) < 4:
        raise ValueError(
            f"quadratic: a0, a1, a2 must have a1² < 4 a0 a2, or φ is not positive everywhere; got {a0:g}, {a1:g}, "
            f"{a2:g}. Take a0 above a1²/(4 a2) = {a1 / 4 * (a1 / a2):g}."
        )
    return Quadratic(a0, a1, a2)


# --- built on log(1 + e^z) -----------------------------------------------------------------------------------


@pytree_class
class Softplus(Phi):
    """φ(z) = log(1 + e^z) (MATH 3.4)."""

    name = "softplus"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.log1p(xp.exp(z))

    def log_phi(self, z: Array) -> Array:
        above = z > 0
        z_above, u = jnp.where(above, z, 1), jnp.exp(jnp.where(above, 0, z))
        return jnp.where(above, jnp.log(log1p_exp(z_above)), z + jnp.log1p(-log1p_deficit(u)))

    def slope(self, z: Array) -> Array:  # s = σ(z)/φ; for small u = e^z 1/((1 + u) (1 − h))
        above = z > 0
        z_above, u = jnp.where(above, z, 1), jnp.exp(jnp.where(above, 0, z))
        return jnp.where(above, sigmoid(z_above) / log1p_exp(z_above), 1 / ((1 + u) * (1 - log1p_deficit(u))))

    def curvature(self, z: Array) -> Array:  # t = s (σ(−z) − s); for small u −s² h
        above = z > 0
        z_above, u = jnp.where(above, z, 1), jnp.exp(jnp.where(above, 0, z))
        s = self.slope(z)
        return jnp.where(above, s * (sigmoid(-z_above) - s), -(s**2) * log1p_deficit(u))


softplus = Softplus()


@pytree_class
class Sigsoftmax(Phi):
    """φ(z) = e^z σ(z) (MATH 3.5)."""

    name = "sigsoftmax"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.exp(z) / (1 + xp.exp(-z))

    def log_phi(self, z: Array) -> Array:  # not below the lowest float: a finite score is no mask
        return jnp.maximum(z - log1p_exp(-z), jnp.finfo(z.dtype).min)

    def slope(self, z: Array) -> Array:
        return 1 + sigmoid(-z)

    def curvature(self, z: Array) -> Array:
        return -sigmoid(z) * sigmoid(-z)


sigsoftmax = Sigsoftmax()


@pytree_class
class Logistic(Phi):
    """φ(z) = σ(z) = 1/(1 + e^−z) (MATH 3.6)."""

    name = "logistic"

    def definition(self, z: Any, xp: Any) -> Any:
        return 1 / (1 + xp.exp(-z))

    def log_phi(self, z: Array) -> Array:
        return -log1p_exp(-z)

    def slope(self, z: Array) -> Array:
        return sigmoid(-z)

    def curvature(self, z: Array) -> Array:
        return -sigmoid(z) * sigmoid(-z)


logistic = Logistic()


# --- powers --------------------------------------------------------------------------------------------------


@pytree_class
class Elu1(Phi):
    """φ(z) = e^z for z < 0, 1 + z otherwise (MATH 3.7)."""

    name = "elu1"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.where(z < 0, xp.exp(xp.minimum(z, 0)), 1 + z)

    def log_phi(self, z: Array) -> Array:
        return jnp.where(z < 0, z, jnp.log1p(jnp.maximum(z, 0)))

    def slope(self, z: Array) -> Array:
        return 1 / (1 + jnp.maximum(z, 0))

    def curvature(self, z: Array) -> Array:
        return jnp.where(z < 0, 0, -((1 / (1 + jnp.maximum(z, 0))) ** 2))


elu1 = Elu1()


@pytree_class
class QExponential(Phi):
    """φ(z) = [1 + (1−q) z]_+^{1/(1−q)} (MATH 3.8)."""

    q: Any
    name = "q_exponential"

    @property
    def domain(self) -> tuple[float, float]:
        edge = math.inf if self.q == 1 else 1 / (self.q - 1)
        return (-math.inf, edge) if edge > 0 else (edge, math.inf)

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.maximum(1 + (1 - self.q) * z, 0) ** (1 / (1 - self.q))

    def _inside(self, z: Array) -> tuple[Array, Array, Array]:
        """a = (1−q) z where 1 + a > 0 (else 0), whether that is so, and what ψ is elsewhere: −inf or NaN."""
        a = (1 - self.q) * z
        inside = ~(1 + a <= 0)  # a NaN stays inside and goes through
        return jnp.where(inside, a, 0), inside, jnp.where(jnp.less(self.q, 1), -jnp.inf, jnp.nan)

    def log_phi(self, z: Array) -> Array:  # log1p(a)/(1−q), which is z (1 − h(a)) near q = 1
        a, inside, outside = self._inside(z)
        near = jnp.abs(a) <= 0.5
        far = jnp.log1p(jnp.where(near, 1, a)) / jnp.where(near, 1, 1 - self.q)
        return jnp.where(inside, jnp.where(near, z * (1 - log1p_deficit(jnp.where(near, a, 0))), far), outside)

    def slope(self, z: Array) -> Array:  # s = φ^{q−1}
        a, inside, outside = self._inside(z)
        return jnp.where(inside, 1 / (1 + a), jnp.where(jnp.isnan(outside), outside, 0))

    def curvature(self, z: Array) -> Array:  # t = (q−1) φ^{2(q−1)}
        a, inside, outside = self._inside(z)
        return jnp.where(inside, (self.q - 1) * (1 / (1 + a)) ** 2, jnp.where(jnp.isnan(outside), outside, 0))


def q_exponential(q: Any) -> Phi:
    """Tsallis' q-exponential, with exp at q = 1 (smoothly, the derivative in q too).

    φ(z) = [1 + (1−q) z]_+^{1/(1−q)},   s = φ^{q−1},   t = (q−1) φ^{2(q−1)}     (MATH 3.8)

    Increasing on its domain. q < 1: exactly zero for z ≤ −1/(1−q), where the class is left out and its derivatives
    are 0. q > 1: defined for z < 1/(q−1) only; a score beyond makes its row NaN. The map is normalised by its sum,
    p = φ(z)/Σ φ(z); the tempered softmax of bi-tempered losses normalises by a shift of z and is another map.

    Args:
      q: any number, or an array that broadcasts to the scores; may be traced, vmapped and learned.
    Raises: ValueError if q is known at trace time and not finite.
    Source: Tsallis 1988; Naudts 2002 (deformed exponentials).

    >>> q_exponential(0.5)(jnp.array([-3., 0., 2.]))
    Array([0., 1., 4.], dtype=float32)
    """
    return QExponential(_parameter("q_exponential", "q", q, "a finite number", math.isfinite))


@pytree_class
class ReluPower(Phi):
    """φ(z) = relu(z)^m + ε (MATH 3.9)."""

    power: Any
    epsilon: Any
    name = "relu_power"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.where(z > 0, xp.where(z > 0, z, 1) ** self.power, 0) + self.epsilon

    def _parts(self, z: Array) -> tuple[Array, Array, Array, Array]:
        """Whether z > 0, whether z > 1, and z made safe for (0, 1] and for (1, inf)."""
        above, far = z > 0, z > 1
        return above, far, jnp.where(above & ~far, z, 1), jnp.where(far, z, 1)

    def log_phi(self, z: Array) -> Array:  # m log z + log(1 + ε z^−m) where z > 1
        above, far, near_z, far_z = self._parts(z)
        near = jnp.log(jnp.where(above, near_z**self.power, 0) + self.epsilon)
        return jnp.where(far, self.power * jnp.log(far_z) + jnp.log1p(self.epsilon * far_z**-self.power), near)

    def slope(self, z: Array) -> Array:  # s = m z^{m−1}/φ
        above, far, near_z, far_z = self._parts(z)
        near = self.power * near_z ** (self.power - 1) / (near_z**self.power + self.epsilon)
        rest = self.epsilon * far_z**-self.power
        return jnp.where(far, self.power / far_z / (1 + rest), jnp.where(above, near, 0))

    def curvature(self, z: Array) -> Array:  # z^{m−2} is large for m < 2, but m − 1 is 0 where it nearly overflows
        above, far, near_z, far_z = self._parts(z)
        first = near_z ** (self.power - 1)
        phi = first * near_z + self.epsilon
        rising = (self.power - 1) * near_z ** (self.power - 2)
        near = self.power / phi * (rising * (self.epsilon / phi) - first * (first / phi))
        rest = self.epsilon * far_z**-self.power
        beyond = self.power / far_z / far_z / (1 + rest) * (self.power * rest / (1 + rest) - 1)
        return jnp.where(far, beyond, jnp.where(above, near, 0))


def relu_power(power: Any, epsilon: Any) -> Phi:
    """A power of ReLU, lifted above zero: squared ReLU for power 2.

    φ(z) = relu(z)^m + ε,   s = m z^{m−1}/φ,   t = m z^{m−2} ((m−1) ε − z^m)/φ²,   s = t = 0 for z ≤ 0   (MATH 3.9)

    Constant left of 0, increasing right of it; the derivatives at 0 are those from the left.

    Args:
      power: m ≥ 1; epsilon: ε > 0. Numbers or arrays that broadcast to the scores; may be traced, vmapped, learned (as
        jnp.exp(a) if they are to stay in range).
    Raises: ValueError if a number is out of range.
    Source: So et al. 2021 (squared ReLU, there an activation of feed-forward layers).

    >>> relu_power(2, 1.)(jnp.array([-1., 0., 3.]))
    Array([ 1.,  1., 10.], dtype=float32)
    """
    return ReluPower(
        _parameter("relu_power", "power", power, ">= 1 and finite", lambda m: 1 <= m < math.inf),
        _parameter("relu_power", "epsilon", epsilon, "> 0 and finite", lambda e: 0 < e < math.inf),
    )


def _squareplus(z: Any) -> Any:
    return (z + (z * z + 4) ** 0.5) / 2


PHIS: tuple[Phi, ...] = (
    exp,
    taylor(2),
    taylor(4),
    spherical(0.1),
    quadratic(2.0, 1.0, 1.0),
    softplus,
    sigsoftmax,
    logistic,
    elu1,
    q_exponential(0.5),
    q_exponential(1.5),
    relu_power(2, 0.1),
    from_callable(_squareplus),
)
"""The one tuple of examples: tests, `verify`, `train` and the benchmarks iterate over it."""
