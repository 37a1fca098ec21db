"""The sparse maps against the conditions that define them, reference values, closed forms; edges; the loss."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, some
from interpreter import evaluated
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import losses

ALPHAS = (1.0, 1.001, 1.1, 1.25, 4 / 3, 1.5, 1.7, 2.0, 2.5, 3.0, 5.0)
"""1.001 is near the limit, 1.5 has an integer power, 3 is beyond 2; α = 1 is softmax. Arrays of α have no integer
power."""


def scores(*shape, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


@functools.cache
def of_one(alpha, jit=jax.jit):
    """entmax for one α, which is a constant of the program."""
    return jit(functools.partial(js.entmax, alpha=alpha))


of_any = jax.jit(js.entmax)
"""entmax of an array of α: one program for all of them."""
of_any_wide = evaluated(js.entmax)


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


@pytest.mark.parametrize("alpha", some(ALPHAS, [1.5]))
def test_optimal(alpha):
    """By default one α, for which the array of them takes steps of its own; 3 in test_cases.py, by its maximum."""
    with jax.enable_x64(True):
        for classes in (1, 2, 7, 1000):
            z = np.concatenate([scores(20, classes, scale=s) for s in (1e-6, 0.1, 1.0, 5.0, 100.0)])
            for p in (of_one(alpha, evaluated)(z), of_any_wide(z, np.full((100, 1), alpha))):  # integer powers, any
                check_optimal(z, p, alpha, 1e-9)
    p = of_one(alpha)(np.float32(scores(50, 300, scale=2)))
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


@pytest.mark.parametrize("alpha", some(ALPHAS, [1.001]))
def test_small_probabilities_of_ties_keep_their_digits(alpha):
    """100,000 classes: all equal, and one above them that takes its share. By default of an α near the limit, where
    each class keeps a share."""
    classes = 100_000
    tied = jnp.zeros(classes)
    for p in (of_one(alpha)(tied), of_any(tied, np.full(1, alpha, np.float32))):
        np.testing.assert_allclose(p, 1e-5, rtol=3e-6 * max(1, alpha - 1))
    if alpha <= 2:
        above = jnp.float32(1e-6)
        p = of_one(alpha)(tied.at[7].set(above))
        with jax.enable_x64(True):
            want = of_one(alpha, evaluated)(np.where(np.arange(classes) == 7, np.float64(above), 0.0))
        np.testing.assert_allclose(p, want, rtol=2e-5)


@pytest.mark.parametrize("alpha", some([1.3, 1.5, 1.7, 2.0], [1.7]))
def test_sums_are_1_where_the_support_shrinks_slowly(alpha):
    """One class about 1/(α − 1) above many that are nearly equal: Newton's steps leave them group after group."""
    others = np.random.default_rng(2).normal(0, 1e-4, 5000)
    for offset in (-3e-4, 0, 3e-4, 6e-4):
        z = np.append(others, 1 / (alpha - 1) + offset).astype(np.float32)
        np.testing.assert_allclose(of_one(alpha)(z).sum(), 1, rtol=5e-6)
        with jax.enable_x64(True):
            np.testing.assert_allclose(of_one(alpha, evaluated)(np.float64(z)).sum(), 1, rtol=1e-12)


@jax.jit
def probabilities_and_slopes(z, alpha):
    return js.entmax(z, alpha), jax.grad(lambda z: jnp.sum(jnp.cos(z) * js.entmax(z, alpha)))(z)


