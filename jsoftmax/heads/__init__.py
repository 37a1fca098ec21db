"""A linear layer and its softmax over a huge vocabulary (MATH 11)."""

from jsoftmax.heads.streaming import (
    LinearStatistics,
    linear_cross_entropy,
    linear_cross_entropy_sum,
    linear_log_normalizer,
    linear_statistics,
)

__all__ = [
    "LinearStatistics",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_log_normalizer",
    "linear_statistics",
]
