"""A linear layer and its softmax over a huge vocabulary: the logits never exist (MATH 11)."""

from jsoftmax.heads.divergence import linear_kl
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
    "linear_categorical",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_kl",
    "linear_log_normalizer",
    "linear_statistics",
    "linear_top_k",
]
