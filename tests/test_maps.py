"""The maps with exp are jax.nn's; axes, blocks, masks and weights for every function."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, named, product, some
from interpreter import evaluated

import jsoftmax as js
from jsoftmax.verify import FUNCTIONS, PHIS

LENGTHS = [1, 2, 7, 64, 255, 256, 257, 300, 320, 1000, 1024, 4097]


def scores(*shape, seed=0, scale=3):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


@pytest.mark.parametrize("length", some(LENGTHS, [257, 4097]))
def test_equal_to_jax_nn(length):
    """By default a length beyond SHORT and one beyond LONG (sums/cpu/paths.py). Shorter ones are in test_digits.py."""
    z = scores(3, length)
    pairs = (
        (js.softmax, jax.nn.softmax),
        (js.log_softmax, jax.nn.log_softmax),
        (js.log_normalizer, lambda z: jax.nn.logsumexp(z, -1)),
    )
    directions = [scores(3, length, seed=1), scores(3, length, seed=2)]

    def value_vjp_and_product(f, z, g, v):
        def vjp(z):
            value, pull = jax.vjp(f, z)
            return pull(g if value.shape == g.shape else g[:, 0])[0], value

        (by_g, value), (product, _) = jax.jvp(vjp, (z,), (v,))
        return value, by_g, product

    for ours, theirs in pairs:
        got, want = (evaluated(functools.partial(value_vjp_and_product, f))(z, *directions) for f in (ours, theirs))
        for a, b, rtol, atol in zip(got, want, (5e-6, 1e-4, 1e-3), (1e-7, 3e-6, 1e-5), strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


PEAKS = [(300, 299), (1000, 0), (1000, 124), (1000, 125), (1000, 999), (4500, 4351), (4500, 4352), (4500, 4499)]


@pytest.mark.parametrize(("of_row", "ties"), product(PEAKS, [0, 2], met=[(0, 1)]), ids=str)
def test_the_maximum_is_found_wherever_it_is(of_row, ties):
    """In one sum, at the edges of blocks, and in a tail."""
    classes, peak = of_row
    z = np.asarray(scores(classes, scale=1)) - 30
    z[peak], z[np.arange(ties) * 100 + 5] = 0, 0
    wide = np.asarray(z, np.float64)  # the largest is 0: its own 1 is left out of the sum
    log_normalizer = np.log1p(np.sum(np.exp(np.delete(wide, peak))))
    np.testing.assert_allclose(js.log_normalizer(z), log_normalizer, rtol=1e-6)
    p = np.exp(wide - log_normalizer)
    np.testing.assert_allclose(js.entropy(z), log_normalizer - np.sum(p * wide), rtol=1e-6)


def test_many_near_the_maximum():
    """There are so many that rounding loses the 1 of the maximum; the row must not be taken for an empty one."""
    z = np.float32(np.random.default_rng(4).uniform(-1e-3, 0, 2**23))
    for L in (js.log_normalizer(z), js.log_normalizer(z[:, None, None], (0, 1)), js.log_normalizer(z[:-8])):
        np.testing.assert_allclose(L, np.log(2.0**23), rtol=1e-4)


FEW = named(FUNCTIONS, ("softmax", "entropy", "kl_divergence"))
AXES = [0, 1, -1, -2, (0, 2), (-1, 0), None, (0, 1, 2)]
OF_AXES = and_full(covering(FEW, AXES[::2], met=[(0, 1)]), itertools.product(FUNCTIONS, AXES))
"""By default half of the axes, and of each kind one function: axes are checked at one place for all."""


@pytest.mark.parametrize(("function", "axis"), OF_AXES, ids=str)
def test_axes(function, axis):
    z = [scores(3, 4, 5, seed=i) for i in range(function.scores)]
    axes = tuple(range(3)) if axis is None else tuple(a % 3 for a in (axis if isinstance(axis, tuple) else (axis,)))
    kept = tuple(a for a in range(3) if a not in axes)

    def flat(a):
        return jnp.transpose(a, kept + axes).reshape(*(a.shape[k] for k in kept), -1)

    got, want = function.ours(*z, axis=axis), function.ours(*map(flat, z))
    if function.name in ("softmax", "log_softmax"):
        assert got.shape == z[0].shape
        got = flat(got)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("f", [js.entropy, js.varentropy, js.log_normalizer])
def test_keepdims(f):
    z = scores(2, 3, 4)
    np.testing.assert_array_equal(f(z, (0, 2), keepdims=True), f(z, (0, 2))[None, :, None])


def test_log_weights_are_added_to_psi_and_differentiated():
    z, log_w = scores(5), scores(5, seed=1)
    np.testing.assert_allclose(js.softmax(z, log_weights=log_w), jax.nn.softmax(z + log_w), rtol=1e-5)
    for f in (js.entropy, js.log_normalizer, js.varentropy):
        by_weights = evaluated(jax.grad(lambda w, f=f: f(z, phi=js.softplus, log_weights=w)))(log_w)
        by_scores = evaluated(jax.grad(f))(js.softplus.log(z) + log_w)
        np.testing.assert_allclose(by_weights, by_scores, rtol=1e-4, atol=1e-6)
    rows = jax.grad(lambda w: js.entropy(jnp.stack([z, z]), log_weights=w).sum())(log_w)
    np.testing.assert_allclose(rows, 2 * jax.grad(lambda w: js.entropy(z, log_weights=w))(log_w), rtol=1e-5)


@pytest.mark.parametrize("function", some(FUNCTIONS, FEW), ids=str)
def test_second_argument_broadcasts(function):
    if function.scores == 2:
        z, other = scores(4), scores(3, 4, seed=1)
        np.testing.assert_allclose(function.ours(z, other), function.ours(jnp.stack([z] * 3), other), rtol=1e-6)
    else:
        assert function.ours(scores(3, 4), where=jnp.array([[True], [True], [True]])).shape[0] == 3


OF_EXPANSION = and_full([(js.exp, 1), (js.spherical(0.1), 2), (js.softplus, 2)], itertools.product(PHIS, [1, 2]))
"""By default a few: that H, g and the Hessian product are those of φ is in test_oracle.py and `verify`."""


@pytest.mark.parametrize(("phi", "order"), OF_EXPANSION, ids=str)
def test_expansion_errs_by_the_next_order(phi, order):
    with jax.enable_x64(True):
        z, dz = np.array([0.3, -0.7, 1.1]), np.array([1.0, -2.0, 0.5])

        @evaluated
        def expansion_and_entropy(dz):
            return js.entropy_expansion(z, dz, order, phi=phi), js.entropy(z + dz, phi=phi)

        errors = [abs(np.subtract(*expansion_and_entropy(step * dz))) for step in (2e-3, 1e-3)]
    np.testing.assert_allclose(errors[0] / errors[1], 2 ** (order + 1), rtol=0.05)
