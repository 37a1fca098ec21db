"""Two functions in every mode of differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jsoftmax.verify import jit_formulas


def assert_same(f, g, arguments, rtol=1e-11, atol=1e-13):
    """Value and jvp; and gradient and Hessian product in a scan, of a sum with unequal weights; by every argument.
    Those of g, the plain one, are made without the scan.

    f gives an array, or several of them. Infinite values are compared, and left out of the derivatives.
    """

    def results(f, in_a_scan, *arguments):
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

    programs = [jit_formulas(functools.partial(results, *of)) for of in ((f, True), (g, False))]
    for a, b in zip(*(jax.tree.leaves(program(*arguments)) for program in programs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
