"""Inputs that once gave wrong results, each with the right one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, named, some
from compilation import jit_as_user
from interpreter import evaluated
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import gumbel, heads, losses
from jsoftmax.heads import adaptive
from jsoftmax.verify import FUNCTIONS, LOSSES, OTHERS, SPARSE_MAPS

inf, nan = np.inf, np.nan


@pytest.mark.parametrize("alpha", some([2.5, 3.0, 4.5], [3.0]))
def test_entmax_of_a_row_alone_maximises(alpha):
    """A row gives the same alone, in a batch and mapped over; and its p maximises ⟨p, z⟩ − Ω(p) among its
    neighbours."""
    z = np.float32([-0.03, -0.04, -0.09, -0.14, 0.08, 0.2, -0.12, -0.01])
    alone = np.asarray(js.entmax(z, alpha))
    stack = np.stack([z, z + np.arange(8, dtype=np.float32) / 9])
    for other in (js.entmax(stack, alpha), jax.vmap(lambda z: js.entmax(z, alpha))(stack)):
        np.testing.assert_allclose(alone, np.asarray(other)[0], atol=1e-5)

    def value(p):
        return p @ z - np.sum(p**alpha - p) / (alpha * (alpha - 1))

    assert np.isclose(alone.sum(), 1)
    for i in range(8):
        assert value(alone) >= value(0.999 * alone + 0.001 * np.eye(8)[i]) - 1e-7


def test_fenchel_young_of_a_one_hot_solution():
    z, loss = jnp.array([2.0, 0.0]), jit_as_user(lambda z, y: js.fenchel_young_loss(z, y, 3.0))
    np.testing.assert_allclose([loss(z, jnp.array(y)) for y in (1, 0)], [2, 0], atol=1e-6)
    beside = loss(jnp.stack([z, jnp.array([0.1, 0.0])]), jnp.array([1, 0]))
    np.testing.assert_allclose(beside[0], 2, rtol=1e-6)


def of_rows(function, z):
    return function.with_rows(len(z)).ours(z, *[z[:, ::-1]] * (function.scores - 1), phi=js.exp)


OF_ROWS = [*FUNCTIONS, *LOSSES, *SPARSE_MAPS, *OTHERS]
FEW = ("softmax", "entmax(alpha=1.7)")
"""The others sum rows as the first does, or iterate until all rows are done as the second does."""


@pytest.mark.parametrize("function", some(OF_ROWS, named(OF_ROWS, FEW)), ids=str)
def test_a_row_does_not_depend_on_its_neighbours(function):
    """Results of a row are the same, bit for bit, whatever the other rows need."""
    rng = np.random.default_rng(0)
    z, others = (rng.normal(0, scale, (6, 7)).astype(np.float32) for scale in (1, 9))
    others[0], others[3] = -inf, nan
    others[:, 2] += 30
    f = jit_as_user(functools.partial(of_rows, function))
    whole = np.asarray(f(z))
    for i in range(6):
        changed = others.copy()
        changed[i] = z[i]
        np.testing.assert_array_equal(np.asarray(f(changed))[i], whole[i])


@pytest.mark.parametrize("alpha", some([1.3, 2.0, 3.0], [1.3]))
def test_a_row_of_entmax_does_not_depend_on_its_neighbours(alpha):
    """With an array of α, for which all of them take one way: by default one."""
    rng = np.random.default_rng(1)
    z, others = (jnp.asarray(rng.normal(0, scale, (5, 9)), jnp.float32) for scale in (1, 20))
    f = jit_as_user(lambda z: js.entmax(z, jnp.full((5, 1), alpha)))
    for i in range(5):
        np.testing.assert_array_equal(f(others.at[i].set(z[i]))[i], f(z)[i])


def test_a_temperature_does_not_depend_on_its_neighbours():
    z = jnp.asarray(np.random.default_rng(2).normal(0, 1, (4, 6)), jnp.float32)
    f = jit_as_user(lambda z: js.temperature_for_entropy(z, 0.7))
    np.testing.assert_array_equal(f(z.at[1:].multiply(50))[0], f(z)[0])


@pytest.mark.parametrize(
    ("f", "want"),
    [(js.softmax, 0), (js.log_softmax, -inf), (js.log_normalizer, -inf), (js.entropy, 0), (js.varentropy, 0)],
)
@pytest.mark.parametrize("classes", [1, 2])
def test_empty_rows_along_any_axis(f, want, classes):
    z = np.full((classes, 3), -inf, np.float32)
    for found in evaluated(lambda z: (f(z, 0), f(z.T, -1), f(z[None], (0, 1))))(z):
        assert np.all(np.asarray(found) == want)


def heads_of_labels():
    """Functions of hidden vectors and labels, each with one loss for each row."""
    W = jnp.asarray(np.random.default_rng(3).normal(0, 1, (50, 16)), jnp.float32)
    params = adaptive.init(jax.random.key(0), 16, 50, (10,))
    key, log_q = jax.random.key(1), jnp.zeros(50)
    return {
        "linear_cross_entropy": lambda h, y: heads.linear_cross_entropy(h, W, y),
        "linear_statistics": lambda h, y: -heads.linear_statistics(h, W, y).log_prob,
        "quadratic_cross_entropy": lambda h, y: heads.quadratic_cross_entropy(h, W, y, phi=js.taylor(2)),
        "sampled_cross_entropy": lambda h, y: heads.sampled_cross_entropy(key, h, W, y, 9, log_proposal=log_q),
        "nce_loss": lambda h, y: heads.nce_loss(key, h, W, y, 9, log_proposal=log_q),
        "adaptive": lambda h, y: -adaptive.log_prob(params, h, y),
        "factored": lambda h, y: heads.factored.loss(
            heads.factored.init(W), h, y, loss=heads.factored.log_loss(js.taylor(2))
        ),
    }


LOSSES_OF_LABELS = {
    "cross_entropy": losses.cross_entropy,
    "cross_entropy with options": functools.partial(losses.cross_entropy, label_smoothing=0.1, z_loss=0.1, margin=0.5),
    "focal": losses.focal_cross_entropy,
    "poly": losses.poly_cross_entropy,
    "spherical_z_loss": losses.spherical_z_loss,
    "fenchel_young_loss": js.fenchel_young_loss,
    "fenchel_young_loss, α = 3": lambda z, y: js.fenchel_young_loss(z, y, 3.0),
}


FEW_OF_LABELS = ("cross_entropy", "fenchel_young_loss", "linear_cross_entropy", "sampled_cross_entropy")
"""The others find out in the same way that a label is out of range."""


@pytest.mark.parametrize("name", some([*LOSSES_OF_LABELS, *heads_of_labels()], FEW_OF_LABELS))
def test_rows_masked_afterwards_have_no_gradient(name):
    """A label out of range gives NaN with derivatives 0: where(y >= 0, loss, 0) has the gradient of the other rows."""
    f = (LOSSES_OF_LABELS | heads_of_labels())[name]
    z = jnp.asarray(np.random.default_rng(4).normal(0, 1, (3, 16)), jnp.float32)
    y, fine = jnp.array([1, -100, 49 if name not in LOSSES_OF_LABELS else 3]), jnp.array([True, False, True])

    @evaluated
    def found(z):
        masked = jax.grad(lambda z: jnp.where(y >= 0, f(z, y), 0).sum())(z)
        want = jax.grad(lambda z: jnp.where(fine, f(z, jnp.where(fine, y, 0)), 0).sum())(z)
        return f(z, y), masked, want, jax.grad(lambda z: f(z, y).sum())(z)

    loss, masked, want, whole = found(z)
    np.testing.assert_array_equal(np.isnan(loss), ~fine)
    np.testing.assert_allclose(masked, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(masked[1], 0)
    np.testing.assert_array_equal(whole[1], 0)


KEY = jax.random.key(0)
NOTHING, NO_ROWS, NO_TOKENS, NO_HIDDEN = (np.zeros(shape, np.float32) for shape in ((0,), (0, 5), (0, 3), (0, 16)))
NO_LABELS, WEIGHT = np.zeros(0, int), np.ones((5, 3), np.float32)
PARAMS = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), jax.eval_shape(lambda: adaptive.init(KEY, 16, 50, (10,))))
OF_NOTHING = {
    "softmax": (lambda: js.softmax(NOTHING), (0,)),
    "log_normalizer": (lambda: js.log_normalizer(NOTHING), ()),
    "entropy": (lambda: js.entropy(NOTHING), ()),
    "kl_divergence": (lambda: js.kl_divergence(NO_ROWS, NO_ROWS), (0,)),
    "jensen_shannon_divergence": (lambda: js.jensen_shannon_divergence(NO_ROWS, NO_ROWS), (0,)),
    "tsallis_entropy": (lambda: js.tsallis_entropy(NO_ROWS, 2.0), (0,)),
    "renyi_entropy": (lambda: js.renyi_entropy(NO_ROWS, 2.0), (0,)),
    "cross_entropy": (lambda: losses.cross_entropy(NO_ROWS, NO_LABELS), (0,)),
    "its gradient": (lambda: jax.grad(lambda z: losses.cross_entropy(z, NO_LABELS).sum())(NO_ROWS), (0, 5)),
    "of distributions": (lambda: losses.cross_entropy(NO_ROWS, NO_ROWS), (0,)),
    "focal": (lambda: losses.focal_cross_entropy(NO_ROWS, NO_LABELS), (0,)),
    "kl_to_target": (lambda: losses.kl_to_target(NO_ROWS, NO_ROWS), (0,)),
    "spherical_z_loss": (lambda: losses.spherical_z_loss(NO_ROWS, NO_LABELS), (0,)),
    "plackett_luce": (lambda: losses.plackett_luce_log_prob(NO_ROWS, jnp.zeros((0, 2), int)), (0,)),
    "sparsemax of nothing": (lambda: js.sparsemax(NOTHING), (0,)),
    "sparsemax": (lambda: js.sparsemax(NO_ROWS), (0, 5)),
    "entmax15": (lambda: js.entmax15(NO_ROWS), (0, 5)),
    "entmax": (lambda: js.entmax(NO_ROWS, 1.3), (0, 5)),
    "fenchel_young_loss": (lambda: js.fenchel_young_loss(NO_ROWS, NO_LABELS), (0,)),
    "mixture_log_softmax": (lambda: js.mixture_log_softmax(jnp.zeros((0, 2, 5)), jnp.zeros((0, 2))), (0, 5)),
    "sink_softmax": (lambda: js.sink_softmax(NO_ROWS), (0, 5)),
    "temperature_for_entropy": (lambda: js.temperature_for_entropy(NO_ROWS, 0.5), (0,)),
    "categorical": (lambda: gumbel.categorical(KEY, NO_ROWS), (0,)),
    "no draws": (lambda: gumbel.categorical(KEY, jnp.zeros(5), shape=(0,)), (0,)),
    "gumbel_top_k": (lambda: gumbel.gumbel_top_k(KEY, NO_ROWS, 2).indices, (0, 2)),
    "gumbel_softmax": (lambda: gumbel.gumbel_softmax(KEY, NO_ROWS, 0.5), (0, 5)),
    "no samples": (lambda: gumbel.gumbel_softmax(KEY, jnp.zeros(5), 0.5, shape=(0,)), (0, 5)),
    "subset_softmax": (lambda: gumbel.subset_softmax(KEY, NO_ROWS, 2, 0.5), (0, 5)),
    "linear_cross_entropy": (lambda: heads.linear_cross_entropy(NO_TOKENS, WEIGHT, NO_LABELS), (0,)),
    "its sum's gradient": (
        lambda: jax.grad(lambda W: heads.linear_cross_entropy_sum(NO_TOKENS, W, NO_LABELS))(WEIGHT),
        (5, 3),
    ),
    "two narrow labels": (
        lambda: heads.linear_cross_entropy(
            NO_TOKENS.astype("bfloat16"), WEIGHT.astype("bfloat16"), jnp.stack([NO_LABELS] * 2)
        ),
        (2, 0),
    ),
    "linear_statistics": (lambda: heads.linear_statistics(NO_TOKENS, WEIGHT, NO_LABELS).entropy, (0,)),
    "linear_log_normalizer": (lambda: heads.linear_log_normalizer(NO_TOKENS, WEIGHT), (0,)),
    "linear_kl": (lambda: heads.linear_kl(NO_TOKENS, WEIGHT, NO_TOKENS, WEIGHT), (0,)),
    "linear_jsd": (lambda: heads.linear_jsd(NO_TOKENS, WEIGHT, NO_TOKENS, WEIGHT), (0,)),
    "linear_top_k": (lambda: heads.linear_top_k(NO_TOKENS, WEIGHT, 2).indices, (0, 2)),
    "linear_categorical": (lambda: heads.linear_categorical(KEY, NO_TOKENS, WEIGHT), (0,)),
    "its cuts": (lambda: heads.linear_categorical(KEY, NO_TOKENS, WEIGHT, top_k=3, min_p=0.1), (0,)),
    "and their log p": (
        lambda: heads.linear_categorical(KEY, NO_TOKENS, WEIGHT, min_p=0.1, return_log_prob=True)[1],
        (0,),
    ),
    "distinct ones": (
        lambda: heads.linear_categorical(KEY, NO_TOKENS, WEIGHT, shape=(2, 0), replace=False, return_log_prob=True)[1],
        (2, 0),
    ),
    "quadratic": (lambda: heads.quadratic_cross_entropy(NO_TOKENS, WEIGHT, NO_LABELS, phi=js.taylor(2)), (0,)),
    "sampled": (
        lambda: heads.sampled_cross_entropy(KEY, NO_TOKENS, WEIGHT, NO_LABELS, 3, log_proposal=jnp.zeros(5)),
        (0,),
    ),
    "nce": (lambda: heads.nce_loss(KEY, NO_TOKENS, WEIGHT, NO_LABELS, 3, log_proposal=jnp.zeros(5)), (0,)),
    "adaptive.log_prob": (lambda: adaptive.log_prob(PARAMS, NO_HIDDEN, NO_LABELS), (0,)),
    "adaptive.log_probs": (lambda: adaptive.log_probs(PARAMS, NO_HIDDEN), (0, 50)),
    "adaptive.predict": (lambda: adaptive.predict(PARAMS, NO_HIDDEN), (0,)),
    "adaptive.entropy": (lambda: adaptive.entropy(PARAMS, NO_HIDDEN), (0,)),
    "adaptive.top_k": (lambda: adaptive.top_k(PARAMS, NO_HIDDEN, 3).log_prob, (0, 3)),
    "adaptive.categorical": (lambda: adaptive.categorical(KEY, PARAMS, NO_HIDDEN), (0,)),
}


FEW_OF_NOTHING = (
    *("softmax", "log_normalizer", "its gradient", "entmax", "temperature_for_entropy", "categorical", "gumbel_top_k"),
    *("linear_cross_entropy", "linear_categorical", "sampled", "adaptive.log_prob"),
)
"""The others check shapes and reduce rows in the same places."""


@pytest.mark.parametrize("name", some(OF_NOTHING, FEW_OF_NOTHING))
def test_of_nothing(name):
    f, shape = OF_NOTHING[name]
    found = f()
    assert found.shape == shape
    if name == "log_normalizer":
        assert found == -inf
    elif shape == () or name == "its sum's gradient":
        assert np.all(found == 0)


def float64_statistics(s, y):
    """−l_y, H and L of scores in float64, by NumPy."""
    peak = s.max(-1, keepdims=True)
    L = peak + np.log(np.exp(s - peak).sum(-1, keepdims=True))
    log_p = s - L
    p = np.exp(log_p)
    return -np.take_along_axis(log_p, y[:, None], -1)[:, 0], -(p * np.where(p > 0, log_p, 0)).sum(-1), L[:, 0]


@pytest.mark.parametrize(
    ("where", "cap", "shift"),
    and_full(
        [("odd", 30.0, -80.0)],
        [(where, *of) for where in ("where", "log_weights", "odd") for of in ((1.0, 0.0), (30.0, -80.0))],
    ),
)  # log-weights of −∞ become a mask
def test_soft_cap_comes_before_what_leaves_classes_out(where, cap, shift):
    """Padding beyond the vocabulary takes no probability, though c tanh(−∞/c) is −c."""
    rng = np.random.default_rng(0)
    V, pad = 1001, 23
    h, W, b = rng.normal(size=(6, 9)), rng.normal(size=(V + pad, 9)), np.full(V + pad, shift)
    y = rng.integers(0, V, 6)
    want, _, _ = float64_statistics(cap * np.tanh((h @ W[:V].T + b[:V]) / cap), y)
    mask = jnp.arange(V + pad) < V
    options = {"where": {"where": mask}, "log_weights": {"log_weights": jnp.where(mask, 0.0, -inf)}, "odd": {}}[where]
    cut = V if where == "odd" else V + pad
    h, W, b = (jnp.asarray(a, jnp.float32) for a in (h, W[:cut], b[:cut]))

    def f(h):
        return heads.linear_cross_entropy(h, W, jnp.asarray(y), b, soft_cap=cap, **options)

    for jit in (evaluated, jit_as_user):
        np.testing.assert_allclose(jit(f)(h), want, atol=1e-4)
    total = jit_as_user(lambda h: heads.linear_cross_entropy_sum(h, W, jnp.asarray(y), b, soft_cap=cap, **options))
    np.testing.assert_allclose(total(h), want.sum(), rtol=1e-5)


@pytest.mark.parametrize("T", some([0.5, 1.5], [0.5]))
def test_statistics_at_a_temperature(T):
    """Scores c tanh((h W + b)/c)/T that the caller makes by scaling the arguments. By default of the T that spreads
    them."""
    rng = np.random.default_rng(0)
    h, W, b = rng.normal(size=(5, 16)), rng.normal(size=(101, 16)), rng.normal(size=101)
    y = rng.integers(0, 101, 5)
    loss, H, L = float64_statistics(5 * np.tanh((h @ W.T + b) / 5) / T, y)

    def f(h, T):
        W32, b32 = jnp.asarray(W, jnp.float32), jnp.asarray(b, jnp.float32)
        return heads.linear_statistics(h / T, W32, jnp.asarray(y), b32 / T, soft_cap=5 / T)

    for jit in (evaluated, jit_as_user):
        found = jit(f)(jnp.asarray(h, jnp.float32), T)
        np.testing.assert_allclose(found.log_prob, -loss, atol=1e-5)
        np.testing.assert_allclose(found.entropy, H, atol=1e-5)
        np.testing.assert_allclose(found.log_normalizer, L, atol=1e-5)


def test_small_results_of_products():
    """Almost one-hot rows of z c in the same program: as without jit, and never negative.

    Losses and entropies below the smallest normal number are 0 in both.
    """
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2000, 9)) * 20, jnp.float32)
    y = z.argmax(1)
    f = jit_as_user(lambda z, c: (js.entropy(z * c), losses.cross_entropy(z * c, y)))
    for found, want in zip(f(z, 1.7), (js.entropy(z * 1.7), losses.cross_entropy(z * 1.7, y)), strict=True):
        assert np.min(found) >= 0
        np.testing.assert_allclose(found, want, rtol=1e-4)


def test_large_scores_of_products():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 12)) * 3e9, jnp.float32)
    np.testing.assert_allclose(jit_as_user(lambda z: js.softmax(z * 0.7))(z).sum(-1), 1, rtol=1e-6)


SURE = {
    "softmax": (lambda z: js.softmax(z)[0], lambda e, p, c, H: (e * p, -e * p)),
    "log_softmax": (lambda z: js.log_softmax(z)[0], lambda e, p, c, H: (e, -e)),
    "cross_entropy": (lambda z: losses.cross_entropy(z, jnp.array(0)), lambda e, p, c, H: (-e, e)),
    "of a distribution": (
        lambda z: losses.cross_entropy(z, jnp.array([1.0, 0.0], z.dtype)),
        lambda e, p, c, H: (-e, e),
    ),
    "entropy": (js.entropy, lambda e, p, c, H: (-p * (c[0] + H), -e * (c[1] + H))),
    "focal": (
        lambda z: losses.focal_cross_entropy(z, jnp.array(0), gamma=1.0),
        lambda e, p, c, H: (-(e * p * -c[0] + e * e), e * p * -c[0] + e * e),
    ),
    "poly": (lambda z: losses.poly_cross_entropy(z, jnp.array(0)), lambda e, p, c, H: (-e - 2 * e * p, e + 2 * e * p)),
    "kl_to_target": (lambda z: losses.kl_to_target(z, jnp.array([1.0, 0.0], z.dtype)), lambda e, p, c, H: (-e, e)),
    "kl_divergence": (
        lambda z: js.kl_divergence(jax.lax.stop_gradient(z * 2), z),
        lambda e, p, c, H: (-(e - e**2 / (e**2 + p**2)), e - e**2 / (e**2 + p**2)),
    ),
    "linear_cross_entropy": (
        lambda z: heads.linear_cross_entropy(jnp.ones((1, 1), z.dtype), z[:, None], jnp.array([0]))[0],
        lambda e, p, c, H: (-e, e),
    ),
    "linear_cross_entropy_sum": (
        lambda z: heads.linear_cross_entropy_sum(jnp.ones((1, 1), z.dtype), z[:, None], jnp.array([0])),
        lambda e, p, c, H: (-e, e),
    ),
    "linear_cross_entropy of a distribution": (
        lambda z: heads.linear_cross_entropy(jnp.ones((1, 1), z.dtype), z[:, None], jnp.eye(2, dtype=z.dtype)[:1])[0],
        lambda e, p, c, H: (-e, e),
    ),
}


OF_SURE = and_full(
    [(name, jnp.float32, 20.0) for name in SURE if name != "linear_cross_entropy of a distribution"],
    [(name, *of) for name in SURE for of in ((jnp.float64, 40.0), (jnp.float32, 20.0))],
)


@pytest.mark.parametrize(("name", "dtype", "gap"), OF_SURE)
def test_gradients_of_a_sure_answer(name, dtype, gap):
    """Both components of the gradient have their digits, and they add up to 0. The same code in float64 is full."""
    f, gradient = SURE[name]
    with jax.enable_x64(dtype == jnp.float64):
        found = jit_as_user(jax.grad(f))(jnp.array([gap, 0.0], dtype))
    e = np.exp(-gap) / (1 + np.exp(-gap))
    c = np.log1p(-e), -gap + np.log1p(-e)
    H = -((1 - e) * c[0] + e * c[1])
    np.testing.assert_allclose(found, gradient(e, 1 - e, c, H), rtol=1e-6)


OF_ANY_LENGTH = [name for name in SURE if not any(word in name for word in ("linear", "distribution", "target"))]


MADE = {"product": lambda z: z * 1.7, "quotient": lambda z: z / 0.6}
OF_LONG_ROWS = and_full(
    [("cross_entropy", "product"), ("entropy", "product"), ("softmax", "quotient")],
    itertools.product(OF_ANY_LENGTH, MADE),
)
"""By default those that make the sums of one row; the others take them from these, or make them of two rows."""


@pytest.mark.parametrize(("name", "made"), OF_LONG_ROWS)
def test_gradients_of_a_sure_answer_in_a_long_row(name, made):
    """A single row, made in the same program, with so many classes that they are summed in another way."""
    make = MADE[made]
    z = np.append(np.float32(46.9), np.random.default_rng(0).uniform(-1, 0, 256).astype(np.float32))
    found = jit_as_user(jax.grad(lambda z: SURE[name][0](make(z))))(z)[0]
    with jax.enable_x64(True):
        want = evaluated(jax.grad(SURE[name][0]))(make(np.float64(z)))[0] * make(1.0)
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=1e-36)


def test_scores_in_bfloat16_made_in_the_same_program():
    """The label's score was once read rounded and the maximum unrounded, which gave 0.0117 instead of 2.9e-9."""
    z, factor = jnp.array([11.75, 0.0, -0.5], jnp.bfloat16), jnp.bfloat16(1.7)
    for loss, value, gradient in (
        (losses.cross_entropy, 2.940746e-9, -5.0058e-9),
        (lambda z, y: losses.poly_cross_entropy(z, y, epsilon=1.0), 2 * 2.940746e-9, -2 * 5.0058e-9),
    ):
        found, of_z = jit_as_user(jax.value_and_grad(lambda z, loss=loss: loss(z * factor, 0)))(z)
        np.testing.assert_allclose(found, value, rtol=1e-6)
        np.testing.assert_allclose(np.float32(of_z[0]), gradient, rtol=1e-2)


