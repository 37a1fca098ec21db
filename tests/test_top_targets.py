"""Targets of k classes: against the plain sums in float64, from scores and from heads; digits, edges, shards."""

import functools

import jax
import jax.numpy as jnp
import modes
import numpy as np
import pytest
import sharding
from cells import and_full, covering, some
from interpreter import evaluated
from jax.sharding import PartitionSpec
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import heads, losses, verify
from jsoftmax.checks.top_targets import TAILS
from jsoftmax.losses import TopTargets

RNG = np.random.default_rng(0)
ROWS, CLASSES, K = 6, 48, 4
Z = RNG.normal(size=(ROWS, CLASSES))
INDICES = np.stack([RNG.permutation(CLASSES)[:K] for _ in range(ROWS)])
Q = RNG.dirichlet(np.ones(K + 1), size=ROWS)[:, :K]
HIDDEN, WEIGHT = RNG.normal(size=(ROWS, 5)) / 5, RNG.normal(size=(CLASSES, 5))
KEEP = np.arange(CLASSES) % 7 != 3


def plain_terms(z, q, tail, phi):
    """Probabilities of the classes and of the rest `[..., K + 1]`, and their targets."""
    w = phi.definition(z, verify.Plain)
    named = jnp.take_along_axis(w, INDICES, -1) / w.sum(-1, keepdims=True)
    others = jnp.where(jnp.any(jnp.arange(CLASSES) == INDICES[..., None], 1), 0, w).sum(-1) / w.sum(-1)
    total = q.sum(-1, keepdims=True)
    left = 1 - total if tail == "class" else 0 * total
    q = q / total if tail == "renormalise" else q
    return jnp.concatenate([named, others[:, None]], -1), jnp.concatenate([q, left], -1)


def plain_cross_entropy(z, q, tail, phi):
    p, q = plain_terms(z, q, tail, phi)
    return -jnp.sum(q * jnp.log(p), -1)


def plain_divergence(z, q, tail, phi):
    p, q = plain_terms(z, q, tail, phi)
    return jnp.sum(jnp.where(q > 0, q * (jnp.log(jnp.where(q > 0, q, 1)) - jnp.log(p)), 0), -1)


assert_same = functools.partial(modes.assert_same, rtol=1e-10, atol=1e-12)


OF_LOSSES = and_full(
    [("class", js.relu_power(2, 0.1)), ("renormalise", js.taylor(2)), ("ignore", js.softplus)],
    covering(TAILS, [js.exp, js.spherical(0.1), js.relu_power(2, 0.1)], met=[(0, 1)]),
)
"""By default each tail. They are met with few φ, since the tail does not change how log φ is counted."""


@pytest.mark.parametrize(("tail", "phi"), OF_LOSSES, ids=str)
def test_losses(tail, phi):
    with jax.enable_x64(True):

        def both(f, g):
            return lambda z, q: f(z, q) + 2 * g(z, q)

        def ours(f):
            return lambda z, q: f(z / 2, TopTargets(INDICES, q, tail), phi=phi)

        def plain(f):
            return lambda z, q: f(z / 2, q, tail, phi)

        f = both(ours(losses.cross_entropy), ours(losses.kl_to_target))
        g = both(plain(plain_cross_entropy), plain(plain_divergence))
        assert_same(f, g, (jnp.asarray(Z), jnp.asarray(Q)), rtol=1e-9)


@pytest.mark.parametrize("tail", some(TAILS, ["class"]))
def test_head(tail):
    """As of its scores, with every option, whatever the blocks are. What a head does with another tail is what the loss
    above does."""
    with jax.enable_x64(True):
        bias, prior = jnp.sin(jnp.arange(CLASSES)), jnp.cos(jnp.arange(CLASSES))
        options = {"log_weights": prior, "phi": js.softplus, "z_loss": 0.1}

        def ours(h, W, q):
            top = TopTargets(INDICES, q, tail)
            return heads.linear_cross_entropy(h, W, top, bias, where=KEEP, soft_cap=2.0, block_size=(4, 7), **options)

        def plain(h, W, q):
            z = 2 * jnp.tanh((h @ W.T + bias) / 2)
            return losses.cross_entropy(z, TopTargets(INDICES, q, tail), where=KEEP[None], **options)

        assert_same(ours, plain, tuple(map(jnp.asarray, (HIDDEN, WEIGHT, Q))))


