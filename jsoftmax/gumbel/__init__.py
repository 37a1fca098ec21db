"""The Gumbel route: samples, relaxations, their densities and gradient estimators, for every φ (MATH 10)."""

from jsoftmax.gumbel._categorical import categorical
from jsoftmax.gumbel._concrete import (
    binary_concrete_log_density,
    concrete_log_density,
    exp_concrete,
    exp_concrete_log_density,
    gumbel_softmax,
    subset_softmax,
)
from jsoftmax.gumbel._estimators import conditional_gumbels, rao_blackwellised, reinmax
from jsoftmax.gumbel._top_k import TopK, gumbel_top_k, log_inclusion_probability

__all__ = [
    "TopK",
    "binary_concrete_log_density",
    "categorical",
    "concrete_log_density",
    "conditional_gumbels",
    "exp_concrete",
    "exp_concrete_log_density",
    "gumbel_softmax",
    "gumbel_top_k",
    "log_inclusion_probability",
    "rao_blackwellised",
    "reinmax",
    "subset_softmax",
]


def __dir__() -> list[str]:
    return __all__
