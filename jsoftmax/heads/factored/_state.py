"""The state of a factored head: its weight W = V̂ U + 1 qᵀ with its moments (MATH 12.2, 12.4)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jsoftmax._precision import precise
from jsoftmax.checks.arguments import accumulation_dtype, public
from jsoftmax.checks.labels import in_range
from jsoftmax.checks.matrices import check_matrix, check_row_labels
from jsoftmax.heads.quadratic import moments

_BLOCK = 2048


class State(NamedTuple):
    """W = V̂ U + 1 qᵀ with its moments. `init` makes it, and only the functions of `heads.factored` should change
    it."""

    rows: Array
    """V̂ `[V, d]`."""
    mix: Array
    """U `[d, d]`."""
    inverse: Array
    """U⁻¹ `[d, d]`."""
    offset: Array
    """q `[d]`."""
    gram: Array
    """Q = WᵀW `[d, d]`."""
    total: Array
    """m = Wᵀ1 `[d]`."""
    probes: Array
    """Unit vectors `[2, d]` near the largest singular directions of U and U⁻¹."""


def fold_rows(rows: Array, mix: Array, offset: Array, wanted: Array | bool) -> tuple[Array, Array, Array]:
    """V̂ ← V̂ U + 1 qᵀ in place, block by block, and the Q and m of the new V̂. If it is not wanted, nothing is done.

    "Not wanted" is a loop of no turns, which leaves the rows where they are. Each block is read once, by one product,
    before it is written: if it were read again, XLA would copy all rows in each turn.
    """

    def body(i: Array, carry: tuple[Array, Array, Array], first: int, length: int) -> tuple[Array, Array, Array]:
        rows, gram, total = carry
        start = first + i * length
        block = precise(lax.dynamic_slice_in_dim(rows, start, length), mix) + offset[None]
        rows = lax.dynamic_update_slice_in_dim(rows, block, start, 0)
        return rows, gram + precise(block.T, block), total + precise(jnp.ones(length, rows.dtype), block)

    d, tail = rows.shape[1], rows.shape[0] % _BLOCK
    carry = rows, jnp.zeros((d, d), rows.dtype), jnp.zeros(d, rows.dtype)
    for first, length, turns in ((0, _BLOCK, rows.shape[0] // _BLOCK), (rows.shape[0] - tail, tail, 1)):
        if length and turns:
            one = functools.partial(body, first=first, length=length)
            carry = lax.fori_loop(0, jnp.where(wanted, turns, 0), one, carry)
    return carry


def _fresh(rows: Array, gram: Array, total: Array) -> State:
    """V̂ = W, U = I, q = 0."""
    d, dtype = rows.shape[1], rows.dtype
    U, inverse = jnp.eye(d, dtype=dtype), jnp.eye(d, dtype=dtype)  # two buffers, because one cannot be donated twice
    # any vectors that are not orthogonal to the singular vectors will do; random ones from a fixed seed are not
    probes = jax.random.normal(jax.random.key(0), (2, d), dtype)
    probes = probes / jnp.linalg.norm(probes, axis=-1, keepdims=True)
    return State(rows, U, inverse, jnp.zeros(d, dtype), gram, total, probes)


def check_state(function: str, state: Any) -> None:
    """Checks that a state is a `State` whose parts fit together."""
    if not isinstance(state, State):
        raise TypeError(
            f"{function}: state must be a State; got {type(state).__name__}. Make one from a weight [V, d] by "
            "heads.factored.init(weight)."
        )
    d = jnp.shape(state.rows)[-1] if jnp.ndim(state.rows) == 2 else None
    wanted = {"mix": (d, d), "inverse": (d, d), "offset": (d,), "gram": (d, d), "total": (d,), "probes": (2, d)}
    for name, shape in wanted.items():
        if jnp.shape(getattr(state, name)) != shape or d is None:
            raise ValueError(
                f"{function}: state must have rows [V, d] and {name} {list(shape)}; got {jnp.shape(state.rows)} and "
                f"{jnp.shape(getattr(state, name))}. For several states use jax.vmap."
            )


@public
def init(weight: ArrayLike) -> State:
    """The state of a weight W `[V, d]`: a copy of it, with Q = WᵀW and m = Wᵀ1.

    W = V̂ U + 1 qᵀ     (MATH 12.2)

    A bias is one more column of W, and one more entry, 1, of each hidden: it is learned like the others.

    Args:
      weight: W, floating; narrower than float32 is widened, since a small step would be lost in bfloat16.
    Returns: a `State`, a pytree of V d + 3 d² + 4 d numbers. The weight is copied, so that it survives the donation of
      the state.
    Raises: ValueError or TypeError for a weight that is no floating matrix.
    Source: Vincent, de Brébisson & Bouthillier 2015, section 3.

    >>> state = init(jnp.array([[1., 0.], [0., 1.], [1., 1.]]))
    >>> state.gram
    Array([[2., 1.],
           [1., 2.]], dtype=float32)
    """
    array = check_matrix("init", "weight", weight, "[V, d]", 2)
    copy = jnp.array(array, accumulation_dtype(array.dtype), copy=True)
    sums = moments(copy, None, None, copy.dtype)
    return _fresh(copy, sums.gram, sums.total)


@public
def refresh(state: State) -> State:
    """The same weight with V̂ = W, U = I and q = 0, and Q and m summed anew: what `loss_and_update` does by itself.

    V̂ ← V̂ U + 1 qᵀ,   Q ← V̂ᵀV̂,   m ← V̂ᵀ1     (MATH 12.4)

    For times of your own, or to drop the rounding errors of a long run in Q and m. A cost of V d², in place if the
    state is donated.

    Args:
      state: of `init` or `loss_and_update`.
    Returns: a `State`.
    Raises: TypeError if `state` is none.

    >>> refresh(init(jnp.ones((3, 2)))).total
    Array([3., 3.], dtype=float32)
    """
    check_state("refresh", state)
    return _fresh(*fold_rows(state.rows, state.mix, state.offset, True))


@public
def to_weight(state: State) -> Float[Array, "V d"]:
    """The weight W = V̂ U + 1 qᵀ `[V, d]` (MATH 12.2), at a cost of V d².

    Args:
      state: of `init` or `loss_and_update`.
    Returns: `[V, d]`, in the state's dtype: for saving, and for other heads.
    Raises: TypeError if `state` is none.

    >>> to_weight(init(jnp.ones((3, 2)))).shape
    (3, 2)
    """
    check_state("to_weight", state)
    return precise(state.rows, state.mix) + state.offset[None]


@public
def rows(state: State, labels: ArrayLike) -> Float[Array, "... d"]:
    """Rows of the weight, W_y = V̂_y U + q (MATH 12.2), at a cost of d² each: embeddings that are tied to the head.

    Args:
      state: of `init` or `loss_and_update`.
      labels: integers of any shape `[...]`.
    Returns: `[..., d]`, in the state's dtype; NaN for a label out of range.
    Raises: TypeError if `state` is none, or for labels that are no integers.

    >>> rows(init(jnp.array([[1., 0.], [0., 1.]])), jnp.array([1, 2]))
    Array([[ 0.,  1.],
           [nan, nan]], dtype=float32)
    """
    check_state("rows", state)
    label, valid = in_range(check_row_labels("rows", labels, np.shape(labels)), len(state.rows))
    found = precise(state.rows[label], state.mix)
    found = found + lax.broadcast_to_rank(state.offset, found.ndim)
    return jnp.where(valid[..., None], found, jnp.nan)
