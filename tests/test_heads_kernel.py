"""The kernel for TPUs, interpreted: the same as XLA's loop over blocks; what it is lowered to; wrong calls."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, some
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharding import assert_close

import jsoftmax as js
from jsoftmax import heads
from jsoftmax.heads import _kernel
from jsoftmax.losses import TopTargets

TOKENS, FEATURES, CLASSES = 20, 8, 300
LABELS = np.random.default_rng(0).integers(0, CLASSES, TOKENS)
KEPT = np.arange(CLASSES) % 7 != 3
PALLAS = {"implementation": "pallas"}


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Two blocks of tokens and three of classes, of which the last are not full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernel, "TOKENS", 16)
        patch.setattr(_kernel, "CLASSES", 128)
        yield


def arrays(dtype=jnp.float64, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((TOKENS, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    hidden, *others = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    return scale * hidden, *others


def assert_equal(found, want):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11), found, want)


def loss(hidden, weight, bias, **options):
    return heads.linear_cross_entropy(hidden, weight, LABELS, bias, **options)


def statistics(hidden, weight, bias, **options):
    found = heads.linear_statistics(hidden, weight, np.stack([LABELS, LABELS[::-1]]), bias, **options)
    return found.log_prob + jnp.cos(found.entropy) + found.log_normalizer


def log_normalizer(hidden, weight, bias, **options):
    return heads.linear_log_normalizer(hidden, weight, bias, **options)


CASES = {
    "loss": (loss, {}),
    "a loss with every option": (
        loss,
        {
            "soft_cap": 4.0,
            "temperature": 0.7,
            "margin": 0.3,
            "label_smoothing": 0.2,
            "z_loss": 0.1,
            "ignore_label": int(LABELS[3]),
            "where": KEPT,
            "log_weights": np.linspace(-3, 0, CLASSES),
        },
    ),
    "statistics": (statistics, {}),
    "statistics of weighted classes": (statistics, {"log_weights": np.where(KEPT, 0.5, -np.inf), "soft_cap": 3.0}),
    "log-normaliser": (log_normalizer, {"temperature": 2.0, "where": KEPT}),
}


@pytest.mark.parametrize("name", some(CASES, ["a loss with every option", "statistics"]))
def test_equals_the_loop(name):
    """Values, gradients and Hessian products, in float64."""
    function, options = CASES[name]
    with jax.enable_x64(True):
        given = arrays()
        along = jax.tree.map(jnp.sin, given)

        def in_modes(**more):
            def f(*given):
                return function(*given, **options, **more)

            gradient = jax.grad(lambda *given: jnp.sum(jnp.sin(f(*given))), (0, 1, 2))
            return jax.jit(lambda: (f(*given), *jax.jvp(gradient, given, along)))()

        assert_equal(in_modes(**PALLAS), in_modes())


OF_DIGITS = and_full(  # by default each scale and each dtype
    [(1.0, "float32"), (640.0, "bfloat16")], itertools.product([1.0, 640.0], ["float32", "bfloat16"])
)


@pytest.mark.parametrize(("scale", "dtype"), OF_DIGITS)
def test_keeps_the_digits(scale, dtype):
    hidden, weight, _ = arrays(dtype, scale)
    ours, loop = (
        jax.jit(functools.partial(heads.linear_statistics, **more))(hidden, weight, LABELS) for more in (PALLAS, {})
    )
    assert_close(ours, loop, 4e-6)


def test_edges():
    """Rows with NaN or +∞ or without classes, labels out of range, equal scores, no tokens."""
    hidden, weight, _ = arrays(jnp.float32)
    hidden = hidden.at[2, 1].set(jnp.nan).at[5].set(jnp.inf).at[7].set(0)
    labels = jnp.asarray(LABELS).at[3].set(-1).at[4].set(CLASSES)
    for options in ({}, {"where": np.zeros(CLASSES, bool)}):
        ways = [functools.partial(heads.linear_statistics, **options, **more) for more in (PALLAS, {})]
        ours, loop = (jax.jit(f)(hidden, weight, labels) for f in ways)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=4e-6), ours, loop)
    assert heads.linear_statistics(hidden[:0], weight, labels[:0], **PALLAS).entropy.shape == (0,)
    assert heads.linear_cross_entropy(hidden, weight, labels[None][:0], **PALLAS).shape == (0, TOKENS)


def test_phi_may_be_an_argument_of_a_jit():
    hidden, weight, _ = arrays(jnp.float32)
    found = jax.jit(lambda phi: heads.linear_log_normalizer(hidden, weight, phi=phi, **PALLAS))(js.exp)
    np.testing.assert_allclose(found, heads.linear_log_normalizer(hidden, weight), rtol=1e-6)


def test_transformations():
    with jax.enable_x64(True):
        hidden, weight, bias = arrays()
        rows = hidden.reshape(4, 5, FEATURES)

        def in_ways(**more):
            def f(hidden):
                return jnp.sum(heads.linear_log_normalizer(hidden, weight, bias, **more))

            step = jax.checkpoint(jax.grad(f))
            return jax.jit(
                lambda: (
                    jax.vmap(f)(rows),
                    jax.vmap(jax.grad(f))(rows),
                    jax.lax.scan(lambda c, h: (c + jnp.sum(step(h)), f(h)), 0.0, rows),
                    jax.jvp(f, (hidden,), (hidden,)),
                    jax.grad(lambda h: jnp.sum(jax.grad(f)(h) ** 2))(hidden),
                )
            )()

        assert_equal(in_ways(**PALLAS), in_ways())


@pytest.mark.xfail(
    jax.__version_info__ < (0, 11), raises=AssertionError, strict=True, reason="jax 0.10 drops the rule within the scan"
)
def test_a_hessian_product_through_a_scan():
    with jax.enable_x64(True):
        hidden, weight, bias = arrays()

        def product(**more):
            def f(hidden):
                return jnp.sum(heads.linear_log_normalizer(hidden, weight, bias, **more))

            def total(rows):
                return jax.lax.scan(lambda c, h: (c + f(h), None), 0.0, rows)[0]

            rows = hidden.reshape(4, 5, FEATURES)
            return jax.jit(lambda: jax.jvp(jax.grad(total), (rows,), (rows,))[1])()

        assert_equal(product(**PALLAS), product())


@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_classes(check_vma):
    hidden, weight, bias = arrays(jnp.float32)
    mesh = jax.make_mesh((2, 4), ("tokens", "classes"), axis_types=(AxisType.Auto,) * 2)
    places = {"in_specs": (P("tokens"), P("classes"), P("classes"), P("tokens")), "out_specs": P("tokens")}

    def f(hidden, weight, bias, labels):
        return heads.linear_statistics(hidden, weight, labels, bias, axis_name="classes", **PALLAS)

    sharded = jax.jit(jax.shard_map(f, mesh=mesh, check_vma=check_vma, **places))
    given = (hidden, weight, bias, jnp.asarray(LABELS))
    assert_close(sharded(*given), jax.jit(heads.linear_statistics)(hidden, weight, given[3], bias), 4e-6)
    assert "tpu_custom_call" in sharded.trace(*given).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_scores_in_memory(dtype):
    """The program for a TPU has the kernel, and no array of tokens by classes, also of a block."""
    hidden, weight, bias = arrays(dtype)
    options = {"where": KEPT, "soft_cap": 4.0, "temperature": 0.7}
    traced = jax.jit(functools.partial(statistics, **options, **PALLAS)).trace(hidden, weight, bias)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    assert "dot_general" not in text
    assert not re.search(rf"tensor<({TOKENS}|16|32)x({CLASSES}|128|384)x[bf]", text)


@pytest.mark.parametrize(
    ("tokens", "classes", "features", "dtype", "wanted"),
    [
        (8192, 131072, 2048, "bfloat16", (2048, 512)),
        (8192, 131072, 4096, "float32", (512, 128)),
        (5, 7, 3, "float32", (16, 128)),
        (8192, 131072, 50000, "bfloat16", (80, 128)),
    ],
)
def test_blocks(tokens, classes, features, dtype, wanted):
    """The blocks of weight and hidden states, each twice, leave room for eight arrays of scores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_kernel, "TOKENS", 2048)
        patch.setattr(_kernel, "CLASSES", 512)
        assert _kernel.block_sizes(tokens, classes, features, dtype) == wanted
    blocks = 2 * sum(wanted) * features * jnp.dtype(dtype).itemsize
    assert blocks + 8 * 4 * wanted[0] * wanted[1] <= _kernel.VMEM


Q = np.full((TOKENS, CLASSES), 1 / CLASSES, np.float32)
TOP = TopTargets(LABELS[:, None], np.ones((TOKENS, 1), np.float32))
WRONG = {
    "an unknown name": ({"implementation": "cuda"}, "implementation must be 'xla' or 'pallas'; got 'cuda'"),
    "phi": ({**PALLAS, "phi": js.softplus}, "got phi=softplus"),
    "banned": ({**PALLAS, "banned": LABELS[:, None]}, "got banned"),
    "shards": ({**PALLAS, "shards": 2}, "got shards=2"),
    "distributions": ({**PALLAS, "labels": Q}, "got labels that are distributions"),
    "TopTargets": ({**PALLAS, "labels": TOP}, "got TopTargets"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    options, message = WRONG[name]
    hidden, weight, _ = arrays(jnp.float32)
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}.*Leave"):
        heads.linear_cross_entropy(hidden, weight, **{"labels": LABELS, **options})


def test_not_for_gpus(monkeypatch):
    hidden, weight, _ = arrays(jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="got the backend 'gpu'"):
        heads.linear_log_normalizer(hidden, weight, **PALLAS)
