"""Sampled softmax and noise-contrastive estimation: their definition in float64, statistics with fixed keys, edges.

Each mean is within five standard errors, as in test_gumbel_statistics.py."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, some
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import losses, verify
from jsoftmax.gumbel import categorical
from jsoftmax.heads import sampled

KEY = jax.random.key(3)
ROWS, D, V, N = 6, 3, 11, 9
RNG = np.random.default_rng(0)
H, W, B = RNG.normal(0, 1, (ROWS, D)), RNG.normal(0, 1, (V, D)), RNG.normal(0, 1, V)
LABELS = np.array([0, 10, 3, 0, 7, 5])
LOG_Q = np.log(np.arange(V, 0, -1.0))  # not normalised
LOSSES = {"sampled_cross_entropy": sampled.sampled_cross_entropy, "nce_loss": sampled.nce_loss}


def plain(name, draws, h, w, b, phi):  # noqa: PLR0917
    """The definitions, typed as they stand, over the draws given."""
    q = np.exp(LOG_Q) / np.exp(LOG_Q).sum()
    scores = phi.definition(h @ w.T + b, verify.Plain)
    own = scores[jnp.arange(ROWS), LABELS]
    weights = scores[:, draws] / (len(draws) * q[draws])
    if name == "nce_loss":
        own = own / (len(draws) * q[LABELS])
        return -jnp.log(own / (1 + own)) - jnp.sum(jnp.log(1 / (1 + weights)), -1)
    return -jnp.log(own / (own + jnp.sum(jnp.where(draws == LABELS[:, None], 0, weights), -1)))


OF_DEFINITION = and_full(
    [("sampled_cross_entropy", js.spherical(0.3)), ("nce_loss", js.exp)],
    itertools.product(LOSSES, [js.exp, js.spherical(0.3)]),
)


@pytest.mark.parametrize(("name", "phi"), OF_DEFINITION, ids=str)
def test_definition(name, phi):
    """Values, gradients and a Hessian product in a scan, in hidden vectors, weights, bias and φ. By default each loss
    and each φ once."""
    with jax.enable_x64(True):
        draws = np.asarray(categorical(KEY, jnp.asarray(LOG_Q), shape=(N,)))
        assert np.any(draws == LABELS[:, None])  # accidental hits are among them

        def ours(h, w, b, phi):
            options = {"log_proposal": LOG_Q, "bias": b, "phi": phi}
            return LOSSES[name](KEY, h, w, LABELS, N, **options)

        def results(f, *arguments):
            def total(*arguments):
                return jnp.sum(jnp.cos(jnp.arange(ROWS)) * f(*arguments))

            def scanned(*arguments):
                return jax.lax.scan(lambda c, _: (c + total(*arguments), None), 0.0, None, length=1)[0]

            along = jax.tree.map(lambda a: jnp.cos(3 * jnp.asarray(a)), arguments)
            return f(*arguments), jax.jvp(jax.grad(scanned, (0, 1, 2, 3)), arguments, along)

        def defined(h, w, b, phi):
            return plain(name, draws, h, w, b, phi)

        given = (*map(jnp.asarray, (H, W, B)), phi)
        one, other = (verify.jit_formulas(functools.partial(results, f))(*given) for f in (ours, defined))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def full(h, w, b):
    return losses.cross_entropy(h @ w.T + b, jnp.asarray(LABELS))


def assert_mean(samples, want):
    samples = np.asarray(samples, np.float64)
    error = samples.std(0) / len(samples) ** 0.5
    assert np.all(np.abs(samples.mean(0) - want) <= 5 * error + 1e-6)


def float32(*arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def test_the_denominator_is_unbiased():
    """E e^{loss + x_y} = Σ e^x for any number of samples, hits rejected; without the correction it is far off."""
    h, w, b = float32(H, W, B)
    exact = np.exp(np.asarray(jax.nn.logsumexp(h @ w.T + b, -1)))
    own = (h @ w.T + b)[np.arange(ROWS), LABELS]
    for n in (1, 5):

        @jax.jit
        @jax.vmap
        def denominators(key, n=n):
            loss = sampled.sampled_cross_entropy(key, h, w, LABELS, n, log_proposal=LOG_Q, bias=b)
            return jnp.exp(loss + own)

        values = denominators(jax.random.split(KEY, 20_000))
        assert_mean(values, exact)


@pytest.mark.full  # The definition, draw by draw, is above.
def test_many_samples_give_the_full_loss():
    """Value and gradient tend to those of the cross-entropy as 1/√n: a hundred times as many samples, a tenth of the
    error, in the root mean square over keys, which is known to some 10 %."""
    h, w, b = float32(H, W, B)

    def gradients(f):
        return jax.value_and_grad(lambda h, w, b: jnp.sum(f(h, w, b)), (0, 1, 2))(h, w, b)

    want, errors = gradients(full), []
    for n in (200, 20_000):

        @jax.jit
        @jax.vmap
        def estimates(key, n=n):
            def loss(h, w, bias):
                return sampled.sampled_cross_entropy(key, h, w, LABELS, n, log_proposal=LOG_Q, bias=bias)

            return gradients(loss)

        pairs = zip(jax.tree.leaves(estimates(jax.random.split(KEY, 64))), jax.tree.leaves(want), strict=True)
        errors.append([float(jnp.sqrt(jnp.mean((a - b) ** 2))) for a, b in pairs])
    ratios = np.divide(*errors)
    assert np.all((ratios > 6) & (ratios < 16))
    assert np.all(np.array(errors[1]) < 0.05)


def test_each_class_once_is_the_full_loss():
    """With each class drawn once from a uniform proposal, counts are as expected, and nothing is estimated."""
    h, w, b = float32(H, W, B)
    log_q = jnp.full(V, -jnp.log(V))
    given, _, _ = sampled._check("f", KEY, h, w, LABELS, V, log_q, b, None, js.exp)
    loss = sampled._sampled(given, js.exp, jnp.arange(V))
    np.testing.assert_allclose(loss, full(h, w, b), rtol=1e-5)


def test_noise_contrastive_estimation_ends_at_the_true_distribution():
    """At x = log p the mean of the gradient over labels and samples is 0; at another x it is not."""
    p = np.exp(B) / np.exp(B).sum()
    h, w = float32(np.ones((1, 1)), np.zeros((V, 1)))

    def gradient(x):
        @jax.jit
        @jax.vmap
        def of_key(key):
            of_label, of_samples = jax.random.split(key)
            label = jax.random.categorical(of_label, jnp.log(p), shape=(1,))
            return jax.grad(lambda x: sampled.nce_loss(of_samples, h, w, label, 4, log_proposal=LOG_Q, bias=x)[0])(x)

        return np.asarray(of_key(jax.random.split(KEY, 50_000)))

    assert_mean(gradient(jnp.asarray(np.log(p), jnp.float32)), np.zeros(V))
    moved = gradient(jnp.asarray(np.log(p), jnp.float32).at[0].add(1.0))
    assert moved[:, 0].mean() > 5 * moved[:, 0].std() / len(moved) ** 0.5


def test_log_uniform_proposal():
    for classes in (1, 7, 100_000):
        log_q = jax.jit(sampled.log_uniform_proposal, static_argnums=0)(classes)
        j = np.arange(classes, dtype=float)
        np.testing.assert_allclose(log_q, np.log(np.log((j + 2) / (j + 1)) / np.log(classes + 1)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.exp(np.float64(log_q)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("name", some(LOSSES, ["sampled_cross_entropy"]))  # both check rows and draws at one place
def test_edges(name):
    f = jax.jit(functools.partial(LOSSES[name], num_samples=N, log_proposal=LOG_Q))
    h, w, b = float32(H, W, B)
    y = jnp.asarray(LABELS)
    clean = f(KEY, h, w, y, bias=b)
    assert np.all(np.isfinite(clean))
    assert not np.array_equal(clean, f(jax.random.key(4), h, w, y, bias=b))
    np.testing.assert_allclose(f(KEY, h.reshape(2, 3, D), w, y.reshape(2, 3), bias=b), clean.reshape(2, 3), rtol=1e-5)
    for bad in (-1, V):
        np.testing.assert_array_equal(f(KEY, h, w, y.at[2].set(bad), bias=b), clean.at[2].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(f(KEY, h.at[2].set(jnp.nan), w, y, bias=b)), np.arange(ROWS) == 2)
    # a row left out may hold anything
    keep = jnp.arange(ROWS) != 2

    def total(h, w, y):
        return jnp.sum(f(KEY, h, w, y, bias=b, where=keep))

    spoilt, gradient = jax.value_and_grad(total, (0, 1))(h.at[2].set(jnp.nan), w, y.at[2].set(-1))
    np.testing.assert_allclose(spoilt, jnp.sum(jnp.where(keep, clean, 0)), rtol=1e-5)
    want = jax.grad(total, (0, 1))(h, w, y)
    for a, b_ in zip(gradient, want, strict=True):
        np.testing.assert_allclose(a, b_, rtol=1e-5, atol=1e-6)
    # classes that are never proposed: fine as labels, with finite derivatives
    log_q = jnp.asarray(LOG_Q).at[jnp.array([0, 10])].set(-jnp.inf)
    value, slope = jax.value_and_grad(lambda w: jnp.sum(LOSSES[name](KEY, h, w, y, N, log_proposal=log_q, bias=b)))(w)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))
    for bad in (jnp.full(V, -jnp.inf), jnp.full(V, jnp.nan)):
        assert np.all(np.isnan(LOSSES[name](KEY, h, w, y, N, log_proposal=bad)))


@pytest.mark.parametrize("name", some(LOSSES, ["sampled_cross_entropy"]))  # both have one way to make scores
def test_dtypes_under_strict_promotion_and_debug_nans(name):
    with strict_promotion(), jax.debug_nans(True):
        for dtype in (jnp.bfloat16, jnp.float32):
            h, w, b = (jnp.asarray(a, dtype) for a in (H, W, B))
            log_q = jnp.asarray(LOG_Q, jnp.float32)

            def total(w, h=h, b=b, log_q=log_q):
                loss = LOSSES[name](KEY, h, w, jnp.asarray(LABELS, jnp.int8), N, log_proposal=log_q, bias=b)
                assert loss.dtype == jnp.float32
                return jnp.sum(loss)

            assert jax.jit(jax.grad(total))(w).dtype == dtype
    with jax.enable_x64(True), strict_promotion():
        h, w = jnp.asarray(H), jnp.asarray(W)
        log_q = sampled.log_uniform_proposal(V)
        assert log_q.dtype == jnp.float64
        loss = jax.eval_shape(lambda: LOSSES[name](KEY, h, w, jnp.asarray(LABELS), N, log_proposal=log_q))
        assert loss.dtype == jnp.float64


f, nce = inspect.unwrap(sampled.sampled_cross_entropy), inspect.unwrap(sampled.nce_loss)
Q = {"log_proposal": LOG_Q}
WRONG = [
    (lambda: f(0, H, W, LABELS, N, **Q), TypeError, "sampled_cross_entropy: key must be one PRNG key"),
    (lambda: f(KEY, H.astype(int), W, LABELS, N, **Q), TypeError, "sampled_cross_entropy: hidden must be floating"),
    (lambda: f(KEY, H, W.T, LABELS, N, **Q), ValueError, "sampled_cross_entropy: weight must be [V, d]"),
    (lambda: f(KEY, H, W, LABELS * 1.0, N, **Q), TypeError, "sampled_cross_entropy: labels must be integers"),
    (lambda: f(KEY, H, W, LABELS[:2], N, **Q), ValueError, "sampled_cross_entropy: labels must have the shape of"),
    (lambda: f(KEY, H, W, LABELS, 0, **Q), ValueError, "sampled_cross_entropy: num_samples must be an int >= 1"),
    (lambda: f(KEY, H, W, LABELS, 2.5, **Q), TypeError, "sampled_cross_entropy: num_samples must be an int >= 1"),
    (
        lambda: f(KEY, H, W, LABELS, N, log_proposal=B[:2]),
        ValueError,
        "sampled_cross_entropy: log_proposal must",
    ),
    (lambda: f(KEY, H, W, LABELS, N, bias=B[:2], **Q), ValueError, "sampled_cross_entropy: bias must have one number"),
    (lambda: f(KEY, H, W, LABELS, N, where=LABELS, **Q), TypeError, "sampled_cross_entropy: where must be boolean"),
    (lambda: nce(KEY, H, W, LABELS, N, phi=jnp.exp, **Q), TypeError, "nce_loss: phi must be a φ"),
    (lambda: nce(KEY, H, [1], LABELS, N, **Q), TypeError, "nce_loss: weight must be an array or a number; got list"),
    (lambda: sampled.log_uniform_proposal(0), ValueError, "log_uniform_proposal: num_classes must be an int >= 1"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(says)
