"""The equations of a jaxpr, with those of the jaxprs within."""

import jax
from jax.extend import core


def inner_jaxprs(equation):
    """The jaxprs in its parameters: bodies of loops, branches, calls."""
    leaves = jax.tree.leaves(equation.params, is_leaf=lambda a: isinstance(a, core.Jaxpr | core.ClosedJaxpr))
    return [getattr(a, "jaxpr", a) for a in leaves if isinstance(a, core.Jaxpr | core.ClosedJaxpr)]


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)
