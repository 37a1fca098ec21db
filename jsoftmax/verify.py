"""The oracle: it compares closed forms, in float64 and float32, with plain definitions in many digits and by autodiff.

It covers every function of scores × every φ × every order of derivative, from the two lists `FUNCTIONS` and `PHIS`.
`python -m jsoftmax verify` prints the results, and the tests use them. A plain definition is written once, for two
namespaces: mpmath with many digits, differentiated by central differences, and `jax.numpy` in float64, differentiated
by JAX.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jsoftmax import entropy, maps, softmax
from jsoftmax._definitions import (
    DERIVATIVES,
    EVERY,
    FUNCTIONS,
    LOSSES,
    OTHERS,
    SPARSE_MAPS,
    Function,
    plain_cross_entropy,
    plain_entropy,
    plain_kl,
    plain_log_normalizer,
    plain_log_softmax,
    plain_softmax,
)
from jsoftmax._namespaces import ManyDigits, Plain
from jsoftmax.phi import PHIS, Phi

__all__ = [
    "DERIVATIVES",
    "ERRATA",
    "EVERY",
    "FUNCTIONS",
    "GROUPS",
    "LOSSES",
    "OTHERS",
    "PAIRS",
    "PHIS",
    "SPARSE_MAPS",
    "SURE",
    "Cell",
    "Function",
    "ManyDigits",
    "Plain",
    "Sure",
    "against_autodiff",
    "against_digits",
    "cell",
    "cells_of",
    "checks",
    "error",
    "jit_formulas",
    "plain_cross_entropy",
    "plain_entropy",
    "plain_kl",
    "plain_log_normalizer",
    "plain_log_softmax",
    "plain_softmax",
    "rounded",
    "scores",
    "sure_gradient",
    "tolerances",
    "up_to",
    "wide_dtype",
]

ORDERS = ("f", "f′", "f″", "f‴")
CLASSES = 4


# --- the two comparisons -------------------------------------------------------------------------------------


def scores(function: Function, phi: Phi, seed: int = 0) -> np.ndarray:
    """Float32 scores `[function.scores, classes]` from N(0, 2²), reflected into φ's domain."""
    z = np.random.default_rng(seed).normal(0, 2, (function.scores, CLASSES)).astype(np.float32)
    low, high = phi.domain
    z = np.where(z < low + 0.1, 2 * (low + 0.1) - z, z)
    return np.where(z > high - 0.1, 2 * (high - 0.1) - z, z).astype(np.float32)


def rounded(phi: Phi) -> Phi:
    """φ with parameters that float32 can represent, so that every namespace means the same φ."""
    return jax.tree.map(lambda leaf: float(np.float32(leaf)), phi)


