"""Losses against their definition in float64, optax, many digits; edges; wrong calls."""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cells import and_full, covering, product, some
from compilation import jit_as_user
from interpreter import evaluated
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import losses, verify

cross_entropy = losses.cross_entropy
Z = np.array([[0.5, -1.0, 1.0, 0.3], [-0.7, 0.9, 0.1, -1.2], [0.2, 0.1, -0.3, 0.8]])
LABELS = np.array([2, 0, 3])
KEEP = np.array([True, False, True, True])
ALPHA, PRIOR = np.array([0.5, 2.0, 1.5, 0.7]), np.array([0.1, 0.4, -0.3, 0.2])
OPTIONS = {
    "plain": {},
    "margin": {"margin": 0.3},
    "smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 0.01},
    "weights": {"class_weights": ALPHA},
    "prior": {"log_weights": PRIOR},
    "classes": {"where": np.array([KEEP] * 3)},
    "rows": {"where": np.array([True, False, True])},
    "ignored": {"ignore_label": 3},
    "all": {
        "margin": 0.3,
        "label_smoothing": 0.2,
        "z_loss": 0.01,
        "class_weights": ALPHA,
        "log_weights": PRIOR,
        "where": np.array([KEEP] * 3),
        "ignore_label": 0,
    },
}


def defined(phi, z, labels, **options):
    """The definition, typed as it stands, with a one-hot."""
    names = ("margin", "label_smoothing", "z_loss", "log_weights")
    margin, label_smoothing, z_loss, log_weights = (options.get(name, 0.0) for name in names)
    class_weights, ignore_label = options.get("class_weights"), options.get("ignore_label")
    where = options.get("where", True)
    hot = jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype) if jnp.issubdtype(labels.dtype, jnp.integer) else labels
    classes = where if jnp.ndim(where) == 2 else True
    kept = jnp.broadcast_to(classes, z.shape)
    alpha = 1.0 if class_weights is None else class_weights
    w = kept * jnp.exp(log_weights) * phi.definition(z - margin * hot, verify.Plain)
    nl = jnp.where(kept, jnp.log(w.sum(-1, keepdims=True)) - jnp.log(jnp.where(kept, w, 1)), 0)
    loss = (1 - label_smoothing) * (hot * alpha * nl).sum(-1)
    loss += label_smoothing / kept.sum(-1) * (kept * alpha * nl).sum(-1)
    loss += z_loss * jnp.log(w.sum(-1)) ** 2
    rows = where if jnp.ndim(where) == 1 else True
    return jnp.where(rows & (ignore_label is None or labels != ignore_label), loss, 0)


