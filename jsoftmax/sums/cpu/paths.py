"""Which way the sums of a large array are taken on CPU, and what each way gains.

Figures are those of benchmarks/NOTES.md, under the heading in quotes, where the benchmarks that chose them are named;
"of jax.nn" is the time in times of jax.nn's. Each way is right for every array: a threshold changes times and rounding.
"""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax.sharding import even_length, has_explicit_sharding

LARGE = 2**17
"""From as many scores on an array is large; smaller ones gain nothing ("Scores that are made in the same program"), and
blocks or slices would take XLA two to three times as long to compile."""

SHORT = 256
"""Above it the ones among the e^u are not counted by a sum of their own, which XLA would write ⌊e^u⌋ for: softmax at
(1024, 1024) 1.9 to 1.2 of jax.nn ("One kernel"). Few scores of more classes are summed in parts of 8, for their digits
(MATH 4.4)."""

LONG = 4096
"""From as many classes on e^u is computed again instead of written and read: softmax at (256, 32768) 19 to 12.4 ms
("e^u once or twice")."""

MANY_ROWS = 4096
"""From here on XLA makes one kernel of a whole softmax, and blocks would end it: log_softmax at (4096, 1000) 2.2 to 1.3
of jax.nn ("One kernel")."""

MANY_SCORES = 4096
"""From here on rules of L and log p divide by one sum: log_normalizer's vjp at (1024, 1024) 1.16 to 0.9 of jax.nn ("One
kernel"). Of fewer scores XLA adds 32 and 32, one after the other, and loses what is small beside a 1."""


Want = Literal["all", "p", "log_p", "L", "H", "loss"]
"""What the caller needs: all of log p, p and L, or one of them; the entropy; the sums of a loss. It selects the
way to compute, and changes results by rounding only."""


class Form(NamedTuple):
    """How the sums of rows are taken: the fastest way for each use."""

    want: Want
    order: int = 0
    """0 for the value, 1 in its rule, 2 in rules of higher order."""
    large: bool = True
    """Whether many scores are summed, where a guard costs time."""
    bfloat16: bool = False
    """Whether x is given in bfloat16, and is then read as such: XLA on CPU would write a wider array first."""

    @property
    def in_rule_of_sum(self) -> bool:
        """Whether this is a rule of L or log p, whose p is no result and has no digits to keep."""
        return self.want in ("L", "log_p", "loss") and self.order > 0

    @property
    def keeps_small_results(self) -> bool:
        """Whether what is wanted may be small beside the scores, where a residue of their rounding would be seen.

        Few scores are guarded whatever is wanted.
        """
        return self.want in ("all", "log_p", "H", "loss") or not self.large


def is_large(x: Array) -> bool:
    """Whether an array has many scores."""
    return x.size >= LARGE


def may_be_large(x: Array) -> bool:
    """A row alone counts as large, too: under `jax.vmap` it may be one of many."""
    return is_large(x) or x.ndim == 1


def choose_form(x: Array, want: Want, order: int) -> Form:
    """The form for an x as it is given, before it is widened."""
    # a row alone is guarded in rules, whose 1 − p may be small
    large = is_large(x) if order else may_be_large(x)
    return Form(want, min(order, 2), large, x.dtype == jnp.bfloat16 and want in ("p", "log_p", "L", "loss"))


def adds_slices(x: Array, axis: tuple[int, ...], form: Form) -> bool:
    """Where XLA on CPU adds a few slices faster than it reduces an axis: the first axis, on jax 0.10, and the last one,
    up to rules of the first order.

    Softmax along the first axis of (8, 10⁶): 65 to 135 ms, by slices 10 ("A leading or short axis"). At (10⁶, 8)
    log_normalizer 12 to 7.0 ms, entropy 17 to 3.2 ms ("Few classes"); rules of higher order are faster without.
    """
    if len(axis) != 1 or x.shape[axis[0]] < 2 or has_explicit_sharding(x) or not may_be_large(x):
        return False
    if axis[0] < x.ndim - 1:
        return axis[0] == 0 and x.shape[0] <= 16
    return form.order < 2 and x.shape[-1] <= 8


def is_long(x: Array, axis: tuple[int, ...]) -> bool:
    """Whether the classes are the last axis, and too many for a row to stay in a cache."""
    return axis == (x.ndim - 1,) and x.shape[-1] >= LONG


def serves_rules(form: Form) -> bool:
    """Whether rules use this form, too: there JAX may differentiate what has it, not apply the rule again."""
    return form.want in ("p", "all") or form.order > 0


def row_block_length(x: Array, axis: tuple[int, ...], form: Form) -> int:
    """The length of the blocks that the last axis is cut into, 0 where it is not.

    It is where e^u is not wanted, or would not stay in a cache once it is written, or would be written wide for a
    narrow p. p and log p of many rows are one kernel.

    Σ e^u − 1 of whole rows takes 2 to 8 times jax.nn's time, in blocks 1.0 to 1.6 ("The sum that keeps its digits").
    In bfloat16 log_normalizer at (64, 131072) takes 1.9 ms, not 10 to 17, and softmax 0.65 of jax.nn, not 1.1 ("Scores
    in bfloat16").
    """
    long = is_long(x, axis)
    if (
        axis != (x.ndim - 1,)
        or (form.order and not long)
        or (form.want in ("p", "all") and not (form.bfloat16 and long))
    ):
        return 0
    if form.want in ("p", "all", "log_p") and math.prod(x.shape[:-1]) >= MANY_ROWS:
        return 0
    return block_length(x.shape[-1])


def block_length(classes: int) -> int:
    """How many classes a block of a long axis has, about 64 or 256; 0 for a short axis.

    Blocks of 256 are faster from LONG on, log_normalizer at (256, 32768) 1.2 to 1.04 of jax.nn, and slower at (1024,
    1024). Few or no classes are left over, with which XLA on CPU is slow: log_normalizer at (1024, 1000) 0.6 to 0.5 ms
    ("The sum that keeps its digits").
    """
    if classes <= SHORT:
        return 0
    return even_length(classes, 64) if classes < LONG else even_length(classes, 256) or 256
