"""The forms for CPU equal the reference, function by function and through everything built on them."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, named, some
from compilation import jit_as_user
from interpreter import evaluated
from platforms import as_on_accelerators, traced_anew

import jsoftmax as js
from jsoftmax import losses, maps, sums
from jsoftmax.sums import cpu, long_rows, reference
from jsoftmax.sums.cpu import paths
from jsoftmax.verify import DERIVATIVES, FUNCTIONS, LOSSES

ROWS = {
    "short": (7, 5),
    "17": (7, 17),
    "many": (4200, 60),
    "300": (7, 300),
    "many of 300": (4200, 300),
    "long": (5, 4500),
}
"""Shapes with forms of their own: slices, one kernel of many rows, blocks, blocks with a tail."""


def scores(shape, dtype=np.float32):
    """Rows of every kind: spread, one-hot, tied, with classes left out, one class, none, +∞, NaN."""
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, shape)
    z[1, 1] += 25
    z[2] = 0
    z[3, 1:] = np.where(np.arange(1, shape[1]) % 3 == 0, -np.inf, z[3, 1:])
    if len(z) > 5:
        z[4, 1:] = -np.inf
        z[5] = -np.inf
    if len(z) > 100:
        z[70, 2], z[71, 0], z[72, -1] = np.inf, np.nan, np.nan
    return z.astype(dtype)


def same(got, want, ulps=64):
    """Asserts equality within some ulp of the larger of 1 and each number, with infinities and NaN in the same
    places."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        eps = float(jnp.finfo(b.dtype).eps)
        np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=ulps * eps, atol=ulps * eps)


EACH = and_full(
    [("short", 0, "float32"), ("many of 300", 1, "float64"), ("long", 2, "float32")],
    covering(ROWS, [0, 1, 2], ["float32", "float64"]),
)
"""By default a kind of rows of each form, each order, each dtype. They meet below and in test_producers.py; in the gate
every two of them here, too."""


@pytest.mark.parametrize(("kind", "order", "dtype"), EACH)
def test_each_function_equals_the_reference(kind, order, dtype):
    shape, axis = ROWS[kind], (1,)
    with jax.enable_x64(dtype == "float64"):
        x = scores(shape, dtype)
        peak = np.max(np.where(np.isneginf(x), np.finfo(dtype).min, x), 1, keepdims=True)
        fine = np.isfinite(np.sum(x, 1, where=~np.isneginf(x)))  # all of a bad row need not be NaN, if one number is
        n, (want_c, want_H), want_sums = evaluated(
            lambda x: (
                reference.normalized(x, axis=axis),
                reference.centred(x, axis=axis),
                reference.exp_sums(x, row_sums=None, axis=axis),
            )
        )(x)
        for want, names in {"all": n._fields, "p": ("p",), "log_p": ("log_p",), "L": ("log_normalizer",)}.items():
            got = jit_as_user(functools.partial(cpu.normalized, axis=axis, axis_name=None, want=want, order=order))(x)
            same([getattr(got, name) for name in names], [getattr(n, name) for name in names])
        c, H = jit_as_user(functools.partial(cpu.centred, axis=axis, axis_name=None, want="H", order=order))(x)
        same((np.asarray(c)[fine], H), (np.asarray(want_c)[fine], want_H))
        got = jit_as_user(functools.partial(cpu.exp_sums, row_sums=None, axis=axis, axis_name=None, order=order))(x)
        same([got.rest, np.asarray(got.peak)[fine]], [want_sums.rest, np.asarray(want_sums.peak)[fine]])
        label = np.arange(shape[0])[:, None] % (shape[1] + 2) - 1  # some are on another shard
        inside, own = (label >= 0) & (label < shape[1]), np.clip(label, 0, shape[1] - 1)
        is_label = (np.arange(shape[1]) == own) & inside
        x_dot, p = np.cos(np.where(np.isfinite(x), x, 0)), np.asarray(n.p)
        kept, p_y = ~np.isneginf(x), np.where(inside, np.take_along_axis(p, own, 1), 0).astype(dtype)
        peak, inside, own, is_label = map(jnp.asarray, (peak, inside, own, is_label))

        def by_cpu(x, p, x_dot, kept, p_y):
            of_all = (
                cpu.p_rate(x, p, x_dot, axis, None, "p", order),
                cpu.centred_rate(x, p, x_dot, axis, None),
                cpu.weighted_deviations(p**2, x_dot, axis),
                cpu.label_rates(p, kept, p_y, p_y - 1, x_dot, own, inside),
            )
            return of_all, (cpu.gap_sum(x, peak, axis), cpu.log_p_rate(x, p, x_dot, axis, None, order))

        def by_reference(x, p, x_dot, kept, p_y):
            of_all = (
                reference.p_rate(x, p, x_dot, axis),
                reference.centred_rate(x, p, x_dot, axis),
                reference.weighted_deviations(p**2, x_dot, axis),
                reference.label_rates(p, kept, p_y - 1, x_dot, is_label),
            )
            return of_all, (reference.gap_sum(x, peak, axis), reference.log_p_rate(x, p, x_dot, axis))

        given = (x, p, x_dot, kept, p_y)
        (got, of_fine), (want, want_of_fine) = jit_as_user(by_cpu)(*given), evaluated(by_reference)(*given)
        same(got, want)
        same(*(jax.tree.map(lambda a: np.asarray(a)[fine], part) for part in (of_fine, want_of_fine)))


