"""Scores in bfloat16 are read as they are: results are those of float32 for the same numbers, without a wide array."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, some
from compilation import jit_as_user
from interpreter import evaluated
from jax.sharding import NamedSharding, PartitionSpec
from sharding import DEVICES, exchanged, mesh

import jsoftmax as js
from jsoftmax import losses
from jsoftmax.sums.cpu.paths import block_length

ROWS = 8
LABELS = jnp.arange(ROWS) % 3
FUNCTIONS = {
    "softmax": js.softmax,
    "log_softmax": js.log_softmax,
    "log_normalizer": js.log_normalizer,
    "cross_entropy": lambda z, **o: losses.cross_entropy(z, LABELS, z_loss=0.01, **o),
    "focal": lambda z, **o: losses.focal_cross_entropy(z, LABELS, ignore_label=2, **o),
}
KEEP = ("softmax", "log_softmax")
# few classes, blocks in values alone, blocks, blocks that leave a tail, none that fit
LENGTHS = (60, 1000, 4500, 8192, 4099)


def scores(classes, rows=ROWS, scale=3):
    """Rows whose largest score stands above the others by nothing, little and much."""
    z = scale * np.random.default_rng(classes).normal(size=(rows, classes))
    z[:, 7] += 5 * np.arange(rows)
    return jnp.asarray(z, jnp.bfloat16)


def wide(f, z):
    """f of the same numbers in float32."""
    return f(z.astype(jnp.float32))


def assert_as_wide(found, want, *, scale=None):
    """Asserts equality up to one rounding to bfloat16, for derivatives relative to the largest number."""
    tolerance, scale = 1e-6, np.abs(want) if scale is None else scale
    if found.dtype == jnp.bfloat16:
        tolerance = float(jnp.finfo(found.dtype).eps)
    assert np.all(np.abs(np.float32(found) - want) <= tolerance * np.maximum(scale, 1e-30))


def derivatives(f):
    """Value, gradient, forward mode, forward over reverse, reverse over reverse, along 1, 0, −1, …, which both dtypes
    hold."""

    def run(z):
        along = (jnp.arange(z.size).reshape(z.shape) % 3 - 1).astype(z.dtype)
        gradient = jax.grad(lambda z: jnp.sum(jnp.sin(f(z).astype(jnp.float32))))
        twice = jax.grad(lambda z: jnp.vdot(gradient(z).astype(jnp.float32), along.astype(jnp.float32)))
        return f(z), gradient(z), jax.jvp(f, (z,), (along,))[1], jax.jvp(gradient, (z,), (along,))[1], twice(z)

    return jit_as_user(run)


AS_IN_FLOAT32 = and_full(
    [("cross_entropy", 8192)],
    [("softmax", 4500), ("cross_entropy", 60), ("log_normalizer", 4500)],
    covering(FUNCTIONS, LENGTHS, met=[(0, 1)]),
)
"""Functions meet shapes in test_sums.py, in bfloat16 too; what keeps the classes, and blocks that leave a tail, are
below. In the gate each length and each function."""


@pytest.mark.parametrize(("name", "classes"), AS_IN_FLOAT32)
def test_as_in_float32(name, classes):
    z, f = scores(classes), derivatives(FUNCTIONS[name])
    value, gradient, forward, *second = f(z)
    assert value.dtype == (jnp.bfloat16 if name in KEEP else jnp.float32)
    assert gradient.dtype == jnp.bfloat16
    want = wide(f, z)
    assert_as_wide(value, want[0])
    if name not in KEEP:  # of those the sine is taken of another number
        assert_as_wide(gradient, want[1], scale=np.max(np.abs(want[1]), -1, keepdims=True))
        assert_as_wide(forward, want[2], scale=np.max(np.abs(want[2])))
        for found, wanted in zip(second, want[3:], strict=True):
            np.testing.assert_allclose(np.float32(found), wanted, rtol=0.02, atol=0.02 * np.max(np.abs(wanted)))


@pytest.mark.parametrize(
    ("name", "classes"), and_full([("softmax", 8192)], itertools.product(KEEP, [4500, 8192]))
)  # log_softmax is read in the same way
def test_derivatives_of_what_keeps_the_classes(name, classes):
    z, f = scores(classes, scale=1), FUNCTIONS[name]
    g = jnp.cos(jnp.arange(classes)).astype(jnp.bfloat16) * jnp.ones_like(z)

    def pull(z, g):
        return jax.vjp(f, z)[1](g.astype(z.dtype))[0]

    @jit_as_user
    def pull_and_product(z, g):
        return jax.jvp(lambda z: pull(z, g), (z,), (jnp.sign(g).astype(z.dtype),))

    (found, product), (want, of_wide) = pull_and_product(z, g), pull_and_product(z.astype(jnp.float32), g)
    assert_as_wide(found, want, scale=np.max(np.abs(want), -1, keepdims=True))
    np.testing.assert_allclose(np.float32(product), of_wide, atol=0.02 * np.max(np.abs(of_wide)))


OF_EDGES = and_full([("softmax", 300), ("cross_entropy", 4500)], covering(FUNCTIONS, [300, 4500, 8192], met=[(0, 1)]))
"""One with a result for each class, one for each row."""


@pytest.mark.parametrize(("name", "classes"), OF_EDGES)
def test_edges(name, classes):
    """Classes left out, by score and by mask, empty rows, bad scores: as in float32, derivatives too."""
    f = FUNCTIONS[name]
    z = np.float32(scores(classes))
    z[1], z[2, 5], z[3, 9], z[4, 10:], z[5], z[6] = -np.inf, np.nan, np.inf, -np.inf, 1e-9, -3e38
    z, kept = jnp.asarray(z, jnp.bfloat16), np.arange(classes) % 5 > 0
    for g in (f, lambda z: f(z, where=kept)) if name in KEEP or name == "log_normalizer" else (f,):

        @jit_as_user
        def value_and_gradient(z, g=g):
            value, pull = jax.vjp(g, z)
            signs = jnp.sign(jnp.cos(jnp.arange(value.size))).reshape(value.shape)
            return value, pull(signs.astype(value.dtype))[0]

        (value, gradient), (of_wide, want) = map(np.float32, value_and_gradient(z)), wide(value_and_gradient, z)
        np.testing.assert_allclose(value, of_wide, rtol=0.01, atol=1e-30)
        np.testing.assert_allclose(gradient, want, rtol=0.02, atol=0.01 * np.max(np.abs(want[np.isfinite(want)])))


def test_what_bfloat16_does_not_hold():
    """x = ψ(z) + log w − m 1_y in float32."""
    z, w = scores(4500), jnp.log(1 + jnp.arange(4500.0))
    for f in (
        lambda z: js.log_normalizer(z, log_weights=w),
        lambda z: js.log_normalizer(z, phi=js.spherical(0.3)),
        lambda z: losses.cross_entropy(z, LABELS, log_weights=w, margin=0.3, label_smoothing=0.1),
    ):
        run = jit_as_user(f)
        np.testing.assert_allclose(run(z), wide(run, z), rtol=1e-6)


def test_small_losses_keep_their_digits():
    z = jnp.zeros((2, 8192), jnp.bfloat16).at[0, 3].set(40).at[1].set(-30).at[1, 8000].set(0)
    L = float(np.log1p(8191 * np.exp(-40.0)))
    loss, normalizer = jit_as_user(lambda z: (losses.cross_entropy(z, jnp.array([3, 8000])), js.log_normalizer(z)))(z)
    np.testing.assert_allclose(loss, [L, np.log1p(8191 * np.exp(-30.0))], rtol=1e-6)
    np.testing.assert_allclose(normalizer, [40, np.log1p(8191 * np.exp(-30.0))], rtol=1e-6)


@pytest.mark.parametrize("name", some(["log_normalizer", "cross_entropy"], ["cross_entropy"]))
def test_at_order_two_in_a_scan(name):
    """In a scan JAX may differentiate the bodies of functions, and integers have no derivative. Along 1 the derivative
    of Σ e^u is what counts: H 1 = 0. By default of the one that takes labels, too."""
    z = (scores(8192, scale=1) / 8).astype(jnp.bfloat16) + 4

    def scanned(z):
        """Σ z f(z), f of the carry."""
        done, _ = jax.lax.scan(lambda z, _: (z * FUNCTIONS[name](z)[:, None].astype(z.dtype), None), z, None, length=1)
        return jnp.sum(done.astype(jnp.float32))

    @jit_as_user
    def product(z):
        return jax.jvp(jax.grad(scanned), (z,), (jnp.ones_like(z),))[1]

    want = product(z.astype(jnp.float32))
    np.testing.assert_allclose(np.float32(product(z)), want, atol=0.02 * np.max(np.abs(want)))


@pytest.mark.parametrize("name", some(FUNCTIONS, ["softmax", "cross_entropy"]))
def test_no_wide_array(name):
    """The value makes no array of the scores' size beside the result; the gradient of a sum makes none either. By
    default of one that keeps the classes and one that reduces them."""
    f, z = FUNCTIONS[name], jnp.zeros((ROWS, 32768), jnp.bfloat16)
    candidates = [f] if name in KEEP else [f, jax.grad(lambda z: jnp.sum(f(z)))]
    if name == "focal":  # rows that do not count are written as zeros first, in bfloat16
        candidates = candidates[1:]
    for g in candidates:
        assert jit_as_user(g).lower(z).compile().memory_analysis().temp_size_in_bytes <= z.nbytes / 4


def test_no_wide_array_in_gradients_of_many_rows():
    """From 4096 rows on XLA on CPU makes other kernels."""
    z = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    for f in (js.log_normalizer, lambda z: losses.cross_entropy(z, jnp.zeros(4096, int))):
        for g in (jax.grad(lambda z, f=f: jnp.sum(f(z))), jax.value_and_grad(lambda z, f=f: jnp.mean(f(z)))):
            assert jit_as_user(g).lower(z).compile().memory_analysis().temp_size_in_bytes <= 4096 * 4096 / 2


OF_SHARDED = and_full(
    [("softmax", DEVICES * 700), ("cross_entropy", 8192)], itertools.product(FUNCTIONS, [DEVICES * 700, 8192])
)
"""One with a result for each class, one with labels; the others, not in bfloat16, in test_sharded.py."""


@pytest.mark.parametrize(("name", "classes"), OF_SHARDED)
def test_sharded_classes(name, classes):
    """By shard_map, by plain jit and on Explicit axes; devices exchange numbers of rows and one block at most."""
    f, z, spec = FUNCTIONS[name], scores(classes), PartitionSpec(None, "v")
    out = spec if name in KEEP else PartitionSpec()
    want = wide(f, z)
    parts = jax.device_put(z, NamedSharding(mesh(), spec))
    mapped = jax.shard_map(lambda z: f(z, axis_name="v"), mesh=mesh(), in_specs=spec, out_specs=out)
    gradient = jax.grad(lambda z: jnp.sum(jnp.sin(f(z).astype(jnp.float32))))
    for g, given in ((mapped, z), (f, parts)):
        assert_as_wide(evaluated(g)(given), want)
    of_parts, whole = (np.float32(evaluated(gradient)(given)) for given in (parts, z))
    np.testing.assert_allclose(of_parts, whole, atol=0.02)
    for g in (f, gradient):
        for kind, longest in exchanged(g, parts):
            assert kind == "all-reduce"
            assert longest in (ROWS, ROWS * block_length(classes))
    explicit = mesh(jax.sharding.AxisType.Explicit)
    with jax.set_mesh(explicit):
        assert_as_wide(evaluated(f)(jax.device_put(z, NamedSharding(explicit, spec))), want)
