"""Adaptive softmax: frequent classes in a head, rare ones in tails that are narrower (MATH 12.5, 12.6)."""

from jsoftmax.heads.adaptive._functions import entropy, log_prob, log_probs
from jsoftmax.heads.adaptive._params import AdaptiveParams, Tail, from_torch, init, to_state, to_torch
from jsoftmax.heads.adaptive._plan import ClusterPlan, CostModel, measure_cost_model, plan_clusters
from jsoftmax.heads.adaptive._selection import categorical, predict, top_k

__all__ = [
    "AdaptiveParams",
    "ClusterPlan",
    "CostModel",
    "Tail",
    "categorical",
    "entropy",
    "from_torch",
    "init",
    "log_prob",
    "log_probs",
    "measure_cost_model",
    "plan_clusters",
    "predict",
    "to_state",
    "to_torch",
    "top_k",
]


def __dir__() -> list[str]:
    return __all__
