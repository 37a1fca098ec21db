"""φ, the positive map of one score: the base class, the φ of the library by kind, and the list of examples."""

from jsoftmax.phi.base import Exponential, Phi, array_parameters, curvature, exp, log_phi, slope
from jsoftmax.phi.callables import FromCallable, from_callable
from jsoftmax.phi.examples import PHIS
from jsoftmax.phi.polynomials import quadratic, spherical, taylor
from jsoftmax.phi.powers import elu1, q_exponential, relu_power
from jsoftmax.phi.sigmoidal import logistic, sigsoftmax, softplus

__all__ = [
    "PHIS",
    "Exponential",
    "FromCallable",
    "Phi",
    "array_parameters",
    "curvature",
    "elu1",
    "exp",
    "from_callable",
    "log_phi",
    "logistic",
    "q_exponential",
    "quadratic",
    "relu_power",
    "sigsoftmax",
    "slope",
    "softplus",
    "spherical",
    "taylor",
]