def test_scores_of_the_least_finite_number():
    """The least finite number is a common mask. A maximum with it must have the whole derivative, not half of it."""
    z = np.full((2, 3), np.finfo(np.float32).min)
    for f in (js.log_normalizer, js.entropy, lambda z: js.log_softmax(z)[..., 0], lambda z: js.softmax(z)[..., 0]):
        for g in (jax.grad, jax.hessian):
            derivative = evaluated(g(lambda z, f=f: jnp.sum(f(z))))
            np.testing.assert_allclose(derivative(z), derivative(0 * z), atol=1e-6)

    by_scores = evaluated(jax.grad(lambda z: gumbel.gumbel_softmax(KEY, z, 1.0)[0, 0]))
    equal, far = by_scores(0 * z), by_scores(np.float32([[0], [1]]) * z)
    np.testing.assert_allclose(far[0], equal[0], rtol=1e-6)
    assert np.all(np.isfinite(by_scores(z)))


@pytest.mark.parametrize("alpha", some([0.5, 1.5], [0.5]))
def test_log_p_above_0_by_rounding(alpha):
    """After a sum of products, which a compiler may round differently in two places, −l of a sure class may be below 0
    by the rounding of x: no power of it is NaN, and no entropy or loss is negative. By default of one α: the losses
    know of none."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(0, 30, (20000, 8)), jnp.float32)

    @jit_as_user
    def found(z, c, w):
        x = z * (3 * c + z * (c - w * z))
        q = jax.nn.one_hot(jnp.argmax(x, -1), 8)
        return (
            losses.focal_cross_entropy(x, q, gamma=1.5),
            losses.cross_entropy(x, q),
            losses.poly_cross_entropy(x, q),
            js.tsallis_entropy(x, alpha),
            js.renyi_entropy(x, alpha),
        )

    for values in found(z, 0.9, 0.7):
        assert np.min(values) >= 0  # no NaN either


@pytest.mark.parametrize("dtype", some([jnp.float16, jnp.bfloat16], [jnp.bfloat16]))
@pytest.mark.parametrize("shape", [(8, 5), (1024, 256)], ids=str)
def test_narrow_logits_under_strict_promotion(shape, dtype):
    """By default in bfloat16, for which the sums have a form of their own: float16 takes no other."""
    z, y = jnp.ones(shape, dtype), jnp.zeros(shape[0], int)
    with strict_promotion():
        for f in (losses.cross_entropy, losses.focal_cross_entropy, losses.poly_cross_entropy):
            total = lambda z, f=f: jnp.sum(f(z, y))  # noqa: E731
            gradient, product = jax.eval_shape(lambda z, f=total: jax.jvp(jax.grad(f), (z,), (z,)), z)
            assert gradient.dtype == product.dtype == dtype


def test_the_penalty_of_a_label_without_weight():
    """With α_y = 0 only z_loss pulls at the label: 2 L p_y, where p_y is far below the rounding of 1."""
    for rows in (2, 1024):
        z = jnp.zeros((rows, 256)).at[:, 0].set(-40.0)
        weights = jnp.ones(256).at[0].set(0)

        def total(z, rows=rows, weights=weights):
            labels = jnp.zeros(rows, int)
            return losses.cross_entropy(z, labels, class_weights=weights, z_loss=1.0).sum()

        e = np.exp(np.float64(z))
        want = 2 * np.log(e.sum(1, keepdims=True)) * e / e.sum(1, keepdims=True)
        np.testing.assert_allclose(jit_as_user(jax.grad(total))(z), want, rtol=1e-5)


def test_a_straight_through_sample_is_one_hot_exactly():
    z = jnp.asarray(np.random.default_rng(0).normal(0, 3, (200, 7)), jnp.float32)
    sample = jit_as_user(lambda z, c: gumbel.gumbel_softmax(KEY, c * z, 0.3, hard=True))(z, 1.7)
    assert set(np.unique(sample)) == {0.0, 1.0}


TRUTHS = {  # Hessian products at (0, −20, −40) along the first class, by hand: e = e^−20
    "cross_entropy": (lambda z: losses.cross_entropy(z, jnp.array(1)), 1.0),
    "of_distribution": (lambda z: losses.cross_entropy(z, jnp.array([0.4, 0.6, 0.0], z.dtype)), 1.0),
    "poly": (lambda z: losses.poly_cross_entropy(z, jnp.array(1)), -1.0),
    "focal": (lambda z: losses.focal_cross_entropy(z, jnp.array(1)), -35.0),
    "entropy": (js.entropy, 19.0),
    "fenchel_young_loss": (lambda z: js.fenchel_young_loss(z, jnp.array(1), 1.0), 1.0),
    "linear_cross_entropy": (
        lambda z: heads.linear_cross_entropy(jnp.ones((1, 1), z.dtype), z[:, None], jnp.array([1]))[0],
        1.0,
    ),
}


@pytest.mark.parametrize("name", some(TRUTHS, ["cross_entropy", "focal"]))
def test_second_derivatives_where_p_is_small(name):
    """In float32 as in float64: JAX 0.10's derivative of expm1 is expm1 + 1. Those that call it by other functions than
    the default ones are full."""
    f, factor = TRUTHS[name]
    v = jnp.array([1.0, 0.0, 0.0])

    def product(z):
        return jax.jvp(jax.grad(f), (z,), (v.astype(z.dtype),))[1]

    z = jnp.array([0.0, -20.0, -40.0])
    with jax.enable_x64(True):
        want = evaluated(product)(jnp.float64(z))
    np.testing.assert_allclose(want[1], -factor * np.exp(-20.0), rtol=1e-6)
    np.testing.assert_allclose(jit_as_user(product)(z)[1], want[1], rtol=1e-5)


@pytest.mark.parametrize("alpha", some([1.0, 1.25], [1.0]))
def test_gradients_of_a_sure_fenchel_young_loss(alpha):
    """By default of α = 1. Gradients beside a sure class with α = 1.25 are in test_oracle.py (`-k confident`)."""
    for f in (
        lambda z: js.fenchel_young_loss(z, jnp.array(0), alpha),
        lambda z: js.entmax(z, alpha)[0],
    ):
        z = jnp.array([3.8, 0.0]) if alpha > 1 else jnp.array([20.0, 0.0])
        with jax.enable_x64(True):
            want = np.asarray(evaluated(jax.grad(f))(jnp.float64(z)))
        assert np.isclose(want[0], -want[1], atol=0)
        np.testing.assert_allclose(jit_as_user(jax.grad(f))(z), want, rtol=1e-4)


def test_no_class_at_all():
    """K = 0: no label is in range, and functions without labels give the value of an empty row."""
    z, y = np.zeros((3, 0), np.float32), np.zeros(3, int)
    functions = losses.cross_entropy, losses.focal_cross_entropy, losses.spherical_z_loss, js.fenchel_young_loss

    @evaluated
    def results(z):
        of_labels = [(f(z, y), jax.grad(lambda z, f=f: f(z, y).sum())(z)) for f in functions]
        of_no_row = losses.cross_entropy(z[:0], y[:0], label_smoothing=0.1)
        return of_labels, js.temperature_for_entropy(z, 0.5), of_no_row

    of_labels, temperatures, of_no_row = results(z)
    for value, gradient in of_labels:
        assert np.all(np.isnan(value))
        assert gradient.shape == (3, 0)
    assert np.all(np.isnan(temperatures))
    assert of_no_row.shape == (0,)
    with pytest.raises(ValueError, match="weight must have at least one feature"):
        heads.linear_cross_entropy(jnp.zeros((2, 0)), jnp.zeros((5, 0)), jnp.array([0, 1]))


def test_p_of_products_has_its_digits():
    """x = 30 z up to 90 has a rounding of 4e-6. For few scores, e^u stays within |u| + 4 ulp all the same (MATH
    4.4)."""
    z = jnp.asarray(np.random.default_rng(2).normal(size=(3, 300)), jnp.float32)
    x = np.float64(jit_as_user(lambda z: 30.0 * z)(z))
    e = np.exp(x - x.max(1, keepdims=True))
    want = e / e.sum(1, keepdims=True)
    found = np.float64(jit_as_user(lambda z: js.softmax(30.0 * z))(z))
    normal = want > 1e-36
    ulps = np.abs(found - want)[normal] / np.spacing(np.float32(want[normal]))
    assert np.all(ulps <= (x.max(1, keepdims=True) - x + 4)[normal])
