"""`PHIS`: the one tuple of examples."""

from typing import Any

from jsoftmax.phi.base import Phi, exp
from jsoftmax.phi.callables import from_callable
from jsoftmax.phi.polynomials import quadratic, spherical, taylor
from jsoftmax.phi.powers import elu1, q_exponential, relu_power
from jsoftmax.phi.sigmoidal import logistic, sigsoftmax, softplus


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
"""The one tuple of examples: tests, `verify` and `train` iterate over it."""