def test_sum_of_head():
    """Σ w loss and its derivatives, tokens without weight before and between others."""
    with jax.enable_x64(True):
        weights = jnp.asarray([0.0, 2.0, -1.0, 0.0, 0.5, 3.0])
        options = {"phi": js.softplus, "z_loss": 0.1, "where": KEEP, "block_size": (4, 7)}

        def ours(h, W, q, w):
            top = TopTargets(INDICES, q)
            return jnp.broadcast_to(heads.linear_cross_entropy_sum(h, W, top, token_weights=w, **options), ROWS)

        def plain(h, W, q, w):
            top = TopTargets(INDICES, q)
            loss = losses.cross_entropy(h @ W.T, top, phi=js.softplus, z_loss=0.1, where=KEEP[None])
            return jnp.broadcast_to(jnp.sum(w * loss), ROWS)

        assert_same(ours, plain, (*map(jnp.asarray, (HIDDEN, WEIGHT, Q)), weights))


def test_sum_of_head_without_the_tokens_that_have_no_weight():
    """A class out of range, or impossible, that has mass counts 0 with weight 0, NaN or +inf otherwise."""
    indices, impossible = INDICES.copy(), jnp.zeros(CLASSES).at[INDICES[1, 2]].set(-jnp.inf)
    indices[0, 1] = CLASSES
    indices[1:, 2] = INDICES[1, 2]
    top, given = TopTargets(indices, jnp.float32(Q)), (jnp.float32(HIDDEN), jnp.float32(WEIGHT))
    weights = np.zeros(ROWS, np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(h, W, weights, bias):
        return heads.linear_cross_entropy_sum(h, W, top, bias, token_weights=weights)

    value, gradient = total(*given, weights, impossible)
    assert value == 0
    assert all(np.all(g == 0) for g in gradient)
    assert np.isnan(total(*given, np.float32(np.arange(ROWS) == 0), impossible)[0])
    assert total(*given, np.float32(np.arange(ROWS) == 3), impossible)[0] == np.inf
    possible, _ = total(*given, np.float32(np.arange(ROWS) >= 2), jnp.zeros(CLASSES))
    each = evaluated(heads.linear_cross_entropy)(*given, top)
    np.testing.assert_allclose(possible, jnp.sum(each[2:]), rtol=1e-6)
    assert np.isnan(each[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rest_that_is_impossible_has_no_mass_by_rounding(dtype):
    """Of a teacher whose other classes are impossible, as the student's are; a mass that is more than that is +inf."""
    rng = np.random.default_rng(3)
    scores = np.float32(rng.normal(size=(200, 40)))
    scores[:, 30:] = -np.inf
    logits = rng.normal(size=(200, 30))
    given = jnp.asarray(np.float32(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)), dtype)
    q = np.float32(given)
    assert np.any(1 - q.sum(-1) > 0)
    indices = np.broadcast_to(np.arange(30), (200, 30))
    less = TopTargets(indices, 0.999 * q / q.sum(-1, keepdims=True))
    almost = TopTargets(np.array([[0]]), np.float32([[1 - 2.0**-24]]))  # 1 − S has its digits there

    @jax.jit
    def results(scores, q, given):
        f, top = losses.cross_entropy, TopTargets(indices, given)
        bias = scores[0]
        of_head = heads.linear_cross_entropy(jnp.zeros((200, 3)), jnp.ones((40, 3)), top, bias)
        same = (
            (f(scores, top), f(scores, jnp.pad(q, [(0, 0), (0, 10)]))),
            (of_head, f(jnp.broadcast_to(bias, (200, 40)), top)),
        )
        by_scores = jax.grad(lambda z: f(z, almost).sum())(jnp.array([[40.0, 0.0, 0.0]]))
        return same, losses.kl_to_target(scores, top), f(scores, less), by_scores

    same, divergence, of_less, by_scores = results(scores, q, given)
    for found, want in same:
        np.testing.assert_allclose(found, want, rtol=1e-6)
    assert np.isfinite(divergence).all()
    np.testing.assert_array_equal(of_less, np.inf)
    np.testing.assert_allclose(by_scores[0, 1], -(2.0**-25), rtol=1e-4)


def test_classes_that_are_there_twice_and_negative_probabilities():
    """As the docstring says: without an error."""
    z = jnp.array([0.5, 1.0, 2.0])
    twice = losses.cross_entropy(z, TopTargets(jnp.array([2, 2]), jnp.array([0.5, 0.25])))
    x = np.append(np.float64(z[jnp.array([2, 2])]), np.logaddexp(0.5, 1.0))
    np.testing.assert_allclose(twice, -np.array([0.5, 0.25, 0.25]) @ (x - np.logaddexp.reduce(x)), rtol=1e-6)
    negative = TopTargets(jnp.array([0, 1, 2]), jnp.array([-0.25, 0.75, 0.5]))
    np.testing.assert_allclose(losses.cross_entropy(z, negative), losses.cross_entropy(z, negative.probabilities))
    assert np.isnan(losses.kl_to_target(z, negative))
    assert np.isnan(losses.kl_to_target(z, negative.probabilities))


OF_HALF = {"class": 0.5, "renormalise": 1.0, "ignore": 0.5}
"""The part of the loss that is left if all classes are given with half of their mass."""


def test_all_classes_are_a_distribution_and_one_a_label():
    order = np.argsort(Z, -1)
    q = np.float32(jax.nn.softmax(np.sin(Z)))
    z = jnp.float32(Z)
    whole = losses.cross_entropy(z, q)
    for tail in TAILS:  # no class is left for what 1 − Σ q is by rounding
        every = TopTargets(order, np.take_along_axis(q, order, -1), tail)
        np.testing.assert_allclose(losses.cross_entropy(z, every), whole, rtol=1e-6)
        less = TopTargets(order, every.probabilities / 2, tail)  # nor for the half that no class has
        np.testing.assert_allclose(losses.cross_entropy(z, less), whole * OF_HALF[tail], rtol=1e-6)
        one = TopTargets(INDICES[:, :1], jnp.ones((ROWS, 1)), tail)
        np.testing.assert_allclose(losses.cross_entropy(z, one), losses.cross_entropy(z, INDICES[:, 0]), rtol=1e-6)


def test_a_small_rest_keeps_its_digits():
    """A student that is nearly sure of the k classes: the rest by its own sum, not by 1 − Σ p; scores made in the
    program."""
    scores = np.full((1, 40), -30.0)
    scores[0, :2] = 2.0, 1.0
    top = TopTargets(np.array([[0, 1]]), np.float32([[0.75, 0.1875]]))

    def of(scores):
        rest = -np.log(38 * np.exp(-30.0)) + np.log(np.exp(2.0) + np.exp(1.0) + 38 * np.exp(-30.0))
        return 0.0625 * rest + 0.75 * np.log1p(np.exp(-1.0)) + 0.1875 * (1 + np.log1p(np.exp(-1.0)))

    made = jax.jit(lambda z, c: losses.cross_entropy(c * z, top))(jnp.float32(scores / 2), jnp.float32(2))
    np.testing.assert_allclose(made, of(scores), rtol=3e-7)
    by_rest = jax.grad(lambda z: losses.cross_entropy(z, TopTargets(top.indices, jnp.ones((1, 2)) / 2)).sum())
    np.testing.assert_allclose(by_rest(jnp.float32(scores))[0, 2:], np.exp(-30) / (np.exp(2) + np.exp(1)), rtol=1e-5)


def test_edges():
    """Of rows: padded by −1, out of range with mass, on a class that the mask leaves out, on an impossible one, with a
    bad score, left out."""
    indices = np.array([[0, -1], [0, 9], [0, 2], [0, 3], [0, 1], [0, 9]])
    q = np.float32([[0.5, 0.0], [0.5, 0.25], [0.5, 0.25], [0.5, 0.25], [0.5, 0.25], [np.nan, 1.0]])
    z, mask, rows = np.zeros((6, 5), np.float32), np.ones((6, 5), bool), np.arange(6) < 5
    z[3, 3], z[4, 4], mask[2, 2] = -np.inf, np.nan, False
    many = TopTargets(np.array([[1, 0]]), np.float32([[0.75, 0.75]]))  # more than all of the mass: no rest

    @evaluated
    def results(z, q):
        def counted(z, q):
            return losses.cross_entropy(z, TopTargets(indices, q), where=rows)

        masked = losses.cross_entropy(z, TopTargets(indices, q), where=mask)
        gradients = jax.grad(lambda z, q: jnp.sum(jnp.where(jnp.arange(6) == 4, 0, counted(z, q))), (0, 1))(z, q)
        return counted(z, q), masked, gradients, losses.cross_entropy(z[:1], many)

    counted, masked, gradients, of_many = results(z, q)
    np.testing.assert_allclose(counted[:2], [np.log(5) / 2 + np.log(5 / 4) / 2, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(counted[3:], [np.inf, np.nan, 0])
    np.testing.assert_allclose(masked[2], np.log(4) / 2 + np.log(4 / 3) / 4, rtol=1e-6)
    assert all(np.isfinite(np.asarray(g)[[0, 1, 2, 3, 5]]).all() for g in gradients)
    np.testing.assert_array_equal(np.asarray(gradients[0])[[1, 5]], 0)
    np.testing.assert_allclose(of_many, 1.5 * np.log(5), rtol=1e-6)


def test_narrow_scores_axes_and_vmap():
    loss, head = losses.cross_entropy, heads.linear_cross_entropy

    @evaluated
    def results(z, top, *narrow):
        wide = [a.astype(jnp.float32) for a in (z, *narrow)]
        ways = loss(z, top), loss(z.T, top, axis=0), jax.vmap(loss)(z, top)
        of_head = head(*narrow, top), jax.vmap(head, (0, None, 0))(*narrow, top)
        return (loss(wide[0], top), ways, 1e-6), (head(*wide[1:], top), of_head, 1e-5)

    z, q, *narrow = (jnp.asarray(a, jnp.bfloat16) for a in (Z, Q, HIDDEN, WEIGHT))
    for want, ways, rtol in results(z, TopTargets(jnp.asarray(INDICES), q), *narrow):
        for found in ways:
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, want, rtol=rtol)


OF_PARTS = ["scores in shard_map", "head in shard_map", "head by shards"]


@pytest.mark.parametrize("way", some(OF_PARTS, ["head in shard_map"]))
def test_classes_on_several_devices(way):
    """Value, gradient, Hessian product. By default the way that needs both the head's merges and the loss's."""
    with jax.enable_x64(True):
        given, q = (jnp.asarray(HIDDEN), jnp.asarray(WEIGHT)), jnp.asarray(Q)

        def of_scores(h, W, **o):
            return losses.cross_entropy(h @ W.T, TopTargets(INDICES, q), **o)

        def of_head(h, W, **o):
            return heads.linear_cross_entropy(h, W, TopTargets(INDICES, q), block_size=(4, 5), **o)

        cut = {"mesh": sharding.mesh(), "in_specs": (PartitionSpec(), PartitionSpec("v")), "out_specs": PartitionSpec()}
        f = {
            "scores in shard_map": jax.shard_map(functools.partial(of_scores, axis_name="v"), **cut),
            "head in shard_map": jax.shard_map(functools.partial(of_head, axis_name="v"), **cut),
            "head by shards": functools.partial(of_head, shards=sharding.DEVICES),
        }[way]
        ways = (f, True), (of_scores, False)
        found, want = (evaluated(functools.partial(modes.in_all_modes, *g))(*given) for g in ways)
        sharding.assert_close(found, want, 1e-9)


@pytest.mark.full  # The loss is above, and the sum of labels in test_heads_sharded.py.
def test_sum_of_head_over_classes_on_several_devices():
    """Value and gradient, in shard_map and by shards."""
    weights, top = jnp.cos(jnp.arange(ROWS, dtype=jnp.float32)), TopTargets(INDICES, jnp.float32(Q))
    given = jnp.float32(HIDDEN), jnp.float32(WEIGHT)

    def total(h, W, **o):
        return heads.linear_cross_entropy_sum(h, W, top, token_weights=weights, **o)

    cut = {"mesh": sharding.mesh(), "in_specs": (PartitionSpec(), PartitionSpec("v")), "out_specs": PartitionSpec()}
    want = jax.value_and_grad(lambda h, W: jnp.sum(weights * losses.cross_entropy(h @ W.T, top)), (0, 1))(*given)
    for f in (
        jax.shard_map(functools.partial(total, axis_name="v"), **cut),
        functools.partial(total, shards=sharding.DEVICES),
    ):
        sharding.assert_close(jax.jit(jax.value_and_grad(f, (0, 1)))(*given), want, 1e-5)


WRONG = [
    (lambda: TopTargets(INDICES, Q, "rest"), ValueError, "TopTargets: tail must be one of 'class'"),
    (lambda: TopTargets(Q, INDICES), TypeError, "labels.indices must be integers"),
    (lambda: TopTargets(INDICES, INDICES), TypeError, "labels.probabilities must be floating"),
    (lambda: TopTargets(INDICES[0], Q[0]), ValueError, r"must have the shape \(6, k\)"),
]


@pytest.mark.parametrize(("make", "error", "words"), WRONG)
def test_wrong_targets(make, error, words):
    for call in (
        lambda: losses.cross_entropy(jnp.float32(Z), make()),
        lambda: heads.linear_cross_entropy(jnp.float32(HIDDEN), jnp.float32(WEIGHT), make()),
    ):
        with pytest.raises(error, match=words):
            call()


def test_a_wrong_tail_is_an_error_where_it_is_built():
    with pytest.raises(ValueError, match="one of 'class', 'renormalise', 'ignore'; got 'drop'"):
        TopTargets(INDICES, Q, tail="drop")


def test_jax_rebuilds_it_and_shows_it():
    """Anything may be a leaf, since checks come where it is built and where it is used."""
    top = TopTargets(np.array([[2]]), np.array([[0.5]]), "ignore")
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), top)
    assert repr(names) == "TopTargets(indices='.indices', probabilities='.probabilities', tail='ignore')"
    assert repr(top) == "TopTargets(indices=array([[2]]), probabilities=array([[0.5]]), tail='ignore')"


@pytest.mark.parametrize("keyword", [{"label_smoothing": 0.1}, {"margin": 0.1}, {"ignore_label": 3}])
def test_options_of_labels(keyword):
    top = TopTargets(INDICES, jnp.float32(Q))
    for f, given in (
        (losses.cross_entropy, (jnp.float32(Z),)),
        (heads.linear_cross_entropy, (jnp.float32(HIDDEN), jnp.float32(WEIGHT))),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(keyword))} must be left out where labels are"):
            f(*given, top, **keyword)


def test_derivatives_of_little_mass_that_is_shared_out():
    z, indices = jnp.array([0.0, 1.0, 2.0]), jnp.array([0, 1])

    def loss(q):
        return losses.cross_entropy(z, TopTargets(indices, q, "renormalise"))

    np.testing.assert_allclose(jax.grad(loss)(jnp.array([1e-20, 3e-20])), [1.875e19, -6.25e18], rtol=1e-5)


@pytest.mark.parametrize("dtype", some([jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
def test_narrow_scores_under_strict_promotion(dtype):
    z, target = jnp.array([[0, 1, 2]], dtype), TopTargets(jnp.array([[0]]), jnp.array([[0.5]], dtype))
    wide = TopTargets(target.indices, target.probabilities.astype(jnp.float32))
    with strict_promotion():
        for f in (losses.cross_entropy, losses.focal_cross_entropy, losses.poly_cross_entropy, losses.kl_to_target):
            of_both = evaluated(lambda z, f=f: (f(z, target), f(z.astype(jnp.float32), wide)))
            np.testing.assert_allclose(*of_both(z), rtol=1e-6)
