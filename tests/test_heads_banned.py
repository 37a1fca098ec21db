"""Classes that each token leaves out: every streaming head against the masked scores in float64; edges, wrong calls."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import some
from interpreter import evaluated
from modes import assert_same

import jsoftmax as js
from jsoftmax import heads, losses
from jsoftmax.losses import TopTargets

TOKENS, CLASSES, FEATURES = 7, 20, 3
BANNED = np.array([[0, 5, 19], [5, 5, -1], [12, 7, 20], [-1, -1, -1], [1, 2, 4], [3, 0, -7], [9, 8, 10]], np.int32)
KEEP = np.arange(CLASSES) % 7 != 3
LEFT = KEEP & ~np.any(np.arange(CLASSES) == BANNED[:, :, None], 1)
LABELS = np.array([4, 5, 19, 0, 11, 8, 9], np.int32)
"""The second and the last are banned."""
Q = np.random.default_rng(0).dirichlet(np.ones(CLASSES), size=TOKENS)
OPTIONS = {"where": KEEP, "banned": BANNED, "block_size": (3, 6)}


def arrays(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 2)
    shapes = ((TOKENS, FEATURES), (CLASSES, FEATURES))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def scores(hidden, weight):
    return hidden @ weight.T


def statistics(hidden, weight, labels):
    found = heads.linear_statistics(hidden, weight, labels, **OPTIONS)
    return jnp.where(found.log_prob > -jnp.inf, found.log_prob, 9) + jnp.cos(found.entropy) + found.log_normalizer


def plain_statistics(hidden, weight, labels):
    z = scores(hidden, weight)
    log_p = js.log_softmax(z, where=LEFT)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        log_prob = jnp.take_along_axis(log_p, jnp.broadcast_to(labels, (2, TOKENS)).T, 1).T
    else:
        log_prob = jnp.sum(jnp.where(LEFT, labels * log_p, 0), 1)
    others = jnp.cos(js.entropy(z, where=LEFT)) + js.log_normalizer(z, where=LEFT)
    return jnp.where(log_prob > -jnp.inf, log_prob, 9) + others


SMOOTH = {"label_smoothing": 0.2, "z_loss": 0.1}
SEVERAL = np.stack([LABELS, LABELS[::-1]])
HEADS = {
    "linear_cross_entropy": (
        lambda h, W: heads.linear_cross_entropy(h, W, LABELS, ignore_label=8, **SMOOTH, **OPTIONS),
        lambda h, W: losses.cross_entropy(scores(h, W), LABELS, where=LEFT, ignore_label=8, **SMOOTH),
    ),
    "of distributions": (
        lambda h, W: heads.linear_cross_entropy(h, W, jnp.asarray(Q), **OPTIONS),
        lambda h, W: losses.cross_entropy(scores(h, W), jnp.asarray(Q), where=LEFT),
    ),
    "linear_cross_entropy_sum": (
        lambda h, W: heads.linear_cross_entropy_sum(h, W, LABELS, token_weights=1 + np.cos(LABELS), **OPTIONS),
        lambda h, W: jnp.sum((1 + np.cos(LABELS)) * losses.cross_entropy(scores(h, W), LABELS, where=LEFT)),
    ),
    "linear_statistics": (
        lambda h, W: statistics(h, W, SEVERAL),
        lambda h, W: plain_statistics(h, W, SEVERAL),
    ),
    "statistics of distributions": (
        lambda h, W: statistics(h, W, jnp.asarray(Q)),
        lambda h, W: plain_statistics(h, W, jnp.asarray(Q)),
    ),
    "linear_log_normalizer": (
        lambda h, W: heads.linear_log_normalizer(h, W, **OPTIONS),
        lambda h, W: js.log_normalizer(scores(h, W), where=LEFT),
    ),
    "linear_kl": (
        lambda h, W: heads.linear_kl(h, W, jnp.sin(h), W, **OPTIONS),
        lambda h, W: js.kl_divergence(scores(h, W), scores(jnp.sin(h), W), where=LEFT),
    ),
    "linear_top_k": (
        lambda h, W: heads.linear_top_k(h, W, 4, **OPTIONS).log_prob,
        lambda h, W: jax.lax.top_k(js.log_softmax(scores(h, W), where=LEFT), 4)[0],
    ),
}


FEW = ("linear_cross_entropy", "of distributions")
"""By label and by distribution; what has no labels is below, without derivatives. All heads take the scores of banned
classes away at one place."""


@pytest.mark.parametrize("name", some(HEADS, FEW))
def test_as_of_masked_scores(name):
    """Tokens in blocks with one over, classes named twice, none, and out of range; labels that are banned."""
    with jax.enable_x64(True):
        assert_same(*HEADS[name], arrays(), rtol=1e-10)


def test_modes_and_the_largest():
    with jax.enable_x64(True):

        @evaluated
        def results(hidden, weight):
            log_p = js.log_softmax(scores(hidden, weight), where=LEFT)
            found = heads.linear_statistics(hidden, weight, LABELS, **OPTIONS)
            top = heads.linear_top_k(hidden, weight, 18, **OPTIONS)
            shaped = heads.linear_top_k(hidden.reshape(7, 1, 3), weight, 1, banned=BANNED.astype(np.int8)[:, None])
            return log_p, jax.lax.top_k(log_p, 18), found, top, shaped

        log_p, (values, classes), found, top, shaped = jax.tree.map(np.asarray, results(*arrays()))
        np.testing.assert_array_equal(found.argmax, np.argmax(log_p, 1))
        np.testing.assert_array_equal(found.log_prob == -np.inf, ~LEFT[np.arange(TOKENS), LABELS])
        np.testing.assert_array_equal(top.indices, np.where(values > -np.inf, classes, -1))
        assert shaped.indices.shape == (7, 1, 1)


def test_no_lists_and_none_left():
    """Lists of length 0, and of all classes: as without them, and as of an empty row."""
    nothing = np.zeros((TOKENS, 0), int), np.full((TOKENS, 1), -1), np.full((TOKENS, 2), CLASSES)
    every = np.where(np.arange(TOKENS)[:, None] == 2, np.arange(CLASSES), -1)

    @evaluated
    def results(hidden, weight):
        def loss(hidden):
            return jnp.sum(heads.linear_cross_entropy(hidden, weight, LABELS, banned=every)[2])

        found = [heads.linear_log_normalizer(hidden, weight, banned=lists) for lists in (*nothing, every)]
        return heads.linear_log_normalizer(hidden, weight), found, jax.value_and_grad(loss)(hidden)

    plain, (*same, found), (loss, by) = results(*arrays(jnp.float32))
    for other in same:
        np.testing.assert_array_equal(other, plain)
    np.testing.assert_array_equal(found, np.where(np.arange(TOKENS) == 2, -np.inf, plain))
    assert loss == 0
    np.testing.assert_array_equal(by, 0)


def test_mapped_and_ignored():
    """Over tokens' lists; those of tokens that do not count change nothing."""
    lists, ignored = np.stack([BANNED, BANNED[::-1]]), np.where(np.arange(TOKENS) % 2, LABELS, -100)
    others = np.where((ignored == -100)[:, None], 1, BANNED)

    @evaluated
    def results(hidden, weight, lists, others):
        def loss(banned):
            return heads.linear_cross_entropy(hidden, weight, LABELS, banned=banned)

        def statistics(banned):
            options = {"ignore_label": -100, "banned": banned, "block_size": (2, 6)}
            return heads.linear_statistics(hidden, weight, ignored, **options)

        return jax.vmap(loss)(lists), [loss(banned) for banned in lists], [statistics(a) for a in (others, BANNED)]

    mapped, one_by_one, (found, want) = results(*arrays(jnp.float32), lists, others)
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found, want)


H, W = jnp.ones((4, 3)), jnp.ones((5, 3))
WRONG = {
    "mask": (jnp.ones((4, 5), bool), TypeError, "banned must be integers, .* got dtype bool.*where=…"),
    "one list": (
        jnp.zeros(5, int),
        ValueError,
        r"banned must have m classes for each token, shape \(4, m\); got .*\(5,\)",
    ),
    "labels": (jnp.zeros(4, int), ValueError, r"shape \(4, m\); got shape \(4,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    banned, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        inspect.unwrap(heads.linear_cross_entropy)(H, W, jnp.zeros(4, int), banned=banned)


def test_not_of_top_targets():
    targets = TopTargets(jnp.zeros((4, 1), int), jnp.ones((4, 1)))
    with pytest.raises(ValueError, match="banned must be left out where labels are TopTargets"):
        heads.linear_cross_entropy(H, W, targets, banned=jnp.zeros((4, 1), int))