@pytest.mark.parametrize("alpha", some([3.0, 4.0, 6.0, 10.0, 50.0, 1000.0], [4.0, 1000.0]))
def test_large_alpha_gives_probabilities(alpha):
    """Rounding leaves a small p uncertain there, but not the sum; each is within what a unit of 1 makes of p^{α−1}."""
    eps = np.finfo(np.float32).eps
    rows = np.float32([*scores(500, 8), *(0.1 * scores(500, 8, seed=1))])
    for z in (rows, np.zeros((1, 2), np.float32), np.float32([[-0.56, -0.39]])):
        alphas = np.full((len(z), 1), alpha)
        p, slopes = probabilities_and_slopes(z, np.float32(alphas))
        np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
        with jax.enable_x64(True):
            want = np.asarray(of_any_wide(np.float64(z), alphas))
        np.testing.assert_allclose(want.sum(-1), 1, rtol=1e-12)
        assert np.max(np.abs(p - want)) <= 4 * eps ** (1 / (alpha - 1))
        if alpha <= 10:  # beyond, the weights p^{2−α} overflow
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


STEP = 1e-5


@evaluated
def derivatives(z, v, alpha):
    """p beside α, ∂p/∂α, and the Hessian products of a sum, under a scan and not, with what varies in z and in α."""

    def total(z, alpha):
        return jnp.sum(v * js.entmax(z, alpha) ** 2)

    def scanned(z, alpha):
        return jax.lax.scan(lambda c, a: (c + total(a, alpha), None), 0.0, z[None])[0]

    def product(f, argnum):
        return jax.jvp(lambda z: jax.grad(f, argnum)(z, alpha), (z,), (v,))[1]

    f = functools.partial(js.entmax, z)
    products = [[product(g, argnum) for g in (total, scanned)] for argnum in (0, 1)]
    return f(jnp.maximum(alpha - STEP, 1)), f(alpha), f(alpha + STEP), jax.jacfwd(f)(alpha), products


@pytest.mark.parametrize("alpha", some([1.0, 1.0001, 1.2, 1.5, 2.0, 3.0], [1.0001, 1.5, 3.0]))
def test_derivatives(alpha):
    """Closed Jacobian; ∂p/∂α by central differences, through α = 1 too; both under a scan at order 2."""
    with jax.enable_x64(True):
        z, v = scores(9, seed=3), np.cos(np.arange(9.0))
        p, jacobian = evaluated(lambda z: (js.entmax(z, alpha), jax.jacrev(js.entmax)(z, alpha)))(z)
        w = np.where(p > 0, p ** (2 - alpha), 0)
        np.testing.assert_allclose(jacobian, np.diag(w) - np.outer(w, w) / w.sum(), rtol=1e-9, atol=1e-12)
        below, at, above, by_alpha, products = derivatives(z, v, alpha)
        np.testing.assert_allclose(at, p, rtol=1e-9, atol=1e-12)
        if alpha > 1:
            np.testing.assert_allclose(by_alpha, (above - below) / (2 * STEP), atol=1e-8)
        else:
            log_p = np.log(p)
            np.testing.assert_allclose(by_alpha, -(p * log_p**2 - p * np.sum(p * log_p**2)) / 2, atol=1e-12)
        for one, other in products:
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_alpha_for_each_row_is_traced_and_learned():
    z, alpha = jnp.float32(scores(4, 6)), jnp.array([[1.0], [1.3], [1.5], [2.0]])
    alphas = [float(a) for a in alpha[:, 0]]

    @evaluated
    def found(z, alpha):
        rows = jnp.stack([js.entmax(z[i], a) for i, a in enumerate(alphas)])
        gradient = jax.grad(lambda a: jnp.sum(js.entmax(z, a) ** 2))(alpha)
        return rows, js.entmax(z, alpha), jax.vmap(js.entmax)(z, alpha[:, 0]), gradient

    rows, whole, mapped, gradient = found(z, alpha)
    for other in (whole, mapped):
        np.testing.assert_allclose(other, rows, rtol=1e-5, atol=1e-6)
    assert gradient.shape == (4, 1)
    assert np.all(np.isfinite(gradient))


MAPS = {
    "sparsemax": js.sparsemax,
    "entmax15": js.entmax15,
    "1.7": functools.partial(js.entmax, alpha=1.7),
    "3": functools.partial(js.entmax, alpha=3.0),
}


