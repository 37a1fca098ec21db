"""The public functions: `jax.nn.dot_product_attention` for every φ, and its statistics."""

import functools
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from jsoftmax.attention import _check
from jsoftmax.attention._blocks import Inputs, Plan
from jsoftmax.attention._mean import Mean, Results, mean
from jsoftmax.checks import arguments
from jsoftmax.checks.arguments import public
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import AxisName
from jsoftmax.sums import not_negative


class AttentionStatistics(NamedTuple):
    """Numbers of each query. All but the output are float32 at least."""

    output: Array
    """Σ p v `[B, T, N, H]`."""
    log_normalizer: Array
    """L = log Σ φ(s) `[B, T, N]`."""
    entropy: Array
    """−Σ p log p `[B, T, N]`."""


@public
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Bool[ArrayLike, "..."] | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, "..."] | None = None,
    key_value_seq_lengths: Int[ArrayLike, "..."] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    return_residual: bool = False,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    sink: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    axis_name: AxisName = None,
) -> Any:
    """Attention, the mean Σ p v of values under p = φ(s)/Σ φ(s), streamed: no array of queries × keys ever exists.

    It is `jax.nn.dot_product_attention` for every φ, with the layout, masks and meaning of that function, but without
    its `implementation=`, and equals

        s = c tanh((scale q·k + bias)/c)                    without soft_cap  s = scale q·k + bias
        softmax([s, sink], where=…, phi=φ)[..., :-1] @ v                                    (MATH 14.1)

    L̇ = Σ p ẋ,  (Σ p v)˙ = Σ p (v̇ + ẋ v) − (Σ p v) L̇,  ẋ = ψ'(s) ṡ     (MATH 14.3)

    No mode (value, jvp, gradient, Hessian product, gradient of a gradient, vmap, remat) makes an array of T × S. Only a
    bias or a mask that is such an array is copied.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`, floating: batch, length, heads, features.
      key: `[B, S, K, H]` or `[S, K, H]`; K divides N, and each head of keys serves N/K heads of queries in turn.
      value: `[B, S, K, H']` or `[S, K, H']`, H' = H or not.
      bias: added to the scores; it broadcasts to `[B, N, T, S]`, and missing axes are added in front. Differentiable.
        −inf leaves a key out.
      mask: bool, of such a shape; False leaves a key out. Its numbers must be finite, else the gradients by query and
        key are NaN; for padding, which may hold anything, give lengths.
      scale: a factor of q·k, one number; differentiable. None: 1/√H.
      is_causal: whether query t sees only the keys up to position t. Blocks of which it sees none are skipped.
      query_seq_lengths: integers `[B]`: queries beyond them have output 0.
      key_value_seq_lengths: integers `[B]`: keys beyond them are left out. Beyond both, arrays may hold anything.
      local_window_size: (left, right), or one number for both: query t sees only the keys from position t − left to
        t + right. Blocks outside are skipped.
      return_residual: whether to return L, too.
      phi: the positive map φ.
      soft_cap: c > 0: scores are bent into (−c, c). None: they are taken as they are.
      sink: the score of one more class, without a value: a number, or one for each head `[N]`; differentiable. It is
        neither scaled nor capped.
      block_size: how many keys at a time, or (queries, keys). None: a good choice for the platform that the program is
        compiled for.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) over which the keys are sharded: key, value, and bias
        and mask where they have keys, are then this device's part; positions and lengths count all keys; query, sink
        and the rest are the same on all     (MATH 13.1). Derivatives are right where those of
        `heads.linear_cross_entropy` are (MATH 13.3). Sharded heads and batches need no argument.
    Returns: `[B, T, N, H']` or `[T, N, H']` in the inputs' dtype; factors of products are in that dtype, and sums in
      float32 at least. float32 factors keep all their digits on GPUs and TPUs, too, unless
      `jax_default_matmul_precision` is set. With return_residual the output and L = log Σ φ(s) `[B, T, N]`, the sink
      included, in float32 at least, and differentiable; jax.nn rounds it and drops its derivatives.
      A query that sees no key: output 0, L −inf, derivatives 0 (jax.nn gives the mean of all values); with a sink, L is
      ψ(sink). A score of +inf or NaN, or one outside φ's domain, makes its row NaN.
    Raises: TypeError or ValueError for shapes, dtypes and options that do not fit.
    Source: Vaswani et al. 2017, equation 1; Dao et al. 2022 (streamed); Xiao et al. 2024 (sinks).

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(3)[:, None]                 # three places, one head
    >>> dot_product_attention(x, x, x, is_causal=True, scale=1.)[:, 0]
    Array([[1.        , 0.        , 0.        ],
           [0.26894..., 0.73105..., 0.        ],
           [0.21194..., 0.21194..., 0.57611...]], dtype=float32)
    """
    given = _check.check(
        "dot_product_attention",
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        phi=phi,
        soft_cap=soft_cap,
        sink=sink,
        block_size=block_size,
        axis_name=axis_name,
    )
    with_residual = arguments.check_flag("dot_product_attention", "return_residual", return_residual)
    found = _attend(given, Results.LOG_NORMALIZER if with_residual else Results.OUTPUT)
    output = given.restore(found.output).astype(given.dtype)
    return (output, given.restore(found.log_normalizer)) if with_residual else output


@public
def attention_statistics(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: Bool[ArrayLike, "..."] | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[ArrayLike, "..."] | None = None,
    key_value_seq_lengths: Int[ArrayLike, "..."] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    phi: Phi = exp,
    soft_cap: ArrayLike | None = None,
    sink: ArrayLike | None = None,
    block_size: int | tuple[int, int] | None = None,
    axis_name: AxisName = None,
) -> AttentionStatistics:
    """Output, log-normaliser and entropy of each query's attention, all differentiable, in one pass over the keys.

    L = log Σ φ(s),  H = −Σ p log p;   Ḣ = −Σ p c ẋ,  c = log p + H     (MATH 14.3)

    A small entropy, of attention to one key, keeps its digits (MATH 4.3).

    Args:
      query, key, value, bias, mask, scale, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, phi,
        soft_cap, sink, block_size, axis_name: as in `dot_product_attention`. The sink is one of the classes of L and H.
    Returns: `AttentionStatistics`: the output as there; L and H `[B, T, N]`, or `[T, N]`, in float32 at least. A query
      that sees no key: output 0, L −inf, H 0, and derivatives 0.
    Raises: as `dot_product_attention`.
    Source: entropy of attention as a regulariser: Zhai et al. 2023.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(3)[:, None]
    >>> attention_statistics(x, x, x, is_causal=True, scale=1.).entropy[:, 0]
    Array([0.       , 0.5822..., 0.9753...], dtype=float32)
    """
    given = _check.check(
        "attention_statistics",
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        phi=phi,
        soft_cap=soft_cap,
        sink=sink,
        block_size=block_size,
        axis_name=axis_name,
    )
    found = _attend(given, Results.ENTROPY)
    return AttentionStatistics(
        given.restore(found.output).astype(given.dtype),
        given.restore(found.log_normalizer),
        given.restore(not_negative(found.log_total + found.gap)),
    )


def _attend(given: _check.CheckedArguments, results: Results) -> Mean:
    """Compiled by itself, but not where the keys are sharded: JAX traces a rule in `jax.vmap(axis_name=…)` again where
    the name is no longer bound."""
    if given.plan.axis_name is not None:
        return mean(given.inputs, results, given.plan)
    return _compiled(given.inputs, results, given.plan)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _compiled(inputs: Inputs, results: Results, plan: Plan) -> Mean:
    return mean(inputs, results, plan)
