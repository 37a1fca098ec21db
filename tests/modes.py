"""Two functions in every mode of differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jsoftmax.verify import jit_formulas


def assert_same(f, g, arguments, rtol=1e-11, atol=1e-13):
    """Value, gradient, jvp, and a Hessian product in a scan, of a sum of f with unequal weights, by every argument.

    f gives an array, or several of them. Infinite values are compared, and left out of the derivatives.
    """

    def results(f, *arguments):
        def finite(*arguments):
            return [jnp.where(jnp.isinf(a), 0, a) for a in jax.tree.leaves(f(*arguments))]

        def total(*arguments):
            return sum(jnp.vdot(jnp.cos(jnp.arange(a.size)).reshape(a.shape), a) for a in finite(*arguments))

        def scanned(*arguments):
            return jax.lax.scan(lambda c, a: (c + total(*a), None), 0.0, [a[None] for a in arguments])[0]

        every, along = tuple(range(len(arguments))), tuple(jnp.cos(3 * a) for a in arguments)
        return (
            f(*arguments),
            jax.grad(total, every)(*arguments),
            jax.jvp(finite, arguments, along)[1],
            jax.jvp(jax.grad(scanned, every), arguments, along)[1],
        )

    programs = [jit_formulas(functools.partial(results, h)) for h in (f, g)]
    for a, b in zip(*(jax.tree.leaves(program(*arguments)) for program in programs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