@pytest.mark.parametrize("name", some(MAPS, ["1.7"]))
def test_edges_and_axes(name):
    """The power of 1.5 is an integer as that of 2 is, and 3 is as 1.7: of both are the dtypes below."""
    f = MAPS[name]
    nan, inf = jnp.nan, jnp.inf
    rows = jnp.array([[0.6, nan, 1.0], [0.6, inf, 1.0], [-inf] * 3, [0.6, -inf, 1.0], [1.0, 1.0, 1.0]])
    mask = np.array([True, False, True])
    z = np.float32(scores(2, 3, 4))

    @evaluated
    def found(rows, z):
        def product(z):
            cotangent = jnp.cos(jnp.arange(6.0)).reshape(2, 3)
            return jax.jvp(lambda z: jax.vjp(f, z)[1](cotangent)[0], (z,), (jnp.ones_like(z),))[1]

        masked = f(rows, where=mask), f(rows, where=np.zeros(3, bool))
        gradient = jax.vjp(f, rows)[1](jnp.arange(15.0).reshape(5, 3))[0]
        two_axes = f(z, axis=(1, 2)), f(z.reshape(2, 12)).reshape(2, 3, 4)
        first_axis = jnp.moveaxis(f(z, axis=0), 0, -1), f(jnp.moveaxis(z, 0, -1))
        part = f(rows[0, ::2])
        return f(rows), part, masked, gradient, product(rows[3:]), two_axes, first_axis, f(z, axis=None).sum()

    p, part, masked, gradient, product, two_axes, first_axis, whole = found(rows, z)
    assert np.all(np.isnan(p[:2]))
    np.testing.assert_array_equal(p[2], 0)
    np.testing.assert_allclose(p[3], [part[0], 0, part[1]], rtol=1e-6)
    np.testing.assert_allclose(p[4], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(masked[0][0], p[3], rtol=1e-6)
    np.testing.assert_array_equal(masked[1], 0)
    assert np.all(np.isnan(gradient[:2]).any(-1))
    assert np.all(np.isfinite(gradient[2:]))
    assert np.all(np.isfinite(product))
    np.testing.assert_array_equal(gradient[2], 0)
    for one, other in (two_axes, first_axis):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(whole, 1, rtol=1e-5)
    assert f(jnp.zeros((2, 0))).shape == (2, 0)


DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32]
OF_DTYPES = and_full([("sparsemax", jnp.bfloat16), ("3", jnp.int32)], itertools.product(MAPS, DTYPES))
"""By default a narrow dtype and integers: no code asks for others, or for a map and a dtype."""


@pytest.mark.parametrize(("name", "dtype"), OF_DTYPES)
def test_dtypes(name, dtype):
    f = MAPS[name]
    with strict_promotion(), jax.debug_nans(True):
        narrow = jnp.asarray([[1, 2, -1]], dtype)
        assert evaluated(f)(narrow).dtype == (jnp.float32 if dtype == jnp.int32 else dtype)
        if dtype != jnp.int32:
            gradient = evaluated(jax.grad(lambda z: f(z).astype(jnp.float32)[0, 0]))
            assert gradient(narrow).dtype == dtype


def defined(z, q, alpha):
    p = js.entmax(z, alpha)

    def omega(p):
        safe = jnp.where(p > 0, p, 1)
        if alpha == 1:
            return jnp.sum(p * jnp.log(safe), -1)
        return jnp.sum(jnp.where(p > 0, safe**alpha - p, 0), -1) / (alpha * (alpha - 1))

    return jnp.sum(p * z, -1) - omega(p) + omega(q) - jnp.sum(z * q, -1)


