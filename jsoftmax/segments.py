"""Ragged rows: the softmax and its kin over segments of one long array, for every φ (MATH 15).

- `segment_softmax`: probabilities within each segment.
- `segment_log_softmax`: log-probabilities within each segment.
- `segment_log_normalizer`: the log-normaliser of each segment.
- `segment_entropy`: the entropy of each segment.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax._rules import compiled_rule
from jsoftmax.checks import arguments
from jsoftmax.checks.arguments import public
from jsoftmax.checks.names import no_attribute
from jsoftmax.phi import Phi, exp
from jsoftmax.sharding import check_not_explicit
from jsoftmax.sums import FAR, SURE, not_below, not_negative
from jsoftmax.sums.reference import exponential, rest_of

__all__ = ["segment_entropy", "segment_log_normalizer", "segment_log_softmax", "segment_softmax"]


__getattr__ = functools.partial(no_attribute, __name__)


def __dir__() -> list[str]:
    return __all__


class Layout(NamedTuple):
    """The properties of the rows that are part of the compiled program."""

    rows: int
    """Their number, with one before and one behind those of the caller, for elements of no row."""
    is_sorted: bool

    @property
    def indexing(self) -> dict[str, Any]:
        """What JAX may know of the ids where it gathers and scatters."""
        return {"indices_are_sorted": self.is_sorted, "mode": "promise_in_bounds"}


def row_sums(layout: Layout, ids: Array, *arrays: Array) -> list[Array]:
    """Σ over each row, for several arrays `[N, …]`."""
    return _of_each(lambda a: jax.ops.segment_sum(a, ids, layout.rows, **layout.indexing), arrays)


def spread(layout: Layout, ids: Array, *of_rows: Array) -> list[Array]:
    """The numbers of its row for each element."""
    return _of_each(lambda a: a.at[ids].get(**layout.indexing), of_rows)


def _of_each(f: Callable[[Array], Array], arrays: tuple[Array, ...]) -> list[Array]:
    """f of each array. On GPUs and TPUs f is applied once, to all of them side by side, because it takes as long as its
    indices; on CPU that would be slower than f of each."""

    def of_all(*arrays: Array) -> list[Array]:
        done = f(jnp.stack(arrays, -1))
        return [done[..., i] for i in range(len(arrays))]

    def apart(*arrays: Array) -> list[Array]:
        return [f(a) for a in arrays]

    return apart(*arrays) if len(arrays) == 1 else lax.platform_dependent(*arrays, cpu=apart, default=of_all)


class _Shifted(NamedTuple):
    """As `sums.reference.Shifted`, for ragged rows."""

    u: Array
    e: Array
    rest: Array
    peak: Array


def _shifted(x: Array, ids: Array, layout: Layout) -> _Shifted:
    """u = x − max x, e^u, Σ e^u − 1 and max x of each row  (MATH 4.1)."""
    peak = jax.ops.segment_max(lax.stop_gradient(x), ids, layout.rows, **layout.indexing)
    u = not_below(x) - spread(layout, ids, not_below(peak))[0]
    e = exponential(x, u)
    whole = jnp.round(e)
    minus_small, ones = row_sums(layout, ids, whole - e, whole)  # with e − whole, XLA on CPU adds them up in turn
    return _Shifted(u, e, rest_of(-minus_small, ones), peak)


class Normalized(NamedTuple):
    """log p and p of the elements, L and 1 − max p of the rows."""

    log_p: Array
    p: Array
    log_normalizer: Array
    complement: Array
    """1 − max p with its digits. Its derivative is right in rows with a class of p > ¾, which alone need it."""


@compiled_rule("layout")
def normalize(x: Array, ids: Array, layout: Layout) -> Normalized:
    """l = u − log1p(rest), p = e^u / (1 + rest), L = max x + log1p(rest), 1 − max p = rest / (1 + rest)  (MATH 4.2)."""
    u, e, rest, peak = _shifted(x, ids, layout)
    log_total = jnp.log1p(rest)
    rest_beside, log_total_beside = spread(layout, ids, rest, log_total)
    left_out = -jnp.inf - lax.stop_gradient(log_total_beside)  # NaN in a row that is NaN
    log_p = jnp.where(x > -jnp.inf, u - log_total_beside, left_out)
    L = jnp.where(peak == jnp.inf, peak, peak + log_total)
    return Normalized(log_p, e / (1 + rest_beside), L, rest / (1 + rest))


@normalize.defjvp
def _normalize_jvp(layout: Layout, primals: Any, tangents: Any) -> tuple[Normalized, Normalized]:
    """l̇ = ẋ − Σ p ẋ, ṗ = p (ẋ − Σ p ẋ), L̇ = Σ p ẋ  (MATH 1.2 to 1.4)."""
    (x, ids), (x_dot, _) = primals, tangents
    out = normalize(x, ids, layout)
    difference, mean = _minus_mean(out, ids, x_dot, layout)
    p_dot = out.p * difference
    (of_others,) = row_sums(layout, ids, jnp.where(out.p > SURE, 0, p_dot))
    return out, Normalized(jnp.where(jnp.isneginf(x), 0, difference), p_dot, mean, of_others)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def _minus_mean(out: Normalized, ids: Array, x_dot: Array, layout: Layout) -> tuple[Array, Array]:
    """ẋ − Σ p ẋ, and Σ p ẋ. For a class with p > ¾ the former is (1 − p) ẋ minus Σ p ẋ over the others  (MATH 4.5)."""
    top, p_x_dot = out.p > SURE, out.p * x_dot
    of_others, of_top = row_sums(layout, ids, jnp.where(top, 0, p_x_dot), jnp.where(top, p_x_dot, 0))
    mean = of_others + of_top
    of_others, beside = spread(layout, ids, of_others, mean)
    (complement,) = spread(layout, ids, out.complement)
    return jnp.where(top, complement * x_dot - of_others, x_dot - beside), mean


@compiled_rule("layout")
def centred_log_p(x: Array, ids: Array, layout: Layout) -> tuple[Array, Array]:
    """c = log p + H of the elements, 0 where p is 0; and H of the rows.

    c = u + m and H = log1p(rest) + m, m = Σ p (−u)  (MATH 4.3).
    """
    u, e, rest, _ = _shifted(x, ids, layout)
    (gap,) = row_sums(layout, ids, e * -jnp.maximum(u, -FAR))
    m = gap / (1 + rest)
    return jnp.where(e == 0, 0, u + spread(layout, ids, m)[0]), not_negative(jnp.log1p(rest) + m)


@centred_log_p.defjvp
def _centred_log_p_jvp(layout: Layout, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Ḣ = −Σ p c ẋ, ċ = ẋ − Σ p ẋ + Ḣ  (MATH 1.5)."""
    (x, ids), (x_dot, _) = primals, tangents
    c, H = centred_log_p(x, ids, layout)
    out = normalize(x, ids, layout)
    (total,) = row_sums(layout, ids, out.p * c * x_dot)
    return (c, H), (_minus_mean(out, ids, x_dot, layout)[0] - spread(layout, ids, total)[0], -total)


