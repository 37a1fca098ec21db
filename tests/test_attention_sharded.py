"""Attention over sharded keys: it equals attention over all, and exchanges little; heads and batches need no
argument."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import some
from interpreter import evaluated
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from modes import reverse_over_reverse
from sharding import DEVICES, assert_close, collectives, mesh

from jsoftmax import attention

B, T, S, N, K, H = 2, 5, 16, 4, 2, 3
WHOLE = PartitionSpec()
KEYS = PartitionSpec(None, "v")
SPECS = (WHOLE, KEYS, KEYS, PartitionSpec(None, None, None, "v"), WHOLE)
OPTIONS = {"key_value_seq_lengths": np.array([16, 7]), "is_causal": True, "local_window_size": (9, 0)}
EVERY = tuple(range(len(SPECS)))


def arrays():
    """Query, key, value, a bias of heads and keys, a sink."""
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (1, N, 1, S), (N,)]
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def statistics(q, k, v, bias, sink, **options):
    """Output, L and H beside each other."""
    found = attention.attention_statistics(q, k, v, bias, sink=sink, block_size=(2, 3), **OPTIONS, **options)
    return jnp.concatenate([a.reshape(B, T, N, -1) for a in found], -1)


def of_part(*given):
    return statistics(*given, axis_name="v")


def mapped(q, k, v, bias, sink):
    def cut(a, axis):
        return jnp.moveaxis(a.reshape(*a.shape[:axis], DEVICES, -1, *a.shape[axis + 1 :]), axis, 0)

    over = jax.vmap(of_part, (None, 0, 0, 0, None), None, axis_name="v")
    return over(q, cut(k, 1), cut(v, 1), cut(bias, 3), sink)


WAYS = {
    "shard_map": lambda: jax.shard_map(of_part, mesh=mesh(), in_specs=SPECS, out_specs=WHOLE),
    "without check_vma": lambda: jax.shard_map(of_part, mesh=mesh(), in_specs=SPECS, out_specs=WHOLE, check_vma=False),
    "vmap": lambda: mapped,
}


def total(f):
    return lambda *given: jnp.sum(jnp.sin(f(*given)))


def everything(f):
    """Gradient, Hessian product, value, forward mode."""

    def run(*given):
        dots, gradient = tuple(jnp.cos(a) for a in given), jax.grad(total(f), EVERY)
        return *jax.jvp(gradient, given, dots), *jax.jvp(f, given, dots)

    return evaluated(run)


@pytest.fixture(scope="module")
def of_all():
    with jax.enable_x64(True):
        return everything(statistics)(*arrays())


@pytest.mark.parametrize("way", some(WAYS, ["shard_map"]))
def test_parts_equal_the_whole(way, of_all):
    """The other ways, by default, of functions of scores: test_sharded.py."""
    with jax.enable_x64(True):
        assert_close(everything(WAYS[way]())(*arrays()), of_all, 1e-10)


def twice(f):
    return evaluated(reverse_over_reverse(jax.grad(total(f), EVERY), EVERY))


@pytest.fixture(scope="module")
def twice_of_all():
    with jax.enable_x64(True):
        return twice(statistics)(*arrays())


@pytest.mark.full  # Of functions of scores in test_sharded.py, of heads in test_heads_sharded.py.
@pytest.mark.parametrize("way", WAYS)
def test_reverse_over_reverse(way, twice_of_all):
    with jax.enable_x64(True):
        assert_close(twice(WAYS[way]())(*arrays()), twice_of_all, 1e-10)


def test_gradients_taken_inside(of_all):
    """Gradients in the body of a training step, with check_vma."""
    with jax.enable_x64(True):
        over = {"mesh": mesh(), "in_specs": SPECS, "out_specs": SPECS}
        found = evaluated(jax.shard_map(jax.grad(total(of_part), EVERY), **over))(*arrays())
        assert_close(found, of_all[0], 1e-10)


def test_what_devices_exchange():
    """The value takes one maximum and one sum; each derivative takes one more sum. None is in a loop."""
    f, given = WAYS["shard_map"](), arrays()
    gradient = jax.grad(total(f), EVERY)
    for g, count in ((f, 2), (gradient, 3), (lambda *a: jax.jvp(gradient, a, a)[1], 4)):
        assert collectives(g, *given) == (["all-reduce"] * count, count)


@pytest.mark.full  # The package takes no part in it: XLA cuts heads and batches as it cuts any batch.
def test_heads_and_batches_are_sharded_without_an_argument():
    """Under plain `jit` and in `jax.shard_map` nothing is exchanged, and the gradient is the same."""
    cut = jax.make_mesh((2, 2), ("b", "h"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:4])
    spec = PartitionSpec("b", None, "h")
    given = arrays()[:3]
    placed = [jax.device_put(a, NamedSharding(cut, spec)) for a in given]

    def f(q, k, v):
        return attention.dot_product_attention(q, k, v, is_causal=True, block_size=(2, 3))

    want = evaluated(jax.grad(total(f), (0, 1, 2)))(*given)
    for g in (f, jax.shard_map(f, mesh=cut, in_specs=(spec,) * 3, out_specs=spec)):
        gradient = jax.grad(total(g), (0, 1, 2))
        assert collectives(lambda *a, gradient=gradient: gradient(*a), *placed) == ([], 0)
        assert_close(evaluated(gradient)(*placed), want, 1e-5)


def test_wrong_calls():
    q, k, v, bias, _ = arrays()

    def raises(part, specs, match):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(jax.shard_map(part, mesh=mesh(), in_specs=specs, out_specs=WHOLE), q, k, v)

    def plain(q, k, v):
        return attention.dot_product_attention(q, k, v, axis_name="v")

    raises(plain, (WHOLE, WHOLE, WHOLE), "key must be sharded over axis_name='v'")
    raises(plain, (WHOLE, KEYS, WHOLE), "value must have the shape of key|value must be sharded")
    raises(
        lambda q, k, v: attention.dot_product_attention(q, k, v, bias, axis_name="v"),
        (WHOLE, KEYS, KEYS),
        "bias must have this device's classes",
    )
    with pytest.raises(ValueError, match="axis_name must be bound"):
        plain(q, k, v)
    q = jnp.zeros((B, 4, N, H))
    raises(plain, (KEYS, KEYS, KEYS), "query must be the same on all devices")
    explicit = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Explicit,), devices=jax.devices("cpu")[:2])
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="query must not be sharded over mesh axes of type"):
        attention.dot_product_attention(jax.device_put(q, PartitionSpec("b")), k, v)
