"""Streaming heads against the materialised computation: values, derivatives, memory, digits, edges, wrong calls."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, named, some
from interpreter import evaluated
from modes import assert_same
from platforms import as_on_accelerators

import jsoftmax as js
from jsoftmax import heads, losses
from jsoftmax.heads import _top
from jsoftmax.verify import PHIS

TOKENS, CLASSES, FEATURES = 12, 50, 5
BLOCKS = {"one": (12, 50), "even": (4, 25), "odd": (5, 7)}
KEEP = np.arange(CLASSES) % 7 != 3
PRIOR = np.sin(np.arange(CLASSES))
LABELS = np.array([[4, 0, 49, 7], [7, 20, 33, 48], [12, 11, 25, 4]])
WEIGHTS = np.cos(np.arange(TOKENS)).reshape(3, 4)
OPTIONS = {
    "plain": {},
    "cap": {"soft_cap": 1.5},
    "margin": {"margin": 0.3},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.01},
    "temperature": {"temperature": 1.7, "margin": 0.3},
    "prior": {"log_weights": PRIOR},
    "classes": {"where": KEEP},
    "ignored": {"ignore_label": 7},
    "all": {
        "soft_cap": 2.0,
        "temperature": 0.8,
        "margin": 0.3,
        "label_smoothing": 0.2,
        "z_loss": 0.01,
        "log_weights": PRIOR,
        "where": KEEP,
        "ignore_label": 7,
        "phi": js.softplus,
    },
}


def arrays(dtype=jnp.float64, bias=True):
    rng = np.random.default_rng(0)
    made = [jnp.asarray(rng.normal(size=size), dtype) for size in ((3, 4, FEATURES), (CLASSES, FEATURES), CLASSES)]
    return made if bias else made[:2]


def scores(hidden, weight, bias=None, soft_cap=None):
    z = hidden @ weight.T + (0 if bias is None else bias)
    return z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)


def plain_loss(hidden, weight, bias, *, soft_cap=None, temperature=1.0, labels=LABELS, **options):
    """The two lines that `linear_cross_entropy` equals."""
    if "where" in options:
        options |= {"where": options["where"][None, None]}
    return losses.cross_entropy(scores(hidden, weight, bias, soft_cap) / temperature, labels, **options)


ALONE = ["cap", "margin", "smoothing", "z_loss", "prior", "classes", "ignored"]
CASES = and_full(
    [("all", "odd"), ("plain", "one")],
    [("all", "even"), ("all", "one"), ("plain", "even"), ("plain", "odd"), *((name, "odd") for name in ALONE)],
)
"""By default all options and none, blocks and one block."""


@pytest.mark.parametrize(("options", "blocks"), CASES)
def test_options(options, blocks):
    given = OPTIONS[options]
    with jax.enable_x64(True):
        ours = functools.partial(heads.linear_cross_entropy, block_size=BLOCKS[blocks], **given)
        plain = functools.partial(plain_loss, **given)
        assert_same(lambda h, W, b: ours(h, W, LABELS, b), plain, arrays())


SOME_PHIS = [phi for phi in PHIS if jax.tree.leaves(phi)] + [js.taylor(2), *named(PHIS, ["from_callable"])]
"""A head takes φ by its logarithm, as everything does: those with parameters, one without, and a callable. By default
one that has parameters, and is 0 at some scores."""


@pytest.mark.parametrize("phi", some(SOME_PHIS, [js.relu_power(2, 0.1)]), ids=str)
def test_phis_and_their_parameters(phi):
    """Log-probability, entropy, log-normaliser and mode, and the derivatives in φ's own parameters."""
    with jax.enable_x64(True):
        hidden, weight = arrays(bias=False)
        hidden = hidden * 0.2  # inside q-exponential's domain
        leaves, structure = jax.tree.flatten(phi)
        leaves = [jnp.asarray(leaf) for leaf in leaves]

        def ours(hidden, weight, *leaves):
            phi = jax.tree.unflatten(structure, leaves)
            found = heads.linear_statistics(hidden, weight, LABELS, phi=phi, block_size=(12, 25))
            return found.log_prob + 2 * found.entropy + jnp.cos(found.log_normalizer)

        def plain(hidden, weight, *leaves):
            phi = jax.tree.unflatten(structure, leaves)
            z = hidden @ weight.T
            log_p = jnp.take_along_axis(js.log_softmax(z, phi=phi), LABELS[..., None], -1)[..., 0]
            return log_p + 2 * js.entropy(z, phi=phi) + jnp.cos(js.log_normalizer(z, phi=phi))

        assert_same(ours, plain, (hidden, weight, *leaves), rtol=1e-10)

        @evaluated
        def modes(hidden, weight):
            found = heads.linear_statistics(hidden, weight, LABELS, phi=phi, block_size=(12, 25)).argmax
            return found, jnp.argmax(js.softmax(hidden @ weight.T, phi=phi), -1)

        np.testing.assert_array_equal(*modes(hidden, weight))


