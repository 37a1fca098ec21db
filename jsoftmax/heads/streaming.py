"""Streaming heads: a linear layer and its softmax over a huge vocabulary; the logits never exist (MATH 11)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jsoftmax.gumbel import _noise
from jsoftmax.gumbel._categorical import check_distinct, check_shape
from jsoftmax.heads import _check
from jsoftmax.heads._divergence import divergence
from jsoftmax.heads._draw import CHUNK, draw
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


class LinearTopK(NamedTuple):
    """Of each token, the k classes with the largest p, in descending order, `[..., k]`."""

    log_prob: Array
    """log p."""
    index: Array
    """Which classes, int32; −1, with log_prob −inf, beyond the classes kept."""


_traced = jax.jit(statistics, static_argnums=(1, 2))
_traced_divergence = jax.jit(divergence, static_argnums=2)
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
    found: Any = _traced(given.head, Wanted(entropy=True, top=1), given.plan)
    return LinearStatistics(
        given.restore(-_check.loss_of_tokens(given.head, found, None, None)),
        given.restore(found.log_total + found.gap),
        given.restore(found.log_normalizer),
        given.restore(found.top_class[:, 0], -1),
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


def linear_kl(  # noqa: PLR0917
    hidden_p: ArrayLike,
    weight_p: ArrayLike,
    hidden_q: ArrayLike,
    weight_q: ArrayLike,
    bias_p: ArrayLike | None = None,
    bias_q: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    function = "linear_kl"
    options = {
        "phi": phi,
        "soft_cap": soft_cap,
        "where": where,
        "log_weights": log_weights,
        "block_size": block_size,
        "precision": precision,
    }
    p = _check.check(function, hidden_p, weight_p, bias_p, **options, names=("hidden_p", "weight_p", "bias_p"))
    q = _check.check(function, hidden_q, weight_q, bias_q, **options, names=("hidden_q", "weight_q", "bias_q"))
    _check.check_pair(function, p, q)
    return p.restore(_traced_divergence(p.head, q.head, p.plan))


def linear_top_k(
    hidden: ArrayLike,
    weight: ArrayLike,
    k: int,
    bias: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> LinearTopK:
    function = "linear_top_k"
    given = _check.check(
        function,
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
    k = _noise.check_count(function, k, given.head.weight.T)
    found: Any = _traced(given.head, Wanted(top=k), given.plan)
    return LinearTopK(given.restore(-(found.log_total[:, None] + found.top)), given.restore(found.top_class))


def linear_categorical(
    key: PRNGKeyArray | ArrayLike,
    hidden: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    replace: bool = True,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
) -> Int[Array, "..."]:
    function = "linear_categorical"
    _noise.check_key(function, key)
    given = _check.check(
        function,
        hidden,
        weight,
        bias,
        phi=phi,
        soft_cap=soft_cap,
        where=where,
        log_weights=log_weights,
        block_size=block_size,
        precision=precision,
        chunk=CHUNK,
    )
    prefix = check_shape(function, shape, given.batch)
    count = math.prod(prefix)
    check_distinct(function, replace, count, given.head.weight.shape[0])
    drawn = draw(key, given.head, given.plan, count, replace)
    return jax.vmap(given.restore)(drawn).reshape(*prefix, *given.batch)
