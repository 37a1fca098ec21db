"""Attention as a mean under p, streamed over the keys (MATH 14).

- `dot_product_attention`: the output, with the arguments of `jax.nn.dot_product_attention`.
- `attention_statistics`: output, log-normaliser and entropy of each query, as `AttentionStatistics`.
"""

from typing import TYPE_CHECKING, Any

from jsoftmax.attention._public import AttentionStatistics, attention_statistics, dot_product_attention
from jsoftmax.checks.names import no_attribute

__all__ = ["AttentionStatistics", "attention_statistics", "dot_product_attention"]


if not TYPE_CHECKING:  # a type checker knows the names

    def __getattr__(name: str) -> Any:
        raise no_attribute(__name__, name)


def __dir__() -> list[str]:
    return __all__
