"""A linear layer and its softmax over a huge vocabulary (MATH 11, 12)."""

from jsoftmax.heads import adaptive, factored
from jsoftmax.heads.divergence import linear_jsd, linear_kl
from jsoftmax.heads.quadratic import quadratic_cross_entropy
from jsoftmax.heads.sampled import log_uniform_proposal, nce_loss, sampled_cross_entropy
from jsoftmax.heads.selection import LinearTopK, linear_categorical, linear_top_k
from jsoftmax.heads.streaming import (
    LinearStatistics,
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_log_normalizer,
    linear_statistics,
)

__all__ = [
    "LinearStatistics",
    "LinearTopK",
    "adaptive",
    "factored",
    "linear_categorical",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_jsd",
    "linear_kl",
    "linear_log_normalizer",
    "linear_statistics",
    "linear_top_k",
    "log_uniform_proposal",
    "nce_loss",
    "quadratic_cross_entropy",
    "sampled_cross_entropy",
]


def __dir__() -> list[str]:
    return __all__
