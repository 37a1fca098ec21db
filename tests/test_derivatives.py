"""The closed forms by name: the tensor case by case, masks, edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import named, product, some
from interpreter import evaluated

import jsoftmax as js
from jsoftmax.verify import DERIVATIVES

Z, V, W = (np.float32(a) for a in ([0.5, -1.0, 1.0, 0.3, -0.2], [-0.7, 0.9, 0.1, 0.6, 0.4], [1.0, 0.2, -0.4, 0.8, 0.5]))
KEEP = np.array([True, False, True, True, False])


def test_tensor_case_by_case():
    p = np.asarray(js.softmax(Z), np.float64)
    T = np.asarray(js.softmax_second_derivative(Z))
    classes = range(5)
    for i in classes:
        np.testing.assert_allclose(T[i, i, i], p[i] * (1 - p[i]) * (1 - 2 * p[i]), rtol=1e-5)
        for k in set(classes) - {i}:
            np.testing.assert_allclose(T[i, i, k], p[i] * p[k] * (2 * p[i] - 1), rtol=1e-5)
            np.testing.assert_allclose(T[i, k, i], p[i] * p[k] * (2 * p[i] - 1), rtol=1e-5)
            np.testing.assert_allclose(T[i, k, k], p[i] * p[k] * (2 * p[k] - 1), rtol=1e-5)
            for j in set(classes) - {i, k}:
                np.testing.assert_allclose(T[i, j, k], 2 * p[i] * p[j] * p[k], rtol=1e-5)


@pytest.mark.parametrize(
    ("derivative", "phi"), product(DERIVATIVES, [js.exp, js.spherical(0.1), js.softplus], met=[(0, 1)]), ids=str
)  # they meet in `verify`
def test_rows(derivative, phi):
    """Classes left out by a mask, a weight of 0 or a score of −inf; empty and bad rows, in that row alone."""
    nan, inf = np.nan, np.inf
    out = np.where(KEEP, 0, -inf)
    table = {  # z, where, log_weights
        "fine": (Z, True, 0),
        "mask": (Z, KEEP, 0),
        "weights": (Z, True, out),
        "-inf": (np.where(KEEP, Z, -inf), True, 0),
        "nan behind a mask": (np.where(KEEP, Z, nan), KEEP, 0),
        "empty": (Z, False, 0),
        "all -inf": (Z - inf, True, 0),
        "nan": (np.where(KEEP, Z, nan), True, 0),
        "+inf": (np.where(KEEP, Z, inf), True, 0),
    }
    z, where, log_weights = (
        np.stack([np.broadcast_to(a, 5) for a in column]) for column in zip(*table.values(), strict=True)
    )
    others = (V, W)[: derivative.scores - 1]

    @jax.jit
    @jax.vmap
    def f(z, where, log_weights):
        return derivative.ours(z, *others, where=where, log_weights=log_weights, phi=phi)

    results = dict(zip(table, np.asarray(f(z, where, np.float32(log_weights))), strict=True))
    np.testing.assert_allclose(results["fine"], derivative.ours(Z, *others, phi=phi), rtol=2e-5, atol=1e-6)
    part = derivative.ours(Z[KEEP], *(a[KEEP] for a in others), phi=phi)
    for name in ("mask", "weights", "-inf", "nan behind a mask"):
        want = np.zeros_like(results[name])
        want[np.ix_(*[KEEP] * want.ndim)] = part
        np.testing.assert_allclose(results[name], want, rtol=2e-5, atol=1e-6, err_msg=name)
    for name in ("empty", "all -inf"):
        np.testing.assert_array_equal(results[name], 0, name)
    for name in ("nan", "+inf"):
        assert np.any(np.isnan(results[name])), name


FEW = ("softmax_jacobian", "softmax_second_derivative", "entropy_gradient", "cross_entropy_hessian")


@pytest.mark.parametrize("derivative", some(DERIVATIVES, named(DERIVATIVES, FEW)), ids=str)
def test_batches_and_dtypes(derivative):
    """By default of one, two and three axes, and of several arguments: dtypes are checked at one place."""
    scores = [jnp.stack([a, -a]) for a in (Z, V, W)[: derivative.scores]]
    got = derivative.ours(*scores)
    for row in (0, 1):
        np.testing.assert_allclose(got[row], derivative.ours(*(a[row] for a in scores)), rtol=1e-6)
    narrow = derivative.ours(*(a.astype(jnp.bfloat16) for a in scores))
    assert narrow.dtype == jnp.float32
    integers = [jnp.arange(3)] + [jnp.arange(3.0)] * (derivative.scores - 1)
    assert derivative.ours(*integers).dtype == jnp.float32


def test_names_agree_with_transformations():
    z = jnp.asarray(Z)
    for phi in (js.exp, js.taylor(4)):
        f = functools.partial(js.entropy, phi=phi)
        np.testing.assert_allclose(js.entropy_gradient(z, phi=phi), jax.grad(f)(z), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            js.entropy_hessian(z, phi=phi).as_matrix(), evaluated(jax.hessian(f))(z), rtol=1e-4, atol=1e-6
        )
        tensor = js.softmax_second_derivative(z, phi=phi)
        product = js.softmax_second_derivative_product(z, V, W, phi=phi)
        np.testing.assert_allclose(product, jnp.einsum("ijk,j,k", tensor, V, W), rtol=1e-4, atol=1e-6)
