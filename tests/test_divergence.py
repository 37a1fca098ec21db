"""The Jensen–Shannon divergence in β, at its ends, and where a class has no probability; of scores and of heads."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cells import and_full
from compilation import jit_as_user
from interpreter import evaluated

import jsoftmax as js
from jsoftmax import heads
from jsoftmax.divergence import _log_ratios, log_ratios_to_mean

NO_SCORES, FLAT = jnp.ones((1, 1)), jnp.zeros((3, 1))


def of_scores(z_p, z_q, beta):
    return js.jensen_shannon_divergence(z_p, z_q, beta=beta)


def of_heads(z_p, z_q, beta):
    """The same scores as the biases of heads that have no others."""
    return heads.linear_jsd(NO_SCORES, FLAT, NO_SCORES, FLAT, z_p, z_q, beta=beta)[0]


@functools.cache
def derivatives(divergence):
    """Value and gradient of all arguments; one program for all rows."""
    return jit_as_user(jax.value_and_grad(divergence, (0, 1, 2)))


BOTH = pytest.mark.parametrize("divergence", [of_scores, of_heads])
Z, OUT, EMPTY = jnp.array([0.0, 1.0, -1.0]), jnp.array([0.5, 1.0, -jnp.inf]), jnp.full(3, -jnp.inf, jnp.float32)


def test_of_all_arguments():
    """Gradient and Hessian product in scores, β, a prior and φ's parameter, under a mask."""
    rng = np.random.default_rng(0)
    keep, axis = jnp.arange(6).reshape(2, 3) != 4, (1, 2)

    def weighted(D):
        return jnp.vdot(jnp.cos(jnp.arange(D.size)), D)

    def ours(z_p, z_q, log_w, beta, epsilon):
        options = {"where": keep, "beta": beta, "phi": js.spherical(epsilon), "log_weights": log_w}
        return weighted(js.jensen_shannon_divergence(z_p, z_q, axis, **options))

    def plain(z_p, z_q, log_w, beta, epsilon):
        options = {"where": keep, "phi": js.spherical(epsilon), "log_weights": log_w}
        p, q = (jnp.where(keep, js.softmax(z, axis, **options), 1) for z in (z_p, z_q))
        log_m = jnp.log(beta * p + (1 - beta) * q)
        terms = beta * p * (jnp.log(p) - log_m) + (1 - beta) * q * (jnp.log(q) - log_m)
        return weighted(jnp.sum(terms, axis))

    def derivatives(f, given):
        gradient = jax.grad(f, tuple(range(5)))
        return f(*given), *jax.jvp(gradient, given, jax.tree.map(jnp.cos, given))

    with jax.enable_x64(True):
        given = (*(jnp.asarray(rng.normal(size=(4, 2, 3))) for _ in range(2)), jnp.asarray(rng.normal(size=(2, 3))))
        given = (*given, jnp.asarray(0.3), jnp.asarray(0.1))
        found, want = (evaluated(lambda given, f=f: derivatives(f, given))(given) for f in (ours, plain))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@BOTH
