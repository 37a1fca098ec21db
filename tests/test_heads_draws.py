"""Classes drawn from a head: their law, cut or not, and its log-probabilities against those of all scores in float64;
the same draws however they are made; rounding, edges, shards, wrong calls."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharding
from cells import and_full, covering, some
from interpreter import evaluated
from jax.sharding import PartitionSpec
from modes import assert_same

import jsoftmax as js
from jsoftmax import heads
from jsoftmax.heads import _head

TOKENS, CLASSES, FEATURES = 6, 300, 5
KEEP = np.arange(CLASSES) % 7 != 3
BANNED = np.array([[0, 5, 299], [5, 5, -1], [128, 127, 300], [-1, -1, -1], [1, 2, 4], [200, 0, -7]], np.int32)
OPTIONS = {
    "plain": {},
    "all": {
        "phi": js.softplus,
        "soft_cap": 4.0,
        "temperature": 0.3,
        "where": KEEP,
        "log_weights": np.sin(np.arange(CLASSES)),
        "banned": BANNED,
    },
}
CUTS = {"none": {}, "min_p": {"min_p": 0.1}, "top_k": {"top_k": 9}, "both": {"top_k": 40, "min_p": 0.2}}


def arrays(dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def plain_log_p(given, cuts, *, soft_cap=None, temperature=1.0, where=None, banned=None, **law):
    """log p `[N, V]` of the law that is drawn from, by all scores."""
    z = given[0] @ given[1].T + given[2]
    z = (z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)) / temperature
    kept = jnp.ones(z.shape, bool) if where is None else jnp.broadcast_to(where, z.shape)
    if banned is not None:
        kept &= ~jnp.any(jnp.arange(z.shape[1]) == jnp.asarray(banned)[:, :, None], 1)
    kept &= js.truncate(z, where=kept, **cuts, **law) > -jnp.inf
    return js.log_softmax(z, where=kept, **law)


def at(log_p, drawn):
    """log p of draws `[n, N]`, −inf of those that are −1."""
    values = jnp.take_along_axis(log_p, jnp.maximum(drawn, 0).T, 1).T
    return jnp.where(drawn >= 0, values, -jnp.inf)


def assert_frequencies(drawn, p):
    """Counts within five standard deviations, and four more for what is drawn hardly ever; none of what has p = 0."""
    p = np.asarray(p)
    error = np.abs(np.bincount(drawn, minlength=len(p)) - len(drawn) * p)
    assert np.all(error <= np.where(p > 0, 5 * np.sqrt(len(drawn) * p * (1 - p)) + 4, 0))


@pytest.mark.full  # What is drawn without a cut: `test_log_prob`; frequencies of what a cut leaves: below.
def test_draws():
    """Frequencies of draws with and without replacement."""
    keys = jax.random.split(jax.random.key(0))
    hidden, weight = (jax.random.normal(k, (n, FEATURES)) for k, n in zip(keys, (2, 50), strict=True))
    weight = jnp.concatenate([weight * 1.5] * 6)[:290]
    where = jnp.arange(290) % 5 != 1
    token, draws = hidden, 4000
    p = np.asarray(js.softmax(token @ weight.T, where=where))
    hot = {"temperature": 2.0, "where": where}
    many = np.asarray(heads.linear_categorical(jax.random.key(0), 2 * token, weight, shape=(draws, 2), **hot))
    for i in range(2):
        assert_frequencies(many[:, i], p[i])
    rows = jnp.broadcast_to(token[0], (draws, FEATURES))
    options = {"shape": (3, draws), "replace": False, "where": where}
    three = np.asarray(heads.linear_categorical(jax.random.key(1), rows, weight, **options))
    assert not np.any(np.diff(np.sort(three, 0), axis=0) == 0)
    q = p[0]
    second = q * (np.sum(q / (1 - q)) - q / (1 - q))
    for drawn, want in ((three[0], q), (three[1], second)):
        assert_frequencies(drawn, want)
    every = heads.linear_categorical(jax.random.key(2), token[0], weight[:9], shape=(9,), replace=False, where=KEEP[:9])
    assert sorted(every.tolist()) == sorted([-1, *np.flatnonzero(KEEP[:9])])


@pytest.mark.full  # Two plans of blocks, of distinct draws, in test_heads_machinery.py.
@pytest.mark.parametrize("replace", [True, False])
def test_blocks_do_not_change_draws(replace):
    """Of three chunks, of which one, two or all make a block."""
    hidden, weight, _ = arrays(jnp.float32)
    few = functools.partial(heads.linear_categorical, jax.random.key(1), hidden, weight, shape=(5, TOKENS))
    drawn = [few(replace=replace, block_size=sizes) for sizes in ((4, 128), (6, 256), (6, 384))]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


LAWS = and_full([("both", "all", False), ("none", "plain", True)], covering(CUTS, OPTIONS, [True, False]))
"""By default the law with everything and the one without; each way to draw has a derivative of its own. In the gate
every two items meet."""


@pytest.mark.parametrize(("cuts", "options", "replace"), LAWS)
def test_log_prob(cuts, options, replace):
    """That of the law, with its derivatives; the classes are those that are drawn without it."""
    with jax.enable_x64(True):
        given = arrays()
        key, shape = jax.random.key(1), (5, TOKENS)

        def draws(*given, **more):
            every = {"shape": shape, "replace": replace, "block_size": (4, 128)} | OPTIONS[options] | CUTS[cuts] | more
            return heads.linear_categorical(key, *given, **every)

        (drawn, log_prob), alone = evaluated(lambda *g: (draws(*g, return_log_prob=True), draws(*g)))(*given)
        np.testing.assert_array_equal(drawn, alone)
        assert drawn.shape == log_prob.shape == shape
        assert log_prob.dtype == jnp.float64

        def plain(*given):
            return at(plain_log_p(given, CUTS[cuts], **OPTIONS[options]), drawn)

        np.testing.assert_array_equal(log_prob == -jnp.inf, drawn == -1)
        assert jnp.all(log_prob[0] > -jnp.inf)
        assert_same(
            lambda *given: jnp.where(drawn >= 0, draws(*given, return_log_prob=True)[1], 0),
            lambda *given: jnp.where(drawn >= 0, plain(*given), 0),
            given,
        )


FREQUENCIES = and_full([("min_p", 4000)], itertools.product(["min_p", "both"], [4000, 10_000]))
"""By default one cut, of fewer draws; log-probabilities and shards of both cuts are met above and below."""


@pytest.mark.parametrize(("cuts", "n"), FREQUENCIES)
def test_draws_of_a_law_that_is_cut(cuts, n):
    """Frequencies with and without replacement; what is cut is never drawn."""
    given = hidden, weight, bias = arrays(jnp.float32)
    options = OPTIONS["all"] | CUTS[cuts]
    p = np.exp(evaluated(lambda *given: plain_log_p(given, CUTS[cuts], **OPTIONS["all"]))(*given))
    assert np.all(np.sum(p > 0, 1) > 2)
    assert np.all(np.max(p, 1) < 0.9)
    many = np.asarray(heads.linear_categorical(jax.random.key(0), hidden, weight, bias, shape=(n, TOKENS), **options))
    for i in range(TOKENS):
        assert_frequencies(many[:, i], p[i])
    rows, banned = jnp.broadcast_to(hidden[0], (n, FEATURES)), jnp.broadcast_to(BANNED[0], (n, 3))
    of_one = options | {"banned": banned, "shape": (2, n), "replace": False}
    first, second = np.asarray(heads.linear_categorical(jax.random.key(1), rows, weight, bias, **of_one))
    assert not np.any(first == second)
    q = p[0]
    assert_frequencies(first, q)
    assert_frequencies(second, q * (np.sum(q / (1 - q)) - q / (1 - q)))


@pytest.mark.full  # What a cut leaves is drawn by its law, above.
@pytest.mark.parametrize("replace", [True, False])
def test_nothing_cut_draws_the_same(replace):
    """Of one key; min_p may be traced, in a map and a scan. At 1 and above it, the mode stays alone."""
    hidden, weight, bias = arrays(jnp.float32)

    def draw(min_p=None, **more):
        options = {"shape": (4, TOKENS), "replace": replace, "return_log_prob": True, "min_p": min_p, **more}
        return heads.linear_categorical(jax.random.key(3), hidden, weight, bias, **options)[0]

    plain = heads.linear_categorical(jax.random.key(3), hidden, weight, bias, shape=(4, TOKENS), replace=replace)
    np.testing.assert_array_equal(draw(), plain)
    np.testing.assert_array_equal(draw(banned=jnp.full((TOKENS, 2), -1)), plain)
    cuts = jnp.array([0.0, 0.05, 1.0, 7.0])
    mapped = evaluated(jax.vmap(draw))(cuts)
    np.testing.assert_array_equal(evaluated(lambda c: jax.lax.scan(lambda _, m: (0, draw(m)), 0, c)[1])(cuts), mapped)
    np.testing.assert_array_equal(mapped[0], plain)
    mode = jnp.argmax(hidden @ weight.T + bias, 1)
    only = jnp.where((jnp.arange(4) == 0)[:, None] | replace, mode, -1)
    np.testing.assert_array_equal(mapped[2:], [only, only])


def test_ties():
    """Of a tie for the last place of top_k the first are drawn; equals that min_p keeps all are."""
    hidden, weight = jnp.ones((400, 1)), jnp.array([[2.0], [5.0], [5.0], [1.0], [5.0], [4.0]])
    few, log_prob = heads.linear_categorical(jax.random.key(0), hidden, weight, top_k=2, return_log_prob=True)
    assert set(few.tolist()) == {1, 2}
    np.testing.assert_allclose(log_prob, -np.log(2), rtol=1e-6)
    all_equals, log_prob = heads.linear_categorical(jax.random.key(0), hidden, weight, min_p=1, return_log_prob=True)
    assert set(all_equals.tolist()) == {1, 2, 4}
    np.testing.assert_allclose(log_prob, -np.log(3), rtol=1e-6)


@pytest.mark.parametrize("dtype", some(["bfloat16", "float32"], ["bfloat16"]))
def test_scores_that_are_made_again(dtype):
    """With another rounding: the class that stays alone is drawn nevertheless. Narrow scores are rounded most."""
    keys = jax.random.split(jax.random.key(0))
    hidden, weight = (jax.random.normal(k, (n, 500)).astype(dtype) for k, n in zip(keys, (64, 640), strict=True))

    @jax.jit
    def draw(hidden, weight):
        options = {"bias": jnp.linspace(0, 1, 640).astype(dtype), "soft_cap": 90.0}
        mode = heads.linear_top_k(hidden, weight, 1, **options).indices[:, 0]
        options |= {"min_p": 1.0, "return_log_prob": True}
        ways = [{"replace": replace, "shape": (1, 64)} for replace in (True, False)]
        return mode, [heads.linear_categorical(jax.random.key(1), hidden, weight, **options, **way) for way in ways]

    mode, found = draw(hidden, weight)
    for drawn, log_prob in found:
        np.testing.assert_array_equal(drawn[0], mode)
        np.testing.assert_array_equal(log_prob, 0)
        assert log_prob.dtype == jnp.float32


def test_the_mode_stays_above_its_own_score():
    """As where another pass rounds it down."""
    head = _head.Head(jnp.ones((1, 1)), weight=jnp.array([[1.0], [3.0], [2.0]]))
    head = head._replace(
        phi=js.exp, least=jnp.array([[np.nextafter(np.float32(3), np.float32(4))]]), mode=jnp.array([[11]])
    )
    x = _head.block_scores(head, jnp.array(10), _head.Plan(1, 3, jnp.float32, None))
    np.testing.assert_array_equal(x, [[-np.inf, 3.0, -np.inf]])


def test_small_log_probs_keep_their_digits():
    """Of a class that is nearly sure, at scores far from 0."""
    weight = jnp.full((200, 1), -15.0).at[70, 0].set(2.0) + 300
    f = functools.partial(heads.linear_categorical, jax.random.key(0), jnp.ones((8, 1)), weight, return_log_prob=True)
    drawn, log_prob = f()
    np.testing.assert_array_equal(drawn, 70)
    np.testing.assert_allclose(log_prob, -np.log1p(199 * np.exp(-17.0)), rtol=1e-4)
    np.testing.assert_allclose(f(top_k=2)[1], -np.log1p(np.exp(-17.0)), rtol=1e-5)


OF_EDGES = and_full([("both", False)], itertools.product(CUTS, [True, False]))
"""By default with both cuts; bad tokens without a cut are in test_heads_machinery.py."""


@pytest.mark.parametrize(("cuts", "replace"), OF_EDGES)
def test_edges(cuts, replace):
    """NaN, +inf, few classes left, none, all of them banned: in their own rows alone, and with derivatives 0."""
    inf, nan = np.inf, np.nan
    z = jnp.array([[0.0, 1, 2, 3], [0, 1, nan, 3], [0, inf, 2, 3], [0, -inf, -inf, 3], [-inf] * 4, [1, 2, 3, 4]])
    banned = jnp.array([[-1] * 4] * 5 + [[3, 2, 1, 0]])
    options = {key: min(value, 4) for key, value in CUTS[cuts].items()} | {"replace": replace, "shape": (3, 1)}

    def f(z, banned):
        one = jnp.ones((1, 1))
        return heads.linear_categorical(
            jax.random.key(0), one, z[:, None], banned=banned[None], return_log_prob=True, **options
        )

    def with_gradient(z, banned):
        by = jax.grad(lambda z: jnp.sum(f(z, banned)[1]))(z)
        return *(a[:, 0] for a in f(z, banned)), by

    drawn, log_prob, by = (np.asarray(a) for a in jax.jit(jax.vmap(with_gradient))(z, banned))
    assert np.all(drawn[[0, 3], 0] >= 0)
    assert set(drawn[3].tolist()) <= {0, 3, -1}
    np.testing.assert_array_equal(drawn[[1, 2, 4, 5]], -1)
    np.testing.assert_array_equal(log_prob[[1, 2]], nan)
    np.testing.assert_array_equal(log_prob[[4, 5]], -inf)
    np.testing.assert_array_equal(drawn[[0, 3]] < 0, log_prob[[0, 3]] == -inf)
    np.testing.assert_array_equal(by[[4, 5]], 0)
    assert np.all(np.isfinite(by[[0, 3]]))


WAYS = ("shard_map", "shard_map without check_vma", "vmap", "shards")


@pytest.mark.parametrize(
    ("cuts", "way", "replace"),
    and_full(
        [("both", "shard_map", False), ("none", "shards", True)], covering(CUTS, WAYS, [True, False], met=[(0, 1)])
    ),
)
def test_shards(cuts, way, replace):
    """Classes, log-probabilities and gradients of shards of whole chunks."""
    keys = jax.random.split(jax.random.key(1), 3)
    with jax.enable_x64(True):
        given = jax.random.normal(keys[0], (4, 3)), jax.random.normal(keys[1], (512, 3))
        banned = jnp.array([[0, 200], [511, -1], [130, 131], [-1, -1]])

        def f(h, W, **o):
            options = {"shape": (5, 4), "replace": replace, "banned": banned, "return_log_prob": True}
            return heads.linear_categorical(keys[2], h, W, **options, **CUTS[cuts], **o)

        def of_part(h, W):
            return f(h, W, axis_name="v")

        def mapped(h, W):
            return jax.vmap(of_part, (None, 0), None, axis_name="v")(h, W.reshape(4, 128, 3))

        over = {
            "mesh": sharding.mesh(),
            "in_specs": (PartitionSpec(), PartitionSpec("v")),
            "out_specs": PartitionSpec(),
        }
        ways = {
            "shard_map": jax.shard_map(of_part, **over),
            "shard_map without check_vma": jax.shard_map(of_part, check_vma=False, **over),
            "vmap": mapped,
            "shards": functools.partial(f, shards=4),
        }

        def results(f):
            def total(*given):
                drawn, log_prob = f(*given)
                return jnp.sum(jnp.where(drawn >= 0, jnp.sin(log_prob), 0)), (drawn, log_prob)

            return evaluated(jax.grad(total, (0, 1), has_aux=True))(*given)

        (by, (drawn, log_prob)), (want_by, (want, want_log_prob)) = results(ways[way]), results(f)
        np.testing.assert_array_equal(drawn, want)
        np.testing.assert_allclose(log_prob, want_log_prob, rtol=1e-10)
        sharding.assert_close(by, want_by, 1e-9)


@pytest.mark.full  # Blocks bound the memory of each head alike: test_heads_machinery.py measures it.
def test_no_array_of_tokens_by_classes():
    """More tokens add a few numbers for each chunk of 128 classes, far less than their scores; lists of banned classes
    and cuts add none."""

    def mean(hidden, weight, banned):
        options = {"min_p": 0.1, "banned": banned, "return_log_prob": True, "block_size": (64, 256)}
        return jnp.mean(heads.linear_categorical(jax.random.key(0), hidden, weight, **options)[1])

    needed, weight = [], jnp.ones((16384, 8))
    for tokens in (512, 1024):
        f = jax.jit(jax.grad(mean, (0, 1))).lower(jnp.ones((tokens, 8)), weight, jnp.zeros((tokens, 3), int))
        needed.append(f.compile().memory_analysis().temp_size_in_bytes)
    assert needed[1] - needed[0] < 512 * weight.shape[0] * 4 / 16, needed


H, W = jnp.ones((4, 3)), jnp.ones((5, 3))
WRONG = {
    "top_k": ({"top_k": 6}, ValueError, r"top_k must be an int in \[1, 5\]"),
    "no top_k": ({"top_k": 0}, ValueError, r"top_k must be an int in \[1, 5\]"),
    "min_p": ({"min_p": 1.5}, ValueError, r"min_p must be in \[0, 1\]"),
    "min_p of tokens": ({"min_p": jnp.ones(4)}, ValueError, "min_p must be one number"),
    "distinct": (
        {"top_k": 2, "shape": (3, 4), "replace": False},
        ValueError,
        "no more draws than there are classes, 2",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    options, error, message = WRONG[name]
    with pytest.raises(error, match=f"linear_categorical: .*{message}"):
        heads.linear_categorical(jax.random.key(0), H, W, **options)