def assert_same(f, g, z, rtol=1e-11):
    """Value, Jacobian, Hessian, and a Hessian product in a scan, which of g, the plain one, is made of the Hessian."""

    def results(f, in_a_scan, z):
        def total(z):
            return jnp.sum(jnp.cos(jnp.arange(z.shape[0])) * f(z))

        def scanned(z):
            return jax.lax.scan(lambda c, a: (c + total(a), None), 0.0, z[None])[0]

        value, jacobian, hessian, v = f(z), jax.jacrev(f)(z), jax.hessian(total)(z), jnp.cos(z)
        product = jax.jvp(jax.grad(scanned), (z,), (v,))[1] if in_a_scan else jnp.tensordot(hessian, v, z.ndim)
        return value, jacobian, hessian, product

    programs = [evaluated(functools.partial(results, *of)) for of in ((f, True), (g, False))]
    for a, b in zip(*(program(z) for program in programs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


OF_OPTIONS = and_full(
    [("prior", js.softplus), ("rows", js.spherical(0.1)), ("all", js.exp)],
    covering(OPTIONS, [js.exp, js.spherical(0.1), js.softplus], met=[(0, 1)]),
)
"""By default each option in some row. One option alone is met in the gate."""


@pytest.mark.parametrize(("name", "phi"), OF_OPTIONS, ids=str)
def test_options(name, phi):
    options = OPTIONS[name]
    with jax.enable_x64(True):
        z, labels = jnp.asarray(Z), jnp.asarray(LABELS)
        assert_same(
            lambda z: cross_entropy(z, labels, phi=phi, **options), lambda z: defined(phi, z, labels, **options), z
        )


@pytest.mark.full  # Every φ is in test_oracle.py, and in `python -m jsoftmax verify` with every loss.
@pytest.mark.parametrize("phi", [js.taylor(2), js.spherical(0.1), js.relu_power(2, 0.1)], ids=str)
def test_other_phis(phi):
    with jax.enable_x64(True):
        z, labels = jnp.asarray(Z), jnp.asarray(LABELS)
        assert_same(lambda z: cross_entropy(z, labels, phi=phi), lambda z: defined(phi, z, labels), z)


OF_DISTRIBUTIONS = ["plain", "smoothing", "z_loss", "prior", "weights", "classes", "rows"]


@pytest.mark.parametrize("name", some(OF_DISTRIBUTIONS, ["classes"]))
def test_distributions(name):
    """By default the option that changes what a distribution counts; the prior and smoothing are met in
    test_heads.py."""
    with jax.enable_x64(True):
        z, options = jnp.asarray(Z), OPTIONS[name]
        q = np.exp(np.sin(3 * Z))
        q = jnp.asarray(q / q.sum(-1, keepdims=True) * (KEEP if name == "classes" else 1))
        assert_same(lambda z: cross_entropy(z, q, **options), lambda z: defined(js.exp, z, q, **options), z)
        assert_same(lambda q: cross_entropy(z, q, **options), lambda q: defined(js.exp, z, q, **options), q)


@pytest.mark.parametrize("phi", some([js.exp, js.relu_power(2, 0.1)], [js.exp]), ids=str)
def test_log_prob(phi):
    """Of one label of each row and of several: that of log_softmax, and the negative of cross_entropy. `python -m
    jsoftmax verify` has log_prob with every φ."""
    with jax.enable_x64(True):
        z, several = jnp.asarray(Z), jnp.stack([LABELS, LABELS[::-1], jnp.full(3, 1)])
        rows = jnp.arange(3)

        def plain(z):
            log_p = js.log_softmax(z, phi=phi, log_weights=PRIOR)
            return sum(log_p[rows, labels] * jnp.sin(i + rows) for i, labels in enumerate(several))

        def ours(z):
            found = losses.log_prob(z, several, phi=phi, log_weights=PRIOR)
            return sum(found * jnp.sin(rows[:, None] + rows))

        assert_same(ours, plain, z)
        one = losses.log_prob(z, several[0], phi=phi)
        np.testing.assert_allclose(one, -cross_entropy(z, several[0], phi=phi), rtol=1e-14)


def test_a_weight_of_a_class_that_a_mask_leaves_out_counts_nothing():
    z, where = jnp.array([0.0, 1.0, 2.0]), jnp.array([False, True, True])
    weights = jnp.array([np.inf, 1.0, 3.0])
    found = losses.cross_entropy(z, jnp.array([0.0, 0.5, 0.5]), where=where, class_weights=weights)
    np.testing.assert_allclose(found, 0.5 * 1.3132617 + 1.5 * 0.3132617, rtol=1e-6)


def test_several_labels_of_sharded_classes_keep_the_digits_of_a_sure_one():
    mesh = jax.make_mesh((4,), ("classes",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, whole = jax.sharding.PartitionSpec(None, "classes"), jax.sharding.PartitionSpec()
    labels = jnp.array([[2, 5], [2, 2]])  # two of each of two rows
    z = jnp.zeros((2, 8)).at[0, 2].set(60.0).at[1, 5].set(50.0)

    def of_parts(z):
        return losses.log_prob(z, labels, axis_name="classes")

    parts = jax.shard_map(of_parts, mesh=mesh, in_specs=spec, out_specs=whole)
    for f in (jit_as_user, lambda f: jit_as_user(jax.grad(lambda z: f(z).sum()))):
        np.testing.assert_allclose(f(parts)(z), f(lambda z: losses.log_prob(z, labels))(z), rtol=1e-5)


def test_log_prob_of_draws_of_any_shape():
    z, mask, f = np.float32(Z), KEEP, losses.log_prob
    draws = np.random.default_rng(0).integers(0, 4, (5, 2, 3))

    @evaluated
    def results(z, draws):
        log_p = js.log_softmax(z, where=mask[None])
        want = log_p[jnp.arange(3), draws]
        masked = f(z, draws, where=np.stack([mask] * 3)), f(z.T, draws, 0, mask[:, None])
        by_z = jax.grad(lambda z: f(z, jnp.array([1, 9, 2]), where=mask[None]).sum())(z)
        bad = f(z, jnp.array([[1, 9, 2], [-1, 0, 1]]), where=np.array([True, True, False]))
        return want, masked, (f(z[0], draws), f(z[:1], draws)), by_z, bad

    want, masked, of_one_row, by_z, bad = results(z, draws)
    for found in masked:
        np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_array_equal(*of_one_row)
    np.testing.assert_array_equal(by_z[:2], 0)  # a class that is left out, and none
    np.testing.assert_array_equal(np.isnan(bad), [[False, True, False], [True, False, False]])
    np.testing.assert_array_equal(bad[:, 2], 0)
    for labels, error, words in (
        (jnp.ones(3), TypeError, "log_prob: labels must be integers"),
        (draws[..., :2], ValueError, r"log_prob: labels must end in .* \(3,\); got shape \(5, 2, 2\)"),
        (draws[0, 0, :, None], ValueError, r"got shape \(3, 1\)"),  # would be [3, 3]
        (1, ValueError, r"got shape \(\)\. .* jnp.full\(\(3,\), label\)"),
    ):
        with pytest.raises(error, match=words):
            losses.log_prob(z, labels)


def test_no_rows_and_no_classes():
    for rows, labels in (((0,), (4, 0)), ((2, 0), (4, 2, 0))):
        assert losses.log_prob(jnp.zeros((*rows, 3)), jnp.zeros(labels, int)).shape == labels
    for loss in (cross_entropy, losses.focal_cross_entropy, losses.poly_cross_entropy):
        none = loss(jnp.zeros((3, 0)), jnp.zeros(3, int), class_weights=jnp.zeros(0))
        np.testing.assert_array_equal(none, [np.nan] * 3)


def test_derivatives_of_a_bad_row_are_nan_both_ways():
    z = jnp.array([[1, np.nan, 2], [1, np.inf, 2], [1.0, 2, 4]])
    for loss in (cross_entropy, losses.spherical_z_loss):
        f = functools.partial(loss, labels=jnp.zeros(3, int))
        (_, along), by_z = jax.jvp(f, (z,), (jnp.ones_like(z),)), jax.grad(lambda z, f=f: f(z).sum())(z)
        np.testing.assert_array_equal(np.isnan(along), [True, True, False])
        np.testing.assert_array_equal(np.isnan(by_z), np.isnan(along)[:, None] & np.ones(3, bool))


def test_arrays_as_parameters_want_the_classes_last():
    """The classes are moved to the end, and the parameters would stay where they are."""
    z, phi = jnp.array([[0.1, 1.2], [-0.7, 0.4]]), js.spherical(jnp.array([0.5, 2.0]))
    np.testing.assert_allclose(
        cross_entropy(z, jnp.array([0, 1]), phi=phi), -jnp.diagonal(js.log_softmax(z, phi=phi)), rtol=1e-6
    )
    for name, f in {
        "cross_entropy": lambda axis: cross_entropy(z, jnp.array([0, 0]), axis=axis, phi=phi),
        "log_prob": lambda axis: losses.log_prob(z, jnp.array([0, 0]), axis=axis, phi=phi),
        "kl_to_target": lambda axis: losses.kl_to_target(z, jnp.full((2, 2), 0.5), axis=axis, phi=phi),
        "temperature_for_entropy": lambda axis: js.temperature_for_entropy(z, 0.5, axis=axis, phi=phi),
        "mixture_log_softmax": lambda axis: js.mixture_log_softmax(z, jnp.zeros(2), axis=axis, phi=phi),
    }.items():
        f(-1)
        with pytest.raises(ValueError, match=rf"{name}: .* the classes must be the last axis; got spherical .* \(0,\)"):
            f(0)


def test_agrees_with_optax():
    z = jnp.asarray(Z, jnp.float32)
    for f, g, labels in (
        (cross_entropy, optax.softmax_cross_entropy_with_integer_labels, jnp.asarray(LABELS)),
        (cross_entropy, optax.softmax_cross_entropy, jax.nn.softmax(-z)),
    ):
        np.testing.assert_allclose(f(z, labels), g(z, labels), rtol=1e-6)
        np.testing.assert_allclose(f(z.T, labels.T, axis=0), g(z.T, labels.T, axis=0), rtol=1e-6)


def summed(z, f, labels, options, counts):
    return jnp.where(counts, f(z, labels, **options), 0).sum()


@pytest.mark.parametrize("axis", some([-1, 0, (0, 2), (2, 0), (1, -3), (2, 1, 0)], [(1, -3)]), ids=str)
def test_axes_and_masks_as_in_optax(axis):
    """A flat label follows the order of the axes; a class that the mask leaves out counts nothing, in labels either. By
    default of two axes whose order is not the array's, one of them counted from the end; the last axis and axis 0,
    without a mask, are above."""
    image = jnp.sin(jnp.arange(24.0)).reshape(2, 3, 4)
    axes = axis if isinstance(axis, tuple) else (axis,)
    rows = tuple(n for i, n in enumerate(image.shape) if i not in [a % 3 for a in axes])
    labels = jnp.arange(math.prod(rows)).reshape(rows) % math.prod(image.shape[a] for a in axes)
    q = jax.nn.softmax(jnp.cos(image), axis)
    mask = (jnp.arange(24) % 5 != 3).reshape(image.shape).at[:, :, 1].set(False).at[:, 2].set(False)
    if axis == -1:
        mask = mask.at[0, 0].set(False)  # no class left
    by_label = optax.softmax_cross_entropy_with_integer_labels
    for where in (None, mask):
        pairs = (
            (cross_entropy, by_label, labels),
            (cross_entropy, optax.softmax_cross_entropy, q),
            (losses.poly_cross_entropy, optax.losses.poly_loss_cross_entropy, q),
        )
        for ours, theirs, given in pairs:
            options = {"axis": axis, "where": where}

            @evaluated
            def results(image, given, ours=ours, theirs=theirs, options=options):
                found, want = (f(image, given, **options) for f in (ours, theirs))
                counts = found != 0  # optax counts an integer label on a class left out
                gradients = [jax.grad(summed)(image, f, given, options, counts) for f in (ours, theirs)]
                return found, jnp.where(counts, want, 0), counts, gradients

            found, want, counts, gradients = results(image, given)
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)
            assert np.sum(counts) > found.size // 4
            np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_digits():
    """The loss of a confident right answer, within |u| + 4 ulp; optax says 0 or loses all digits."""
    xp = verify.ManyDigits()
    rng = np.random.default_rng(20)
    plain = jax.jit(cross_entropy)
    assert np.allclose(plain(jnp.array([0.0, -20.0]), jnp.array(0)), 2.0611536e-9, rtol=1e-6)
    for classes in (2, 8, 60, 300, 2100):
        for gap in (0, 12, 20, 40):
            z = rng.normal(0, 1, classes)
            y = int(rng.integers(classes))
            z[y] = z.max() + gap
            z = np.float32(np.round(z * 256) / 256)
            exact = xp.array(z)
            want = float(xp.mp.log1p(sum(sorted(xp.exp(np.delete(exact, y) - exact[y])))))
            for options in ({}, {"class_weights": np.ones(classes, np.float32)}):
                got = float(plain(z, jnp.array(y), **options))
                assert abs(got - want) <= 4 * np.spacing(np.float32(want)), (classes, gap)


def test_edges():
    nan, inf = np.nan, np.inf
    z = np.float32([[0, 1], [nan, 1], [inf, 0], [-inf, 0], [0, 1], [0, 1], [-inf, -inf]])
    labels, quiet = np.array([0, 0, 0, 0, 2, -1, 0]), np.array([True] + [False] * 6)
    q, out = np.float32([[0, 1], [0.5, 0.5]]), np.float32([[-inf, 0.3], [-inf, 0.3]])

    @evaluated
    def results(z, out):
        f, by_label = cross_entropy, jax.grad(lambda z: cross_entropy(z, labels).sum())
        masks = {"where": quiet}, {"where": np.stack([quiet, quiet], -1)}
        masked = [jax.grad(lambda z, o=o: f(z, jnp.zeros(7, int), **o)[0])(z) for o in masks]
        left_out = f(z, labels, where=quiet), f(z, labels, ignore_label=-1)
        return f(z, labels), by_label(z), masked, left_out, f(out, q), jax.grad(lambda z: f(z, q).sum())(out)

    loss, gradient, masked, (quiet_loss, ignoring), of_impossible, by_impossible = results(z, out)
    np.testing.assert_allclose(loss, [1.3132617, nan, nan, inf, nan, nan, inf], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, True, False, False, False, False])
    np.testing.assert_array_equal(gradient[4:6], 0)
    assert np.all(np.isfinite(masked))
    np.testing.assert_array_equal(quiet_loss[1:], 0)
    np.testing.assert_array_equal(ignoring[5], 0)
    np.testing.assert_array_equal(of_impossible, [0, inf])
    assert np.all(np.isfinite(by_impossible))


@pytest.mark.parametrize("dtype", some([jnp.bfloat16, jnp.float16, jnp.float32], [jnp.bfloat16]))
def test_dtypes_under_strict_promotion_and_debug_nans(dtype):
    options = {key: value for key, value in OPTIONS["all"].items() if key not in ("class_weights", "log_weights")}
    z, alpha = jnp.asarray(3 * Z, dtype), jnp.asarray(ALPHA, jnp.float32)
    with strict_promotion(), jax.debug_nans(True):
        loss = cross_entropy(z, jnp.asarray(LABELS), class_weights=alpha, **options)
        assert loss.dtype == jnp.float32
        q = jax.nn.softmax(z.astype(jnp.float32))
        assert cross_entropy(z, q, label_smoothing=0.1, z_loss=0.1).dtype == jnp.float32


def test_float64_under_strict_promotion():
    """The count that shares the smoothing has the logits' dtype, too."""
    with jax.enable_x64(True), strict_promotion():
        for labels in (jnp.asarray(LABELS), jax.nn.softmax(jnp.asarray(Z))):
            assert cross_entropy(jnp.asarray(Z), labels, label_smoothing=0.1).dtype == jnp.float64


@pytest.mark.parametrize("dtype", some([jnp.int8, jnp.uint8, jnp.int16, jnp.uint32], [jnp.int8]))
def test_labels_of_any_width(dtype):
    """More classes than the labels' dtype can count, which the narrowest shows."""
    z = jnp.cos(jnp.arange(900.0)).reshape(3, 300)
    labels = jnp.array([127, 3, 100])
    functions = (cross_entropy, losses.focal_cross_entropy, losses.spherical_z_loss, js.fenchel_young_loss)

    @evaluated
    def results(z, labels):
        ignored = [f(z, labels, ignore_label=-1) for f in functions]
        return [*ignored, *(f(z, labels) for f in functions), losses.plackett_luce_log_prob(z[0], labels)]

    for one, other in zip(results(z, labels.astype(dtype)), results(z, labels), strict=True):
        np.testing.assert_array_equal(one, other)


def test_residuals():
    """One array for the backward pass; no one-hot."""
    z = jnp.cos(jnp.arange(1000.0))
    _, pull = jax.vjp(lambda z: cross_entropy(z, jnp.array(3)), z)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= 1000]
    beyond = [leaf for leaf in kept if not np.array_equal(leaf, z)]
    assert sum(leaf.nbytes for leaf in beyond) <= 1.25 * z.nbytes


TERMS = {  # the loss of one class, of n = −log p
    "focal": (losses.focal_cross_entropy, lambda n: n * (1 - jnp.exp(-n)) ** 2, {}),
    "focal, gamma": (losses.focal_cross_entropy, lambda n: n * (1 - jnp.exp(-n)) ** 0.5, {"gamma": 0.5}),
    "focal, gamma 0": (losses.focal_cross_entropy, lambda n: n, {"gamma": 0}),
    "poly": (losses.poly_cross_entropy, lambda n: n + 2 * (1 - jnp.exp(-n)), {}),
    "poly, epsilon": (losses.poly_cross_entropy, lambda n: n - 0.5 * (1 - jnp.exp(-n)), {"epsilon": -0.5}),
}


OF_FACTORS = and_full(
    [("focal, gamma", "prior"), ("focal", "weights"), ("poly, epsilon", "rows")],
    covering(TERMS, ["plain", "prior", "weights", "classes", "rows", "ignored"], met=[(0, 1)]),
)
"""In the gate each term and each option: the terms know of n and of the factors alone."""


@pytest.mark.parametrize(("terms", "name"), OF_FACTORS)
def test_factors(terms, name):
    """The factors know of the prior, not of the class weights. By default both losses and parameters of both."""
    f, term, parameters = TERMS[terms]
    options = OPTIONS[name]
    with jax.enable_x64(True):
        labels = jnp.asarray(LABELS)

        def plain(z, labels=labels):
            n = defined(js.exp, z, labels, **{k: v for k, v in options.items() if k != "class_weights"})
            return term(n) * (ALPHA[labels] if name == "weights" else 1)

        z = jnp.asarray(Z)
        assert_same(lambda z: f(z, labels, **parameters, **options), plain, z)
        if name in ("plain", "prior"):
            q = np.exp(np.sin(3 * Z))
            q /= q.sum(-1, keepdims=True)

            @evaluated
            def both(z, q):
                return f(z, q, **parameters, **options), sum(q[:, k] * plain(z, jnp.full(3, k)) for k in range(4))

            found, mixed = both(z, q)
            np.testing.assert_allclose(found, mixed, rtol=1e-12)


def test_factors_agree_with_optax():
    q = jax.nn.softmax(-Z)
    np.testing.assert_allclose(losses.poly_cross_entropy(Z, q), optax.losses.poly_loss_cross_entropy(Z, q), rtol=1e-6)


@pytest.mark.parametrize("gamma", some([0, 0.5, 1, 2, 3.5], [0, 0.5, 2]))
def test_focal_loss_of_right_answers(gamma):
    """Digits, and derivatives where nothing is left but the answer, in the logits and in γ."""
    xp = verify.ManyDigits()
    for gap in (0.5, 3, 20, 60):
        n = xp.mp.log1p(xp.mp.exp(-gap))
        want = float(n * (-xp.mp.expm1(-n)) ** gamma)
        got = losses.focal_cross_entropy(jnp.array([0.0, -gap]), jnp.array(0), gamma=gamma)
        if want > 1e-34:
            np.testing.assert_allclose(got, want, rtol=2e-6)
    for z in ([0.0, -jnp.inf], [0.0, -300.0], [-200.0, 0.0], [-3000.0, 0.0], [-jnp.inf, 0.0]):

        def loss(z, gamma):
            return losses.focal_cross_entropy(z, jnp.array(0), gamma=gamma)

        by_z, by_gamma = jax.grad(loss, (0, 1))(jnp.array(z), jnp.float32(gamma))
        assert np.all(np.isfinite(by_z))
        if z[0] > -jnp.inf:
            assert np.isfinite(by_gamma)


def test_kl_to_target():
    with jax.enable_x64(True):
        z, q = jnp.asarray(Z), jax.nn.softmax(jnp.sin(3 * jnp.asarray(Z)))

        def plain(z, q):
            return jnp.sum(q * (jnp.log(q) - jax.nn.log_softmax(z)), -1)

        assert_same(lambda z: losses.kl_to_target(z, q), lambda z: plain(z, q), z)
        assert_same(lambda q: losses.kl_to_target(z, q), lambda q: plain(z, q), 1.5 * q)
        np.testing.assert_allclose(losses.kl_to_target(z, q), optax.kl_divergence(jax.nn.log_softmax(z), q), rtol=1e-10)
        scored = js.kl_divergence(jnp.log(q), z)
        np.testing.assert_allclose(losses.kl_to_target(z, q), scored, rtol=1e-10)
        exact = jnp.array([0.25, 0.25, 0.5])
        near = jnp.float32(jnp.log(exact) + 1e-3 * jnp.array([1.0, -1.0, 0.5]))
        want = js.kl_divergence(jnp.log(exact), jnp.float64(near))
        assert 0 < want < 1e-6
        np.testing.assert_allclose(losses.kl_to_target(near, jnp.float32(exact)), want, rtol=2e-4)


def test_kl_to_target_edges():
    """A target of 0 counts nothing, nor one on a masked class, with derivative 0; on an impossible class it is +inf."""
    inf, nan, keep = np.inf, np.nan, np.array([True, True, False])
    z = np.float32([[0, 1, 2], [0, 1, -inf], [0, 1, -inf], [-inf] * 3, [nan, 0, 0], [inf, 0, 0]])
    q = np.float32([[0, 0.5, 0.5], [0.5, 0.5, 0], [0, 0.5, 0.5], [0] * 3, [1, 0, 0], [1, 0, 0]])

    @evaluated
    def results(z, q):
        f = losses.kl_to_target
        gradients = jax.grad(lambda z, q: f(z, q).sum(), (0, 1))(z, q)
        rows = f(z, q, where=np.array([True, True, False, True, False, False]))
        masked, negative = f(z[:2], q[:2], where=np.stack([keep, keep])), f(z[0], jnp.array([-0.5, 0.5, 1.0]))
        p, q_kept = js.softmax(z[:2, :2]), q[:2, :2]  # what is left out counts nothing
        want = jnp.sum(jax.scipy.special.xlogy(q_kept, q_kept / p), -1)
        return f(z, q), js.softmax(z[0]), gradients, rows, (masked, want), negative

    value, p, (by_z, by_q), rows, of_kept, negative = results(z, q)
    np.testing.assert_allclose(value[0], -0.5 * np.log(4 * p[1] * p[2]), rtol=1e-6)
    np.testing.assert_array_equal(np.isfinite(value), [True, True, False, True, False, False])
    assert value[2] == inf
    assert value[3] == 0
    assert np.all(np.isfinite(by_z[:4]))
    assert np.all(np.isfinite(by_q[:4]))
    assert by_q[0, 0] == by_z[1, 2] == 0
    np.testing.assert_array_equal(np.isnan(by_z[4:]).any(-1), True)
    assert np.isnan(negative)
    np.testing.assert_allclose(rows, np.where(np.isfinite(value), value, 0))
    np.testing.assert_allclose(*of_kept, rtol=1e-6)


def test_spherical_z_loss():
    with jax.enable_x64(True):
        z, labels = jnp.asarray(Z), jnp.asarray(LABELS)

        def plain(z, a=1.0, b=0.0):
            t = (z - z.mean(-1, keepdims=True)) / z.std(-1, keepdims=True)
            return jax.nn.softplus(a * (b - t[jnp.arange(3), labels])) / a

        assert_same(lambda z: losses.spherical_z_loss(z, labels), plain, z)
        options = {"scale": 2.0, "shift": 0.7}
        assert_same(lambda z: losses.spherical_z_loss(z, labels, **options), lambda z: plain(z, 2.0, 0.7), z)

        @evaluated
        def masked_and_shifted(z, labels):
            f = losses.spherical_z_loss
            part = f(z[:, KEEP], jnp.array([1, 0, 2]), where=jnp.array([True, True, False]))
            return f(z, labels), f(3 * z - 7, labels), f(z, labels, where=np.stack([KEEP] * 3)), part

        loss, shifted, masked, part = masked_and_shifted(z, labels)
        np.testing.assert_allclose(shifted, loss, rtol=1e-12)
        np.testing.assert_allclose(masked[:2], part[:2], rtol=1e-12)
        assert part[2] == 0


def test_edges_of_spherical_z_loss():
    """Equal scores, far and near ones, bad ones; labels out of range, ignored and impossible; a shift costs no
    digits."""
    nan, inf, near_one = np.nan, np.inf, np.float32([1.0, 1.0, 1 + 2.0**-23])
    z = np.float32([[2, 2, 2], [1e30, -1e30, 0], [1e-30, 0, 0], [nan, 0, 0], [0, inf, 0], [-inf, 0, 1]])

    @jax.jit
    def results(z, near_one):
        f, labels = losses.spherical_z_loss, jnp.zeros(6, int)
        gradient = jax.grad(lambda z: f(z, labels).sum())(z)
        out_of_range = [f(z[0], jnp.array(label)) for label in (3, -1)]
        ignored = f(z[0], jnp.array(-1), ignore_label=-1)
        return (
            f(z, labels),
            f(jnp.sign(z[1:3]), labels[1:3]),
            gradient,
            out_of_range,
            ignored,
            f(near_one, jnp.array(2)),
        )

    loss, of_signs, gradient, out_of_range, ignored, of_near = results(z, near_one)
    np.testing.assert_allclose(loss[0], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(loss[1:3], of_signs, rtol=1e-6)
    assert np.all(np.isnan(loss[3:5]))
    assert loss[5] == inf
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.all(np.isfinite(gradient[:3]))
    assert np.all(np.isnan(out_of_range))
    assert ignored == 0
    np.testing.assert_allclose(of_near, np.log1p(np.exp(-np.sqrt(2))), rtol=1e-6)


@pytest.mark.parametrize(("length", "phi"), product([1, 2, 3, 4], [js.exp, js.taylor(2)], met=[(0, 1)]), ids=str)
def test_plackett_luce(length, phi):
    """Its probabilities of all orders of one length sum to 1, and are products of what is left."""
    z = jnp.asarray(Z[0], jnp.float32)
    orders = jnp.array(list(itertools.permutations(range(4), length)))
    log_p = jax.vmap(lambda order: losses.plackett_luce_log_prob(z, order, phi=phi))(orders)
    np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, rtol=1e-5)
    weights = np.asarray(phi(z))
    for order, got in zip(np.asarray(orders), log_p, strict=True):
        left, want = set(range(4)), 0.0
        for k in order:
            want += np.log(weights[k] / sum(weights[j] for j in left))
            left -= {k}
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_plackett_luce_edges_and_axes():
    f, inf, nan = losses.plackett_luce_log_prob, np.inf, np.nan
    z = np.float32([0.5, -1.0, -inf, 0.3])
    orders, first = np.array([[0, 3], [0, 0], [0, 4], [-1, 0], [0, 2]]), np.array([True, False])

    @evaluated
    def results(z, orders):
        rows = jnp.stack([z, z[::-1]])
        same = f(z[jnp.array([0, 1, 3])], jnp.array([0, 2])), f(z.at[2].set(9.0), orders[0], where=z > -inf)
        equal_orders = orders[:1].repeat(2, 0)
        of_rows = f(rows, equal_orders), f(rows, orders[:2], where=first)
        by_columns = f(rows.T, equal_orders.T, axis=0), f(rows.T, orders[:2].T, axis=0, where=first)
        by_rows = jax.grad(lambda z: f(z, orders[:2], where=first).sum())(rows.at[1].set(nan))
        bad = [f(z.at[1].set(bad), orders[0]) for bad in (inf, nan)]
        log_p, gradients = jax.vmap(jax.value_and_grad(f), (None, 0))(z, orders)
        narrow, sure = f(z.astype(jnp.bfloat16), orders[0]), f(jnp.array([60.0, 40.0, 20.0]), jnp.arange(3))
        return log_p, gradients, same, of_rows, by_columns, by_rows, bad, sure, narrow

    log_p, gradients, same, of_rows, by_columns, by_rows, bad, sure, narrow = results(z, orders)
    np.testing.assert_array_equal(np.isnan(log_p), [False, True, True, True, False])
    assert log_p[4] == -inf
    np.testing.assert_allclose(same, [log_p[0]] * 2, rtol=1e-6)
    assert np.all(np.isfinite(np.asarray(gradients)[[0, 4]]))
    assert np.all(np.isnan(bad))
    np.testing.assert_allclose(by_columns, of_rows, rtol=1e-7)
    np.testing.assert_allclose(of_rows[1], [log_p[0], 0], rtol=1e-6)
    np.testing.assert_array_equal(by_rows, [gradients[0], np.zeros(4)])
    np.testing.assert_allclose(sure, -2 * np.exp(-20.0), rtol=1e-5)
    assert narrow.dtype == jnp.float32


raw = inspect.unwrap
f = raw(cross_entropy)
Q = jnp.full((3, 4), 0.25)
WRONG = [
    (lambda: f(Z, LABELS[:2]), ValueError, "integer labels must have the logits' shape without the classes, (3,)"),
    (lambda: f(Z, [1, 2, 3]), TypeError, "labels must be an array or a number; got list"),
    (lambda: f(Z, LABELS > 1), TypeError, "labels must be integers or floating distributions; got dtype bool"),
    (lambda: f(Z, Q[0]), ValueError, "labels that are distributions must have the logits' shape (3, 4)"),
    (lambda: f(Z, Q, margin=0.1), ValueError, "margin must be left out where labels are distributions"),
    (lambda: f(Z, Q, ignore_label=0), ValueError, "ignore_label must be left out"),
    (lambda: f(Z, LABELS, label_smoothing=1.5), ValueError, "label_smoothing must be in [0, 1]; got 1.5"),
    (lambda: f(Z, LABELS, z_loss=-1.0), ValueError, "z_loss must be >= 0 and finite; got -1.0"),
    (lambda: f(Z, LABELS, margin=jnp.ones(3)), ValueError, "margin must be one number; got shape (3,)"),
    (lambda: f(Z, LABELS, class_weights=ALPHA[:2]), ValueError, "class_weights must have the shape of the class axes"),
    (lambda: f(Z, LABELS, where=jnp.array(True)), ValueError, "where must have as many dimensions"),
    (lambda: f(Z, LABELS, where=jnp.ones(4, bool)), ValueError, "where must broadcast"),
    (lambda: f(Z, LABELS, phi=jnp.exp), TypeError, "phi must be a φ"),
    (lambda: f(Z, LABELS, axis=2), ValueError, "axis 2 is out of range"),
    (lambda: f(Z.astype(int), LABELS), TypeError, "logits must be floating; got dtype int"),
    (lambda: f(Z, LABELS, ignore_label=1.5), TypeError, "ignore_label must be an int or None; got 1.5"),
]


focal, to_target, z_loss, ranking = map(
    raw, (losses.focal_cross_entropy, losses.kl_to_target, losses.spherical_z_loss, losses.plackett_luce_log_prob)
)
OTHERS_WRONG = [
    (lambda: focal(Z, LABELS, gamma=-1), ValueError, "focal_cross_entropy: gamma must be >= 0 and finite; got -1"),
    (lambda: focal(Z, Q, ignore_label=1), ValueError, "focal_cross_entropy: ignore_label must be left out"),
    (lambda: to_target(Z, LABELS), TypeError, "kl_to_target: targets must be floating distributions"),
    (lambda: to_target(Z, Q[0]), ValueError, "kl_to_target: targets that are distributions must have"),
    (lambda: z_loss(Z, Q), TypeError, "spherical_z_loss: labels must be integers; got dtype float32"),
    (lambda: z_loss(Z, LABELS, scale=0), ValueError, "spherical_z_loss: scale must be > 0 and finite; got 0"),
    (lambda: ranking(Z, Q), TypeError, "plackett_luce_log_prob: order must be integers"),
    (lambda: ranking(Z, LABELS), ValueError, "plackett_luce_log_prob: order must have the scores' shape (3, 4)"),
    (lambda: ranking(Z, LABELS, axis=(0, 1)), ValueError, "plackett_luce_log_prob: axis must be one axis"),
]


@pytest.mark.parametrize("wrong", OTHERS_WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls_of_others(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("cross_entropy: ")
    assert says in str(caught.value)
