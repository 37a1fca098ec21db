"""The Gram trick against the dense loss in float64; digits, memory, edges, wrong calls; the φ `quadratic`."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, some
from interpreter import evaluated
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import losses, verify
from jsoftmax.heads.quadratic import quadratic_cross_entropy

RNG = np.random.default_rng(7)
V, D, N = 11, 3, 4
H, W, B = RNG.normal(size=(N, D)), RNG.normal(size=(V, D)), RNG.normal(size=V)
Y = np.array([2, 0, 10, 2], np.int32)
KEEP = np.arange(V) % 4 != 1
PHIS = (js.taylor(2), js.spherical(0.1), js.quadratic(1.0, 0.5, 0.3))


def dense(hidden, weight, labels, bias=None, *, where=None, phi):
    """The definition, typed as it stands."""
    weights = phi.definition(hidden @ weight.T + (0 if bias is None else bias), verify.Plain)
    total = jnp.sum(weights if where is None else jnp.where(where, weights, 0), -1)
    return jnp.log(total) - jnp.log(jnp.take_along_axis(weights, labels[..., None], -1)[..., 0])


OF_DENSE = and_full([(PHIS[2], 6000)], itertools.product(PHIS, [V, 6000]))
"""By default several blocks, and all three numbers of φ."""


@pytest.mark.parametrize(("phi", "rows"), OF_DENSE, ids=str)
def test_equals_the_dense_loss(phi, rows):
    """Value, gradients in all that is floating, and a Hessian product inside a scan; with and without options."""
    weight, bias = np.resize(W, (rows, D)) + 0.01 * np.arange(rows)[:, None] % 0.7, np.resize(B, rows)
    options = {"plain": (None, None), "bias": (bias, None), "both": (bias, np.resize(KEEP, rows))}

    def results(f):
        def of(bias, where):
            def total(inputs):
                hidden, weight, b, phi = inputs
                loss = f(hidden, weight, jnp.asarray(Y), b if bias is not None else None, where=where, phi=phi)
                return jnp.sum(jnp.cos(jnp.arange(N)) * loss), loss

            inputs = (jnp.asarray(H), jnp.asarray(weight), jnp.asarray(B if bias is None else bias), phi)
            along = jax.tree.map(lambda a: jnp.cos(jnp.asarray(a) + 1.0), inputs)

            def scanned(inputs):
                return jax.lax.scan(lambda c, a: (c + total(a)[0], None), 0.0, jax.tree.map(lambda a: a[None], inputs))

            inputs = jax.tree.map(jnp.asarray, inputs)
            first, second = jax.jvp(jax.grad(lambda inputs: scanned(inputs)[0]), (inputs,), (along,))
            return total(inputs)[1], first, second

        return evaluated(lambda: {name: of(*given) for name, given in options.items()})()

    with jax.enable_x64(True):
        got, wanted = results(quadratic_cross_entropy), results(dense)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * (np.max(np.abs(b)) or 1), err_msg=str(path))


def test_leading_axes_and_transformations():
    h, w, y = jnp.float32(H).reshape(2, 1, 2, D), jnp.float32(W), jnp.asarray(Y).reshape(2, 1, 2)
    loss = quadratic_cross_entropy(h, w, y, phi=js.taylor(2))
    assert loss.shape == (2, 1, 2)
    np.testing.assert_allclose(loss, losses.cross_entropy(h @ w.T, y, phi=js.taylor(2)), rtol=1e-5)
    one = quadratic_cross_entropy(h[0, 0, 0], w, y[0, 0, 0], phi=js.taylor(2))
    mapped = jax.vmap(lambda h, y: quadratic_cross_entropy(h, w, y, phi=js.taylor(2)))(h, y)
    np.testing.assert_allclose(mapped, loss, rtol=1e-6)
    np.testing.assert_allclose(one, loss[0, 0, 0], rtol=1e-6)
    assert quadratic_cross_entropy(h[:0], w, y[:0], phi=js.taylor(2)).shape == (0, 1, 2)


def test_digits_in_float32():
    """What the docstring says: about 1e-6 for weights at random, and by the length of a vector that rows share."""
    rows, width, phi = 8192, 64, js.taylor(2)
    rng = np.random.default_rng(1)
    weight, hidden = 0.1 * rng.normal(size=(rows, width)), rng.normal(size=(64, width))
    common = rng.normal(size=width)
    common /= np.linalg.norm(common)
    hidden -= np.outer(hidden @ common, common)
    labels = rng.integers(rows, size=64)
    for length, bound in ((0, 3e-6), (8, 1e-4), (80, 1e-2)):
        w, h = np.float32(weight + length * common), np.float32(hidden)
        exact = phi.definition(np.float64(h) @ np.float64(w).T, np)
        want = np.log(exact.sum(-1)) - np.log(exact[np.arange(64), labels])
        got = quadratic_cross_entropy(jnp.asarray(h), jnp.asarray(w), jnp.asarray(labels), phi=phi)
        assert np.max(np.abs(got - want)) < bound, length


@pytest.mark.parametrize("masked", some([False, True], [True]))
def test_memory(masked):
    """In blocks no array of the weight's size is made but its gradient."""
    rows, width = 32768, 32
    w, h, y = jnp.zeros((rows, width)), jnp.zeros((64, width)), jnp.zeros(64, int)
    where = jnp.ones(rows, bool) if masked else None

    def total(h, w):
        return jnp.sum(quadratic_cross_entropy(h, w, y, where=where, phi=js.taylor(2)))

    for f in (total, jax.grad(total, (0, 1))):
        temporaries = jax.jit(f).lower(h, w).compile().memory_analysis().temp_size_in_bytes
        assert temporaries < w.nbytes / 2


