"""The loss of a factored head, and its step of SGD (MATH 12.2, 12.4)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jsoftmax._precision import precise
from jsoftmax.checks.arguments import check_option, public
from jsoftmax.checks.labels import in_range
from jsoftmax.checks.matrices import check_matrix, check_row_labels, check_width
from jsoftmax.heads.factored._losses import SphericalLoss
from jsoftmax.heads.factored._state import State, check_state, fold_rows


class Step(NamedTuple):
    """What `loss_and_update` returns."""

    loss: Array
    gradient: Array
    state: State


class _Scores(NamedTuple):
    """What a step needs of a batch: hQ, the labels' rows of W, and the three arguments of ℓ for each row."""

    by_gram: Array
    rows: Array
    first: Array
    square: Array
    score: Array


def _scores(state: State, hidden: Array, label: Array) -> _Scores:
    """Σ o = mᵀh, Σ o² = hᵀQh and o_y  (MATH 12.1)."""
    by_gram = precise(hidden, state.gram)
    rows = precise(state.rows[label], state.mix) + state.offset[None]
    first, square = precise(hidden, state.total), jnp.sum(by_gram * hidden, -1)
    return _Scores(by_gram, rows, first, square, jnp.sum(rows * hidden, -1))


@jax.jit
def _loss(state: State, hidden: Array, labels: Array, loss: SphericalLoss) -> Array:
    label, valid = in_range(labels, len(state.rows))
    found = _scores(state, hidden, label)
    values = loss.of(found.first, found.square, found.score, len(state.rows))
    return jnp.where(valid, values, jnp.nan)


@jax.jit
def _step(
    state: State, h: Array, labels: Array, *, eta: Array, decay: Array, limit: Array, loss: SphericalLoss
) -> tuple[Array, Array, State]:
    """W ← ρ W − η ∇, ρ = 1 − η λ, in factored form, with the letters of MATH 12.2."""
    (count, d), classes, dtype = h.shape, len(state.rows), h.dtype
    label, valid = in_range(labels, classes)
    P, W_y, *numbers = _scores(state, h, label)  # P = hQ
    values, pull = jax.vjp(lambda first, square, score: loss.of(first, square, score, classes), *numbers)
    by_first, by_square, by_score = pull(jnp.full(count, 1 / count, dtype))
    mark = jnp.where(valid, 1, jnp.nan).astype(dtype)
    value = jnp.mean(mark * values)
    m, rho = state.total, 1 - eta * decay
    gradient = by_first[:, None] * m[None] + (2 * by_square)[:, None] * P + by_score[:, None] * W_y

    # A = ρ I − η M, M = hᵀ c h: as a product from the right, and its inverse by the smaller of the N × N and d × d
    # forms
    c, g = 2 * by_square, precise(by_first, h)
    if count <= d:

        def by_a(X: Array) -> Array:
            return rho * X - eta * precise(precise(X, h.T) * c[None], h)

        Y, regular = _series(eta / rho * precise(h, h.T) * c[None], precise(h, state.inverse) / rho)
        inverse = (state.inverse + eta * precise(h.T, c[:, None] * Y)) / rho
    else:
        M = precise(h.T, c[:, None] * h)

        def by_a(X: Array) -> Array:
            return rho * X - eta * precise(X, M)

        inverse, regular = _series(eta / rho * M, state.inverse / rho)
        Y = precise(h, inverse)
    U, q, m_A = by_a(state.mix), by_a(state.offset[None])[0] - eta * g, by_a(m[None])[0]

    # Q ← ρ² Q + hᵀK + Kᵀh: of the dense part, and of the labels' rows, where equal labels meet
    r = -eta * by_score
    E = r[:, None] * h
    _, group = jnp.unique(label, return_inverse=True, size=count)
    E_y = jax.ops.segment_sum(E, group, count)[group]
    B = by_a(W_y) - eta * g[None]
    K = (c * eta)[:, None] * (by_a(P) + rho * P) / -2 + by_first[:, None] * (eta**2 * classes / 2 * g - eta * m_A)[None]
    K_y = r[:, None] * (B + E_y / 2)

    fine = jnp.isfinite(value) & jnp.all(jnp.array([jnp.all(jnp.isfinite(a)) for a in (U, q, K, K_y, m_A)]))
    probes = jnp.stack([_power(U, state.probes[0]), _power(inverse, state.probes[1])])
    size = jnp.linalg.norm(probes, axis=-1)
    fold = fine & ~(regular & jnp.all(size <= limit**2))
    rows, gram, total = fold_rows(state.rows, U, q, fold)
    eye = jnp.eye(d, dtype=dtype)
    rows = rows.at[label].add(jnp.where(fine, r[:, None] * jnp.where(fold, h, Y), 0))
    half = precise(h.T, jnp.where(fold, 0, K) + K_y)
    new = State(
        rows,
        jnp.where(fold, eye, U),
        jnp.where(fold, eye, inverse),
        jnp.where(fold, 0, q),
        jnp.where(fold, gram, rho**2 * state.gram) + half + half.T,
        jnp.where(fold, total, m_A - eta * classes * g) + jnp.sum(E, 0),
        jnp.where(((size > 0) & jnp.isfinite(size))[:, None], probes / size[:, None], state.probes),
    )
    # the rows are left out, because a select of them would make a copy
    kept = jax.tree.map(lambda a, b: jnp.where(fine, a, b), new[1:], state[1:])
    return jnp.where(fine, value, jnp.nan), mark[:, None] * gradient, State(rows, *kept)


