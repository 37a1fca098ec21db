"""Streaming heads: memory of every mode, narrow dtypes, digits, edges, sharded tokens, wrong calls."""

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
from modes import reverse_over_reverse, strict_promotion
from platforms import as_on_accelerators

import jsoftmax as js
from jsoftmax import heads, losses
from jsoftmax.heads import _check, _head


def head(tokens, classes, features, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(tokens, features)), scale * rng.normal(size=(classes, features))
    labels = rng.integers(0, classes, tokens)
    return jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype), jnp.asarray(labels)


# --- the plan of accelerators ----------------------------------------------------------------------------------


ON_ACCELERATORS = {
    "linear_cross_entropy": lambda h, W, y: heads.linear_cross_entropy(h, W, y, label_smoothing=0.1, z_loss=0.01),
    "of distributions": lambda h, W, y: heads.linear_cross_entropy(h, W, jnp.ones((len(h), len(W)), h.dtype) / len(W)),
    "linear_cross_entropy_sum": lambda h, W, y: heads.linear_cross_entropy_sum(h, W, y)[None],
    "linear_statistics": lambda h, W, y: heads.linear_statistics(h, W, y).entropy,
    "linear_kl": lambda h, W, y: heads.linear_kl(h, W, jnp.cos(h), W / 2),
    "linear_jsd": lambda h, W, y: heads.linear_jsd(h, W, jnp.cos(h), W / 2),
    "linear_top_k": lambda h, W, y: heads.linear_top_k(h, W, 3).log_prob,
}


RULES = ("linear_cross_entropy", "linear_kl", "linear_top_k")
"""The head of one weight that is trained most, one of two weights, and the one that merges classes.
linear_cross_entropy_sum is below, over shards."""


@pytest.mark.parametrize(
    ("name", "dtype"),
    and_full(
        [(name, "bfloat16") for name in RULES],
        covering(ON_ACCELERATORS, ["float32", "bfloat16"], met=[(0, 1)]),
    ),
)
def test_the_plan_of_accelerators(name, dtype, monkeypatch):
    """All tokens by blocks of classes: as on CPU, and with the digits of the inputs' dtype in derivatives."""
    hidden, weight, labels = head(12, 700, 16, dtype)
    f = ON_ACCELERATORS[name]

    def everything(h, W):
        def total(h, W):
            value = f(h, W, labels)
            return jnp.sum(jnp.cos(jnp.arange(1.0, 1 + value.size)).reshape(value.shape) * value), value

        gradient, along, value = jax.jvp(jax.grad(total, (0, 1), has_aux=True), (h, W), (W[:12], W / 3), has_aux=True)
        return value, gradient, along

    wanted = evaluated(everything)(hidden, weight)
    monkeypatch.setattr(_check, "_SCORES", 12 * 100)
    monkeypatch.setattr(_check, "_SUM_SCORES", 12 * 100)
    blocks = []
    monkeypatch.setattr(_head.Plan, "on_accelerators", recorded(_head.Plan.on_accelerators, blocks))
    with as_on_accelerators():
        found = evaluated(everything)(hidden, weight)
    assert {(plan.tokens, plan.classes) for plan in blocks} == {(12, 175)}  # a divisor of the classes
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = np.max(np.abs(np.float32(want)))
        narrow = dtype == "bfloat16" and got.shape != wanted[0].shape
        tolerance = 0.02 if narrow else 1e-5
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance * scale)


OVER_SHARDS = {
    "loss": lambda h, W, y, **o: jnp.cos(jnp.arange(13)) @ heads.linear_cross_entropy(h, W, y, ignore_label=-1, **o),
    "sum": lambda h, W, y, **o: heads.linear_cross_entropy_sum(h, W, y, ignore_label=-1, z_loss=0.1, **o),
    "top k": lambda h, W, y, **o: jnp.sum(jnp.sin(heads.linear_top_k(h, W, 3, **o).log_prob)),
}


