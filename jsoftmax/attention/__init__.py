"""Attention as a mean under p, streamed over the keys (MATH 14).

- `dot_product_attention`: the output, with the arguments of `jax.nn.dot_product_attention`.
- `attention_statistics`: output, log-normaliser and entropy of each query, as `AttentionStatistics`.
"""

import functools

from jsoftmax.attention._public import AttentionStatistics, attention_statistics, dot_product_attention
from jsoftmax.checks.names import no_attribute

__all__ = ["AttentionStatistics", "attention_statistics", "dot_product_attention"]


__getattr__ = functools.partial(no_attribute, __name__)


def __dir__() -> list[str]:
    return __all__