def tangents(f, x, axis):
    """A rule's value and transpose, and the derivative of both along x."""
    x_dot, g = (jnp.where(jnp.isfinite(x), h(x), 1) for h in (jnp.cos, lambda x: jnp.sin(3 * x)))

    def both(x):
        value, pull = jax.vjp(lambda x_dot: f(x, x_dot, axis), x_dot)
        return value, pull(g)[0]

    return jax.jvp(both, (x,), (jnp.where(jnp.isfinite(x), jnp.cos(2 * x), 0),))


def of_reference(name, in_one_sum=False):
    """A rule of the reference, with p as many scores or as few compute it."""
    rule = getattr(reference, name)

    def of_scores(x, x_dot, axis):
        p = reference.probabilities(x, axis) if in_one_sum else maps.normalize(x, axis).p
        return rule(x, p, x_dot, axis)

    return of_scores


@pytest.mark.parametrize("name", ["p_rate", "log_p_rate", "centred_rate"])
@pytest.mark.parametrize("dtype", some(["float32", "float64"], ["float32"]))
def test_long_rows_equal_the_reference(name, dtype):
    """Also in rows without classes; +∞ and NaN make them NaN."""
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(scores((80, 17), dtype))
        got, want = (
            jit(functools.partial(tangents, rule, axis=(1,)))(x)
            for jit, rule in ((jit_as_user, getattr(long_rows, name)), (evaluated, of_reference(name)))
        )
        same(got, want)


@pytest.mark.parametrize("dtype", some(["float32", "float64"], ["float32"]))
def test_p_in_one_sum(dtype):
    """What GPUs and TPUs run for many scores, in values and in the rules, equals what small arrays run."""
    with jax.enable_x64(dtype == "float64"):
        x, axis = jnp.asarray(scores((80, 17), dtype)), (1,)

        def results(x, in_one_sum):
            rules = [of_reference(name, in_one_sum) for name in ("p_rate", "log_p_rate", "centred_rate")]
            p = reference.normalized(x, axis, in_one_sum=in_one_sum).p
            return p, [tangents(rule, x, axis) for rule in rules]

        got, want = (
            jit(functools.partial(results, in_one_sum=one_sum))(x)
            for jit, one_sum in ((jit_as_user, True), (evaluated, False))
        )
        same(got, want)