def _series(R: Array, X: Array) -> tuple[Array, Array]:
    """(I − R)⁻¹ X = Π (I + R^{2^k}) X by at most six factors, and whether these are enough, as they are for |R| ≤ 1/2.

    It takes products only: LAPACK's triangular solves take 4 to 16 ms on CPU, not 0.2, if its threads wait for a core.
    """
    enough = jnp.finfo(R.dtype).eps

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        count, power, _ = carry
        return (count < 6) & (jnp.linalg.norm(power) > enough)

    def multiply(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, power, X = carry
        return count + 1, precise(power, power), X + precise(power, X)

    _, power, X = lax.while_loop(go_on, multiply, (jnp.array(0), R, X))
    return X, jnp.linalg.norm(power) <= enough


def _power(matrix: Array, probe: Array) -> Array:
    """One step of the power method for the largest singular value σ: |XᵀX v| ≤ σ² for a unit vector v."""
    return precise(precise(matrix, probe), matrix)


@public
def loss(state: State, hidden: ArrayLike, labels: ArrayLike, *, loss: SphericalLoss) -> Float[Array, "..."]:
    """The loss of each row, without an update: for held-out data.

    ℓ(mᵀh, hᵀQh, o_y)     (MATH 12.2)

    Args:
      state: of `init` or `loss_and_update`.
      hidden: h `[..., d]`, any floating dtype.
      labels: integers `[...]`, the class y.
      loss: log_loss(φ) or z_loss(…).
    Returns: `[...]`, in the state's dtype, at a cost of d² a row; differentiable in hidden. A label out of range, and
      NaN in hidden: NaN in that row. Digits: as `quadratic_cross_entropy`.
    Raises: ValueError or TypeError for arguments that do not fit.
    Source: Vincent, de Brébisson & Bouthillier 2015, section 3.1.

    >>> from jsoftmax import taylor
    >>> from jsoftmax.heads.factored import init, log_loss
    >>> state = init(jnp.array([[1., 0.], [0., 1.], [1., 1.]]))
    >>> loss(state, jnp.array([2., 1.]), jnp.array(2), loss=log_loss(taylor(2)))
    Array(0.63252..., dtype=float32)
    """
    h, y, batch = _check("loss", state, hidden, labels, loss)
    return _loss(state, h, y, loss).reshape(batch)


@public
def loss_and_update(
    state: State,
    hidden: ArrayLike,
    labels: ArrayLike,
    learning_rate: ArrayLike,
    *,
    loss: SphericalLoss,
    weight_decay: ArrayLike = 0.0,
    fold_beyond: ArrayLike = 2.0,
) -> Step:
    """One step of plain SGD on W, exact, at a cost of d² a row that does not grow with the number V of classes.

    L = mean ℓ(mᵀh, hᵀQh, o_y),   W ← (1 − η λ) W − η ∂L/∂W     (MATH 12.2)

    All V rows change: those that are no label's by one d×d matrix, U, and one vector, q; the labels' rows of V̂ are
    written in place, if the state is donated:

        step = jax.jit(functools.partial(loss_and_update, loss=log_loss(taylor(2))), donate_argnums=0)
        value, by_hidden, state = step(state, hidden, labels, learning_rate)

    Without donation, or with the old state still in use, JAX copies the state at each step. In a scan it is the carry.
    U drifts away from I, which costs digits. Once a singular value of U leaves [1/2, 2], by an estimate that each step
    improves, the step folds: it writes V̂ U + 1 qᵀ to V̂, sets U to I, and sums Q and m anew. A fold works in place and
    costs V d². The more classes there are, the smaller is ηM, and the rarer are folds (MATH 12.4).

    Args:
      state: of `init` or an earlier step.
      hidden: h `[..., d]`, N rows of any floating dtype. Drop the rows that are to be left out of a batch.
      labels: integers `[...]`; one class may have several rows.
      learning_rate: η ≥ 0, a number that may be traced: any schedule.
      loss: log_loss(φ) or z_loss(…).
      weight_decay: λ ≥ 0, may be traced: exactly the decay of SGD on L + λ/2 |W|², at no cost.
      fold_beyond: 2, or another number ≥ 1, may be traced; 1e30 never folds unless a step makes U singular: call
        `refresh` then.
    Returns: a `Step`: the mean loss before the update, in the state's dtype; ∂L/∂hidden in the dtype of hidden, for the
      layers below; the new state. It equals SGD on the dense weight to rounding: within 1e-10 in float64 after 320
      steps; in float32 its drift is that of dense SGD, once or twice over (MATH 12.4). A label out of range, NaN in
      hidden, or a step that would not be finite: the loss is NaN, the state is as it was, and the gradient is NaN in
      the rows of bad labels. It cannot be differentiated in reverse mode.
    Raises: ValueError or TypeError for arguments that do not fit.
    Source: Vincent, de Brébisson & Bouthillier 2015, section 3 (squared error, spherical softmax); de Brébisson &
      Vincent 2016; arXiv:1604.08859 (Z-loss).

    >>> from jsoftmax import taylor
    >>> from jsoftmax.heads.factored import init, log_loss, to_weight
    >>> state = init(jnp.array([[1., 0.], [0., 1.], [1., 1.]]))
    >>> step = loss_and_update(state, jnp.array([[2., 1.]]), jnp.array([2]), 0.1, loss=log_loss(taylor(2)))
    >>> step.loss, to_weight(step.state)[2]
    (Array(0.63252..., dtype=float32), Array([1.0441..., 1.0220...], dtype=float32))
    """
    function = "loss_and_update"
    h, y, batch = _check(function, state, hidden, labels, loss)
    if not len(h):
        raise ValueError(
            f"{function}: hidden must have at least one row; got shape {jnp.shape(hidden)}. Skip an empty batch: its "
            "mean loss is 0/0."
        )
    eta = check_option(function, learning_rate, h.dtype, learning_rate=(0.0, math.inf))
    decay = check_option(function, weight_decay, h.dtype, weight_decay=(0.0, math.inf))
    limit = check_option(function, fold_beyond, h.dtype, fold_beyond=(1.0, math.inf))
    value, gradient, new = _step(state, h, y, eta=eta, decay=decay, limit=limit, loss=loss)
    return Step(value, gradient.reshape(*batch, -1).astype(jnp.asarray(hidden).dtype), new)


def _check(function: str, state: Any, hidden: Any, labels: Any, loss: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """Hidden `[N, d]` in the state's dtype, labels `[N]`, and the shape of the batch."""
    check_state(function, state)
    if not isinstance(loss, SphericalLoss):
        raise TypeError(
            f"{function}: loss must be log_loss(φ) or z_loss(…) of heads.factored; got {loss!r}. Write e.g. "
            "loss=log_loss(jsoftmax.taylor(2))."
        )
    h = check_matrix(function, "hidden", hidden, "[..., d]")
    check_width(function, h, state.rows.shape[1])
    y = check_row_labels(function, labels, h.shape[:-1])
    return h.reshape(-1, h.shape[-1]).astype(state.rows.dtype), y.reshape(-1), y.shape
