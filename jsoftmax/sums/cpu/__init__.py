"""The functions of `reference` for large arrays, in the forms that XLA's CPU compiler makes fast.

They differ in how the classes are cut, and in what is computed twice and what is written; the mathematics is that of
`reference`, whose functions these equal but for rounding and the care of MATH 4.5. What a compiler needs beyond it
stands here alone: slices, blocks, barriers, selects that change nothing. `paths` says which way is taken when and what
it gains, `rows` has the sums of rows, `rates` the derivatives.
"""

from jsoftmax.sums.cpu.paths import Want, is_large
from jsoftmax.sums.cpu.rates import (
    centred_rate,
    compares_labels,
    label_rates,
    log_p_rate,
    p_rate,
    weighted_deviations,
)
from jsoftmax.sums.cpu.rows import centred, column_exp_sums, exp_sums, gap_sum, normalized

__all__ = [
    "Want",
    "centred",
    "centred_rate",
    "column_exp_sums",
    "compares_labels",
    "exp_sums",
    "gap_sum",
    "is_large",
    "label_rates",
    "log_p_rate",
    "normalized",
    "p_rate",
    "weighted_deviations",
]
