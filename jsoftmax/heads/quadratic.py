"""Cross-entropy of a linear head under an order-2 φ by the Gram matrix of its weight (MATH 12.1)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax._precision import precise
from jsoftmax.checks.arguments import accumulation_dtype, public
from jsoftmax.checks.labels import in_range
from jsoftmax.checks.matrices import check_matrix, check_per_class, check_quadratic, check_row_labels, check_width
from jsoftmax.phi import Phi, log_phi

_LONGEST, _SHORTEST = 4096, 512


class Moments(NamedTuple):
    """Sums over the classes that are kept, of the rows w of the weight and the entries b of the bias."""

    gram: Array
    """Q = Σ w wᵀ."""
    total: Array
    """m = Σ w."""
    cross: Array
    """Σ b w."""
    bias: Array
    """Σ b, Σ b²."""
    classes: Array
    """The number of classes."""


@functools.partial(jax.jit, static_argnames="dtype")
def moments(weight: Array, bias: Array | None, where: Array | None, dtype: Any) -> Moments:
    """The sums, block by block if V has a divisor of a suitable size.

    A masked weight, or one widened from bfloat16, is then never stored whole; neither is the part of its derivative
    that comes through here, before the labels' part is added (benchmarks/NOTES.md). If blocks did not divide V, XLA
    would copy the weight first.
    """
    length = max((n for n in range(_SHORTEST, _LONGEST + 1) if weight.shape[0] % n == 0), default=weight.shape[0])

    def body(sums: Moments, block: tuple[Array, Array | None, Array | None]) -> tuple[Moments, None]:
        w, b, kept = block
        b = jnp.zeros(length, dtype) if b is None else b.astype(dtype)
        if kept is not None:
            w, b = jnp.where(kept[:, None], w, 0), jnp.where(kept, b, 0)
        wide = w.astype(dtype)
        count = jnp.ones(length, dtype) if kept is None else kept.astype(dtype)
        new = Moments(
            precise(w.T, w, preferred_element_type=dtype),
            precise(jnp.ones(length, dtype), wide),
            precise(b, wide),
            jnp.stack([jnp.sum(b), jnp.sum(b**2)]),
            jnp.sum(count),
        )
        return jax.tree.map(jnp.add, sums, new), None

    d = weight.shape[1]
    zero = Moments(*(jnp.zeros(shape, dtype) for shape in ((d, d), d, d, 2, ())))
    if length == weight.shape[0]:
        return body(zero, (weight, bias, where))[0]
    cut = jax.tree.map(lambda a: a.reshape(-1, length, *a.shape[1:]), (weight, bias, where))
    return lax.scan(jax.checkpoint(body), zero, cut)[0]


@jax.jit
def _loss(hidden: Array, weight: Array, labels: Array, *, bias: Array | None, where: Array | None, phi: Phi) -> Array:
    """log Σ φ(o) − log φ(o_y), hidden `[N, d]` in the accumulation dtype  (MATH 12.1)."""
    dtype = hidden.dtype
    coefficients: Any = phi.quadratic
    a0, a1, a2 = (jnp.asarray(a).astype(dtype) for a in coefficients)
    sums = moments(weight, bias, where, dtype)
    first = precise(hidden, sums.total) + sums.bias[0]
    square = jnp.sum((precise(hidden, sums.gram) + 2 * sums.cross[None]) * hidden, -1) + sums.bias[1]
    total = sums.classes * a0 + a1 * first + a2 * square

    label, valid = in_range(labels, weight.shape[0])
    kept = jnp.ones(label.shape, bool) if where is None else where[label]
    score = jnp.sum(jnp.where(kept[:, None], weight[label].astype(dtype), 0) * hidden, -1)
    if bias is not None:
        score = score + jnp.where(kept, bias[label].astype(dtype), 0)
    loss = jnp.log(jnp.where(kept, total, 1)) - log_phi(phi, score)
    return jnp.where(valid, jnp.where(kept, loss, 0), jnp.nan)


@public
def quadratic_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    where: Bool[ArrayLike, "..."] | None = None,
    phi: Phi,
) -> Float[Array, "..."]:
    """Cross-entropy of the scores o = W h + b under an order-2 φ, exact, without computing a score but the label's.

    loss = log Z − log φ(o_y),   Z = Σ φ(o) = V a0 + a1 mᵀh + a2 hᵀQh,   Q = WᵀW,  m = Wᵀ1     (MATH 12.1)

    for b = 0. A batch of N costs V d² + N d², while the scores alone cost N V d: so it is faster for N > d, and it
    never stores the scores `[N, V]`. Plain autodiff goes through Q and m, forward and backward, to any order, and in
    the parameters of φ too. So any optimiser can be used; `heads.factored` is for plain SGD only.

    Args:
      hidden: h `[..., d]`, any floating dtype, any leading axes.
      weight: W `[V, d]`, floating, a row for each class.
      labels: integers `[...]`, the class y.
      bias: b `[V]` or None.
      where: bool `[V]`; False leaves a class out, e.g. rows that pad V; they may hold anything.
      phi: taylor(2), spherical(ε) or quadratic(a0, a1, a2), with one number for all classes in each place.
    Returns: `[...]`, in the wider dtype of hidden and weight, float32 at least. A label out of range gives NaN, one on
      a class left out 0, both with derivatives 0. NaN or infinity in a row of hidden: NaN there. In a row of the weight
      that is kept: NaN everywhere.
      Products of float32 are full float32 products on a GPU too, whose default, TF32, would leave three digits. But
      small scores of a large weight lose twice as many digits in hᵀQh as in W h: with κ² = a2 |W|² |h|²/Z the loss in
      float32 is off by about 1e-6 + 3e-9 κ². This happens if all rows of W share a vector that is nearly orthogonal to
      hidden. A vector of length 10, 100, 1000 beside rows of length 1 leaves errors of 2e-5, 3e-3, 0.2 under taylor(2)
      (W h: 5e-6, 9e-5, 1e-3), and a longer one may leave Z < 0 and so NaN. Subtract it from all rows, or use float64. A
      loss near 0 has that absolute error and may come out below 0.
      Z must be finite: scores below 1e18 in float32.
      Where V has a divisor from 512 to 4096, W is read in blocks: at V = 131072, d = 256, N = 1024 in float32 the
      gradient's temporaries take 13 MB, not 129 (with a mask 257).
    Raises: ValueError for a φ of another order, and for shapes that do not fit; TypeError for dtypes.
    Source: de Brébisson & Vincent 2016, section 3 (the spherical family); Vincent et al. 2015 (Q = WᵀW).

    >>> from jsoftmax import taylor
    >>> W = jnp.array([[1., 0.], [0., 1.], [1., 1.]])
    >>> quadratic_cross_entropy(jnp.array([[2., 1.], [0., 1.]]), W, jnp.array([2, 0]), phi=taylor(2))
    Array([0.63252..., 1.79175...], dtype=float32)
    """
    function = "quadratic_cross_entropy"
    phi = check_quadratic(function, phi)
    h = check_matrix(function, "hidden", hidden, "[..., d]")
    w = check_matrix(function, "weight", weight, "[V, d]", 2)
    check_width(function, h, w.shape[1])
    y = check_row_labels(function, labels, h.shape[:-1])
    b = None if bias is None else check_per_class(function, "bias", bias, jnp.floating, w.shape[0])
    kept = None if where is None else check_per_class(function, "where", where, jnp.bool_, w.shape[0])
    dtype = accumulation_dtype(max(h.dtype, w.dtype, key=lambda dtype: jnp.finfo(dtype).bits))
    loss = _loss(h.reshape(-1, h.shape[-1]).astype(dtype), w, y.reshape(-1), bias=b, where=kept, phi=phi)
    return loss.reshape(y.shape)
