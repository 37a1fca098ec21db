"""Streamed attention against its plain definition: values, derivatives, options, edges, digits, memory, wrong calls."""

import functools
import inspect
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, named, some
from interpreter import evaluated
from modes import assert_same, reverse_over_reverse
from platforms import as_on_accelerators, traced_anew

import jsoftmax as js
from jsoftmax import attention
from jsoftmax.attention import _blocks, _check
from jsoftmax.verify import PHIS

B, T, S, N, K, H = 2, 5, 7, 4, 2, 3
BLOCKS = {"one": (5, 7), "odd": (2, 3)}
DIFFERENTIABLE = ("query", "key", "value", "bias", "scale", "sink")
RNG = np.random.default_rng(0)
MASK = RNG.random((B, 1, T, S)) > 0.3
MASK[0, 0, 2] = False  # a row without keys
LENGTHS = {"query_seq_lengths": np.array([3, 5], np.int32), "key_value_seq_lengths": np.array([7, 4], np.int32)}
OPTIONS = {
    "causal": {"is_causal": True},
    "mask, window": {"mask": MASK, "local_window_size": (1, 2)},
    "lengths": LENGTHS,
    "all": {**LENGTHS, "mask": MASK, "is_causal": True, "local_window_size": (3, 1), "soft_cap": 0.7},
}
BIASES = {"full": (B, N, T, S), "heads": (1, N, 1, S), "rows": (B, 1, T, 1), "none": None}


def arrays(dtype=np.float64, bias="full", sink=True, batch=(B,)):
    rng = np.random.default_rng(1)
    shapes = {"query": (*batch, T, N, H), "key": (*batch, S, K, H), "value": (*batch, S, K, H), "bias": BIASES[bias]}
    made = {name: jnp.asarray(0.6 * rng.normal(size=shape), dtype) for name, shape in shapes.items() if shape}
    made["scale"] = jnp.asarray(0.5, dtype)
    return made | ({"sink": jnp.asarray(rng.normal(size=N), dtype)} if sink else {})


def kept_keys(shape, mask, *, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size):
    """bool `[B, N, T, S]`, which queries see which keys, and `[B, N, T]`, which rows count."""
    rows, columns = np.arange(shape[2])[:, None], np.arange(shape[3])
    kept = np.ones(shape, bool) if mask is None else np.broadcast_to(mask, shape).copy()
    counts = np.ones(shape[:3], bool)
    if is_causal:
        kept &= columns <= rows
    if local_window_size is not None:
        window = local_window_size
        left, right = window if isinstance(window, tuple) else (window, window)
        kept &= (rows - left <= columns) & (columns <= rows + right)
    if key_value_seq_lengths is not None:
        kept &= columns < key_value_seq_lengths[:, None, None, None]
    if query_seq_lengths is not None:
        counts &= np.arange(shape[2]) < query_seq_lengths[:, None, None]
    return kept & counts[..., None], counts


def plain(
    query,
    key,
    value,
    bias=0.0,
    mask=None,
    *,
    scale,
    sink=None,
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    phi=js.exp,
    soft_cap=None,
):
    """Output, L and H by the definition, with all scores."""
    keys, values = (jnp.repeat(a, query.shape[2] // key.shape[2], 2) for a in (key, value))
    s = scale * jnp.einsum("btnh,bsnh->bnts", query, keys) + bias
    s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
    kept, counts = kept_keys(
        s.shape,
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
    )
    if sink is not None:
        s = jnp.concatenate([s, jnp.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))], 3)
        kept = np.concatenate([kept, counts[..., None]], 3)
    w = jnp.where(kept, phi.definition(jnp.where(kept, s, 0.0), jnp), 0.0)
    total = w.sum(3)
    p = w / jnp.where(kept.any(3), total, 1.0)[..., None]
    output = jnp.einsum("bnts,bsnh->btnh", p[..., : keys.shape[1]], values)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1.0)), 3)
    L = jnp.where(kept.any(3), jnp.log(jnp.where(kept.any(3), total, 1.0)), -jnp.inf)
    return output, L.swapaxes(1, 2), entropy.swapaxes(1, 2)


