"""dtypes under strict promotion, debug_nans, retracing, residuals, sharding, what an import costs."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, named, product, some
from interpreter import evaluated
from jax.sharding import PartitionSpec
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import verify
from jsoftmax.verify import FUNCTIONS, LOSSES, OTHERS, PHIS, SPARSE_MAPS

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.int32]
FEW_PHIS = [js.exp, js.taylor(2), js.spherical(0.1), js.relu_power(2, 0.1)]


def with_masks(function, dtype, phi):
    """Two rows of scores, and the function of them that a mask and a prior reach, and its gradient where the last row
    does not count."""
    inexact = jnp.float32 if dtype == jnp.int32 else dtype

    def value(*z):
        return function.ours(*z, phi=phi, where=jnp.array([True, True, False]), log_weights=jnp.zeros(3, inexact))

    def total(*z):
        return function.ours(*z, phi=phi, where=jnp.array([[True], [False]])).astype(jnp.float32)[0].sum()

    return [jnp.asarray([[1.0, 2.0, -1.0]] * 2, dtype)] * function.scores, value, jax.grad(total)


@pytest.mark.parametrize(("function", "dtype", "phi"), covering(FUNCTIONS, DTYPES, FEW_PHIS), ids=str)
def test_dtypes_under_strict_promotion(function, dtype, phi):
    """Both are known when a program is traced."""
    with jax.enable_x64(dtype == jnp.float64), strict_promotion():
        z, value, gradient = with_masks(function, dtype, phi)
        inexact = jnp.float32 if dtype == jnp.int32 else dtype
        keeps = function.name in ("softmax", "log_softmax") or jnp.finfo(inexact).bits >= 32
        assert jax.eval_shape(value, *z).dtype == (inexact if keeps else jnp.float32)
        if dtype != jnp.int32:
            assert jax.eval_shape(gradient, *z).dtype == dtype


FLOATING = [dtype for dtype in DTYPES if dtype != jnp.int32]


@pytest.mark.parametrize(
    ("function", "dtype", "phi"),
    and_full(
        covering(
            named(FUNCTIONS, ("softmax", "entropy", "kl_divergence")), FLOATING, FEW_PHIS, met=[(0, 1), (0, 2), (1, 2)]
        ),
        covering(FUNCTIONS, FLOATING, FEW_PHIS),
        covering(FUNCTIONS, [jnp.int32], FEW_PHIS, met=[(0, 2)]),
    ),
    ids=str,
)
def test_no_step_makes_a_nan(function, dtype, phi):
    """Runs operation by operation. By default each dtype once, with a map, one that reduces, and one of
    two arrays."""
    with jax.enable_x64(dtype == jnp.float64), strict_promotion(), jax.debug_nans(True):
        z, value, gradient = with_masks(function, dtype, phi)
        value(*z)
        if dtype != jnp.int32:
            assert np.all(np.isfinite(np.asarray(gradient(*z), np.float32)))


@pytest.mark.parametrize("function", some(FUNCTIONS, named(FUNCTIONS, ("softmax", "entropy"))), ids=str)
def test_a_new_parameter_or_an_equal_phi_does_not_retrace(function):
    """By default of one that keeps the classes and one that reduces them."""
    z = jnp.asarray(verify.scores(function, js.exp))
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=2)
    def f(z, phi):
        return function.ours(*z, phi=phi)

    for epsilon in (0.1, 0.2, 0.3):
        f(z, js.spherical(epsilon))
    for _ in range(3):
        f(z, js.taylor(4))
    compiled = function.ours(*z, phi=js.spherical(0.5))
    np.testing.assert_allclose(f(z, js.spherical(0.5)), compiled, rtol=1e-5)


@pytest.mark.parametrize(
    ("function", "phi"), product(FUNCTIONS, [js.exp, js.taylor(4), js.softplus], met=[(0, 1)]), ids=str
)
def test_residuals(function, phi):
    """For the backward pass functions keep the scores, one array of their size each, and a mask."""
    z = [jnp.float32(np.cos(np.arange(1000.0) + i)) for i in range(function.scores)]
    _, pull = jax.vjp(lambda *z: function.ours(*z, phi=phi), *z)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= 1000]
    beyond = [leaf for leaf in kept if not any(np.array_equal(leaf, a) for a in z)]
    assert sum(leaf.nbytes for leaf in beyond) <= sum(1.25 * a.nbytes for a in z)


EVERY = FUNCTIONS + LOSSES + SPARSE_MAPS + OTHERS


@pytest.mark.parametrize(
    "function",
    some(EVERY, named(EVERY, ("entmax15",))),
    ids=str,
)
def test_survives_shard_map(function):
    """Rows sharded over the devices there are, eight on CPU: value and gradient as without. By default of one with a
    loop; others with rows in parts are in test_sharded.py."""
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("rows",))
    z = jnp.stack([jnp.asarray(verify.scores(function, js.exp, seed)) for seed in range(len(devices))])
    spec = PartitionSpec("rows")

    def f(z):
        return jax.vmap(lambda z: function.ours(*z, phi=js.softplus))(z)

    def value_and_gradient(g):
        return evaluated(lambda z: (g(z), jax.grad(lambda z: jnp.sum(jnp.sin(g(z))))(z)))

    sharded = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    (value, gradient), (want, wanted) = (value_and_gradient(g)(z) for g in (sharded, f))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "phi", some(PHIS, [js.exp, js.taylor(2), js.spherical(0.1), *named(PHIS, ["from_callable"])]), ids=str
)
def test_phi_is_an_ordinary_argument(phi):
    """By default of one without parameters, with a static one, with a traced one, and of a callable."""
    z = jnp.array([0.3, -0.7, 1.1])
    np.testing.assert_allclose(jax.jit(lambda p: js.entropy(z, phi=p))(phi), js.entropy(z, phi=phi), rtol=1e-6)
    leaves, structure = jax.tree.flatten(phi)
    assert jax.tree.unflatten(structure, leaves) == phi


def test_import_brings_only_the_core():
    code = (
        "import sys, jax, jaxtyping; before = set(sys.modules); import jsoftmax; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(eval(done.stdout)) <= {"jsoftmax", "jax"}, done.stdout


def _with_z_loss(z):
    return js.losses.cross_entropy(z, jnp.zeros(z.shape[0], int), z_loss=0.1)


def _gradient_with_smoothing(z):
    labels = jnp.zeros(z.shape[0], int)
    return jax.grad(lambda z: js.losses.cross_entropy(z, labels, label_smoothing=0.1).sum())(z)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        *(
            (f, s)
            for f in (js.softmax, js.log_softmax, js.log_normalizer, js.entropy)
            for s in ((4096, 64), (16, 8192))
        ),
        *((f, (4096, 300)) for f in (js.softmax, js.log_softmax, js.entropy)),
        (_with_z_loss, (16, 8192)),
        (_gradient_with_smoothing, (16, 8192)),
    ],
)
def test_no_array_of_the_scores_size_beside_the_result(function, shape):
    z = jnp.zeros(shape, jnp.float32)
    temporaries = jax.jit(function).lower(z).compile().memory_analysis().temp_size_in_bytes
    assert temporaries <= z.nbytes / 4