OUTPUTS = {
    "log_prob": lambda z: jnp.take_along_axis(js.log_softmax(z), LABELS[..., None], -1)[..., 0],
    "entropy": js.entropy,
    "log_normalizer": js.log_normalizer,
}


@pytest.mark.parametrize("name", some(OUTPUTS, ["entropy"]))  # the others alone: the loss, and log_normalizer below
def test_the_cotangent_of_each_output_alone(name):
    with jax.enable_x64(True):

        def ours(hidden, weight, bias):
            return getattr(heads.linear_statistics(hidden, weight, LABELS, bias, block_size=(5, 7)), name)

        assert_same(ours, lambda *given: OUTPUTS[name](scores(*given)), arrays())


def test_log_normalizer():
    with jax.enable_x64(True):
        ours = functools.partial(heads.linear_log_normalizer, block_size=(5, 7), where=KEEP, soft_cap=2.0)
        assert_same(ours, lambda *given: js.log_normalizer(scores(*given, 2.0), where=KEEP), arrays())


def test_distributions_and_options_that_are_learned():
    """Derivatives in q, the prior, the cap, the smoothing."""
    with jax.enable_x64(True):
        hidden, weight, _ = arrays()
        q = jax.nn.softmax(jnp.sin(jnp.arange(TOKENS * CLASSES, dtype=float)).reshape(3, 4, CLASSES)) * KEEP
        prior, cap, smoothing = jnp.asarray(PRIOR), jnp.asarray(2.0), jnp.asarray(0.2)

        def ours(hidden, weight, q, *learned):
            given = dict(zip(("log_weights", "soft_cap", "label_smoothing"), learned, strict=True))
            return heads.linear_cross_entropy(hidden, weight, q, where=KEEP, block_size=(5, 7), **given)

        def plain(hidden, weight, q, *learned):
            prior, cap, smoothing = learned
            z, given = scores(hidden, weight, soft_cap=cap), {"log_weights": prior, "label_smoothing": smoothing}
            return losses.cross_entropy(z, q, where=KEEP[None, None], **given)

        assert_same(ours, plain, (hidden, weight, q, prior, cap, smoothing))


OF_SUM = and_full([("all", "odd")], itertools.product(["all", "plain"], ["odd", "one"]))
"""By default all options in several blocks, the last of which are padded. One block, and no option, are less of the
same loop."""


@pytest.mark.parametrize(("options", "blocks"), OF_SUM)
def test_sum(options, blocks):
    """With the weights of tokens as an argument, one of them 0."""
    given = OPTIONS[options]
    with jax.enable_x64(True):
        w = jnp.asarray(WEIGHTS).at[1, 1].set(0)

        def ours(hidden, weight, bias, w):
            options = {"token_weights": w, "block_size": BLOCKS[blocks], **given}
            return heads.linear_cross_entropy_sum(hidden, weight, LABELS, bias, **options)

        def plain(hidden, weight, bias, w):
            return jnp.sum(w * plain_loss(hidden, weight, bias, **given))

        assert_same(ours, plain, (*arrays(), w))


