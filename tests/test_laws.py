"""Laws that hold for all scores: hypothesis looks for a row that breaks one."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays

import jsoftmax as js

CLASSES = 6
rows = arrays.arrays(np.float32, CLASSES, elements=strategies.floats(-200, 200, width=32))
orders = strategies.permutations(range(CLASSES))
searched = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("phi", [js.exp, js.taylor(2), js.softplus], ids=str)
@searched
@hypothesis.given(z=rows, order=orders)
def test_distribution(phi, z, order):
    p, log_p = np.asarray(js.softmax(z, phi=phi)), np.asarray(js.log_softmax(z, phi=phi))
    H, V = float(js.entropy(z, phi=phi)), float(js.varentropy(z, phi=phi))
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(log_p), p, rtol=3e-5, atol=1e-37)
    assert 0 <= H <= np.log(CLASSES) * (1 + 1e-6)
    assert V >= 0
    np.testing.assert_allclose(js.softmax(z[list(order)], phi=phi), p[list(order)], rtol=1e-6, atol=1e-37)


@searched
@hypothesis.given(z=rows, shift=strategies.integers(-(2**12), 2**12))
def test_exp_ignores_a_shift(z, shift):
    z = np.round(z * 16) / 16  # exact differences
    for f in (js.softmax, js.log_softmax, js.entropy, js.varentropy):
        np.testing.assert_array_equal(f(z + np.float32(shift)), f(z))


@searched
@hypothesis.given(z_p=rows, z_q=rows)
def test_divergence(z_p, z_q):
    assert js.kl_divergence(z_p, z_q) >= 0
    assert js.kl_divergence(z_p, z_p) == js.jensen_shannon_divergence(z_p, z_p) == 0
    of_mean = js.jensen_shannon_divergence(z_p, z_q, beta=0.25)
    assert 0 <= of_mean <= np.log(2) * (1 + 1e-6)
    np.testing.assert_allclose(js.jensen_shannon_divergence(z_q, z_p, beta=0.75), of_mean, rtol=1e-5, atol=1e-37)
    tied = jnp.broadcast_to(z_p[0], CLASSES)
    np.testing.assert_allclose(js.entropy(z_q), np.log(CLASSES) - js.kl_divergence(z_q, tied), atol=5e-6)