@pytest.mark.parametrize("beta", [1e-8, 1e-5, 1e-3, 0.5])
def test_digits_of_far_scores(divergence, beta):
    """What β adds to q where q is large keeps its digits in the gradient, in float32."""
    z_p, z_q = jnp.array([0.0, -3.0, -6.0]), jnp.array([-3.0, 0.0, -30.0])
    found = derivatives(divergence)(z_p, z_q, beta)[1][1]
    p, q = (np.exp(np.float64(z)) / np.sum(np.exp(np.float64(z))) for z in (z_p, z_q))
    share = np.float64(np.float32(beta))
    r = -np.log1p(share * (p / q - 1))
    np.testing.assert_allclose(found, (1 - share) * q * (r - np.sum(q * r)), rtol=3e-6, atol=1e-12 * beta)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logarithms_of_ratios(dtype):
    """log (p/m), log (q/m) and their first two derivatives in log p, near and far, have the digits of the dtype; so has
    the derivative in β, (q − p)/m, of its larger part."""
    far = [88, 90, 92, 95] if dtype == np.float32 else [230, 300, 570, 639, 700, 710, 720]
    sizes = np.array([1e-6, 0.1, 0.49, 0.51, 2, 10, 40, 50, 79, 81, 86, *far])
    delta = np.array([0, *sizes, *-sizes], dtype)
    tiny = [1.2e-38, 1e-36, 1e-30] if dtype == np.float32 else [3e-308, 1e-300, 1e-100]
    betas = np.array([0.0, *tiny, 0.4 * np.finfo(dtype).eps, 1e-7, 0.25, 0.5, 0.75, 1 - 2.0**-20, 1.0], dtype)

    def ratios(log_p, log_q, beta):
        return jnp.stack(log_ratios_to_mean(jnp.exp(log_p), jnp.exp(log_q), beta, log_p, log_q))

    def along(f, a):
        return jax.jvp(f, (a,), (jnp.ones_like(a),))

    def derivatives(log_p, log_q, beta):
        value, rates = along(lambda log_p: along(lambda log_p: ratios(log_p, log_q, beta), log_p), log_p)
        by_beta = [] if beta is None else along(lambda beta: ratios(log_p, log_q, beta), beta)[1:]
        return *value, rates[1], *by_beta

    with jax.enable_x64(dtype == np.float64):
        log_p, log_q = (jnp.minimum(jnp.asarray(a), 0) for a in (delta, -delta))
        found = jit_as_user(jax.vmap(derivatives, (None, None, 0)))(log_p, log_q, betas)
        of_half = jit_as_user(functools.partial(derivatives, beta=None))(log_p, log_q)
        there = jnp.exp(log_p) > 0, jnp.exp(log_q) > 0
    rows = [(beta, np.stack(found, -1)[i]) for i, beta in enumerate(betas.tolist())]
    for beta, got in [*rows, (0.5, np.stack(of_half, -1))]:
        for k, d in enumerate(delta.tolist()):
            for row, sign in enumerate((1, -1)):
                with mpmath.workdps(400):
                    own = mpmath.mpf(beta) if row == 0 else 1 - mpmath.mpf(beta)
                    other = (1 - own) * mpmath.exp(-sign * mpmath.mpf(d))
                    m = own + other
                    want = [-mpmath.log(m), sign * other / m, -own * other / m**2]
                    shares = [1 / m, mpmath.exp(-sign * mpmath.mpf(d)) / m]  # of p and q, or of q and p
                want = [float(a) * bool(there[row][k]) for a in want]
                rtol = 32 * np.finfo(dtype).eps  # XLA's log1p and expm1 of float64 lose 20
                np.testing.assert_allclose(got[row, k, :3], want, rtol, 1e-30, err_msg=f"{beta} {row} {d}")
                if got.shape[-1] == 4 and max(shares) < float(np.finfo(dtype).max):
                    by_beta = float(sign * (shares[1] - shares[0])) * bool(there[row][k])
                    size = float(max(shares))
                    np.testing.assert_allclose(got[row, k, 3] / size, by_beta / size, 0, rtol, err_msg=f"{beta} {d}")


