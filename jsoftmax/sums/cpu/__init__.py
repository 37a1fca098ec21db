"""The functions of `reference` for large arrays, in the forms that XLA's CPU compiler makes fast.

The forms differ in how the classes are cut, and in what is computed twice and what is stored. The mathematics is that
of `reference`: the functions here are equal to it, except for rounding and the care of MATH 4.5. Everything that only
the compiler needs is here: slices, blocks, barriers, and selects that change nothing. `paths` says which form is taken
when, and what it gains; `rows` has the sums of rows, and `rates` has the derivatives.
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
from jsoftmax.sums.cpu.rows import centred, exp_sums, gap_sum, normalized

__all__ = [
    "Want",
    "centred",
    "centred_rate",
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
