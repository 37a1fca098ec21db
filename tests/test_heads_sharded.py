"""Streaming heads over sharded classes: four ways that equal the whole head, and what the devices exchange; meshes of
tokens × classes, differentiated inside."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cells import and_full, covering, some
from interpreter import evaluated
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from modes import reverse_over_reverse
from sharding import DEVICES, assert_close, collectives, mesh

from jsoftmax import heads

TOKENS, FEATURES, CLASSES = 6, 3, 32
BLOCKS = {"block_size": (3, 4)}


def arrays():
    rng = np.random.default_rng(0)
    given = tuple(jnp.asarray(rng.normal(size=size)) for size in ((TOKENS, FEATURES), (CLASSES, FEATURES), CLASSES))
    return given, jnp.asarray(rng.integers(0, CLASSES, TOKENS))


def functions(labels, w):
    return {
        "linear_cross_entropy": lambda h, W, b, **o: heads.linear_cross_entropy(
            h, W, labels, b, label_smoothing=0.1, z_loss=0.1, ignore_label=3, **o
        ),
        "linear_cross_entropy_sum": lambda h, W, b, **o: heads.linear_cross_entropy_sum(
            h, W, labels, b, label_smoothing=0.1, token_weights=w, ignore_label=3, **o
        ),
        "linear_statistics": lambda h, W, b, **o: jnp.stack(heads.linear_statistics(h, W, labels, b, **o)),
        "linear_log_normalizer": heads.linear_log_normalizer,
        "linear_kl": lambda h, W, b, **o: heads.linear_kl(h, W, jnp.sin(h), jnp.cos(W), b, **o),
        "linear_jsd": lambda h, W, b, **o: heads.linear_jsd(h, W, jnp.sin(h), jnp.cos(W), b, beta=0.3, **o),
        "linear_top_k": lambda h, W, b, **o: heads.linear_top_k(h, W, 11, b, **o).log_prob,
    }


NAMES = list(functions(None, None))
WEIGHTS = jnp.arange(1.0, TOKENS + 1)
WHOLE, TOKENS_CUT, CLASSES_CUT = PartitionSpec(), PartitionSpec("t"), PartitionSpec("v")


def two_dimensional(kind=AxisType.Auto):
    return jax.make_mesh((2, DEVICES), ("t", "v"), axis_types=(kind, kind))


def ways(f):
    """The function of whole arrays, computed in parts."""

    def of_part(h, W, b):
        return f(h, W, b, axis_name="v", **BLOCKS)

    def mapped(h, W, b):
        cut = (h, W.reshape(DEVICES, -1, FEATURES), b.reshape(DEVICES, -1))
        return jax.vmap(of_part, (None, 0, 0), None, axis_name="v")(*cut)

    over = {"mesh": mesh(), "in_specs": (WHOLE, CLASSES_CUT, CLASSES_CUT), "out_specs": WHOLE}
    return {
        "shard_map": jax.shard_map(of_part, **over),
        "shard_map without check_vma": jax.shard_map(of_part, check_vma=False, **over),
        "vmap": mapped,
        "shards": lambda h, W, b: f(h, W, b, shards=DEVICES, **BLOCKS),
    }


MODES = ("value and forward mode", "gradient and Hessian product", "reverse over reverse")


def differentiated(f, modes):
    """The function in these modes, by name."""

    def run(*given):
        dots = tuple(jnp.cos(a) for a in given)
        gradient = jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given))), (0, 1, 2))
        found = {
            "value and forward mode": lambda: jax.jvp(f, given, dots),
            "gradient and Hessian product": lambda: jax.jvp(gradient, given, dots),
            "reverse over reverse": lambda: reverse_over_reverse(gradient, (0, 1, 2))(*given),
        }
        return {mode: found[mode]() for mode in modes}

    return evaluated(run)


WAYS = ("shard_map", "shard_map without check_vma", "vmap", "shards")
SHORT = covering(NAMES, WAYS, MODES, met=[(0, 1), (0, 2), (1, 2)])  # whole heads meet modes in test_heads.py


def by_head(rows):
    return [(name, [row[1:] for row in rows if row[0] == name]) for name in NAMES]


CASES = and_full(by_head(SHORT), by_head([row for row in covering(NAMES, WAYS, MODES) if row not in SHORT]))
"""By default each head, each way and each mode; in the gate every two of them."""


@pytest.mark.parametrize(("name", "parts"), CASES, ids=lambda a: a if isinstance(a, str) else f"{len(a)} parts")
def test_parts_equal_the_whole(name, parts):
    """In each way and mode."""
    with jax.enable_x64(True):
        given, labels = arrays()
        f = functions(labels, WEIGHTS)[name]
        wanted = differentiated(lambda *given: f(*given, **BLOCKS), {mode for _, mode in parts})(*given)
        for way, mode in parts:
            assert_close(differentiated(ways(f)[way], [mode])(*given)[mode], wanted[mode], 1e-10)


def total_and_derivatives(name, *, psum=lambda a: a, **options):
    """Of the sum over tokens: value, gradient, Hessian product; to be called on devices' parts, too."""

    def run(h, W, b, labels, w):
        def total(*given):
            a = functions(labels, w)[name](*given, block_size=(2, 4), **options)
            return psum(jnp.sum(jnp.sin(a)) if a.ndim else a)

        dots = tuple(jnp.cos(a) for a in (h, W, b))
        (value, gradient), (_, product) = jax.jvp(jax.value_and_grad(total, (0, 1, 2)), (h, W, b), dots)
        return value, gradient, product

    return run


