"""The Gumbel route: bad rows, classes left out, narrow dtypes, wrong calls."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import some
from compilation import jit_as_user
from interpreter import evaluated
from modes import strict_promotion
from platforms import as_on_accelerators

import jsoftmax as js
from jsoftmax import gumbel
from jsoftmax._top_k import top_k_of_many

KEY = jax.random.key(0)
Z = jnp.array([[0.3, -1.2, 2.0, 0.7], [-0.5, 0.1, -2.0, 1.5]])

# --- edges ---------------------------------------------------------------------------------------------------

BAD = jnp.array([[jnp.nan, 0.0, 1.0], [jnp.inf, 0.0, 1.0], [-jnp.inf] * 3, [0.0, 1.0, -jnp.inf]])
MAPS = {
    "gumbel_softmax": lambda z, **o: gumbel.gumbel_softmax(KEY, z, 0.5, **o),
    "hard": lambda z, **o: gumbel.gumbel_softmax(KEY, z, 0.5, hard=True, **o),
    "exp_concrete": lambda z, **o: gumbel.exp_concrete(KEY, z, 0.5, **o),
    "subset_softmax": lambda z, **o: gumbel.subset_softmax(KEY, z, 2, 0.5, **o),
    "conditional_gumbels": lambda z, **o: gumbel.conditional_gumbels(KEY, z, jnp.zeros(len(z), int), **o),
    "given maximum": lambda z, **o: gumbel.conditional_gumbels(KEY, z, jnp.zeros(len(z), int), maximum=2.0, **o),
    "rao_blackwellised": lambda z, **o: gumbel.rao_blackwellised(KEY, z, jnp.zeros(len(z), int), 0.5, 3, **o),
    "reinmax": lambda z, **o: gumbel.reinmax(KEY, z, 1.0, **o),
}


@pytest.mark.parametrize("name", some(MAPS, ["gumbel_softmax", "subset_softmax", "given maximum"]))
def test_edges_of_maps(name):
    """By default of maps with noise, in rounds and with a class given; the others are made of the same steps."""
    f = MAPS[name]
    kept = jnp.array([True, True, False])

    def first(z):
        value = f(z)
        return jnp.sum(jnp.where(jnp.isfinite(value), jnp.sin(value), 0)), value

    @evaluated
    def found(z, row, left_out):
        options = {"where": kept}, {"log_weights": jnp.log(kept.astype(jnp.float32))}
        gradient, product, value = jax.jvp(jax.grad(first, has_aux=True), (z,), (jnp.ones_like(z),), has_aux=True)
        return value, (gradient, product), [f(row, **o) for o in options], f(left_out)

    given = BAD, jnp.array([[0.0, 1.0, 9.0]]), jnp.array([[0.0, 1.0, -jnp.inf]])
    value, derivatives, by_option, want = found(*given)
    empty = -np.inf if name in ("exp_concrete", "conditional_gumbels", "given maximum") else 0
    assert np.all(np.isnan(value[:2]))
    np.testing.assert_array_equal(value[2], np.full(3, empty))
    np.testing.assert_array_equal(value[3, 2], empty)
    assert np.all(np.isfinite(value[3, :2]))
    for other in by_option:
        np.testing.assert_allclose(other, want, rtol=1e-6)
    for at in derivatives:
        np.testing.assert_array_equal(at[2], 0)
        assert np.all(np.isfinite(at[3]))
        assert at[3, 2] == 0


def test_edges_of_draws():
    np.testing.assert_array_equal(gumbel.categorical(KEY, BAD)[:3], -1)
    draws = gumbel.categorical(KEY, BAD, shape=(500, 4))
    assert set(np.asarray(draws[:, 3]).tolist()) == {0, 1}
    masked = gumbel.categorical(KEY, jnp.zeros(5), shape=(500,), where=jnp.array([False, True, False, True, False]))
    assert set(np.asarray(masked).tolist()) == {1, 3}
    sample = gumbel.gumbel_top_k(KEY, BAD, 3)
    np.testing.assert_array_equal(sample.indices[:3], -1)
    np.testing.assert_array_equal(np.sort(sample.indices[3]), [-1, 0, 1])
    assert np.all(np.isnan(sample.perturbed[:2]))
    assert sample.threshold.dtype == sample.perturbed.dtype == jnp.float32
    assert not sample.threshold.weak_type
    np.testing.assert_array_equal(sample.threshold, [np.nan, np.nan, -np.inf, -np.inf])
    assert gumbel.categorical(KEY, jnp.zeros((2, 5)), shape=(0, 2)).shape == (0, 2)
    for mode in (None, "low", "high"):
        np.testing.assert_array_equal(gumbel.categorical(KEY, BAD, shape=(3, 4), replace=False, mode=mode)[2, 3], -1)
        np.testing.assert_array_equal(gumbel.categorical(KEY, BAD, mode=mode)[:3], -1)


def test_top_k_as_on_accelerators():
    """The sample, its gradient and a Hessian product are those of CPU; also of bad rows, of scores far from 0, and of
    classes so far below the largest that their p is 0."""
    rows = np.random.default_rng(2).normal(0, 3, (7, 3)).astype(np.float32)
    rows = jnp.concatenate([BAD, rows, 1e6 + rows[:2], jnp.array([[3e38, -3e38, 0.0], [30.0, 0.0, 0.0]])])

    def weighted(z):
        sample = gumbel.gumbel_top_k(KEY, z, 2)
        fine = jnp.isfinite(sample.perturbed)
        return jnp.sum(jnp.where(fine, jnp.sin(sample.perturbed) * jnp.array([1.0, 2.0]), 0)), sample

    def everything(z):
        gradient, product, sample = jax.jvp(jax.grad(weighted, has_aux=True), (z,), (jnp.cos(z),), has_aux=True)
        return sample, gumbel.gumbel_top_k(KEY, z, 3), gradient, product

    on_cpu = jit_as_user(everything)(rows)
    with as_on_accelerators():
        elsewhere = jit_as_user(everything)(rows)
    for got, want in zip(jax.tree.leaves(elsewhere), jax.tree.leaves(on_cpu), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_no_classes():
    maps = {name: f for name, f in MAPS.items() if name != "subset_softmax"}  # of which k is in [1, K]

    @evaluated
    def found(z):
        return gumbel.categorical(KEY, z), {name: f(z) for name, f in maps.items()}

    draws, values = found(np.zeros((3, 0), np.float32))
    np.testing.assert_array_equal(draws, -1)
    for name, value in values.items():
        assert value.shape == (3, 0), name


def test_one_class():

    @evaluated
    def found(z):
        ones = [MAPS[name](z) for name in ("gumbel_softmax", "hard", "rao_blackwellised", "reinmax")]
        return (
            gumbel.categorical(KEY, z),
            gumbel.exp_concrete(KEY, z, 0.5),
            *ones,
            gumbel.subset_softmax(KEY, z, 1, 0.5),
        )

    draws, log_x, *ones = found(jnp.array([[-3.0], [2.0]]))
    np.testing.assert_array_equal(draws, 0)
    np.testing.assert_array_equal(log_x, 0)
    for value in ones:
        np.testing.assert_array_equal(value, 1)


def test_edges_of_conditional_gumbels():
    z = jnp.zeros((3, 3))
    perturbed = gumbel.conditional_gumbels(KEY, z, jnp.array([-1, 3, 2]), where=jnp.array([True, True, False]))
    assert np.all(np.isnan(perturbed))


def test_edges_of_densities():
    x = np.log(np.float32([[0.5, 0.25, 0.25]] * 4))
    x[2:], x[3, :2] = -np.inf, np.log(0.5)

    @evaluated
    def found(x, z):
        f = gumbel.exp_concrete_log_density
        slopes = jax.grad(lambda z: jnp.sum(jnp.nan_to_num(f(x, z, 0.5))))(z)
        plain = gumbel.concrete_log_density(jnp.exp(x[3]), z[3], 0.5)
        return f(x, z, 0.5), f(x[3, :2], z[3, :2], 0.5), f(x[0], z[3], 0.5), plain, slopes

    density, of_two, left_out, plain, slopes = found(x, BAD)
    assert np.all(np.isnan(density[:2]))
    assert density[2] == 0
    np.testing.assert_allclose(density[3], of_two, rtol=1e-6)
    assert left_out == -np.inf  # of a class that is left out
    np.testing.assert_allclose(plain, density[3] - 2 * np.log(0.5), rtol=1e-6)
    np.testing.assert_array_equal(slopes[2], 0)
    assert np.all(np.isfinite(slopes[3]))
    masked = gumbel.binary_concrete_log_density(jnp.array([0.5, 0.2]), Z[0, :2], 0.5, where=jnp.array([False, True]))
    assert masked[0] == 0
    assert np.isfinite(masked[1])


@pytest.mark.parametrize(("classes", "k"), [(32, 1), (1000, 7), (1024, 3), (1024, 60), (257, 2)])
def test_largest_by_blocks(classes, k):
    """The results are those of `jax.lax.top_k`, the first of equal ones first, also in rows with few classes; so is the
    gradient."""
    a = np.round(4 * np.random.default_rng(0).normal(size=(6, classes))).astype(np.float32)
    a[0], a[1, 3:], a[2], a[3] = -np.inf, -np.inf, np.nan, 0

    def results(top):
        return evaluated(lambda a: (top(a, k), jax.grad(lambda a: jnp.sum(jnp.sin(top(a, k)[0][3:])))(a)))

    with jax.default_device(jax.devices("cpu")[0]):  # GPUs take the last of several NaN first
        wanted = jax.tree.leaves(results(jax.lax.top_k)(a))
    for found, want in zip(jax.tree.leaves(results(top_k_of_many)(a)), wanted, strict=True):
        np.testing.assert_array_equal(found, want)


def test_no_rows():
    """Any number of classes, in blocks or not."""

    @evaluated
    def found(z):
        draws = [gumbel.categorical(KEY, z, shape=(n, 0), replace=replace) for n, replace in ((500, True), (2, False))]
        slopes = jax.grad(lambda z: js.softmax(z).sum())(z)
        return js.entropy(z), js.log_normalizer(z), *draws, gumbel.gumbel_top_k(KEY, z, 2).indices, slopes

    for classes in (24, 1000):
        results = found(np.zeros((0, classes), np.float32))
        assert [a.shape for a in results] == [(0,), (0,), (500, 0), (2, 0), (0, 2), (0, classes)]


def test_dtypes_under_strict_promotion():
    with strict_promotion():
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            z = Z.astype(dtype)
            for name, f in MAPS.items():
                assert jax.eval_shape(f, z).dtype == dtype, name
            for f, want in (
                (lambda z: gumbel.categorical(KEY, z), jnp.int32),
                (lambda z: gumbel.gumbel_top_k(KEY, z, 2).threshold, jnp.float32),
                (lambda z: gumbel.exp_concrete_log_density(z, z, 0.5), jnp.float32),
                (lambda z, dtype=dtype: gumbel.binary_concrete_log_density(z * 0 + dtype(0.5), z, 0.5), jnp.float32),
            ):
                assert jax.eval_shape(f, z).dtype == want


INDEX = jnp.array([1, 3])
raw = inspect.unwrap
(draw, top, soft, subset, density, binary, conditional, averaged, heun) = map(
    raw,
    (
        gumbel.categorical,
        gumbel.gumbel_top_k,
        gumbel.gumbel_softmax,
        gumbel.subset_softmax,
        gumbel.exp_concrete_log_density,
        gumbel.binary_concrete_log_density,
        gumbel.conditional_gumbels,
        gumbel.rao_blackwellised,
        gumbel.reinmax,
    ),
)
WRONG = [  # call, error, what the message says
    (lambda: draw(KEY, Z, (0, 1)), ValueError, "categorical: axis must be one axis; got (0, 1)"),
    (lambda: draw(Z, KEY), TypeError, "categorical: key must be one PRNG key, the first argument", "(2, 4)"),
    (lambda: soft(0, Z, 1.0), TypeError, "gumbel_softmax: key must be one PRNG key", "got int", "jax.random.key(seed)"),
    (lambda: top(jax.random.split(KEY), Z, 1), TypeError, "gumbel_top_k: key must be one PRNG key", "jax.vmap"),
    (lambda: draw(KEY, Z, 2), ValueError, "categorical: axis 2 is out of range"),
    (lambda: draw(KEY, Z, shape=(5,)), ValueError, "categorical: shape must end in", "shape=(n, 2)"),
    (lambda: draw(KEY, Z, shape=2.5), TypeError, "categorical: shape must be a tuple of ints", "got 2.5"),
    (lambda: draw(KEY, Z, shape=(5, 2), replace=False), ValueError, "no more draws than there are classes, 4", "got 5"),
    (lambda: draw(KEY, Z, mode="exact"), ValueError, "categorical: mode must be None, 'low' or 'high'; got 'exact'"),
    (lambda: draw(KEY, Z, phi=jnp.exp), TypeError, "categorical: phi must be a φ"),
    (lambda: draw(KEY, Z, where=jnp.ones(3, bool)), ValueError, "categorical: where must broadcast"),
    (lambda: top(KEY, Z, 5), ValueError, "gumbel_top_k: k must be an int in [1, 4]", "got 5"),
    (lambda: top(KEY, Z, 2.0), TypeError, "gumbel_top_k: k must be an int", "static in jit"),
    (lambda: subset(KEY, Z, 0, 1.0), ValueError, "subset_softmax: k must be an int in [1, 4]", "got 0"),
    (lambda: soft(KEY, Z, 0), ValueError, "gumbel_softmax: temperature must be > 0", "jsoftmax.gumbel.categorical"),
    (lambda: soft(KEY, Z, -1.0), ValueError, "temperature must be > 0 and finite; got -1.0"),
    (lambda: soft(KEY, Z, jnp.ones(2)), ValueError, "temperature must be one number, or one for each row", "(2, 1)"),
    (lambda: binary(Z, Z, jnp.ones(3)), ValueError, "temperature must be a number or broadcast", "(2, 4)", "(3,)"),
    (lambda: binary(Z, Z, 0.5, where=[True]), TypeError, "binary_concrete_log_density: where must be an array"),
    (lambda: soft(KEY, Z, "low"), TypeError, "gumbel_softmax: temperature must be an array or a number; got str"),
    (lambda: heun(KEY, Z, 0.0), ValueError, "reinmax: temperature must be > 0"),
    (lambda: density(Z[:, :3], Z, 0.5), ValueError, "exp_concrete_log_density: x"),
    (lambda: binary(Z, Z[:, :2], 0.5), ValueError, "binary_concrete_log_density: x and z must have shapes"),
    (lambda: conditional(KEY, Z, jnp.array(1)), ValueError, "conditional_gumbels: index must have", "(2,)", "jax.vmap"),
    (
        lambda: conditional(KEY, Z, INDEX / 2),
        TypeError,
        "conditional_gumbels: index must be integers",
        "jnp.argmax(index, axis)",
    ),
    (lambda: conditional(KEY, Z, INDEX, maximum=jnp.ones(3)), ValueError, "maximum must be a number or broadcast"),
    (lambda: averaged(KEY, Z, INDEX, 0.5, 0), ValueError, "rao_blackwellised: samples must be an int >= 1", "got 0"),
    (lambda: averaged(KEY, Z, INDEX, 0.5, 2.0), TypeError, "rao_blackwellised: samples must be an int"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, *says = wrong
    with pytest.raises(error) as caught:
        call()
    for part in says:
        assert part in str(caught.value), caught.value