@pytest.mark.parametrize("name", some(OVER_SHARDS, ["sum"]))
def test_the_plan_of_accelerators_over_shards(name, monkeypatch):
    """Odd tokens, some ignored, classes over four devices: gradient and Hessian product. By default of the sum, whose
    loop is not above."""
    hidden, weight, labels = head(13, 704, 16)
    labels, total = labels.at[::3].set(-1), OVER_SHARDS[name]

    def all_modes(f):
        gradient = jax.value_and_grad(f, (0, 1))
        return evaluated(lambda h, W, y: jax.jvp(lambda h, W: gradient(h, W, y), (h, W), (jnp.cos(h), jnp.sin(W))))

    specs = (PartitionSpec(), PartitionSpec("v"), PartitionSpec())
    sharded = jax.shard_map(
        functools.partial(total, axis_name="v"), mesh=sharding.mesh(), in_specs=specs, out_specs=PartitionSpec()
    )
    wanted = all_modes(total)(hidden, weight, labels)
    monkeypatch.setattr(_check, "_SCORES", 13 * 44)
    monkeypatch.setattr(_check, "_SUM_SCORES", 13 * 88)
    with as_on_accelerators():
        found = all_modes(sharded)(hidden, weight, labels)
    sharding.assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize("replace", some([True, False], [False]))
def test_draws_as_on_accelerators(replace, monkeypatch):
    """The same classes, whatever the blocks are. By default distinct ones, which take the way of the others and
    more."""
    hidden, weight, _ = head(70, 700, 16)
    draws = functools.partial(heads.linear_categorical, jax.random.key(1), shape=(4, 70), replace=replace)

    monkeypatch.setattr(_check, "_SCORES", 70 * 128)
    with as_on_accelerators():
        found = evaluated(draws)(hidden, weight)
        wanted = evaluated(functools.partial(draws, block_size=(16, 256)))(hidden, weight)
    assert np.mean(np.asarray(found) == wanted) > 0.98  # a rounding may move a draw


def recorded(f, results):
    def call(*given):
        results.append(f(*given))
        return results[-1]

    return call


# --- memory --------------------------------------------------------------------------------------------------


def loss(hidden, weight, labels):
    return jnp.mean(heads.linear_cross_entropy(hidden, weight, labels, block_size=(64, 256)))


def statistics(hidden, weight, labels):
    found = heads.linear_statistics(hidden, weight, labels, block_size=(64, 256))
    return jnp.mean(found.log_prob + found.entropy * jnp.cos(found.log_normalizer))


def summed(hidden, weight, labels):
    return heads.linear_cross_entropy_sum(hidden, weight, labels, block_size=(8, 256)) / len(hidden)


def kl(hidden, weight, labels):
    return jnp.mean(heads.linear_kl(hidden, weight, jnp.cos(hidden), weight, block_size=(64, 256)))


def top(hidden, weight, labels):
    classes = (labels[:, None] + jnp.arange(3)) % len(weight)
    targets = losses.TopTargets(classes, jnp.full(classes.shape, 0.25))
    return jnp.mean(heads.linear_cross_entropy(hidden, weight, targets, block_size=(64, 256)))


def several(hidden, weight, labels):
    return loss(hidden, weight, jnp.stack([labels, labels[::-1], jnp.roll(labels, 1)]))


def jsd(hidden, weight, labels):
    return jnp.mean(heads.linear_jsd(hidden, weight, jnp.cos(hidden), weight, block_size=(64, 256)))


def along(f, *arguments):
    return jax.jvp(f, arguments, arguments)[1]


MODES = {
    "value": lambda f: f,
    "gradient": lambda f: jax.grad(f, (0, 1)),
    "gradient of hidden": jax.grad,
    "jvp": lambda f: lambda h, W: along(f, h, W),
    "jacfwd": lambda f: lambda h, W: jax.jacfwd(lambda t: f(h * t, W))(jnp.ones(3)[0]),
    "hvp": lambda f: lambda h, W: along(jax.grad(f, (0, 1)), h, W),
    "hvp in a scan": lambda f: MODES["hvp"](lambda h, W: jax.lax.scan(lambda c, h: (c + f(h, W), 0), 0.0, h[None])[0]),
    "hvp of hidden": lambda f: lambda h, W: along(lambda h: jax.grad(f)(h, W), h),
    "reverse over reverse": lambda f: reverse_over_reverse(jax.grad(f, (0, 1)), (0, 1)),
    "vmap": lambda f: jax.vmap(jax.grad(f), (0, None)),
}


