"""Every function beside its plain definition: the lists that the oracle, the tests and the guides iterate over."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jsoftmax import (
    derivatives,
    entropy,
    entropy_expansion,
    jensen_shannon_divergence,
    kl_divergence,
    log_normalizer,
    log_softmax,
    losses,
    mixture_log_softmax,
    renyi_entropy,
    sink_softmax,
    softmax,
    sparse,
    tsallis_entropy,
    varentropy,
)
from jsoftmax.phi import Phi

# --- functions of scores -------------------------------------------------------------------------------------


def _log(w: Any, xp: Any) -> Any:
    """log w, and 0 where w is 0, so that 0 · log 0 = 0."""
    return xp.log(xp.where(w > 0, w, 1))


def plain_softmax(phi: Phi, xp: Any, z: Any) -> Any:
    """φ(z) / Σ φ(z)."""
    w = phi.definition(z, xp)
    return w / xp.sum(w)


def plain_log_softmax(phi: Phi, xp: Any, z: Any) -> Any:
    """log p."""
    return _log(plain_softmax(phi, xp, z), xp)


def plain_entropy(phi: Phi, xp: Any, z: Any) -> Any:
    """−Σ p log p."""
    p = plain_softmax(phi, xp, z)
    return -xp.sum(p * _log(p, xp))


def plain_log_normalizer(phi: Phi, xp: Any, z: Any) -> Any:
    """log Σ φ(z)."""
    return xp.log(xp.sum(phi.definition(z, xp)))


def plain_varentropy(phi: Phi, xp: Any, z: Any) -> Any:
    """Σ p (log p + H)²."""
    p = plain_softmax(phi, xp, z)
    return xp.sum(p * (_log(p, xp) + plain_entropy(phi, xp, z)) ** 2)


def plain_tsallis(phi: Phi, xp: Any, z: Any) -> Any:
    """(1 − Σ p^α)/(α − 1) for α = 3/2."""
    return 2 * (1 - xp.sum(plain_softmax(phi, xp, z) ** 1.5))


def plain_renyi(phi: Phi, xp: Any, z: Any) -> Any:
    """log Σ p^α / (1 − α) for α = 3/2."""
    return -2 * xp.log(xp.sum(plain_softmax(phi, xp, z) ** 1.5))


def plain_kl(phi: Phi, xp: Any, z_p: Any, z_q: Any) -> Any:
    """Σ p (log p − log q)."""
    p, q = plain_softmax(phi, xp, z_p), plain_softmax(phi, xp, z_q)
    return xp.sum(p * (_log(p, xp) - _log(q, xp)))


def plain_jensen_shannon(phi: Phi, xp: Any, z_p: Any, z_q: Any) -> Any:
    """β Σ p (log p − log m) + (1 − β) Σ q (log q − log m), m = β p + (1 − β) q, for β = ¼."""
    p, q = plain_softmax(phi, xp, z_p), plain_softmax(phi, xp, z_q)
    log_m = _log((p + 3 * q) / 4, xp)
    return xp.sum(p * (_log(p, xp) - log_m) + 3 * q * (_log(q, xp) - log_m)) / 4


def plain_expansion(phi: Phi, xp: Any, z: Any, dz: Any) -> Any:
    """h(0) + h'(0) + h''(0)/2 for h(τ) = H(z + τ Δ)."""

    return xp.expansion(lambda t: plain_entropy(phi, xp, z + t * dz))


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A function of scores beside its plain definition, with what the comparison allows.

    Each tolerance bounds the error of the worst entry divided by the largest entry; there is one for each order of
    derivative.
    """

    name: str
    function: Callable[..., Any]
    """function(*scores, *arguments, phi=φ)."""
    plain: Callable[..., Any]
    """plain(φ, namespace, *scores)."""
    scores: int = 1
    arguments: tuple[Any, ...] = ()
    """Further arguments of the function, which follow the scores."""
    empty: float = 0.0
    """The value for a row with no class left."""
    orders: int = 4
    """How many orders are compared: 1 for a function that is itself a derivative, else 3 or 4, up to the third
    derivative."""
    third_by_autodiff: bool = True
    keeps: int | None = None
    """How many arrays of the scores' size it keeps for its backward pass. None: as many as it has arrays of scores."""
    keeps_of_many: int | None = None
    """How many it keeps if there are many scores. None: as many as for few."""
    tolerance64: tuple[float, ...] = (1e-14, 1e-13, 1e-12, 1e-11)
    tolerance32: tuple[float, ...] = (2e-6, 1e-5, 1e-4, 1e-3)

    def __str__(self) -> str:
        return self.name

    def with_rows(self, *rows: int) -> "Function":
        """The same for scores `[*rows, K]`: each row has the labels that a single one has here."""
        given = (jnp.broadcast_to(a, (*rows, *a.shape)) if isinstance(a, jax.Array) else a for a in self.arguments)
        return dataclasses.replace(self, arguments=tuple(given))

    def ours(self, *scores: Any, **options: Any) -> Any:
        """The function at these scores."""
        return self.function(*scores, *self.arguments, **options)