def test_logarithms_without_their_rule():
    """Scans of JAX 0.10 leave a rule out of second derivatives: autodiff of the formula then gives the same."""
    delta = jnp.array([0, 0.1, 0.4, 0.6, 2, 10, 16, 17, 40, 50, 90, 200, jnp.inf])
    delta = jnp.hstack([delta, -delta])

    @evaluated
    def of_both(beta):
        def orders(f, beta):
            def of_each(delta):
                def value(delta):
                    return jnp.stack(f(delta, beta))

                return value(delta), jax.jacfwd(value)(delta), jax.jacfwd(jax.jacrev(value))(delta)

            def by_beta(beta):
                return jnp.stack(f(jnp.clip(delta, -50, 50), beta))

            return jax.vmap(of_each)(delta), [] if beta is None else jax.jacfwd(by_beta)(beta)

        return [[orders(f, b) for b in (beta, None)] for f in (_log_ratios.__wrapped__, _log_ratios)]

    for beta in (0.0, 1e-8, 1e-3, 0.25, 1.0):
        found, want = of_both(beta)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("divergence", "beta"), and_full([(of_scores, 0.5), (of_scores, 0.25)], [(of_heads, 0.5), (of_heads, 0.25)])
)
def test_third_derivatives_of_far_scores(divergence, beta):
    """Those of float64 near, and near 0, not NaN, where the square of p/q overflows. By default of scores: heads take
    their logarithms."""

    def third(z_p, z_q):
        hessian = jax.hessian(lambda z_p: divergence(z_p, z_q, beta))
        return jax.jvp(hessian, (z_p,), (jnp.cos(z_p),))[1]

    far = np.array([[0.0, -30.0, -1.0], [0.0, -50.0, -60.0], [0.0, -75.0, -1.0]])
    found = evaluated(jax.vmap(third))(jnp.float32(far), jnp.float32(far[:, [1, 2, 0]]))
    with jax.enable_x64(True):
        want = evaluated(jax.vmap(third))(jnp.asarray(far), jnp.asarray(far[:, [1, 2, 0]]))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_half_is_what_an_array_of_one_half_is():
    """β = ½ as a number of Python has a formula of its own: value, gradient and Hessian product, near, far and out."""
    far, very_far = jnp.array([0.0, -30.0, -60.0]), jnp.array([0.0, -300.0, -400.0])
    rows = (Z, -Z), (Z, Z), (Z, OUT), (OUT, Z), (far, jnp.flip(far)), (very_far, jnp.flip(very_far)), (EMPTY, Z)
    z_p, z_q = (jnp.stack(z) for z in zip(*rows, strict=True))

    @jit_as_user
    def of_both(z_p, z_q, beta):
        def results(beta):
            def total(*given):
                return jnp.sum(js.jensen_shannon_divergence(*given, beta=beta))

            gradient, along = jax.grad(total, (0, 1)), tuple(jnp.broadcast_to(z, z_p.shape) for z in (Z, jnp.cos(Z)))
            return js.jensen_shannon_divergence(z_p, z_q, beta=beta), jax.jvp(gradient, (z_p, z_q), along)

        return results(0.5), results(beta)

    found, want = of_both(z_p, z_q, 0.5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    assert jnp.all(found[0][1] == 0)
    np.testing.assert_allclose(found[0][5], np.log(2), rtol=1e-6)


@BOTH
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_ends(divergence, beta):
    """0, with derivatives 0 in the scores, also where a class is possible for one alone; in β ± a divergence."""
    for z_p, z_q in ((Z, OUT), (OUT, Z), (Z, -Z)):
        value, (by_p, by_q, by_beta) = derivatives(divergence)(z_p, z_q, beta)
        assert value == 0
        np.testing.assert_array_equal([by_p, by_q], 0)
        assert np.isfinite(by_beta)
    want = js.kl_divergence(Z, -Z) if beta == 0 else -js.kl_divergence(-Z, Z)
    np.testing.assert_allclose(by_beta, want, rtol=1e-6)


@BOTH
def test_a_law_without_classes_beside_one_that_is_nan(divergence):
    """Everything is NaN, the derivatives in the scores of the former, too."""
    for z_q in (Z.at[0].set(jnp.nan), Z.at[0].set(jnp.inf)):
        for given in ((EMPTY, z_q, 0.25), (z_q, EMPTY, 0.25)):
            value, gradients = derivatives(divergence)(*given)
            assert jnp.isnan(value)
            assert jnp.all(jnp.isnan(jnp.hstack(gradients[:2]))), gradients


@BOTH
def test_a_traced_beta_out_of_range_gives_nan(divergence):
    for beta in (-0.5, 1.5):
        assert jnp.isnan(derivatives(divergence)(Z, -Z, beta)[0])


@BOTH
def test_impossible_classes(divergence):
    """A class of one of them alone adds a finite number; no class left: 0; NaN and +inf: NaN."""
    p, q = np.float64(jax.nn.softmax(Z)), np.float64(jax.nn.softmax(OUT))
    m = 0.25 * p + 0.75 * q
    want = 0.25 * np.sum(p * np.log(p / m)) + 0.75 * np.sum(q[:2] * np.log(q[:2] / m[:2]))
    for given in ((Z, OUT, 0.25), (OUT, Z, 0.75)):
        value, (by_p, by_q, _) = derivatives(divergence)(*given)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        assert np.all(np.isfinite([by_p, by_q]))
    for given in ((EMPTY, Z, 0.25), (Z, EMPTY, 0.25), (EMPTY, EMPTY, 0.25)):
        value, gradients = derivatives(divergence)(*given)
        assert value == 0
        np.testing.assert_array_equal(jnp.hstack(gradients), 0)
    many = jnp.float32(np.random.default_rng(1).normal(0, 2, (30, 3)))
    of_many = evaluated(jax.vmap(jax.grad(divergence, 1), (None, 0, None)))
    np.testing.assert_array_equal(of_many(EMPTY, many, 0.3), 0)
    far, _ = derivatives(divergence)(jnp.array([0, -300.0, -400.0]), jnp.array([-300.0, 0, -400]), 0.5)
    np.testing.assert_allclose(far, np.log(2))
    for bad in (jnp.nan, jnp.inf):
        assert np.isnan(derivatives(divergence)(Z, Z.at[0].set(bad), 0.25)[0])
        assert np.isnan(derivatives(divergence)(Z.at[2].set(bad), Z, 0.25)[0])


def test_a_bad_row_stays_alone():
    rows = jnp.stack([Z, Z.at[1].set(jnp.nan), OUT])
    value, gradient = jax.vmap(jax.value_and_grad(lambda z: of_scores(z, -Z, 0.25)))(rows)
    np.testing.assert_array_equal(np.isnan(value), [False, True, False])
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, False])