def both(given, options):
    """Our function and the plain definition, as functions of the arrays alone."""
    names = list(given)

    def ours(*arrays):
        return tuple(attention.attention_statistics(**dict(zip(names, arrays, strict=True)), **options))

    def reference(*arrays):
        return plain(**dict(zip(names, arrays, strict=True)), **{k: v for k, v in options.items() if k != "block_size"})

    return ours, reference


SOME_PHIS = [phi for phi in PHIS if jax.tree.leaves(phi)] + [js.softplus, *named(PHIS, ["from_callable"])]
"""Attention takes φ by its logarithm, as everything does: those with parameters, one without, and a callable. By
default one with a parameter; exp is met below."""


@pytest.mark.parametrize("phi", some(SOME_PHIS, [js.spherical(0.1)]), ids=str)
def test_other_phis(phi):
    with jax.enable_x64(True):
        given = arrays(bias="none", sink=phi is js.softplus)
        assert_same(
            *both(given, {"phi": phi, "mask": MASK, "block_size": BLOCKS["odd"]}), tuple(given.values()), rtol=1e-9
        )


@pytest.mark.parametrize("options", some(OPTIONS, ["causal", "all"]))
def test_options(options):
    """One of them and all together; those of jax.nn, more of them alone, below. The soft cap of all hides a wrong sign
    in the entropy's rule, which one alone shows."""
    with jax.enable_x64(True):
        given = arrays(bias="none", sink=False)
        assert_same(*both(given, OPTIONS[options] | {"block_size": BLOCKS["odd"]}), tuple(given.values()), rtol=1e-9)


@pytest.mark.parametrize(
    ("bias", "blocks"), and_full([("full", "odd")], [("rows", "one"), ("heads", "odd")])
)  # smaller ones are summed over the axes that they lack
def test_biases_and_a_sink(bias, blocks):
    with jax.enable_x64(True):
        given = arrays(bias=bias)
        assert_same(*both(given, OPTIONS["all"] | {"block_size": BLOCKS[blocks]}), tuple(given.values()), rtol=1e-9)


