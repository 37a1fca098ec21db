"""A φ from a function of the user's (MATH 3.10)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from jsoftmax._pytree import pytree_class
from jsoftmax.phi.base import Phi


@pytree_class
class FromCallable(Phi):
    """A user's φ or ψ. Slope and curvature come from autodiff if they are not given (MATH 3.10)."""

    of_phi: Any
    of_log_phi: Any
    of_slope: Any
    of_curvature: Any
    name = "from_callable"

    def definition(self, z: Any, xp: Any) -> Any:
        return xp.exp(self.of_log_phi(z)) if self.of_phi is None else self.of_phi(z)

    def log_phi(self, z: Array) -> Array:
        if self.of_phi is None:
            return self.of_log_phi(z)
        value = self.of_phi(z)
        zero = value == 0
        return jnp.where(zero, -jnp.inf, jnp.log(jnp.where(zero, 1, value)))

    def slope(self, z: Array) -> Array:
        if self.of_slope is not None:
            return self.of_slope(z)
        psi, s = jax.jvp(self.log_phi, (z,), (jnp.ones_like(z),))
        return jnp.where(jnp.isneginf(psi), 0, s)

    def curvature(self, z: Array) -> Array:
        if self.of_curvature is not None:
            return self.of_curvature(z)
        return jax.jvp(self.slope, (z,), (jnp.ones_like(z),))[1]

    def __eq__(self, other: object) -> bool:  # functools.partial compares by identity
        return isinstance(other, FromCallable) and jax.tree.flatten(self) == jax.tree.flatten(other)

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self)
        return hash((tuple(leaves), structure))

    def __repr__(self) -> str:
        given = self.of_log_phi if self.of_phi is None else self.of_phi
        function = getattr(given, "func", given)
        return f"{self.name}({'log_phi=' if self.of_phi is None else ''}{getattr(function, '__name__', function)})"


def from_callable(
    phi: Callable[..., Any] | None = None,
    *,
    log_phi: Callable[..., Any] | None = None,
    slope: Callable[..., Any] | None = None,
    curvature: Callable[..., Any] | None = None,
) -> Phi:
    """A φ from a function of your own: `phi`, or better its logarithm `log_phi`.

    s = ψ' and t = ψ'' come from autodiff where they are not given     (MATH 3.10)

    The function maps an array elementwise and is written in jax.numpy. You promise that φ is positive: where it is
    negative its row is NaN, and where it is 0 the class is left out. Give `log_phi` if φ may overflow. Learnable
    parameters enter through `jax.tree_util.Partial(f, parameters)`, called as f(parameters, z); they are
    differentiated. A plain function is part of the compiled program: define it once, since every new lambda compiles
    again; it must not close over traced values. The function is also called with a score of 0 in the place of every
    score that is infinite or left out. Its value there is not used, but its derivatives in the parameters must be
    finite: for ψ = a log z write jnp.where(z > 0, a * jnp.log(jnp.where(z > 0, z, 1)), -jnp.inf).

    Args:
      phi, log_phi: exactly one of them.
      slope, curvature: s and t as functions of z, where you have closed forms.
    Raises: TypeError if something given is no function, fails on an array or closes over a traced value, ValueError
      unless exactly one of `phi` and `log_phi` is given.

    >>> bell = from_callable(log_phi=lambda z: -z**2 / 2)
    >>> bell.log(jnp.array([0., 1., 2.]))
    Array([-0. , -0.5, -2. ], dtype=float32)
    """
    for argument, f in (("phi", phi), ("log_phi", log_phi), ("slope", slope), ("curvature", curvature)):
        if f is not None and (isinstance(f, Phi) or not callable(f)):
            raise TypeError(
                f"from_callable: {argument} must be a function of an array of scores; got {type(f).__name__}. "
                "Ready-made φ such as jsoftmax.softplus are passed as they are: phi=jsoftmax.softplus."
            )
    if (phi is None) == (log_phi is None):
        got = "neither" if phi is None else "both"
        raise ValueError(
            f"from_callable: exactly one of phi and log_phi is wanted; got {got}. "
            "Write from_callable(f) for φ, or from_callable(log_phi=f) for ψ = log φ."
        )
    made = [_as_pytree(f) for f in (phi, log_phi, slope, curvature)]
    if any(_closes_over_tracers(f) for f in made if f is not None):
        raise TypeError(
            "from_callable: the functions must not close over traced values, whose derivatives would be lost; got one "
            "that does. Pass them as parameters: from_callable(jax.tree_util.Partial(f, parameters)), called as "
            "f(parameters, z)."
        )
    return FromCallable(*made)


def _closes_over_tracers(f: Any) -> bool:
    """Whether f, traced with its parameters as arguments, reads traced values from elsewhere."""
    leaves, structure = jax.tree.flatten(f)
    z = jax.ShapeDtypeStruct((1,), jnp.float32)
    try:
        program = jax.make_jaxpr(lambda leaves, z: jax.tree.unflatten(structure, leaves)(z))(leaves, z)
    except Exception as error:  # the user's function may raise anything
        said = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")
        raise TypeError(
            "from_callable: the functions must map an array of scores elementwise, in jax.numpy; got one that raised "
            f"{said}. Use the functions of jax.numpy, such as jnp.log, not those of math or numpy. The function is "
            "called as f(z), a jax.tree_util.Partial(f, parameters) as f(parameters, z)."
        ) from error
    return any(isinstance(value, Tracer) for value in program.consts)


def _as_pytree(f: Callable[..., Any] | None) -> Any:
    """A function as a pytree. Callables that are pytrees already, with parameters as leaves, stay; others become
    static."""
    return f if f is None or not jax.tree_util.all_leaves([f]) else jax.tree_util.Partial(f)
