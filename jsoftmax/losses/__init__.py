"""Losses of scores and labels, unreduced as in optax, for every φ (MATH 7)."""

from jsoftmax.checks.top_targets import TopTargets
from jsoftmax.losses._cross_entropy import cross_entropy, focal_cross_entropy, poly_cross_entropy
from jsoftmax.losses._log_prob import log_prob
from jsoftmax.losses._ranking import plackett_luce_log_prob
from jsoftmax.losses._target import kl_to_target
from jsoftmax.losses._z_loss import spherical_z_loss

__all__ = [
    "TopTargets",
    "cross_entropy",
    "focal_cross_entropy",
    "kl_to_target",
    "log_prob",
    "plackett_luce_log_prob",
    "poly_cross_entropy",
    "spherical_z_loss",
]


def __dir__() -> list[str]:
    return __all__
