"""Tsallis' and Rényi's entropies of x = ψ(z) + log w, each with its derivative rule (MATH 6.6, 6.7)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jsoftmax._series import excess_series, expm1_ratio, log1p_deficit
from jsoftmax.checks.arguments import widened
from jsoftmax.maps import normalize
from jsoftmax.sharding import AxisName
from jsoftmax.sums import class_sum, not_negative, read_again, value_again


def _surprise(log_p: Array, p: Array, alpha: Array) -> Array:
    """b = −p log_α p = (p − p^α)/(α − 1) ≥ 0; −p log p for α = 1, and 0 where a class is left out  (MATH 6.6)."""
    safe = -not_negative(-jnp.where(jnp.isneginf(log_p), 0, log_p))
    far = (alpha - 1) * safe > 1  # a p that underflows still counts for α < 1
    powers = (jnp.exp(alpha * safe) - p) / jnp.where(far, 1 - alpha, 1)
    return jnp.where(far, powers, -p * safe * expm1_ratio(jnp.where(far, 0, (alpha - 1) * safe)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def tsallis(x: Array, alpha: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """S = Σ b, b = −p log_α p: terms that are not negative  (MATH 6.6)."""
    log_p, p, _ = normalize(x, axis, axis_name)
    return class_sum(_surprise(log_p, p, alpha), axis, axis_name)


@functools.partial(tsallis.defjvp, symbolic_zeros=True)
def _tsallis_jvp(axis: tuple[int, ...], axis_name: AxisName, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Ṡ = α Σ (b − p S) ẋ + Σ (∂b/∂α) α̇  (MATH 6.6)."""
    (x, alpha), (x_dot, alpha_dot) = primals, tangents
    out, again = tsallis(x, alpha, axis, axis_name), read_again(x, axis, axis_name)
    S, x = value_again(lambda x: tsallis(x, alpha, axis, axis_name), out, x, again)
    log_p, p, _ = normalize(x, axis, axis_name)
    b = _surprise(log_p, p, alpha)
    S_dot = jnp.zeros_like(S)
    if not isinstance(x_dot, SymbolicZero):
        S_dot = class_sum(alpha * (b - p * S) * widened(x_dot), axis, axis_name)
    if not isinstance(alpha_dot, SymbolicZero):
        S_dot = S_dot + class_sum(jax.jvp(lambda a: _surprise(log_p, p, a), (alpha,), (alpha_dot,))[1], axis, axis_name)
    return out, S_dot


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def renyi(x: Array, alpha: Array, axis: tuple[int, ...], axis_name: AxisName) -> Array:
    """R = log Σ p^α / (1 − α); near α = 1 of Tsallis' S, as log1p((1 − α) S)/(1 − α)  (MATH 6.7)."""
    log_p, _, L = normalize(x, axis, axis_name)
    S = tsallis(x, alpha, axis, axis_name)
    a = (1 - alpha) * S
    near = jnp.abs(a) <= 0.5
    far = normalize(_times(alpha, log_p), axis, axis_name).log_normalizer / jnp.where(near, 1, 1 - alpha)
    return jnp.where(jnp.isneginf(L), 0, jnp.where(near, S * (1 - log1p_deficit(jnp.where(near, a, 0))), far))


def _times(alpha: Array, log_p: Array) -> Array:
    """α log p, which is −inf where a class is left out, also for α = 0."""
    out = jnp.isneginf(log_p)
    return jnp.where(out, -jnp.inf, alpha * jnp.where(out, 0, log_p))


@functools.partial(renyi.defjvp, symbolic_zeros=True)
def _renyi_jvp(axis: tuple[int, ...], axis_name: AxisName, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """Ṙ = α Σ (r − p)/(1 − α) ẋ − D(r‖p)/(1 − α)² α̇, r = p^α / Σ p^α; by series in y = (α − 1) (l + R) = log r/p where
    |y| is small  (MATH 6.7)."""
    (x, alpha), (x_dot, alpha_dot) = primals, tangents
    log_p, p, _ = normalize(x, axis, axis_name)
    r, R = normalize(_times(alpha, log_p), axis, axis_name).p, renyi(x, alpha, axis, axis_name)
    d = jnp.where(jnp.isneginf(log_p), 0, log_p + R)
    y = (alpha - 1) * d
    near = jnp.abs(y) < 0.5
    y_near, gap = jnp.where(near, y, 0), jnp.where(near, 1, 1 - alpha)
    R_dot = jnp.zeros_like(R)
    if not isinstance(x_dot, SymbolicZero):
        R_dot = class_sum(
            alpha * jnp.where(near, -p * d * expm1_ratio(y_near), (r - p) / gap) * widened(x_dot), axis, axis_name
        )
    if not isinstance(alpha_dot, SymbolicZero):
        divergence = jnp.where(near, r * d**2 * excess_series(y_near), (p - r + r * y) / gap**2)
        R_dot = R_dot - class_sum(divergence, axis, axis_name) * alpha_dot
    return R, R_dot
