"""Streaming heads: a linear layer and its softmax over a huge vocabulary, block by block (MATH 11)."""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from jsoftmax.checks.arguments import public
from jsoftmax.checks.top_targets import TopTargets
from jsoftmax.heads import _check, _labels, _loss
from jsoftmax.heads._head import map_shards
from jsoftmax.heads._statistics import Extras, statistics
from jsoftmax.heads._sum import WeightedHead, weighted_sum
from jsoftmax.losses._cross_entropy import zero_weightless
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName
from jsoftmax.sums import not_negative


class LinearStatistics(NamedTuple):
    """Numbers of each token, `[...]`."""

    log_prob: Array
    """log p_y."""
    entropy: Array
    """−Σ p log p."""
    log_normalizer: Array
    """L = log Σ e^x."""
    argmax: Array
    """The class with the largest p, int32."""


@public
def linear_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike | TopTargets,
    bias: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    margin: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_label: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    banned: Integer[ArrayLike, "..."] | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
    implementation: str = "xla",
) -> Float[Array, "..."]:
    """Cross-entropy of labels under the softmax of a linear layer, in nats, not reduced; the logits never exist.

    It equals, without the N × V scores in memory,

        z = c tanh((hidden @ weight.T + bias) / c) / τ          without soft_cap  z = (hidden @ weight.T + bias) / τ
        losses.cross_entropy(z, labels, where=where, phi=φ, log_weights=log w, margin=m, …)     (MATH 11.1, 11.4)

    ∂/∂z = (p − 1_y) s, of which each block's share is multiplied out while it is in cache     (MATH 11.3)

    No mode (value, jvp, gradient, Hessian product, gradient of a gradient, vmap) makes an array of tokens × V, but for
    a copy of labels that are distributions, which are such an array themselves.

    Args:
      hidden: h `[..., d]`, floating; each row is a token.
      weight: W `[V, d]`, floating. Pass a kernel `[d, V]` as `kernel.T`, which XLA on CPU copies.
      labels: integers `[...]`; or several labels of each token, `[k, ...]`, whose scores are computed only once; or
        distributions q `[..., V]`, for which −Σ q l replaces −l_y; or `jsoftmax.losses.TopTargets`, which name k
        classes of each token and take the rest as one class, without label_smoothing     (MATH 7.8).
      bias: b `[V]`, or None.
      phi: the positive map φ.
      soft_cap: c > 0, which bends the scores into (−c, c). None: they are taken as they are.
      temperature: τ > 0, by which the scores are then divided; one number, which may be traced. Differentiable.
      margin: m, subtracted from the label's score before φ; with one integer label of each token.
      label_smoothing: a in [0, 1], shared by the classes that are kept.
      z_loss: factor of L².
      ignore_label: tokens with that label have loss 0; blocks of such tokens cost nothing. Labels made for PyTorch have
        −100. If it is None, such a label is out of range.
      where: bool, broadcastable to `[V]`; False leaves a class out, such as padding of the vocabulary.
      log_weights: log w, broadcastable to `[V]`: a prior, logit adjustment, a correction for sampling. Differentiable.
      banned: integers `[..., m]`, classes that each token leaves out in addition to those of `where`, such as the other
        right answers of a contrastive loss, or words that a text has used already. Not with `TopTargets`. Numbers out
        of range, such as −1, ban no class: use them to fill up shorter lists. They number all classes, also if these
        are sharded.
      block_size: how many classes are taken at a time, or (tokens, classes). None: on CPU, blocks that fit a cache; on
        GPUs and TPUs, all tokens and so many classes that their scores take 256 MiB, or up to twice that. If it does
        not divide V, the weight is copied once, to be padded.
      precision: the precision of the products: a `jax.lax.Precision` or its name. None: that of
        `jax_default_matmul_precision` if it is set; otherwise float32 factors keep all their digits, of which JAX's
        default keeps 11 bits on GPUs and 8 on TPUs.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the classes are sharded: weight, bias,
        where, log_weights and distributions are then this device's part, labels count all classes; hidden is the same
        on all     (MATH 13.1). Derivatives are right taken outside, and inside with check_vma, the default (MATH 13.3).
        Inside without it, or in `jax.vmap(axis_name=…)`, they are too large by a factor, the number of devices, and
        the gradient in hidden is this device's share: divide the gradient in weight by that number, and take
        `jax.lax.pmean` of the one in hidden.
      shards: under plain `jit` with a weight whose classes are sharded, over how many devices, or a multiple; it must
        divide V. Without it XLA gathers the whole weight on every device. It gathers hidden where blocks cut tokens
        that are sharded too: for these use axis_name. Axes of type `AxisType.Explicit` are an error outside
        `jax.shard_map` and `jax.sharding.auto_axes`.
      implementation: "xla", which runs everywhere; or "pallas", an experiment: one kernel for TPUs, from v5e on,
        computes the value, and never writes scores to memory. Derivatives are those of "xla", and `block_size` is
        theirs. It takes φ = exp and integer labels, without `banned` and `shards`. A TPU multiplies factors of float32
        and bfloat16 so, and arrays that are sharded need `jax.shard_map`. On a GPU it is an error. On CPU the kernel is
        interpreted, slowly, or, inside `jax.shard_map` with check_vma, the loop of "xla" runs. In jax 0.10 a Hessian
        product through the caller's `lax.scan` raises an AssertionError; use "xla" there.
    Returns: `[...]`, of several labels `[k, ...]`, float32 at least. Factors of narrower dtypes are multiplied as they
      are, and their products are summed in float32. In derivatives, GPUs and TPUs round the tangents and cotangents of
      these factors and of the scores to the same narrow dtype before they multiply them; CPUs do not. The weight's
      gradient is summed in float32 and rounded once. Small losses keep their digits (MATH 4.4), but for the rounding of
      the scores. Labels out of range, or on a class that is left out or impossible: the table of
      `jsoftmax.losses.cross_entropy`. A token with NaN or +inf among its scores: NaN, in that token alone, but its
      share of the weight's gradient is NaN.
    Raises: TypeError or ValueError for shapes, dtypes and options that do not fit.
    Source: Milakov and Gimelshein 2018 (running normaliser); Wijmans et al. 2025 (the loss without logits).

    >>> import jax.numpy as jnp
    >>> hidden, weight = jnp.eye(2, 3), jnp.arange(15.).reshape(5, 3)
    >>> linear_cross_entropy(hidden, weight, jnp.array([4, 0]))
    Array([ 0.05106..., 12.05106...], dtype=float32)
    """
    function = "linear_cross_entropy"
    given = _check.check(
        function,
        hidden,
        weight,
        bias,
        labels=labels,
        phi=phi,
        soft_cap=soft_cap,
        temperature=temperature,
        margin=margin,
        ignore_label=ignore_label,
        where=where,
        log_weights=log_weights,
        banned=banned,
        block_size=block_size,
        precision=precision,
        axis_name=axis_name,
        shards=shards,
        implementation=implementation,
        per_token=(_labels.SEVERAL, _labels.TOP),
    )
    smoothing, z = _check.loss_options(function, given, label_smoothing, z_loss)
    if given.top is not None:
        found = map_shards(statistics, given.head, given.plan, Extras(others=True))
        return _loss.top_target_losses(given, found, z)
    found = map_shards(statistics, given.head, given.plan, Extras(spread=smoothing is not None))
    return given.restore_labels(_loss.token_losses(given.head, given.plan, found, smoothing, z))


