"""Ragged rows against the dense functions on padded rows, and against plain formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import platforms
import pytest
from cells import some
from compilation import jit_as_user
from interpreter import evaluated

import jsoftmax as js
from jsoftmax import segments

LENGTHS = (3, 0, 1, 7, 2)
"""Of the rows; one is empty, one has a single class."""
ROWS = len(LENGTHS)
IDS = np.random.default_rng(0).permutation(np.repeat(np.arange(ROWS), LENGTHS))
N = len(IDS)
WIDTH = max(LENGTHS)
PLACE = np.array([np.sum(IDS[:k] == IDS[k]) for k in range(N)])
"""Where each element is in its padded row."""

DENSE = {
    "segment_softmax": js.softmax,
    "segment_log_softmax": js.log_softmax,
    "segment_log_normalizer": js.log_normalizer,
    "segment_entropy": js.entropy,
}
KEEPS_CLASSES = ("segment_softmax", "segment_log_softmax")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def padded(a, fill):
    """`[ROWS, WIDTH]` of `[N]`."""
    return jnp.full((ROWS, WIDTH), fill, a.dtype).at[IDS, PLACE].set(a)


def by_dense_rows(name, z, where, log_weights, phi):
    """What the dense function gives for the padded rows."""
    result = DENSE[name](padded(z, 0), where=padded(where, False), log_weights=padded(log_weights, 0), phi=phi, axis=-1)
    return result[IDS, PLACE] if name in KEEPS_CLASSES else result


def everything(f, z, v):
    """Value, jvp, gradient and Hessian product of a weighted sum of finite results."""

    def total(z):
        a = f(z)
        return jnp.sum(jnp.where(jnp.isfinite(a), a, 0) * jnp.cos(jnp.arange(a.size)))

    return f(z), jax.jvp(f, (z,), (v,))[1], jax.grad(total)(z), jax.jvp(jax.grad(total), (z,), (v,))[1]


PHIS = (js.exp, js.spherical(0.1), js.relu_power(2, 0.1), js.q_exponential(1.5))
"""A row takes φ by its logarithm, as the dense functions do. The first one's is the score, the second has a parameter,
the third is 0 at some scores, and the fourth has a bounded domain."""


def given(phi):
    """Scores, directions, log-weights and a mask of the elements."""
    low, high = phi.domain
    bounds = max(low + 0.1, -2.0), min(high - 0.1, 3.0)
    rng = np.random.default_rng(1)
    return rng.uniform(*bounds, N), rng.normal(size=N), rng.normal(size=N), np.arange(N) != 4


def by_segments(phi):
    z, v, log_weights, where = given(phi)
    options = {"where": where, "log_weights": log_weights, "phi": phi}

    def ours(z):
        return jnp.concatenate([getattr(segments, name)(z, np.asarray(IDS), ROWS, **options) for name in DENSE])

    return evaluated(functools.partial(everything, ours))(z, v)


@functools.cache
def by_padded_rows(phi):
    z, v, log_weights, where = given(phi)

    def dense(z):
        return jnp.concatenate([by_dense_rows(name, z, where, log_weights, phi) for name in DENSE])

    return evaluated(functools.partial(everything, dense))(z, v)


def assert_same(found, wanted):
    for mode, got, want in zip(("value", "jvp", "gradient", "HVP"), found, wanted, strict=True):
        np.testing.assert_allclose(got, want, 1e-11, 1e-12, err_msg=mode)


@pytest.mark.parametrize("phi", some(PHIS, [js.exp]), ids=str)
def test_equals_the_dense_functions_on_padded_rows(phi, x64):
    """All four at once, in two programs; the cotangents tell them apart."""
    assert_same(by_segments(phi), by_padded_rows(phi))


def test_sums_side_by_side_as_on_accelerators(x64):
    with platforms.as_on_accelerators():
        found = by_segments(js.exp)
    assert_same(found, by_padded_rows(js.exp))


@pytest.mark.parametrize("gap", [20.0, 60.0])
def test_digits_beside_a_probability_near_1(gap):
    """Small log-probabilities, entropies and gradients, of scores that are made in the same program."""
    ids = jnp.array([0, 1, 0, 1])

    @jit_as_user
    def f(z, scale):
        z = z * scale
        log_p = segments.segment_log_softmax(z, ids, 2)
        gradient, second = jax.jvp(
            jax.grad(lambda z: segments.segment_log_softmax(z, ids, 2)[0]), (z,), (jnp.array([1.0, 0.0, 0.0, 0.0]),)
        )
        return log_p, segments.segment_entropy(z, ids, 2), gradient, second

    z = jnp.array([0.0, 5.0, -gap / 3, 5.0])
    log_p, H, gradient, second = f(z, 3.0)
    q = np.exp(-gap)
    np.testing.assert_allclose(log_p[0], -np.log1p(q), 1e-5)
    np.testing.assert_allclose(H, [(gap + 1) * q, np.log(2)], 1e-5)
    np.testing.assert_allclose(gradient[jnp.array([0, 2])], [q, -q], 1e-5)
    np.testing.assert_allclose(second[jnp.array([0, 2])], [-q, q], 1e-5)


def test_edges():
    inf, nan = np.inf, np.nan
    ids = jnp.array([0, 0, 1, 1, 2, 2, 3, 5, -1000, 1000])
    z = jnp.array([1.0, nan, inf, 0.0, -inf, -inf, 7.0, 0.0, nan, inf])  # row 4 is empty, the last two are in no row
    functions = (segments.segment_softmax, segments.segment_log_normalizer, segments.segment_entropy)

    @evaluated
    def found(z):
        first = [jax.grad(lambda z, f=f: jnp.sum(f(z, ids, 6)[-1:])) for f in functions]
        second = [jax.grad(lambda z, g=g: jnp.sum(g(z))) for g in first]
        return [f(z, ids, 6) for f in (segments.segment_log_softmax, *functions)], [g(z) for g in first + second]

    (log_p, p, log_normalizer, entropy), gradients = found(z)
    np.testing.assert_array_equal(p, [nan, nan, nan, nan, 0, 0, 1, 1, 0, 0])
    np.testing.assert_array_equal(log_p, [nan, nan, nan, nan, -inf, -inf, 0, 0, -inf, -inf])
    np.testing.assert_array_equal(log_normalizer, [nan, inf, -inf, 7, -inf, 0])
    np.testing.assert_array_equal(entropy, [nan, nan, 0, 0, 0, 0])
    for gradient in gradients:
        np.testing.assert_array_equal(np.isfinite(gradient[4:]), True)


@pytest.mark.parametrize("name", DENSE)
def test_a_tangent_of_an_element_of_no_row_is_ignored(name):
    """It may be NaN, as those of padding are."""
    ids, z, v = jnp.array([0, 2, 0, -1]), jnp.array([1.0, 0.0, 2.0, 3.0]), jnp.array([1.0, np.nan, 0.0, np.nan])
    f = functools.partial(getattr(segments, name), segment_ids=ids, num_segments=1)
    found, want = (jax.jvp(f, (z,), (v,))[1] for v in (v, jnp.nan_to_num(v)))
    np.testing.assert_array_equal(found, want)


def test_other_shapes():
    """Heads beside each other, sorted ids, narrow scores, integers, no rows and no elements."""
    ids = jnp.asarray(np.sort(IDS))
    z = jax.random.normal(jax.random.key(0), (N, 4))
    for name in DENSE:
        f = getattr(segments, name)

        @evaluated
        def found(z, f=f):
            by_heads = jax.vmap(lambda z: f(z, ids, ROWS), 1, 1)(z)
            return f(z, ids, ROWS, indices_are_sorted=True), by_heads, f(z.astype(jnp.bfloat16), ids, ROWS)

        whole, by_heads, narrow = found(z)
        np.testing.assert_allclose(whole, by_heads, 1e-6, 1e-6)
        assert narrow.dtype == (jnp.bfloat16 if name in KEEPS_CLASSES else jnp.float32)
        assert narrow.shape == whole.shape
        assert f(jnp.arange(N), ids).dtype == jnp.float32
        assert f(jnp.zeros(0), jnp.zeros(0, int)).shape == (0,)
        assert f(jnp.zeros((0, 2)), jnp.zeros(0, int), 3).shape == ((0, 2) if name in KEEPS_CLASSES else (3, 2))


def test_in_a_scan_of_second_order():
    """As a sum of the plain form."""
    ids, z = jnp.asarray(IDS, jnp.int32), jax.random.normal(jax.random.key(3), (N,))

    def plain(z):
        e = jnp.exp(z)
        p = e / jax.ops.segment_sum(e, ids, ROWS)[ids]
        return jax.ops.segment_sum(-p * jnp.log(p), ids, ROWS)

    def scanned(f, z):
        return jnp.sum(jax.lax.scan(lambda total, t: (total + f(z * t), None), jnp.zeros(ROWS), jnp.ones(3))[0] ** 2)

    ours = functools.partial(scanned, lambda z: segments.segment_entropy(z, ids, ROWS))
    found, want = (evaluated(jax.hessian(f))(z) for f in (ours, functools.partial(scanned, plain)))
    np.testing.assert_allclose(found, want, 2e-4, 2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.zeros(3), jnp.zeros(3)), "segment_ids must be integers"),
        ((jnp.zeros(3), jnp.zeros(2, int)), "one entry for each score"),
        ((jnp.zeros(()), jnp.zeros((), int)), "one entry for each score"),
        ((jnp.zeros(3), jnp.zeros(3, int), -1), "num_segments must be an int"),
    ],
)
def test_wrong_calls(arguments, message):
    for name in DENSE:
        with pytest.raises((TypeError, ValueError), match=f"{name}: .*{message}"):
            getattr(segments, name)(*arguments)


def test_the_number_of_rows_is_static():
    with pytest.raises(ValueError, match="num_segments must be given where segment_ids are traced"):
        jax.jit(segments.segment_softmax)(jnp.zeros(3), jnp.zeros(3, int))


@pytest.mark.parametrize("rows", [0, None])
def test_scores_without_any_row(rows):
    """No row at all, or no id that names one: p is 0, log p is −inf, and derivatives are 0."""
    z, ids = jnp.array([[1.0, 2.0], [jnp.nan, 0.0]]), jnp.array([-1, -2])
    np.testing.assert_array_equal(segments.segment_softmax(z, ids, rows), 0)
    np.testing.assert_array_equal(segments.segment_log_softmax(z, ids, rows), -jnp.inf)
    for of_rows in (segments.segment_log_normalizer, segments.segment_entropy):
        assert of_rows(z, ids, rows).shape == (0, 2)
        np.testing.assert_array_equal(jax.grad(lambda z, f=of_rows: jnp.sum(f(z, ids, rows)))(z), 0)
    np.testing.assert_array_equal(jax.grad(lambda z: jnp.sum(segments.segment_softmax(z, ids, rows)))(z), 0)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_narrow_ids(dtype):
    """There may be more rows than the dtype of the ids can count."""
    z, ids = jnp.array([0.0, 1.0, 2.0]), jnp.array([100, 3, 100])
    for f in (segments.segment_softmax, segments.segment_log_normalizer):
        np.testing.assert_array_equal(f(z, ids.astype(dtype), 300), f(z, ids, 300))
        np.testing.assert_array_equal(f(z, ids.astype(dtype)), f(z, ids))
