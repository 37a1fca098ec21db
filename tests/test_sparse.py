"""The sparse maps against the conditions that define them, reference values, closed forms; edges; the loss."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import some

import jsoftmax as js
from jsoftmax import losses

ALPHAS = (1.0, 1.001, 1.1, 1.25, 4 / 3, 1.5, 1.7, 2.0, 2.5, 3.0, 5.0)
FEW_ALPHAS = (1.0, 1.001, 1.5, 1.7, 3.0)
"""With a way of their own: the limit, its neighbourhood, an integer power, none, beyond 2."""


def scores(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape))


def check_optimal(z, p, alpha, tolerance):
    """Σ p = 1, and (p^{α−1} − 1)/(α − 1) − z is one number on the support, and nowhere above it elsewhere."""
    p, z = np.float64(p), np.float64(z)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=tolerance)
    assert np.all(p >= 0)
    p = np.where(p < np.finfo(float).tiny, 0, p)  # such numbers have few digits, where a device has them at all
    safe = np.where(p > 0, p, 1)
    deformed = np.log(safe) if alpha == 1 else np.expm1((alpha - 1) * np.log(safe)) / (alpha - 1)
    level = np.where(p > 0, deformed, -np.inf) - z
    top = np.max(level, -1, keepdims=True)
    spread = np.where(p > 0, top - level, 0)
    assert np.max(spread) <= tolerance * (1 + np.abs(top).max())
    if alpha > 1:
        r = np.where(p > 0, 0, np.maximum(1 + (alpha - 1) * (z + top), 0))
        assert np.all((r <= tolerance * (1 + np.abs(top).max())) | (r ** (1 / (alpha - 1)) < 1e-290))  # underflow


@pytest.mark.parametrize("alpha", some(ALPHAS, FEW_ALPHAS))
def test_optimal(alpha):
    with jax.enable_x64(True):
        for classes in (1, 2, 7, 1000):
            z = jnp.concatenate([scores(20, classes, scale=s) for s in (1e-6, 0.1, 1.0, 5.0, 100.0)])
            for a in (alpha, jnp.full((100, 1), alpha)):  # the integer powers, and the general form
                check_optimal(z, js.entmax(z, a), alpha, 1e-9)
    z = jnp.float32(scores(50, 300, scale=2))
    p = js.entmax(z, alpha)
    assert p.dtype == jnp.float32
    # beyond 2 a p near 0 is as uncertain as the rounding to the power 1/(α − 1)
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5 if alpha <= 2 else 2 * 1.2e-7 ** (1 / (alpha - 1)))


def test_reference_values():
    z = jnp.array([-2.0, 0.0, 0.5])
    np.testing.assert_allclose(js.sparsemax(z), [0, 0.25, 0.75])
    np.testing.assert_allclose(js.entmax15(z), [0, 0.3260, 0.6740], atol=5e-5)
    np.testing.assert_allclose(js.entmax(jnp.array([-1.0, 0.0, 0.5]), 1.33), [0.0460, 0.3276, 0.6264], atol=5e-5)
    for alpha, f in ((2, js.sparsemax), (1.5, js.entmax15), (1, js.softmax)):
        np.testing.assert_allclose(js.entmax(z, alpha), f(z), rtol=5e-7)


@pytest.mark.parametrize("alpha", some(ALPHAS, FEW_ALPHAS))
def test_small_probabilities_of_ties_keep_their_digits(alpha):
    """100,000 classes: all equal, and one above them that takes its share."""
    classes = 100_000
    tied = jnp.zeros(classes)
    for a in (alpha, jnp.full(1, alpha)):
        np.testing.assert_allclose(js.entmax(tied, a), 1e-5, rtol=3e-6 * max(1, alpha - 1))
    if alpha <= 2:
        above = jnp.float32(1e-6)
        p = js.entmax(tied.at[7].set(above), alpha)
        with jax.enable_x64(True):
            want = js.entmax(jnp.zeros(classes).at[7].set(np.float64(above)), alpha)
        np.testing.assert_allclose(p, want, rtol=2e-5)


@pytest.mark.parametrize("alpha", [1.3, 1.5, 1.7, 2.0])
def test_sums_are_1_where_the_support_shrinks_slowly(alpha):
    """One class about 1/(α − 1) above many that are nearly equal: Newton's steps leave them group after group."""
    others = np.random.default_rng(2).normal(0, 1e-4, 5000)
    for offset in (-3e-4, 0, 3e-4, 6e-4):
        z = jnp.asarray(np.append(others, 1 / (alpha - 1) + offset), jnp.float32)
        np.testing.assert_allclose(js.entmax(z, alpha).sum(), 1, rtol=5e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose(js.entmax(np.float64(z), alpha).sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("alpha", [3.0, 4.0, 6.0, 10.0, 50.0, 1000.0])
def test_large_alpha_gives_probabilities(alpha):
    """Rounding leaves a small p uncertain there, but not the sum; each is within what a unit of 1 makes of p^{α−1}."""
    eps = np.finfo(np.float32).eps
    for z in (scores(500, 8), 0.1 * scores(500, 8, seed=1), jnp.zeros((1, 5)), jnp.array([[-0.56, -0.39]])):
        p = js.entmax(z, jnp.full((len(z), 1), alpha))
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
        with jax.enable_x64(True):
            want = np.asarray(js.entmax(np.float64(z), alpha))
        np.testing.assert_allclose(want.sum(-1), 1, rtol=1e-12)
        assert np.max(np.abs(p - want)) <= 4 * eps ** (1 / (alpha - 1))
        if alpha > 10:  # where the weights p^{2−α} overflow
            continue
        slopes = jax.grad(lambda z: jnp.sum(jnp.cos(z) * js.entmax(z, alpha)))(jnp.float32(z))
        assert np.all(np.isfinite(slopes))


def test_alpha_four_thirds_solves_a_cubic():
    """Of two classes with gap g: (a − g/3)³ + a³ = 1 for a = p_1^{1/3}."""
    with jax.enable_x64(True):
        for gap in (0.0, 0.5, 2.0, 2.9):
            p = js.entmax(jnp.array([0.0, -gap]), 4 / 3)
            g = gap / 3
            roots = np.roots([2, -3 * g, 3 * g**2, -(g**3) - 1])
            (a,) = roots[np.abs(roots.imag) < 1e-9].real
            np.testing.assert_allclose(p, [a**3, (a - g) ** 3], rtol=1e-13)


@pytest.mark.parametrize("alpha", [1.0, 1.0001, 1.2, 1.5, 2.0, 3.0])
def test_derivatives(alpha):
    """Closed Jacobian; ∂p/∂α by central differences, through α = 1 too; both under a scan at order 2."""
    with jax.enable_x64(True):
        z, v = scores(9, seed=3), jnp.cos(jnp.arange(9.0))
        p = js.entmax(z, alpha)
        w = jnp.where(p > 0, p ** (2 - alpha), 0)
        want = jnp.diag(w) - jnp.outer(w, w) / w.sum()
        np.testing.assert_allclose(jax.jacrev(js.entmax)(z, alpha), want, rtol=1e-9, atol=1e-12)

        f = functools.partial(js.entmax, z)
        by_alpha = jax.jacfwd(f)(alpha)
        step = 1e-5
        if alpha > 1:
            np.testing.assert_allclose(by_alpha, (f(alpha + step) - f(alpha - step)) / (2 * step), atol=1e-8)
        else:
            log_p = jnp.log(p)
            np.testing.assert_allclose(by_alpha, -(p * log_p**2 - p * jnp.sum(p * log_p**2)) / 2, atol=1e-12)

        def total(z, alpha):
            return jnp.sum(v * js.entmax(z, alpha) ** 2)

        def scanned(z, alpha):
            return jax.lax.scan(lambda c, a: (c + total(a, alpha), None), 0.0, z[None])[0]

        for argnum in (0, 1):
            gradients = [jax.grad(f, argnum) for f in (total, scanned)]
            one, other = (jax.jvp(lambda z, g=g: g(z, jnp.asarray(alpha)), (z,), (v,))[1] for g in gradients)
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_alpha_for_each_row_is_traced_and_learned():
    z, alpha = jnp.float32(scores(4, 6)), jnp.array([[1.0], [1.3], [1.5], [2.0]])
    rows = jnp.stack([js.entmax(z[i], float(alpha[i, 0])) for i in range(4)])
    np.testing.assert_allclose(jax.jit(js.entmax)(z, alpha), rows, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(js.entmax)(z, alpha[:, 0]), rows, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda a: jnp.sum(js.entmax(z, a) ** 2))(alpha)
    assert gradient.shape == (4, 1)
    assert np.all(np.isfinite(gradient))


MAPS = [js.sparsemax, js.entmax15, functools.partial(js.entmax, alpha=1.7), functools.partial(js.entmax, alpha=3.0)]


@pytest.mark.parametrize("f", MAPS, ids=["sparsemax", "entmax15", "1.7", "3"])
def test_edges_axes_dtypes(f):
    nan, inf = jnp.nan, jnp.inf
    rows = jnp.array([[0.6, nan, 1.0], [0.6, inf, 1.0], [-inf] * 3, [0.6, -inf, 1.0], [1.0, 1.0, 1.0]])
    p = f(rows)
    assert np.all(np.isnan(p[:2]))
    np.testing.assert_array_equal(p[2], 0)
    part = f(jnp.array([0.6, 1.0]))
    np.testing.assert_allclose(p[3], [part[0], 0, part[1]], rtol=1e-6)
    np.testing.assert_allclose(p[4], 1 / 3, rtol=1e-6)
    mask = jnp.array([True, False, True])
    np.testing.assert_allclose(f(rows, where=mask)[0], p[3], rtol=1e-6)
    np.testing.assert_array_equal(f(rows, where=jnp.zeros(3, bool)), 0)

    def product(z):
        cotangent = jnp.cos(jnp.arange(6.0)).reshape(2, 3)
        return jax.jvp(lambda z: jax.vjp(f, z)[1](cotangent)[0], (z,), (jnp.ones_like(z),))[1]

    gradient = jax.vjp(f, rows)[1](jnp.arange(15.0).reshape(5, 3))[0]
    assert np.all(np.isnan(gradient[:2]).any(-1))
    assert np.all(np.isfinite(gradient[2:]))
    assert np.all(np.isfinite(product(rows[3:])))
    np.testing.assert_array_equal(gradient[2], 0)
    z = jnp.float32(scores(2, 3, 4))
    np.testing.assert_allclose(f(z, axis=(1, 2)), f(z.reshape(2, 12)).reshape(2, 3, 4), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(jnp.moveaxis(f(z, axis=0), 0, -1), f(jnp.moveaxis(z, 0, -1)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(f(z, axis=None).sum(), 1, rtol=1e-5)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32):
        with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
            narrow = jnp.asarray([[1, 2, -1]], dtype)
            p = f(narrow)
            assert p.dtype == (jnp.float32 if dtype == jnp.int32 else dtype)
            if dtype != jnp.int32:
                assert jax.grad(lambda z: f(z).astype(jnp.float32)[0, 0])(narrow).dtype == dtype
    assert f(jnp.zeros((2, 0))).shape == (2, 0)


def defined(z, q, alpha):
    p = js.entmax(z, alpha)

    def omega(p):
        safe = jnp.where(p > 0, p, 1)
        if alpha == 1:
            return jnp.sum(p * jnp.log(safe), -1)
        return jnp.sum(jnp.where(p > 0, safe**alpha - p, 0), -1) / (alpha * (alpha - 1))

    return jnp.sum(p * z, -1) - omega(p) + omega(q) - jnp.sum(z * q, -1)


@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0, 3.0])
def test_fenchel_young_loss(alpha):
    with jax.enable_x64(True):
        z, labels = scores(6, 5, seed=4), jnp.array([0, 4, 2, 1, 3, 0])
        hot = jax.nn.one_hot(labels, 5, dtype=z.dtype)
        q = jax.nn.softmax(scores(6, 5, seed=5).at[:, 2].set(-jnp.inf))
        loss = functools.partial(js.fenchel_young_loss, alpha=alpha)
        np.testing.assert_allclose(loss(z, labels), defined(z, hot, alpha), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(loss(z, q), defined(z, q, alpha), rtol=1e-11, atol=1e-14)
        gradient = jax.grad(lambda z: loss(z, labels).sum())(z)
        np.testing.assert_allclose(gradient, js.entmax(z, alpha) - hot, rtol=1e-12, atol=1e-14)
        by_z, by_q = jax.grad(lambda z, q: loss(z, q).sum(), (0, 1))(z, q)
        np.testing.assert_allclose(by_z, js.entmax(z, alpha) - q, rtol=1e-12, atol=1e-14)
        change = jax.nn.softmax(scores(6, 5, seed=6).at[:, 2].set(-jnp.inf)) - q
        step = 1e-6
        along = (defined(z, q + step * change, alpha) - defined(z, q - step * change, alpha)) / (2 * step)
        np.testing.assert_allclose(jnp.sum(by_q * change, -1), along, rtol=1e-6, atol=1e-8)
        assert np.all(loss(z, labels) >= 0)
        np.testing.assert_allclose(loss(z, js.entmax(z, alpha)), 0, atol=1e-15)
        if alpha > 1:
            sure = jnp.zeros(5).at[1].set(1 / (alpha - 1) + 1e-9)
            assert loss(sure, jnp.array(1)) == 0


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_fenchel_young_loss_of_distributions_is_not_negative(alpha):
    """In float32, far from 0 too: a shift of the scores changes nothing, but their own rounding."""
    for shift in (0.0, 1000.0):
        z = jnp.float32(scores(200, 6, seed=8)) + shift
        p = js.entmax(z, alpha)
        assert np.min(js.fenchel_young_loss(z, p, alpha)) >= 0
        np.testing.assert_allclose(js.fenchel_young_loss(z, p, alpha), 0, atol=1e-12)
        far = js.fenchel_young_loss(z, p[::-1], alpha)
        np.testing.assert_allclose(far, js.fenchel_young_loss(z - shift, p[::-1], alpha), rtol=1e-5, atol=1e-6)


def test_fenchel_young_digits():
    """Small losses of right answers keep their digits: against float64 of the definition's terms."""
    for alpha in (1.0, 1.5, 2.0):
        edge = 8.0 if alpha == 1 else 1 / (alpha - 1)
        for gap in (edge - 0.5, edge - 0.01, edge - 1e-3):
            z = np.float32([gap, 0.0, -0.125])
            got = js.fenchel_young_loss(jnp.asarray(z), jnp.array(0), alpha)
            with jax.enable_x64(True):
                want = js.fenchel_young_loss(jnp.float64(z), jnp.array(0), alpha)
                plain = defined(jnp.float64(z), jnp.array([1.0, 0, 0]), alpha)
            np.testing.assert_allclose(want, plain, rtol=1e-6)
            # t is as uncertain as the rounding of the largest p, and the loss is of second order in the gap to the edge
            np.testing.assert_allclose(got, want, rtol=2e-6 / (1 if alpha == 1 else edge - gap))


def test_fenchel_young_edges():
    nan, inf = jnp.nan, jnp.inf
    z = jnp.array([[0.0, 1.0], [nan, 1.0], [inf, 0.0], [-inf, 0.0], [0.0, 1.0], [0.0, 1.0], [-inf, -inf]])
    labels = jnp.array([0, 0, 0, 0, 2, -1, 0])
    for alpha in (1.0, 1.5, 2.0, 3.0):
        loss = js.fenchel_young_loss(z, labels, alpha)
        assert np.isfinite(loss[0])
        np.testing.assert_array_equal(loss[1:], [nan, nan, inf, nan, nan, inf])
        gradient = jax.grad(lambda z, a=alpha: js.fenchel_young_loss(z, labels, a).sum())(z)
        np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, True, False, False, False, False])
        assert js.fenchel_young_loss(z, labels, alpha, ignore_label=-1)[5] == 0
        quiet = js.fenchel_young_loss(z, labels, alpha, where=jnp.arange(7) == 0)
        np.testing.assert_array_equal(quiet[1:], 0)
        q = jnp.array([[0.0, 1.0], [0.5, 0.5]])
        out = jnp.array([[-inf, 0.3], [-inf, 0.3]])
        np.testing.assert_array_equal(js.fenchel_young_loss(out, q, alpha), [0, inf])
        assert np.all(np.isfinite(jax.grad(lambda z, q=q, a=alpha: js.fenchel_young_loss(z, q, a).sum())(out)))
    z = jnp.float32(scores(5, 7))
    np.testing.assert_allclose(
        js.fenchel_young_loss(z, jnp.arange(5), 1), losses.cross_entropy(z, jnp.arange(5)), rtol=2e-6
    )
    assert js.fenchel_young_loss(z.astype(jnp.bfloat16), jnp.arange(5)).dtype == jnp.float32


def test_residuals():
    z = jnp.cos(jnp.arange(1000.0))
    for f in (js.sparsemax, js.entmax15, functools.partial(js.entmax, alpha=1.3)):
        _, pull = jax.vjp(f, z)
        kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= 1000]
        assert sum(leaf.nbytes for leaf in kept) <= 2.25 * z.nbytes