@pytest.mark.parametrize("options", some(["plain", "classes", "ignored"], ["ignored"]))
def test_several_labels_of_each_token(options):
    """As one after the other; one of them sure of its class."""
    several, given = jnp.stack([LABELS, LABELS[::-1] % 9, LABELS % 11]), OPTIONS[options]
    with jax.enable_x64(True):

        def ours(h, W, b):
            loss = heads.linear_cross_entropy(
                h, W, several, b, label_smoothing=0.1, z_loss=0.1, block_size=(5, 7), **given
            )
            return loss + jnp.sin(heads.linear_statistics(h, W, several, b, block_size=(5, 7)).log_prob)

        def plain(h, W, b):
            def of_one(labels):
                loss = plain_loss(h, W, b, labels=labels, label_smoothing=0.1, z_loss=0.1, **given)
                return loss + jnp.sin(jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0])

            log_p = js.log_softmax(scores(h, W, b))
            return jnp.stack([of_one(labels) for labels in several])

        assert_same(ours, plain, arrays())


def test_the_gradient_of_a_sure_label_among_several():
    """expm1(log p), not p − 1; by the weight, whose gradient is that of the scores."""
    weight = jnp.array([[20.0], [0.0], [1.0]])
    sure = jnp.array([[0], [1], [2]])
    by_weight = jax.jit(jax.jacobian(lambda W: heads.linear_cross_entropy(jnp.ones((1, 1)), W, sure)))
    by_scores = np.asarray(by_weight(weight))[:, 0, :, 0]
    p = np.exp(np.float64(weight[:, 0]) - 20) / np.sum(np.exp(np.float64(weight[:, 0]) - 20))
    want = p - np.eye(3)
    want[0, 0] = -p[1:].sum()
    np.testing.assert_allclose(by_scores, want, rtol=3e-6)


def test_smoothing_leaves_out_what_the_bias_does():
    """A bias of −inf, the usual padding: its class has no share in the smoothing, nor derivatives."""
    with jax.enable_x64(True):
        hidden, weight, bias = arrays()
        padded = bias.at[jnp.array([3, 40])].set(-jnp.inf)

        def of(f):
            return lambda h, W: f(h, W, padded)

        ours = functools.partial(heads.linear_cross_entropy, block_size=(5, 7), label_smoothing=0.2)
        plain = functools.partial(plain_loss, label_smoothing=0.2)
        assert_same(of(lambda h, W, b: ours(h, W, LABELS, b)), of(plain), (hidden, weight))


@pytest.mark.full  # The streamed rule is that of the loss, whose derivatives are above.
def test_sum_by_other_arguments():
    """By hidden alone, by an option, of distributions: the streamed rule."""
    with jax.enable_x64(True):
        q = jax.nn.softmax(jnp.sin(jnp.arange(TOKENS * CLASSES, dtype=float)).reshape(3, 4, CLASSES))
        hidden, weight, bias = arrays()
        totals = (
            lambda W: heads.linear_cross_entropy_sum(hidden, W, q, block_size=(5, 7)),
            lambda W: jnp.sum(losses.cross_entropy(scores(hidden, W), q)),
        )
        by, want = (evaluated(jax.grad(f))(weight) for f in totals)
        np.testing.assert_allclose(by, want, rtol=1e-11, atol=1e-13)
        sum_of = functools.partial(heads.linear_cross_entropy_sum, block_size=(5, 7))
        assert_same(
            lambda h, e: sum_of(h, weight, LABELS, bias, phi=js.spherical(e)),
            lambda h, e: jnp.sum(plain_loss(h, weight, bias, phi=js.spherical(e))),
            (hidden, jnp.asarray(0.3)),
        )


OF_KL = {"exp": {}, "spherical": {"where": KEEP, "phi": js.spherical(0.1)}}


@pytest.mark.parametrize("name", some(OF_KL, ["spherical"]))
def test_kl(name):
    """Of exp, too, in test_heads_sharded.py."""
    options = OF_KL[name]
    with jax.enable_x64(True):
        hidden, weight, bias = arrays()
        other = (jnp.sin(hidden), jnp.cos(weight), jnp.sin(bias))
        assert_same(
            lambda h, W, b, g, U, a: heads.linear_kl(h, W, g, U, b, a, soft_cap=3.0, block_size=(5, 7), **options),
            lambda h, W, b, g, U, a: js.kl_divergence(scores(h, W, b, 3.0), scores(g, U, a, 3.0), **options),
            (hidden, weight, bias, *other),
        )
        totals = (
            lambda h: heads.linear_kl(h, weight, *other[:2], block_size=(5, 7)).sum(),
            lambda h: js.kl_divergence(scores(h, weight), scores(*other[:2])).sum(),
        )
        frozen, plain = (evaluated(jax.grad(f))(hidden) for f in totals)
        np.testing.assert_allclose(frozen, plain, rtol=1e-11)


