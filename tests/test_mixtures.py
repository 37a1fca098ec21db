"""Mixtures, sinks and temperatures against their definitions; digits, edges, wrong calls."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, some
from interpreter import evaluated

import jsoftmax as js
from jsoftmax import verify

nan, inf = jnp.nan, jnp.inf


def scores(*shape, seed=0, scale=2.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape))


def test_mixture_is_defined_by_its_two_lines():
    with jax.enable_x64(True):
        z, logits, f = scores(2, 3, 4, 5), scores(2, 3, 4, seed=1), js.mixture_log_softmax

        @evaluated
        def pairs(z, logits):
            made = []
            for phi in (js.exp, js.spherical(0.1)):
                p = jnp.sum(jax.nn.softmax(logits)[..., None] * js.softmax(z, phi=phi), -2)
                got, swapped = f(z, logits, phi=phi), f(jnp.swapaxes(z, -1, -2), logits, axis=-2, phi=phi)
                made += [(got, jnp.log(p)), (swapped, got)]
            first = jnp.moveaxis(f(jnp.moveaxis(z, -1, 0), logits, axis=0), 0, -1)
            return *made, (first, f(z, logits)), (f(z[..., :1, :], logits[..., :1]), js.log_softmax(z[..., 0, :]))

        for found, want in pairs(z, logits):
            np.testing.assert_allclose(found, want, rtol=1e-12)
    assert jax.eval_shape(f, z.astype(jnp.bfloat16), logits).dtype == jnp.bfloat16


def test_derivatives_of_a_mixture():
    """In the scores and in the mixture's logits."""

    def plain(z, logits):
        return jnp.log(jnp.sum(jax.nn.softmax(logits)[..., None] * jax.nn.softmax(z), -2))

    with jax.enable_x64(True):
        given = scores(2, 3, 4), scores(2, 3, seed=1)
        ours, theirs = (
            evaluated(lambda *given, f=f: jax.jvp(jax.jacrev(f, (0, 1)), given, given))(*given)
            for f in (js.mixture_log_softmax, plain)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_mixture_keeps_digits_and_edges():
    z = jnp.array([[0.0, -20.0], [0.0, -18.0]])
    xp = verify.ManyDigits()
    p = [1 / (1 + xp.mp.exp(-20)), 1 / (1 + xp.mp.exp(-18))]
    want = float(xp.mp.log((p[0] + p[1]) / 2))
    equal, f = np.zeros(2, np.float32), jax.jit(js.mixture_log_softmax)
    np.testing.assert_allclose(f(z, equal)[0], want, rtol=1e-6)
    impossible = np.float32([[-inf, 0.0, 1.0], [-inf, -inf, 0.0]])
    out = f(impossible, equal)
    assert out[0] == -inf
    assert np.all(np.isfinite(out[1:]))
    assert np.all(np.isfinite(jax.jit(jax.jacrev(js.mixture_log_softmax))(impossible, equal)))
    for bad in (nan, inf):
        assert np.all(np.isnan(f(np.float32([[bad, -20.0], [0.0, -18.0]]), equal)))


def test_sink_is_a_class_that_is_dropped():
    z, sink = scores(3, 5), scores(3, 1, seed=1)

    @evaluated
    def results(z, sink):
        def extended(z, sink):
            return js.softmax(jnp.concatenate([z, jnp.broadcast_to(sink, (3, 1))], -1))[:, :-1]

        both = js.sink_softmax, extended
        return [[f(z, s) for f in both] for s in (0.0, sink, -3.0)], [jax.jacrev(f, (0, 1))(z, sink) for f in both]

    values, jacobians = results(z, sink)
    for ours, theirs in values:
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for a, b in zip(*jacobians, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    with jax.default_device(jax.devices("cpu")[0]):  # elsewhere two programs may differ by an ulp
        np.testing.assert_allclose(js.sink_softmax(z, -inf), js.softmax(z))
    np.testing.assert_allclose(js.sink_softmax(z.T, sink.T, axis=0).T, js.sink_softmax(z, sink), rtol=1e-6)
    keep = jnp.array([True, False, True, True, False])
    np.testing.assert_allclose(js.sink_softmax(z, where=keep)[:, keep], js.sink_softmax(z[:, keep]), rtol=1e-6)


def test_sink_edges():
    z = jnp.array([[-inf, -inf], [500.0, 400.0], [-500.0, -400.0], [nan, 0.0], [inf, 0.0]])
    for sink in (0.0, -inf):
        p = js.sink_softmax(z, sink)
        np.testing.assert_array_equal(p[0], 0)
        np.testing.assert_allclose(p[1], [1, 0], atol=1e-7)
        assert np.all(np.isnan(p[3:]))
        gradient = jax.vjp(lambda z, s=sink: js.sink_softmax(z, s), z)[1](jnp.ones_like(z))[0]
        assert np.all(np.isfinite(gradient[:3]))
        assert np.all(np.isnan(gradient[3:]))
    np.testing.assert_array_equal(js.sink_softmax(z, 0.0)[2], 0)


PHIS = (js.exp, js.spherical(0.1), js.taylor(2), js.relu_power(2, 0.1))
"""φ enters by the entropy and its derivative, which `python -m jsoftmax verify` has of every φ."""


@pytest.mark.parametrize("phi", some(PHIS, PHIS[:2]), ids=str)
def test_temperature(phi):
    """It gives the wanted entropy, and the derivatives of the function that it inverts."""
    with jax.enable_x64(True):
        z = jnp.clip(scores(3, 12, scale=0.7), -1.5, 1.8)
        t, v = jnp.array([0.95, 1.3, 4.0]), jnp.cos(z)

        def round_trip(z, t):
            return js.temperature_for_entropy(z, js.entropy(z / t[:, None], phi=phi), phi=phi)

        @evaluated
        def checked(z, t):
            target = js.entropy(z / t[:, None], phi=phi)
            got = js.temperature_for_entropy(z, target, phi=phi)

            def along(t):
                return jax.jvp(lambda z: round_trip(z, t), (z,), (v,))[1]

            by_z, by_z_and_t = jax.jvp(along, (got,), (jnp.ones(3),))
            by_t = jax.jvp(lambda t: round_trip(z, t), (got,), (got,))[1]
            return got, js.entropy(z / got[:, None], phi=phi) / target, by_z, by_z_and_t, by_t

        got, ratio, by_z, by_z_and_t, by_t = checked(z, t)
        np.testing.assert_allclose(ratio, 1, rtol=1e-12)
        if phi in (js.exp, js.sigsoftmax, js.softplus):  # one solution only
            np.testing.assert_allclose(got, t, rtol=1e-9)
        np.testing.assert_allclose(by_z, 0, atol=1e-9)
        np.testing.assert_allclose(by_z_and_t, 0, atol=1e-7)
        np.testing.assert_allclose(by_t, got, rtol=1e-9)


def test_temperature_in_a_scan_at_order_two():
    with jax.enable_x64(True):
        z = scores(2, 6)

        def total(z):
            return js.temperature_for_entropy(z, 0.8)

        def scanned(z):
            return jax.lax.scan(lambda c, row: (c + total(row), None), 0.0, z)[0]

        @evaluated
        def results(z):
            got = jax.jvp(jax.grad(scanned), (z,), (jnp.cos(z),))[1]
            return got, jnp.stack([jax.jvp(jax.grad(total), (row,), (jnp.cos(row),))[1] for row in z])

        got, want = results(z)
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


@jax.jit
def temperature_and_slope(z, target):
    return js.temperature_for_entropy(z, target), jax.grad(lambda g: js.temperature_for_entropy(z, g).sum())(target)


@pytest.mark.parametrize("target", some([1e-8, 1e-4, 0.1, 1.0, 3.0, 3.9], [1e-8, 0.1, 3.9]))
def test_temperature_reaches_small_and_large_entropies(target):
    z = np.float32(scores(50, 50, scale=3))
    t, slope = map(np.asarray, temperature_and_slope(z, target))
    # z/t is rounded to |z/t| ulp, and so is a small entropy
    reached = np.asarray(js.entropy(z / t[:, None]))
    slack = 4e-7 * (4 + np.abs(z / t[:, None]).max(-1))
    assert np.all(np.abs(reached / target - 1) <= slack)
    assert np.all(slope > 0)


LIMITS = and_full(
    [(js.taylor(2), [4.0, 1.0, 9.0]), (js.relu_power(2, 0.1), [0.0, 1.0, 9.0])],
    [
        (js.taylor(4), [16.0, 1.0, 81.0]),
        (js.spherical(0.1), [4.0, 1.0, 9.0]),
        (js.softplus, [0.0, 1.0, 3.0]),
        (js.elu1, [0.0, 1.0, 3.0]),
    ],
)
"""By default one that grows on both sides, and one that is 0 on one."""


@pytest.mark.parametrize(("phi", "limit"), LIMITS, ids=str)
def test_temperature_is_found_between_the_limits_of_the_entropy(phi, limit):
    """Those of the docstring: powers of the scores for t → 0, log K for t → ∞."""
    with jax.enable_x64(True):
        low = js.entropy(jnp.log(jnp.array(limit)))
        found = js.temperature_for_entropy(
            jnp.array([[-2.0, 1.0, 3.0]] * 4),
            jnp.array([low * 0.999, low * 1.001, np.log(3) * 0.999, np.log(3) * 1.001]),
            phi=phi,
        )
        assert np.isfinite(found).tolist() == [False, True, True, False]


def test_temperature_edges():
    f = js.temperature_for_entropy

    @evaluated
    def results(z):
        masked, of_columns = f(z[:1], 0.5, where=jnp.array([True, False, True])), f(z[4:5].T, 0.5, axis=0)
        of_targets, out_of_reach = f(z, jnp.array([0.69, 0.5, 0.5, 0.5, 0.5, 0.5])), (f(z[0], 1.2), f(z[0], 0.0))
        return of_targets, out_of_reach, masked, of_columns, jax.grad(lambda z: f(z, 0.5))(z[4])

    z = np.float32([[1, 1, 0], [0, 0, 0], [1, nan, 0], [1, inf, 0], [1, 0, -inf], [-inf] * 3])
    got, out_of_reach, masked, of_columns, gradient = jax.tree.map(np.asarray, results(z))
    np.testing.assert_array_equal(np.isfinite(got), [False, False, False, False, True, False])
    assert np.all(np.isnan(out_of_reach))
    np.testing.assert_allclose(masked, got[4], rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    assert gradient[2] == 0
    np.testing.assert_allclose(of_columns, got[4], rtol=1e-6)
    assert jax.eval_shape(lambda z: f(z, 0.8), jnp.bfloat16(z)).dtype == jnp.float32


raw = inspect.unwrap
WRONG = [
    (
        lambda: raw(js.mixture_log_softmax)(np.zeros(3), np.zeros(1)),
        ValueError,
        "z must have one class axis and one of",
    ),
    (lambda: raw(js.mixture_log_softmax)(np.zeros((2, 3)), np.zeros(3)), ValueError, "mixture_logits must broadcast"),
    (
        lambda: raw(js.sink_softmax)(np.zeros((2, 3)), np.zeros(3)),
        ValueError,
        "sink must be one number, or one for each",
    ),
    (lambda: raw(js.temperature_for_entropy)(np.zeros((2, 3)), np.zeros(3)), ValueError, "target must be a number or"),
    (lambda: raw(js.temperature_for_entropy)(np.zeros((2, 3)), None), TypeError, "target must be an array or a number"),
    (lambda: raw(js.temperature_for_entropy)(np.zeros(3), 1, phi=jnp.exp), TypeError, "phi must be a φ"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert says in str(caught.value)