def test_beta_may_be_traced_and_mapped_over():
    betas = jnp.linspace(0, 1, 5)
    of_betas = jax.jit(jax.vmap(lambda beta: of_scores(Z, -Z, beta)))(betas)
    np.testing.assert_allclose(of_betas, [of_scores(Z, -Z, float(beta)) for beta in betas], rtol=1e-6)


def of_kl_heads(z_p, z_q):
    return heads.linear_kl(NO_SCORES, FLAT, NO_SCORES, FLAT, z_p, z_q)[0]


@functools.cache
def second_derivatives(divergence):
    """By reverse and by forward mode of the gradient; one program for all rows."""
    gradient = jax.grad(divergence, (0, 1))
    return evaluated(lambda *z: [mode(gradient, (0, 1))(*z) for mode in (jax.jacrev, jax.jacfwd)])


KL = pytest.mark.parametrize("divergence", [js.kl_divergence, of_kl_heads])


@KL
@pytest.mark.parametrize("of_p", [OUT, jnp.array([0.0, -100.0, -1.0]), EMPTY])
def test_gradient_of_a_gradient_of_kl(divergence, of_p):
    """Reverse over reverse is forward over reverse, also where log q − log p is so large that its power overflows."""
    for found, want in zip(*map(jax.tree.leaves, second_derivatives(divergence)(of_p, Z)), strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_bad_rows_beside_impossible_classes():
    """NaN and +inf make all derivatives NaN, in a row with a class that is left out too; also beside an empty row."""

    @evaluated
    def of_kl(*given):
        return [(jax.grad(f, 1)(*given), jax.jvp(f, given, (Z, Z))[1]) for f in (js.kl_divergence, of_kl_heads)]

    @evaluated
    def of_jsd(*given):
        return [jax.jvp(lambda *z, f=f: f(*z, 0.3), given, (Z, Z))[1] for f in (of_scores, of_heads)]

    for bad in (jnp.nan, jnp.inf):
        row = jnp.array([bad, 1, -jnp.inf])
        for given in ((row, OUT), (OUT, row), (row, row), (EMPTY, row)):
            assert all(np.all(np.isnan(a)) for a in jax.tree.leaves(of_kl(*given)))
        for given in ((EMPTY, row), (row, EMPTY)):
            assert np.all(np.isnan(of_jsd(*given)))