FEW_MODES = ["hvp in a scan", "reverse over reverse"]
"""The two that need most: values, gradients and jvp are parts of them. vmap and jacfwd are met in the gate."""
FUNCTIONS = [loss, statistics, summed, kl, jsd, top, several]
FEW_FUNCTIONS = [loss, summed]
"""The others go through the scans of the first; the gradient of the second has a scan of its own."""
OF_MEMORY = and_full(
    covering(FEW_MODES, FEW_FUNCTIONS, met=[(0, 1)]),
    covering(FEW_MODES, FUNCTIONS),
    covering(MODES, FUNCTIONS, met=[(0, 1)]),
)
"""In the gate every function and mode, and each function in the two modes that need most."""


@pytest.mark.parametrize(
    ("mode", "f"),
    OF_MEMORY,
    ids=lambda a: getattr(a, "__name__", a),
)
def test_no_array_of_tokens_by_classes(mode, f):
    """Temporaries are blocks and some arrays of the weight's own size; more tokens add far less than their logits."""
    needed = []
    for tokens in (512, 1024):
        hidden, weight, labels = head(tokens, 16384, 8)
        if mode == "vmap":
            hidden = jnp.stack([hidden] * 2)
        g = MODES[mode](functools.partial(f, labels=labels))
        found = jax.jit(g).lower(hidden, weight).compile().memory_analysis().temp_size_in_bytes
        needed.append(found)
    logits_added, weight_bytes = 4 * 512 * 16384, 4 * 8 * 16384
    # cotangents and directions; the divergence has two heads, here of one weight
    weights = {"reverse over reverse": 4, "value": 0, "jacfwd": 0}.get(mode, 1) * (
        2 if f in {kl, jsd} or (f is summed and mode != "value") else 1
    )
    assert needed[1] - weights * weight_bytes < 2 * logits_added / 20, needed
    assert needed[1] - needed[0] < logits_added / 20, needed


def test_blocks_of_ignored_tokens_are_skipped():
    """A NaN in an ignored token's hidden state reaches nothing; the program has the branch that skips its block."""
    hidden, weight, labels = head(32, 64, 4)
    labels = labels.at[::2].set(-100)
    bad = hidden.at[::2].set(jnp.nan)

    def total(hidden, weight):
        return jnp.sum(heads.linear_cross_entropy(hidden, weight, labels, ignore_label=-100, block_size=(8, 16)))

    f = jax.jit(jax.value_and_grad(total, (0, 1)))
    (value, gradients), (want, wanted) = f(bad, weight), f(hidden, weight)
    np.testing.assert_allclose(value, want)
    jax.tree.map(np.testing.assert_array_equal, gradients, wanted)
    assert "conditional" in f.lower(hidden, weight).compile().as_text()
    ignored = evaluated(functools.partial(heads.linear_cross_entropy, ignore_label=-100))
    every = ignored(bad, weight, np.full(32, -100))
    np.testing.assert_array_equal(every, 0)


# --- dtypes and digits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", some([jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
def test_narrow_factors_are_summed_in_float32(dtype):
    """Values and gradients of narrow arrays, beside those of the same numbers in float64, at scores up to `scale`."""
    hidden, weight, labels = head(64, 300, 16, dtype)

    def run(hidden, weight):
        def mean(hidden, weight):
            found = heads.linear_statistics(hidden, weight, labels, block_size=(32, 128))
            return jnp.mean(found.log_prob) + jnp.mean(found.entropy), found

        return jax.value_and_grad(mean, (0, 1), has_aux=True)(hidden, weight)

    narrow, wide = jax.jit(run), evaluated(run)
    for scale in (5, 20, 80, 640):
        scaled = (weight.astype(jnp.float32) * (scale / 12)).astype(dtype)
        (_, found), gradients = narrow(hidden, scaled)
        assert {a.dtype for a in found[:3]} == {jnp.dtype(jnp.float32)}
        assert [g.dtype for g in gradients] == [dtype, dtype]
        with jax.enable_x64(True):
            (_, want), wanted = wide(*(np.asarray(a, np.float64) for a in (hidden, scaled)))
        largest = float(jnp.max(jnp.abs(jnp.asarray(np.asarray(hidden @ scaled.T, np.float32)))))
        for a, b in zip(found[:3], want[:3], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7 * largest)
        for a, b in zip(gradients, map(np.asarray, wanted), strict=True):
            error = np.abs(np.asarray(a, np.float64) - b) / (np.abs(b) + 1e-3 * np.max(np.abs(b)))
            assert error.max() < 2 * float(jnp.finfo(dtype).eps) + 1e-6 * largest, (scale, error.max())


