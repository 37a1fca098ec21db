"""Losses against their definition in float64, optax, many digits; edges; wrong calls."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jsoftmax as js
from jsoftmax import losses, verify
from jsoftmax.verify import PHIS

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
    """Value, Jacobian, Hessian, and a Hessian product in a scan."""

    def results(f, z):
        def total(z):
            return jnp.sum(jnp.cos(jnp.arange(z.shape[0])) * f(z))

        def scanned(z):
            return jax.lax.scan(lambda c, a: (c + total(a), None), 0.0, z[None])[0]

        return f(z), jax.jacrev(f)(z), jax.hessian(total)(z), jax.jvp(jax.grad(scanned), (z,), (jnp.cos(z),))[1]

    for a, b in zip(jax.jit(functools.partial(results, f))(z), jax.jit(functools.partial(results, g))(z), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("phi", [js.exp, js.spherical(0.1), js.softplus], ids=str)
def test_options(phi, options):
    with jax.enable_x64(True):
        z, labels = jnp.asarray(Z), jnp.asarray(LABELS)
        assert_same(
            lambda z: cross_entropy(z, labels, phi=phi, **options), lambda z: defined(phi, z, labels, **options), z
        )


@pytest.mark.parametrize("phi", PHIS, ids=str)
def test_every_phi(phi):
    with jax.enable_x64(True):
        z, labels = jnp.asarray(Z), jnp.asarray(LABELS)
        assert_same(lambda z: cross_entropy(z, labels, phi=phi), lambda z: defined(phi, z, labels), z)


@pytest.mark.parametrize("name", ["plain", "smoothing", "z_loss", "prior", "classes", "rows"])
def test_distributions(name):
    with jax.enable_x64(True):
        z, options = jnp.asarray(Z), OPTIONS[name]
        q = jax.nn.softmax(jnp.sin(3 * z)) * (KEEP if name == "classes" else 1)
        assert_same(lambda z: cross_entropy(z, q, **options), lambda z: defined(js.exp, z, q, **options), z)
        assert_same(lambda q: cross_entropy(z, q, **options), lambda q: defined(js.exp, z, q, **options), q)


def test_agrees_with_optax():
    z = jnp.asarray(Z, jnp.float32)
    for f, g, labels in (
        (cross_entropy, optax.softmax_cross_entropy_with_integer_labels, jnp.asarray(LABELS)),
        (cross_entropy, optax.softmax_cross_entropy, jax.nn.softmax(-z)),
    ):
        np.testing.assert_allclose(f(z, labels), g(z, labels), rtol=1e-6)
        np.testing.assert_allclose(f(z.T, labels.T, axis=0), g(z.T, labels.T, axis=0), rtol=1e-6)
    image = jnp.sin(jnp.arange(24.0)).reshape(2, 3, 4)
    want = optax.softmax_cross_entropy_with_integer_labels(image, jnp.array([7, 2, 5]), axis=(0, 2))
    np.testing.assert_allclose(cross_entropy(image, jnp.array([7, 2, 5]), axis=(0, 2)), want, rtol=1e-6)


def test_digits():
    """The loss of a confident right answer, within |u| + 4 ulp; optax says 0 or loses all digits."""
    xp = verify.ManyDigits()
    rng = np.random.default_rng(20)
    assert np.allclose(cross_entropy(jnp.array([0.0, -20.0]), jnp.array(0)), 2.0611536e-9, rtol=1e-6)
    for classes in (2, 8, 60, 300, 2100):
        for gap in (0, 12, 20, 40):
            z = rng.normal(0, 1, classes)
            y = int(rng.integers(classes))
            z[y] = z.max() + gap
            z = np.float32(np.round(z * 256) / 256)
            exact = xp.array(z)
            want = float(xp.mp.log1p(sum(sorted(xp.exp(np.delete(exact, y) - exact[y])))))
            for options in ({}, {"class_weights": np.ones(classes, np.float32)}):
                got = float(cross_entropy(z, jnp.array(y), **options))
                assert abs(got - want) <= 4 * np.spacing(np.float32(want)), (classes, gap)


def test_edges():
    nan, inf = jnp.nan, jnp.inf
    z = jnp.array([[0.0, 1.0], [nan, 1.0], [inf, 0.0], [-inf, 0.0], [0.0, 1.0], [0.0, 1.0], [-inf, -inf]])
    labels = jnp.array([0, 0, 0, 0, 2, -1, 0])
    loss = cross_entropy(z, labels)
    np.testing.assert_allclose(loss, [1.3132617, nan, nan, inf, nan, nan, inf], rtol=1e-6)
    gradient = jax.grad(lambda z: cross_entropy(z, labels).sum())(z)
    np.testing.assert_array_equal(np.isnan(gradient).any(-1), [False, True, True, False, True, True, False])
    quiet = jnp.array([True] + [False] * 6)
    for options in ({"where": quiet}, {"where": quiet[:, None] & jnp.ones(2, bool)}):
        masked = jax.grad(lambda z, o=options: cross_entropy(z, jnp.zeros(7, int), **o)[0])(z)
        assert np.all(np.isfinite(masked))
    np.testing.assert_array_equal(cross_entropy(z, labels, where=quiet)[1:], 0)
    np.testing.assert_array_equal(cross_entropy(z, labels, ignore_label=-1)[5], 0)
    q = jnp.array([[0.0, 1.0], [0.5, 0.5]])
    out = jnp.array([[-inf, 0.3], [-inf, 0.3]])
    np.testing.assert_array_equal(cross_entropy(out, q), [0, inf])
    assert np.all(np.isfinite(jax.grad(lambda z: cross_entropy(z, q).sum())(out)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32])
def test_dtypes_under_strict_promotion_and_debug_nans(dtype):
    options = {key: value for key, value in OPTIONS["all"].items() if key not in ("class_weights", "log_weights")}
    z, alpha = jnp.asarray(3 * Z, dtype), jnp.asarray(ALPHA, jnp.float32)
    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        loss = cross_entropy(z, jnp.asarray(LABELS), class_weights=alpha, **options)
        assert loss.dtype == jnp.float32
        q = jax.nn.softmax(z.astype(jnp.float32))
        assert cross_entropy(z, q, label_smoothing=0.1, z_loss=0.1).dtype == jnp.float32


def test_float64_under_strict_promotion():
    """The count that shares the smoothing has the logits' dtype, too."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for labels in (jnp.asarray(LABELS), jax.nn.softmax(jnp.asarray(Z))):
            assert cross_entropy(jnp.asarray(Z), labels, label_smoothing=0.1).dtype == jnp.float64


