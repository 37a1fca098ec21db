"""Tsallis' and Rényi's entropies in their order α."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import some

import jsoftmax as js
from jsoftmax import verify

Z = np.float32([[0.3, -1.2, 2.0, 0.7], [0.0, -20.0, -3.0, -40.0]])


def many_digits(name, z, alpha):
    """Value, ∂/∂α and ∂²/∂α² by central differences of the definition with 60 digits, off α = 1 by 10⁻³⁰."""
    xp = verify.ManyDigits()
    mp = xp.mp
    mp.dps = 80
    w = [mp.exp(mp.mpf(float(a))) for a in z]
    p = [a / sum(w) for a in w]

    def f(a):
        total = sum(b**a for b in p)
        return (1 - total) / (a - 1) if name == "tsallis_entropy" else mp.log(total) / (1 - a)

    h, at = mp.mpf(10) ** -15, mp.mpf(alpha) + mp.mpf(10) ** -30
    low, middle, high = f(at - h), f(at), f(at + h)
    return [float(middle), float((high - low) / (2 * h)), float((high - 2 * middle + low) / h**2)]


@functools.cache
def by_alpha(name):
    """(α, z) ↦ value and two derivatives in α; one program for every α."""

    def of(alpha, z):
        f = functools.partial(getattr(js, name), z)
        return f(alpha), jax.grad(f)(alpha), jax.grad(jax.grad(f))(alpha)

    return jax.jit(of)


ORDERS = [0.0, 0.3, 1 - 1e-7, 1.0, 1 + 1e-9, 1.5, 2.0, 7.0, 30.0]


@pytest.mark.parametrize("alpha", some(ORDERS, [0.0, 1 - 1e-7, 1.0, 1.5, 30.0]))
@pytest.mark.parametrize("name", ["tsallis_entropy", "renyi_entropy"])
def test_orders(name, alpha):
    """Value and two derivatives in α, through α = 1, with small results' digits in float32 too."""
    for z in Z:
        with jax.enable_x64(True):
            of_alpha = by_alpha(name)(jnp.float64(alpha), np.float64(z))
        want = many_digits(name, z, alpha)
        np.testing.assert_allclose(of_alpha, want, rtol=1e-9)
        single = float(np.float32(alpha))
        want = many_digits(name, z, single)
        value, slope, _ = by_alpha(name)(jnp.float32(single), z)
        np.testing.assert_allclose(value, want[0], rtol=2e-5)
        np.testing.assert_allclose(slope, want[1], rtol=1e-4)
        np.testing.assert_allclose(getattr(js, name)(z, alpha), want[0], rtol=2e-5)


@pytest.mark.parametrize("name", ["tsallis_entropy", "renyi_entropy"])
def test_an_order_for_each_row_may_be_traced(name):
    f = getattr(js, name)
    orders = jnp.array([[0.5], [1.0]])
    rows = jax.jit(f)(Z, orders)
    for row, z, alpha in zip(rows, Z, orders[:, 0], strict=True):
        np.testing.assert_allclose(row, f(z, alpha), rtol=1e-6)
    np.testing.assert_allclose(rows[1], js.entropy(Z[1]), rtol=1e-6)
    with pytest.raises(ValueError, match=f"{name}: alpha must be >= 0 and finite; got -1"):
        f(Z, -1)
    with pytest.raises(ValueError, match=f"{name}: alpha must be one number"):
        f(Z, jnp.ones(2))
