"""Σ e^x over the classes and what is computed from it: the one door to its forms (MATH 4).

`reference` is the mathematics, and runs on GPUs and TPUs and for small arrays. `cpu` holds the forms that XLA's CPU
compiler needs for large arrays; each of its functions equals that of the reference, except for the care of MATH 4.5.
On GPUs the derivatives of rows of up to 16,384 classes are computed from a copy of the scores that takes no memory
(`read_again`), and those of longer rows by `long_rows`. This module decides which form runs, by the size of the array
and by the platform that a program is compiled for; `explain` says what it decided.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jsoftmax.checks.arguments import Axis, canonical_axis, widened
from jsoftmax.sharding import AxisName, is_label, local_label
from jsoftmax.sums import cpu, long_rows, reference
from jsoftmax.sums.cpu import Want, paths
from jsoftmax.sums.reference import (
    FAR,
    SURE,
    ExpSums,
    LabelRates,
    Normalized,
    class_sum,
    difference,
    has_bad_score,
    is_empty,
    not_below,
    not_negative,
    shifted,
)

__all__ = [
    "FAR",
    "SURE",
    "ExpSums",
    "LabelRates",
    "Normalized",
    "Want",
    "by_platform",
    "centred",
    "centred_rate",
    "class_sum",
    "difference",
    "distinct_copy",
    "exp_sums",
    "explain",
    "gap_sum",
    "has_bad_score",
    "is_empty",
    "is_read_in_parts",
    "is_read_once",
    "label_rates",
    "log_p_rate",
    "next_order",
    "normalized",
    "not_below",
    "not_negative",
    "p_rate",
    "read_again",
    "shifted",
    "value_again",
    "weighted_deviations",
    "zero_where",
]


def has_form_for_cpu(shape: tuple[int, ...]) -> bool:
    """Whether scores of this shape are summed in a form of their own on CPU: if there are many, or if they are a single
    long row, which may be one of many under `jax.vmap`."""
    size = math.prod(shape)
    return size >= paths.LARGE or (len(shape) == 1 and size > paths.SHORT)


def next_order(x: Array, order: int, axis_name: AxisName = None) -> int:
    """The order for what the rule of that order calls: one more where a form or an exchange depends on it. For few
    scores it is 0 again, so that JAX traces the functions of values and rules once."""
    return 0 if axis_name is None and not has_form_for_cpu(x.shape) else order + 1


def _by_form_for_cpu(on_cpu: Callable[..., Any], otherwise: Callable[..., Any], apart: bool, *arrays: Any) -> Any:
    """The form for the platform that the program is compiled for. apart: whether CPU has one of its own."""
    return lax.platform_dependent(*arrays, cpu=on_cpu, default=otherwise) if apart else otherwise(*arrays)


_GPUS = ("cuda", "rocm")


def by_platform(
    *arrays: Any, on_gpus: Callable[..., Any], otherwise: Callable[..., Any], on_cpu: Callable[..., Any] | None = None
) -> Any:
    """The function for the platform that the program is compiled for, where GPUs have one of their own."""
    own = dict.fromkeys(_GPUS, on_gpus) | ({} if on_cpu is None else {"cpu": on_cpu})
    return lax.platform_dependent(*arrays, **own, default=otherwise)


def normalized(  # noqa: PLR0917  (as rules, which have no keywords, call it)
    x: Array,
    axis: tuple[int, ...],
    axis_name: AxisName = None,
    want: Want = "all",
    order: int = 0,
    is_shifted: bool = False,
) -> Normalized:
    """log p, p and L. order: the order of the derivative that needs them; 0 is the value. is_shifted: whether the
    caller has subtracted the maximum of each row already."""
    on_cpu = functools.partial(cpu.normalized, axis=axis, axis_name=axis_name, want=want, order=order)
    apart = has_form_for_cpu(x.shape)
    one_sum = want == "p" and apart and axis_name is None
    otherwise = functools.partial(reference.normalized, axis=axis, axis_name=axis_name, in_one_sum=one_sum)
    if want == "all" and apart:
        otherwise = functools.partial(_p_of_log_p, axis=axis, axis_name=axis_name)
    if is_shifted and axis_name is None and is_read_in_parts(x, axis):
        on_gpus = functools.partial(long_rows.normalized_of_shifted, axis=axis)
        return by_platform(x, on_cpu=on_cpu, on_gpus=on_gpus, otherwise=otherwise)
    return _by_form_for_cpu(on_cpu, otherwise, apart, x)


def _p_of_log_p(x: Array, axis: tuple[int, ...], axis_name: AxisName) -> Normalized:
    """`reference.normalized`, with p = e^(log p).

    For a caller of both, XLA for GPUs would write e^u / Σ e^u to memory.
    """
    n = reference.normalized(x, axis, axis_name)
    return n._replace(p=jnp.exp(n.log_p))


def centred(
    x: Array, axis: tuple[int, ...], axis_name: AxisName = None, want: Want = "all", order: int = 0
) -> tuple[Array, Array]:
    """c = log p + H, and H."""
    return _by_form_for_cpu(
        functools.partial(cpu.centred, axis=axis, axis_name=axis_name, want=want, order=order),
        functools.partial(reference.centred, axis=axis, axis_name=axis_name),
        has_form_for_cpu(x.shape),
        x,
    )


def exp_sums(
    x: Array,
    axis: tuple[int, ...],
    axis_name: AxisName = None,
    order: int = 0,
    row_sums: Any = None,
) -> ExpSums:
    """max x and Σ e^u − 1, u = x − max x. row_sums: one number for each row, to be summed over the shards in the same
    exchange."""
    return _by_form_for_cpu(
        functools.partial(cpu.exp_sums, axis=axis, axis_name=axis_name, order=order),
        functools.partial(reference.exp_sums, axis=axis, axis_name=axis_name),
        has_form_for_cpu(x.shape),
        x,
        row_sums,
    )


def gap_sum(x: Array, peak: Array, axis: tuple[int, ...]) -> Array:
    """Σ e^u (−u), u = x − peak."""
    on_cpu, otherwise = (functools.partial(form.gap_sum, axis=axis) for form in (cpu, reference))
    return _by_form_for_cpu(on_cpu, otherwise, has_form_for_cpu(x.shape), x, peak)


def centred_rate(x: Array, p: Array, x_dot: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array:
    """ẋ − Σ p ẋ."""
    return _rate(cpu.centred_rate, reference.centred_rate, long_rows.centred_rate, x, p, x_dot, axis, axis_name)


def p_rate(  # noqa: PLR0917  (as rules, which have no keywords, call them)
    x: Array,
    p: Array,
    x_dot: Array,
    axis: tuple[int, ...],
    axis_name: AxisName = None,
    want: Want = "p",
    order: int = 0,
) -> Array:
    """ṗ along ẋ."""
    on_cpu = functools.partial(cpu.p_rate, want=want, order=order)
    return _rate(on_cpu, reference.p_rate, long_rows.p_rate, x, p, x_dot, axis, axis_name)


def log_p_rate(  # noqa: PLR0917  (as rules, which have no keywords, call them)
    x: Array,
    p: Array,
    x_dot: Array,
    axis: tuple[int, ...],
    axis_name: AxisName = None,
    order: int = 0,
) -> Array:
    """(log p)˙ along ẋ."""
    if not cpu.is_large(x):
        return zero_where(jnp.isneginf(x), centred_rate(x, p, x_dot, axis, axis_name))
    on_cpu = functools.partial(cpu.log_p_rate, order=order)
    return _rate(on_cpu, reference.log_p_rate, long_rows.log_p_rate, x, p, x_dot, axis, axis_name)


@functools.partial(jax.checkpoint, prevent_cse=False)
def zero_where(left_out: Array, a: Array) -> Array:
    """a, and 0 where a class is left out. It is checkpointed, because the backward pass would keep the zeros too."""
    return jnp.where(left_out, 0, a)


_ROW_KERNEL_CLASSES = 16384
"""Up to this many classes XLA for GPUs makes one kernel of a whole row."""


def _is_long(shape: tuple[int, ...], axis: tuple[int, ...]) -> bool:
    """Whether rows have more classes than one kernel of a GPU takes."""
    return math.prod(shape[i] for i in axis) > _ROW_KERNEL_CLASSES


def is_read_in_parts(x: Array, axis: tuple[int, ...]) -> bool:
    """Whether there are many scores, in rows that GPUs read in several kernels."""
    return cpu.is_large(x) and _is_long(x.shape, axis)


def is_read_once(x: Array, axis: tuple[int, ...]) -> bool:
    """Whether there are many scores, in rows short enough for a GPU to read them once for everything that a result
    needs."""
    return cpu.is_large(x) and not _is_long(x.shape, axis)


def distinct_copy(x: Array) -> Array:
    """x · 1, with a 1 that the compiler does not know.

    What is computed from it is not what is computed from x, as far as XLA can tell. So a rule on a GPU computes e^u
    again in the kernel of the derivative, where XLA would write to memory what value and rule have in common. Unlike
    x behind a barrier, x · 1 is computed within that kernel, with all that makes x from what is in memory.
    """
    return x * lax.optimization_barrier(jnp.ones((), x.dtype))


def read_again(x: Array, axis: tuple[int, ...], axis_name: AxisName = None) -> Array | None:
    """x for a rule whose value is computed in the same program, if GPUs read a row once: there it is a `distinct_copy`.
    None if they do not, and the rule should use x itself."""
    if axis_name is not None or not is_read_once(x, axis):
        return None
    return by_platform(x, on_gpus=distinct_copy, otherwise=lambda x: x)


def value_again(f: Callable[[Array], Array], value: Array, x: Array, again: Array | None) -> tuple[Array, Array]:
    """value = f(x) and x, for a rule that needs both. On GPUs they are f(again) and `again`, if it is given: x as
    `read_again` gives it. Elsewhere nothing is computed twice."""
    if again is None:
        return value, x
    return by_platform((value, x), again, on_gpus=lambda _, again: (f(again), again), otherwise=lambda given, _: given)


def _rate(  # noqa: PLR0917  (as rules, which have no keywords, call them)
    on_cpu: Callable[..., Array],
    otherwise: Callable[..., Array],
    of_long_rows: Callable[..., Array],
    x: Array,
    p: Array,
    x_dot: Array,
    axis: tuple[int, ...],
    axis_name: AxisName,
) -> Array:
    """A derivative along ẋ.

    It is checkpointed. For few scores p alone is kept for the backward pass; for many, x and p, because the form for
    CPU reads p and the others read x. From an x of `read_again` GPUs compute e^u again, in one kernel with the
    derivative.
    """
    in_parts = axis_name is None and is_read_in_parts(x, axis)

    def recomputed(x: Array, p: Array, x_dot: Array) -> Array:
        if axis_name is None:
            p = reference.probabilities(x, axis)
        return otherwise(x, p, x_dot, axis, axis_name)

    def on_gpus(x: Array, p: Array, x_dot: Array) -> Array:
        return of_long_rows(x, x_dot, axis) if in_parts else recomputed(x, p, x_dot)

    def along(x: Array, p: Array, x_dot: Array) -> Array:
        if not cpu.is_large(x):
            return otherwise(x, p, x_dot, axis, axis_name)
        own = functools.partial(on_cpu, axis=axis, axis_name=axis_name)
        return by_platform(x, p, x_dot, on_cpu=own, on_gpus=on_gpus, otherwise=recomputed)

    return jax.checkpoint(along, prevent_cse=False)(x, p, x_dot)


def weighted_deviations(w: Array, x_dot: Array, axis: tuple[int, ...]) -> Array:
    """w (ẋ − Σ w̄ ẋ), w̄ = w / Σ w. It is checkpointed: only w is kept for the backward pass."""

    def along(w: Array, x_dot: Array) -> Array:
        on_cpu, otherwise = (functools.partial(form.weighted_deviations, axis=axis) for form in (cpu, reference))
        return _by_form_for_cpu(on_cpu, otherwise, cpu.is_large(w), w, x_dot)

    return jax.checkpoint(along, prevent_cse=False)(w, x_dot)


def label_rates(  # noqa: PLR0917  (as rules, which have no keywords, call them)
    p: Array,
    kept: Array | None,
    p_y: Array,
    at_label: Array,
    x_dot: Array,
    label: Array,
    axis_name: AxisName = None,
    x: Array | None = None,
) -> LabelRates:
    """Derivatives of −l_y and L along ẋ, and Σ ẋ, over the last axis of this shard. Labels `[..., 1]` number the
    classes of all shards. at_label: p_y − 1 with its digits. x: scores in long rows, which GPUs read instead of p."""
    own, inside = local_label(label, x_dot.shape[-1], axis_name)

    def compared(p: Array, kept: Array | None, at_label: Array, x_dot: Array) -> LabelRates:
        here = is_label(x_dot.shape, label, axis_name)
        return reference.label_rates(p, kept, at_label, widened(x_dot), here)

    def on_cpu(p: Array, kept: Array | None, at_label: Array, x_dot: Array) -> LabelRates:
        return cpu.label_rates(p, kept, p_y, at_label, x_dot, own, inside)

    if not cpu.is_large(x_dot) or cpu.compares_labels(x_dot):
        on_cpu = compared
    if x is None:
        return _by_form_for_cpu(on_cpu, compared, on_cpu is not compared, p, kept, at_label, x_dot)

    def on_gpus(p: Array, kept: Array | None, at_label: Array, x_dot: Array) -> LabelRates:
        here = is_label(x_dot.shape, label)
        return long_rows.label_rates(x, kept, p_y, at_label, widened(x_dot), here)

    return by_platform(p, kept, at_label, x_dot, on_cpu=on_cpu, on_gpus=on_gpus, otherwise=compared)


def explain(shape: tuple[int, ...], axis: Axis = -1, platform: str | None = None) -> str:
    """Which form sums scores of this shape, and why.

    >>> explain((64, 100))
    'reference: few scores'
    >>> explain((1024, 1024), platform="cuda")
    'reference: compiled for cuda; the derivative rules read the scores again: one kernel a row'
    """
    axes = canonical_axis("explain", axis, len(shape))
    if not has_form_for_cpu(shape):
        return "reference: few scores"
    platform = jax.default_backend() if platform is None else platform
    if platform in _GPUS and math.prod(shape) >= paths.LARGE:
        by = "by long_rows: many classes" if _is_long(shape, axes) else "read the scores again: one kernel a row"
        return f"reference: compiled for {platform}; the derivative rules {by}"
    if platform != "cpu":
        return f"reference: compiled for {platform}"
    if math.prod(shape) >= paths.LARGE:
        return "cpu: many scores, compiled for cpu"
    return "cpu: a single long row, compiled for cpu; the derivative rules by the reference: few scores"
