"""The φ that are built on log(1 + e^z): softplus, sigsoftmax and logistic (MATH 3.4 to 3.6)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax._pytree import pytree_class
from jsoftmax._series import log1p_deficit, log1p_exp, sigmoid
from jsoftmax.phi.base import Phi


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

    def slope(self, z: Array) -> Array:  # s = σ(z)/φ for z > 0, else 1/((1 + u) (1 − h)) with u = e^z
        above = z > 0
        z_above, u = jnp.where(above, z, 1), jnp.exp(jnp.where(above, 0, z))
        return jnp.where(above, sigmoid(z_above) / log1p_exp(z_above), 1 / ((1 + u) * (1 - log1p_deficit(u))))

    def curvature(self, z: Array) -> Array:  # t = s (σ(−z) − s) for z > 0, else −s² h
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

    def log_phi(self, z: Array) -> Array:  # −inf would leave the class of a finite score out
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
