"""Diagonal plus low rank: the form of every Jacobian and Hessian of the library, with products and solves in O(K)."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jsoftmax._pytree import pytree_class, static
from jsoftmax.checks.arguments import as_scores, optional_package


@pytree_class
class DiagonalPlusLowRank:
    """The matrix A = diag(d) + U Vᵀ, of K × K entries, held as O(K) numbers     (MATH 1.6 to 1.8)

    A pytree that lives inside jit, vmap, grad and scan. Leading axes are a batch; all methods map over it.

    Args:
      d: diagonal `[..., K]`.
      left, right: U and V, `[..., K, rank]`, rank ≥ 1.
      symmetric: whether A is symmetric by construction (structure, not data).
      covariance: whether A = diag(d) − d dᵀ with Σ d = 1 or 0: what `pinv_mv` asks for.
    Raises: ValueError if the shapes do not belong together.

    >>> from jsoftmax import softmax_jacobian
    >>> J = softmax_jacobian(jnp.array([0., 1., 2.]))
    >>> J.mv(jnp.array([1., 0., -1.]))
    Array([ 0.14181...,  0.14077..., -0.28258...], dtype=float32)
    >>> J.as_matrix() @ jnp.array([1., 0., -1.])
    Array([ 0.14181...,  0.14077..., -0.28258...], dtype=float32)
    """

    d: Any
    left: Any
    right: Any
    symmetric: bool = static(default=False)
    covariance: bool = static(default=False)

    def __post_init__(self) -> None:
        if not all(hasattr(part, "shape") for part in (self.d, self.left, self.right)):
            return  # the leaves are no arrays, but e.g. axes to map over
        d, left, right = self.d.shape, self.left.shape, self.right.shape
        if not (left == right and left[:-1] == d and d and left[-1] > 0):
            raise ValueError(
                "DiagonalPlusLowRank: d must be [..., K], left and right [..., K, rank] with rank ≥ 1; got shapes "
                f"{d}, {left} and {right}. Write one column as u[..., None], and no columns as one of zeros."
            )

    def __repr__(self) -> str:
        *batch, classes, rank = jnp.shape(self.left)
        return f"DiagonalPlusLowRank(shape={(*batch, classes, classes)}, rank={rank})"

    @property
    def _factors(self) -> list[tuple[Array, Array]]:
        """The columns of U and V in pairs."""
        return [(self.left[..., r], self.right[..., r]) for r in range(self.left.shape[-1])]

    def mv(self, v: ArrayLike) -> Float[Array, "..."]:
        """A v = d v + U (Vᵀ v), in O(K); `v` is `[..., K]`, one vector for each matrix of the batch."""
        v = _vector("mv", "v", v, self.d)
        return sum((a * jnp.sum(b * v, -1, keepdims=True) for a, b in self._factors), self.d * v)

    def transpose(self) -> "DiagonalPlusLowRank":
        """Aᵀ = diag(d) + V Uᵀ."""
        return DiagonalPlusLowRank(self.d, self.right, self.left, self.symmetric, self.covariance)

    def diagonal(self) -> Float[Array, "..."]:
        """The diagonal d_i + Σ_r U_ir V_ir, `[..., K]`."""
        return sum((a * b for a, b in self._factors), self.d)

    def trace(self) -> Float[Array, "..."]:
        """The trace, `[...]`."""
        return jnp.sum(self.diagonal(), -1)

    def as_matrix(self) -> Float[Array, "..."]:
        """The dense matrix `[..., K, K]`, in one pass."""
        same = lax.broadcast_to_rank(jnp.eye(self.d.shape[-1], dtype=bool), self.d.ndim + 1)
        diagonal = jnp.where(same, self.d[..., :, None], 0)
        return sum((a[..., :, None] * b[..., None, :] for a, b in self._factors), diagonal)

    def solve(self, b: ArrayLike, damping: ArrayLike = 0.0) -> Float[Array, "..."]:
        """(A + damping · I)⁻¹ b, in O(K), by the Woodbury identity.

        x = D⁻¹ b − D⁻¹ U (I + Vᵀ D⁻¹ U)⁻¹ Vᵀ D⁻¹ b,   D = diag(d) + damping     (MATH 1.11)

        Args:
          b: `[..., K]`.
          damping: a number or `[...]`, one for each matrix.
        Returns: `[..., K]`. Where D is positive the error is of the order of that of a dense solve, κ(A + damping · I)
          units in the last place, also for indefinite A, such as the entropy's Hessian, unless an entry of D is far
          smaller than the others: D is divided by, so κ(D) counts too. NaN for a matrix whose D has a zero (dense
          solves may succeed there). Where D has both signs the identity holds, and digits may be lost. A
          singular matrix, such as the softmax's Jacobian without damping, gives infinite or meaningless numbers: for
          that one there is `pinv_mv`.

        >>> from jsoftmax import entropy_hessian
        >>> H = entropy_hessian(jnp.array([0., 1., 2.]))
        >>> x = H.solve(jnp.array([1., 2., 4.]), damping=2.)
        >>> (H.mv(x) + 2. * x).round(5)
        Array([1., 2., 4.], dtype=float32)
        """
        b = _vector("solve", "b", b, self.d)
        D, capacitance = self._damped("solve", damping)
        inner = jnp.stack([jnp.sum(v * (b / D), -1) for _, v in self._factors], -1)
        middle = jnp.linalg.solve(capacitance, inner[..., None])[..., 0]
        spread = sum((u * middle[..., r, None] for r, (u, _) in enumerate(self._factors)), jnp.zeros_like(b))
        return jnp.where(jnp.any(D == 0, -1, keepdims=True), jnp.nan, (b - spread) / D)

    def slogdet(self, damping: ArrayLike = 0.0) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Sign and log|det| of A + damping · I, in O(K), by the matrix determinant lemma.

        det(A + damping · I) = Π D · det(I + Vᵀ D⁻¹ U)     (MATH 1.12)

        Returns: `[...]` and `[...]`, as `jnp.linalg.slogdet`; digits and NaN as in `solve`.

        >>> from jsoftmax import entropy_hessian
        >>> entropy_hessian(jnp.array([0., 1., 2.])).slogdet(damping=2.)
        (Array(1., dtype=float32), Array(1.965..., dtype=float32))
        """
        D, capacitance = self._damped("slogdet", damping)
        sign, logabs = jnp.linalg.slogdet(capacitance)
        singular = jnp.any(D == 0, -1)
        sign = jnp.where(singular, jnp.nan, sign * jnp.prod(jnp.sign(D), -1))
        return sign, jnp.where(singular, jnp.nan, logabs + jnp.sum(jnp.log(jnp.abs(D)), -1))

    def pinv_mv(self, v: ArrayLike) -> Float[Array, "..."]:
        """J⁺ v, the Moore–Penrose inverse of the softmax Jacobian J = diag(p) − p pᵀ, in O(K).

        J⁺ = C diag(1/p) C,   C = I − 11ᵀ/K, over the K classes that are kept     (MATH 1.13)

        Returns: `[..., K]`, 0 for classes with p = 0. For a target p' of the same sum, the step J⁺ (p' − p) of the
          scores changes p to p', to first order.
        Raises: ValueError for any other operator than `softmax_jacobian`, `log_normalizer_hessian` and
          `fisher_information` with phi=exp.

        >>> from jsoftmax import softmax_jacobian
        >>> J = softmax_jacobian(jnp.array([0., 1., 2.]))
        >>> (J.mv(J.pinv_mv(jnp.array([1., 0., -1.]))) + 1).round(5)
        Array([2., 1., 0.], dtype=float32)
        """
        if not self.covariance:
            raise ValueError(
                "DiagonalPlusLowRank.pinv_mv: the operator must be diag(p) − p pᵀ, the softmax Jacobian with phi=exp; "
                "got another. Use solve(b, damping) with a small damping instead."
            )
        v = _vector("pinv_mv", "v", v, self.d)
        kept = self.d != 0
        count = jnp.maximum(jnp.sum(kept.astype(v.dtype), -1, keepdims=True), 1)

        def centre(a: Array) -> Array:
            return jnp.where(kept, a - jnp.sum(jnp.where(kept, a, 0), -1, keepdims=True) / count, 0)

        return centre(centre(v) / jnp.where(kept, self.d, 1))

    def to_lineax(self) -> Any:
        """The same as a `lineax` operator, `DiagonalLinearOperator` + U @ Vᵀ, for its solvers and transforms.

        Raises: ModuleNotFoundError without lineax (`pip install lineax`); ValueError for a batch: map over it with
          `jax.vmap`.
        """
        if jnp.ndim(self.d) != 1:
            raise ValueError(
                "DiagonalPlusLowRank.to_lineax: the operator must be one matrix; got a batch of shape "
                f"{jnp.shape(self.d)[:-1]}. Map over the batch: jax.vmap(lambda A: ... A.to_lineax() ...)(operator)."
            )
        lineax = optional_package("DiagonalPlusLowRank.to_lineax", "lineax", "lineax")
        low_rank = lineax.MatrixLinearOperator(self.left) @ lineax.MatrixLinearOperator(self.right.T)
        operator = lineax.DiagonalLinearOperator(self.d) + low_rank
        return lineax.TaggedLinearOperator(operator, lineax.symmetric_tag) if self.symmetric else operator

    def _damped(self, method: str, damping: ArrayLike) -> tuple[Array, Array]:
        """D = diag(d) + damping, and the capacitance matrix I + Vᵀ D⁻¹ U. The caller deals with zeros of D."""
        function = f"DiagonalPlusLowRank.{method}"
        damping = as_scores(function, "damping", damping).astype(self.d.dtype)
        try:
            jnp.broadcast_shapes(damping.shape, self.d.shape[:-1])
        except ValueError:
            raise ValueError(
                f"{function}: damping must be a number, or one for each matrix of the batch {self.d.shape[:-1]}; got "
                f"shape {damping.shape}. A damping for each class is not offered: add it to d instead."
            ) from None
        D = self.d + lax.broadcast_to_rank(damping, self.d.ndim - 1)[..., None]
        safe = jnp.where(D == 0, 1, D)
        rows = [jnp.stack([jnp.sum(v * u / safe, -1) for u, _ in self._factors], -1) for _, v in self._factors]
        products = jnp.stack(rows, -2)
        return D, lax.broadcast_to_rank(jnp.eye(len(rows), dtype=self.d.dtype), products.ndim) + products


def _vector(method: str, argument: str, v: Any, d: Array) -> Array:
    """`v` in the operator's dtype. Its last axis must be the classes, and the others must broadcast with the batch."""
    v = as_scores(f"DiagonalPlusLowRank.{method}", argument, v).astype(d.dtype)
    try:
        jnp.broadcast_shapes(v.shape[:-1], d.shape[:-1])
        fits = v.ndim > 0 and v.shape[-1] == d.shape[-1]
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"DiagonalPlusLowRank.{method}: {argument} must have {d.shape[-1]} classes last and broadcast with the "
            f"batch {d.shape[:-1]}; got shape {v.shape}. For several vectors use jax.vmap(operator.{method})."
        )
    return lax.broadcast_to_rank(v, d.ndim)