def test_jensen_shannon():
    """Of all arguments, β and the temperature among them; at its ends the divergences."""
    options = {"where": KEEP, "phi": js.spherical(0.1)}

    def plain(h, W, b, g, U, a, beta, tau):  # noqa: PLR0917  (all that are differentiated)
        p, q = (js.softmax(scores(*head, 3.0) / tau, **options) for head in ((h, W, b), (g, U, a)))
        m = jnp.where(KEEP, beta * p + (1 - beta) * q, 1)
        return sum(w * jnp.sum(r * jnp.log(jnp.where(KEEP, r, 1) / m), -1) for w, r in ((beta, p), (1 - beta, q)))

    def ours(h, W, b, g, U, a, beta, tau):  # noqa: PLR0917  (as above)
        given = {"soft_cap": 3.0, "temperature": tau, "block_size": (5, 7), **options}
        return heads.linear_jsd(h, W, g, U, b, a, beta=beta, **given)

    with jax.enable_x64(True):
        hidden, weight, bias = arrays()
        other = (jnp.sin(hidden), jnp.cos(weight), jnp.sin(bias))
        assert_same(ours, plain, (hidden, weight, bias, *other, jnp.asarray(0.3), jnp.asarray(1.5)), 1e-10)

        @evaluated
        def at_the_ends(beta, p, q):
            return heads.linear_jsd(hidden, weight, other[0], weight, beta=beta), heads.linear_kl(p, weight, q, weight)

        for beta, (p, q) in ((1e-9, (hidden, other[0])), (1 - 1e-9, (other[0], hidden))):
            found, want = at_the_ends(beta, p, q)
            np.testing.assert_allclose(found / 1e-9, want, rtol=1e-5)


def test_jensen_shannon_beside_its_ends():
    """Gradients of little weight keep their digits; at an end they are 0, and by β the divergence of the other side."""
    no_scores, flat = jnp.ones((1, 1)), jnp.zeros((2, 1))
    a, b = jnp.array([0.0, -3.0]), jnp.array([-3.0, 0.0])

    @jax.jit
    def gradients(a, b, beta):
        def divergence(a, b, beta):
            return jnp.sum(heads.linear_jsd(no_scores, flat, no_scores, flat, a, b, beta=beta))

        return jax.grad(divergence, (0, 1, 2))(a, b, beta)

    for beta in (1e-8, 1e-5, 1e-3):
        with jax.enable_x64(True):
            weight = np.float64(np.float32(beta))
            p, q = (np.exp(np.float64(z)) / np.sum(np.exp(np.float64(z))) for z in (a, b))
            r = -np.log1p(weight * (p / q - 1))
            want = (1 - weight) * q * (r - np.sum(q * r))
        np.testing.assert_allclose(gradients(a, b, beta)[1], want, rtol=3e-6)
    for beta, sign in ((0.0, 1), (1.0, -1)):
        by_a, by_b, by_beta = gradients(100 * a / 3, 100 * b / 3, beta)
        np.testing.assert_array_equal([by_a, by_b], 0)
        np.testing.assert_allclose(by_beta, sign * 100, rtol=1e-6)


