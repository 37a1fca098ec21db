"""MATH 5 and 1.1, for every function and φ: bad and empty rows, and all ways to leave a class out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, named, product, some
from compilation import jit_as_user
from interpreter import evaluated

import jsoftmax as js
from jsoftmax.losses import cross_entropy
from jsoftmax.verify import FUNCTIONS, LOSSES, OTHERS, PHIS, SPARSE_MAPS

inf, nan = np.inf, np.nan
FINE, OTHER = np.array([0.5, -1.0, 1.0, 0.3, -0.2]), np.array([-0.7, 0.9, 0.1, -1.2, 0.4])
KEEP = np.array([True, False, True, True, False])
WEIGHTS = np.array([0.3, 1.0, -0.7, 0.2, 1.0])
LEFT_OUT, UNKNOWN = (np.where(KEEP, 0, a) for a in (-inf, nan))


def of_class_1(z):
    return cross_entropy(z, jnp.ones(z.shape[:-1], int))


def row(scores=FINE, other=OTHER, where=True, log_weights=0.0):
    return tuple(np.broadcast_to(a, 5) for a in (scores, other, where, log_weights))


def infinite(function, other):
    """A change of the scores cannot leave a class out."""
    return other if function.name == "entropy_expansion" else np.where(KEEP, other, -inf)


def rows(function):
    return {
        "fine": row(),
        "+inf": row([0.5, inf, 1.0, 0.3, -0.2]),
        "nan": row([0.5, nan, 1.0, 0.3, -0.2]),
        "-inf and +inf": row([-inf, inf, 1.0, 0.3, -0.2]),
        "all +inf": row(inf),
        "all -inf": row(-inf),
        "empty by mask": row(where=False),
        "empty by weights": row(log_weights=-inf),
        "mask": row(where=KEEP),
        "weights": row(log_weights=LEFT_OUT),
        "-inf": row(np.where(KEEP, FINE, -inf), infinite(function, OTHER)),
        "nan behind a mask": row(np.where(KEEP, FINE, nan), np.where(KEEP, OTHER, nan), where=KEEP),
        "nan behind weights": row(np.where(KEEP, FINE, nan), np.where(KEEP, OTHER, nan), log_weights=LEFT_OUT),
        "nan weights behind -inf": row(np.where(KEEP, FINE, -inf), infinite(function, OTHER), log_weights=UNKNOWN),
        "prior, left out by weights": row(log_weights=WEIGHTS + LEFT_OUT),
        "prior, left out by mask": row(log_weights=WEIGHTS, where=KEEP),
    }


def value_and_derivatives(function, phi, z, where, log_weights):
    """Value, gradient and a Hessian product of one row; distinct cotangents tell the outputs apart."""
    keywords = {"where": where, "log_weights": log_weights, "phi": phi}

    def total(z):
        value = function.ours(*z, **keywords)
        return jnp.sum(jnp.cos(jnp.arange(value.size)) * value), value

    along = tuple(jnp.full(a.shape, 0.5**i) for i, a in enumerate(z))
    gradient, product, value = jax.jvp(jax.grad(total, has_aux=True), (z,), (along,), has_aux=True)
    return value, *gradient, *product


# here and below functions meet φ in `verify`, and numbers of classes in test_sums.py
OF_ROWS = and_full(
    covering(FUNCTIONS, PHIS, met=[(0, 1)]),
    itertools.product(FUNCTIONS, [js.exp, js.relu_power(2, 0.1), js.q_exponential(1.5)]),
)
"""In the gate each function with φ = exp, whose logarithm is the score, with one that is 0 at some scores, and with one
of a bounded domain."""


@pytest.mark.parametrize(("function", "phi"), OF_ROWS, ids=str)
def test_rows(function, phi):
    table = rows(function)
    scores, other, where, log_weights = (jnp.asarray(np.stack(column)) for column in zip(*table.values(), strict=True))
    z = (scores, other)[: function.scores]
    f = jax.jit(jax.vmap(functools.partial(value_and_derivatives, function, phi)))
    results = dict(zip(table, zip(*f(z, where, log_weights), strict=True), strict=True))

    for name in ("+inf", "nan", "-inf and +inf", "all +inf"):
        value, *derivatives = results[name]
        normalizer = nan if name == "nan" else inf
        np.testing.assert_array_equal(value, normalizer if function.name == "log_normalizer" else value * nan, name)
        assert np.all(np.isnan(derivatives).any(-1)), name

    nothing = function.empty
    for name in ("all -inf", "empty by mask", "empty by weights"):
        value, *derivatives = results[name]
        np.testing.assert_array_equal(value, np.full(value.shape, nothing), name)
        np.testing.assert_array_equal(derivatives, np.zeros_like(derivatives), name)

    part = function.ours(*(a[KEEP] for a in (FINE, OTHER)[: function.scores]), phi=phi)
    if part.ndim:
        np.testing.assert_array_equal(results["mask"][0][~KEEP], nothing)
    np.testing.assert_allclose(results["mask"][0][KEEP if part.ndim else ...], part, rtol=2e-5, atol=1e-6)
    for name in ("mask", "prior, left out by mask"):
        np.testing.assert_array_equal(np.stack(results[name][1:])[:, ~KEEP], 0, name)
    for name in ("weights", "-inf", "nan behind a mask", "nan behind weights", "nan weights behind -inf"):
        for got, want in zip(results[name], results["mask"], strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6, err_msg=name)
    for got, want in zip(results["prior, left out by weights"], results["prior, left out by mask"], strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    for result in results["fine"]:
        assert np.all(np.isfinite(result))


BESIDE_MANY = and_full(
    [(js.softmax, 3), (of_class_1, 300)],
    covering([js.log_normalizer, js.log_softmax, js.entropy, js.softmax, of_class_1], [3, 60, 300], met=[(0, 1)]),
)
"""The others take the maximum as these do."""


@pytest.mark.parametrize(("f", "classes"), BESIDE_MANY)
def test_a_bad_score_among_many_rows(f, classes):
    """XLA on CPU makes one kernel of many rows, in which the maximum of NaN and a number is the number."""
    z = np.zeros((4096, classes), np.float32)
    z[0, 0], z[1, 0], z[2, -1] = nan, inf, nan
    weights = np.arange(1, 1 + classes, dtype=np.float32)
    gradient = jax.grad(lambda z: (f(z) * (weights if f(z).ndim == 2 else 1)).sum())
    for derivative in (gradient, jax.grad(lambda z: (gradient(z) * weights).sum())):
        result = jit_as_user(derivative)(z)
        assert np.all(np.isnan(result[:3])), f
        assert np.all(np.isfinite(result[3:])), f


OF_ONE = [f for f in FUNCTIONS + LOSSES + SPARSE_MAPS if f.scores == 1]
MAXIMUM = ("softmax", "entropy", "cross_entropy", "sparsemax")
"""The others take the maximum as one of these does."""


@pytest.mark.parametrize("function", some(OF_ONE, named(OF_ONE, MAXIMUM)), ids=str)
def test_nan_in_the_last_class_of_wide_rows(function):
    """XLA on CPU gives −∞ as the maximum of such a row in float64, as of a row without classes."""
    of_rows = functools.partial(function.with_rows(4200).ours, phi=js.exp)
    with jax.enable_x64(True):
        z = np.zeros((4200, 60))
        z[0, -1] = nan
        value = jit_as_user(of_rows)(z)
    assert np.all(np.isnan(value[0]))
    assert np.all(np.isfinite(value[1:]))


@pytest.mark.parametrize("function", [f for f in LOSSES + OTHERS if f.scores == 1 and f.arguments], ids=str)
def test_nan_beside_an_impossible_label(function):
    """NaN, not the infinite loss of the label."""
    for z in (jnp.array([-inf, -inf, nan, -inf]), jnp.array([-inf, -inf, inf, nan])):
        assert np.all(np.isnan(function.ours(z, phi=js.exp)))


def test_second_forward_derivative_of_a_bad_score():
    z, v = jnp.array([nan, 0.0, 1.0]), jnp.arange(3.0)
    rate = functools.partial(jax.jvp, tangents=(v,))
    assert np.all(np.isnan(rate(lambda z: rate(js.log_softmax, (z,))[1], (z,))[1]))


OF_SCORES = {f.name: f for f in FUNCTIONS if f.scores == 1}
MANY = and_full(
    [(OF_SCORES["log_softmax"], 300), (OF_SCORES["entropy"], 4500)],
    covering(OF_SCORES.values(), [60, 300, 1000, 4500], met=[(0, 1)]),
)
"""The others sum rows as these do, and 60 classes of few rows are summed as the five of `test_rows` are."""


@pytest.mark.parametrize(("function", "classes"), MANY, ids=str)
def test_rows_with_many_classes_left_out(function, classes):
    """Long rows give what short rows give, in whatever way rows of their length are summed."""
    table = rows(function)
    short = [np.stack(column) for column in zip(*table.values(), strict=True)]
    pads = (-inf, 0, True, 0)
    long = [np.pad(a, ((0, 0), (0, classes - 5)), constant_values=b) for a, b in zip(short, pads, strict=True)]
    f = jax.vmap(functools.partial(value_and_derivatives, function, js.exp))
    keeps = function.name in ("softmax", "log_softmax")
    found, wanted = (jit(f)((z,), where, w) for jit, (z, _, where, w) in ((jit_as_user, long), (evaluated, short)))
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        cut = got[:, :5] if keeps or i else got
        np.testing.assert_allclose(cut, want, rtol=2e-5, atol=2e-6, err_msg=str(i))


@pytest.mark.parametrize(
    ("function", "classes"), product([f for f in FUNCTIONS if f.scores == 1], [5, 16, 300], met=[(0, 1)]), ids=str
)
def test_rows_along_other_axes(function, classes):
    table = rows(function)
    scores, _, where, log_weights = (jnp.asarray(np.stack(column)) for column in zip(*table.values(), strict=True))
    scores, where, log_weights = (
        jnp.pad(a, ((0, 0), (0, classes - 5)), constant_values=b)
        for a, b in ((scores, -inf), (where, True), (log_weights, 0))
    )
    want = function.ours(scores, where=where, log_weights=log_weights)
    first = function.ours(scores.T, axis=0, where=where.T, log_weights=log_weights.T)
    np.testing.assert_allclose(first.T if first.ndim == 2 else first, want, rtol=2e-5, atol=2e-6)
    if classes != 5:
        parts = [a.reshape(len(table), 2, -1) for a in (scores, where, log_weights)]
        several = function.ours(parts[0], axis=(1, 2), where=parts[1], log_weights=parts[2])
        np.testing.assert_allclose(several.reshape(want.shape), want, rtol=2e-5, atol=2e-6)


TWO = [js.exp, js.spherical(0.1)]
FEW = named(FUNCTIONS, ("log_softmax", "kl_divergence"))
"""Of one kind each: a result for each class, and one for each row, of two arrays."""


@pytest.mark.parametrize(
    ("function", "phi"), and_full(*(covering(functions, TWO, met=[(0, 1)]) for functions in (FEW, FUNCTIONS))), ids=str
)
def test_arguments_not_given(function, phi):
    """No mask is the same as a mask of True, and no log-weights as zeros: in value and derivatives."""
    z = (jnp.asarray(FINE), jnp.asarray(OTHER))[: function.scores]
    every, zeros = np.ones(5, bool), np.zeros(5, np.float32)
    all_kept, some_left_out = ((None, None), (every, None), (None, zeros)), ((KEEP, None), (None, np.float32(LEFT_OUT)))

    ways_and_both = ((all_kept, (every, zeros)), (some_left_out, (KEEP, zeros)))

    @evaluated
    def results(z):
        f = functools.partial(value_and_derivatives, function, phi, z)
        return [([f(*given) for given in ways], f(*same)) for ways, same in ways_and_both]

    for ways, both in results(z):
        for one in ways:
            for got, want in zip(one, both, strict=True):
                np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_no_classes_at_all(function):
    z = (jnp.zeros((2, 0)),) * function.scores
    value = function.ours(*z)
    assert value.shape in ((2,), (2, 0))
    np.testing.assert_array_equal(value, np.full(value.shape, function.empty))


HUGE = ("softmax", "entropy", "varentropy", "kl_divergence")


@pytest.mark.parametrize("function", some(FUNCTIONS, named(FUNCTIONS, HUGE)), ids=str)
def test_huge_scores(function):
    """Differences beyond float32 leave almost one-hot rows; p = 0 times their overflow must not be NaN. By default of
    those that multiply p by them; the others are made of their sums."""
    huge = [
        [[3e38, -3e38, 0.0], [0.5, -1.0, 1.0]],
        [[1.0, 0.0, -200.0], [0.0, 0.0, 1e20]],
    ]
    scores = tuple(jnp.array(rows) for rows in zip(*huge, strict=True))[: function.scores]
    f = jit_as_user(jax.vmap(functools.partial(value_and_derivatives, function, js.exp, where=True, log_weights=0.0)))
    value, *derivatives = f(scores)
    for part in (value, *derivatives):
        assert not np.any(np.isnan(part))


def test_values_of_huge_scores():
    z = jnp.array([3e38, -3e38, 0.0])
    np.testing.assert_array_equal(js.log_softmax(z), np.float32([0, -np.inf, -3e38]))
    assert js.entropy(z) == js.varentropy(z) == 0


@pytest.mark.parametrize("z_p", [[0.5, -1.0, 1.0], [1.9, -30.0, -3e38]])
def test_kl_of_huge_scores(z_p):
    z_p, z_q = jnp.array(z_p), jnp.array([-3e38, -30.0, 1.9])
    gradient = jax.grad(js.kl_divergence, (0, 1))
    for part in (*gradient(z_p, z_q), *jax.jvp(gradient, (z_p, z_q), (jnp.ones(3), jnp.ones(3)))[1]):
        assert not np.any(np.isnan(part))


def test_kl_edges():
    z, out = jnp.array([0.0, 1.0, -1.0]), jnp.array([0.0, 1.0, -jnp.inf])
    value, (by_p, by_q) = jax.value_and_grad(js.kl_divergence, (0, 1))(z, out)
    assert value == jnp.inf
    assert np.all(np.isfinite(by_p))
    assert np.all(np.isfinite(by_q))
    assert by_q[2] == 0
    value, (by_p, by_q) = jax.value_and_grad(js.kl_divergence, (0, 1))(out, z)
    p, q = jax.nn.softmax(out), jax.nn.softmax(z)
    np.testing.assert_allclose(value, sum(p[:2] * jnp.log(p[:2] / q[:2])), rtol=1e-6)
    np.testing.assert_allclose(by_q, q - p, rtol=1e-5)
    assert by_p[2] == 0
    empty = jnp.full(3, -jnp.inf)
    value, (by_p, by_q) = jax.value_and_grad(js.kl_divergence, (0, 1))(empty, z)
    assert value == 0
    np.testing.assert_array_equal(jnp.stack([by_p, by_q]), 0)
    assert np.isnan(js.kl_divergence(empty, jnp.array([0.0, jnp.nan, 0.0])))