def test_edges():
    nan, inf = jnp.nan, jnp.inf
    h, w, phi = jnp.float32(H), jnp.float32(W), js.taylor(2)
    padded, kept = jnp.concatenate([w, jnp.full((2, D), nan)]), jnp.arange(V + 2) < V
    y = jnp.array([2, -1, V + 1, V + 2])
    loss = quadratic_cross_entropy(h, padded, y, jnp.full(V + 2, 0.5).at[V:].set(nan), where=kept, phi=phi)
    want = losses.cross_entropy(h[0] @ w.T + 0.5, y[0], phi=phi)
    np.testing.assert_allclose(loss, [want, nan, 0, nan], rtol=1e-6)

    def third(h, w):
        return jnp.sum(quadratic_cross_entropy(h[:3:2], w, y[:3:2], where=kept, phi=phi))

    for gradient in jax.grad(third, (0, 1))(h, padded):
        assert np.all(np.isfinite(gradient))
    assert not np.any(jax.grad(third, 1)(h, padded)[V:])
    bad = quadratic_cross_entropy(h.at[1, 0].set(nan).at[2, 1].set(inf), w, jnp.asarray(Y), phi=phi)
    np.testing.assert_array_equal(np.isnan(bad), [False, True, True, False])
    empty = quadratic_cross_entropy(h, w, jnp.asarray(Y), where=jnp.zeros(V, bool), phi=phi)
    np.testing.assert_array_equal(empty, 0)


@pytest.mark.parametrize("dtype", some([jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64], [jnp.bfloat16]))
def test_dtypes_under_strict_promotion_and_debug_nans(dtype):
    with jax.enable_x64(dtype == jnp.float64), strict_promotion(), jax.debug_nans(True):
        h, w, b = (jnp.asarray(a, dtype) for a in (H, W, B))
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        for labels in (jnp.asarray(Y, jnp.int8), jnp.asarray(Y, jnp.uint32)):
            for phi in PHIS:
                got = quadratic_cross_entropy(h, w, labels, b, where=jnp.asarray(KEEP), phi=phi)
                scores = (h.astype(wide) @ w.astype(wide).T) + b.astype(wide)[None]
                where = jnp.broadcast_to(KEEP, scores.shape)
                assert got.dtype == wide
                np.testing.assert_allclose(got, losses.cross_entropy(scores, labels, where=where, phi=phi), rtol=2e-6)
        assert jax.grad(lambda w: jnp.sum(quadratic_cross_entropy(h, w, labels, phi=PHIS[0])))(w).dtype == dtype


def test_labels_of_any_width():
    """More classes than the labels' dtype can count."""
    w = jnp.cos(jnp.arange(900.0)).reshape(300, 3)
    narrow = quadratic_cross_entropy(w[:3], w, jnp.array([127, 3, 100], jnp.int8), phi=js.taylor(2))
    np.testing.assert_array_equal(narrow, quadratic_cross_entropy(w[:3], w, jnp.array([127, 3, 100]), phi=js.taylor(2)))


def test_learned_phi_compiles_once():
    h, w, y = jnp.float32(H), jnp.float32(W), jnp.asarray(Y)
    count = []

    @jax.jit
    def f(epsilon):
        count.append(1)
        return quadratic_cross_entropy(h, w, y, phi=js.spherical(epsilon)).sum()

    slope = (f(0.51) - f(0.49)) / 0.02
    np.testing.assert_allclose(jax.grad(f)(0.5), slope, rtol=1e-3)
    assert len(count) == 1


# --- the φ ---------------------------------------------------------------------------------------------------