def test_jensen_shannon_of_near_and_far_heads():
    """Equal heads have 0, near ones their digits, far ones log 2; the ends have 0; derivatives are finite."""
    hidden, weight, _ = arrays(jnp.float32)
    no_scores, flat = (jnp.ones((1, 1)), jnp.zeros((CLASSES, 1))), jnp.zeros(CLASSES)
    near = 2.0**-10 * jnp.round(4 * jnp.sin(jnp.arange(CLASSES)))

    def total(a, b, beta):
        return jnp.sum(heads.linear_jsd(*no_scores, *no_scores, a, b, beta=beta))

    f = jax.jit(jax.value_and_grad(total, (0, 1, 2)))
    np.testing.assert_array_equal(heads.linear_jsd(hidden, weight, hidden, weight), 0)
    p, q = (np.exp(np.float64(z)) / np.sum(np.exp(np.float64(z))) for z in (flat, near))
    m = 0.25 * p + 0.75 * q
    want = np.sum(0.25 * p * np.log(p / m) + 0.75 * q * np.log(q / m))
    np.testing.assert_allclose(f(flat, near, 0.25)[0], want, rtol=1e-4)
    first, second = flat.at[0].set(200.0), flat.at[1].set(200.0)
    np.testing.assert_allclose(f(first, second, 0.5)[0], np.log(2), rtol=1e-6)
    for beta in (0.0, 1.0):
        value, gradients = f(first, near, beta)
        np.testing.assert_allclose(value, 0, atol=1e-7)
        assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("k", some([1, 3, 50], [3]))
def test_top_k(k):
    """One class and several of them, of long blocks, below. All of them are impossible ones, too: in the gate."""
    with jax.enable_x64(True):
        hidden, weight, bias = arrays()
        weight = weight.at[9].set(weight[2]).at[31].set(weight[2])  # equals: the first comes first
        bias = bias.at[jnp.array([9, 31])].set(bias[2])

        def plain(hidden, weight, bias):
            return jax.lax.top_k(js.log_softmax(scores(hidden, weight, bias), where=KEEP), k)

        @evaluated
        def both(*given):
            return heads.linear_top_k(*given[:2], k, given[2], where=KEEP, block_size=(5, 7)), plain(*given)

        found, (log_prob, indices) = both(hidden, weight, bias)
        np.testing.assert_array_equal(found.indices, np.where(log_prob > -np.inf, indices, -1))
        np.testing.assert_allclose(found.log_prob, log_prob, rtol=1e-12)
        assert_same(
            lambda *given: heads.linear_top_k(*given[:2], k, given[2], where=KEEP, block_size=(5, 7)).log_prob,
            lambda *given: plain(*given)[0],
            (hidden, weight, bias),
        )


@pytest.mark.parametrize("platform", some(["cpu", "tpu"], ["tpu"]))
def test_top_k_of_long_blocks(platform):
    """With many equals, of which the first comes first. By default by the form of TPUs, which looks
    classes up by comparisons."""
    hidden, weight = jnp.ones((2, 1)), jnp.round(8 * jnp.sin(jnp.arange(3000.0)))[:, None]
    for k, size in ((1, 3000), (7, 517), (60, 1000)):
        f = evaluated(functools.partial(heads.linear_top_k, k=k, block_size=size))
        with as_on_accelerators(platform):
            found = f(hidden, weight).indices
        np.testing.assert_array_equal(found, [np.argsort(-np.asarray(weight[:, 0]), stable=True)[:k]] * 2)


def test_one_class_with_nan_leaves_no_mode():
    """The rows' maximum may drop the NaN: XLA's on CPU does in a block that is the whole vocabulary."""
    rng = np.random.default_rng(0)
    hidden, weight = np.float32(rng.normal(size=(9, 4))), np.float32(rng.normal(size=(300, 4)))
    weight[140] = np.nan
    mode = jax.jit(heads.linear_statistics)(hidden, weight, np.zeros(9, int)).argmax
    assert np.all(np.asarray(mode) == -1)
    for k in (1, 3):
        found = jax.jit(functools.partial(heads.linear_top_k, k=k))(hidden, weight)
        assert np.all(np.asarray(found.indices) == -1)
        assert np.all(np.isnan(found.log_prob))


def test_the_derivative_of_the_mode_among_equal_scores():
    """That of the first class alone, on accelerators, too."""
    with as_on_accelerators():
        rate = jax.jit(jax.grad(lambda x: jnp.sum(_top.block_top_k(x, 1)[0])))(jnp.zeros((2, 5)))
    np.testing.assert_array_equal(rate, [[1, 0, 0, 0, 0]] * 2)