@public
def linear_cross_entropy_sum(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike | TopTargets,
    bias: ArrayLike | None = None,
    *,
    token_weights: ArrayLike | None = None,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    margin: ArrayLike = 0.0,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    ignore_label: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    banned: Integer[ArrayLike, "..."] | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
) -> Float[Array, ""]:
    """Σ w loss over the tokens. On CPU the forward pass also computes the gradient: three products instead of four.

    It equals

        loss = linear_cross_entropy(hidden, weight, labels, bias, …)
        jnp.sum(token_weights * loss)                                              (MATH 11.5)

    On CPU it is faster if the gradient of the weight is wanted, because it keeps the products of a block of tokens with
    all classes (256 × V numbers by default). GPUs and TPUs do the same if `block_size` is given. By default they take
    the four products of `linear_cross_entropy`, in blocks four times as large, which means fewer kernels and more
    memory. An unreduced loss cannot do this, because the weights of its tokens are known only in the backward pass. For
    the mean over the tokens that count, divide by their number: `/ jnp.sum(labels != ignore_label)`.

    Args:
      hidden, weight, labels, bias, phi, soft_cap, temperature, margin, label_smoothing, z_loss, ignore_label, where,
        log_weights, banned, precision, axis_name, shards: as in `linear_cross_entropy`; labels of one token are one
        integer, a distribution, or `jsoftmax.losses.TopTargets`.
      token_weights: w, broadcastable to `[...]`; differentiable. None: 1. A token with weight 0 and a label out of
        range adds 0.
      block_size: as in `linear_cross_entropy`. Kept products are those of a block of tokens with V classes.
    Returns: a number, float32 at least. Forward mode, Hessian products, derivatives in other arguments than hidden,
      weight, bias and token_weights, labels that are distributions, and `shards` all use the rule of
      `linear_cross_entropy`. With `axis_name` the gradient merges the devices once for each block of tokens; a jitted
      `jax.vmap(axis_name=…)` of it can be differentiated only inside the jit.
    Raises: as `linear_cross_entropy`.
    Source: MATH 11.5.

    >>> import jax.numpy as jnp
    >>> hidden, weight = jnp.eye(2, 3), jnp.arange(15.).reshape(5, 3)
    >>> linear_cross_entropy_sum(hidden, weight, jnp.array([4, 0]), token_weights=0.5)
    Array(6.05106..., dtype=float32)
    """
    function = "linear_cross_entropy_sum"
    given = _check.check(
        function,
        hidden,
        weight,
        bias,
        labels=labels,
        phi=phi,
        soft_cap=soft_cap,
        temperature=temperature,
        margin=margin,
        ignore_label=ignore_label,
        where=where,
        log_weights=log_weights,
        banned=banned,
        block_size=block_size,
        precision=precision,
        axis_name=axis_name,
        shards=shards,
        token_weights=1.0 if token_weights is None else token_weights,
        per_token=(_labels.TOP,),
    )
    smoothing, z = _check.loss_options(function, given, label_smoothing, z_loss)
    if given.top is not None:
        found, weights = map_shards(statistics, given.head, given.plan, Extras(others=True)), given.token_weights
        loss, of_tokens = _loss.top_target_losses(given, found, z), given.restore(cast("Array", weights))
        return jnp.sum(of_tokens * zero_weightless(loss, of_tokens))
    weighed = WeightedHead(given.head, cast("Array", given.token_weights), smoothing, z)
    return map_shards(weighted_sum, weighed, given.plan)