@pytest.mark.parametrize("dtype", some(["float32", "float64"], ["float32"]))
def test_long_rows_whose_maximum_is_0(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(scores((120, 17), dtype))
        peak = jnp.max(x, 1, keepdims=True)
        x = x - jnp.where(jnp.isfinite(peak), peak, 0)
        got = jit_as_user(functools.partial(long_rows.normalized_of_shifted, axis=(1,)))(x)
        want = evaluated(functools.partial(reference.normalized, axis=(1,)))(x)
        same((got[:2], got[2][:70]), (want[:2], want[2][:70]))  # L of a row with +∞ is NaN, for its maximum is not 0


@pytest.mark.parametrize("name", ["p_rate", "log_p_rate"])
def test_digits_of_long_rows_beside_a_sure_class(name):
    """Rates where a class is 8 to 60 above the others, to some ulp of the row's typical number, not of 1."""
    z = np.random.default_rng(3).normal(0, 1, (14, 9)).astype(np.float32)
    z[:, 4] += np.arange(8, 64, 4, dtype=np.float32)
    got = jit_as_user(functools.partial(tangents, getattr(long_rows, name), axis=(1,)))(jnp.asarray(z))
    with jax.enable_x64(True):
        wide = jnp.asarray(z, np.float64)
        want = jax.jit(functools.partial(tangents, of_reference(name), axis=(1,)))(wide)
    assert_digits_of_rows(got, want)


def assert_digits_of_rows(got, want):
    for leaf, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        exact = np.float64(wanted)
        typical = np.median(np.abs(exact), 1, keepdims=True) + np.abs(exact)
        assert np.all(np.abs(np.float64(leaf) - exact) <= 4e-5 * typical)


@pytest.mark.parametrize("label", [4, 2], ids=["right", "wrong"])
def test_digits_of_long_rows_of_losses(label, monkeypatch):
    """Gradient and Hessian product of cross-entropy as GPUs compute them, beside a class that is 8 to 60 above."""
    z = np.random.default_rng(3).normal(0, 1, (14, 9)).astype(np.float32)
    z[:, 4] += np.arange(8, 64, 4, dtype=np.float32)
    labels = np.full(14, label, np.int32)

    def derivatives(z):
        return jax.jvp(jax.grad(lambda z: jnp.sum(losses.cross_entropy(z, labels))), (z,), (jnp.cos(z),))

    with jax.enable_x64(True):
        want = jax.jit(derivatives)(jnp.asarray(z, np.float64))
    with monkeypatch.context() as patch, as_on_accelerators():
        patch.setattr(paths, "LARGE", 0)
        patch.setattr(sums, "_ROW_KERNEL_CLASSES", 1)
        got = jit_as_user(derivatives)(jnp.asarray(z))
    assert_digits_of_rows(got, want)


def everything(function, z):
    """Value, gradient and Hessian product; a second array of scores is made of the first."""
    of_rows = function.with_rows(len(z))

    def total(z):
        value = of_rows.ours(z, *[z[:, ::-1] / 2] * (function.scores - 1))
        weights = jnp.cos(jnp.arange(1.0, 1 + value.size // len(value))).reshape(value.shape[1:]).astype(value.dtype)
        return jnp.sum(jnp.where(jnp.isneginf(value), 0, weights * value)), value

    def made(z):
        return total(1.5 * z)

    gradient, product, value = jax.jvp(jax.grad(made, has_aux=True), (z,), (jnp.cos(z),), has_aux=True)
    return value, gradient, product


OF_ORDERS = [f for f in (*FUNCTIONS, *DERIVATIVES, *LOSSES) if f.orders > 1]
SHAPES = [(6, 5), (6, 17), (6, 300)]
FEW = ("entropy", "kl_divergence", "cross_entropy", "log_prob")
"""Together they call every sum, some through softmax and log_softmax."""
DTYPES = ["float32", "bfloat16"]
CELLS = and_full(
    covering(named(OF_ORDERS, FEW), DTYPES, SHAPES, met=[(0, 1), (0, 2), (1, 2)]),
    covering(named(OF_ORDERS, FEW), DTYPES, SHAPES),
    covering(OF_ORDERS, DTYPES, SHAPES, met=[(0, 2)]),
)
"""In the gate each function in each dtype, and each of the few in each shape."""


@pytest.mark.parametrize(
    ("function", "dtype", "shape"),
    CELLS,
    ids=str,
)
def test_every_function_by_every_form(function, dtype, shape, monkeypatch):
    """Few scores, many on CPU, many in short and in long rows elsewhere; made in the same program, compiled for CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with jax.default_device(jax.devices("cpu")[0]):
        _by_every_form(function, dtype, [shape], monkeypatch)


def _by_every_form(function, dtype, shapes, monkeypatch):
    z = [jnp.asarray(np.random.default_rng(1).normal(0, 2, shape), dtype) for shape in shapes]
    found = []
    for large, on_cpu, row_kernel in ((2**60, True, 2**60), (0, True, 2**60), (0, False, 2**60), (0, False, 1)):
        with monkeypatch.context() as patch, traced_anew() if on_cpu else as_on_accelerators():
            patch.setattr(paths, "LARGE", large)
            patch.setattr(paths, "SHORT", paths.SHORT if large == 0 else 2**60)
            patch.setattr(sums, "_ROW_KERNEL_CLASSES", row_kernel)
            jit = jit_as_user if large == 0 and on_cpu else evaluated  # the others are what it is compared with
            found.append([jit(functools.partial(everything, function))(a) for a in z])
            assert {sums.explain(shape).split(":")[0] for shape in shapes} == {["reference", "cpu"][large == 0]}
    wanted, *others = map(jax.tree.leaves, found)
    for got, want in [pair for other in others for pair in zip(other, wanted, strict=True)]:
        scale = float(jnp.max(jnp.abs(want)))
        tolerance = 2 * float(jnp.finfo(got.dtype).eps) if got.dtype == jnp.bfloat16 else 2e-5
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=tolerance, atol=tolerance * scale)


READ_TWICE = {f.__name__: f for f in (js.softmax, js.log_softmax, js.entropy, js.varentropy)}
READ_TWICE["tsallis_entropy"] = functools.partial(js.tsallis_entropy, alpha=1.5)
READ_TWICE |= {
    f.__name__: lambda z, f=f, **options: f(z, z[..., ::-1] / 2, **options)
    for f in (js.kl_divergence, js.jensen_shannon_divergence)
}


FEW_READ_TWICE = ["softmax", "entropy", "jensen_shannon_divergence"]
"""The others compute ψ and their sums again by the same steps."""


@pytest.mark.parametrize("name", some(READ_TWICE, FEW_READ_TWICE))
def test_rules_that_read_the_scores_again(name, monkeypatch):
    """On GPUs a rule computes ψ and the sums again: it has the derivatives of the value, with weights and a mask, in a
    row without classes and in a scan too."""
    function, rng = READ_TWICE[name], np.random.default_rng(5)
    z, log_weights = (jnp.asarray(rng.normal(0, 2, shape), np.float32) for shape in ((6, 17), (17,)))
    where = (jnp.arange(17) % 5 > 0) & (jnp.arange(6)[:, None] != 2)

    def total(z, log_weights):
        value = function(1.5 * z, phi=js.taylor(2), where=where, log_weights=log_weights)
        return jnp.sum(jnp.where(jnp.isneginf(value), 0, jnp.cos(jnp.arange(value.size)).reshape(value.shape) * value))

    def found(z, log_weights):
        of_both = jax.value_and_grad(total, (0, 1))
        whole = jax.jvp(of_both, (z, log_weights), (jnp.cos(z), jnp.sin(log_weights)))
        parts = jax.lax.scan(lambda none, z: (none, jax.jvp(of_both, (z, log_weights), (z, z[0]))), None, z[None])[1]
        return whole, parts

    wanted = jax.jit(found)(z, log_weights)
    with monkeypatch.context() as patch, as_on_accelerators():
        patch.setattr(paths, "LARGE", 0)
        got = jax.jit(found)(z, log_weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.max(np.abs(b)))


def test_divergence_of_a_row_without_classes_on_a_gpu(monkeypatch):
    """Where p has no class, D and its derivatives are 0, though q has classes; a row with a NaN is NaN."""
    z_p = jnp.array([[-jnp.inf] * 3, [0.0, 1.0, -jnp.inf], [-jnp.inf, -jnp.inf, jnp.nan]])
    with monkeypatch.context() as patch, as_on_accelerators():
        patch.setattr(paths, "LARGE", 0)
        D, pullback = jax.vjp(js.kl_divergence, z_p, jnp.zeros((3, 3)))
        derivatives = pullback(jnp.ones(3))
    np.testing.assert_allclose(D[:2], [0, js.kl_divergence(z_p[1], jnp.zeros(3))], rtol=1e-6)
    assert jnp.isnan(D[2])
    assert not any(a[0].any() for a in derivatives)


COPIED = READ_TWICE | {
    "softmax, taylor(2)": lambda z: js.softmax(z, phi=js.taylor(2)),
    "cross_entropy": lambda z: losses.cross_entropy(z, jnp.zeros(z.shape[:-1], int)),
}


@pytest.mark.parametrize("f", COPIED.values(), ids=COPIED)
def test_on_a_gpu_no_scores_are_written_for_a_rule(f):
    """A rule reads the scores again, so there are barriers. They are of single numbers: one of scores that are made in
    the same program would make XLA write them."""

    def value_and_gradient(z):
        return jax.value_and_grad(lambda z: jnp.sum(jnp.sin(f(z / 1.7))))(z)

    z = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    text = jax.export.export(jax.jit(value_and_gradient), platforms=["cuda"])(z).mlir_module()
    assert set(re.findall(r"stablehlo.optimization_barrier .*: (\S+)", text)) == {"tensor<f32>"}


def test_explain():
    assert sums.explain((8, 4096)) == sums.explain((257, 8), 0) == sums.explain((256,)) == "reference: few scores"
    row = "cpu: a single long row, compiled for cpu; the derivative rules by the reference: few scores"
    assert sums.explain((257,)) == row
    assert sums.explain((2**15, 4)) == "cpu: many scores, compiled for cpu"
    assert sums.explain((2**15, 4), platform="tpu") == "reference: compiled for tpu"
    assert sums.explain((4, 2**15), platform="cuda").endswith("long_rows: many classes")
