"""Elementary functions without cancellation, whose derivatives of every order are right too (MATH 3.0)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def _terms(a: Array, narrow: int, wide: int) -> int:
    return wide if a.dtype == jnp.float64 else narrow


def log1p_deficit(a: Array) -> Array:
    """h(a) = 1 − log1p(a)/a without cancellation, h(0) = 0, for a > −1, with derivatives of every order.

    log1p(a) = 2 artanh(y), y = a/(2 + a), so h = y − (1 − y) (y²/3 + y⁴/5 + …); |y| ≤ 1/3 for a in [−1/2, 1].
    """
    near = (a >= -0.5) & (a <= 1)
    a_near, a_far = jnp.where(near, a, 0), jnp.where(near, 1, a)
    y = a_near / (2 + a_near)
    counted = range(_terms(a, 8, 16), 0, -1)
    terms = functools.reduce(lambda total, k: total * y**2 + 1 / (2 * k + 1), counted, jnp.zeros_like(y))
    return jnp.where(near, y - (1 - y) * y**2 * terms, 1 - jnp.log1p(a_far) / a_far)


def log1p_exp(z: Array) -> Array:
    """log(1 + e^z), in two branches whose derivatives are accurate, too."""
    above = z > 0
    return jnp.where(above, z + jnp.log1p(jnp.exp(-jnp.where(above, z, 0))), jnp.log1p(jnp.exp(jnp.where(above, 0, z))))


@jax.custom_jvp
def sigmoid(z: Array) -> Array:
    """σ(z) = 1/(1 + e^−z), whose derivative σ(z) σ(−z) keeps its digits where σ rounds to 1."""
    return lax.logistic(z)


@sigmoid.defjvp
def _sigmoid_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (z,), (z_dot,) = primals, tangents
    s = sigmoid(z)
    return s, s * sigmoid(-z) * z_dot


@jax.custom_jvp
def expm1(y: Array) -> Array:
    """e^y − 1, with the derivative e^y. JAX 0.10's own derivative is (e^y − 1) + 1, which loses all digits for y far
    below 0."""
    return jnp.expm1(y)


@expm1.defjvp
def _expm1_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (y,), (y_dot,) = primals, tangents
    return expm1(y), jnp.exp(y) * y_dot


def expm1_ratio(y: Array) -> Array:
    """(e^y − 1)/y, which is 1 at 0; by its series 1 + y/2 (1 + y/3 (…)) where |y| < 1/2."""
    near = jnp.abs(y) < 0.5
    y_near, y_far = jnp.where(near, y, 0), jnp.where(near, 1, y)
    counted = range(_terms(y, 8, 15), 1, -1)
    series = functools.reduce(lambda total, k: 1 + y_near / k * total, counted, jnp.ones_like(y))
    return jnp.where(near, series, expm1(y_far) / y_far)


def excess_series(r: Array) -> Array:
    """(e^−r − 1 + r)/r² for |r| ≤ 1/2: 1/2 (1 − r/3 (1 − r/4 (…)))."""
    counted = range(_terms(r, 9, 16), 2, -1)
    return functools.reduce(lambda total, k: 1 - r / k * total, counted, jnp.ones_like(r)) / 2


def excess_ratio(r: Array) -> Array:
    """(e^−r − 1 + r)/r², which is 1/2 at 0; by its series where |r| < 1/2."""
    near = jnp.abs(r) < 0.5
    r_near, r_far = jnp.where(near, r, 0), jnp.where(near, 1, r)
    return jnp.where(near, excess_series(r_near), (expm1(-r_far) + r_far) / r_far**2)
