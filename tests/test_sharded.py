"""Functions of scores over sharded classes: they equal those of whole rows, and devices exchange a few numbers a
row."""

import functools
import inspect
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, some
from interpreter import evaluated
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from modes import reverse_over_reverse
from sharding import DEVICES, assert_close, collectives, exchanged, mesh

import jsoftmax as js
from jsoftmax import gumbel, losses, segments
from jsoftmax.gumbel._noise import gumbel as noise
from jsoftmax.sums.cpu.paths import block_length

ROWS, CLASSES = 5, 24
WHOLE, PARTS = PartitionSpec(), PartitionSpec(None, "v")
LABELS = jnp.array([0, 23, 7, 3, 12])


def of_scores():
    """Functions of z and one more array of its shape; the last two keep the classes."""
    return {
        "log_normalizer": lambda z, w, **o: js.log_normalizer(z, log_weights=w, phi=js.taylor(2), **o),
        "entropy": lambda z, w, **o: js.entropy(z, log_weights=w, phi=js.taylor(2), **o),
        "varentropy": lambda z, w, **o: js.varentropy(z, log_weights=w, **o),
        "tsallis_entropy": lambda z, w, **o: js.tsallis_entropy(z, 1.5, log_weights=w, **o),
        "renyi_entropy": lambda z, w, **o: js.renyi_entropy(z, 0.5, log_weights=w, **o),
        "kl_divergence": js.kl_divergence,
        "jensen_shannon_divergence": functools.partial(js.jensen_shannon_divergence, beta=0.3),
        "entropy_expansion": lambda z, w, **o: js.entropy_expansion(z, w, phi=js.taylor(2), **o),
        "cross_entropy": lambda z, w, **o: losses.cross_entropy(
            z, LABELS, log_weights=w, label_smoothing=0.1, z_loss=0.1, margin=0.3, ignore_label=3, **o
        ),
        "cross_entropy of distributions": lambda z, w, **o: losses.cross_entropy(z, jnp.exp(w), **o),
        "focal_cross_entropy": lambda z, w, **o: losses.focal_cross_entropy(
            z, LABELS, class_weights=jnp.exp(w[0]), **o
        ),
        "poly_cross_entropy": lambda z, w, **o: losses.poly_cross_entropy(z + w, LABELS, **o),
        "softmax": lambda z, w, **o: js.softmax(z, log_weights=w, phi=js.taylor(2), **o),
        "log_softmax": lambda z, w, **o: js.log_softmax(z, log_weights=w, **o),
    }


NAMES = list(of_scores())
KEEP = ("softmax", "log_softmax")
CORE = ("log_normalizer", "entropy", "kl_divergence", "cross_entropy", *KEEP)


def scores(classes=CLASSES):
    return tuple(jnp.asarray(a) for a in np.random.default_rng(0).normal(size=(2, ROWS, classes)))


def in_shard_map(f, out=WHOLE, **options):
    return jax.shard_map(f, mesh=mesh(), in_specs=PARTS, out_specs=out, **options)


def ways(name):
    """The function of whole arrays, computed in parts."""
    f, keeps = of_scores()[name], name in KEEP

    def of_part(z, w):
        return f(z, w, axis_name="v")

    def mapped(z, w):
        parts = [jnp.moveaxis(a.reshape(ROWS, DEVICES, -1), 1, 0) for a in (z, w)]
        result = jax.vmap(of_part, 0, 1 if keeps else None, axis_name="v")(*parts)
        return result.reshape(ROWS, -1) if keeps else result

    out = PARTS if keeps else WHOLE
    return {
        "shard_map": in_shard_map(of_part, out),
        "shard_map without check_vma": in_shard_map(of_part, out, check_vma=False),
        "vmap": mapped,
    }


def derivatives(f, *, all_modes):
    """Value, forward mode, gradient and Hessian product; and reverse over reverse."""

    def run(*given):
        dots = tuple(jnp.cos(a) for a in given)
        gradient = jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given))), (0, 1))
        found = jax.jvp(f, given, dots), jax.jvp(gradient, given, dots)
        if not all_modes:
            return found
        return *found, reverse_over_reverse(gradient, (0, 1))(*given)

    return evaluated(run)


