"""MATH 5: infinities, NaN and empty rows, for every function and φ, in that row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jsoftmax.verify import FUNCTIONS, PHIS

FINE = [0.5, -1.0, 1.0]


def both(function, rows):
    rows = jnp.array(rows)
    return (rows,) if function.scores == 1 else (rows, jnp.broadcast_to(jnp.array(FINE[::-1]), rows.shape))


def value_and_derivatives(function, phi, z, **keywords):
    """Value, gradient and Hessian product of each row, compiled as one."""

    def total(*z):
        return jnp.sum(function.ours(*z, phi=phi, **keywords))

    @jax.jit
    def of(*z):
        ones = tuple(jnp.ones_like(a) for a in z)
        first, second = jax.vmap(lambda *z: jax.jvp(jax.grad(total), z, tuple(a[0] for a in ones)))(*z)
        return function.ours(*z, phi=phi, **keywords), (first, second)

    return of(*z)


@pytest.mark.parametrize("phi", PHIS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_bad_rows(function, phi):
    inf, nan = jnp.inf, jnp.nan
    z = both(function, [FINE, [0.5, inf, 1.0], [0.5, nan, 1.0], [-inf, inf, 1.0], [inf, inf, inf]])
    value, derivatives = value_and_derivatives(function, phi, z)
    np.testing.assert_allclose(value[0], function.ours(*(a[0] for a in z), phi=phi), rtol=1e-6)
    if function.name == "log_normalizer":
        np.testing.assert_array_equal(value[1:], [inf, nan, inf, inf])
    else:
        assert np.all(np.isnan(value[1:]))
    for derivative in derivatives:
        assert np.all(np.isfinite(derivative[0]))
        assert np.all(np.isnan(derivative[1:]).any(-1))


@pytest.mark.parametrize("phi", PHIS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_empty_rows(function, phi):
    z = both(function, [[-jnp.inf] * 3, FINE])
    value, derivatives = value_and_derivatives(function, phi, z)
    nothing = -jnp.inf if function.name in ("log_softmax", "log_normalizer") else 0.0
    np.testing.assert_array_equal(value[0], jnp.full(value[0].shape, nothing))
    masked = function.ours(*both(function, [FINE]), phi=phi, where=jnp.zeros(3, bool))
    np.testing.assert_array_equal(masked[0], value[0])
    for derivative in derivatives:
        np.testing.assert_array_equal(derivative[0], 0)
    assert np.all(np.isfinite(value[1]))


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_no_classes_at_all(function):
    z = (jnp.zeros((2, 0)),) * function.scores
    value = function.ours(*z)
    if value.ndim == 1:
        np.testing.assert_array_equal(value, -jnp.inf if function.name == "log_normalizer" else 0)
    else:
        assert value.shape == (2, 0)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_huge_scores(function):
    """Differences beyond float32 leave a one-hot row, with finite derivatives."""
    z = both(function, [[3e38, -3e38, 0.0], [1e30, 1e30, -1e30]])
    if function.name == "log_softmax":
        return np.testing.assert_array_equal(function.ours(*z)[0], np.float32([0, -np.inf, -3e38]))
    assert np.all(np.isfinite(function.ours(*z)) | (function.name == "kl_divergence"))
    if function.name in ("entropy", "varentropy"):
        assert function.ours(*z)[0] == 0
        for derivative in value_and_derivatives(function, PHIS[0], z)[1]:
            assert np.all(np.isfinite(derivative))
    return None
