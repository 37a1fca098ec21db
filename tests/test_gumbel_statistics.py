"""Frequencies and means with fixed keys. Each comparison would raise a false alarm with a probability of at most 1e-6
for another key: chi-square and Kolmogorov–Smirnov tests at that level, each mean within five standard errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cells import product, some
from compilation import jit_as_user
from interpreter import evaluated
from modes import strict_promotion
from platforms import as_on_accelerators

import jsoftmax as js
from jsoftmax import gumbel, losses

ALARM = 1e-6
KEY = jax.random.key(11)


def assert_frequencies(counts, probabilities):
    """Chi-square over the classes with five or more expected, the others as one."""
    counts, wanted = np.asarray(counts, float), np.asarray(probabilities, float)
    wanted = wanted / wanted.sum() * counts.sum()
    rare = wanted < 5
    if np.any(rare):
        counts, wanted = (np.append(a[~rare], a[rare].sum()) for a in (counts, wanted))
    kept = wanted > 0
    assert np.all(counts[~kept] == 0)
    assert scipy.stats.chisquare(counts[kept], wanted[kept]).pvalue > ALARM


def assert_mean(samples, want):
    samples = np.asarray(samples, float)
    error = samples.std(0) / len(samples) ** 0.5
    assert np.all(np.abs(samples.mean(0) - want) <= 5 * error + 1e-6)


FEW_PHIS = [js.exp, js.spherical(0.1)]
OF_DRAWS = product(FEW_PHIS, ["float32", "bfloat16"], met=[(0, 1)])
OF_DRAWS += [pytest.param(js.relu_power(2, 0.1), "float32", marks=pytest.mark.full)]  # It is 0 at some scores.


@pytest.mark.parametrize(("phi", "dtype"), OF_DRAWS, ids=str)
def test_draws(phi, dtype):
    """One class masked and one with a prior of ¼. φ enters by its logarithm alone: test_gumbel.py, of every φ."""
    z = jnp.array([0.5, -1.0, 1.5, 1.0, -0.5, 0.25], dtype)
    options = {
        "phi": phi,
        "where": jnp.array([True, True, False, True, True, True]),
        "log_weights": jnp.log(jnp.array([1, 1, 1, 1, 0.25, 1])),
    }
    p = js.softmax(z.astype(jnp.float32), **options)
    assert_frequencies(jnp.bincount(gumbel.categorical(KEY, z, shape=(200_000,), **options), length=6), p)
    if phi is js.exp:
        keys = jax.random.split(KEY, 200_000)
        hard = jit_as_user(jax.vmap(lambda k: gumbel.gumbel_softmax(k, z, 0.5, hard=True, **options)))(keys)
        assert_frequencies(hard.astype(jnp.float32).sum(0), p)
        first = jit_as_user(jax.vmap(lambda k: gumbel.gumbel_top_k(k, z, 2, **options).indices[0]))(keys)
        assert_frequencies(jnp.bincount(first, length=6), p)


@pytest.mark.full  # Draws of 32 bits are above; those of 64 only have noise of more digits.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_draws_with_64_bits(dtype):
    """With x64, where random bits and sums would be wider, under strict promotion; row by row."""
    with jax.enable_x64(True), strict_promotion():
        z = jnp.asarray([[0.5, -1.0, 1.5], [0.0, 2.0, 1.0]], dtype)
        draws = gumbel.categorical(KEY, z, shape=(200_000, 2))
        values = jit_as_user(jax.vmap(lambda k: gumbel.reinmax(k, z, 1.0)))(jax.random.split(KEY, 50_000))
        for row in range(2):
            assert_frequencies(np.bincount(draws[:, row], minlength=3), js.softmax(z)[row])
            assert_frequencies(np.asarray(values[:, row]).sum(0), js.softmax(z)[row])
        assert draws.dtype == jnp.int32
        assert np.abs(np.corrcoef(draws.T)[0, 1]) < 5 / 200_000**0.5


@pytest.mark.full  # By default 100,001 classes below, and in test_gumbel.py which class is drawn from groups of blocks.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_draws_of_131072_classes(dtype):
    """By groups of classes that follow each other, and by groups of like probability."""
    z = (3 * jax.random.normal(jax.random.key(5), (131_072,))).astype(dtype)
    p = np.float64(js.softmax(z.astype(jnp.float32)))
    draws = np.asarray(jit_as_user(lambda z: gumbel.categorical(KEY, z, shape=(1_000_000,)))(z))
    one_each = np.asarray(jit_as_user(jax.vmap(lambda k: gumbel.categorical(k, z)))(jax.random.split(KEY, 200)))
    counts = np.bincount(draws, minlength=131_072)
    by_size = np.argsort(p).reshape(256, -1)
    assert_frequencies(counts.reshape(256, -1).sum(1), p.reshape(256, -1).sum(1))
    assert_frequencies(counts[by_size].sum(1), p[by_size].sum(1))
    rank = np.argsort(np.argsort(p)) // 16_384
    assert_frequencies(np.bincount(rank[one_each], minlength=8), np.bincount(rank, p))


@pytest.mark.parametrize("offset", some([0.0, 1e6, -3e38], [1e6]))
def test_a_single_draw_on_accelerators(offset):
    """Single draws are made by noise, which an offset of the scores does not round away; also bad rows and empty
    rows. By default of the offset that rounds the scores: 0 rounds none, and -3e38 makes all possible classes equal."""
    log_weights = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05, 1e-4, 0.0]))
    rows = jnp.full((400_000, 6), offset)
    with as_on_accelerators():
        draws = jit_as_user(lambda z: gumbel.categorical(KEY, z, log_weights=log_weights))(rows)
    p = js.softmax(rows[0] + log_weights)  # what float32 leaves of these scores
    assert_frequencies(np.bincount(draws, minlength=6), p)
    inf, nan = np.inf, np.nan
    bad = jnp.array([[0, nan, 1], [nan, 0, 0], [inf, 0, 0], [0, 0, inf], [-inf] * 3, [-inf, -inf, 0], [3e38, -3e38, 0]])
    for f in (lambda z: gumbel.categorical(KEY, z), jax.vmap(lambda z: gumbel.categorical(KEY, z))):
        with as_on_accelerators():
            np.testing.assert_array_equal(jit_as_user(f)(bad), [-1, -1, -1, -1, -1, 2, 0])


def test_a_single_draw_in_blocks():
    """GPUs compare the classes of many scores in blocks of 128. The draws are those without blocks; also where a block
    has a bad score, or no class."""
    rows = np.random.default_rng(3).normal(0, 3, (160, 1024)).astype(np.float32)
    rows[1, 300], rows[2, 1023], rows[3, :900], rows[4] = np.nan, np.inf, -np.inf, -np.inf
    draws, texts = {}, {}
    for platform in ("cuda", "tpu"):
        with as_on_accelerators(platform):
            texts[platform] = jax.jit(gumbel.categorical).lower(KEY, rows).as_text()
            draws[platform] = np.asarray(jit_as_user(gumbel.categorical)(KEY, rows))
    assert "160x8x128xf32" in texts["cuda"]
    assert "160x8x128xf32" not in texts["tpu"]
    np.testing.assert_array_equal(draws["cuda"], draws["tpu"])
    np.testing.assert_array_equal(draws["cuda"][1:5] >= 0, [False, False, True, False])


def test_rare_classes_are_drawn_at_their_rate():
    """100,000 classes of probability 1e-7 behind one of 0.99; a float32 cumulative sum draws them unevenly."""
    z = jnp.append(jnp.log(0.99), jnp.full(100_000, jnp.log(1e-7)))
    p = np.append(0.99, np.full(100_000, 1e-7))
    draw = jit_as_user(lambda key: gumbel.categorical(key, z, shape=(5_000_000,)))
    draws = np.concatenate([np.asarray(draw(key)) for key in jax.random.split(KEY)])
    counts = np.bincount(draws, minlength=100_001)
    groups = np.append(counts[0], counts[1:].reshape(1000, 100).sum(1))
    assert_frequencies(groups, np.append(p[0], p[1:].reshape(1000, 100).sum(1)))
    assert_frequencies(np.bincount(counts[1:], minlength=12)[:12], scipy.stats.poisson(1).pmf(np.arange(12)))
    plain = jnp.cumsum(js.softmax(z))
    widths = np.diff(np.asarray(plain))
    assert np.std(widths) > 0.1e-7  # what is avoided


@pytest.mark.parametrize("phi", some([js.exp, js.spherical(0.1)], [js.exp]), ids=str)
def test_top_k_has_the_probabilities_of_plackett_and_luce(phi):
    """Ordered pairs of four classes; inclusion; and the estimator's mean. φ enters by its logarithm alone:
    test_gumbel.py, of every φ."""
    z = jnp.array([0.5, -1.0, 1.5, 0.3])
    keys = jax.random.split(KEY, 200_000)
    sample = jit_as_user(jax.vmap(lambda k: gumbel.gumbel_top_k(k, z, 2, phi=phi)))(keys)
    orders = np.array(list(itertools.permutations(range(4), 2)))
    exact = np.exp(np.asarray(jax.vmap(lambda o: losses.plackett_luce_log_prob(z, o, phi=phi))(orders)))
    counts = np.bincount(4 * sample.indices[:, 0] + sample.indices[:, 1], minlength=16)
    assert_frequencies(counts[4 * orders[:, 0] + orders[:, 1]], exact)
    inclusion = np.array([exact[np.any(orders == k, 1)].sum() for k in range(4)])
    included = np.any(np.asarray(sample.indices)[:, :, None] == np.arange(4), 1)
    assert_mean(included, inclusion)
    log_p, f = js.log_softmax(z, phi=phi), jnp.array([1.0, -2.0, 3.0, 5.0])
    log_q = gumbel.log_inclusion_probability(log_p[sample.indices], sample.threshold[:, None])
    terms = jnp.exp(log_p[sample.indices] - log_q) * f[sample.indices]
    assert_mean(terms.sum(1), jnp.sum(jnp.exp(log_p) * f))


def test_conditional_gumbels_are_gumbel_once_the_class_is_drawn():
    """Each coordinate is Gumbel at its score, the maximum Gumbel at L: Kolmogorov–Smirnov tests."""
    z = jnp.array([0.5, -1.0, 1.5])

    def draw(key):
        first, second = jax.random.split(key)
        return gumbel.conditional_gumbels(second, z, gumbel.categorical(first, z))

    perturbed = np.float64(jit_as_user(jax.vmap(draw))(jax.random.split(KEY, 100_000)))
    for k in range(3):
        assert scipy.stats.kstest(perturbed[:, k] - float(z[k]), scipy.stats.gumbel_r.cdf).pvalue > ALARM
    top = perturbed.max(1) - float(js.log_normalizer(z))
    assert scipy.stats.kstest(top, scipy.stats.gumbel_r.cdf).pvalue > ALARM
    assert abs(np.corrcoef(perturbed.argmax(1) == 2, top)[0, 1]) < 5 / 100_000**0.5


SCORES, TAU = jnp.array([0.2, -0.7, 1.1, 0.3]), 0.7


def quadratic(D):
    return jnp.sum(jnp.array([1, 0.5, 2, 1.3]) * (D - jnp.array([1, 2, -1, 0.5])) ** 2)


def gradients(estimator, count=100_000):
    def one(key):
        of_class, of_noise = jax.random.split(key)
        index = gumbel.categorical(of_class, SCORES)
        return jax.grad(lambda z: quadratic(estimator(of_noise, z, index)))(SCORES)

    return np.asarray(evaluated(jax.vmap(one))(jax.random.split(KEY, count)))  # means do not depend on rounding


def test_rao_blackwellised_gradient():
    """The mean of the straight-through gradient with less variance; the total derivative has another mean."""
    conditional = gradients(lambda key, z, index: gumbel.rao_blackwellised(key, z, index, TAU, 10))
    plain = gradients(lambda key, z, index: gumbel.gumbel_softmax(key, z, TAU, hard=True))
    for got in (conditional, plain):
        assert_mean(got, np.array([-0.613, -0.348, 1.436, -0.475]) + 0 * got[0])
    assert np.all(conditional.var(0) < plain.var(0) / 1.5)

    def trap(key, z, index):  # the noise as a function of the scores
        noise = gumbel.conditional_gumbels(key, jnp.zeros(4), index)  # Gumbel draws that the class conditions
        E = jnp.exp(-noise) - jnp.exp(-noise[index])
        M = js.log_normalizer(z) - (js.log_normalizer(jnp.zeros(4)) - noise[index])
        perturbed = -jnp.log(E * jnp.exp(-z) + jnp.exp(-M))
        soft = js.softmax(jnp.where(jnp.arange(4) == index, M, perturbed) / TAU)
        return jax.nn.one_hot(index, 4) + soft - jax.lax.stop_gradient(soft)

    wrong = gradients(trap).mean(0)
    assert np.max(np.abs(wrong - conditional.mean(0))) > 0.3


def test_reinmax_is_exact_for_quadratic_functions():
    exact = jax.grad(lambda z: js.softmax(z) @ jax.vmap(quadratic)(jnp.eye(4)))(SCORES)
    assert_mean(gradients(lambda key, z, index: gumbel.reinmax(key, z, 1.0)), exact)
