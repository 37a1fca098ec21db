"""Adaptive softmax: frequent classes in a head, rare ones in tails that are narrower (MATH 12.5, 12.6)."""

from jsoftmax.heads.adaptive._functions import entropy, log_prob, log_probs, predict
from jsoftmax.heads.adaptive._params import AdaptiveParams, Tail, from_torch, init, to_torch

__all__ = [
    "AdaptiveParams",
    "Tail",
    "entropy",
    "from_torch",
    "init",
    "log_prob",
    "log_probs",
    "predict",
    "to_torch",
]
