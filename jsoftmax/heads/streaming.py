"""Streaming heads: a linear layer and its softmax over a huge vocabulary; the logits never exist (MATH 11)."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jsoftmax import _arguments, _labels
from jsoftmax.heads import _check
from jsoftmax.heads._head import Head, Plan
from jsoftmax.heads._statistics import Wanted, statistics
from jsoftmax.heads._sum import Weighed, weighted_sum
from jsoftmax.phi import Phi, exp


class LinearStatistics(NamedTuple):
    """Of each token, `[...]`."""

    log_prob: Array
    """log p_y."""
    entropy: Array
    """−Σ p log p."""
    log_normalizer: Array
    """L = log Σ e^x."""
    argmax: Array
    """The class with the largest p, int32."""


_traced = jax.jit(statistics, static_argnums=(1, 2))
_traced_sum = jax.jit(weighted_sum, static_argnums=1)


def linear_log_normalizer(
    hidden: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    given = _check.check(
        "linear_log_normalizer",
        hidden,
        weight,
        bias,
        phi=phi,
        soft_cap=soft_cap,
        where=where,
        log_weights=log_weights,
        block_size=block_size,
        precision=precision,
    )
    return given.restore(_traced(given.head, Wanted(), given.plan).log_normalizer)


def linear_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    margin: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_label: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    function = "linear_cross_entropy"
    given = _check.check(
        function,
        hidden,
        weight,
        bias,
        labels=labels,
        phi=phi,
        soft_cap=soft_cap,
        margin=margin,
        ignore_label=ignore_label,
        where=where,
        log_weights=log_weights,
        block_size=block_size,
        precision=precision,
    )
    smoothing, z = _check.loss_options(function, given, label_smoothing, z_loss)
    found = _traced(given.head, Wanted(spread=smoothing is not None), given.plan)
    return given.restore(_check.loss_of_tokens(given.head, found, smoothing, z))


def linear_statistics(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    ignore_label: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> LinearStatistics:
    given = _check.check(
        "linear_statistics",
        hidden,
        weight,
        bias,
        labels=labels,
        phi=phi,
        soft_cap=soft_cap,
        ignore_label=ignore_label,
        where=where,
        log_weights=log_weights,
        block_size=block_size,
        precision=precision,
    )
    found: Any = _traced(given.head, Wanted(entropy=True, argmax=True), given.plan)
    return LinearStatistics(
        given.restore(-_check.loss_of_tokens(given.head, found, None, None)),
        given.restore(found.log_total + found.gap),
        given.restore(found.log_normalizer),
        given.restore(found.argmax, -1),
    )


def linear_cross_entropy_sum(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    token_weights: ArrayLike | None = None,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    margin: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_label: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> Float[Array, ""]:
    function = "linear_cross_entropy_sum"
    given = _check.check(
        function,
        hidden,
        weight,
        bias,
        labels=labels,
        phi=phi,
        soft_cap=soft_cap,
        margin=margin,
        ignore_label=ignore_label,
        where=where,
        log_weights=log_weights,
        block_size=block_size,
        precision=precision,
        token_weights=1.0 if token_weights is None else token_weights,
    )
    smoothing, z = _check.loss_options(function, given, label_smoothing, z_loss)
    weighed: Any = Weighed(given.head, given.token_weights, smoothing, z)
    return _traced_sum(weighed, given.plan)
