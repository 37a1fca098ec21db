"""Every map from scores to probabilities, p = φ(z) / Σ φ(z), in JAX, with exact closed-form derivatives."""

import importlib
from typing import TYPE_CHECKING, Any

from jsoftmax.checks.names import no_attribute
from jsoftmax.derivatives import (
    cross_entropy_hessian,
    entropy_gradient,
    entropy_hessian,
    fisher_information,
    log_normalizer_hessian,
    softmax_jacobian,
    softmax_second_derivative,
    softmax_second_derivative_product,
)
from jsoftmax.divergence import jensen_shannon_divergence, kl_divergence
from jsoftmax.entropy import entropy, entropy_expansion, renyi_entropy, tsallis_entropy, varentropy
from jsoftmax.maps import log_normalizer, log_softmax, softmax
from jsoftmax.mixtures import mixture_log_softmax, sink_softmax
from jsoftmax.operators import DiagonalPlusLowRank
from jsoftmax.phi import (
    PHIS,
    elu1,
    exp,
    from_callable,
    logistic,
    q_exponential,
    quadratic,
    relu_power,
    sigsoftmax,
    softplus,
    spherical,
    taylor,
)
from jsoftmax.sparse import entmax, entmax15, fenchel_young_loss, sparsemax
from jsoftmax.temperature import temperature_for_entropy
from jsoftmax.truncation import truncate

if TYPE_CHECKING:
    from jsoftmax import attention, gumbel, heads, losses, optim, segments

__version__ = "0.2.0"

__all__ = [  # noqa: RUF022  (grouped as the guides group them)
    # functions of scores
    "entropy",
    "varentropy",
    "tsallis_entropy",
    "renyi_entropy",
    "kl_divergence",
    "jensen_shannon_divergence",
    "entropy_expansion",
    "softmax",
    "log_softmax",
    "log_normalizer",
    # their derivatives, as operators and dense
    "softmax_jacobian",
    "log_normalizer_hessian",
    "fisher_information",
    "entropy_gradient",
    "entropy_hessian",
    "cross_entropy_hessian",
    "softmax_second_derivative",
    "softmax_second_derivative_product",
    "DiagonalPlusLowRank",
    # sparse maps
    "sparsemax",
    "entmax15",
    "entmax",
    "fenchel_young_loss",
    # mixtures, sinks, temperatures, truncated laws
    "mixture_log_softmax",
    "sink_softmax",
    "temperature_for_entropy",
    "truncate",
    # positive maps φ
    "exp",
    "taylor",
    "spherical",
    "quadratic",
    "softplus",
    "sigsoftmax",
    "logistic",
    "elu1",
    "q_exponential",
    "relu_power",
    "from_callable",
    "PHIS",
    # rooms, which are imported when they are first named
    "losses",
    "segments",
    "gumbel",
    "heads",
    "attention",
    "optim",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # and not here yet: a room
        return importlib.import_module(f"jsoftmax.{name}")
    no_attribute("jsoftmax", name)


def __dir__() -> list[str]:
    return [*sorted(__all__), "__version__"]
