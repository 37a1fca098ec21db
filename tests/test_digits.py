"""MATH 4: float32 and float64 results against many digits, in units in the last place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jsoftmax
from jsoftmax import verify

XP = verify.ManyDigits()


def exact(z):
    """u, p, l, L, H and ∇H of one row, with many digits."""
    z = XP.array(z)
    u = z - max(z)
    rest = sum(sorted(np.delete(XP.exp(u), np.argmax(z))))
    log_total = XP.mp.log1p(rest)
    log_p, p = u - log_total, XP.exp(u) / (1 + rest)
    H = log_total - sum(p * u)
    return {"u": u, "p": p, "l": log_p, "L": max(z) + log_total, "H": H, "gradient": -p * (log_p + H)}


def ulp(x, dtype):
    return np.abs(np.float64(np.spacing(np.abs(np.array(x, np.float64)).astype(dtype))))


def rows(dtype, exact_differences):
    """Rows of many kinds from a seeded generator: uniform, wide, almost one-hot, tied, long, shifted."""
    rng = np.random.default_rng(20)
    made = []
    for classes in (2, 3, 8, 60, 257, 300, 1000, 2048, 2100):
        for scale, gap in ((0.1, 0), (1, 0), (10, 0), (0.1, 12), (1, 20), (2, 40), (3, 60)):
            z = rng.normal(0, scale, classes)
            z[rng.integers(classes)] = z.max() + gap
            if classes > 3:
                z[rng.integers(classes)] = z[rng.integers(classes)]
            shift = 0 if scale == 1 else rng.normal(0, 30)
            made.append(np.round(z * 256) / 256 if exact_differences else z + shift)
    return [z.astype(dtype) for z in made]


@pytest.mark.parametrize("exact_differences", [True, False], ids=["exact u", "rounded u"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds(dtype, exact_differences):
    tiny = np.finfo(dtype).tiny
    with jax.enable_x64(dtype == np.float64):
        for z in rows(dtype, exact_differences):
            want = exact(z)
            # what rounding x − max x costs: |u| ulp in e^u, so its mean under e^u in rest, and under e^u |u| in H
            u, others = np.abs(want["u"].astype(float)), want["u"] < 0
            mean = (
                [np.average(u[others], weights=np.exp(-u[others]) * u[others] ** k) for k in (0, 1)]
                if any(others)
                else [0, 0]
            )
            slack = {"p": u, "l": np.maximum(u, mean[0]), "H": mean[1], "gradient": mean[1]}
            slack = {name: 0 * value if exact_differences else value for name, value in slack.items()}
            p, log_p = np.asarray(jsoftmax.softmax(z)), np.asarray(jsoftmax.log_softmax(z))
            normal = want["p"] > 1e3 * tiny
            for name, got in (("p", p), ("l", log_p)):
                error = np.abs((XP.array(got) - want[name]).astype(float)) / ulp(want[name].astype(float), dtype)
                worst = np.where(normal, error - slack[name], 0).max()
                assert worst <= 4, (name, len(z), worst)
            H, L = float(jsoftmax.entropy(z)), float(jsoftmax.log_normalizer(z))
            if want["H"] > 1e3 * tiny:
                assert abs(float(XP.mp.mpf(H) - want["H"])) / ulp(float(want["H"]), dtype) <= 4 + slack["H"], len(z)
            scale = max(abs(float(max(z))), abs(float(want["L"])))
            if scale > tiny:
                assert abs(float(XP.mp.mpf(L) - want["L"])) / ulp(scale, dtype) <= 4, len(z)
            gradient = np.asarray(jax.grad(jsoftmax.entropy)(z))
            largest = np.abs(want["gradient"].astype(float)).max()
            if largest > 1e3 * tiny:
                error = np.abs((XP.array(gradient) - want["gradient"]).astype(float)).max() / ulp(largest, dtype)
                assert error <= 4 + slack["gradient"], ("gradient", len(z), error)


def test_these_rows_are_hard():
    """The plain forms fail the bounds on these rows, by far."""
    worst = 0.0
    for z in rows(np.float32, True):
        want = float(exact(z)["H"])
        p = jax.nn.softmax(z)
        plain = float(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)))
        worst = max(worst, abs(plain - want) / ulp(want, np.float32))
    assert worst > 1e4


def test_small_answers():
    z = jnp.array([0.0, -20.0])
    np.testing.assert_allclose(-jsoftmax.log_softmax(z)[0], 2.0611536e-9, rtol=1e-6)
    np.testing.assert_allclose(jsoftmax.entropy(z), 4.328422807e-8, rtol=1e-6)
    assert jsoftmax.entropy(jnp.array([5.0])) == 0


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_small_divergences(gap):
    """D is of second order in the gap: the plain sum of p (log p − log q) loses it in float32."""
    z_p = np.array([0.25, -1.5, 0.75, 0.0], np.float32)
    z_q = (z_p + np.float32(gap) * np.array([1, -1, 0.5, 0], np.float32)).astype(np.float32)
    want = float(verify.plain_kl(jsoftmax.exp, XP, XP.array(z_p), XP.array(z_q)))
    np.testing.assert_allclose(jsoftmax.kl_divergence(z_p, z_q), want, rtol=1e-6 / gap)
    assert jsoftmax.kl_divergence(z_p, z_p) == 0


@pytest.mark.parametrize("scale", [5, 40, 160, 640])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_scores_lose_only_the_last_rounding(dtype, scale):
    z = jnp.asarray(np.random.default_rng(scale).normal(0, scale, (8, 1000)), dtype)
    wide = np.asarray(z, np.float32)
    half = float(jnp.finfo(dtype).eps)
    p = jsoftmax.softmax(z)
    assert p.dtype == dtype
    np.testing.assert_allclose(np.float32(p), jsoftmax.softmax(wide), rtol=half, atol=1e-7)
    np.testing.assert_allclose(np.float32(jsoftmax.log_softmax(z)), jsoftmax.log_softmax(wide), rtol=half, atol=1e-7)
    for f in (jsoftmax.entropy, jsoftmax.varentropy, jsoftmax.log_normalizer):
        assert f(z).dtype == jnp.float32
        np.testing.assert_array_equal(f(z), f(wide))
    gradient = jax.grad(lambda z: jsoftmax.entropy(z).sum())
    assert gradient(z).dtype == dtype
    np.testing.assert_allclose(np.float32(gradient(z)), gradient(wide), rtol=half, atol=1e-7)
