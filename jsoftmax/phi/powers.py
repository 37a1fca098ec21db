"""Powers: elu1, q_exponential and relu_power (MATH 3.7 to 3.9)."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax._pytree import pytree_class
from jsoftmax._series import log1p_deficit
from jsoftmax.phi.base import Phi, check_parameter


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
        """a = (1−q) z where 1 + a > 0, and 0 elsewhere; whether 1 + a > 0; and the ψ elsewhere, −inf or NaN."""
        a = (1 - self.q) * z
        inside = ~(1 + a <= 0)  # a NaN counts as inside, and so gives NaN
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
      q: any number, or an array that broadcasts to the scores (in heads and attention one number); may be traced,
        vmapped and learned.
    Raises: ValueError if q is known at trace time and not finite.
    Source: Tsallis 1988; Naudts 2002 (deformed exponentials).

    >>> q_exponential(0.5)(jnp.array([-3., 0., 2.]))
    Array([0., 1., 4.], dtype=float32)
    """
    return QExponential(check_parameter("q_exponential", "q", q, "a finite number", math.isfinite))


@pytree_class
class ReluPower(Phi):
    """φ(z) = relu(z)^m + ε (MATH 3.9)."""

    power: Any
    epsilon: Any
    name = "relu_power"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.where(z > 0, xp.where(z > 0, z, 1) ** self.power, 0) + self.epsilon

    def _parts(self, z: Array) -> tuple[Array, Array, Array, Array]:
        """Whether z > 0 and whether z > 1; and z, replaced by 1 outside (0, 1] and outside (1, inf)."""
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

    def curvature(
        self, z: Array
    ) -> Array:  # z^{m−2} is large for m < 2; it nearly overflows at m = 1, where m − 1 is 0
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
        check_parameter("relu_power", "power", power, ">= 1 and finite", lambda m: 1 <= m < math.inf),
        check_parameter("relu_power", "epsilon", epsilon, "> 0 and finite", lambda e: 0 < e < math.inf),
    )