def float32(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


AS_JAX_NN = {
    "plain": {},
    "scale": {"scale": 0.3},
    "bias": {"bias": float32(B, N, T, S)},
    "bias of heads, three axes": {"bias": float32(N, 1, S)},
    "mask": {"mask": MASK | (np.arange(S) == 0)},
    "mask of keys": {"mask": np.arange(S) < 4},
    "causal": {"is_causal": True, "bias": float32(1, 1, T, S)},
    "window": {"local_window_size": (1, 2)},
    "int window": {"local_window_size": 3, "is_causal": True},
    "lengths": LENGTHS,
    "key lengths": {"key_value_seq_lengths": LENGTHS["key_value_seq_lengths"], "is_causal": True},
}


AS_JAX_NN_BY_DEFAULT = [(name, K) for name in ("bias of heads, three axes", "mask of keys", "window", "key lengths")]
ROWS_AS_JAX_NN = and_full([*AS_JAX_NN_BY_DEFAULT, ("lengths", 1)], [(name, K) for name in AS_JAX_NN], [("bias", N)])
"""By default a bias, a mask, a window and lengths in forms that the tests above, with all derivatives, do not have."""


@pytest.mark.parametrize(("options", "heads"), ROWS_AS_JAX_NN)
def test_as_jax_nn(options, heads):
    """Masks, biases, heads in groups, lengths, windows, residuals."""
    given = float32(B, T, N, H), float32(B, S, heads, H, seed=1), float32(B, S, heads, H, seed=2)
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in AS_JAX_NN[options].items()}
    options = {k: v.astype(jnp.int32) if "lengths" in k else v for k, v in options.items()}
    ours = functools.partial(attention.dot_product_attention, block_size=BLOCKS["odd"])
    theirs = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    static = {k: options.pop(k) for k in ("is_causal", "local_window_size", "scale") if k in options}
    found, want = (
        evaluated(functools.partial(f, return_residual=True, **static))(*given, **options) for f in (ours, theirs)
    )
    counts = want[1] > -1e30  # a row without keys is −∞ with us, and a very negative number with jax.nn
    for a, b in zip(found, (want[0], jnp.where(counts, want[1], -jnp.inf)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("dtype", some([jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
def test_narrow_dtypes(dtype):
    """Results have the dtypes of jax.nn, except for the residual, which is float32."""
    given = [float32(B, T, n, H, seed=n, dtype=dtype) for n in (N, K, K)]
    found, L = attention.dot_product_attention(*given, return_residual=True)
    want = jax.nn.dot_product_attention(*given, implementation="xla")
    assert (found.dtype, L.dtype) == (want.dtype, jnp.float32)
    np.testing.assert_allclose(*(a.astype(np.float32) for a in (found, want)), atol=8 * jnp.finfo(dtype).eps)


def test_few_queries_and_keys():
    """Three axes, one query, one key, none; values of another width."""
    q, k, v = float32(B, T, N, H), float32(B, S, K, H, seed=1), float32(B, S, K, H, seed=2)

    @evaluated
    def results(q, k, v):
        pairs = []
        for given in ((q[0], k[0], v[0]), (q[:, :1], k, v), (q, k[:, :1], v[:, :1])):
            found = attention.dot_product_attention(*given, return_residual=True)
            pairs.append((found, jax.nn.dot_product_attention(*given, implementation="xla")))
        none = [attention.dot_product_attention(*given) for given in ((q[:, :0], k, v), (q, k[:, :0], v[:, :0]))]
        return pairs, none, [attention.dot_product_attention(q, k, a) for a in (v[..., :2], v)]

    pairs, (no_queries, no_keys), (narrow, wide) = results(q, k, v)
    for (found, L), want in pairs:
        assert (found.shape, L.shape) == (want.shape, want.shape[:-1])
        np.testing.assert_allclose(found, want, atol=1e-6)
    assert no_queries.shape == (B, 0, N, H)
    assert not no_keys.any()
    np.testing.assert_allclose(narrow, wide[..., :2], atol=1e-6)


@pytest.mark.parametrize("phi", some([js.exp, js.spherical(0.1)], [js.spherical(0.1)]), ids=str)
def test_rows_without_keys(phi):
    """Output, entropy and all derivatives are 0, and L is −∞; with a sink, L is log φ of the sink's score."""
    mask = np.ones((B, 1, T, S), bool)
    mask[0, 0, 2], mask[1] = False, False
    given = arrays(np.float32)

    def f(sink=None, **given):
        return attention.attention_statistics(**given, mask=mask, sink=sink, phi=phi, block_size=BLOCKS["odd"])

    statistics = evaluated(lambda given: f(**given))
    found = jax.tree.map(np.asarray, statistics(given | {"sink": None}))
    empty = ~mask.any(3)[:, 0]
    assert not found.output[empty].any()
    assert not found.entropy[empty].any()
    assert np.isneginf(np.asarray(found.log_normalizer)[empty]).all()
    assert np.isfinite(np.asarray(found.log_normalizer)[~empty]).all()

    def total(given):
        a = f(**given)
        finite = jnp.where(jnp.isfinite(a.log_normalizer), a.log_normalizer, 0)
        rows = (a.output + (finite + a.entropy)[..., None]) ** 2
        return jnp.sum(jnp.where(empty[..., None, None], rows, 0))  # of the rows without keys alone

    without = {name: a for name, a in given.items() if name != "sink"}
    derivatives = evaluated(lambda given: jax.jvp(jax.grad(total), (given,), (given,)))
    assert all(not np.any(a) for a in jax.tree.leaves(derivatives(without)))
    with_sink = jax.tree.map(np.asarray, statistics(given))
    assert not with_sink.output[empty].any()
    assert not with_sink.entropy[empty].any()
    np.testing.assert_allclose(with_sink.log_normalizer[0, 2], phi.log(given["sink"]), rtol=1e-6)


def test_what_is_left_out_may_be_anything():
    """Keys, values and queries beyond the lengths; scores behind a mask; a bias of −∞, under a soft cap too."""
    given = arrays(np.float32, sink=False)
    lengths = {name: jnp.asarray(a) for name, a in LENGTHS.items()}

    def total(given, **options):
        found = attention.attention_statistics(**given, **options, soft_cap=0.7, block_size=BLOCKS["odd"])
        L = jnp.where(jnp.isfinite(found.log_normalizer), found.log_normalizer, 0)
        return jnp.sum(found.output**2) + jnp.sum(L + found.entropy)

    run = evaluated(jax.value_and_grad(total))
    want = run(given, **lengths)
    bad = dict(given)
    for name, of in (("query", "query"), ("key", "key_value"), ("value", "key_value")):
        length = LENGTHS[f"{of}_seq_lengths"][:, None, None, None]
        beyond = np.arange(given[name].shape[1])[:, None, None] >= length
        bad[name] = jnp.where(beyond, jnp.nan, given[name])
    found = run(bad, **lengths)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    mask = np.broadcast_to(MASK, (B, N, T, S))
    want = run(given, mask=mask)
    for instead, options in ((jnp.nan, {"mask": mask}), (-jnp.inf, {})):
        bad = given | {"bias": jnp.where(mask, given["bias"], instead)}
        found = run(bad, **options)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_bad_scores_act_on_their_row_alone():
    given = arrays(np.float32, sink=False)
    run = evaluated(lambda given: attention.attention_statistics(**given, block_size=BLOCKS["odd"]))
    for bad, of_L in ((jnp.nan, jnp.isnan), (jnp.inf, jnp.isposinf)):
        found = run(given | {"bias": given["bias"].at[0, 1, 2, 5].set(bad)})
        is_bad = np.zeros((B, T, N), bool)
        is_bad[0, 2, 1] = True
        assert (of_L(found.log_normalizer) == is_bad).all()
        assert (jnp.isnan(found.output).all(3) == is_bad).all()
        assert (jnp.isnan(found.entropy) == is_bad).all()
    capped = run(given | {"bias": given["bias"].at[0, 1, 2, 5].set(jnp.nan), "soft_cap": 5.0})
    assert all((jnp.isnan(a.reshape(B, T, N, -1)).all(3) == is_bad).all() for a in capped)  # not a key less


@pytest.mark.parametrize("scale", some([5.0, 40.0, 640.0], [640.0]))
def test_bfloat16(scale):
    """Sums run in float32: the result is within a rounding of the factors e^u, and of itself, at all scales of
    scores."""
    q, k, v = (float32(1, 64, 2, 16, seed=i, dtype=jnp.bfloat16) for i in range(3))
    f = functools.partial(attention.dot_product_attention, block_size=(16, 16))
    found, L = jax.jit(functools.partial(f, return_residual=True))(q, k, v, scale=scale / 4)
    wide_q, wide_k, wide_v = (np.asarray(a, np.float64) for a in (q, k, v))
    s = scale / 4 * np.einsum("btnh,bsnh->btns", wide_q, wide_k)
    w = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("btns,bsnh->btnh", w / w.sum(-1, keepdims=True), wide_v)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=eps, atol=eps / 2 * np.abs(wide_v).max())
    np.testing.assert_allclose(L, s.max(-1) + np.log(w.sum(-1)), rtol=1e-6)
    gradients = jax.jit(lambda q, k, v, scale: gradient(functools.partial(f, scale=scale))(q, k, v))(q, k, v, scale / 4)
    assert all(a.dtype == jnp.bfloat16 and jnp.isfinite(a).all() for a in gradients)


def test_digits_of_a_small_entropy():
    """Scores that are made in the same program, in a scan: an almost one-hot row keeps the digits of its entropy."""
    k = np.zeros((1, 8, 1, 4), np.float32)
    k[0, 3] = 1.0
    q = np.full((1, 5, 1, 4), 2.75, np.float32) * np.linspace(1, 2.5, 5, dtype=np.float32)[:, None, None]
    given = jnp.asarray(q), jnp.asarray(k), jnp.asarray(k)

    @jax.jit
    def scanned(q, k, v, c):
        def body(total, a):
            found = attention.attention_statistics(
                c * a[0], jnp.sin(a[1]) / jnp.sin(1.0), a[2], soft_cap=60.0, scale=1.0
            )
            return total + found.entropy, None

        return jax.lax.scan(body, jnp.zeros((1, 5, 1)), [a[None] for a in (q, k, v)])[0]

    with jax.enable_x64(True):
        x = np.float64(60) * np.tanh(np.float64(q * np.float32(0.9)) @ np.float64(k[0, :, 0].T) / 60)
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        others = np.delete(p, 3, -1)
        wanted = -np.sum(others * np.log(others), -1) - p[..., 3] * np.log1p(-others.sum(-1))
    np.testing.assert_allclose(scanned(*given, 0.9), wanted, rtol=2e-5)


def narrow_dot(a, b, axis, precision, dtype=None):
    """As a GPU computes it by an algorithm with narrow factors. On CPU that has no effect."""
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        a, b = (
            jax.custom_derivatives.linear_call(
                lambda _, a: jax.lax.reduce_precision(a, 8, 7), lambda _, cotangent: cotangent, (), a
            )
            for a in (a, b)
        )
    return DOT(a, b, axis, precision, dtype)


DOT = _blocks._dot


OF_BFLOAT16 = and_full(
    [(False, 1.25), (True, 10.0)],
    itertools.product([False, True], [1.25, 10.0, 40.0, 160.0]),
)
"""By default of one scale on CPU, and of one on accelerators."""


@pytest.mark.parametrize(("accelerator", "scale"), OF_BFLOAT16)
def test_derivatives_of_bfloat16(accelerator, scale, rng, monkeypatch):
    """At scores of 5 to 640, where Σ p ẋ v and o Σ p ẋ cancel: within a rounding or two to bfloat16 of the largest
    entry, and some ulp of float32 of ẋ v  (MATH 14.3)."""
    q, k, v, q_dot, cotangent = (
        np.float64(jnp.asarray(rng.normal(size=(1, n, 2, 16)), jnp.bfloat16)) for n in (7, 257, 257, 7, 7)
    )
    x, x_dot = (scale * np.einsum("btnh,bsnh->bnts", a, k) for a in (q, q_dot))
    p = np.exp(x - x.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    o = np.einsum("bnts,bsnh->bnth", p, v)
    jvp = np.einsum("bnts,bnts,bsnh->bnth", p, x_dot, v) - o * np.sum(p * x_dot, -1, keepdims=True)
    gap = np.einsum("btnh,bsnh->bnts", cotangent, v) - np.einsum("btnh,bnth->bnt", cotangent, o)[..., None]
    wanted = {"jvp": jvp, "gradient": scale * np.einsum("bnts,bnts,bsnh->bnth", p, gap, k)}

    def found(*given):
        q, k, v, q_dot, cotangent = (jnp.asarray(a, jnp.bfloat16) for a in given)
        f = functools.partial(attention.dot_product_attention, key=k, value=v, scale=scale, block_size=(7, 64))
        return {"jvp": jax.jvp(f, (q,), (q_dot,))[1], "gradient": jax.vjp(f, q)[1](cotangent)[0]}

    given = q, k, v, q_dot, cotangent
    if accelerator:
        monkeypatch.setattr(_blocks, "_dot", narrow_dot)
        with as_on_accelerators():
            results = found(*given)
    else:
        results = found(*given)
    largest = 2.0**-23 * scale * 64  # |k| |v| and |q̇| are below 5, and most of their products below 64
    for mode, want in wanted.items():
        error = np.max(np.abs(np.float64(np.moveaxis(results[mode], 2, 1)) - want))
        assert error <= 2.0 ** (-7 if accelerator else -8) * np.max(np.abs(want)) + largest, (mode, error)


@pytest.mark.parametrize("block_size", [None, 1])
def test_digits_of_a_small_log_normalizer(block_size):
    """log(1 + e^−20 + e^−21): the residual keeps them, and the output is the same with it and without."""
    q, k = jnp.ones((1, 1, 1)), jnp.float32([0, -20, -21]).reshape(3, 1, 1)
    given = {"scale": 1.0, "block_size": block_size}
    output, residual = attention.dot_product_attention(q, k, k, **given, return_residual=True)
    np.testing.assert_allclose(residual.ravel(), np.log1p(np.exp(-20.0) + np.exp(-21.0)), rtol=1e-6)
    np.testing.assert_allclose(attention.dot_product_attention(q, k, k, **given), output, rtol=1e-6)


def gradient(f):
    return jax.grad(lambda *a: jnp.sum(f(*a) ** 2), (0, 1, 2))


MODES = {
    "value, jvp": lambda f, given: jax.jvp(f, given, given),
    "gradient, mapped": lambda f, given: jax.vmap(gradient(f))(*(a[None] for a in given)),
    "gradient, remat": lambda f, given: gradient(jax.checkpoint(f))(*given),
    "Hessian product": lambda f, given: jax.jvp(gradient(f), given, given)[1],
    "reverse over reverse": lambda f, given: reverse_over_reverse(gradient(f), (0, 1, 2))(*given),
}


FEW_MODES = ["gradient, remat", "Hessian product", "reverse over reverse"]


@pytest.mark.parametrize("mode", some(MODES, FEW_MODES))
def test_no_array_of_queries_by_keys(mode):
    """The largest array of the compiled program is no larger than the arguments. By default in the modes that contain
    the others."""
    length, width = 96, 4

    def f(q, k, v):
        found = attention.attention_statistics(q, k, v, is_causal=True, block_size=(8, 12))
        return jnp.concatenate([found.output, found.entropy[..., None]], -1)

    given = tuple(float32(1, length, 2, width, seed=i) for i in range(3))
    text = jax.jit(lambda *a: MODES[mode](f, a)).lower(*given).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)]
    assert max(sizes) <= length * 2 * (width + 1)


def test_the_blocks_of_accelerators(monkeypatch):
    """The blocks for accelerators are different, and tangents are narrow; the results are the same except for
    rounding."""
    given = [float32(1, 96, n, 8, seed=n) for n in (4, 2, 2)]
    monkeypatch.setattr(_check, "_KEYS", {"cpu": 32, "elsewhere": 48})
    monkeypatch.setattr(_check, "_MOST", 24)

    def run():
        f = functools.partial(attention.dot_product_attention, is_causal=True)
        return evaluated(lambda *a: (f(*a), *jax.jvp(gradient(f), a, a)))(*given)

    with traced_anew():
        on_cpu = run()
    with as_on_accelerators():
        elsewhere = run()
    for a, b in zip(jax.tree.leaves(elsewhere), jax.tree.leaves(on_cpu), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_wide_factors_keep_all_digits():
    """Every product is computed with all bits of float32, in all modes. Narrow factors, and a precision that the user
    chose, are left as they are."""
    q, k, v = (float32(1, 6, 2, 4, seed=i) for i in range(3))

    def precisions(*given):
        f = functools.partial(attention.dot_product_attention, block_size=(3, 3))
        text = str(jax.make_jaxpr(lambda *a: jax.jvp(gradient(f), a, a))(*given))
        return set(re.findall(r"precision=(\S+|\(.*?\))", text)) - {"None"}

    assert all("HIGHEST" in p for p in precisions(q, k, v))
    assert precisions(q, k, v)
    assert not any("HIGHEST" in p for p in precisions(*(a.astype(jnp.bfloat16) for a in (q, k, v))))
    with jax.default_matmul_precision("bfloat16"):
        assert not any("HIGHEST" in p for p in precisions(q, k, v))


def call(**changed):
    """The call with good arguments, except for those that are changed."""
    given = {"query": float32(B, T, N, H), "key": float32(B, S, K, H), "value": float32(B, S, K, H)}
    f = attention.dot_product_attention
    f = f if "dim" in changed else inspect.unwrap(f)  # without the run-time type checks, whose errors come first
    return f(**given | changed)


WRONG = {
    "phi=softmax": (TypeError, "phi must be a φ", {"phi": js.softmax}),
    "integers": (TypeError, "query must be real and floating", {"query": np.zeros((B, T, N, H), int)}),
    "two axes": (ValueError, "query must have the axes", {"query": np.zeros((T, H))}),
    "one without a batch": (ValueError, "key must have the axes", {"key": np.zeros((S, K, H))}),
    "values": (ValueError, "value must have the shape of key", {"value": np.zeros((B, S - 1, K, H))}),
    "features": (ValueError, "key must have the batch", {"key": np.zeros((B, S, K, H + 1))}),
    "heads": (ValueError, "query must have a multiple of the heads", {"query": np.zeros((B, T, 3, H))}),
    "no heads": (ValueError, "query must have a multiple of the heads", {"query": np.zeros((B, T, 0, H))}),
    "no features": (ValueError, "at least one", {"query": np.zeros((B, T, N, 0)), "key": np.zeros((B, S, K, 0))}),
    "bool bias": (TypeError, "Pass a boolean array as mask", {"bias": np.ones((T, S), bool)}),
    "bias": (ValueError, "bias must broadcast", {"bias": np.zeros((B, S))}),
    "number mask": (TypeError, "mask must be boolean", {"mask": np.ones((T, S))}),
    "mask of keys of a batch": (ValueError, r"mask\[:, None, None, :\]", {"mask": np.ones((B, S), bool)}),
    "float lengths": (TypeError, "must be integers", {"query_seq_lengths": np.ones(B)}),
    "one length": (ValueError, "one length for each sequence", {"key_value_seq_lengths": np.array(3)}),
    "window": (ValueError, "local_window_size must be an int >= 0", {"local_window_size": (-1, 0)}),
    "cap": (ValueError, "soft_cap must be > 0", {"soft_cap": 0.0}),
    "scale": (ValueError, "scale must be finite", {"scale": np.inf}),
    "sink": (ValueError, "sink must be one score, or one for each head", {"sink": np.zeros(K)}),
    "causal": (TypeError, "is_causal must be True or False", {"is_causal": 1}),
    "residual": (TypeError, "return_residual must be True or False", {"return_residual": None}),
    "block": (ValueError, "block_size must be a positive int", {"block_size": 0}),
    "dim": (TypeError, "an unexpected keyword dim=", {"dim": 1}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(case):
    error, match, changed = WRONG[case]
    with pytest.raises(error, match=match):
        call(**changed)


def test_float64_has_its_digits(rng):
    """docs/guides/attention.md says so. jax.nn's error here is 8e-8 in JAX 0.10 to 0.12."""
    q, k, v = (rng.normal(size=(2, 16, 2, 8)) for _ in range(3))
    s = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
    e = np.exp(s - s.max(-1, keepdims=True))
    want = np.einsum("bnts,bsnh->btnh", e / e.sum(-1, keepdims=True), v)
    with jax.enable_x64(True):
        found = attention.dot_product_attention(*map(jnp.asarray, (q, k, v)))
        assert np.max(np.abs(found - want)) < 2e-15