WAYS = ("shard_map", "shard_map without check_vma", "vmap")
ALIKE = (
    *("tsallis_entropy", "varentropy", "log_softmax"),
    *("focal_cross_entropy", "poly_cross_entropy", "cross_entropy of distributions"),
)
MAPPED = and_full(
    [(name, WAYS[:1]) for name in NAMES if name not in ALIKE],
    [(name, WAYS[:1]) for name in NAMES],
    [(name, WAYS[1:]) for name in CORE],
)
"""By default every function but those that make the same sums as another: tsallis_entropy those of renyi_entropy,
varentropy those of entropy, log_softmax those of log_normalizer, and the other losses, which are functions of −log p,
those of cross_entropy."""


@pytest.mark.parametrize(("name", "by"), MAPPED, ids=lambda a: a[0] if isinstance(a, tuple) else a)
def test_parts_equal_the_whole(name, by):
    with jax.enable_x64(True):
        given = scores()
        want = derivatives(of_scores()[name], all_modes=name in CORE)(*given)
        for way in by:
            found = derivatives(ways(name)[way], all_modes=name in CORE and way == "shard_map")(*given)
            assert_close(found, want[: len(found)], 1e-11)


@pytest.mark.parametrize("name", some([name for name in CORE if name not in KEEP], ["cross_entropy"]))
def test_differentiated_inside(name):
    """Gradients and Hessian products taken inside, by each device: right with check_vma; without it, those of the sum
    of the devices' losses."""
    with jax.enable_x64(True):
        given = scores()
        f = of_scores()[name]

        def of_part(z, w, **options):
            gradient = jax.grad(lambda z: jnp.sum(jnp.sin(f(z, w, **options))))
            return jax.jvp(gradient, (z,), (w,))

        want = evaluated(of_part)(*given)
        of_part = functools.partial(of_part, axis_name="v")
        assert_close(evaluated(in_shard_map(of_part, PARTS))(*given), want, 1e-11)
        gradient, _ = evaluated(in_shard_map(of_part, PARTS, check_vma=False))(*given)
        assert_close(gradient, DEVICES * want[0], 1e-11)


COUNTS = {  # value, gradient, Hessian product, as in docs/guides/devices.md
    "log_normalizer": (js.log_normalizer, 2, 2, 2),
    "softmax": (js.softmax, 2, 3, 3),
    "log_softmax": (js.log_softmax, 2, 2, 2),
    "entropy": (js.entropy, 2, 2, 3),
    "kl_divergence": (lambda z, **o: js.kl_divergence(z, jnp.sin(z), **o), 3, 3, 3),
    "jensen_shannon_divergence": (lambda z, **o: js.jensen_shannon_divergence(z, jnp.sin(z), **o), 3, 3, 3),
    "cross_entropy": (lambda z, **o: losses.cross_entropy(z, LABELS, **o), 2, 2, 3),
}


def of_each_order(f):
    """Value, gradient and Hessian product."""

    def gradient(z):
        value, pull = jax.vjp(f, z)
        return pull(jnp.cos(z) if value.shape == z.shape else jnp.ones_like(value))[0]

    return f, gradient, lambda z: jax.jvp(gradient, (z,), (z,))[1]


def sharded_scores(classes=CLASSES):
    return jax.device_put(scores(classes)[0], NamedSharding(mesh(), PARTS))


def test_guide_names_every_function():
    """docs/guides/devices.md names each function that takes axis_name, and heads.linear_* are those of the heads."""
    guide = (pathlib.Path(__file__).parent.parent / "docs/guides/devices.md").read_text()
    rooms = {"": js, "losses.": losses, "gumbel.": gumbel, "attention.": js.attention, "heads.": js.heads}
    public = {prefix + name: getattr(room, name) for prefix, room in rooms.items() for name in room.__all__}
    functions = {name for name, f in public.items() if inspect.isfunction(f)}
    sharded = {name for name in functions if "axis_name" in inspect.signature(public[name]).parameters}
    streaming = {name for name in sharded if name.startswith("heads.")}
    assert streaming == {name for name in functions if name.startswith("heads.linear_")}
    assert sharded - streaming == {name for name in functions - streaming if f"`{name}`" in guide}


