"""Attention as a mean under p, streamed over the keys (MATH 14).

- `dot_product_attention`: the output, with the arguments of `jax.nn.dot_product_attention`.
- `attention_statistics`: output, log-normaliser and entropy of each query, as `AttentionStatistics`.
"""

from jsoftmax.attention._public import AttentionStatistics, attention_statistics, dot_product_attention

__all__ = ["AttentionStatistics", "attention_statistics", "dot_product_attention"]


def __dir__() -> list[str]:
    return __all__