@public
def linear_statistics(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    ignore_label: int | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    banned: Integer[ArrayLike, "..."] | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
    implementation: str = "xla",
) -> LinearStatistics:
    """Log-probability of the label, entropy, log-normaliser and mode of each token in one pass; the logits never exist.

    It equals

        z = c tanh((hidden @ weight.T + bias) / c) / τ          without soft_cap  z = (hidden @ weight.T + bias) / τ
        (log_softmax(z)[y], entropy(z), log_normalizer(z), argmax(softmax(z)))          (MATH 11.1, 11.2)

    All but the last are differentiable, each by itself and together     (MATH 11.3)

    Args:
      hidden, weight, bias, phi, soft_cap, temperature, where, log_weights, banned, block_size, precision, axis_name,
        shards, implementation: as in `linear_cross_entropy`.
      labels: integers `[...]`, or several of each token, `[k, ...]`; or distributions q `[..., V]`: then log_prob is
        Σ q l.
      ignore_label: labels of that number have log_prob 0. A token whose labels all have it gets 0 for the other numbers
        too, and −1 for the mode.
    Returns: `LinearStatistics(log_prob, entropy, log_normalizer, argmax)`, each `[...]`; log_prob of several labels is
      `[k, ...]`. The first three are float32 at least, the last is int32. Edges as in `log_softmax`, `entropy` and
      `log_normalizer`. A label out of range has log_prob NaN. A token without classes, or with NaN or +inf, has argmax
      −1.
    Raises: as `linear_cross_entropy`.
    Source: MATH 11.2.

    >>> import jax.numpy as jnp
    >>> hidden, weight = jnp.eye(2, 3), jnp.arange(15.).reshape(5, 3)
    >>> linear_statistics(hidden, weight, jnp.array([4, 0])).entropy
    Array([0.20825..., 0.20825...], dtype=float32)
    """
    given = _check.check(
        "linear_statistics",
        hidden,
        weight,
        bias,
        labels=labels,
        phi=phi,
        soft_cap=soft_cap,
        temperature=temperature,
        ignore_label=ignore_label,
        where=where,
        log_weights=log_weights,
        banned=banned,
        block_size=block_size,
        precision=precision,
        axis_name=axis_name,
        shards=shards,
        implementation=implementation,
        per_token=(_labels.SEVERAL,),
    )
    found: Any = map_shards(statistics, given.head, given.plan, Extras(entropy=True, top=1))
    return LinearStatistics(
        given.restore_labels(-_loss.mark_out_of_range(found.loss, given.head, given.plan)),
        given.restore(not_negative(found.log_total + found.gap)),
        given.restore(found.log_normalizer),
        given.restore(found.top_class[:, 0], -1),
    )


@public
def linear_log_normalizer(
    hidden: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
    banned: Integer[ArrayLike, "..."] | None = None,
    block_size: int | tuple[int, int] | None = None,
    precision: Any = None,
    axis_name: AxisName = None,
    shards: int = 1,
    implementation: str = "xla",
) -> Float[Array, "..."]:
    """Log-normaliser of a linear layer's scores, without the scores.

    It equals

        z = c tanh((hidden @ weight.T + bias) / c) / τ          without soft_cap  z = (hidden @ weight.T + bias) / τ
        log_normalizer(z, where=where, phi=φ, log_weights=log w)          (MATH 11.1, 11.2)

    Args:
      hidden, weight, bias, phi, soft_cap, temperature, where, log_weights, banned, block_size, precision, axis_name,
        shards, implementation: as in `linear_cross_entropy`.
    Returns: `[...]`, float32 at least; edges as in `log_normalizer`.
    Raises: as `linear_cross_entropy`.
    Source: Milakov and Gimelshein 2018.

    >>> import jax.numpy as jnp
    >>> linear_log_normalizer(jnp.eye(2, 3), jnp.arange(15.).reshape(5, 3))
    Array([12.05106..., 13.05106...], dtype=float32)
    """
    given = _check.check(
        "linear_log_normalizer",
        hidden,
        weight,
        bias,
        phi=phi,
        soft_cap=soft_cap,
        temperature=temperature,
        where=where,
        log_weights=log_weights,
        banned=banned,
        block_size=block_size,
        precision=precision,
        axis_name=axis_name,
        shards=shards,
        implementation=implementation,
    )
    return given.restore(map_shards(statistics, given.head, given.plan, Extras()).log_normalizer)
