"""Sparse maps: α-entmax, which gives exact zeros, and its Fenchel–Young loss (MATH 8)."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jsoftmax import maps
from jsoftmax._series import excess_ratio, expm1_ratio, log1p_deficit
from jsoftmax.checks.arguments import Axis, all_known, canonical_axis, is_concrete_number, per_row, public, read
from jsoftmax.checks.labels import Labelled, check_labelled
from jsoftmax.checks.top_targets import reject_top_targets
from jsoftmax.sharding import is_label, reshard_rows
from jsoftmax.sums import difference, has_bad_score, weighted_deviations

# --- p = P [1 + (α − 1) v]_+^{1/(α−1)}, v = P^{1−α} u, u = z − max z, for the largest p, P ----------------------


class _Density(NamedTuple):
    """p and w = P^{α−1} p^{2−α}, 0 outside the support."""

    p: Array
    w: Array


def _density(u: Array, log_P: Array, alpha: Array, power: int) -> _Density:
    if power:
        rho = jnp.exp(log_P / power)
        r = jnp.maximum(rho + u / power, 0)
        return _Density(r**power, rho * (r ** (power - 1) if power > 1 else jnp.sign(r)))
    out = jnp.isneginf(u)
    scale = jnp.exp(jnp.minimum((1 - alpha) * log_P, -math.log(jnp.finfo(u.dtype).tiny)))
    v = jnp.where(out, 0, u) * scale
    a = (alpha - 1) * v
    inside = ~(out | (a <= -1))  # a NaN counts as inside, and so gives NaN
    near = jnp.abs(a) <= 0.5
    a_near, a_far = jnp.where(near, a, 0), jnp.where(near | ~inside, 0, a)
    far = jnp.log1p(a_far) / jnp.where(near, 1, alpha - 1)
    log_ratio = jnp.where(near, v * (1 - log1p_deficit(a_near)), far)
    p = jnp.where(inside, jnp.exp(log_P + jnp.where(inside, log_ratio, 0)), 0)
    return _Density(p, p / jnp.where(inside, 1 + a, 1))


def _step(log_P: Array, u: Array, alpha: Array, power: int) -> tuple[Array, Array]:
    """log P after a Newton step towards F = Σ p = 1; and log F. The step is taken on F^{α−1}, for which it is exact
    where all p are equal  (MATH 8.2)."""
    p, w = _density(u, log_P, alpha, power)
    F, W = (jnp.sum(a, -1, keepdims=True) for a in (p, w))
    log_F = jnp.log(jnp.where(F > 0, F, 1))
    change = F / jnp.where(W > 0, W, 1) * log_F * expm1_ratio((1 - alpha) * log_F)
    change = jnp.clip(change, -1e6, 0.999 / jnp.where(alpha > 1, alpha - 1, 1))  # so ρ stays positive and finite
    return log_P - change * (1 - log1p_deficit((1 - alpha) * change)), log_F


def _largest(u: Array, alpha: Array, power: int) -> Array:
    """log P, for which Σ p = 1  (MATH 8.2).

    A small P, where many classes share the maximum, keeps its digits too. For α ≤ 2 the steps from 0 approach log P
    from one side. For larger α they can miss it, so every other step halves the bracket instead. Two more steps follow,
    from log P as a constant. They give log P its derivatives up to order three where JAX drops the rule (inside scans
    at order 2). For α > 2 they change the derivatives only, because a step could leave the bracket.
    """
    fixed_u, fixed_alpha = lax.stop_gradient((u, alpha))
    eps = float(jnp.finfo(u.dtype).eps)
    equal = -jnp.log(jnp.maximum(jnp.sum(~jnp.isneginf(fixed_u), -1, keepdims=True), 1).astype(u.dtype))
    steep = fixed_alpha > 2

    def go_on(state: Any) -> Array:
        *_, done, count = state
        return ~jnp.all(done) & (count < 128)

    def advance(state: Any) -> Any:
        log_P, low, high, last, done, count = state
        newton, log_F = _step(log_P, fixed_u, fixed_alpha, power)
        low, high = jnp.where(log_F < 0, log_P, low), jnp.where(log_F >= 0, log_P, high)
        halve = steep & ((count % 2 == 1) | ~((low < newton) & (newton < high)))
        new = jnp.where(halve, (low + high) / 2, newton)
        found = steep & ((high - low <= eps * (1 - equal)) | (log_F == 0))
        settled = ~steep & ((jnp.abs(log_F) <= 64 * eps) | (log_F >= last))  # F falls until rounding stops it
        # a row that is done stays as it is, however long others take
        new = jnp.where(done | found, log_P, new)
        return new, low, high, log_F, done | found | settled | jnp.isnan(log_F), count + 1

    zero = jnp.zeros_like(equal)
    start = (zero, equal, zero, zero + jnp.inf, zero != 0, 0)
    log_P = lax.stop_gradient(lax.while_loop(go_on, advance, start)[0])
    for _ in range(2):
        stepped, _ = _step(log_P, u, alpha, power)
        log_P = jnp.where(steep, log_P + (stepped - lax.stop_gradient(stepped)), stepped)
    return log_P


@functools.partial(jax.jit, static_argnames="power")
def _solve(z: Array, alpha: Array, power: int) -> tuple[Array, Array]:
    """p and v = z − max z − t over the last axis. A score of −inf leaves a class out; in an empty row p = 0."""
    peak = jnp.max(lax.stop_gradient(z), -1, keepdims=True, initial=-jnp.inf)
    empty = jnp.isneginf(peak)
    u = jnp.where(empty, 0, difference(z, peak))
    log_P = _largest(u, alpha, power)
    t = -log_P * expm1_ratio((alpha - 1) * log_P)
    p = jnp.where(empty, 0, _density(u, log_P, alpha, power).p)
    if not power:  # for α > 2 the last bit of P can change a small p by much, so p is divided by its sum
        p = jnp.where(alpha > 2, p / jnp.where(empty, 1, jnp.sum(p, -1, keepdims=True)), p)
    v = jnp.where(jnp.isneginf(z), -jnp.inf, u - t)
    return jnp.where(has_bad_score(z, (z.ndim - 1,)), jnp.nan, p), v


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _entmax(z: Array, alpha: Array, power: int) -> Array:
    return _solve(z, alpha, power)[0]


@functools.partial(_entmax.defjvp, symbolic_zeros=True)
def _entmax_jvp(power: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """ṗ = w (ż − Σ w̄ ż) + (g − w̄ Σ g) α̇, w̄ = w / Σ w  (MATH 8.3)."""
    (z, alpha), (z_dot, alpha_dot) = primals, tangents
    p = _entmax(z, alpha, power)
    w = _weight(p, alpha, power)
    total = jnp.sum(w, -1, keepdims=True)
    total = jnp.where(total == 0, 1, total)  # for an empty row
    p_dot = jnp.zeros_like(p)
    if not isinstance(z_dot, SymbolicZero):
        p_dot = weighted_deviations(w, z_dot, (w.ndim - 1,))
    if not isinstance(alpha_dot, SymbolicZero):
        g = _by_alpha(p, alpha)
        p_dot = p_dot + (g - w * (jnp.sum(g, -1, keepdims=True) / total)) * alpha_dot
    return p, p_dot


def _safe(p: Array) -> tuple[Array, Array]:
    """Where p is not 0 (so also where it is NaN); and p, with 1 in place of 0."""
    support = p != 0
    return support, jnp.where(support, p, 1)


def _weight(p: Array, alpha: Array, power: int) -> Array:
    """w = p^{2−α} on the support."""
    if power == 1:
        return jnp.where(jnp.isnan(p), p, (p > 0).astype(p.dtype))
    support, safe = _safe(p)
    return jnp.where(support, jnp.sqrt(safe) if power == 2 else safe ** (2 - alpha), 0)


def _by_alpha(p: Array, alpha: Array) -> Array:
    """g = −p log²p E((α − 1) log p), E(y) = (e^−y − 1 + y)/y²: the derivative of p in α for a fixed t  (MATH 8.3)."""
    support, safe = _safe(p)
    log_p = jnp.log(safe)
    return jnp.where(support, -safe * log_p**2 * excess_ratio((alpha - 1) * log_p), 0)


# --- the Fenchel–Young loss ----------------------------------------------------------------------------------


def _deformed_log(p: Array, alpha: Array) -> Array:
    """log_α p = (p^{α−1} − 1)/(α − 1) on the support, and log p for α = 1  (MATH 8.4)."""
    support, safe = _safe(p)
    log_p = jnp.log(safe)
    return jnp.where(support, log_p * expm1_ratio((alpha - 1) * log_p), 0)


def _power_sum(p: Array, alpha: Array) -> Array:
    """p^α / α, and 0 where p is 0."""
    support, safe = _safe(p)
    return jnp.where(support, safe**alpha, 0) / alpha


def _tail(delta: Array, alpha: Array) -> Array:
    """∫₀¹ s (1 − δ s)^{α−2} ds for |δ| ≤ 1/4, by its series, which does not cancel."""
    terms = jnp.zeros_like(delta)
    for j in range(24 if delta.dtype == jnp.float64 else 12, 0, -1):
        terms = -delta * (alpha - 1 - j) / j * (1 / (j + 2) + terms)
    return 0.5 + terms


def _surplus(q: Array, p: Array, v: Array, delta: Array, alpha: Array) -> Array:
    """q ((q^{α−1} − 1)/(α − 1) − 1 − α v)/α + p^α/α ≥ 0, with δ = q − p. Near δ = 0 it is computed as q^α (δ/q)² ∫
    (MATH 8.4)."""
    positive = q > 0
    q_safe = jnp.where(positive, q, 1)
    ratio = delta / q_safe
    near = positive & (jnp.abs(ratio) <= 0.25) & (p > 0)
    ratio = jnp.where(near, ratio, 0)
    close = q_safe**alpha * ratio**2 * _tail(ratio, alpha)
    far = q_safe * ((_deformed_log(q_safe, alpha) - 1) / alpha - jnp.where(positive & ~near, v, 0))
    return jnp.where(near, close, jnp.where(positive, far, 0) + _power_sum(p, alpha))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _fenchel_young(z: Array, labels: Array, alpha: Array, power: int) -> Array:
    """Ω*(z) + Ω(q) − ⟨z, q⟩ as a sum of terms that are not negative  (MATH 8.4)."""
    p, v = _solve(z, alpha, power)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        others = jnp.where(is_label(z.shape, labels), 0, p)
        p_y, v_y = (jnp.take_along_axis(a, labels, -1) for a in (p, v))
        of_label = _surplus(jnp.ones_like(p_y), p_y, v_y, jnp.sum(others, -1, keepdims=True), alpha)
        return of_label + jnp.sum(_power_sum(others, alpha), -1, keepdims=True)
    return jnp.sum(_surplus(labels, p, v, labels - p, alpha), -1, keepdims=True)


@functools.partial(_fenchel_young.defjvp, symbolic_zeros=True)
def _fenchel_young_jvp(power: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Σ (p − q) ż + Σ (log_α q − v) q̇ + (∂Ω(q) − ∂Ω(p)) α̇, with ∂Ω = ∂Ω/∂α  (MATH 8.4)."""
    (z, labels, alpha), (z_dot, q_dot, alpha_dot) = primals, tangents
    p = _entmax(z, alpha, power)
    by_label = jnp.issubdtype(labels.dtype, jnp.integer)
    at_label = is_label(z.shape, labels) if by_label else None
    q = labels if at_label is None else at_label.astype(p.dtype)
    total = jnp.zeros((*p.shape[:-1], 1), p.dtype)
    if not isinstance(z_dot, SymbolicZero):
        excess = p - q
        if at_label is not None:  # p_y − 1 is computed from the other classes, and so keeps its digits
            excess = jnp.where(at_label, -jnp.sum(jnp.where(at_label, 0, p), -1, keepdims=True), p)
        total = total + jnp.sum(jnp.where(jnp.isneginf(z), 0, excess) * z_dot, -1, keepdims=True)
    if not by_label and not isinstance(q_dot, SymbolicZero):
        at_zero = jnp.where(alpha > 1, -1 / jnp.where(alpha > 1, alpha - 1, 1), 0)
        best = jnp.argmax(z, -1, keepdims=True)
        z_best, p_best = (jnp.take_along_axis(a, best, -1) for a in (z, p))
        v = difference(z, z_best) + _deformed_log(p_best, alpha)
        rate = jnp.where(q == 0, at_zero, _deformed_log(q, alpha)) - v
        total = total + jnp.sum(jnp.where(jnp.isneginf(z), 0, rate) * q_dot, -1, keepdims=True)
    if not isinstance(alpha_dot, SymbolicZero):

        def change(alpha: Array) -> Array:
            omega = q * _deformed_log(q, alpha) - p * _deformed_log(p, alpha)
            return jnp.sum(omega, -1, keepdims=True) / alpha

        total = total + jax.jvp(change, (alpha,), (alpha_dot,))[1]
    return _fenchel_young(z, labels, alpha, power), total


