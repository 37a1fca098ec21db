"""A target that names only its largest classes, as a teacher's `top_k` saves them (MATH 7.8)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jsoftmax._pytree import pytree_class, static
from jsoftmax.checks.arguments import as_array, as_floating, wide_integers

TAILS = ("class", "renormalise", "ignore")


@pytree_class
class TopTargets:
    """Target probabilities of k classes of each row, and what becomes of the rest of the mass.

    q_j for the classes i_j, S = Σ q_j, p of the scores, p_rest = 1 − Σ p_{i_j}. The loss of `cross_entropy` is

        tail="class"         −Σ q_j log p_{i_j} − (1 − S) log p_rest: the rest is a class of its own
        tail="renormalise"   −Σ (q_j/S) log p_{i_j}
        tail="ignore"        −Σ q_j log p_{i_j}          (MATH 7.8)

    It may be passed where one of these takes a distribution: `cross_entropy`, `focal_cross_entropy`,
    `poly_cross_entropy`, `kl_to_target`, `jsoftmax.heads.linear_cross_entropy` and `linear_cross_entropy_sum`.
    log p_rest is computed from the log-sum-exp of the other classes, so a small p_rest keeps its digits.

    A teacher's `top = jsoftmax.heads.linear_top_k(…)` is made one by `TopTargets(top.indices, jnp.exp(top.log_prob))`.
    If the teacher has a temperature, divide the scores of the student by the same one. It is a pytree with the arrays
    as leaves: it may be an argument of a function under `jax.jit`, part of a batch, or the `xs` of a `jax.lax.scan`.

    Args:
      indices: integers `[..., k]`, the classes. They must be distinct in each row: a class that is named twice also
        counts twice in p, and so changes the loss, without an error. A class that is out of range is ignored if its
        probability is 0 (`jsoftmax.heads.linear_top_k` gives −1 after the classes that are kept). Otherwise the row is
        NaN.
      probabilities: `[..., k]`, floating, not negative. Differentiable. Negative ones count as in a dense distribution:
        `cross_entropy` takes them as they are, and `kl_to_target` gives NaN.
      tail: what becomes of the rest of the mass; part of the compiled program. There is no rest if S ≥ 1, and the rest
        counts as 0 if the mask leaves no other class. If all other classes are impossible (scores or log-weights of
        −inf), the loss is +inf, unless the rest is so small that rounding explains it: at most (k + 8) ε of the loss's
        dtype plus one ε of the probabilities' dtype. So pass probabilities in the dtype to which they were rounded. If
        the other classes are possible, the rounding of bfloat16 probabilities counts as their mass, up to 0.004 times
        −log p_rest: tail="renormalise" avoids this.
    Raises: ValueError if `tail` is none of the three; for arrays that do not fit, the functions that take it raise.
    Source: Anshumann et al. 2025 (the k largest classes of a teacher, and the bias if the rest is left out).

    >>> from jsoftmax.losses import cross_entropy
    >>> teacher = TopTargets(jnp.array([2, 0]), jnp.array([0.5, 0.25]))
    >>> cross_entropy(jnp.array([1., 0., 2., 0.]), teacher)
    Array(1.07052..., dtype=float32)
    """

    indices: Any
    probabilities: Any
    tail: str = static("class")

    def __post_init__(self) -> None:  # it does not run where JAX rebuilds the object
        if self.tail not in TAILS:
            raise ValueError(
                f"TopTargets: tail must be one of {', '.join(map(repr, TAILS))}; got {self.tail!r}. 'class' counts the "
                "rest of the mass as one class."
            )

    def __repr__(self) -> str:
        return f"TopTargets(indices={self.indices!r}, probabilities={self.probabilities!r}, tail={self.tail!r})"


def mass_is_in_range(top: TopTargets, valid: Array) -> Array:
    """Whether all of the k classes with mass are in range, `[..., 1]`; `valid` says whether each class is."""
    return jnp.all(valid | (top.probabilities == 0), -1, keepdims=True)


def check_top_targets(function: str, argument: str, top: TopTargets, batch: tuple[int, ...], dtype: Any) -> TopTargets:
    """`TopTargets` whose arrays are checked to have the shape `[*batch, k]`, with indices of at least 32 bits, and
    probabilities in the given dtype, or in their own if it is narrower: `combine` needs to know how they were
    rounded."""
    indices = as_array(function, f"{argument}.indices", top.indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(
            f"{function}: {argument}.indices must be integers; got dtype {indices.dtype}. Pass the indices first, "
            "then the probabilities."
        )
    way_out = "Pass the indices first, then the probabilities."
    probabilities: Array = as_floating(function, f"{argument}.probabilities", top.probabilities, way_out)
    if indices.shape != probabilities.shape or indices.shape[:-1] != batch or indices.ndim == 0:
        wanted = "(" + ", ".join([*map(str, batch), "k"]) + ("," if not batch else "") + ")"
        raise ValueError(
            f"{function}: {argument}.indices and {argument}.probabilities must have the shape {wanted}; got shapes "
            f"{indices.shape} and {probabilities.shape}. The k classes of each row come last."
        )
    if jnp.finfo(probabilities.dtype).bits > jnp.finfo(dtype).bits:
        probabilities = probabilities.astype(dtype)
    return TopTargets(wide_integers(indices), probabilities, top.tail)


def reject_per_class_options(function: str, **options: Any) -> None:
    """Rejects options that need the scores of every class. With `TopTargets` the rest counts as one class."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{function}: {name} must be left out where labels are TopTargets; got {value}. The other classes "
                "count as one there: change the probabilities, or tail=…, which says what becomes of their mass."
            )


def reject_top_targets(function: str, argument: str, value: Any, wanted: str = "integers or a distribution") -> None:
    """Rejects `TopTargets` in functions that take only labels or whole distributions."""
    if isinstance(value, TopTargets):
        raise TypeError(
            f"{function}: {argument} must be {wanted}; got TopTargets. losses.cross_entropy, "
            "losses.kl_to_target and heads.linear_cross_entropy, which has the scores of a linear layer, take them."
        )
