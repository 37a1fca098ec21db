"""Second-order training: curvature products through a network, and steps that use them.

- `gauss_newton`: products with the Gauss–Newton matrix or the Fisher information.
- `newton_cg`: damped Newton steps by conjugate gradients, as an optax transformation.
- `natural_gradient`: damped natural-gradient steps, likewise.

optax is imported inside the functions that make transformations (the extra `train` has it).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jsoftmax import maps
from jsoftmax.checks.arguments import all_known, as_number, is_int, optional_package, public
from jsoftmax.checks.names import no_attribute
from jsoftmax.derivatives import cross_entropy_hessian, fisher_information
from jsoftmax.operators import DiagonalPlusLowRank
from jsoftmax.phi import Phi, exp

__all__ = ["gauss_newton", "natural_gradient", "newton_cg"]


__getattr__ = functools.partial(no_attribute, __name__)


def __dir__() -> list[str]:
    return __all__


@public
def gauss_newton(
    scores: Callable[[Any], jax.Array], parameters: Any, operator: Callable[[jax.Array], DiagonalPlusLowRank]
) -> Callable[[Any], Any]:
    """The product v ↦ Jᵀ B J v / N with a curvature B of the scores, through any network.

    J = ∂ scores / ∂ parameters,  B = operator(scores)     (MATH 1.16)

    The Gauss–Newton matrix of a mean loss over N rows where B is the loss's Hessian in the scores, e.g.
    `lambda z: cross_entropy_hessian(z, q)`; the Fisher information of the parameters where B is `fisher_information`.
    One linearisation of the network serves all products: each costs one forward and one backward pass.

    Args:
      scores: parameters (a pytree) ↦ z `[..., K]`; N is the number of its rows. Shard rows by jit with sharded inputs:
        inside `jax.shard_map` N is the number of one shard's rows, while JAX adds the products over all shards.
      parameters: the point.
      operator: z ↦ `DiagonalPlusLowRank` for each row.
    Returns: a linear function of a pytree like `parameters`; symmetric, and positive semi-definite if B is.
    Raises: TypeError if `scores` or `operator` is no function, or `operator` returns anything else.
    Source: Schraudolph 2002, section 3.

    >>> from jsoftmax import log_normalizer_hessian
    >>> inputs = jnp.array([[1., 2.], [0., 1.]])
    >>> product = gauss_newton(lambda W: inputs @ W, jnp.zeros((2, 3)), log_normalizer_hessian)
    >>> product(jnp.ones((2, 3)).at[0, 0].set(0.))
    Array([[-0.11111...,  0.05555...,  0.05555...],
           [-0.22222...,  0.11111...,  0.11111...]], dtype=float32)
    """
    _check_callable("gauss_newton", "scores", scores, "parameters", "lambda W: inputs @ W")
    _check_callable("gauss_newton", "operator", operator, "z", "log_normalizer_hessian")
    z, forward = jax.linearize(scores, parameters)
    backward, B = jax.linear_transpose(forward, parameters), operator(z)
    if not isinstance(B, DiagonalPlusLowRank):
        raise TypeError(
            f"gauss_newton: operator must return a DiagonalPlusLowRank; got {type(B).__name__}. "
            "Write e.g. operator=lambda z: jsoftmax.cross_entropy_hessian(z, q), without as_matrix()."
        )
    rows = max(z.size // z.shape[-1], 1)

    def product(v: Any) -> Any:
        return backward((B.mv(forward(v)) / rows).astype(z.dtype))[0]

    return product


def _check_callable(function: str, argument: str, f: Any, arguments: str, example: str) -> None:
    if not callable(f):
        raise TypeError(
            f"{function}: {argument} must be a function of {arguments}; got {type(f).__name__}. "
            f"Write e.g. {argument}={example}."
        )


def _check_steps(function: str, damping: Any, iterations: Any) -> jax.Array:
    """`damping` as one number. It and `iterations` must be in range, if they are known at trace time."""
    array = as_number(function, "damping", damping)
    if array.ndim or not all_known(damping, lambda a: a > 0):
        got = f"shape {array.shape}" if array.ndim else damping
        raise ValueError(
            f"{function}: damping must be > 0, and one number; got {got}. Without damping the matrix is singular, "
            "because a shift of all scores changes nothing: take e.g. 1e-3."
        )
    if not is_int(iterations) or iterations < 1:
        raise ValueError(f"{function}: iterations must be an int >= 1; got {iterations!r}. The default is 50.")
    return array


def _along(a: Any, step: jax.Array, b: Any) -> Any:
    """a + step b."""
    return jax.tree.map(lambda a, b: a + step.astype(b.dtype) * b, a, b)


def _dot(a: Any, b: Any) -> jax.Array:
    return sum((jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)), jnp.zeros(()))


def _descent(product: Callable[[Any], Any], gradient: Any, iterations: int) -> Any:
    """−product⁻¹ gradient by conjugate gradients, which stop before a direction of curvature ≤ 0. If the first
    direction is one, the result is −gradient. So it points downhill for every matrix (Nocedal & Wright 2006, algorithm
    7.1)."""
    start = _dot(gradient, gradient)

    def go_on(state: Any) -> jax.Array:
        _, _, _, size, count, positive = state
        return (size > 1e-12 * start) & (count < iterations) & positive

    def advance(state: Any) -> Any:
        x, residual, direction, size, count, _ = state
        image = product(direction)
        curvature = _dot(direction, image)
        positive = curvature > 0
        step = jnp.where(positive, size / jnp.where(positive, curvature, 1), jnp.where(count == 0, 1, 0))
        x, residual = _along(x, step, direction), _along(residual, -step, image)
        new_size = _dot(residual, residual)
        return x, residual, _along(residual, new_size / size, direction), new_size, count + 1, positive

    zero, downhill = jax.tree.map(jnp.zeros_like, gradient), jax.tree.map(jnp.negative, gradient)
    return lax.while_loop(go_on, advance, (zero, downhill, downhill, start, 0, jnp.array(True)))[0]


def _by_cg(
    function: str,
    operator: Callable[..., DiagonalPlusLowRank],
    needs: tuple[str, ...],
    *,
    scores: Any,
    damping: Any,
    phi: Any,
    iterations: Any,
) -> Any:
    """−(Jᵀ B J / N + damping · I)⁻¹ gradient as an optax transformation. operator: B, as a function of z and the extra
    arguments of `update`."""
    optax = optional_package(function, "optax", "'jsoftmax[train]'")
    maps.check_phi(function, phi)
    _check_callable(function, "scores", scores, "(parameters, inputs)", "lambda W, inputs: inputs @ W")
    strength = _check_steps(function, damping, iterations)

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
        missing = ["parameters"] * (params is None) + [name for name in needs if name not in given]
        if missing:
            call = ", ".join(f"{name}={name}" for name in needs)
            raise TypeError(
                f"{function}: update needs the parameters and {call}; got no {' and no '.join(missing)}. "
                f"Write optimizer.update(gradient, state, parameters, {call})."
            )
        if jax.tree.map(jnp.shape, updates) != jax.tree.map(jnp.shape, params):
            raise ValueError(
                f"{function}: the gradient must have the structure and shapes of the parameters; got "
                f"{jax.tree.map(jnp.shape, updates)} for {jax.tree.map(jnp.shape, params)}. Take "
                "jax.grad(loss)(parameters)."
            )
        inputs = given.pop("inputs")
        product = gauss_newton(lambda p: scores(p, inputs), params, lambda z: operator(z, **given))
        return _descent(lambda v: _along(product(v), strength, v), updates, iterations), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@public
def newton_cg(
    scores: Callable[[Any, Any], jax.Array], damping: ArrayLike, *, phi: Phi = exp, iterations: int = 50
) -> Any:
    """Damped Newton steps by conjugate gradients, as an optax transformation, for a mean cross-entropy.

    update = −(Jᵀ B J / N + damping · I)⁻¹ gradient where that matrix is positive definite,
    B = `cross_entropy_hessian`     (MATH 1.16)

    For scores linear in the parameters (an output layer, a linear model) that is Newton's step, for any φ; for a
    network it is Gauss–Newton's. With another φ than exp the matrix can be indefinite: conjugate gradients stop before
    a direction of negative curvature, and the update is then another one that points downhill. Weight decay of strength
    `damping` makes the damped step exact, too.

    Args:
      scores: (parameters, inputs) ↦ z `[..., K]`.
      damping: added to the diagonal, > 0; may be traced.
      phi: the positive map φ.
      iterations: conjugate gradients stop there, or at a relative residual of 1e-6.
    Raises: TypeError if `scores` is no function or `phi` no φ, ValueError if `damping` or `iterations` is not positive;
      `update` raises TypeError without its arguments or for integer targets, ValueError for targets of another shape
      than the scores, or a gradient of another than the parameters. ModuleNotFoundError without optax.
    Returns: an `optax.GradientTransformationExtraArgs`; `update(gradient, state, parameters, inputs=…, targets=…)` with
      targets q `[..., K]`. Chain a line search after it, as after `optax.lbfgs`.
    Source: Nocedal & Wright 2006, section 7.1.

    >>> import optax
    >>> inputs, targets = jnp.array([[1., 2.], [0., 1.]]), jnp.eye(2)
    >>> newton = newton_cg(lambda W, inputs: inputs @ W, damping=1e-2)
    >>> W = jnp.zeros((2, 2))
    >>> gradient = inputs.T @ (jax.nn.softmax(inputs @ W) - targets) / 2
    >>> updates, _ = newton.update(gradient, newton.init(W), W, inputs=inputs, targets=targets)
    >>> updates
    Array([[ 2.448..., -2.448...],
           [-0.773...,  0.773...]], dtype=float32)
    """

    def operator(z: jax.Array, targets: Any, **_: Any) -> DiagonalPlusLowRank:
        if jnp.shape(targets) != z.shape:
            raise ValueError(
                f"newton_cg: targets must be distributions over the classes, of the scores' shape {z.shape}; got shape "
                f"{jnp.shape(targets)}. Convert labels by jax.nn.one_hot(labels, {z.shape[-1]})."
            )
        return cross_entropy_hessian(z, targets, phi=phi)

    needs = ("inputs", "targets")
    return _by_cg("newton_cg", operator, needs, scores=scores, damping=damping, phi=phi, iterations=iterations)


@public
def natural_gradient(
    scores: Callable[[Any, Any], jax.Array], damping: ArrayLike, *, phi: Phi = exp, iterations: int = 50
) -> Any:
    """Damped natural-gradient steps by conjugate gradients, as an optax transformation.

    update = −(Jᵀ F J / N + damping · I)⁻¹ gradient,  F = `fisher_information`     (MATH 1.16)

    Positive for every φ; the same as `newton_cg` for phi=exp and targets that sum to 1.

    Args:
      scores, damping, phi, iterations: as in `newton_cg`.
    Returns: an `optax.GradientTransformationExtraArgs`; `update(gradient, state, parameters, inputs=…)`; targets are
      ignored.
    Raises: as `newton_cg`.
    Source: Amari 1998.

    >>> natural_gradient(lambda W, inputs: inputs @ W, damping=1e-2).init(jnp.zeros((2, 2)))
    EmptyState()
    """

    def operator(z: jax.Array, **_: Any) -> DiagonalPlusLowRank:
        return fisher_information(z, phi=phi)

    return _by_cg(
        "natural_gradient", operator, ("inputs",), scores=scores, damping=damping, phi=phi, iterations=iterations
    )