raw = inspect.unwrap
Z, LABELS = np.zeros((2, 3)), np.array([0, 1])
WRONG = [
    (lambda: raw(js.entmax)(Z, 0.5), ValueError, "entmax: alpha must be >= 1 and finite; got 0.5"),
    (lambda: raw(js.entmax)(Z, np.inf), ValueError, "entmax: alpha must be >= 1 and finite"),
    (lambda: raw(js.entmax)(Z, jnp.ones(2)), ValueError, "entmax: alpha must be one number, or one for each row"),
    (lambda: raw(js.entmax)(Z, None), TypeError, "entmax: alpha must be an array or a number"),
    (lambda: raw(js.sparsemax)(Z, axis=2), ValueError, "sparsemax: axis 2 is out of range"),
    (lambda: raw(js.entmax15)(Z, where=np.ones(3)), TypeError, "entmax15: where must be boolean"),
    (lambda: raw(js.entmax15)([1.0]), TypeError, "entmax15: z must be an array"),
    (lambda: raw(js.fenchel_young_loss)(Z, LABELS[:1]), ValueError, "fenchel_young_loss: integer labels must have"),
    (lambda: raw(js.fenchel_young_loss)(Z, LABELS, 0), ValueError, "fenchel_young_loss: alpha must be >= 1"),
    (lambda: raw(js.fenchel_young_loss)(Z, Z, ignore_label=1), ValueError, "ignore_label must be left out"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)
