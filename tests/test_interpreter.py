"""The interpreter that evaluates the formulas of tests gives what XLA gives, or leaves the program to XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import BEFORE_0_12
from interpreter import Program, evaluated
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RNG = np.random.default_rng(0)
Z, W = RNG.normal(size=(6, 5)).astype(np.float32), RNG.normal(size=(4, 5)).astype(np.float32)
IDS = np.array([0, 2, 2, 1, 0, 2], np.int32)


def of_functions(z, _):
    positive = jnp.abs(z)
    of_all = (jnp.exp, jnp.expm1, jnp.tanh, jax.nn.sigmoid, jnp.sin, jnp.cbrt, jnp.floor, jnp.round, lax.erf, jnp.sign)
    of_positive = (jnp.log, jnp.log1p, jnp.sqrt, lax.rsqrt, lax.lgamma, lax.digamma, lambda a: a**0.3)
    return [f(z) for f in of_all], [f(positive) for f in of_positive], z % 0.3, jnp.isfinite(1 / (z - z[0]))


def of_dtypes(z, _):
    narrow = z.astype(jnp.bfloat16)
    return jnp.exp(narrow), z > 0, (8 * z).astype(jnp.int8), lax.reduce_precision(z, 8, 3), narrow.astype(jnp.float16)


def of_shapes(z, w):
    cut = z[1::2, ::-1], lax.dynamic_slice(z, (1, 2), (2, 2)), lax.dynamic_update_slice(z, w[:2, :2], (1, 2))
    return cut, lax.pad(z, 0.0, [(1, 2, 1), (-1, 0, 0)]), jnp.concatenate([z, w]), jnp.transpose(z.reshape(2, 3, 5))


def of_reductions(z, w):
    several = jnp.max(z.reshape(2, 3, 5), (0, 2)), jnp.sum(z, 0), jnp.argmax(z, 1), jnp.all(z > -9, 1)
    return several, jnp.cumsum(z, 1), lax.cumlogsumexp(z, 1, reverse=True), z @ w.T, jnp.einsum("ai,bi->ab", z, w)


def of_order(z, _):
    return jnp.sort(z), jnp.argsort(z), lax.top_k(z, 3), jnp.searchsorted(jnp.sort(z[0]), z[1])


def of_indices(z, w):
    """Scatter with an operand that is read again."""
    added = w.at[IDS].add(z) + w, w.at[IDS].max(z) + w
    outside = w.at[IDS + 2].add(z, mode="drop"), w.at[IDS + 2].get(mode="clip")
    segments = jax.ops.segment_sum(z, IDS, 4), jax.grad(lambda z: jnp.sum(jnp.sin(jax.ops.segment_max(z, IDS, 3))))(z)
    return added, outside, segments, jax.vmap(lambda a, i: a[i])(z, IDS), jnp.take_along_axis(z, jnp.argsort(z), 1)


def of_loops(z, w):
    scanned = lax.scan(lambda c, a: (c * jnp.sin(a), c), jnp.ones(5), z)
    several = lax.while_loop(lambda c: c[0] < 5, lambda c: (c[0] + 1, c[1] * z), (0, z))
    return scanned, several, lax.cond(z[0, 0] > 0, lambda: z, lambda: -z), lax.map(jnp.sum, w)


def of_derivatives(z, _):
    def f(z):
        return jnp.sum(jnp.sin(lax.scan(lambda c, a: (c * a, c + a), 1.0, jnp.cumsum(jnp.sort(z)))[1]))

    return jax.hessian(f)(z[0]), jax.vmap(jax.grad(f))(z)


def of_keys(z, _):
    return jax.random.normal(jax.random.key(1), z.shape), jax.random.split(jax.random.key(2))


EXACT = (of_functions, of_shapes, of_reductions, of_order, of_indices, of_loops, of_derivatives, of_keys)
OPERATIONS = [*((operations, 3e-6) for operations in EXACT), (of_dtypes, 1e-2)]
"""With the relative tolerance of each."""


def same(found, want, rtol):
    for pair in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        assert len({(a.shape, a.dtype) for a in pair}) == 1
        numbers = (jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a for a in pair)
        np.testing.assert_allclose(*(np.asarray(a, float) for a in numbers), rtol, 1e-6)


def program_and_leaves(f, *arguments):
    leaves, structure = jax.tree.flatten((arguments, {}))
    return Program(f, leaves, structure), leaves


@pytest.mark.skipif(BEFORE_0_12, reason="the interpreter is not used before jaxlib 0.12")
@pytest.mark.parametrize(("operations", "rtol"), OPERATIONS)
def test_as_by_xla(operations, rtol):
    program, leaves = program_and_leaves(operations, Z, W)
    assert program.compiled is None
    same(program(leaves), jax.jit(operations)(Z, W), rtol)


def test_what_is_left_to_xla():
    """Calls of libraries, many scores, arrays without entries; several devices; what is traced."""
    mesh = Mesh(jax.devices()[:2], "a")
    of_parts = jax.shard_map(jnp.sin, mesh=mesh, in_specs=PartitionSpec("a"), out_specs=PartitionSpec("a"))
    square, many = W @ W.T, np.zeros((4096, 100), np.float32)
    for f, z in ((jnp.linalg.inv, square), (jnp.exp, many), (jnp.exp, Z[:0]), (of_parts, Z)):
        program, leaves = program_and_leaves(f, z)
        assert program.compiled is not None
        same(program(leaves), jax.jit(f)(z), 1e-5)
    placed = jax.device_put(Z, NamedSharding(mesh, PartitionSpec("a")))
    assert len(evaluated(jnp.sin)(placed).devices()) == 2
    np.testing.assert_allclose(jax.vmap(jax.grad(evaluated(lambda a: jnp.sum(a**2))))(Z), 2 * Z, 1e-6)


def test_arguments():
    """Options, numbers of Python with their weak dtype, keys, trees; a program for each dtype, wide or not."""
    traced = []

    @evaluated
    def f(tree, c, *, key):
        traced.append(tree["z"].dtype)
        return tree["z"] * c, jax.random.uniform(key), None

    for dtype in (np.float32, np.float32, jnp.bfloat16):
        product, drawn, none = f({"z": jnp.asarray(Z, dtype)}, 2.0, key=jax.random.key(0))
        assert none is None
        assert product.dtype == dtype
        np.testing.assert_allclose(product.astype(np.float32), 2 * Z, 1e-2)
        np.testing.assert_array_equal(drawn, jax.random.uniform(jax.random.key(0)))
    with jax.enable_x64(True):
        assert f({"z": np.float64(Z)}, 2, key=jax.random.key(0))[0].dtype == np.float64
    assert traced == [np.float32, jnp.bfloat16, np.float64]


def test_settings():
    """A function that was evaluated before meets strict promotion and debug_nans, too."""
    product, root = evaluated(lambda a, b: a * b), evaluated(jnp.sqrt)
    wide, narrow = jnp.ones(2), jnp.ones(2, jnp.bfloat16)
    assert product(wide, narrow).dtype == np.float32
    assert np.isnan(root(-1.0))
    with jax.numpy_dtype_promotion("strict"), pytest.raises(ValueError, match="promotion"):
        product(wide, narrow)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        root(-1.0)
