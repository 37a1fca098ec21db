"""Losses of a few sampled classes instead of all: sampled softmax and noise-contrastive estimation (MATH 12.7, 12.8).

Both draw one set of classes for all rows of a batch, with replacement, from a proposal Q.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from jsoftmax import maps, sums
from jsoftmax._precision import precise
from jsoftmax._series import log1p_exp
from jsoftmax.checks.arguments import accumulation_dtype, as_floating, as_scores, check_where, is_int, public
from jsoftmax.checks.labels import in_range
from jsoftmax.checks.matrices import check_row_labels
from jsoftmax.checks.sampling import check_key
from jsoftmax.gumbel import categorical
from jsoftmax.losses._terms import negative_log_p
from jsoftmax.phi import Phi, exp, log_phi


class _CheckedArguments(NamedTuple):
    """Checked arguments in the accumulation dtype, with the rows as one axis."""

    hidden: Array
    weight: Array
    bias: Array | None
    labels: Array
    rows: Array | None
    log_q: Array


@public
def log_uniform_proposal(num_classes: int) -> Float[Array, " V"]:
    """Log-probabilities of Zipf's law, nearly, for classes sorted by frequency.

    Q_j = log((j + 2)/(j + 1)) / log(V + 1),   j = 0 … V − 1     (MATH 12.7)

    Args:
      num_classes: V.
    Returns: float `[V]`. For a proposal by counts, unigram, take jnp.log(counts / counts.sum()).
    Raises: TypeError or ValueError if `num_classes` is no int >= 1.
    Source: TensorFlow's log_uniform_candidate_sampler.

    >>> jnp.exp(log_uniform_proposal(3))
    Array([0.5..., 0.29..., 0.20...], dtype=float32)
    """
    if not is_int(num_classes) or num_classes < 1:
        raise (ValueError if is_int(num_classes) else TypeError)(
            f"log_uniform_proposal: num_classes must be an int >= 1; got {num_classes!r}. Pass a "
            "Python int, which shapes the result."
        )
    rank = jnp.arange(1, num_classes + 1).astype(jnp.result_type(float))
    return jnp.log(jnp.log1p(1 / rank)) - jnp.log(jnp.log1p(rank[-1]))


@public
def sampled_cross_entropy(
    key: PRNGKeyArray | ArrayLike,
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: Integer[ArrayLike, "..."],
    num_samples: int,
    *,
    log_proposal: ArrayLike,
    bias: ArrayLike | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    phi: Phi = exp,
) -> Float[Array, "..."]:
    """Cross-entropy whose normaliser is estimated from the label and sampled classes.

    loss = −log e^{x_y} / (e^{x_y} + Σ_{j_i ≠ y} e^{x_{j_i} − log n Q_{j_i}}),  x = ψ(W h + b),  j_1 … j_n ~ Q
    (MATH 12.7)

    The mean of the denominator over draws is the exact Σ e^x, for any n: a draw of the label itself, an accidental hit,
    is rejected, and the label counts once. So the mean of the loss is at most the exact loss, and tends to it as n
    grows. TensorFlow's `sampled_softmax_loss` has other values: it subtracts the log of the expected count from the
    label's score, too, and by default draws classes without repetition, with other expected counts.

    Args:
      key: a PRNG key; use a new one for every step.
      hidden: h `[..., d]`, floating; differentiable.
      weight: W `[V, d]`; differentiable. Only the rows of labels and samples are read; its gradient is a dense array.
      labels: integers `[...]`.
      num_samples: n, an int; the samples are shared by all rows.
      log_proposal: log Q `[V]`, normalised here, not differentiated: `log_uniform_proposal(V)`, or the log of counts. A
        class with Q = 0 is never a sample.
      bias: b `[V]`, or None.
      where: bool, broadcastable to the labels; False leaves a row out, whose loss is 0.
      phi: the positive map φ.
    Returns: `[...]` ≥ 0, in the common dtype of `hidden`, `weight` and `bias`, but float32 for narrower ones. A label
      out of range, or a bad proposal: NaN. A score of NaN or +inf: NaN in that row alone.
    Raises: TypeError or ValueError for shapes or dtypes that do not fit, or `num_samples` that is no int >= 1.
    Source: Bengio & Senécal 2008; Blanc & Rendle 2018; Jean et al. 2015.

    >>> h, W = jnp.ones((2, 4)), jnp.eye(100, 4)
    >>> log_q = log_uniform_proposal(100)
    >>> sampled_cross_entropy(jax.random.key(0), h, W, jnp.array([0, 50]), 20, log_proposal=log_q).shape
    (2,)
    """
    function = "sampled_cross_entropy"
    given, draws, shape = _check(function, key, hidden, weight, labels, num_samples, log_proposal, bias, where, phi)
    return _sampled(given, phi, draws).reshape(shape)


@public
def nce_loss(
    key: PRNGKeyArray | ArrayLike,
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: Integer[ArrayLike, "..."],
    num_samples: int,
    *,
    log_proposal: ArrayLike,
    bias: ArrayLike | None = None,
    where: Bool[ArrayLike, "..."] | None = None,
    phi: Phi = exp,
) -> Float[Array, "..."]:
    """Noise-contrastive estimation: telling the label from sampled classes, with scores that normalise themselves.

    loss = softplus(−Δ_y) + Σ_i softplus(Δ_{j_i}),  Δ_k = x_k − log n Q_k,  x = ψ(W h + b),  j_1 … j_n ~ Q
    (MATH 12.8)

    Its mean is smallest where x = log p, without any normaliser. Samples that happen to be the label are kept, as in
    the theory and, by default, in TensorFlow's `nce_loss`; the latter draws classes without repetition.

    Args:
      key, hidden, weight, labels, num_samples, bias, where, phi: as in `sampled_cross_entropy`.
      log_proposal: as there. A label with Q = 0 is never a sample, so its term is 0.
    Returns: as `sampled_cross_entropy`; a sum over the samples, not their mean.
    Raises: as `sampled_cross_entropy`.
    Source: Gutmann & Hyvärinen 2012; Mnih & Teh 2012, with one set of samples for a batch.

    >>> h, W = jnp.ones((2, 4)), jnp.eye(100, 4)
    >>> log_q = log_uniform_proposal(100)
    >>> nce_loss(jax.random.key(0), h, W, jnp.array([0, 50]), 20, log_proposal=log_q).shape
    (2,)
    """
    function = "nce_loss"
    given, draws, shape = _check(function, key, hidden, weight, labels, num_samples, log_proposal, bias, where, phi)
    return _nce(given, phi, draws).reshape(shape)


def _scores(given: _CheckedArguments, phi: Phi, draws: Array) -> tuple[Array, Array, Array]:
    """x of the labels `[rows]` and of the draws `[rows, n]`; and the labels, with 0 for one that is out of range."""
    label = in_range(given.labels, given.weight.shape[0])[0].astype(jnp.int32)
    own = jnp.sum(given.hidden * given.weight[label], -1)
    other = precise(given.hidden, given.weight[draws].T)
    if given.bias is not None:
        own, other = own + given.bias[label], other + given.bias[draws][None]
    return log_phi(phi, own), log_phi(phi, other), label


def _corrected(x: Array, log_q: Array, draws: Array) -> Array:
    """x − log n Q, where n Q is the expected count of the class among the draws; +inf where Q is 0."""
    never = jnp.isneginf(log_q)
    return jnp.where(never, jnp.inf, x - jnp.where(never, 0, log_q) - math.log(draws.shape[0]))


def _finish(loss: Array, given: _CheckedArguments, draws: Array) -> Array:
    """The loss: NaN, with derivatives 0, for a label out of range or failed draws; 0 in rows that do not count."""
    valid = in_range(given.labels, given.weight.shape[0])[1] & jnp.all(draws >= 0)
    loss = jnp.where(valid, loss, jnp.nan)
    return loss if given.rows is None else jnp.where(given.rows, loss, 0)


@jax.jit
def _sampled(given: _CheckedArguments, phi: Phi, draws: Array) -> Array:
    own, other, label = _scores(given, phi, draws)
    hit = draws[None] == label[:, None]
    other = _corrected(other, given.log_q[draws][None], draws)
    x = jnp.concatenate([own[:, None], jnp.where(hit, -jnp.inf, other)], -1)
    return _finish(negative_log_p(x, jnp.zeros((*own.shape, 1), jnp.int32))[:, 0], given, draws)


@jax.jit
def _nce(given: _CheckedArguments, phi: Phi, draws: Array) -> Array:
    own, other, label = _scores(given, phi, draws)
    noise = log1p_exp(_corrected(other, given.log_q[draws][None], draws))
    return _finish(log1p_exp(-_corrected(own, given.log_q[label], draws)) + jnp.sum(noise, -1), given, draws)


def _check(  # noqa: PLR0917  (as the public functions have them)
    function: str,
    key: Any,
    hidden: Any,
    weight: Any,
    labels: Any,
    num_samples: Any,
    log_proposal: Any,
    bias: Any,
    where: Any,
    phi: Any,
) -> tuple[_CheckedArguments, Array, tuple[int, ...]]:
    """The arguments, the draws, and the shape of the result."""
    check_key(function, key)
    maps.check_phi_of_blocks(function, phi)
    factors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    arrays = {name: as_floating(function, name, a, "Convert it: astype(float).") for name, a in factors.items()}
    h, W = arrays["hidden"], arrays["weight"]
    if W.ndim != 2 or not W.shape[0] or h.shape[-1:] != W.shape[1:]:
        raise ValueError(
            f"{function}: weight must be [V, d] with the d of hidden [..., d]; got {W.shape} and {h.shape}. "
            "Transpose it if it is [d, V]."
        )
    y = check_row_labels(function, labels, h.shape[:-1])
    if not is_int(num_samples) or num_samples < 1:
        raise (ValueError if is_int(num_samples) else TypeError)(
            f"{function}: num_samples must be an int >= 1, known at trace time; got {num_samples!r}. "
            "Pass a Python int, because it shapes the scores."
        )
    dtype = accumulation_dtype(functools.reduce(jnp.promote_types, [a.dtype for a in arrays.values()]))
    log_q = as_scores(function, "log_proposal", log_proposal)
    for name, array in {"log_proposal": log_q, "bias": arrays.get("bias", log_q)}.items():
        if array.shape != W.shape[:1]:
            raise ValueError(
                f"{function}: {name} must have one number for each class, shape {W.shape[:1]}; got shape "
                f"{array.shape}. For equal numbers write jnp.zeros(V)."
            )
    mask = check_where(function, where, y.shape, "the labels' shape")
    rows = None if mask is None else jnp.broadcast_to(mask, y.shape).reshape(-1)
    hidden = h.reshape(-1, h.shape[-1]).astype(dtype)
    if rows is not None:
        hidden = sums.zero_where(~rows[:, None], hidden)  # they may hold anything
    log_q = lax.stop_gradient(log_q).astype(dtype)
    log_p = maps.log_p(log_q, (0,))
    draws = categorical(key, log_q, shape=(int(num_samples),))
    labels = y.reshape(-1)
    if rows is not None:
        labels = jnp.where(rows, labels, 0)
    bias = arrays["bias"].astype(dtype) if bias is not None else None
    return _CheckedArguments(hidden, W.astype(dtype), bias, labels, rows, log_p), draws, y.shape
