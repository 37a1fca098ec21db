"""MATH 4: float32 and float64 results against many digits, in units in the last place."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, some
from compilation import jit_as_user

import jsoftmax
from jsoftmax import verify

XP = verify.ManyDigits()
XP.mp.dps = 40  # no differences are taken here


class Float64:
    """float64 as a namespace, with sums by math.fsum. It has digits enough for what is compared in float32."""

    array, exp, log1p, total = np.float64, np.exp, math.log1p, math.fsum


class Digits:
    """Many digits."""

    array, exp, log1p, total = XP.array, XP.exp, XP.mp.log1p, staticmethod(lambda a: sum(sorted(a)))


def exact(z, xp=Digits):
    """u, p, l, L, H and ∇H of one row, with all digits."""
    z = xp.array(z)
    u = z - max(z)
    e = xp.exp(u)
    rest = xp.total(np.delete(e, np.argmax(z)))
    log_total = xp.log1p(rest)
    log_p, p = u - log_total, e / (1 + rest)
    H = log_total + xp.total(-p * u)
    gradient, parts = -p * (log_p + H), p * (H - log_p)  # l is not positive
    return {"u": u, "p": p, "l": log_p, "L": max(z) + log_total, "H": H, "gradient": gradient, "parts": parts}


def ulp(x, dtype):
    return np.abs(np.float64(np.spacing(np.abs(np.array(x, np.float64)).astype(dtype))))


LENGTHS = (2, 3, 8, 60, 257, 300, 1000, 2048, 2100, 4500)


def rows(dtype, exact_differences, lengths=LENGTHS):
    """Rows of many kinds, by length, from a seeded generator: uniform, wide, almost one-hot, tied, long, shifted."""
    rng = np.random.default_rng(20)
    for classes in lengths:
        made = []
        for scale, gap in ((0.1, 0), (1, 0), (10, 0), (0.1, 12), (1, 20), (2, 40), (3, 60)):
            z = rng.normal(0, scale, classes)
            z[rng.integers(classes)] = z.max() + gap
            if classes > 3:
                z[rng.integers(classes)] = z[rng.integers(classes)]
            shift = 0 if scale == 1 else rng.normal(0, 30)
            made.append(np.round(z * 256) / 256 if exact_differences else z + shift)
        yield np.stack(made).astype(dtype)


softmax, log_softmax, entropy, log_normalizer, named_gradient = map(
    jit_as_user,
    (
        jsoftmax.softmax,
        jsoftmax.log_softmax,
        jsoftmax.entropy,
        jsoftmax.log_normalizer,
        jsoftmax.entropy_gradient,
    ),
)
log_normalizer_gradient = jit_as_user(jax.grad(lambda z: jsoftmax.log_normalizer(z).sum()))
entropy_gradient = jit_as_user(jax.grad(lambda z: jsoftmax.entropy(z).sum()))


def errors(got, want, dtype, scale=None):
    """|got − want| in ulp of `want` or of `scale`; 0 where that is not a normal number."""
    scale = np.abs(np.asarray(want if scale is None else scale, np.float64))
    difference = XP.array(got) - want if dtype == np.float64 else np.float64(got) - np.asarray(want, np.float64)
    error = np.abs(np.asarray(difference, np.float64)) / np.maximum(ulp(scale, dtype), np.finfo(dtype).tiny)
    return np.where(scale > 1e3 * np.finfo(dtype).tiny, error, 0)


FEW = [(n, np.float32) for n in (2, 60, 300, 2100)] + [(257, np.float64)]
"""A length of each way to sum. Lengths meet float64 in test_sums.py and test_producers.py."""
CELLS = and_full(FEW, [(n, np.float32) for n in LENGTHS])


@pytest.mark.parametrize(("length", "dtype"), CELLS)
def test_bounds(length, dtype):
    """The bounds for exact u and for rounded u. The shapes are the same, so that each program is compiled once."""
    with jax.enable_x64(dtype == np.float64):
        for exact_differences in (True, False):
            stack = dict(zip(LENGTHS, rows(dtype, exact_differences), strict=True))[length]
            functions = (softmax, log_softmax, entropy, log_normalizer, entropy_gradient, named_gradient)
            results = (np.asarray(f(stack)) for f in functions)
            for z, p, log_p, H, L, gradient, by_name in zip(stack, *results, strict=True):
                want = exact(z, Digits if dtype == np.float64 else Float64)
                # what rounding x − max x costs: |u| ulp in e^u, so its mean under e^u in rest, and under e^u |u| in H
                u, others = np.abs(want["u"].astype(float)), want["u"] < 0
                weights = [np.exp(-u[others]) * u[others] ** k for k in (0, 1)]
                mean = [np.average(u[others], weights=w) if any(others) else 0 for w in weights]
                slack = {"p": u, "l": np.maximum(u, mean[0]), "H": mean[1], "gradient": mean[1], "L": 0}
                worst = {
                    "p": errors(p, want["p"], dtype),
                    "l": np.where(want["p"] > 1e3 * np.finfo(dtype).tiny, errors(log_p, want["l"], dtype), 0),
                    "H": errors(H, want["H"], dtype),
                    "L": errors(L, want["L"], dtype, max(abs(float(max(z))), abs(want["L"]))),
                    "gradient": errors(gradient, want["gradient"], dtype, max(want["parts"])),
                }
                of_named = errors(by_name, want["gradient"], dtype, max(want["parts"]))
                worst["gradient"] = np.maximum(worst["gradient"], of_named)
                for name, error in worst.items():
                    beyond = np.max(error - (0 if exact_differences else slack[name]))
                    assert beyond <= (3 if name == "gradient" else 4), (name, len(z), beyond)


@pytest.mark.parametrize("length", some([3, 60, 257, 1000], [1000]))
def test_bounds_of_many_rows(length):
    """Of a thousand ordinary rows, few scores and many, with exact differences. By default of one length, with which
    there are less and more than 2^17 scores; rows of more lengths are above."""
    z = np.float32(np.round(np.random.default_rng(21).normal(0, 1, (1000, length)) * 256) / 256)
    u = np.float64(z) - np.max(z, -1, keepdims=True)
    total = np.sum(np.exp(u), -1, keepdims=True)
    p, log_p = np.exp(u) / total, u - np.log(total)
    H = np.sum(-p * log_p, -1, keepdims=True)
    parts = np.max(p * (H - log_p), -1, keepdims=True)
    for part in (slice(0, 100), slice(None)):  # a form of its own from 2^17 scores on
        assert np.max(errors(entropy_gradient(z[part]), (-p * (log_p + H))[part], np.float32, parts[part])) <= 3
        for f, want in ((softmax, p), (log_softmax, log_p), (entropy, H[:, 0])):
            assert np.max(errors(np.float64(f(z[part])), want[part], np.float32)) <= 4


@pytest.mark.parametrize("length", some([32768, 131075], [131075]))
def test_very_long_rows(length):
    """float32 with exact u against float64, whose own error is far below; sums by math.fsum. By default the longest."""
    functions = (softmax, log_softmax, entropy, log_normalizer, entropy_gradient)
    for stack in rows(np.float32, True, (length,)):
        results = (np.float64(f(stack)) for f in functions)
        for z, p, log_p, H, L, gradient in zip(np.float64(stack), *results, strict=True):
            u = z - z.max()
            rest = math.fsum(np.delete(np.exp(u), np.argmax(z)))
            mean = math.fsum(np.exp(u) * -u) / (1 + rest)
            want_p = np.exp(u) / (1 + rest)
            want_gradient = -want_p * (u + mean)
            pairs = {
                "p": (p, want_p, want_p),
                "l": (log_p, u - np.log1p(rest), u - np.log1p(rest)),
                "H": (H, np.log1p(rest) + mean, np.log1p(rest) + mean),
                "L": (L, z.max() + np.log1p(rest), max(abs(z.max()), abs(z.max() + np.log1p(rest)))),
                "gradient": (gradient, want_gradient, np.abs(want_gradient).max()),
            }
            for name, (got, want, scale) in pairs.items():
                worst = np.max(np.abs(got - want) / np.maximum(ulp(scale, np.float32), 1e-37))
                assert worst <= 4, (name, len(z), worst)


RUNNING = and_full(
    [((4, 60), np.float32), ((4, 2048), np.float32), ((4200, 257), np.float64)],
    itertools.product([(4, 60), (4, 256), (4, 1000), (4, 2048), (4, 4500), (4200, 257)], [np.float32, np.float64]),
)
"""By default some of each way to sum: few classes, one sum, blocks, many rows."""


@pytest.mark.parametrize(("shape", "dtype"), RUNNING)
def test_what_a_running_sum_loses_beside_a_one(shape, dtype):
    """Each e^u but one is less than half an ulp of 1, so a running sum loses up to K ulp: MATH 4.4."""
    rows, classes = shape
    rng = np.random.default_rng(classes)
    stack = np.log(np.finfo(dtype).eps / 2) - rng.uniform(0, 0.5, (4, classes))
    stack[range(4), rng.integers(classes, size=4)] = 0
    stack = np.resize((np.floor(256 * stack) / 256).astype(dtype), (rows, classes))
    with jax.enable_x64(dtype == np.float64):
        functions = (softmax, log_normalizer_gradient, log_softmax, entropy_gradient)
        results = [np.asarray(f(stack))[:4] for f in functions]
    for z, p, p_of_rule, log_p, gradient in zip(stack[:4], *results, strict=True):
        want = exact(z)
        assert max(errors(p, want["p"], dtype)) <= 8
        assert max(errors(p_of_rule, want["p"], dtype)) <= 16
        assert max(errors(log_p, want["l"], dtype)) <= 8
        assert max(errors(gradient, want["gradient"], dtype, max(abs(want["gradient"])))) <= 8


def test_these_rows_are_hard():
    """The plain formulas fail the bounds on these rows by far."""
    worst = 0.0
    for z in (z for stack in rows(np.float32, True, (3, 60)) for z in stack):
        want = float(exact(z)["H"])
        p = jax.nn.softmax(z)
        plain = float(-jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0)))
        worst = max(worst, abs(plain - want) / ulp(want, np.float32))
    assert worst > 1e4


def test_small_answers():
    z = jnp.array([0.0, -20.0])
    np.testing.assert_allclose(-log_softmax(z)[0], 2.0611536e-9, rtol=1e-6)
    np.testing.assert_allclose(entropy(z), 4.328422807e-8, rtol=1e-6)
    assert entropy(jnp.array([5.0])) == 0


DIVERGENCES = [f for f in verify.FUNCTIONS if f.name in ("kl_divergence", "jensen_shannon_divergence")]


@pytest.mark.parametrize("function", DIVERGENCES, ids=str)
@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_small_divergences(gap, function):
    """D is of second order in the gap: the plain sum of p (log p − log q) loses it in float32."""
    z_p = np.array([0.25, -1.5, 0.75, 0.0], np.float32)
    z_q = (z_p + np.float32(gap) * np.array([1, -1, 0.5, 0], np.float32)).astype(np.float32)
    want = float(function.plain(jsoftmax.exp, XP, XP.array(z_p), XP.array(z_q)))
    np.testing.assert_allclose(function.ours(z_p, z_q), want, rtol=1e-6 / gap)
    assert function.ours(z_p, z_p) == 0


NARROW = and_full(
    [(scale, jnp.bfloat16) for scale in (5, 160)], itertools.product([5, 40, 160, 640], [jnp.bfloat16, jnp.float16])
)
"""float16 takes the branches of bfloat16."""


@pytest.mark.parametrize(("scale", "dtype"), NARROW)
def test_narrow_scores_lose_only_the_last_rounding(dtype, scale):
    z = jnp.asarray(np.random.default_rng(scale).normal(0, scale, (8, 1000)), dtype)
    wide = np.asarray(z, np.float32)
    half = float(jnp.finfo(dtype).eps)
    p = softmax(z)
    assert p.dtype == dtype
    np.testing.assert_allclose(np.float32(p), softmax(wide), rtol=half, atol=1e-7)
    np.testing.assert_allclose(np.float32(log_softmax(z)), log_softmax(wide), rtol=half, atol=1e-7)
    for f in (entropy, jsoftmax.varentropy, log_normalizer):
        assert f(z).dtype == jnp.float32
        np.testing.assert_array_equal(f(z), f(wide))
    assert entropy_gradient(z).dtype == dtype
    np.testing.assert_allclose(np.float32(entropy_gradient(z)), entropy_gradient(wide), rtol=half, atol=1e-7)


def softmax_products(x, w, v):
    """H v of Σ w log p and of Σ w p in float64, by differences of classes: no digit is lost beside a p near 1."""
    x, w, v = (np.float64(a) for a in (x, w, v))
    p = np.exp(x - x.max())
    p = p / p.sum()

    def centred(a):
        return np.sum(p * (a[:, None] - a[None, :]), 1)

    p_dot = p * centred(v)
    return -w.sum() * p_dot, p_dot * centred(w) - p * np.sum(p * centred(v) * centred(w))


@pytest.mark.parametrize("gap", [5.0, 20.0, 50.0, 80.0])
@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_beside_a_probability_near_1(mode, gap):
    x, w, v = jnp.array([gap, 0.0, 1.0]), jnp.array([0.3, -1.1, 0.7]), jnp.array([0.9, 0.4, -1.3])
    for f, want in zip((jsoftmax.log_softmax, jsoftmax.softmax), softmax_products(x, w, v), strict=True):
        gradient = jax.grad(lambda x, f=f: jnp.sum(w * f(x)))
        if mode == "forward over reverse":
            found = jax.jvp(gradient, (x,), (v,))[1]
        else:
            found = jax.grad(lambda x, g=gradient: jnp.vdot(g(x), v))(x)
        np.testing.assert_allclose(np.float64(found), want, rtol=3e-6)