# --- the public functions ------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """Checked arguments: x = ψ(z) + log w `[N, …]`, −∞ where a class is left out."""

    x: Array
    ids: Array
    """The row of each element; the caller's first row is 1. Elements of no row are in the first row or the last one,
    and sorted ids stay sorted."""
    layout: Layout
    dtype: Any
    has_row: Array
    """bool, broadcastable to x: which elements are in a row of the caller's."""

    def of_elements(self, a: Array, instead: float) -> Array:
        """A result of the elements, as the caller gets it; `instead` for elements of no row."""
        return jnp.where(self.has_row, a, instead).astype(self.dtype)


def check(  # noqa: PLR0917  (as the public functions have them)
    function: str, z: Any, segment_ids: Any, num_segments: Any, is_sorted: Any, phi: Any, where: Any, log_weights: Any
) -> Segments:
    """Checks the arguments of a public function."""
    given = maps.check(function, {"z": z}, None, where, phi, log_weights)
    (scores,) = given.scores
    ids = arguments.as_array(function, "segment_ids", segment_ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"{function}: segment_ids must be integers, the row of each score; got dtype {ids.dtype}. Convert them by "
            "segment_ids.astype(int)."
        )
    if not scores.ndim or ids.shape != scores.shape[:1]:
        raise ValueError(
            f"{function}: segment_ids must have one entry for each score along the first axis, {scores.shape[:1]}; got "
            f"shape {ids.shape}. Scores of several heads are [N, heads]."
        )
    check_not_explicit(function, "z", scores)
    check_not_explicit(function, "segment_ids", ids)
    rows, ids = _row_count(function, ids, num_segments), arguments.wide_integers(ids)
    layout = Layout(rows + 2, arguments.check_flag(function, "indices_are_sorted", is_sorted))
    has_row = ((ids >= 0) & (ids < rows)).reshape(-1, *[1] * (scores.ndim - 1))
    x = maps.weighted_scores(phi, scores, given.where, given.log_weights)
    x = jnp.where(has_row, x, lax.stop_gradient(x))  # elements of no row have derivatives 0, NaN too
    return Segments(x, jnp.where(ids < 0, 0, jnp.minimum(ids, rows) + 1), layout, given.dtype, has_row)


def _row_count(function: str, ids: Array, rows: Any) -> int:
    """The number of rows: the given one, or the largest id plus 1."""
    if rows is None:
        if isinstance(ids, Tracer):
            raise ValueError(
                f"{function}: num_segments must be given where segment_ids are traced; got None. Pass a Python int."
            )
        return int(np.max(np.asarray(ids, np.int64), initial=-1)) + 1
    if not arguments.is_int(rows) or rows < 0:
        raise TypeError(
            f"{function}: num_segments must be an int >= 0, known at trace time, or None; got {rows!r}. Pass a Python "
            "int, static in jit."
        )
    return int(rows)


