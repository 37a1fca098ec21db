"""A linear layer and its softmax over a huge vocabulary, for the most part without an array of tokens × classes
(MATH 11, 12).

- `linear_cross_entropy`: the loss of each token.
- `linear_cross_entropy_sum`: their weighted sum; on CPU its gradient is faster.
- `linear_statistics`: log-probability, entropy, log-normaliser and mode of each token, as `LinearStatistics`.
- `linear_log_normalizer`: the log-normaliser of each token.
- `linear_kl`: the Kullback–Leibler divergence of two heads.
- `linear_jsd`: the generalised Jensen–Shannon divergence of two heads.
- `linear_top_k`: the k most probable classes, as a `LinearTopK`.
- `linear_categorical`: classes drawn from p.
- `quadratic_cross_entropy`: the loss for an order-2 φ, in V d² + N d² operations.
- `sampled_cross_entropy`: sampled softmax, with its log-Q correction.
- `nce_loss`: noise-contrastive estimation.
- `log_uniform_proposal`: the usual proposal of both, for classes sorted by frequency.
- `adaptive`: adaptive softmax, a module.
- `factored`: plain SGD whose time does not grow with the number of classes, a module.
"""

import functools

from jsoftmax.checks.names import no_attribute
from jsoftmax.heads import adaptive, factored
from jsoftmax.heads.divergence import linear_jsd, linear_kl
from jsoftmax.heads.quadratic import quadratic_cross_entropy
from jsoftmax.heads.sampled import log_uniform_proposal, nce_loss, sampled_cross_entropy
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
    "adaptive",
    "factored",
    "linear_categorical",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "linear_jsd",
    "linear_kl",
    "linear_log_normalizer",
    "linear_statistics",
    "linear_top_k",
    "log_uniform_proposal",
    "nce_loss",
    "quadratic_cross_entropy",
    "sampled_cross_entropy",
]


__getattr__ = functools.partial(no_attribute, __name__)


def __dir__() -> list[str]:
    return __all__