@pytest.mark.parametrize("alpha", some([1.0, 1.1, 1.5, 2.0, 3.0], [1.5]))
def test_fenchel_young_loss(alpha):
    """By default of one α, since the loss takes the map, of which more are above. That of α = 1 is the cross-entropy,
    as is shown below."""
    with jax.enable_x64(True):
        z, labels = scores(6, 5, seed=4), jnp.array([0, 4, 2, 1, 3, 0])
        hot = np.eye(5)[labels]
        q, other = (np.exp(scores(6, 5, seed=seed)) * (np.arange(5) != 2) for seed in (5, 6))
        q, other = (a / a.sum(-1, keepdims=True) for a in (q, other))
        change, step = other - q, 1e-6
        loss = functools.partial(js.fenchel_young_loss, alpha=alpha)

        @evaluated
        def found(z, q):
            p = js.entmax(z, alpha)
            by_labels = loss(z, labels), defined(z, hot, alpha), jax.grad(lambda z: loss(z, labels).sum())(z)
            by_q = loss(z, q), defined(z, q, alpha), jax.grad(lambda z, q: loss(z, q).sum(), (0, 1))(z, q)
            along = (defined(z, q + step * change, alpha) - defined(z, q - step * change, alpha)) / (2 * step)
            return p, by_labels, by_q, along, loss(z, p)

        p, (of_labels, plain, gradient), (of_q, plain_q, (by_z, by_q)), along, least = found(z, q)
        np.testing.assert_allclose(of_labels, plain, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(of_q, plain_q, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(gradient, p - hot, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(by_z, p - q, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(np.sum(by_q * change, -1), along, rtol=1e-6, atol=1e-8)
        assert np.all(of_labels >= 0)
        np.testing.assert_allclose(least, 0, atol=1e-15)
        if alpha > 1:
            sure = np.zeros(5)
            sure[1] = 1 / (alpha - 1) + 1e-9
            assert loss(sure, jnp.array(1)) == 0


@pytest.mark.parametrize("alpha", some([1.0, 1.3, 1.5, 2.0], [1.3]))
def test_fenchel_young_loss_of_distributions_is_not_negative(alpha):
    """In float32, far from 0 too: a shift of the scores changes nothing, but their own rounding. By default of one α
    whose powers are neither roots nor products, so that they are rounded more."""
    loss = jax.jit(functools.partial(js.fenchel_young_loss, alpha=alpha))
    for shift in (0.0, 1000.0):
        z = np.float32(scores(200, 6, seed=8)) + np.float32(shift)
        p = of_one(alpha)(z)
        assert np.min(loss(z, p)) >= 0
        np.testing.assert_allclose(loss(z, p), 0, atol=1e-12)
        np.testing.assert_allclose(loss(z, p[::-1]), loss(z - np.float32(shift), p[::-1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", some([1.0, 1.5, 2.0], [1.5]))
def test_fenchel_young_digits(alpha):
    """Small losses of right answers keep their digits: against float64 of the definition's terms. By default of one α
    with an edge; α = 1 is the cross-entropy."""
    edge = 8.0 if alpha == 1 else 1 / (alpha - 1)
    loss, one = functools.partial(js.fenchel_young_loss, labels=jnp.array(0), alpha=alpha), np.eye(3)[0]
    narrow, wide = jax.jit(loss), evaluated(lambda z: (loss(z), defined(z, one, alpha)))
    for gap in (edge - 0.5, edge - 0.01, edge - 1e-3):
        z = np.float32([gap, 0.0, -0.125])
        got = narrow(z)
        with jax.enable_x64(True):
            want, plain = wide(np.float64(z))
        np.testing.assert_allclose(want, plain, rtol=1e-6)
        # t is as uncertain as the rounding of the largest p, and the loss is of second order in the gap to the edge
        np.testing.assert_allclose(got, want, rtol=2e-6 / (1 if alpha == 1 else edge - gap))


@pytest.mark.parametrize("alpha", some([1.0, 1.5, 2.0, 3.0], [1.5]))
def test_fenchel_young_edges(alpha):
    nan, inf = jnp.nan, jnp.inf
    z = jnp.array([[0.0, 1.0], [nan, 1.0], [inf, 0.0], [-inf, 0.0], [0.0, 1.0], [0.0, 1.0], [-inf, -inf]])
    labels = jnp.array([0, 0, 0, 0, 2, -1, 0])
    q, out = jnp.array([[0.0, 1.0], [0.5, 0.5]]), jnp.array([[-inf, 0.3], [-inf, 0.3]])
    loss = functools.partial(js.fenchel_young_loss, alpha=alpha)

    @evaluated
    def found(z, out):
        by_z, by_out = (jax.grad(lambda z, y=y: loss(z, y).sum())(a) for a, y in ((z, labels), (out, q)))
        ignored, quiet = loss(z, labels, ignore_label=-1), loss(z, labels, where=jnp.arange(7) == 0)
        return loss(z, labels), by_z, ignored, quiet, loss(out, q), by_out

    value, by_z, ignored, quiet, of_q, by_out = found(z, out)
    assert np.isfinite(value[0])
    np.testing.assert_array_equal(value[1:], [nan, nan, inf, nan, nan, inf])
    np.testing.assert_array_equal(np.isnan(by_z).any(-1), [False, True, True, False, False, False, False])
    assert ignored[5] == 0
    np.testing.assert_array_equal(quiet[1:], 0)
    np.testing.assert_array_equal(of_q, [0, inf])
    assert np.all(np.isfinite(by_out))


def test_fenchel_young_of_alpha_one_is_the_cross_entropy():
    z = jnp.float32(scores(5, 7))
    np.testing.assert_allclose(
        js.fenchel_young_loss(z, jnp.arange(5), 1), losses.cross_entropy(z, jnp.arange(5)), rtol=2e-6
    )
    assert js.fenchel_young_loss(z.astype(jnp.bfloat16), jnp.arange(5)).dtype == jnp.float32


def test_residuals():
    z = jnp.cos(jnp.arange(1000.0))
    for f in (js.sparsemax, js.entmax15, functools.partial(js.entmax, alpha=1.3)):
        pull = jax.eval_shape(lambda z, f=f: jax.vjp(f, z)[1], z)
        kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= 1000]
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in kept) <= 2.25 * z.nbytes


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


def test_a_sink_is_one_more_class():
    """As of the scores with it behind, of every axis and by the sink; none left over for an empty row."""
    with jax.enable_x64(True):
        z, sink = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4))), jnp.asarray([[[0.3]], [[-0.4]]])

        def joined(z, sink, alpha):
            return js.entmax(jnp.concatenate([z, jnp.broadcast_to(sink, (2, 3, 1))], -1), alpha)[..., :-1]

        def both(f, g, *given):
            def results(f):
                total = lambda *given: jnp.sum(jnp.cos(jnp.arange(24.0)).reshape(2, 3, 4) * f(*given))  # noqa: E731
                gradient = jax.grad(total, (0, 1))
                return f(*given), *jax.jvp(gradient, given, tuple(map(jnp.cos, given)))

            programs = [evaluated(functools.partial(results, h)) for h in (f, g)]
            for a, b in zip(*(jax.tree.leaves(program()) for program in programs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)

        both(lambda z, s: js.entmax(z, 1.7, sink=s), lambda z, s: joined(z, s, 1.7), z, sink)

        @evaluated
        def results(z, sink):
            moved = js.sparsemax(jnp.moveaxis(z, -1, 0), 0, sink=0.3)
            several = js.entmax15(z, (1, 2), sink=0.1).reshape(2, 12), js.entmax15(z.reshape(2, 12), sink=0.1)
            pairs = (
                (js.entmax(z, 1.0, sink=sink), js.sink_softmax(z, sink)),
                (jnp.moveaxis(moved, 0, -1), joined(z, 0.3, 2.0)),
                several,
                (js.entmax15(z, sink=-jnp.inf), js.entmax15(z)),
            )
            return pairs, js.sparsemax(z, where=jnp.zeros(4, bool), sink=0.0)

        pairs, of_nothing = results(z, sink)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-13)
        np.testing.assert_array_equal(of_nothing, 0)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)
