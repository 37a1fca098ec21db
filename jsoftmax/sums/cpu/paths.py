"""How the sums of a large array are computed on CPU, and what each way gains.

The figures come from benchmarks/NOTES.md, under the heading in quotes, which names the benchmarks that chose them. "1.9
of jax.nn" means 1.9 times the time of jax.nn. Each way is right for every array: a threshold changes times and rounding
only.
"""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax.sharding import even_length, has_explicit_sharding

LARGE = 2**17
"""An array with at least this many scores is large. Smaller ones gain nothing from forms of their own ("Scores that are
made in the same program"), and XLA would take two to three times as long to compile blocks or slices."""

SHORT = 256
"""A row with more classes than this does not count the ones among the e^u in a sum of their own, because XLA would
write ⌊e^u⌋ to memory for it: without it, softmax at (1024, 1024) went from 1.9 to 1.2 of jax.nn ("One kernel")."""

LONG = 4096
"""From this many classes on, e^u is computed again instead of stored: softmax at (256, 32768) went from 19 to 12.4 ms
("e^u once or twice")."""

MANY_ROWS = 4096
"""From this many rows on, XLA makes one kernel of a whole softmax, which blocks would split: without them, log_softmax
at (4096, 1000) went from 2.2 to 1.3 of jax.nn ("One kernel")."""

MANY_SCORES = 4096
"""From this many scores on, the rules of L and log p divide by one sum: log_normalizer's vjp at (1024, 1024) went from
1.16 to 0.9 of jax.nn ("One kernel"). Fewer scores XLA adds one after the other, 32 at a time, which loses small terms
beside a 1."""


Want = Literal["all", "p", "log_p", "L", "H", "loss"]
"""What the caller needs: all of log p, p and L, or one of them; the entropy; the sums of a loss. It selects the
way to compute, and changes results by rounding only."""


class Form(NamedTuple):
    """How the sums of rows are computed: the fastest way for each use."""

    want: Want
    order: int = 0
    """0 for the value, 1 in its derivative rule, 2 in rules of higher order."""
    large: bool = True
    """Whether there are many scores, so that a guard costs time."""
    bfloat16: bool = False
    """Whether x is given in bfloat16. It is then read in bfloat16: XLA on CPU would write a wider array first."""

    @property
    def in_rule_of_sum(self) -> bool:
        """Whether this is a rule of L or log p, where p is not a result and need not keep its last digits."""
        return self.want in ("L", "log_p", "loss") and self.order > 0

    @property
    def keeps_small_results(self) -> bool:
        """Whether the result may be small beside the scores, so that a residue of their rounding would be visible in
        it.

        Few scores are always guarded.
        """
        return self.want in ("all", "log_p", "H", "loss") or not self.large


def is_large(x: Array) -> bool:
    """Whether an array has many scores."""
    return x.size >= LARGE


def choose_form(x: Array, want: Want, order: int) -> Form:
    """The form for an x as it is given, before it is widened."""
    # a single row may be one of many under `jax.vmap`; in rules it is guarded, because 1 − p may be small there
    large = not order or is_large(x)
    return Form(want, min(order, 2), large, x.dtype == jnp.bfloat16 and want in ("p", "log_p", "L", "loss"))


def adds_slices(x: Array, axis: tuple[int, ...], form: Form) -> bool:
    """Whether XLA on CPU adds a few slices faster than it reduces the axis. It does so for the first axis, on jax 0.10,
    and for the last one, up to rules of the first order.

    Softmax along the first axis of (8, 10⁶) takes 65 to 135 ms, and 10 by slices ("A leading or short axis"). At
    (10⁶, 8) slices brought log_normalizer from 12 to 7.0 ms and entropy from 17 to 3.2 ms ("Few classes"). Rules of
    higher order are faster without slices.
    """
    if len(axis) != 1 or x.shape[axis[0]] < 2 or has_explicit_sharding(x):
        return False
    if axis[0] < x.ndim - 1:
        return axis[0] == 0 and x.shape[0] <= 16
    return form.order < 2 and x.shape[-1] <= 8


def is_long(x: Array, axis: tuple[int, ...]) -> bool:
    """Whether the classes are the last axis, and too many for a row to stay in the cache."""
    return axis == (x.ndim - 1,) and x.shape[-1] >= LONG


def serves_rules(form: Form) -> bool:
    """Whether derivative rules use this form, too. Inside them JAX may differentiate the body instead of applying the
    rule again."""
    return form.want in ("p", "all") or form.order > 0


def row_block_length(x: Array, axis: tuple[int, ...], form: Form) -> int:
    """The length of the blocks that the last axis is cut into, and 0 where it is not cut.

    It is cut where e^u is not needed, where e^u would be too long to stay in the cache, and where it would be written
    in float32 for a narrow p. It is not cut for p and log p of many rows, which are one kernel.

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

    Blocks of 256 are faster from LONG on (log_normalizer at (256, 32768) went from 1.2 to 1.04 of jax.nn), and slower
    at (1024, 1024). The length is chosen to leave few or no classes over, because XLA on CPU is slow with a remainder:
    log_normalizer at (1024, 1000) went from 0.6 to 0.5 ms ("The sum that keeps its digits").
    """
    if classes <= SHORT:
        return 0
    return even_length(classes, 64) if classes < LONG else even_length(classes, 256) or 256