@public
def segment_softmax(
    z: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    *,
    indices_are_sorted: bool = False,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Probabilities p = w φ(z) / Σ w φ(z) within each segment: the softmax of ragged rows, such as a graph's edges.

    p_k = e^{x_k − L_r},  x = ψ(z) + log w,  r the row of k     (MATH 15.1); as `jsoftmax.softmax` of each row

    Args:
      z: scores `[N, …]`, any floating dtype; integers promote. Each of the further axes, such as heads, has its own
        rows.
      segment_ids: integers `[N]`, the row of each score, in any order; as in `jax.ops.segment_sum` what is outside
        [0, num_segments) is in no row.
      num_segments: how many rows there are, a Python int. None: the largest id plus 1; ids must not be traced then.
      indices_are_sorted: whether the ids do not decrease, which may be faster on GPUs and TPUs. If True is wrong, the
        result is undefined.
      phi, where, log_weights: as in `jsoftmax.softmax`, broadcastable to `z`.
    Returns: the shape and dtype of `z`; computed in float32 at least, with the digits and edges of `jsoftmax.softmax`
      (MATH 4, 5). A score in no row: 0, with derivatives 0.
    Raises: as `jsoftmax.softmax`; TypeError or ValueError for ids that do not fit.
    Source: row by row de Brébisson & Vincent 2016, equation 2.

    >>> segment_softmax(jnp.array([0., 1., 5., 0.]), jnp.array([0, 0, 1, 0]), 2)
    Array([0.21194..., 0.57611..., 1.        , 0.21194...], dtype=float32)
    """
    given = check("segment_softmax", z, segment_ids, num_segments, indices_are_sorted, phi, where, log_weights)
    return given.of_elements(normalize(given.x, given.ids, given.layout).p, 0.0)


@public
def segment_log_softmax(
    z: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    *,
    indices_are_sorted: bool = False,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Log-probabilities within each segment, small ones and ones near 0 alike to the last digits.

    l_k = x_k − L_r,  x = ψ(z) + log w,  r the row of k     (MATH 15.1)

    Args:
      z, segment_ids, num_segments, indices_are_sorted, phi, where, log_weights: as in `segment_softmax`.
    Returns: the shape and dtype of `z`; digits and edges as in `jsoftmax.log_softmax`. A score in no row: −inf.
    Raises: as `segment_softmax`.
    Source: row by row de Brébisson & Vincent 2016, equation 3.

    >>> segment_log_softmax(jnp.array([0., 3., -20.]), jnp.array([0, 1, 0]), 2)
    Array([-2.06115...e-09,  0.00000...e+00, -2.00000...e+01], dtype=float32)
    """
    given = check("segment_log_softmax", z, segment_ids, num_segments, indices_are_sorted, phi, where, log_weights)
    return given.of_elements(normalize(given.x, given.ids, given.layout).log_p, -jnp.inf)


@public
def segment_log_normalizer(
    z: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    *,
    indices_are_sorted: bool = False,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """The log-normaliser L = log Σ w φ(z) of each segment; with phi=exp the log-sum-exp of ragged rows.

    L_r = log Σ_{k in r} e^{x_k},  x = ψ(z) + log w     (MATH 15.1)

    Args:
      z, segment_ids, num_segments, indices_are_sorted, phi, where, log_weights: as in `segment_softmax`.
    Returns: `[num_segments, …]`, float32 at least; edges as in `jsoftmax.log_normalizer`: an empty segment has −inf.
    Raises: as `segment_softmax`.
    Source: as `jsoftmax.log_normalizer`, row by row.

    >>> segment_log_normalizer(jnp.array([0., 1., 0.]), jnp.array([0, 2, 0]), 3).round(3)
    Array([0.693,  -inf, 1.   ], dtype=float32)
    """
    given = check("segment_log_normalizer", z, segment_ids, num_segments, indices_are_sorted, phi, where, log_weights)
    return normalize(given.x, given.ids, given.layout).log_normalizer[1:-1]


@public
def segment_entropy(
    z: ArrayLike,
    segment_ids: ArrayLike,
    num_segments: int | None = None,
    *,
    indices_are_sorted: bool = False,
    phi: Phi = exp,
    where: Bool[ArrayLike, "..."] | None = None,
    log_weights: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """The entropy −Σ p log p of each segment, in nats.

    H_r = −Σ_{k in r} p_k log p_k     (MATH 15.2);   ∂H_r/∂z_k = −p_k (log p_k + H_r) s_k

    Args:
      z, segment_ids, num_segments, indices_are_sorted, phi, where, log_weights: as in `segment_softmax`.
    Returns: `[num_segments, …]`, float32 at least; digits and edges as in `jsoftmax.entropy`: an empty segment, and one
      of a single class, has 0.
    Raises: as `segment_softmax`.
    Source: as `jsoftmax.entropy`, row by row.

    >>> segment_entropy(jnp.array([0., 1., 0.]), jnp.array([0, 2, 0]), 3).round(3)
    Array([0.693, 0.   , 0.   ], dtype=float32)
    """
    given = check("segment_entropy", z, segment_ids, num_segments, indices_are_sorted, phi, where, log_weights)
    return centred_log_p(given.x, given.ids, given.layout)[1][1:-1]