FUNCTIONS = (
    Function("entropy", entropy, plain_entropy),
    Function("varentropy", varentropy, plain_varentropy),
    Function("tsallis_entropy", tsallis_entropy, plain_tsallis, arguments=(1.5,)),
    Function("renyi_entropy", renyi_entropy, plain_renyi, arguments=(1.5,), orders=3),
    Function("kl_divergence", kl_divergence, plain_kl, scores=2),
    Function(
        "jensen_shannon_divergence",
        functools.partial(jensen_shannon_divergence, beta=0.25),
        plain_jensen_shannon,
        scores=2,
    ),
    Function(
        "entropy_expansion",
        entropy_expansion,
        plain_expansion,
        scores=2,
        third_by_autodiff=False,
        tolerance32=(2e-5, 1e-5, 1e-4, 1e-3),
    ),
    Function("softmax", softmax, plain_softmax, keeps_of_many=2),
    Function("log_softmax", log_softmax, plain_log_softmax, empty=-math.inf, keeps_of_many=2),
    Function("log_normalizer", log_normalizer, plain_log_normalizer, empty=-math.inf),
)
"""The one list of functions: tests, `verify` and the guides' tables iterate over it."""


def _dense(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *z, **keywords: f(*z, **keywords).as_matrix()


def _derivative(name: str, ours: Callable[..., Any], plain: Callable[..., Any], scores: int = 1) -> Function:
    return Function(name, ours, plain, scores, orders=1, tolerance64=(1e-12,), tolerance32=(1e-4,))


def _jacobian_of(f: Callable[..., Any]) -> Callable[..., Any]:
    """The plain Jacobian."""
    return lambda phi, xp, z: xp.jacobian(lambda z: f(phi, xp, z))(z)


def _hessian_of(f: Callable[..., Any]) -> Callable[..., Any]:
    """The plain Hessian with respect to the first array."""
    return lambda phi, xp, z, *others: xp.hessian(lambda z: f(phi, xp, z, *others))(z)


def plain_cross_entropy(phi: Phi, xp: Any, z: Any, q: Any) -> Any:
    """−Σ q log p."""
    return -xp.sum(q * plain_log_softmax(phi, xp, z))


def plain_fisher(phi: Phi, xp: Any, z: Any) -> Any:
    """Σ_y p_y ∇l_y ∇l_yᵀ."""
    gradients = _jacobian_of(plain_log_softmax)(phi, xp, z)
    return (gradients.T * plain_softmax(phi, xp, z)) @ gradients


def plain_product(phi: Phi, xp: Any, z: Any, v: Any, w: Any) -> Any:
    """Σ_jk ∂²p_i/∂z_j∂z_k v_j w_k."""
    return xp.sum(_hessian_of(plain_softmax)(phi, xp, z) * (v[:, None] * w), (1, 2))


DERIVATIVES = (
    _derivative("softmax_jacobian", _dense(derivatives.softmax_jacobian), _jacobian_of(plain_softmax)),
    _derivative(
        "log_normalizer_hessian", _dense(derivatives.log_normalizer_hessian), _hessian_of(plain_log_normalizer)
    ),
    _derivative("fisher_information", _dense(derivatives.fisher_information), plain_fisher),
    _derivative("entropy_gradient", derivatives.entropy_gradient, _jacobian_of(plain_entropy)),
    _derivative("entropy_hessian", _dense(derivatives.entropy_hessian), _hessian_of(plain_entropy)),
    _derivative(
        "cross_entropy_hessian", _dense(derivatives.cross_entropy_hessian), _hessian_of(plain_cross_entropy), scores=2
    ),
    _derivative("softmax_second_derivative", derivatives.softmax_second_derivative, _hessian_of(plain_softmax)),
    _derivative(
        "softmax_second_derivative_product", derivatives.softmax_second_derivative_product, plain_product, scores=3
    ),
)
"""The one list of closed-form derivatives, as dense arrays. They are compared with derivatives of plain functions."""


# --- losses --------------------------------------------------------------------------------------------------

_LABEL, _ORDER = jnp.array(1), jnp.array([2, 0])
_OPTIONS = {"margin": 0.0625, "label_smoothing": 0.25, "z_loss": 0.125}


def plain_label_loss(phi: Phi, xp: Any, z: Any) -> Any:
    """(1 − a) (−l_y) − a/K Σ l + z_loss · L², l = log p of φ(z − m 1_y)."""
    lowered = z - _OPTIONS["margin"] * xp.where(xp.arange(len(z)) == 1, 1, 0)
    log_p, a = plain_log_softmax(phi, xp, lowered), _OPTIONS["label_smoothing"]
    penalty = _OPTIONS["z_loss"] * plain_log_normalizer(phi, xp, lowered) ** 2
    return -(1 - a) * log_p[1] - a * xp.sum(log_p) / len(z) + penalty


def plain_log_prob(phi: Phi, xp: Any, z: Any) -> Any:
    """log p_1."""
    return plain_log_softmax(phi, xp, z)[1]


def plain_focal(phi: Phi, xp: Any, z: Any) -> Any:
    """−(1 − p_y)² log p_y."""
    return -((1 - plain_softmax(phi, xp, z)[1]) ** 2) * plain_log_softmax(phi, xp, z)[1]


def plain_poly(phi: Phi, xp: Any, z: Any) -> Any:
    """−log p_y + 2 (1 − p_y)."""
    return 2 * (1 - plain_softmax(phi, xp, z)[1]) - plain_log_softmax(phi, xp, z)[1]


def plain_to_target(phi: Phi, xp: Any, z: Any, targets: Any) -> Any:
    """Σ q (log q − log p) for q = e^targets."""
    return xp.sum(xp.exp(targets) * (targets - plain_log_softmax(phi, xp, z)))


def plain_ranking(phi: Phi, xp: Any, z: Any) -> Any:
    """log of p_2 · p_0/(1 − p_2)."""
    p = plain_softmax(phi, xp, z)
    return xp.log(p[2] * p[0] / (xp.sum(p) - p[2]))


def _loss(name: str, function: Callable[..., Any], plain: Callable[..., Any], **more: Any) -> Function:
    return Function(name, function, plain, orders=3, **more)


def _to_target(z: Any, targets: Any, **options: Any) -> Any:
    return losses.kl_to_target(z, jnp.exp(targets), **options)


LOSSES = (
    _loss(
        "cross_entropy",
        functools.partial(losses.cross_entropy, **_OPTIONS),
        plain_label_loss,
        arguments=(_LABEL,),
        keeps_of_many=2,
    ),
    _loss("log_prob", losses.log_prob, plain_log_prob, arguments=(_LABEL,), keeps_of_many=2, empty=-math.inf),
    _loss("focal_cross_entropy", losses.focal_cross_entropy, plain_focal, arguments=(_LABEL,), keeps_of_many=2),
    _loss("poly_cross_entropy", losses.poly_cross_entropy, plain_poly, arguments=(_LABEL,), keeps_of_many=2),
    _loss("kl_to_target", _to_target, plain_to_target, scores=2, keeps=3),
    _loss("plackett_luce_log_prob", losses.plackett_luce_log_prob, plain_ranking, arguments=(_ORDER,), keeps=2),
)
"""The one list of losses that take a φ."""

EVERY = FUNCTIONS + DERIVATIVES + LOSSES


# --- maps and losses without φ -------------------------------------------------------------------------------


def plain_entmax(alpha: float, xp: Any, z: Any) -> Any:
    """[(α − 1) z − τ]_+^{1/(α−1)}. τ starts too small; Newton's steps make the norm of [(α − 1) z − τ]_+ equal to 1."""
    power = 1 / (alpha - 1)
    tau = (alpha - 1) * functools.reduce(xp.maximum, list(z)) - 1

    def parts(tau: Any) -> tuple[Any, Any]:
        r = (alpha - 1) * z - tau
        return r > 0, xp.where(r > 0, r, 1)

    for _ in range(xp.newton_steps):
        inside, r = parts(tau)
        F, W = (xp.sum(xp.where(inside, r**k, 0)) for k in (power, power - 1))
        tau = tau + (F - F ** (1 - 1 / power)) / W
    inside, r = parts(tau)
    return xp.where(inside, r**power, 0)


def plain_entmax_with_sink(alpha: float, xp: Any, z: Any) -> Any:
    """That of the scores and ½, whose p is dropped."""
    return plain_entmax(alpha, xp, xp.concatenate([z, 0.5 + 0 * z[:1]]))[:-1]


def plain_fenchel_young(alpha: float, xp: Any, z: Any) -> Any:
    """⟨p, z⟩ − Ω(p) − z_y, Ω(p) = Σ (p^α − p)/(α (α − 1)); Ω of a label is 0."""
    p = plain_entmax(alpha, xp, z)
    omega = xp.sum(xp.where(p > 0, xp.where(p > 0, p, 1) ** alpha - p, 0)) / (alpha * (alpha - 1))
    return xp.sum(p * z) - omega - z[1]


def plain_sink(xp: Any, z: Any) -> Any:
    """e^z / (e^½ + Σ e^z)."""
    return xp.exp(z) / (xp.exp(0.5 + 0 * z) + xp.sum(xp.exp(z)))


def plain_z_loss(xp: Any, z: Any) -> Any:
    """log(1 + e^{−t_y})."""
    centred = z - xp.sum(z) / len(z)
    return xp.log1p(xp.exp(-centred / (xp.sum(centred**2) / len(z)) ** 0.5))[1]


def plain_mixture(xp: Any, z: Any) -> Any:
    """log (¼ p + ¾ q), where p is the softmax of z, and q that of z reversed and doubled."""
    p, q = xp.exp(z), xp.exp(2 * z[::-1])
    return xp.log(p / xp.sum(p) / 4 + 3 * q / xp.sum(q) / 4)


def _mixture(z: Any) -> Any:
    return mixture_log_softmax(jnp.stack([z, 2 * z[..., ::-1]], -2), jnp.log(jnp.array([1.0, 3.0])).astype(z.dtype))


def _without_phi(
    name: str, function: Callable[..., Any], plain: Callable[..., Any], *arguments: Any, **more: Any
) -> Function:
    def of_scores(*given: Any, phi: Phi) -> Any:
        return function(*given)

    return Function(name, of_scores, lambda phi, xp, z: plain(xp, z), arguments=arguments, orders=3, **more)


def _entmax(alpha: float) -> Function:
    return _without_phi(f"entmax(alpha={alpha:g})", sparse.entmax, functools.partial(plain_entmax, alpha), alpha)


SPARSE_MAPS = (
    _without_phi("sparsemax", sparse.sparsemax, functools.partial(plain_entmax, 2.0)),
    _without_phi("entmax15", sparse.entmax15, functools.partial(plain_entmax, 1.5)),
    _entmax(1.25),
    _entmax(1.7),
    _without_phi(
        "entmax15 with a sink",
        functools.partial(sparse.entmax15, sink=0.5),
        functools.partial(plain_entmax_with_sink, 1.5),
    ),
    _without_phi(
        "fenchel_young_loss", sparse.fenchel_young_loss, functools.partial(plain_fenchel_young, 1.5), _LABEL, 1.5
    ),
)
"""The maps that reach exact zeros, and their loss."""

OTHERS = (
    _without_phi("spherical_z_loss", losses.spherical_z_loss, plain_z_loss, _LABEL, keeps=5),
    _without_phi("mixture_log_softmax", _mixture, plain_mixture, keeps=4, keeps_of_many=6),
    _without_phi("sink_softmax", sink_softmax, plain_sink, 0.5, keeps_of_many=2),
)
"""The other functions that take no φ, or are tested for one φ only."""
