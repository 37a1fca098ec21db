"""Every map from scores to probabilities, p = φ(z) / Σ φ(z), in JAX, with exact closed-form derivatives."""

from jsoftmax.entropy import entropy, entropy_expansion, kl_divergence, varentropy
from jsoftmax.maps import log_normalizer, log_softmax, softmax
from jsoftmax.phi import exp, from_callable
from jsoftmax.phis import PHIS, elu1, logistic, q_exponential, relu_power, sigsoftmax, softplus, spherical, taylor

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022  (grouped as the README groups them)
    # functions of scores
    "entropy",
    "varentropy",
    "kl_divergence",
    "entropy_expansion",
    "softmax",
    "log_softmax",
    "log_normalizer",
    # positive maps φ
    "exp",
    "taylor",
    "spherical",
    "softplus",
    "sigsoftmax",
    "logistic",
    "elu1",
    "q_exponential",
    "relu_power",
    "from_callable",
    "PHIS",
]
