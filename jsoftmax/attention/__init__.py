"""Attention as a mean under p, streamed over the keys (MATH 14)."""

from jsoftmax.attention._public import AttentionStatistics, attention_statistics, dot_product_attention

__all__ = ["AttentionStatistics", "attention_statistics", "dot_product_attention"]
