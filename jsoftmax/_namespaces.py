"""The two namespaces that the oracle evaluates plain definitions in: float64 with autodiff, and many digits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Plain:
    """`jax.numpy` as a namespace for plain definitions."""

    exp, log, log1p, sum, where = jnp.exp, jnp.log, jnp.log1p, jnp.sum, jnp.where
    maximum, minimum, arange, concatenate = jnp.maximum, jnp.minimum, jnp.arange, jnp.concatenate
    newton_steps = 8  # from quadratic convergence to float64, the derivatives too
    jacobian, hessian = staticmethod(jax.jacrev), staticmethod(jax.hessian)

    @staticmethod
    def expansion(h: Callable[[Any], Any]) -> Any:
        """h(0) + h'(0) + h''(0)/2."""
        zero, one = (jnp.zeros(()),), (jnp.ones(()),)
        (value, first), (_, second) = jax.jvp(lambda t: jax.jvp(h, (t,), one), zero, one)
        return value + first + second / 2


class ManyDigits:
    """mpmath on NumPy arrays of objects as a namespace for plain definitions.

    Central differences of step h have an error of h², and lose as many digits as h has zeros. There are enough digits:
    the third order of a second-order expansion divides by h⁵, which leaves 25 digits of 100. The error h² is far below
    the rounding of float64.
    """

    digits = 100
    newton_steps = 12

    def __init__(self) -> None:
        import mpmath  # noqa: PLC0415  (an extra: only the oracle needs it)

        self.mp: Any = mpmath.mp.clone()
        self.mp.dps = self.digits
        self.step = self.mp.mpf(10) ** -15
        self.exp, self.log, self.log1p = (np.frompyfunc(f, 1, 1) for f in (self.mp.exp, self.mp.log, self.mp.log1p))
        self.sum, self.where, self.maximum, self.minimum = np.sum, np.where, np.maximum, np.minimum
        self.arange, self.concatenate = np.arange, np.concatenate

    def array(self, values: Any) -> Any:
        """The same floats as numbers with many digits."""
        return np.frompyfunc(lambda v: self.mp.mpf(float(v)), 1, 1)(np.asarray(values))

    def expansion(self, h: Callable[[Any], Any]) -> Any:
        """h(0) + h'(0) + h''(0)/2."""
        value, above, below = h(0), h(self.step), h(-self.step)
        return value + (above - below) / (2 * self.step) + (above - 2 * value + below) / (2 * self.step**2)

    def jacobian(self, f: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
        """The derivative with respect to an array, whose axes come last."""

        def of(z: np.ndarray) -> np.ndarray:
            columns = []
            for index in np.ndindex(z.shape):
                e = np.zeros(z.shape, object)
                e[index] = self.step
                columns.append((f(z + e) - f(z - e)) / (2 * self.step))
            stacked = np.moveaxis(np.array(columns, object), 0, -1)
            return stacked.reshape(stacked.shape[:-1] + z.shape)

        return of

    def hessian(self, f: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
        """The second derivatives, whose axes come last."""
        return self.jacobian(self.jacobian(f))

    def orders(self, f: Callable[[Any], Any], z: np.ndarray, v: np.ndarray) -> list[Any]:
        """The value, the Jacobian, and the Jacobian's first and second derivatives along v."""
        below, here, above = (self.jacobian(f)(z + step * v) for step in (-self.step, 0, self.step))
        return [f(z), here, (above - below) / (2 * self.step), (above - 2 * here + below) / self.step**2]
