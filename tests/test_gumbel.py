"""The Gumbel route: values, derivatives, edges. What is random is in test_gumbel_statistics.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, some
from interpreter import evaluated
from jax.scipy.special import gammaln

import jsoftmax as js
from jsoftmax import gumbel, losses, verify
from jsoftmax.gumbel import _categorical, _concrete, _noise

KEY = jax.random.key(0)
Z = jnp.array([[0.3, -1.2, 2.0, 0.7], [-0.5, 0.1, -2.0, 1.5]])
INDEX = jnp.array([1, 3])


# --- against plain forms, under every transformation, for every φ --------------------------------------------


def plain_scores(phi, z):
    return jnp.log(phi.definition(z, verify.Plain))


def plain_relaxed(phi, z, noise, tau):
    a = jnp.exp((plain_scores(phi, z) + noise) / tau)
    return a / jnp.sum(a)


def plain_density(phi, log_x, z, tau):
    d = plain_scores(phi, z) - tau * log_x
    count = z.shape[-1]
    return gammaln(count) + (count - 1) * jnp.log(tau) + jnp.sum(d) - count * jnp.log(jnp.sum(jnp.exp(d)))


def plain_subset(phi, z, noise, tau):
    a, total = plain_scores(phi, z) + noise, 0
    for _ in range(2):
        e = jnp.exp(a / tau)
        others = (jnp.ones((4, 4)) - jnp.eye(4)) @ e
        a, total = a + jnp.log(others / jnp.sum(e)), total + e / jnp.sum(e)
    return total


def plain_binary(phi, x, z, tau):
    y = plain_scores(phi, z) - tau * jnp.log(x / (1 - x))
    return jnp.log(tau) + y - 2 * jnp.log(1 + jnp.exp(y)) - jnp.log(x * (1 - x))


LOG_X = np.log([0.1, 0.2, 0.4, 0.3])
X = np.exp(LOG_X)
RECORDS = {  # name: ours(φ, z, τ), plain(φ, z, noise, τ)
    "gumbel_softmax": (
        lambda phi, z, tau: gumbel.gumbel_softmax(KEY, z, tau, phi=phi),
        plain_relaxed,
    ),
    "hard": (
        lambda phi, z, tau: gumbel.gumbel_softmax(KEY, z, tau, hard=True, phi=phi),
        lambda phi, z, noise, tau: (
            plain_relaxed(phi, z, noise, tau)
            - jax.lax.stop_gradient(plain_relaxed(phi, z, noise, tau))
            + jax.nn.one_hot(jnp.argmax(plain_scores(phi, z) + noise), 4)
        ),
    ),
    "exp_concrete": (
        lambda phi, z, tau: gumbel.exp_concrete(KEY, z, tau, phi=phi),
        lambda phi, z, noise, tau: jnp.log(plain_relaxed(phi, z, noise, tau)),
    ),
    "subset_softmax": (lambda phi, z, tau: gumbel.subset_softmax(KEY, z, 2, tau, phi=phi), plain_subset),
    "exp_concrete_log_density": (
        lambda phi, z, tau: gumbel.exp_concrete_log_density(LOG_X, z, tau, phi=phi),
        lambda phi, z, noise, tau: plain_density(phi, LOG_X, z, tau),
    ),
    "concrete_log_density": (
        lambda phi, z, tau: gumbel.concrete_log_density(X, z, tau, phi=phi),
        lambda phi, z, noise, tau: plain_density(phi, LOG_X, z, tau) - np.sum(LOG_X),
    ),
    "binary_concrete_log_density": (
        lambda phi, z, tau: gumbel.binary_concrete_log_density(X, z, tau, phi=phi),
        lambda phi, z, noise, tau: plain_binary(phi, X, z, tau),
    ),
    "gumbel_top_k": (
        lambda phi, z, tau: jnp.append(*gumbel.gumbel_top_k(KEY, z, 2, phi=phi)[1:]),
        lambda phi, z, noise, tau: (
            jnp.sort(plain_scores(phi, z) + noise)[:0:-1] - jnp.log(jnp.sum(phi.definition(z, verify.Plain)))
        ),
    ),
}


def weighted(value):
    return jnp.sum(jnp.cos(jnp.arange(1.0, 1 + value.size)) * jnp.ravel(value))


@pytest.mark.parametrize("phi", some([js.exp, js.spherical(0.1)], [js.spherical(0.1)]), ids=str)
def test_equals_the_plain_form_under_every_transformation(phi):
    """All records in one program: values, and derivatives in scores, temperature and φ to order two, inside a scan of
    a remat of a vmap; the plain ones are made without the scan."""
    function = verify.FUNCTIONS[0]
    rows = np.stack([verify.scores(function, phi, seed)[0] for seed in (3, 4)]).astype(np.float64)

    def through(f, in_a_scan):
        def total(phi, z, tau):
            if not in_a_scan:
                return jnp.sum(jax.vmap(lambda z: weighted(f(phi, z, tau)))(z))

            def body(carry, row):
                value = jax.checkpoint(jax.vmap(lambda z: weighted(f(phi, z, tau))))(row[None])
                return carry + jnp.sum(value), None

            return jax.lax.scan(body, 0.0, z)[0]

        def first(phi, z, tau):
            return jax.grad(total, (0, 1, 2))(phi, z, tau)

        def along(phi, z, tau):
            v = (jax.tree.map(jnp.ones_like, phi), jnp.cos(z), 1.0)
            return jax.jvp(first, (phi, z, tau), v)

        return lambda phi, z, tau: (jax.vmap(lambda z: f(phi, z, tau))(z), along(phi, z, tau))

    with jax.enable_x64(True):
        phi = jax.tree.map(float, verify.rounded(phi))
        noise = _noise.gumbel(KEY, (4,), jnp.float64)

        def of_plain(plain):
            return lambda phi, z, tau: plain(phi, z, noise, tau)

        ours = {name: through(f, True) for name, (f, _) in RECORDS.items()}
        theirs = {name: through(of_plain(f), False) for name, (_, f) in RECORDS.items()}
        got, wanted = (
            evaluated(lambda *a, t=t: {name: f(*a) for name, f in t.items()})(phi, rows, 0.7) for t in (ours, theirs)
        )
    for name in RECORDS:
        for a, b in zip(jax.tree.leaves(got[name]), jax.tree.leaves(wanted[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * (np.max(np.abs(b)) or 1), err_msg=name)


DRAWS = {
    "categorical": lambda phi, z, tau: gumbel.categorical(KEY, z, shape=(50,), phi=phi).astype(float),
    "conditional_gumbels": lambda phi, z, tau: gumbel.conditional_gumbels(KEY, z, jnp.array(2), phi=phi),
    "rao_blackwellised": lambda phi, z, tau: gumbel.rao_blackwellised(KEY, z, jnp.array(2), tau, 3, phi=phi),
    "reinmax": lambda phi, z, tau: gumbel.reinmax(KEY, z, tau, phi=phi),
}


OF_PHI = {name: ours for name, (ours, _) in RECORDS.items()} | DRAWS


FEW_PHIS = [js.taylor(2), js.relu_power(2, 0.1)]
"""One with parameters that are no arrays, and one that is 0 at some scores."""
OF_LOG_PHI = and_full(covering(OF_PHI, FEW_PHIS, met=[(0, 1)]), covering(OF_PHI, js.PHIS, met=[(0, 1)]))


@pytest.mark.parametrize(("name", "phi"), OF_LOG_PHI, ids=str)
def test_every_function_takes_log_phi(name, phi):
    """f(z, φ) = f(log φ(z)), and the same of its gradient: φ enters through its logarithm alone, so each function with
    one φ shows it of all. Derivatives of log φ are in test_oracle.py."""
    phi, f = verify.rounded(phi), OF_PHI[name]

    def both(z):
        def law(f, phi, of):
            value, pull = jax.vjp(lambda z: f(phi, of(z), 0.7), z)
            return value, pull(jnp.cos(jnp.arange(1.0, 1 + value.size, dtype=value.dtype)).reshape(value.shape))

        return law(f, phi, lambda z: z), law(f, js.exp, phi.log)

    with jax.enable_x64(True):
        got, wanted = evaluated(both)(np.float64(verify.scores(verify.FUNCTIONS[0], phi)[0]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


# --- noise ---------------------------------------------------------------------------------------------------


def fixed_bits(monkeypatch, values):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(values, dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_is_exact_at_both_ends(dtype, monkeypatch):
    """P(G > g) of every g near the upper end is that of its own random number, to rounding; both ends are finite."""
    with jax.enable_x64(dtype == np.float64):
        width, kept = (32, 31) if dtype == np.float32 else (64, 53)
        lowest = np.arange(2000, dtype=np.uint64) << np.uint64(width - kept)
        fixed_bits(monkeypatch, np.append(lowest, 2**width - 1).astype(f"uint{width}"))
        g = np.asarray(_noise.gumbel(KEY, (2001,), dtype))
    assert np.all(np.isfinite(g))
    assert g[-1] < -2.5
    tail = (np.arange(2000) + 0.5) / 2.0**kept
    exact = -np.log(-np.log1p(-tail))
    np.testing.assert_allclose(g[:-1], exact, rtol=4 * np.finfo(dtype).eps)
    assert g[0] > (22 if dtype == np.float32 else 37)  # jax.random.gumbel ends at 16.6 in float32


def test_noise_is_float32_for_narrow_scores():
    z = jnp.zeros((2000,), jnp.bfloat16)
    perturbed = gumbel.gumbel_top_k(KEY, z, 2000).perturbed
    assert perturbed.dtype == jnp.float32
    assert len(np.unique(perturbed)) == 2000
    assert gumbel.gumbel_softmax(KEY, z, 1.0).dtype == jnp.bfloat16


# --- values --------------------------------------------------------------------------------------------------


def test_modes_are_those_of_jax():
    for mode in ("low", "high"):
        want = jax.random.categorical(KEY, Z, shape=(3, 2), mode=mode)
        np.testing.assert_array_equal(gumbel.categorical(KEY, Z, shape=(3, 2), mode=mode), want)


OF_WHOLE_NUMBERS = and_full(
    [(1, 20), (48, 3), (1009, 5000)], covering([1, 7, 47, 48, 1009, 4096], [20, 1, 2, 3, 5000], met=[(0, 1)])
)
"""By default one class, groups without blocks, and groups of blocks."""


@pytest.mark.parametrize(("classes", "draws"), OF_WHOLE_NUMBERS)
def test_draws_are_those_of_whole_numbers_added_up_one_by_one(classes, draws):
    """A draw is found through its group and its block of classes. Its class is the one that MATH 10.2 defines."""
    x = 4 * jax.random.normal(KEY, (3, classes))
    of_rounding, of_draws = jax.random.split(KEY)
    whole = jax.jit(lambda x: _categorical._whole_numbers(of_rounding, x, None))(x)
    F = np.cumsum(np.asarray(whole), -1, dtype=np.uint64)
    bits = np.asarray(jax.random.bits(of_draws, (3, draws), "uint32"), np.uint64)
    r = bits * F[:, -1:] >> np.uint64(32)
    want = np.stack([np.searchsorted(row, found, "right") for row, found in zip(F, r, strict=True)])
    np.testing.assert_array_equal(gumbel.categorical(KEY, x, shape=(draws, 3)), want.T)


def test_shapes_and_axes():
    z = jax.random.normal(KEY, (2, 5, 3))
    assert gumbel.categorical(KEY, z, 1).shape == (2, 3)
    assert gumbel.categorical(KEY, z, 1, (7, 4, 2, 3)).shape == (7, 4, 2, 3)
    distinct = np.asarray(gumbel.categorical(KEY, z, 1, (4, 2, 3), replace=False))
    assert all(len(set(distinct[:, i, j])) == 4 for i in range(2) for j in range(3))
    along_1 = (gumbel.gumbel_softmax, gumbel.exp_concrete, gumbel.reinmax)

    @evaluated
    def found(z, moved):
        tops = gumbel.gumbel_top_k(KEY, z, 4, 1), gumbel.gumbel_top_k(KEY, moved, 4)
        pairs = [(f(KEY, z, 0.5, 1), jnp.moveaxis(f(KEY, moved, 0.5), -1, 1)) for f in along_1]
        return tops, pairs, gumbel.gumbel_softmax(KEY, z, jnp.array([[[0.1]], [[9.0]]]), 1)

    (sample, moved), pairs, per_row = found(z, jnp.moveaxis(z, 1, -1))
    assert sample.indices.shape == sample.perturbed.shape == (2, 4, 3)
    assert sample.threshold.shape == (2, 3)
    np.testing.assert_array_equal(sample.indices, np.moveaxis(moved.indices, -1, 1))
    np.testing.assert_array_equal(sample.indices, np.moveaxis(distinct, 0, 1))
    for along, want in pairs:
        assert along.shape == z.shape
        np.testing.assert_allclose(along, want)
    np.testing.assert_allclose(per_row.sum(1), np.ones((2, 3)), rtol=1e-6)
    assert per_row[0].max() > 0.9
    assert per_row[1].max() < 0.5


def test_small_temperatures_are_finite():
    with jax.debug_nans(True):
        for f in (gumbel.gumbel_softmax, functools.partial(gumbel.subset_softmax, k=2)):

            def total(z, tau, f=f):
                return weighted(f(KEY, z, temperature=tau))

            rows = 3 * jax.random.normal(KEY, (30, 4))
            for order in (jax.grad(total, (0, 1)), jax.hessian(total, (0, 1))):
                at = evaluated(order)
                for tau in (1e-3, 1e-6, 0.05, 1.0):
                    assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(at(rows, tau)))


def test_hard_is_exactly_one_hot():
    z = np.float32(np.random.default_rng(0).normal(size=(1000, 7)))
    hard = np.asarray(evaluated(lambda z: gumbel.gumbel_softmax(KEY, z, 0.3, hard=True))(z))
    assert set(np.unique(hard)) == {0.0, 1.0}
    np.testing.assert_array_equal(hard.sum(-1), 1)
    np.testing.assert_array_equal(hard.argmax(-1), gumbel.gumbel_top_k(KEY, z, 1).indices[:, 0])


def test_subset_tends_to_the_sample_of_top_k():

    @evaluated
    def results(z):
        soft, top = gumbel.subset_softmax(KEY, z, 2, 1e-3), gumbel.gumbel_top_k(KEY, z, 2).indices
        return soft, jnp.take_along_axis(soft, top, -1), gumbel.subset_softmax(KEY, z[:1], 4, 0.01)

    soft, of_top, whole = results(Z)
    np.testing.assert_allclose(soft.sum(-1), 2, rtol=1e-5)
    np.testing.assert_allclose(of_top, 1, atol=1e-3)
    np.testing.assert_allclose(whole, jnp.ones((1, 4)), atol=1e-3)


GAPS = and_full(  # by default each dtype, and gaps of each size
    [(20.0, False), (90.0, False), (300.0, True)], itertools.product([12.0, 20.0, 90.0, 300.0], [False, True])
)


@pytest.mark.parametrize(("gap", "x64"), GAPS)
def test_subset_keeps_its_digits(gap, x64):
    """One class takes the first draw almost surely; the little that is left of it takes part in the second draw."""

    def subset(a):
        return _concrete._subset(a, jnp.ones(1, a.dtype), 2)

    with jax.enable_x64(x64):
        a = jnp.array([0.0, -gap, -gap - 1])
        others = np.exp(-gap) * np.array([1, np.exp(-1)])
        first = np.append(1, others) / (1 + others.sum())
        # the second weights: e^a (1 − p), over e^−gap
        weights = np.append(others.sum(), others * (1 - first[1:]) * (1 + others.sum()))
        np.testing.assert_allclose(subset(a), first + weights / weights.sum(), rtol=2e-6)
        slope = jax.grad(lambda a: subset(a) @ jnp.array([1.0, 2.0, 4.0]))(a)
        np.testing.assert_allclose(slope[0], 0, atol=20 * np.exp(-gap) + 1e-6)
        np.testing.assert_allclose(slope[1:], [-0.1966119, 0.1966119], rtol=1e-3)
    assert subset(jnp.array([0.0, -jnp.inf]))[0] == 1


def test_a_score_that_stands_for_a_mask_leaves_derivatives_finite():
    z = jnp.array([0.0, 1.0, float(jnp.finfo(jnp.float32).min)])
    z_masked = z.at[2].set(-jnp.inf)
    of = evaluated(jax.grad(jax.grad(lambda tau, z: gumbel.gumbel_softmax(KEY, z, tau)[0])))
    second, want = of(0.5, z), of(0.5, z_masked)
    np.testing.assert_allclose(second, want, rtol=1e-6)


def test_log_inclusion_probability_keeps_its_digits():
    mp = verify.ManyDigits().mp
    differences = np.float32([-100, -30, -3, -0.5, 0, 0.5, 2, 4])
    want = [float(mp.log(-mp.expm1(-mp.exp(mp.mpf(float(d)))))) for d in differences]
    got = gumbel.log_inclusion_probability(differences, 0.0)
    np.testing.assert_allclose(got, want, rtol=3e-6)
    np.testing.assert_array_equal(gumbel.log_inclusion_probability(jnp.array([-jnp.inf, 0.0]), -1.0)[0], -jnp.inf)
    slopes = jax.vmap(jax.grad(gumbel.log_inclusion_probability))(jnp.float32([-200, 0, 200]), jnp.zeros(3))
    np.testing.assert_allclose(slopes, [1, 1 / (np.e - 1), 0], rtol=1e-5)
    assert gumbel.log_inclusion_probability(-1.0, -jnp.inf) == 0


@pytest.mark.parametrize("phi", some([js.exp, js.spherical(0.1)], [js.spherical(0.1)]), ids=str)
def test_densities_are_normalised(phi):
    """By quadrature in float64: two classes along a line, three over a plane; τ below and above 1."""
    exp_density, density_of, binary_density = (
        evaluated(functools.partial(f, phi=phi))
        for f in (gumbel.exp_concrete_log_density, gumbel.concrete_log_density, gumbel.binary_concrete_log_density)
    )
    with jax.enable_x64(True):
        y = np.linspace(-120, 120, 4001)
        step = y[1] - y[0]
        for tau in (0.5, 1.7):
            z = jnp.array([0.4, -0.9])
            log_x = jnp.stack([y, 0 * y], -1)
            rows = jnp.broadcast_to(z, log_x.shape)
            density = jnp.exp(exp_density(log_x, rows, tau))
            np.testing.assert_allclose(jnp.sum(density) * step, 1, rtol=1e-6)
            x = jax.nn.sigmoid(y)  # dx = x (1 − x) dy
            inner = (x > 1e-15) & (x < 1 - 1e-15)
            plain = density_of(jnp.stack([x, 1 - x], -1)[inner], rows[inner], tau)
            np.testing.assert_allclose(jnp.sum(jnp.exp(plain) * (x * (1 - x))[inner]) * step, 1, rtol=1e-6)
            binary = binary_density(x[inner], 0.4, tau)
            np.testing.assert_allclose(jnp.sum(jnp.exp(binary) * (x * (1 - x))[inner]) * step, 1, rtol=1e-6)
        y = np.linspace(-40, 40, 401)
        a, b = np.meshgrid(y, y)
        log_x = jnp.stack([a, b, 0 * a], -1)
        rows = jnp.broadcast_to(jnp.array([0.4, -0.9, 0.2]), log_x.shape)
        density = jnp.exp(exp_density(log_x, rows, 0.8))
        np.testing.assert_allclose(jnp.sum(density) * (y[1] - y[0]) ** 2, 1, rtol=1e-5)


def test_densities_at_the_corners():

    @evaluated
    def results(z, corner):
        x = gumbel.exp_concrete(KEY, z, 1e-3)
        densities = gumbel.concrete_log_density, gumbel.binary_concrete_log_density
        slopes = [jax.grad(lambda x, f=f: jnp.sum(f(x, z, 0.5)))(corner) for f in densities]
        return x, gumbel.exp_concrete_log_density(x, z, 1e-3), *(f(corner, z, 0.5) for f in densities), *slopes

    x, *of_corners = results(Z, jnp.array([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))
    assert x.min() < -1e3
    for found in of_corners:
        assert np.all(np.isfinite(found))
    assert gumbel.exp_concrete_log_density(jnp.array([0.0, -jnp.inf]), jnp.zeros(2), 0.5) == -jnp.inf


def test_conditional_gumbels_have_the_index_on_top():
    rng = np.random.default_rng(0)
    z, index = np.float32(5 * rng.normal(size=(5000, 6))), rng.integers(0, 6, 5000)
    perturbed, given = (
        np.asarray(evaluated(functools.partial(gumbel.conditional_gumbels, maximum=maximum))(KEY, z, index))
        for maximum in (None, 2.5)
    )
    np.testing.assert_array_equal(np.argmax(perturbed, -1), index)
    np.testing.assert_array_equal(np.max(given, -1), 2.5)
    np.testing.assert_array_equal(np.argmax(given, -1), index)
    jacobian = evaluated(jax.jacrev(lambda z: gumbel.conditional_gumbels(KEY, z, jnp.array(1))))(Z[0])
    np.testing.assert_array_equal(jacobian, np.eye(4))


def test_reinmax_has_heuns_jacobian():

    @evaluated
    def results(z):
        reinmax = functools.partial(gumbel.reinmax, KEY, temperature=2.0)
        return reinmax(z), js.softmax(z), js.softmax(z / 2), jax.jacrev(reinmax)(z)

    D, p, of_half, jacobian = map(np.asarray, results(Z[0]))
    half = (D + of_half) / 2
    want = 2 * (np.diag(half) - np.outer(half, half)) - (np.diag(p) - np.outer(p, p)) / 2
    np.testing.assert_allclose(jacobian, want, atol=1e-6)


@pytest.mark.full  # It is about optax's functions. The law of Gumbel draws is in test_gumbel_statistics.py.
def test_with_optax_perturbed_functions():
    """The perturbed Fenchel–Young loss of a label has the perturbed argmax less the label for its gradient: with Gumbel
    noise that of cross-entropy, within five standard errors."""
    optax = pytest.importorskip("optax")
    perturbed = optax.perturbations.make_perturbed_fun(
        lambda z: jax.nn.one_hot(jnp.argmax(z, -1), 4), num_samples=20_000, sigma=1.0
    )
    exact = jax.grad(losses.cross_entropy)(Z[0], jnp.array(2))
    sampled = perturbed(KEY, Z[0]) - jax.nn.one_hot(2, 4)
    np.testing.assert_allclose(sampled, exact, atol=5 * 0.5 / 20_000**0.5)
