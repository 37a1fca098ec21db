"""The Gumbel route: samples, relaxations, their densities and gradient estimators, for every φ (MATH 10).

- `categorical`: classes drawn from p.
- `gumbel_top_k`: k distinct classes, drawn without replacement, as a `TopK`.
- `log_inclusion_probability`: the weights of estimates from such a sample.
- `gumbel_softmax`: a relaxed sample; with `hard=True` one-hot, with its gradient.
- `exp_concrete`: the logarithm of a relaxed sample.
- `subset_softmax`: a relaxed sample of k distinct classes.
- `exp_concrete_log_density`: the density of `exp_concrete`, right at the corners, too.
- `concrete_log_density`: the density of `gumbel_softmax`, on the simplex.
- `binary_concrete_log_density`: the density of relaxed Bernoulli variables.
- `conditional_gumbels`: perturbed scores, given which class has the largest.
- `rao_blackwellised`: a straight-through gradient with less variance.
- `reinmax`: a straight-through gradient of second order.
"""

import functools

from jsoftmax.checks.names import no_attribute
from jsoftmax.gumbel._categorical import categorical
from jsoftmax.gumbel._concrete import (
    binary_concrete_log_density,
    concrete_log_density,
    exp_concrete,
    exp_concrete_log_density,
    gumbel_softmax,
    subset_softmax,
)
from jsoftmax.gumbel._estimators import conditional_gumbels, rao_blackwellised, reinmax
from jsoftmax.gumbel._top_k import TopK, gumbel_top_k, log_inclusion_probability

__all__ = [
    "TopK",
    "binary_concrete_log_density",
    "categorical",
    "concrete_log_density",
    "conditional_gumbels",
    "exp_concrete",
    "exp_concrete_log_density",
    "gumbel_softmax",
    "gumbel_top_k",
    "log_inclusion_probability",
    "rao_blackwellised",
    "reinmax",
    "subset_softmax",
]


__getattr__ = functools.partial(no_attribute, __name__)


def __dir__() -> list[str]:
    return __all__
