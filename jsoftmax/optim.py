"""Second-order training: Gauss–Newton and Fisher products through a network, Newton and natural-gradient steps.

optax is imported inside the functions that make transformations (the extra `train` has it).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.sparse.linalg import cg
from jax.typing import ArrayLike

from jsoftmax import _arguments, maps
from jsoftmax.derivatives import cross_entropy_hessian, fisher_information
from jsoftmax.operators import DiagonalPlusLowRank
from jsoftmax.phi import Phi, exp


def gauss_newton(
    scores: Callable[[Any], jax.Array], parameters: Any, operator: Callable[[jax.Array], DiagonalPlusLowRank]
) -> Callable[[Any], Any]:
    """The product v ↦ Jᵀ B J v / N with a curvature B of the scores, through any network.

    J = ∂ scores / ∂ parameters,  B = operator(scores)     (MATH 1.16)

    The Gauss–Newton matrix of a mean loss over N rows where B is the loss's Hessian in the scores, e.g.
    `lambda z: cross_entropy_hessian(z, q)`; the Fisher information of the parameters where B is `fisher_information`.
    One linearisation of the network serves all products: each costs one forward and one backward pass.

    Args:
      scores: parameters (a pytree) ↦ z `[..., K]`; N is the number of its rows.
      parameters: the point.
      operator: z ↦ `DiagonalPlusLowRank` for each row.
    Returns: a linear function of a pytree like `parameters`; symmetric, and positive semi-definite if B is.
    Source: Schraudolph 2002, section 3.

    >>> from jsoftmax import log_normalizer_hessian
    >>> inputs = jnp.array([[1., 2.], [0., 1.]])
    >>> product = gauss_newton(lambda W: inputs @ W, jnp.zeros((2, 3)), log_normalizer_hessian)
    >>> product(jnp.ones((2, 3)).at[0, 0].set(0.))
    Array([[-0.11111...,  0.05555...,  0.05555...],
           [-0.22222...,  0.11111...,  0.11111...]], dtype=float32)
    """
    z, forward = jax.linearize(scores, parameters)
    backward, B = jax.linear_transpose(forward, parameters), operator(z)
    rows = max(z.size // z.shape[-1], 1)

    def product(v: Any) -> Any:
        return backward((B.mv(forward(v)) / rows).astype(z.dtype))[0]

    return product


def _by_cg(
    function: str,
    operator: Callable[..., DiagonalPlusLowRank],
    *,
    scores: Any,
    damping: Any,
    phi: Any,
    iterations: int,
) -> Any:
    """−(Jᵀ B J / N + damping · I)⁻¹ gradient as an optax transformation; `operator` gets z and the extra arguments."""
    import optax  # noqa: PLC0415  (an extra)

    maps.check_phi(function, phi)
    if not callable(scores):
        raise TypeError(
            f"{function}: scores must be a function of (parameters, inputs); got {type(scores).__name__}. "
            "Write e.g. scores=lambda W, inputs: inputs @ W."
        )
    if _arguments.is_concrete_number(damping) and not damping > 0:
        raise ValueError(
            f"{function}: damping must be > 0; got {damping}. The matrix is singular without (scores have a shift that "
            "changes nothing): take e.g. 1e-3."
        )

    def update(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
        if params is None or "inputs" not in given:
            missing = "parameters" if params is None else "inputs"
            raise TypeError(
                f"{function}: update needs the parameters and inputs=…; got no {missing}. "
                "Write optimizer.update(gradient, state, parameters, inputs=inputs, …)."
            )
        inputs = given.pop("inputs")
        model: Any = scores
        product = gauss_newton(lambda p: model(p, inputs), params, lambda z: operator(z, **given))

        def damped(v: Any) -> Any:
            return jax.tree.map(lambda a, b: a + damping * b, product(v), v)

        step, _ = cg(damped, updates, tol=1e-6, maxiter=iterations)
        return jax.tree.map(jnp.negative, step), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def newton_cg(scores: Callable[[Any, Any], jax.Array], damping: float, *, phi: Phi = exp, iterations: int = 50) -> Any:
    """Damped Newton steps by conjugate gradients, as an optax transformation, for a mean cross-entropy.

    update = −(Jᵀ B J / N + damping · I)⁻¹ gradient,  B = `cross_entropy_hessian`     (MATH 1.16)

    For scores linear in the parameters (an output layer, a linear model) that is Newton's step exactly, for any φ; for
    a network it is Gauss–Newton's. With phi=exp the matrix is positive and the update points downhill; with another φ
    the Hessian can be indefinite and the update point uphill: raise `damping`, or take `natural_gradient`. Weight decay
    of strength `damping` makes it exact, too.

    Args:
      scores: (parameters, inputs) ↦ z `[..., K]`.
      damping: added to the diagonal, > 0.
      phi: the positive map φ.
      iterations: conjugate gradients stop there, or at a relative residual of 1e-6.
    Raises: TypeError if `scores` is no function or `phi` no φ, ValueError if `damping` is a number and not positive.
    Returns: an `optax.GradientTransformationExtraArgs`; `update(gradient, state, parameters, inputs=…, targets=…)` with
      targets q `[..., K]`. Chain a line search after it, as after `optax.lbfgs`'s.
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

    def operator(z: jax.Array, targets: ArrayLike, **_: Any) -> DiagonalPlusLowRank:
        return cross_entropy_hessian(z, targets, phi=phi)

    return _by_cg("newton_cg", operator, scores=scores, damping=damping, phi=phi, iterations=iterations)


def natural_gradient(
    scores: Callable[[Any, Any], jax.Array], damping: float, *, phi: Phi = exp, iterations: int = 50
) -> Any:
    """Damped natural-gradient steps by conjugate gradients, as an optax transformation.

    update = −(Jᵀ F J / N + damping · I)⁻¹ gradient,  F = `fisher_information`     (MATH 1.16)

    Positive for every φ; the same as `newton_cg` for phi=exp and targets that sum to 1.

    Args:
      scores, damping, phi, iterations: as in `newton_cg`.
    Returns: an `optax.GradientTransformationExtraArgs`; `update(gradient, state, parameters, inputs=…)`; targets are
      ignored.
    Source: Amari 1998.

    >>> natural_gradient(lambda W, inputs: inputs @ W, damping=1e-2).init(jnp.zeros((2, 2)))
    EmptyState()
    """

    def operator(z: jax.Array, **_: Any) -> DiagonalPlusLowRank:
        return fisher_information(z, phi=phi)

    return _by_cg("natural_gradient", operator, scores=scores, damping=damping, phi=phi, iterations=iterations)
