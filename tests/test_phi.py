"""φ: closed forms over the whole float range, parameters, edges, user's callables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import covering
from compilation import jit_as_user
from interpreter import evaluated

import jsoftmax as js
from jsoftmax import _series, gumbel, heads, verify
from jsoftmax import phi as phi_room

MORE = (js.taylor(6), js.taylor(8), js.q_exponential(1.0001), js.relu_power(3, 0.1), js.relu_power(1.0, 1.0))
BUILT_IN = [phi for phi in (*js.PHIS, *MORE) if phi.name != "from_callable"]
MAGNITUDES = [1e-30, 1e-20, 1e-8, 1e-4, 0.01, 0.1, 0.3, 0.49, 0.51, 0.99, 1.01, 1.5, 2.5, 3, 5, 8, 12, 20, 50, 100]
MAGNITUDES += [1e3, 1e5, 1e10, 1e18, 1e30]
ORDERS = (jax.grad, jax.hessian)


@pytest.mark.parametrize("phi", BUILT_IN, ids=str)
def test_closed_forms_over_the_whole_range(phi):
    """ψ to 20 ulp of max(|ψ|, 1), s and t to 40 ulp; results below the smallest normal number excepted."""
    xp = verify.ManyDigits()
    xp.mp.dps, tiny = 400, np.finfo(np.float32).tiny
    rounded, (low, high) = verify.rounded(phi), phi.domain
    z = np.array([sign * m for m in MAGNITUDES for sign in (1, -1)], np.float32)
    z = z[(z > low + 1e-3) & (z < high - 1e-3)]
    forms = [np.float64(f(phi, jnp.asarray(z))) for f in (phi_room.log_phi, phi_room.slope, phi_room.curvature)]

    def psi(x):
        return xp.mp.log(rounded.definition(np.array([x], object), xp)[0])

    for i, value in enumerate(z):
        x = xp.mp.mpf(float(value))
        h = abs(x) * xp.mp.mpf(10) ** -30
        below, here, above = psi(x - h), psi(x), psi(x + h)
        wants = (here, (above - below) / (2 * h), (above - 2 * here + below) / h**2)
        for name, form, want, ulps in zip("ψst", forms, map(float, wants), (20, 40, 40), strict=True):
            scale = max(abs(want), 1) if name == "ψ" else abs(want)
            if abs(want) > tiny:
                assert abs(form[i] - want) <= ulps * 1.2e-7 * scale, (name, value, form[i], want)
            else:
                assert abs(form[i]) <= 2 * tiny, (name, value)


@pytest.mark.parametrize(("order", "bound"), [(2, 2e-6), (4, 2e-6), (8, 7e-6), (12, 6e-5), (16, 5e-4)])
def test_digits_of_taylor(order, bound):
    """What taylor's docstring says of negative scores."""
    z = np.linspace(-30, 0, 100001, dtype=np.float32)
    want = np.log(js.taylor(order).definition(np.longdouble(z), np))
    assert np.max(np.abs(js.taylor(order).log(z) - np.float64(want))) <= bound


def test_relu_itself_has_finite_curvature():
    """m = 1 at the smallest scores, where 1/z nearly overflows."""
    z = jnp.array([2e-38, 0.5, 0.0])
    hessian = jit_as_user(jax.hessian(lambda z: js.entropy(z, phi=js.relu_power(1.0, 0.1))))(z)
    assert np.all(np.isfinite(hessian))


def test_the_slope_of_a_sigmoid_near_one_keeps_its_digits():
    """The slope is computed as σ(z) σ(−z), where σ rounds to 1 in float32."""
    np.testing.assert_allclose(jax.grad(_series.sigmoid)(jnp.array(20.0)), np.exp(-20.0), rtol=1e-6)


HARD_ROWS = [[-90.0, -95.0, -110.0], [5.0, -120.0, 0.0], [-100.0, -100.0, -101.0], [300.0, -9e3, 0.0]]


@pytest.mark.parametrize("phi", [js.sigsoftmax, js.softplus, js.taylor(2), js.taylor(4), js.spherical(0.1)], ids=str)
def test_rows_where_published_forms_are_nan(phi):
    xp = verify.ManyDigits()

    @jax.jit
    def found(row):
        derivatives = [d(lambda z, f=f: f(z, phi=phi))(row) for f in (js.entropy, js.log_normalizer) for d in ORDERS]
        return js.softmax(row, phi=phi), derivatives

    for row in HARD_ROWS:
        p, derivatives = found(jnp.array(row))
        want = verify.plain_softmax(verify.rounded(phi), xp, xp.array(np.float32(row))).astype(float)
        np.testing.assert_allclose(p, want, rtol=3e-5, atol=1e-37, err_msg=str(row))
        for derivative in derivatives:
            assert np.all(np.isfinite(derivative)), row


