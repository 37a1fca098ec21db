"""Two functions in every mode of differentiation; and a mode in which JAX promotes nothing."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from interpreter import evaluated


@contextlib.contextmanager
def strict_promotion():
    """In it JAX raises an error where dtypes, or the ranks of arrays, differ."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def assert_same(f, g, arguments, rtol=1e-11, atol=1e-13):
    """`in_all_modes` of f, in a scan, and of g, the plain one, without it."""
    found, wanted = (evaluated(functools.partial(in_all_modes, *of))(*arguments) for of in ((f, True), (g, False)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def reverse_over_reverse(gradient, argnums):
    """The gradient of the sum of the squares of a gradient, which has a part for each argument, by these arguments."""
    return jax.grad(lambda *given: sum(jnp.vdot(g, g) for g in gradient(*given)), argnums)


def in_all_modes(f, in_a_scan, *arguments):
    """Value and jvp; and gradient and Hessian product, in a scan or not, of a sum with unequal weights; by every
    argument.

    f gives an array, or several of them. Infinite values are returned, and left out of the derivatives.
    """

    def finite(*arguments):
        values = jax.tree.leaves(f(*arguments))
        return [jnp.where(jnp.isinf(a), 0, a) for a in values], values

    def total(*arguments):
        return sum(jnp.vdot(jnp.cos(jnp.arange(a.size)).reshape(a.shape), a) for a in finite(*arguments)[0])

    def scanned(*arguments):
        return jax.lax.scan(lambda c, a: (c + total(*a), None), 0.0, [a[None] for a in arguments])[0]

    along = tuple(jnp.cos(3 * a) for a in arguments)
    _, forward, values = jax.jvp(finite, arguments, along, has_aux=True)
    gradient = jax.grad(scanned if in_a_scan else total, tuple(range(len(arguments))))
    return values, forward, *jax.jvp(gradient, arguments, along)
