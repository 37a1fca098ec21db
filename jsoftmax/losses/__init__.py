"""Losses of scores and labels, unreduced as in optax, for every φ (MATH 7).

- `cross_entropy`: −log p of the label, with margin, label smoothing, z-loss and class weights.
- `focal_cross_entropy`: down-weights rows that are already classified correctly.
- `poly_cross_entropy`: Poly-1, with another weight for the first term of its series in 1 − p.
- `kl_to_target`: the Kullback–Leibler divergence of target probabilities from p.
- `spherical_z_loss`: the Z-loss, softplus of the label's standardised score.
- `log_prob`: log p of labels, also of several of each row.
- `plackett_luce_log_prob`: the log-probability of a ranking.
- `TopTargets`: k classes of each row and their probabilities, as a target.
"""

import functools

from jsoftmax.checks.names import no_attribute
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


__getattr__ = functools.partial(no_attribute, __name__)


def __dir__() -> list[str]:
    return __all__