@pytest.mark.parametrize(
    "name", some(["linear_cross_entropy_sum", "linear_cross_entropy", "linear_kl"], ["linear_cross_entropy_sum"])
)
def test_derivatives_inside_a_mesh_of_tokens_and_classes(name):
    """A train step's: those by what is the same along an axis are summed over it. Half of the devices ignore all of
    their tokens. By default of the sum, which adds up over tokens itself; gradients of the loss are in the steps of
    training, values of the others in parts above."""
    with jax.enable_x64(True):
        given, labels = arrays()
        given = (*given, labels.at[: TOKENS // 2].set(3), WEIGHTS)
        parts = (TOKENS_CUT, CLASSES_CUT, CLASSES_CUT)
        of_part = total_and_derivatives(name, psum=lambda a: jax.lax.psum(a, "t"), axis_name="v")
        over = {"in_specs": (*parts, TOKENS_CUT, TOKENS_CUT), "out_specs": (WHOLE, parts, parts)}
        found = evaluated(jax.shard_map(of_part, mesh=two_dimensional(), **over))(*given)
        want = evaluated(total_and_derivatives(name))(*given)
        assert_close(found, want, 1e-10)


@pytest.mark.full  # By default derivatives inside a mesh of two axes, above.
def test_tokens_and_classes_over_one_axis():
    """The tokens are gathered; backwards their gradients are summed and scattered. The loss is the same on all, which
    JAX does not know of what is gathered: hence its mean."""
    with jax.enable_x64(True):
        (hidden, weight, bias), labels = arrays()
        hidden, labels = jnp.concatenate([hidden, hidden[:2] + 1]), jnp.concatenate([labels, labels[:2]])

        def of_part(hidden, weight, bias, labels):
            def total(hidden, weight, bias):
                whole, y = (jax.lax.all_gather(a, "v", tiled=True) for a in (hidden, labels))
                losses = heads.linear_cross_entropy(whole, weight, y, bias, axis_name="v", **BLOCKS)
                return jax.lax.pmean(jnp.sum(jnp.sin(losses)), "v")

            return jax.value_and_grad(total, (0, 1, 2))(hidden, weight, bias)

        over = {"mesh": mesh(), "in_specs": (CLASSES_CUT,) * 4, "out_specs": (WHOLE, (CLASSES_CUT,) * 3)}
        found = evaluated(jax.shard_map(of_part, **over))(hidden, weight, bias, labels)

        def total(hidden, weight, bias):
            return jnp.sum(jnp.sin(heads.linear_cross_entropy(hidden, weight, labels, bias)))

        want = evaluated(jax.value_and_grad(total, (0, 1, 2)))(hidden, weight, bias)
        assert_close(found, want, 1e-10)


@pytest.mark.full  # The same is true of functions of scores, and tested of them in test_sharded.py.
@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_sum"])
def test_derivatives_inside_without_check_vma(name):
    """Too large by the number of devices, as the docstring of `linear_cross_entropy` says; and its remedy."""
    with jax.enable_x64(True):
        given, labels = arrays()
        given = (*given, labels, WEIGHTS)

        def of_part(*given):
            value, *derivatives = total_and_derivatives(name, axis_name="v")(*given)
            return value, [(jax.lax.pmean(by_h, "v"), by_W, by_b) for by_h, by_W, by_b in derivatives]

        def mapped(h, W, b, labels, w):
            cut = (W.reshape(DEVICES, -1, FEATURES), b.reshape(DEVICES, -1))
            axes, out = (None, 0, 0, None, None), (None, [(None, 0, 0)] * 2)
            value, found = jax.vmap(of_part, axes, out, axis_name="v")(h, *cut, labels, w)
            return value, [(by_h, by_W.reshape(W.shape), by_b.reshape(b.shape)) for by_h, by_W, by_b in found]

        specs = (WHOLE, CLASSES_CUT, CLASSES_CUT)
        over = {"in_specs": (*specs, WHOLE, WHOLE), "out_specs": (WHOLE, [specs] * 2)}
        value, *derivatives = evaluated(total_and_derivatives(name))(*given)
        want = value, [(by_h, DEVICES * by_W, DEVICES * by_b) for by_h, by_W, by_b in derivatives]
        for f in (jax.shard_map(of_part, mesh=mesh(), check_vma=False, **over), mapped):
            found = evaluated(f)(*given)
            assert_close(found, want, 1e-10)


@pytest.mark.full  # Draws of shards, with more options, are in test_heads_draws.py.
@pytest.mark.parametrize("replace", [True, False])
def test_the_same_draws(replace):
    """In shards of whole chunks of 128 classes; one shard has no class."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden, weight = jax.random.normal(keys[0], (4, 3)), jax.random.normal(keys[1], (1024, 3))
    where = (jnp.arange(1024) < 256) | (jnp.arange(1024) >= 512)

    def f(h, W, where, **o):
        return heads.linear_categorical(keys[2], h, W, shape=(9, 4), replace=replace, where=where, **o)

    over = {"mesh": mesh(), "in_specs": (WHOLE, CLASSES_CUT, CLASSES_CUT), "out_specs": WHOLE}
    want = evaluated(f)(hidden, weight, where)
    of_part = evaluated(jax.shard_map(lambda *given: f(*given, axis_name="v"), **over))
    np.testing.assert_array_equal(of_part(hidden, weight, where), want)
    by_shards = evaluated(lambda *given: f(*given, shards=DEVICES))
    np.testing.assert_array_equal(by_shards(hidden, weight, where), want)


COUNTS = {
    "linear_cross_entropy": (2, 3, 4),
    "linear_cross_entropy_sum": (2, 3, 4),
    "linear_log_normalizer": (2, 3, 4),
    "linear_statistics": (3, 3, 4),
    "linear_top_k": (2, 4, 5),
    "linear_kl": (3, 4, 5),
    "linear_jsd": (3, 4, 5),
}
EXCHANGES = and_full(
    [("shard_map", "linear_cross_entropy_sum")],
    [("shard_map", name) for name in COUNTS],
    [("shards", "linear_cross_entropy"), ("shards", "linear_cross_entropy_sum")],
)
"""By default the one whose gradient has merges of its own, in a loop. The others exchange what a value and a gradient
of blocks do, with two heads twice."""


@pytest.mark.parametrize(("way", "name"), EXCHANGES)
def test_collectives(way, name):
    """A maximum, a sum, and the gradient of the hidden states, once: nothing in the loops, and never a gather; as
    docs/guides/devices.md says of value, gradient and Hessian product."""
    row = f"| `heads.{name}` | " + " | ".join(map(str, COUNTS[name])) + " |"
    assert row in (pathlib.Path(__file__).parent.parent / "docs/guides/devices.md").read_text()
    given, labels = arrays()
    specs = (WHOLE, CLASSES_CUT, CLASSES_CUT)
    given = [jax.device_put(a, NamedSharding(mesh(), spec)) for a, spec in zip(given, specs, strict=True)]
    f = ways(functions(labels, WEIGHTS)[name])[way]
    gradient = jax.grad(lambda *given: jnp.sum(f(*given)), (0, 1, 2))

    def product(*given):
        return jax.jvp(gradient, given, given)[1]

    for g, count in zip((f, gradient, product), COUNTS[name], strict=True):
        found, outside = collectives(g, *given)
        assert set(found) == {"all-reduce"}
        assert len(found) == count
        merges_by_block = (way, name) == ("shard_map", "linear_cross_entropy_sum") and g is gradient
        assert outside == (1 if merges_by_block else count)


@pytest.mark.parametrize(
    ("name", "count"), and_full([("linear_cross_entropy", 4)], [("linear_statistics", 5)])
)  # the mode is one number more
def test_one_sum_over_tokens(name, count):
    """The weight's gradient and the loss, together; over classes one maximum, two sums and, for the mode, one of
    class numbers: none of them in a loop."""
    given, labels = arrays()
    parts = (TOKENS_CUT, CLASSES_CUT, CLASSES_CUT, TOKENS_CUT, TOKENS_CUT)

    def of_part(*given):
        run = total_and_derivatives(name, psum=lambda a: jax.lax.psum(a, "t"), axis_name="v")
        return run(*given)[:2]

    f = jax.shard_map(of_part, mesh=two_dimensional(), in_specs=parts, out_specs=(WHOLE, parts[:3]))
    found, outside = collectives(f, *given, labels, WEIGHTS)
    assert set(found) == {"all-reduce"}
    assert outside == len(found) == count


def stepper(optimizer, head, gradient=lambda f: f, mean=lambda a: a, **options):
    """One step of a hidden layer with a head."""

    def objective(params, inputs, labels):
        hidden = jnp.tanh(inputs @ params["layer"])
        if head is heads.linear_cross_entropy:
            loss = head(hidden, params["weight"], labels, **options)
        else:
            found = head(hidden, params["weight"], labels, **options)
            loss = -found.log_prob - 0.1 * found.entropy
        return mean(jnp.mean(loss))

    def step(params, state, inputs, labels):
        value, by_params = gradient(jax.value_and_grad(objective))(params, inputs, labels)
        updates, state = optimizer.update(by_params, state, params)
        return optax.apply_updates(params, updates), state, value

    return evaluated(step)


@pytest.mark.parametrize(
    "head", some([heads.linear_cross_entropy, heads.linear_statistics], [heads.linear_cross_entropy])
)
def test_steps_of_training(head):
    """Gradients inside, the optimiser outside, where a norm is that of the whole gradient."""
    with jax.enable_x64(True):
        (inputs, weight, _), labels = arrays()
        specs = {"layer": WHOLE, "weight": CLASSES_CUT}
        over = {"in_specs": (specs, TOKENS_CUT, TOKENS_CUT), "out_specs": (WHOLE, specs)}
        sharded = {
            "gradient": lambda f: jax.shard_map(f, mesh=two_dimensional(), **over),
            "mean": lambda a: jax.lax.pmean(a, "t"),
            "axis_name": "v",
        }
        optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
        found = []
        for options in (sharded, {}):
            params = {"layer": jnp.eye(FEATURES) / 2, "weight": weight}
            step, state, values = stepper(optimizer, head, **options), optimizer.init(params), []
            for _ in range(3):
                params, state, value = step(params, state, inputs, labels)
                values.append(value)
            found.append((params, values))
        assert values[2] < values[0]
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize("name", some(["linear_cross_entropy", "linear_kl"], ["linear_cross_entropy"]))
def test_explicit_axes(name):
    """Inside shard_map, and by auto_axes; elsewhere an error that names both. One check for all heads."""
    with jax.enable_x64(True):
        given, labels = arrays()
        want = evaluated(functions(labels, WEIGHTS)[name])(*given)
        parts = (TOKENS_CUT, CLASSES_CUT, CLASSES_CUT, TOKENS_CUT)
        with jax.set_mesh(two_dimensional(AxisType.Explicit)):
            given = [jax.device_put(a, spec) for a, spec in zip((*given, labels), parts, strict=True)]

            def f(h, W, b, labels, **options):
                return functions(labels, WEIGHTS)[name](h, W, b, block_size=(2, 4), **options)

            inside = jax.shard_map(lambda *given: f(*given, axis_name="v"), in_specs=parts, out_specs=TOKENS_CUT)
            by_auto_axes = jax.sharding.auto_axes(lambda *given: f(*given, shards=DEVICES), out_sharding=TOKENS_CUT)
            for g in (inside, by_auto_axes):
                np.testing.assert_allclose(jax.jit(g)(*given), want, rtol=1e-12)
            for options in ({}, {"shards": DEVICES}):
                with pytest.raises(ValueError, match=r"weight.* AxisType.Explicit.*shard_map.*auto_axes"):
                    jax.jit(lambda *given, options=options: f(*given, **options))(*given)
            whole = [jax.device_put(a, WHOLE) for a in given[1:3]]
            with pytest.raises(ValueError, match=r"hidden.* AxisType.Explicit"):
                f(given[0], *whole, given[3])


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
    over = {"mesh": mesh(), "in_specs": WHOLE, "out_specs": WHOLE}
    with pytest.raises(ValueError, match="weight must be sharded over axis_name='v'"):
        jax.jit(jax.shard_map(lambda h, W: f(h, W, labels, axis_name="v"), **over))(h, W)
    of_part = {"mesh": mesh(), "in_specs": (WHOLE, PartitionSpec("v")), "out_specs": WHOLE}
    for argument, whole in (("bias", b), ("where", b > 0), ("log_weights", b), ("labels", jnp.ones((len(h), len(W))))):
        options = {"labels": labels, argument: whole}
        g = jax.shard_map(lambda h, W, o=options: f(h, W, axis_name="v", **o), **of_part)
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {argument} must have this device's classes"):
            jax.jit(g)(h, W)
    with pytest.raises(ValueError, match="got both"):
        jax.vmap(lambda h, W: f(h, W, labels, axis_name="v", shards=2), (None, 0), axis_name="v")(h, W[None])