def test_residuals():
    """One array for the backward pass; no one-hot."""
    z = jnp.cos(jnp.arange(1000.0))
    _, pull = jax.vjp(lambda z: cross_entropy(z, jnp.array(3)), z)
    kept = [leaf for leaf in jax.tree.leaves(pull) if getattr(leaf, "size", 0) >= 1000]
    beyond = [leaf for leaf in kept if not np.array_equal(leaf, z)]
    assert sum(leaf.nbytes for leaf in beyond) <= 1.25 * z.nbytes


f = inspect.unwrap(cross_entropy)
Q = jnp.full((3, 4), 0.25)
WRONG = [
    (lambda: f(Z, LABELS[:2]), ValueError, "integer labels must have the logits' shape without the classes, (3,)"),
    (lambda: f(Z, [1, 2, 3]), TypeError, "labels must be an array; got list"),
    (lambda: f(Z, LABELS > 1), TypeError, "labels must be integers or floating distributions; got dtype bool"),
    (lambda: f(Z, Q[0]), ValueError, "labels that are distributions must have the logits' shape (3, 4)"),
    (lambda: f(Z, Q, margin=0.1), ValueError, "margin must be left out where labels are distributions"),
    (lambda: f(Z, Q, class_weights=ALPHA), ValueError, "class_weights must be left out"),
    (lambda: f(Z, Q, ignore_label=0), ValueError, "ignore_label must be left out"),
    (lambda: f(Z, LABELS, label_smoothing=1.5), ValueError, "label_smoothing must be in [0, 1]; got 1.5"),
    (lambda: f(Z, LABELS, z_loss=-1.0), ValueError, "z_loss must be in [0, inf]; got -1.0"),
    (lambda: f(Z, LABELS, margin=jnp.ones(3)), ValueError, "margin must be one number; got shape (3,)"),
    (lambda: f(Z, LABELS, class_weights=ALPHA[:2]), ValueError, "class_weights must have the shape of the class axes"),
    (lambda: f(Z, LABELS, where=jnp.array(True)), ValueError, "where must have as many dimensions"),
    (lambda: f(Z, LABELS, where=jnp.ones(4, bool)), ValueError, "where must broadcast"),
    (lambda: f(Z, LABELS, phi=jnp.exp), TypeError, "phi must be a φ"),
    (lambda: f(Z, LABELS, axis=2), ValueError, "axis 2 is out of range"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith("cross_entropy: ")
    assert says in str(caught.value)