@pytest.mark.parametrize(("function", "phi"), covering(verify.FUNCTIONS, js.PHIS, met=[(0, 1)]), ids=str)
def test_law(function, phi):
    """f(z, phi=φ) == f(φ.log(z)); the expansion is a function of the scores themselves."""
    z = jnp.asarray(verify.scores(function, phi))
    if function.name == "entropy_expansion":
        np.testing.assert_allclose(function.ours(z[0], 0 * z[1], phi=phi), js.entropy(phi.log(z[0])), rtol=1e-6)
    else:
        np.testing.assert_allclose(function.ours(*z, phi=phi), function.ours(*phi.log(z)), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("phi", js.PHIS, ids=str)
def test_edges(phi):
    bad = np.float32([-np.inf, np.inf, np.nan])

    @evaluated
    def results(bad, z):
        rates = jax.grad(phi)(z), phi(z) * jax.grad(phi.log)(z)
        return phi.log(bad), phi.log(jnp.ones(3, jnp.bfloat16)), (phi(z), jnp.exp(phi.log(z))), rates

    of_bad, narrow, values, rates = results(bad, np.float32(0.5))
    np.testing.assert_array_equal(of_bad, bad)
    assert narrow.dtype == jnp.bfloat16
    assert phi(1).dtype == jnp.float32
    np.testing.assert_allclose(*values, rtol=1e-6)
    np.testing.assert_allclose(*rates, rtol=1e-5)


def test_zeros_and_domain():
    phi = js.q_exponential(0.5)
    z = jnp.array([-2.5, -2.0, 0.0, 1.0])
    np.testing.assert_array_equal(js.softmax(z, phi=phi)[:2], 0)
    np.testing.assert_array_equal(js.log_softmax(z, phi=phi)[:2], -jnp.inf)

    @evaluated
    def of_all(z):
        functions = [functools.partial(f, phi=phi) for f in (js.entropy, js.varentropy, js.log_normalizer)]
        return [(jax.value_and_grad(f)(z), jax.value_and_grad(f)(z[2:]), jax.hessian(f)(z)) for f in functions]

    for (got, gradient), (want, of_others), hessian in of_all(z):
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(gradient, jnp.r_[0, 0, of_others], atol=1e-7)
        np.testing.assert_array_equal(hessian[:2], 0)
    outside = js.softmax(jnp.array([[2.0, 0.0], [1.9, 0.0]]), phi=js.q_exponential(1.5))
    assert np.all(np.isnan(outside[0]))
    assert np.all(np.isfinite(outside[1]))


def test_q_is_smooth_through_one():
    z = jnp.array([-1.0, 0.3, 0.9])
    np.testing.assert_allclose(js.softmax(z, phi=js.q_exponential(1.0)), jax.nn.softmax(z), rtol=1e-6)
    with jax.enable_x64(True):
        z = jnp.asarray(z, jnp.float64)

        def entropy(q):
            return js.entropy(z, phi=js.q_exponential(q))

        f, first, second = map(evaluated, (entropy, jax.grad(entropy), jax.grad(jax.grad(entropy))))
        np.testing.assert_allclose(first(1.0), (f(1 + 1e-5) - f(1 - 1e-5)) / 2e-5, rtol=1e-8)
        second = second(1.0)
        np.testing.assert_allclose(second, (f(1 + 1e-3) - 2 * f(1.0) + f(1 - 1e-3)) / 1e-6, rtol=1e-4)


def test_phi_is_a_value():
    assert js.taylor(2) == js.taylor(2)
    assert js.taylor(2) != js.taylor(4)
    assert hash(js.spherical(0.1)) == hash(js.spherical(0.1))
    assert {js.exp: 1}[js.exp] == 1
    assert str(js.relu_power(2, 0.1)) == "relu_power(2, 0.1)"
    assert len(set(map(str, js.PHIS))) == len(js.PHIS)


def test_structures_tell_classes_apart():
    """JAX keeps compiled programs by the structure of arguments, so two classes must not compare equal."""
    every = [*js.PHIS, js.taylor(6)]
    structures = [jax.tree.structure(phi) for phi in every]
    for i, a in enumerate(every):
        for j, b in enumerate(every):
            alike = type(a) is type(b) and str(a).split("(")[0] != "taylor"
            assert (structures[i] == structures[j]) == (i == j or alike), (a, b)
    assert jax.tree_util.tree_leaves_with_path(js.spherical(0.5)) == [((jax.tree_util.GetAttrKey("epsilon"),), 0.5)]


def quartic(shape, z):
    return shape[0] + shape[1] * z**4


def test_callables():
    z = jnp.array([-1.0, 0.5, 2.0])
    shape = jnp.array([0.5, 2.0])
    learned = js.from_callable(jax.tree_util.Partial(quartic, shape))
    w = quartic(shape, z)
    np.testing.assert_allclose(js.softmax(z, phi=learned), w / w.sum(), rtol=1e-6)

    def plain(shape):
        p = quartic(shape, z) / quartic(shape, z).sum()
        return -jnp.sum(p * jnp.log(p))

    by_phi = jax.grad(lambda phi: js.entropy(z, phi=phi))(learned)
    np.testing.assert_allclose(by_phi.of_phi.args[0], jax.grad(plain)(shape), rtol=1e-4)
    by_log = js.from_callable(log_phi=lambda z: jnp.log(quartic(shape, z)))
    np.testing.assert_allclose(js.entropy(z, phi=by_log), js.entropy(z, phi=learned), rtol=1e-6)


class Lifted:
    def __init__(self, epsilon):
        self.epsilon = epsilon

    def __call__(self, z):
        return z**2 + self.epsilon


def test_traced_values_must_be_parameters():
    """If a function closed over them, their derivatives would silently be 0."""
    z = jnp.array([0.3, -0.7, 1.1])

    def through_a_helper(epsilon):
        def helper(z):
            return z**2 + epsilon

        return lambda z: 1.0 * helper(z)

    hidden = (
        through_a_helper,
        lambda epsilon: jax.jit(through_a_helper(epsilon)),
        lambda epsilon: Lifted(epsilon).__call__,
        lambda epsilon: lambda z: z**2 + epsilon,
        lambda epsilon: functools.partial(lambda epsilon, z: z**2 + epsilon, epsilon),
        Lifted,
    )
    for make in hidden:

        def f(epsilon, make=make):
            return js.entropy(z, phi=js.from_callable(make(epsilon)))

        np.testing.assert_allclose(f(0.1), js.entropy(z, phi=js.spherical(0.1)), rtol=1e-6)
        for transformed in (jax.grad(f), jax.jit(jax.grad(f)), jax.jit(f)):
            with pytest.raises(TypeError, match="must not close over traced values"):
                transformed(0.1)
    by_parameter = jax.grad(
        lambda epsilon: js.entropy(z, phi=js.from_callable(jax.tree_util.Partial(lambda e, z: z**2 + e, epsilon)))
    )
    np.testing.assert_allclose(
        by_parameter(0.1), jax.grad(lambda e: js.entropy(z, phi=js.spherical(e)))(0.1), rtol=1e-5
    )


def test_given_slope_and_curvature_are_used():
    lying = js.from_callable(log_phi=lambda z: z, slope=lambda z: 3 + 0 * z, curvature=lambda z: 5 + 0 * z)
    assert jax.grad(lying.log)(1.0) == 3
    assert jax.grad(jax.grad(lying.log))(1.0) == 5


def test_broken_promises_stay_in_their_row():
    phi = js.from_callable(lambda z: z)  # negative for negative scores, 0 at 0
    p = js.softmax(jnp.array([[-1.0, 2.0], [0.0, 2.0]]), phi=phi)
    assert np.all(np.isnan(p[0]))
    np.testing.assert_array_equal(p[1], [0, 1])


def test_per_row_parameters():
    z = jnp.arange(6.0).reshape(2, 3)
    got = jax.vmap(lambda z, e: js.entropy(z, phi=js.spherical(e)))(z, jnp.array([0.1, 2.0]))
    want = [js.entropy(row, phi=js.spherical(e)) for row, e in zip(z, (0.1, 2.0), strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    per_class = js.softmax(z[0], phi=js.spherical(jnp.array([0.1, 1.0, 2.0])))
    np.testing.assert_allclose(per_class, [0.1 / 8.1, 2 / 8.1, 6 / 8.1], rtol=1e-5)


def test_parameters_that_are_arrays():
    """They broadcast to all scores; what computes scores in blocks takes single numbers."""
    z, h = jnp.zeros((3, 4)), jnp.ones((3, 2))
    of_rows, of_classes = js.q_exponential(jnp.full((3, 1), 0.9)), js.q_exponential(jnp.full(4, 0.9))
    for phi in (of_rows, of_classes):
        np.testing.assert_allclose(js.softmax(z, phi=phi), 0.25, rtol=1e-6)
    wrong = js.q_exponential(jnp.full(3, 0.9))
    for f in (js.softmax, functools.partial(gumbel.categorical, jax.random.key(0))):
        with pytest.raises(ValueError, match=r"q_exponential: q must .* \(3, 4\); got shape \(3,\).* q\[..., None\]"):
            f(z, phi=wrong)
    labels, params = jnp.zeros(3, int), heads.adaptive.init(jax.random.key(0), 2, 4, (2,), div_value=2)
    for name, f in {
        "linear_cross_entropy": lambda phi: heads.linear_cross_entropy(h, jnp.ones((4, 2)), labels, phi=phi),
        "linear_statistics": lambda phi: heads.linear_statistics(h, jnp.ones((4, 2)), labels, phi=phi),
        "sampled_cross_entropy": lambda phi: heads.sampled_cross_entropy(
            jax.random.key(0), h, jnp.ones((4, 2)), labels, 2, log_proposal=jnp.zeros(4), phi=phi
        ),
        "log_prob": lambda phi: heads.adaptive.log_prob(params, h, labels, phi=phi),
        "dot_product_attention": lambda phi: js.attention.dot_product_attention(*[jnp.ones((3, 2, 4))] * 3, phi=phi),
    }.items():
        for phi in (of_rows, of_classes):
            with pytest.raises(ValueError, match=rf"{name}: the parameters of phi must be single .* q of shape .*vmap"):
                f(phi)