def test_the_three_numbers():
    assert js.taylor(2).quadratic == (1.0, 1.0, 0.5)
    assert js.spherical(0.3).quadratic == (0.3, 0.0, 1.0)
    assert js.quadratic(1, 0, 2).quadratic == (1.0, 0.0, 2.0)
    assert js.exp.quadratic is None
    assert js.taylor(4).quadratic is None


def test_quadratic_is_taylor_and_spherical():
    z = jnp.float32([-3.0, -1.0, -1e-8, 0.0, 1e-8, 0.3, 2.0, 1e19, -3e38])
    for ours, theirs in ((js.quadratic(1, 1, 0.5), js.taylor(2)), (js.quadratic(0.1, 0, 1), js.spherical(0.1))):
        for order in (lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))):
            got, want = jax.vmap(order(ours.log))(z), jax.vmap(order(theirs.log))(z)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("numbers", [(1.0, 2.0, 1.0001), (1.0, -2.0, 1.0001), (3e4, 1.0, 1e-4), (1e-4, -0.9, 3e3)])
def test_quadratic_near_its_edge(numbers):
    """Where a1² is nearly 4 a0 a2 the lowest scores lose digits, as the docstring says, and no others."""
    phi = verify.rounded(js.quadratic(*numbers))
    z = np.float32(np.linspace(-20, 20, 4001))
    want = np.log(phi.definition(np.longdouble(z), np))
    assert np.max(np.abs(phi.log(z) - np.float64(want)) / np.maximum(np.abs(want), 1)) < 3e-5


# --- wrong calls ---------------------------------------------------------------------------------------------


def call(*args, phi=PHIS[0], **options):
    given = list(args) + [H, W, Y][len(args) :]
    return inspect.unwrap(quadratic_cross_entropy)(*given, phi=phi, **options)


NAME = "quadratic_cross_entropy: "
WRONG = [  # call, error, what the message says
    (
        lambda: call(phi=js.taylor(4)),
        ValueError,
        NAME + "phi must be of the second order",
        "taylor(4)",
        "linear_cross_entropy",
    ),
    (lambda: call(phi=js.exp), ValueError, NAME + "phi must be of the second order", "got exp", "cross_entropy"),
    (lambda: call(phi=js.taylor), TypeError, NAME + "phi must be a φ"),
    (lambda: call(phi=js.spherical(jnp.ones(V))), ValueError, NAME + "phi", "one number for all classes", "(11,)"),
    (lambda: call(Y), TypeError, NAME + "hidden must be floating", "int64|int32"),
    (lambda: call(np.float32(1)), ValueError, NAME + "hidden must have shape [..., d]", "()"),
    (lambda: call(H, W.T), ValueError, NAME + "hidden must end with the width 11", "(4, 3)", "transpose"),
    (lambda: call(H, W[0]), ValueError, NAME + "weight must have shape [V, d]", "(3,)"),
    (lambda: call(H, W[:0]), ValueError, NAME + "weight must have shape", "(0, 3)"),
    (lambda: call(H, W, H), TypeError, NAME + "labels must be integers", "astype(int)"),
    (lambda: call(H, W, Y[:2]), ValueError, NAME + "labels must have the shape", "(4,)", "(2,)"),
    (lambda: call(H, W, Y[:, None]), ValueError, NAME + "labels", "labels.reshape(4,)"),
    (lambda: call(H, W, Y, B[:2]), ValueError, NAME + "bias must have one entry for each class", "(11,)", "(2,)"),
    (lambda: call(H, W, Y, Y), TypeError, NAME + "bias must be floating"),
    (lambda: call(where=Y), TypeError, NAME + "where must be boolean", "mask > 0"),
    (lambda: call(where=KEEP[:2]), ValueError, NAME + "where must have one entry for each class", "rows of the weight"),
    (lambda: call([[1.0]]), TypeError, NAME + "hidden must be an array", "jnp.asarray(hidden)"),
    (lambda: js.quadratic(1.0, 2.0, 1.0), ValueError, "quadratic: a0, a1, a2 must have a1² < 4 a0 a2", "above a1²"),
    (lambda: js.quadratic(0.0, 0.0, 1.0), ValueError, "quadratic: a0 must be > 0", "got 0"),
    (lambda: js.quadratic(1.0, float("inf"), 1.0), ValueError, "quadratic: a1 must be finite"),
    (lambda: js.quadratic(1.0, 0.0, -1.0), ValueError, "quadratic: a2 must be > 0", "got -1"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_wrong_calls(wrong):
    f, error, *says = wrong
    with pytest.raises(error) as raised:
        f()
    for text in says:
        assert any(part in str(raised.value) for part in text.split("|")), raised.value