def error(ours: Any, reference: Any) -> float:
    """The worst error divided by the largest entry, unless all entries are 0; infinite if it is not finite."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    scale = np.max(np.abs(reference)) or 1.0
    worst = float(np.max(np.abs(ours - reference)) / scale)
    return worst if math.isfinite(worst) else math.inf


def wide_dtype() -> Any:
    """float64, or float32 if the backend has no float64."""
    try:
        with jax.enable_x64(True):
            return jnp.ones((), jnp.float64).dtype if float(jnp.float64(1) + 2**-40) > 1 else jnp.float32
    except Exception:  # a backend may refuse in ways of its own
        return np.dtype(np.float32)


def jit_formulas(f: Callable[..., Any]) -> Callable[..., Any]:
    """jit where formulas are compared, not the code that XLA makes of them. Without its optimisations for
    CPU, XLA compiles two to three times as fast."""
    return jax.jit(f, compiler_options=_plain_compilation() if jax.default_backend() == "cpu" else None)


@functools.cache
def _plain_compilation() -> dict[str, bool | int]:
    """The options with which XLA compiles fastest for CPU. From jax 0.12 on the last one does not exist."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_parallel_codegen_split_count": 1,  # one part is compiled faster than several, and to the same numbers
        "xla_cpu_use_fusion_emitters": False,
    }
    try:
        jax.jit(jnp.negative, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        options.popitem()
    return options


def _orders(f: Callable[[Any], Any], count: int, z: Any, v: Any) -> list[Any]:
    """The first `count` of: value, Jacobian, and the Jacobian's first and second derivatives along v; by autodiff."""

    def along(g: Callable[[Any], Any], z: Any) -> Any:
        return jax.jvp(g, (z,), (v,))

    if count < 3:
        return [g(z) for g in (f, jax.jacrev(f))[:count]]
    if count == 3:
        return [f(z), *along(jax.jacrev(f), z)]
    (jacobian, second), (_, third) = along(lambda z: along(jax.jacrev(f), z), z)
    return [f(z), jacobian, second, third]


def against_digits(
    function: Function, phis: Sequence[Phi], dtype: Any, jit: Callable[..., Any] = jit_formulas
) -> list[list[float]]:
    """Errors in this dtype, by φ and by order, against the plain definition in many digits.

    Value and Jacobian are compared in full; the second and third order are derivatives of the Jacobian along one
    direction. All φ are in one program, which compiles in half the time of one program for each.
    """
    phis = [rounded(phi) for phi in phis]

    def of_every_phi(given: Any) -> list[Any]:
        pairs = zip(phis, given, strict=True)
        return [_orders(lambda z, phi=phi: function.ours(*z, phi=phi), function.orders, *zv) for phi, zv in pairs]

    with jax.enable_x64(dtype == np.float64):
        given = [tuple(jnp.asarray(scores(function, phi, seed), dtype) for seed in (0, 1)) for phi in phis]
        found = jit(of_every_phi)(given)
    wanted = [_many_digits(function, phi) for phi in phis]
    return [[error(*pair) for pair in zip(*of_phi, strict=True)] for of_phi in zip(found, wanted, strict=True)]


def against_autodiff(function: Function, phi: Phi, jit: Callable[..., Any] = jit_formulas) -> list[float]:
    """Errors, by order, of the closed forms against autodiff of the plain definition, in float64.

    Value, Jacobian and Hessian are compared in full; the third order is taken along one direction. For a second-order
    expansion the third order would be autodiff of order five, which takes too long: there only the many digits check
    it.
    """
    phi, dtype = rounded(phi), wide_dtype()

    def ours(z: Any) -> Any:
        return function.ours(*z, phi=phi)

    def plain(z: Any) -> Any:
        return function.plain(phi, Plain, *z)

    third = function.third_by_autodiff and function.orders == 4

    def orders(f: Callable[[Any], Any], z: Any, v: Any) -> list[Any]:
        if not third:
            return [g(z) for g in (f, jax.jacrev(f), jax.hessian(f))[: function.orders]]
        value, jacobian, _, along = _orders(f, 4, z, v)
        return [value, jacobian, jax.hessian(f)(z), along]

    with jax.enable_x64(dtype == np.float64):
        z, v = (jnp.asarray(scores(function, phi, seed), dtype) for seed in (0, 1))
        closed, by_autodiff = (jit(functools.partial(orders, f))(z, v) for f in (ours, plain))
        return [error(*pair) for pair in zip(closed, by_autodiff, strict=True)]


@functools.cache  # each dtype asks for it
def _many_digits(function: Function, phi: Phi) -> list[Any]:
    """The plain definition and its derivatives, by order, at the scores of all comparisons."""
    xp = ManyDigits()
    z, v = (xp.array(scores(function, phi, seed)) for seed in (0, 1))

    def plain(z: Any) -> Any:
        return function.plain(phi, xp, *z)

    if function.orders < 3:
        return [f(z) for f in (plain, xp.jacobian(plain))[: function.orders]]
    return xp.orders(plain, z, v)[: function.orders]


# --- every cell ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    """Errors of one function for one φ, by order, in float64 and in float32 against many digits. If everything is asked
    for, the former is the larger of this error and of that of float64 against autodiff."""

    function: str
    phi: str
    error64: tuple[float, ...]
    tolerance64: tuple[float, ...]
    error32: tuple[float, ...]
    tolerance32: tuple[float, ...]

    @property
    def ok(self) -> bool:
        """Whether no error exceeds its tolerance. A NaN does."""
        pairs = zip(self.error64 + self.error32, self.tolerance64 + self.tolerance32, strict=True)
        return all(error <= tolerance for error, tolerance in pairs)


def tolerances(function: Function, dtype: Any) -> tuple[float, ...]:
    """The tolerances in this dtype, by order."""
    return (function.tolerance64 if dtype == np.float64 else function.tolerance32)[: function.orders]


def up_to(orders: int, function: Function) -> Function:
    """The function with 3 or 4 orders compared. An expansion, which is itself of the second order, has one order less
    in place of 3: its second derivative takes as long to compile as all orders of another function."""
    expands = orders < 4 and not function.third_by_autodiff
    return dataclasses.replace(function, orders=min(function.orders, orders - expands))


def cells_of(function: Function, phis: Sequence[Phi], everything: bool) -> list[Cell]:
    """The comparisons of one function for several φ, up to second derivatives or with all that `checks` names."""
    wide = wide_dtype()
    function = function if everything else up_to(3, function)
    errors64 = against_digits(function, phis, wide)
    errors32 = against_digits(function, phis, np.float32, jax.jit if everything else jit_formulas)
    if everything:
        both = zip(errors64, (against_autodiff(function, phi) for phi in phis), strict=True)
        errors64 = [[*map(max, zip(*pair, strict=False)), *pair[0][len(pair[1]) :]] for pair in both]
    allowed = [tolerances(function, dtype) for dtype in (wide, np.float32)]
    return [
        Cell(function.name, str(phi), tuple(e64), allowed[0], tuple(e32), allowed[1])
        for phi, e64, e32 in zip(phis, errors64, errors32, strict=True)
    ]


def cell(function: Function, phi: Phi) -> Cell:
    """All comparisons of one function for one φ."""
    return cells_of(function, (phi,), everything=True)[0]


PAIRS = [*itertools.product(EVERY, PHIS), *((function, maps.exp) for function in SPARSE_MAPS + OTHERS)]
"""Every cell: function × φ, and the functions without φ once."""

_HALVES = (PHIS[: len(PHIS) // 2], PHIS[len(PHIS) // 2 :])
GROUPS = [*itertools.product(EVERY, _HALVES), *((function, (maps.exp,)) for function in SPARSE_MAPS + OTHERS)]
"""The same cells, in groups of several φ: each group is one program."""


class Sure(NamedTuple):
    """A function whose gradient is compared where a class is almost certain, and the error in float32."""

    function: Function
    error32: float

    @property
    def ok(self) -> bool:
        """Whether that error is as small as the record allows elsewhere."""
        return self.error32 <= self.function.tolerance32[1]


def _task(index: int, everything: bool) -> tuple[list[Cell], int | None, float]:
    """The cells of a group; or, for later numbers, the error of `sure_gradient` for a function of `SURE`."""
    if index >= len(GROUPS):
        return [], index - len(GROUPS), sure_gradient(SURE[index - len(GROUPS)])
    function, phis = GROUPS[index]
    return cells_of(function, phis, everything), None, 0.0


def _collect_seldom() -> None:
    """Traces make many objects and few cycles: by default Python looks for cycles after every 700."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def checks(everything: bool = True) -> Iterator[Cell | Sure]:
    """Each cell as soon as its group is done, then the gradients of confident rows.

    everything: also third derivatives, float64 against autodiff, and float32 with XLA's optimisations of code for CPU.
    On CPU it runs in two processes, because tracing and mpmath are Python.
    """
    task, indices = functools.partial(_task, everything=everything), range(len(GROUPS) + len(SURE))
    with contextlib.ExitStack() as stack:
        run: Any = map
        if jax.default_backend() == "cpu":
            spawn = multiprocessing.get_context("spawn")
            run = stack.enter_context(concurrent.futures.ProcessPoolExecutor(2, spawn, _collect_seldom)).map
        for found, sure, worst in run(task, indices):
            yield from found if sure is None else [Sure(SURE[sure], worst)]


# --- gradients of confident rows -----------------------------------------------------------------------------

SURE = FUNCTIONS + LOSSES + SPARSE_MAPS + OTHERS
"""The functions whose gradient is compared where a class is almost certain."""


def sure_gradient(function: Function) -> float:
    """The float32 error of the gradient where class 1 has 1 − p < 10⁻⁶, for φ = exp, against many digits.

    The error of each output is divided by the largest entry of its own gradient, which is itself small (MATH 4.5).
    """
    z = scores(function, maps.exp)
    z[0, 1] = np.max(z[0]) + 16
    xp = ManyDigits()
    want = xp.jacobian(lambda z: function.plain(maps.exp, xp, *z))(xp.array(z))
    found = jax.jit(jax.jacrev(lambda z: function.ours(*z, phi=maps.exp)))(z)
    by_output = (np.asarray(a, np.float64).reshape(-1, *z.shape)[:, 0] for a in (found, want))
    return max(itertools.starmap(error, zip(*by_output, strict=True)))


# --- the article's errors ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Erratum:
    """A formula of the article that is wrong, the true one, and how far each is from autodiff in float64."""

    where: str
    claimed: str
    true: str
    claimed_form: Callable[[jax.Array], jax.Array]
    true_form: Callable[[jax.Array], jax.Array]
    reference: Callable[[jax.Array], jax.Array]

    def ok(self, claimed: float, true: float) -> bool:
        """Whether the errors show that the claimed form is wrong and the true one right."""
        return claimed > 0.1 and true <= (1e-12 if wide_dtype() == np.float64 else 1e-5)

    def errors(self) -> tuple[float, float]:
        """The errors of the claimed and of the true form."""
        dtype = wide_dtype()
        forms = (self.claimed_form, self.true_form, self.reference)
        with jax.enable_x64(dtype == np.float64):
            z = jnp.asarray(np.random.default_rng(2).normal(0, 2, CLASSES), dtype)
            claimed, true, reference = jit_formulas(lambda z: [form(z) for form in forms])(z)
            return error(claimed, reference), error(true, reference)


def _second_derivative_case(formula: Callable[[jax.Array, int, int], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The entries ∂²σ_i/∂z_j² with j ≠ i by a formula of (σ, i, j)."""
    pairs = list(itertools.permutations(range(CLASSES), 2))
    return lambda z: jnp.stack([formula(softmax(z), i, j) for i, j in pairs])


def _errata() -> tuple[Erratum, ...]:
    def plain(z: jax.Array) -> jax.Array:
        return plain_entropy(maps.exp, Plain, z)

    def second(z: jax.Array) -> jax.Array:
        tensor = jax.jacfwd(jax.jacrev(lambda z: plain_softmax(maps.exp, Plain, z)))(z)
        return jnp.stack([tensor[i, j, j] for i, j in itertools.permutations(range(CLASSES), 2)])

    return (
        Erratum(
            "entropy gradient",
            "−1 + p",
            "−p (log p + H)",
            lambda z: -1 + softmax(z),
            jax.grad(entropy),
            jax.grad(plain),
        ),
        Erratum(
            "entropy Hessian",
            "diag p − p pᵀ",
            "p pᵀ + (pc) pᵀ + p (pc)ᵀ − diag(p (1+c))",
            lambda z: jnp.diag(softmax(z)) - jnp.outer(softmax(z), softmax(z)),
            jax.hessian(entropy),
            jax.hessian(plain),
        ),
        Erratum(
            "∂²σ_i/∂z_j∂z_k, i ≠ j = k",
            "σ_i σ_k (2σ_i − 1)",
            "σ_i σ_k (2σ_k − 1)",
            _second_derivative_case(lambda p, i, j: p[i] * p[j] * (2 * p[i] - 1)),
            _second_derivative_case(lambda p, i, j: p[i] * p[j] * (2 * p[j] - 1)),
            second,
        ),
    )


ERRATA = _errata()