def test_gradient_of_a_narrow_weight_is_rounded_once():
    """The gradient is summed over blocks of tokens in float32; in a narrow dtype each block alone would be rounded
    away."""
    hidden, weight = jnp.asarray(np.ones((512, 1)), jnp.bfloat16), jnp.asarray(np.zeros((2, 1)), jnp.bfloat16)
    f = functools.partial(heads.linear_cross_entropy, block_size=(1, 1))
    for g in (f, lambda *a: heads.linear_cross_entropy_sum(*a, block_size=(1, 1))):
        by = evaluated(jax.grad(lambda W, g=g: jnp.sum(g(hidden, W, jnp.zeros(512, int)))))(weight)
        np.testing.assert_array_equal(by, jnp.array([[-256], [256]], jnp.bfloat16))


MODES_OF_DTYPES = and_full([(jnp.bfloat16, False)], [(jnp.float16, False), (jnp.bfloat16, True), (jnp.float64, True)])
"""By default a narrow one, which needs more casts. float16 takes its branches, float32 those of float64."""


@pytest.mark.parametrize(("dtype", "runs"), MODES_OF_DTYPES)
def test_strict_promotion_and_debug_nans(dtype, runs):
    """dtypes are known when a program is traced. That no step makes a NaN is seen when it runs, in the gate."""
    with jax.enable_x64(dtype == jnp.float64), strict_promotion(), jax.debug_nans(True):
        hidden, weight, labels = head(6, 10, 3, dtype)
        bias, w = jnp.zeros(10, dtype), jnp.ones(6, dtype)
        options = {
            "where": jnp.arange(10) != 3,
            "log_weights": jnp.zeros(10, dtype),
            "soft_cap": 3.0,
            "banned": jnp.array([[7, -1]] * 6),
            "block_size": (4, 4),
        }
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        given = (hidden, weight, labels, bias)
        everything = {"label_smoothing": 0.1, "margin": 0.1, "z_loss": 0.1, "ignore_label": 0}
        draws = functools.partial(heads.linear_categorical, min_p=0.2, return_log_prob=True)

        def values(hidden, weight, bias):
            given = (hidden, weight, labels, bias)
            return (
                heads.linear_cross_entropy(*given, **options, **everything),
                heads.linear_cross_entropy_sum(*given, token_weights=w, **options),
                *heads.linear_statistics(*given, **options)[:3],
                heads.linear_kl(hidden, weight, weight[:6], weight, bias, **options),
                heads.linear_top_k(hidden, weight, 3, bias, **options).log_prob,
                *draws(jax.random.key(0), hidden, weight, bias, **options)[1:],
                *draws(jax.random.key(0), hidden, weight, bias, top_k=3, **options)[1:],
            )

        def total(*given):
            found = values(*given)
            return sum(jnp.sum(a) for a in found), found

        gradient = jax.grad(total, (0, 1, 2), has_aux=True)
        call = evaluated(gradient) if runs else functools.partial(jax.eval_shape, gradient)
        by, found = call(*given[:2], bias)
        assert {a.dtype for a in found} == {jnp.dtype(wide)}
        assert [g.dtype for g in by] == [dtype] * 3
        assert heads.linear_categorical(jax.random.key(0), *given[:2], bias, **options).dtype == jnp.int32


def test_precision_reaches_every_product():
    """Three products of the sum's gradient, and four of the loss's, have the given precision."""
    hidden, weight, labels = head(8, 20, 3)
    for f, least in ((heads.linear_cross_entropy_sum, 3), (heads.linear_cross_entropy, 4)):
        total = lambda W, f=f: jnp.sum(f(hidden, W, labels, precision="highest", block_size=(4, 10)))  # noqa: E731
        text = str(jax.make_jaxpr(jax.grad(total))(weight))
        products = text.count("dot_general[")
        assert products >= least - 1  # hidden has no gradient here
        assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_two_heads_of_different_dtypes():
    """The result is that of the wider dtype: nothing of the reference is narrowed."""
    hidden, weight, _ = head(4, 30, 8)
    narrow = [a.astype(jnp.bfloat16) for a in (hidden, weight)]
    want = heads.linear_kl(*(a.astype(jnp.float32) for a in narrow), hidden, weight)
    np.testing.assert_allclose(heads.linear_kl(*narrow, hidden, weight), want, rtol=1e-5)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (hidden, weight)]
        for given in ((*wide, hidden, weight), (hidden, weight, *wide)):
            found = heads.linear_kl(*given, block_size=7)
            assert found.dtype == jnp.float64
            np.testing.assert_allclose(found, 0, atol=1e-13)


