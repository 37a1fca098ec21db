"""Streaming heads over sharded classes: four ways that equal the whole head, and what the devices exchange."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jsoftmax import heads

DEVICES, TOKENS, FEATURES, CLASSES = 4, 6, 3, 32
BLOCKS = {"block_size": (3, 4)}


def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, weight = jax.random.normal(keys[0], (TOKENS, FEATURES)), jax.random.normal(keys[1], (CLASSES, FEATURES))
    return (hidden, weight, jax.random.normal(keys[2], (CLASSES,))), jax.random.randint(keys[3], (TOKENS,), 0, CLASSES)


def functions(labels):
    w = jnp.arange(1.0, TOKENS + 1)
    return {
        "linear_cross_entropy": lambda h, W, b, **o: heads.linear_cross_entropy(
            h, W, labels, b, label_smoothing=0.1, z_loss=0.1, ignore_label=3, **o
        ),
        "linear_cross_entropy_sum": lambda h, W, b, **o: heads.linear_cross_entropy_sum(
            h, W, labels, b, label_smoothing=0.1, token_weights=w, **o
        ),
        "linear_statistics": lambda h, W, b, **o: jnp.stack(heads.linear_statistics(h, W, labels, b, **o)),
        "linear_log_normalizer": heads.linear_log_normalizer,
        "linear_kl": lambda h, W, b, **o: heads.linear_kl(h, W, jnp.sin(h), jnp.cos(W), b, **o),
        "linear_top_k": lambda h, W, b, **o: heads.linear_top_k(h, W, 11, b, **o).log_prob,
    }


NAMES = list(functions(None))


def mesh():
    return jax.make_mesh((DEVICES,), ("v",), axis_types=(AxisType.Auto,))


def ways(f):
    """The function of whole arrays, computed in parts."""
    whole, parts = PartitionSpec(), PartitionSpec("v")

    def of_part(h, W, b):
        return f(h, W, b, axis_name="v", **BLOCKS)

    def mapped(h, W, b):
        cut = (h, W.reshape(DEVICES, -1, FEATURES), b.reshape(DEVICES, -1))
        return jax.vmap(of_part, (None, 0, 0), None, axis_name="v")(*cut)

    over = {"mesh": mesh(), "in_specs": (whole, parts, parts), "out_specs": whole}
    return {
        "shard_map": jax.shard_map(of_part, **over),
        "shard_map without check_vma": jax.shard_map(of_part, check_vma=False, **over),
        "vmap": mapped,
        "shards": lambda h, W, b: f(h, W, b, shards=DEVICES, **BLOCKS),
    }


def everything(f):
    """Value, gradient, forward mode, Hessian product, reverse over reverse."""

    def run(*given):
        def total(*given):
            return jnp.sum(jnp.sin(f(*given)))

        dots = tuple(jnp.cos(a) for a in given)
        gradient = jax.grad(total, (0, 1, 2))
        twice = jax.grad(lambda *given: sum(jnp.vdot(g, g) for g in gradient(*given)), (0, 1, 2))
        return f(*given), gradient(*given), jax.jvp(f, given, dots)[1], jax.jvp(gradient, given, dots)[1], twice(*given)

    return jax.jit(run)


@pytest.mark.parametrize("name", NAMES)
def test_parts_equal_the_whole(name):
    with jax.enable_x64(True):
        given, labels = arrays()
        f = functions(labels)[name]
        want = everything(lambda *given: f(*given, **BLOCKS))(*given)
        for g in ways(f).values():
            found = everything(g)(*given)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12 * np.max(np.abs(b)))


@pytest.mark.parametrize("replace", [True, False])
def test_the_same_draws(replace):
    """In shards of whole chunks of 128 classes; one shard has no class."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden, weight = jax.random.normal(keys[0], (4, 3)), jax.random.normal(keys[1], (1024, 3))
    where = (jnp.arange(1024) < 256) | (jnp.arange(1024) >= 512)

    def f(h, W, where, **o):
        return heads.linear_categorical(keys[2], h, W, shape=(9, 4), replace=replace, where=where, **o)

    parts = PartitionSpec("v")
    over = {"mesh": mesh(), "in_specs": (PartitionSpec(), parts, parts), "out_specs": PartitionSpec()}
    want = f(hidden, weight, where)
    of_part = jax.jit(jax.shard_map(lambda *given: f(*given, axis_name="v"), **over))
    np.testing.assert_array_equal(of_part(hidden, weight, where), want)
    np.testing.assert_array_equal(f(hidden, weight, where, shards=DEVICES), want)


def collectives(f, *given):
    text = jax.jit(f).lower(*given).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
    return found, len(re.findall(r" all-reduce(?:-start)?\(", entry))


@pytest.mark.parametrize("way", ["shard_map", "shards"])
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_log_normalizer"])
def test_one_maximum_and_one_sum(name, way):
    """And the gradient of the hidden states, once: nothing in the loops, and never a gather."""
    given, labels = arrays()
    names = (PartitionSpec(), PartitionSpec("v"), PartitionSpec("v"))
    given = [jax.device_put(a, NamedSharding(mesh(), spec)) for a, spec in zip(given, names, strict=True)]
    f = ways(functions(labels)[name])[way]
    gradient = jax.grad(lambda *given: jnp.sum(f(*given)), (0, 1, 2))

    def product(*given):
        return jax.jvp(gradient, given, given)[1]

    for g, count in ((f, 2), (gradient, 3), (product, 4)):
        found, outside = collectives(g, *given)
        assert set(found) == {"all-reduce"}
        assert outside == len(found) == count


def test_wrong_calls():
    (h, W, b), labels = arrays()
    f = heads.linear_cross_entropy
    for options, error, message in (
        ({"axis_name": "v"}, ValueError, "must be bound"),
        ({"axis_name": ()}, TypeError, "axis_name must be None"),
        ({"shards": 5}, ValueError, "must divide"),
        ({"shards": 0}, ValueError, "positive int"),
    ):
        with pytest.raises(error, match=f"linear_cross_entropy: .*{message}"):
            f(h, W, labels, b, **options)
    whole = PartitionSpec()
    over = {"mesh": mesh(), "in_specs": whole, "out_specs": whole}
    with pytest.raises(ValueError, match="weight must be sharded over axis_name='v'"):
        jax.jit(jax.shard_map(lambda h, W: f(h, W, labels, axis_name="v"), **over))(h, W)
    with pytest.raises(ValueError, match="got both"):
        jax.vmap(lambda h, W: f(h, W, labels, axis_name="v", shards=2), (None, 0), axis_name="v")(h, W[None])