# --- the public functions ------------------------------------------------------------------------------------


def _check_alpha(function: str, alpha: Any, shape: tuple[int, ...], axes: tuple[int, ...], dtype: Any) -> Any:
    """α as an array `[..., 1]` for scores with the classes last; and `power` = 1/(α − 1) if that is 1, 2, 3 or 4 and
    known at trace time, else 0."""
    power = 0
    if not all_known(alpha, lambda a: (a >= 1) & (a < math.inf)):
        raise ValueError(
            f"{function}: alpha must be >= 1 and finite; got {alpha}. 1 gives the softmax; 1.5 and 2 are usual."
        )
    if is_concrete_number(alpha):
        power = next((k for k in (1, 2, 3, 4) if alpha == 1 + 1 / k), 0)
    array = per_row(function, "alpha", alpha, shape, axes=axes, dtype=dtype)
    batch = [length for i, length in enumerate(shape) if i not in axes]
    return jnp.moveaxis(array, axes, range(-len(axes), 0)).reshape(*batch, 1), power


def _map(  # noqa: PLR0917  (as the public functions have them)
    function: str, z: Any, alpha: Any, axis: Any, where: Any, sink: Any
) -> Array:
    arguments = maps.check(function, {"z": z}, axis, where, maps.exp, None)
    (scores,), axes, mask = arguments.scores, arguments.axis, arguments.where
    alpha, power = _check_alpha(function, alpha, scores.shape, axes, scores.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    moved = jnp.moveaxis(scores, axes, range(-len(axes), 0))
    flat = moved.reshape(*alpha.shape[:-1], math.prod(moved.shape[moved.ndim - len(axes) :]))
    classes = (flat.ndim - 1,)
    alpha = reshard_rows(alpha, flat, classes)
    if sink is not None:  # one more class, which is dropped
        last = per_row(function, "sink", sink, scores.shape, axes=axes, dtype=scores.dtype)
        last = jnp.moveaxis(last, axes, range(-len(axes), 0)).reshape(alpha.shape)
        flat = jnp.concatenate([flat, reshard_rows(last, flat, classes)], -1)
    p = _entmax(flat, alpha, power)
    p = (p if sink is None else p[..., :-1]).reshape(moved.shape)
    return jnp.moveaxis(p, range(-len(axes), 0), axes).astype(arguments.dtype)


@public
def sparsemax(
    z: ArrayLike, axis: Axis = -1, where: Bool[ArrayLike, "..."] | None = None, *, sink: ArrayLike | None = None
) -> Float[Array, "..."]:
    """Sparsemax: the point of the probability simplex that is nearest to the scores; most classes get exactly 0.

    p = [z − τ]_+ with Σ p = 1;   ∂p/∂z = diag(w) − w wᵀ/Σ w,  w = 1 where p > 0     (MATH 8.1, 8.3; α = 2)

    Args:
      z: scores `[..., K]`, any floating dtype; integers promote.
      axis: int, tuple or None (all): the classes' axis.
      where: bool, broadcastable to `z`; False leaves a class out.
      sink: the score of one more class, which takes its share and is dropped, as in `sink_softmax`: a number, or an
        array with one for each row, of length 1 along the classes; differentiable. None: there is none.
    Returns: the shape and dtype of `z`, computed in float32 at least. A class left out, or with a score of −inf, has
      p = 0 and derivatives 0; so have all classes of an empty row. A score of +inf or NaN makes its row NaN. Second
      derivatives are 0, as they are wherever they exist.
    Raises: TypeError or ValueError for an `axis` out of range, a mask that is not boolean or does not broadcast.
    Source: Martins & Astudillo 2016, equation 2.

    >>> sparsemax(jnp.array([-2., 0., 0.5]))
    Array([0.  , 0.25, 0.75], dtype=float32)
    """
    return _map("sparsemax", z, 2, axis, where, sink)


@public
def entmax15(
    z: ArrayLike, axis: Axis = -1, where: Bool[ArrayLike, "..."] | None = None, *, sink: ArrayLike | None = None
) -> Float[Array, "..."]:
    """1.5-entmax, between softmax and sparsemax: exact zeros, and smooth where there are none.

    p = [z/2 − τ]_+² with Σ p = 1;   ∂p/∂z = diag(w) − w wᵀ/Σ w,  w = √p     (MATH 8.1, 8.3; α = 1.5)

    Args:
      z, axis, where, sink: as in `sparsemax`.
    Returns: as `sparsemax`; second derivatives are right, beside zeros too.
    Raises: as `sparsemax`.
    Source: Peters, Niculae & Martins 2019, section 4.

    >>> entmax15(jnp.array([-2., 0., 0.5]))
    Array([0.        , 0.32600..., 0.67399...], dtype=float32)
    """
    return _map("entmax15", z, 1.5, axis, where, sink)


@public
def entmax(
    z: ArrayLike,
    alpha: ArrayLike,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    sink: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """α-entmax: softmax for α = 1, `entmax15`, `sparsemax` for α = 2, and all between and beyond.

    p = [(α − 1) z − τ]_+^{1/(α−1)} with Σ p = 1;   ∂p/∂z = diag(w) − w wᵀ/Σ w,  w = p^{2−α}     (MATH 8.1)
    ∂p/∂α = g − w Σ g/Σ w,  g = (p − w − (α − 1) p log p)/(α − 1)²     (MATH 8.3)

    Args:
      z, axis, where, sink: as in `sparsemax`.
      alpha: α ≥ 1, a number, or an array with one for each row, of length 1 along the classes. May be traced and
        learned: differentiable, through α = 1 too. A traced α < 1 gives NaN or nonsense: learn 1 + jnp.exp(a).
    Returns: as `sparsemax`. p^{α−1} is right to a few units in the last place of 1, so for α > 2 a p near 0 is as
      uncertain as (rounding)^{1/(α−1)}: in float32 below 3e-4 for α = 3, below 0.04 for α = 6.
    Raises: as `sparsemax`, and ValueError if α is a number below 1, or of a shape that does not fit.
    Source: Peters, Niculae & Martins 2019, equation 10; ∂p/∂α: Correia, Niculae & Martins 2019, proposition 1.

    >>> entmax(jnp.array([-1., 0., 0.5]), 1.33)
    Array([0.04598..., 0.32763..., 0.62638...], dtype=float32)
    """
    return _map("entmax", z, alpha, axis, where, sink)


@public
def fenchel_young_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike = 1.5,
    axis: Axis = -1,
    where: Bool[ArrayLike, "..."] | None = None,
    *,
    ignore_label: int | None = None,
) -> Float[Array, "..."]:
    """The loss that belongs to α-entmax: cross-entropy for α = 1, the sparsemax loss for α = 2. Not reduced.

    loss = Ω*(z) + Ω(q) − ⟨z, q⟩,   Ω(p) = Σ (p^α − p)/(α (α − 1));   ∂loss/∂z = p − q,  p = entmax(z, α)    (MATH 8.4)

    Not negative, and 0 exactly where p = q. It has a margin: 0 once the label's score is 1/(α − 1) above all others.
    For α > 1 a loss near 0 has the digits of the small p, which come from differences of numbers near 1.

    Args:
      logits: scores `[..., K]`, any floating dtype.
      labels: integers `[...]`, or distributions q `[..., K]` with the sum 1, which are differentiable, too.
      alpha: α ≥ 1, as in `entmax`.
      axis, where, ignore_label: as in `jsoftmax.losses.cross_entropy`.
    Returns: `[...]`, in the logits' dtype, but float32 for narrower ones. Labels out of range or left out, and bad
      scores, as in `jsoftmax.losses.cross_entropy`.
    Raises: as `jsoftmax.losses.cross_entropy` and `entmax`.
    Source: Blondel, Martins & Niculae 2020, definition 2.

    >>> fenchel_young_loss(jnp.array([[-2., 0., 0.5], [3., 0., 0.]]), jnp.array([2, 0]))
    Array([0.18437..., 0.        ], dtype=float32)
    """
    function = "fenchel_young_loss"
    reject_top_targets(function, "labels", labels)
    given = check_labelled(function, logits, labels, axis, where, ignore_label=ignore_label)
    shape = jnp.shape(logits)
    axes = canonical_axis(function, axis, len(shape))
    alpha, power = _check_alpha(function, alpha, shape, axes, given.dtype)
    return _loss(given, alpha, power)


@functools.partial(jax.jit, static_argnames="power")
def _loss(given: Labelled, alpha: Array, power: int) -> Array:
    z, (label, valid) = read(given.scores()), given.label()
    alpha = reshard_rows(alpha, z, (z.ndim - 1,))
    if given.where is not None:
        z = jnp.where(given.where, z, -jnp.inf)
    if not given.by_label:
        q = given.targets()
        impossible = jnp.any((q > 0) & jnp.isneginf(z), -1, keepdims=True)
        loss = _fenchel_young(z, jnp.where(jnp.isneginf(z), 0, q), alpha, power)
        return given.finish(loss + jnp.where(impossible, jnp.inf, 0).astype(z.dtype), valid)
    loss = _fenchel_young(z, label, alpha, power)
    if given.where is not None:
        loss = jnp.where(given.keeps(label), loss, 0)
    return given.finish(loss, valid)