def test_tokens_that_do_not_count_have_scores_in_the_domain():
    """Padding and ignored tokens must not be zero vectors: their scores, which are the bias, could be outside the
    domain."""
    weight, bias = jnp.ones((2, 1)), jnp.array([3.0, 0.0])
    hidden, labels = jnp.full((3, 1), -2.0), jnp.array([0, -1, 1])
    options = {"phi": js.q_exponential(1.5), "ignore_label": -1, "block_size": (2, 2)}
    for f in (heads.linear_cross_entropy, heads.linear_cross_entropy_sum):
        total = lambda W, f=f: jnp.sum(f(hidden, W, labels, bias, **options))  # noqa: E731
        value, by = evaluated(jax.value_and_grad(total))(weight)
        assert jnp.isfinite(value)
        assert jnp.all(jnp.isfinite(by))


def test_digits():
    """A confident right answer, an almost one-hot row, two heads that differ a little."""
    weight = jnp.zeros((5000, 2)).at[:, 0].set(-20.0 - jnp.arange(5000.0) / 1024).at[3, 0].set(0.0)
    hidden = jnp.array([[1.0, 0.0]])
    found = heads.linear_statistics(hidden, weight, jnp.array([3]), block_size=512)
    x = np.asarray(weight[:, 0], np.float64)
    rest = np.exp(x[x < 0]).sum()
    np.testing.assert_allclose(-found.log_prob, np.log1p(rest), rtol=1e-6)
    entropy = np.log1p(rest) + (np.exp(x) * -x).sum() / (1 + rest)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-6)
    near = weight.at[3, 1].set(2.0**-10)
    got = heads.linear_kl(jnp.ones((1, 2)), weight, jnp.ones((1, 2)), near, block_size=512)
    y = np.asarray(near.sum(1), np.float64)
    log_p, log_q = (a - np.log(np.exp(a).sum()) for a in (x, y))
    np.testing.assert_allclose(got, (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-3)


# --- edges ---------------------------------------------------------------------------------------------------


OF_EDGES = and_full(
    [(js.exp, (7, 5)), (js.relu_power(2, 0.1), (3, 2))],
    itertools.product([js.exp, js.spherical(0.1), js.relu_power(2, 0.1)], [(7, 5), (3, 2)]),
)
"""By default φ = exp, whose logarithm is the score, and one that is 0 at some scores."""


@pytest.mark.parametrize(("phi", "blocks"), OF_EDGES, ids=str)
def test_edges_are_those_of_the_logits(phi, blocks):
    """NaN, infinities, classes left out, empty rows, labels out of range: values and gradients as of the logits."""
    nan, inf = jnp.nan, jnp.inf
    z = jnp.array([
        [0.0, 1, 2, 3, 4], [nan, 1, 2, 3, 4], [inf, 1, 2, 3, 4], [0, -inf, -inf, -inf, 1],
        [-inf] * 5, [0.0, 1, 2, 3, 4], [0.0, -inf, 2, 3, 4],
    ])  # fmt: skip
    labels = jnp.array([1, 0, 0, 0, 0, 7, 1])

    def ours(z, label):
        return heads.linear_statistics(jnp.ones((1, 1)), z[:, None], label[None], phi=phi, block_size=blocks)

    def plain(z, label):
        log_prob = -losses.cross_entropy(z, label, phi=phi)
        return log_prob, js.entropy(z, phi=phi), js.log_normalizer(z, phi=phi), js.log_softmax(z, phi=phi)

    @evaluated
    def results(z, label):
        gradients = [jax.jacrev(lambda z, f=f: f(z, label)[:3])(z) for f in (lambda *a: ours(*a)[:3], plain)]
        return ours(z, label), plain(z, label), gradients

    for row, label in zip(z, labels, strict=True):
        found, (*wanted, log_p), (gradients, plain_gradients) = results(row, label)
        for a, b in zip(found[:3], wanted, strict=True):
            np.testing.assert_allclose(a[0], b, rtol=1e-6)
        bad = jnp.any(jnp.isnan(log_p)) | jnp.all(log_p == -inf)
        assert int(found.argmax[0]) == (-1 if bad else int(jnp.argmax(log_p)))
        for got, want in zip(gradients, plain_gradients, strict=True):
            np.testing.assert_allclose(got[0], want, rtol=1e-5, atol=1e-7)


def test_a_bad_token_spoils_no_other():
    hidden, weight, labels = head(6, 20, 3)
    hidden, labels, key = hidden.at[2].set(jnp.nan), labels.at[4].set(20), jax.random.key(0)
    w = jnp.array([1.0, 1, 0, 1, 0, 1])

    @evaluated
    def results(hidden, labels):
        found = heads.linear_cross_entropy(hidden, weight, labels, block_size=(2, 8))
        total = heads.linear_cross_entropy_sum(hidden.at[2].set(0), weight, labels, token_weights=w)
        none, of_none = jnp.zeros(20, bool), jnp.zeros((0, 3))
        drawn = [heads.linear_categorical(key, hidden, weight, where=where) for where in (None, none)]
        empty = heads.linear_cross_entropy(of_none, weight, jnp.zeros(0, int))
        return found, total, drawn, heads.linear_log_normalizer(hidden[:1], weight, where=none), empty

    found, total, (drawn, of_none), normalizer, empty = results(hidden, labels)
    np.testing.assert_array_equal(jnp.isnan(found), [False, False, True, False, True, False])
    np.testing.assert_allclose(total, jnp.sum(found[jnp.array([0, 1, 3, 5])]), rtol=1e-6)
    np.testing.assert_array_equal(drawn >= 0, jnp.arange(6) != 2)
    assert normalizer == -jnp.inf
    assert of_none.tolist() == [-1] * 6
    assert empty.shape == (0,)


# --- transformations -----------------------------------------------------------------------------------------


@pytest.mark.full  # Heads over tokens and classes, both cut, are in test_heads_sharded.py.
def test_tokens_sharded_over_devices():
    hidden, weight, labels = head(16, 24, 3)
    mesh = jax.make_mesh((4,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (PartitionSpec("t"), PartitionSpec(), PartitionSpec("t"))

    def of_all(f):
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("t"))

    functions = (
        functools.partial(heads.linear_cross_entropy, block_size=(2, 8), label_smoothing=0.1, ignore_label=3),
        lambda h, W, y: heads.linear_statistics(h, W, y, block_size=(2, 8)).entropy,
        lambda h, W, y: heads.linear_kl(h, W, jnp.cos(h), W, block_size=(2, 8)),
        lambda h, W, y: heads.linear_cross_entropy_sum(h, W, y, block_size=(2, 8))[None],
    )

    def with_gradients(change):
        def run(*given):
            each = [change(f) for f in functions]
            return [(f(*given), jax.grad(lambda h, W, y, f=f: jnp.sum(f(h, W, y) ** 1), (0, 1))(*given)) for f in each]

        return evaluated(run)(hidden, weight, labels)

    got, want = with_gradients(of_all), with_gradients(lambda f: f)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a if a.shape == b.shape else a.sum(0)[None], b, rtol=2e-5, atol=1e-6)


def test_vmap_over_heads_scan_and_remat():
    hidden, weight, labels = head(6, 20, 3)
    hs, Ws = jnp.stack([hidden, hidden[::-1]]), jnp.stack([weight, -weight])
    f = functools.partial(heads.linear_cross_entropy, block_size=(3, 8), ignore_label=int(labels[0]))

    def gradient(W, y):
        return jax.grad(lambda W: jnp.sum(f(hidden, W, y)))(W)

    @evaluated
    def results(hs, Ws):
        mapped = jax.vmap(f, (0, 0, None))(hs, Ws, labels)
        scanned = jax.lax.scan(lambda c, hW: (c, jax.checkpoint(f)(*hW, labels)), 0, (hs, Ws))[1]
        plain = jnp.stack([f(hs[i], Ws[i], labels) for i in range(2)])
        return mapped, scanned, plain, jax.vmap(gradient, (0, None))(Ws, labels), gradient(Ws[1], labels)

    mapped, scanned, plain, by, of_one = results(hs, Ws)
    for found in (mapped, scanned):
        np.testing.assert_allclose(found, plain, rtol=1e-6)
    np.testing.assert_allclose(by[1], of_one, rtol=1e-5, atol=1e-6)
    drawn = jax.vmap(heads.linear_categorical, (None, 0, 0))(jax.random.key(0), hs, Ws)
    assert drawn.shape == (2, 6)


# --- wrong calls ---------------------------------------------------------------------------------------------

H, W, Y = jnp.ones((4, 3)), jnp.ones((5, 3)), jnp.zeros(4, int)
WRONG = {
    "kernel": (lambda: heads.linear_cross_entropy(H, W.T, Y), ValueError, r"hidden must end .* \(4, 3\) and \(3, 5\)"),
    "kernel named": (
        lambda: heads.linear_log_normalizer(H, jnp.ones((3, 7))),
        ValueError,
        r"Pass a weight \[features, classes\] as weight\.T",
    ),
    "weight's axes": (lambda: heads.linear_log_normalizer(H, jnp.ones(3)), ValueError, "weight must have two axes"),
    "integer hidden": (
        lambda: heads.linear_cross_entropy(Y, W, Y),
        TypeError,
        "hidden must be real and floating; got dtype int",
    ),
    "bias": (lambda: heads.linear_log_normalizer(H, W, jnp.ones(4)), ValueError, r"bias must have .* shape \(5,\)"),
    "labels' shape": (
        lambda: heads.linear_cross_entropy(H, W, Y[:2]),
        ValueError,
        r"integer labels must have the shape of hidden without its last axis, \(4,\); .* one token with one label",
    ),
    "float labels": (
        lambda: heads.linear_cross_entropy(H, W, jnp.zeros(4)),
        ValueError,
        r"must have the shape of hidden .*, with the classes added at the end, \(4, 5\); .* labels.astype\(int\)",
    ),
    "cap": (lambda: heads.linear_cross_entropy(H, W, Y, soft_cap=0), ValueError, "soft_cap must be > 0"),
    "smoothing": (
        lambda: heads.linear_cross_entropy(H, W, Y, label_smoothing=2),
        ValueError,
        "label_smoothing must be in",
    ),
    "margin of q": (
        lambda: heads.linear_cross_entropy(H, W, jnp.ones((4, 5)), margin=1),
        ValueError,
        "margin must be left",
    ),
    "where": (
        lambda: heads.linear_cross_entropy(H, W, Y, where=jnp.ones(4, bool)),
        ValueError,
        r"where must have one value for each class, shape \(5,\); .* To leave tokens out, use ignore_label",
    ),
    "log_weights": (
        lambda: heads.linear_log_normalizer(H, W, log_weights=jnp.ones(4)),
        ValueError,
        "log_weights must have one value for each class",
    ),
    "block": (lambda: heads.linear_log_normalizer(H, W, block_size=0), ValueError, "block_size must be a positive int"),
    "precision": (
        lambda: heads.linear_log_normalizer(H, W, precision="best"),
        ValueError,
        "precision must be None, a jax.lax.Precision or one of",
    ),
    "weights": (
        lambda: heads.linear_cross_entropy_sum(H, W, Y, token_weights=jnp.ones(3)),
        ValueError,
        r"token_weights must be a number or broadcast to the tokens' shape \(4,\)",
    ),
    "tokens": (lambda: heads.linear_kl(H, W, H[:2], W), ValueError, "hidden_p and hidden_q must have the same tokens"),
    "classes": (
        lambda: heads.linear_kl(H, W, H, W[:2]),
        ValueError,
        "weight_p and weight_q must have the same classes",
    ),
    "k": (lambda: heads.linear_top_k(H, W, 6), ValueError, r"k must be an int in \[1, 5\]"),
    "key": (lambda: heads.linear_categorical(H, W, Y), TypeError, "key must be one PRNG key"),
    "shape": (
        lambda: heads.linear_categorical(jax.random.key(0), H, W, shape=(3,)),
        ValueError,
        r"linear_categorical: shape must end in",
    ),
    "distinct": (
        lambda: heads.linear_categorical(jax.random.key(0), H, W, shape=(6, 4), replace=False),
        ValueError,
        "no more draws than there are classes, 5",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