@pytest.mark.parametrize("name", some(COUNTS, ["softmax", "kl_divergence", "cross_entropy"]))
def test_collectives(name):
    """One maximum and one sum, and never a gather: as many as docs/guides/devices.md says. By default one of each kind
    of result and argument."""
    function, *counts = COUNTS[name]
    guide = (pathlib.Path(__file__).parent.parent / "docs/guides/devices.md").read_text()
    listed = " | ".join(map(str, counts))
    assert re.search(rf"^\|[^|]*`(losses\.)?{name}`[^|]*\| {re.escape(listed)} \|$", guide, re.M)
    f = in_shard_map(lambda z: function(z, axis_name="v"), PARTS if name in KEEP else WHOLE)
    for g, count in zip(of_each_order(f), counts, strict=True):
        assert collectives(g, sharded_scores())[0] == ["all-reduce"] * count


PLAIN = and_full(
    [("softmax", 1000), ("cross_entropy", CLASSES)],
    itertools.product(COUNTS, [CLASSES, 1000]),
)
"""By default one with a result of many numbers, in blocks, and one of labels."""


@pytest.mark.parametrize(("name", "classes"), PLAIN)
def test_plain_jit(name, classes):
    """Numbers of rows are summed, and at most one block of each; never a gather."""
    length = block_length(classes)
    for g in of_each_order(COUNTS[name][0]):
        for kind, longest in exchanged(g, sharded_scores(classes)):
            assert kind == "all-reduce"
            assert longest in (ROWS, ROWS * length)


def test_blocks_fit_devices():
    """The numbers of classes that docs/guides/devices.md names: each of 8 devices has whole blocks, or not."""
    fits = {classes: classes % (8 * block_length(classes)) == 0 for classes in (1000, 32000, 50304, 151936, 50264)}
    assert fits == {1000: True, 32000: True, 50304: True, 151936: True, 50264: False}


KEY = jax.random.key(0)
DRAWS = {  # and at most how many numbers a row are exchanged at once, of 8 · 1999 = 15992 classes or 32768
    "one": (lambda z: gumbel.categorical(KEY, z), 2100),
    "few": (lambda z: gumbel.categorical(KEY, z, shape=(100, len(z))), 2100),
    "many": (lambda z: gumbel.categorical(KEY, z, shape=(3000, len(z))), 3000),
    "distinct": (lambda z: gumbel.categorical(KEY, z, shape=(2, len(z)), replace=False), 4000),
    "top_k": (lambda z: gumbel.gumbel_top_k(KEY, z, 2).perturbed, 6000),
    "gradient": (jax.grad(lambda z: jnp.sum(gumbel.gumbel_top_k(KEY, z, 2).perturbed)), 6000),
}


OF_DRAWS = and_full([("few", 15992), ("distinct", 15992)], itertools.product(DRAWS, [15992, 32768]))
"""By default the draws by numbers of classes and those by noise; derivatives, in shard_map, are in `test_top_k`."""


@pytest.mark.parametrize(("name", "classes"), OF_DRAWS)
def test_draws_by_plain_jit(name, classes):
    """Draws are those of one device, except for the rounding of p. A number a draw, or a few blocks, are exchanged; no
    rows."""
    (draw, limit), z = DRAWS[name], sharded_scores(classes)
    found, want = (np.asarray(evaluated(draw)(a)) for a in (z, np.asarray(z)))
    assert np.mean(np.abs(found - want) > 1e-5) < 1e-3
    assert max(longest for _, longest in exchanged(draw, z)) <= ROWS * limit


def test_many_classes():
    """Classes that are summed in blocks, on each device."""
    z, w = scores(DEVICES * 700)
    f = in_shard_map(lambda z, w: js.kl_divergence(z, w, axis_name="v") + js.entropy(z, axis_name="v"))
    want = evaluated(lambda z, w: js.kl_divergence(z, w) + js.entropy(z))(z, w)
    np.testing.assert_allclose(evaluated(f)(z, w), want, rtol=1e-6)
    z = jax.device_put(z, NamedSharding(mesh(), PARTS))
    f = in_shard_map(lambda z: js.log_normalizer(z, axis_name="v"))
    assert collectives(jax.grad(lambda z: jnp.sum(f(z))), z)[0] == ["all-reduce"] * 2


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_two_axes(names):
    """The first name counts slowest, as in a PartitionSpec."""
    f = jax.shard_map(
        lambda z: losses.cross_entropy(z, LABELS, axis_name=names),
        mesh=jax.make_mesh((2, DEVICES // 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2),
        in_specs=PartitionSpec(None, names),
        out_specs=WHOLE,
    )
    z, _ = scores()
    np.testing.assert_allclose(evaluated(f)(z), losses.cross_entropy(z, LABELS), rtol=1e-6)


def test_edges():
    """Empty shards and rows, bad scores in one shard, small results, labels that are out of range or left out."""
    z = jnp.zeros((7, 8)).at[1:3].set(-jnp.inf).at[2, 3].set(0).at[3, 7].set(jnp.nan).at[4, 1].set(jnp.inf)
    z = z.at[5].set(jnp.array([-20.0, 0, -21, -30, -40, -20, -20, -20])).at[6, 5].set(-jnp.inf)
    labels = jnp.array([8, 0, 3, 0, 0, 1, 5])
    functions = (
        js.softmax,
        js.log_softmax,
        js.log_normalizer,
        js.entropy,
        js.varentropy,
        lambda z, **o: js.kl_divergence(z, jnp.roll(z, 1, 0), **o),
        lambda z, **o: js.jensen_shannon_divergence(z, jnp.roll(z, 1, 0), **o),
        lambda z, **o: losses.cross_entropy(z, labels, **o),
    )

    def in_parts(f):
        return in_shard_map(lambda z: f(z, axis_name="v"), PARTS if f(z).ndim == 2 else WHOLE)

    def with_gradient(f, z):
        value, pull = jax.vjp(f, z)
        return value, pull(jnp.cos(jnp.arange(value.size)).reshape(value.shape))[0]

    wanted = evaluated(lambda z: [with_gradient(f, z) for f in functions])(z)
    found = evaluated(lambda z: [with_gradient(in_parts(f), z) for f in functions])(z)
    for (value, gradient), (want, plain) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(gradient, plain, rtol=1e-5, atol=1e-7)


def test_draws():
    """With replacement, draws are those of the whole row, though one shard and one row are empty."""
    key, z = jax.random.key(1), jnp.linspace(-2, 2, 6 * 16).reshape(6, 16).at[2].set(-jnp.inf).at[3, 9].set(jnp.nan)
    z = z.at[:, 4:8].set(-jnp.inf)
    whole = evaluated(lambda z: gumbel.categorical(key, z, shape=(50, 6)))
    want = whole(z)

    def draw(z, **options):
        return gumbel.categorical(key, z, axis_name="v", **options)

    np.testing.assert_array_equal(evaluated(in_shard_map(lambda z: draw(z, shape=(50, 6))))(z), want)
    np.testing.assert_array_equal(
        whole(jax.device_put(z, NamedSharding(mesh(), PARTS))),
        want,
    )
    assert len(np.unique(np.asarray(want[:, 0]) // 4)) == 3
    parts = jnp.moveaxis(z.reshape(6, DEVICES, 4), 1, 0)
    mapped = jax.vmap(lambda z: draw(z, shape=(50, 6)), out_axes=None, axis_name="v")
    np.testing.assert_array_equal(evaluated(mapped)(parts), want)
    distinct = evaluated(in_shard_map(lambda z: draw(z, shape=(13, 6), replace=False)))(z)
    assert all(set(np.asarray(distinct[:, i])) == {-1, *range(4), *range(8, 16)} for i in (0, 1, 4, 5))
    np.testing.assert_array_equal(distinct[:, 2:4], -1)


@pytest.mark.parametrize("k", some([3, 16], [16]))
def test_top_k(k):
    """The k largest of log p + g, g of each shard's own; also more than a shard has. Values and derivatives. By default
    of all classes: fewer are the first of these, and the threshold is the next one."""
    key, z = jax.random.key(2), jax.random.normal(jax.random.key(3), (ROWS, 16))
    g = jnp.concatenate([noise(jax.random.fold_in(key, i), (ROWS, 16 // DEVICES), z.dtype) for i in range(DEVICES)], -1)

    def whole(z):
        best, index = jax.lax.top_k(js.log_softmax(z) + g, 16)
        threshold = best[:, k] if k < 16 else jnp.full(ROWS, -jnp.inf)
        return gumbel.TopK(index[:, :k], best[:, :k], threshold)

    def sample(z):
        return gumbel.gumbel_top_k(key, z, k, axis_name="v")

    found, want = evaluated(in_shard_map(sample))(z), evaluated(whole)(z)
    np.testing.assert_array_equal(found.indices, want.indices)
    np.testing.assert_allclose(found.perturbed, want.perturbed, rtol=1e-5)
    np.testing.assert_allclose(found.threshold, want.threshold, rtol=1e-5)

    def gradient(f):
        return evaluated(jax.grad(lambda z: jnp.sum(jnp.sin(f(z).perturbed) * jnp.arange(1.0, k + 1))))(z)

    for options in ({}, {"check_vma": False}):
        np.testing.assert_allclose(gradient(in_shard_map(sample, **options)), gradient(whole), rtol=1e-4, atol=1e-5)


def test_nan_beside_empty_parts():
    """XLA's maximum over devices may lose a NaN; the row that has it is NaN all the same."""
    z = jnp.full((16, 16), -jnp.inf).at[jnp.arange(16), jnp.arange(16)].set(jnp.nan)
    for f, out in ((js.log_normalizer, WHOLE), (js.entropy, WHOLE), (js.softmax, PARTS), (js.log_softmax, PARTS)):
        sharded = jax.shard_map(functools.partial(f, axis_name="v"), mesh=mesh(), in_specs=PARTS, out_specs=out)
        assert np.all(np.isnan(jax.jit(sharded)(z)))
        assert np.all(np.isnan(jax.jit(f)(jax.device_put(z, NamedSharding(mesh(), PARTS)))))


EXPLICIT = and_full(
    [("cross_entropy", 8), ("entropy", 4500)],
    [(name, CLASSES) for name in NAMES],
    covering(CORE, [8, 1000], met=[(0, 1)]),
)
"""By default a loss of few classes, and an entropy of blocks that leave a tail. Other functions are met in explicit
mode below, or make the same sums."""


@pytest.mark.parametrize(("name", "classes"), EXPLICIT)
def test_explicit_mode(name, classes):
    """On axes whose sharding is part of an array's type: few classes, one sum, blocks, and blocks that leave a tail."""
    explicit, f = mesh(AxisType.Explicit), of_scores()[name]
    gradient = evaluated(jax.grad(lambda z, w: jnp.sum(jnp.sin(f(z, w)))))
    want = gradient(*scores(classes))
    given = (jax.device_put(a, NamedSharding(explicit, PARTS)) for a in scores(classes))
    with jax.set_mesh(explicit):
        np.testing.assert_allclose(gradient(*given), want, rtol=1e-4, atol=1e-6)


OF_ROWS = and_full([("classes", CLASSES)], [("rows", 1000)])
"""By default classes, in which sums are made; gradients in `test_explicit_mode`. Rows that are cut are below."""


@pytest.mark.parametrize(("cut", "classes"), OF_ROWS)
def test_rows_in_explicit_mode(cut, classes):
    """Results are sharded as their rows are; draws are those of one device, with the key from outside."""
    spec = {"classes": PARTS, "rows": PartitionSpec("v")}[cut]
    explicit, z, labels = mesh(AxisType.Explicit), scores(classes)[0][:DEVICES], LABELS[:DEVICES]
    weights = jnp.cos(jnp.arange(classes))
    rows = PartitionSpec(*spec[:1])
    functions = (
        lambda z, labels, key: js.entropy(z),
        lambda z, labels, key: losses.cross_entropy(z, labels, class_weights=weights),
        lambda z, labels, key: losses.cross_entropy(z, jnp.exp(weights) * jnp.ones(z.shape)),
        lambda z, labels, key: gumbel.categorical(key, z),
        lambda z, labels, key: gumbel.gumbel_top_k(key, z, 2).indices,
        lambda z, labels, key: losses.plackett_luce_log_prob(z, jnp.stack([labels, (labels + 1) % classes], -1)),
    )

    def every(*given):
        return [f(*given) for f in functions]

    wanted = evaluated(every)(z, labels, jax.random.key(0))
    given = [jax.device_put(a, NamedSharding(explicit, s)) for a, s in ((z, spec), (labels, rows))]
    with jax.set_mesh(explicit):
        key = jax.random.key(0)
        for results in (every(*given, key), evaluated(every)(*given, key)):
            for found, want in zip(results, wanted, strict=True):
                np.testing.assert_allclose(found, want, rtol=1e-5)
                assert jax.typeof(found).sharding.spec[0] == (rows[0] if rows else None)
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="cross_entropy: logits must not be sharded over"):
        losses.cross_entropy(given[0], jnp.array(3), axis=None)
    with jax.set_mesh(explicit), pytest.raises(ValueError, match="segment_softmax: z must not be sharded over"):
        segments.segment_softmax(given[0], jnp.arange(len(z)), len(z))


def test_sparse_maps_and_truncation_of_rows_in_explicit_mode():
    explicit, z, labels = mesh(AxisType.Explicit), scores(CLASSES)[0][:DEVICES], LABELS[:DEVICES]

    def found(z, labels):
        gradient = jax.grad(lambda z: jnp.sum(js.fenchel_young_loss(z, labels)))(z)
        cut = js.truncate(z, top_k=3, top_p=0.9, min_p=0.01)
        return js.entmax(z, 1.7, sink=0.5), js.sparsemax(z, sink=jnp.ones((DEVICES, 1))), gradient, cut

    want = evaluated(found)(z, labels)
    rows = NamedSharding(explicit, PartitionSpec("v"))
    with jax.set_mesh(explicit):
        got = evaluated(found)(jax.device_put(z, rows), jax.device_put(labels, rows))
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
            assert jax.typeof(one).sharding.spec[0] == "v"


@pytest.mark.parametrize("draw", [gumbel.categorical, lambda key, z, **o: gumbel.gumbel_top_k(key, z, 2, **o).indices])
def test_keys_that_differ(draw):
    """A key with the device's number in it would draw classes that do not exist."""

    def of_part(z):
        return draw(jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("v")), z, axis_name="v")

    with pytest.raises(ValueError, match="key must be the same on all devices"):
        jax.jit(in_shard_map(of_part))(scores()[0])


def test_wrong_calls():
    z = np.zeros((2, 8), np.float32)

    def trace(f):
        jax.eval_shape(in_shard_map(f), z)

    with pytest.raises(TypeError, match="entropy: axis_name must be None"):
        js.entropy(z, axis_name=("v", "v"))
    with pytest.raises(ValueError, match="softmax: axis_name must be bound"):
        js.softmax(z, axis_name="v")
    with pytest.raises(TypeError, match="entropy: axis_name must be None"):
        js.entropy(z, axis_name=())
    for shape in ((2, 8), (8,)):
        for argument in ({"where": jnp.ones(shape, bool)}, {"log_weights": jnp.ones(shape)}):
            for f in (js.entropy, lambda z, **o: losses.cross_entropy(z, jnp.zeros(2, int), **o)):
                if f is not js.entropy and shape == (8,) and "where" in argument:
                    continue  # a mask of rows, and a wrong one
                with pytest.raises(ValueError, match=f"{next(iter(argument))} must have this device's classes, 2"):
                    trace(lambda z, a=argument, f=f: f(z, axis_name="v", **a))
    gathered = functools.partial(jax.lax.all_gather, axis_name="v", axis=1, tiled=True)
    with pytest.raises(ValueError, match="kl_divergence: z_q must have this device's classes, 2"):
        trace(lambda z: js.kl_divergence(z, gathered(z), axis_name="v"))
    with pytest.raises(ValueError, match="the same on all devices along axis_name='v': leave it out of their in_specs"):
        trace(lambda z: losses.cross_entropy(jnp.ones((8, 2)) * z[:1], jnp.zeros(2, int), axis_name="v"))
    for labels, option in ((jnp.ones((2, 8)), "labels"), (jnp.zeros(2, int), "class_weights")):
        options = {} if option == "labels" else {option: jnp.ones(8)}
        with pytest.raises(ValueError, match=f"cross_entropy: {option} must have this device's classes, 2"):
            trace(lambda z, y=labels, o=options: losses.cross_entropy(z, y, axis_name="v", **o))
    with pytest.raises(ValueError, match=r"got 'w'; jax\.shard_map has bound 'v' here"):
        trace(lambda z: js.entropy(z, axis_name="w"))
    replicated = jax.shard_map(
        lambda z: losses.cross_entropy(z, jnp.zeros(2, int), axis_name="v"),
        mesh=mesh(),
        in_specs=WHOLE,
        out_specs=WHOLE,
    )
    with pytest.raises(ValueError, match="cross_entropy: logits must be sharded over axis_name='v'"):
        jax.jit(replicated)(z)
    with pytest.raises(ValueError, match="categorical: mode must be None with axis_name"):
        jax.vmap(lambda z: gumbel.categorical(jax.random.key(0), z, mode="low", axis_name="v"), axis_name="v")(z)
