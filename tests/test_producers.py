"""Scores that are made in the same program: fusing them with what follows must not change digits (MATH 4.1).

A compiler may compute c z again beside the exponential, and round c z − max x once, not twice; then the difference of
the largest score is not 0. Here every function follows every producer, at sizes on both sides of every threshold and in
every dtype, and equals what float64 gives operation by operation.
"""

import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, covering, named, some
from compilation import jit_as_user
from interpreter import evaluated
from jax.sharding import PartitionSpec
from sharding import mesh

import jsoftmax as js
from jsoftmax import gumbel, heads, losses
from jsoftmax.sums.cpu import paths
from jsoftmax.verify import DERIVATIVES, FUNCTIONS, LOSSES, OTHERS, SPARSE_MAPS


class Producer(NamedTuple):
    """A function of scores `[rows, K]` and a traced number c."""

    name: str
    make: Callable[[Any, Any], Any]
    ulps: float = 0
    """By how many ulp of the largest score compilers may round x differently in two places: a sum of products."""
    coarse: bool = False
    """Whether derivatives, but not these scores, are rounded to bfloat16."""

    def __str__(self):
        return self.name


def layer_norm(z, c):
    centred = z - jnp.mean(z, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * 3 * c + c


def products(z, c):
    keys = jnp.cos(jnp.arange(3 * z.shape[-1])).reshape(z.shape[-1], 3).astype(z.dtype)
    return c * jnp.matmul(z[..., :3], keys.T, precision="highest") / 3**0.5  # else GPUs keep 11 bits


PRODUCERS = (
    Producer("c z", lambda z, c: c * z),
    Producer("z / constant", lambda z, c: z / 0.7),
    Producer("z / T", lambda z, c: z / c),
    Producer("z / T of each row", lambda z, c: z / (c + jnp.arange(z.shape[-2])[:, None].astype(z.dtype) / 8)),
    Producer("z² c", lambda z, c: z**2 * c / 8),
    Producer("c tanh(z/c)", lambda z, c: 20 * c * jnp.tanh(z / (20 * c))),
    Producer("layer norm", layer_norm, ulps=8),
    Producer("q kᵀ/√d", products, ulps=8),
    Producer("through bfloat16", lambda z, c: (c * z).astype(jnp.bfloat16).astype(z.dtype), coarse=True),
    Producer("−inf", lambda z, c: jnp.where(jnp.arange(z.shape[-1]) % 3 == 2, -jnp.inf, c * z)),
)

SHAPES = (
    (6, 3),
    (6, 8),
    (6, 17),
    (6, 60),
    (6, 257),
    (512, 257),
    (140, 1000),
    (33, 4099),
    (8, 16384),
    (20000, 8),
    (4100, 260),
)
"""On both sides of every threshold of `sums`: few and many classes, few and many scores and rows."""

TOLERANCES = {"float32": 1e-4, "float64": 1e-11, "bfloat16": 0.15}
"""Relative: of each number, and ten times that of the largest number of a row of derivatives. Scores are below 64, of
which a rounding is 2^−19 in float32 and up to 2^−3 in bfloat16, which it may be in two places."""

MODES = ["value", "gradient", "jvp", "HVP"]


def of_distribution(loss):
    """The loss of a distribution with most of its mass on class 1, none on impossible ones."""

    def function(z, phi):
        q = jnp.full(z.shape, 0.1 / z.shape[-1], z.dtype).at[..., 1].set(0.9)
        return loss(z, jnp.where(jnp.isneginf(z), 0, q), phi=phi)

    return function


OF_DISTRIBUTIONS = tuple(
    dataclasses.replace(
        f, name=f"{f.name} of a distribution", function=of_distribution(getattr(losses, f.name)), arguments=()
    )
    for f in LOSSES
    if "class_weights" in inspect.signature(getattr(losses, f.name)).parameters
)
"""The losses of labels again, of labels of the other kind."""

EVERY = FUNCTIONS + DERIVATIVES + LOSSES + OF_DISTRIBUTIONS + SPARSE_MAPS + OTHERS


def scores(shape, narrow=False):
    """A row of ordinary scores, one whose class 1 is almost certain, one with a tie at the top, and so on.

    narrow: 1.5 times them are numbers of bfloat16.
    """
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, shape)
    z[1::3, 1] = 9 + rng.uniform(0, 4, len(z[1::3]))
    z[2::3, 0] = z[2::3, 1] = 4
    return np.round(np.float32(z) * 2) / 4 if narrow else np.float32(z)


LISTS = (EVERY, PRODUCERS, SHAPES, list(TOLERANCES), MODES)


FEW = ("softmax", "log_softmax", "entropy", "kl_divergence", "cross_entropy", "focal_cross_entropy")
READERS = [*named(EVERY, (*FEW, "entmax(alpha=1.7)")), *OTHERS]
"""Every way to read scores. The others read them by the same sums (test_sums.py), the sparse maps by the same steps."""


MODES_AND_DTYPES = (3, 4)
ALONE = [pair for pair in itertools.combinations(range(len(LISTS)), 2) if pair != MODES_AND_DTYPES]
CELLS = and_full(
    covering(READERS, *LISTS[1:], met=ALONE),
    covering(READERS, *LISTS[1:]),
    covering(*LISTS, met=ALONE),
)
"""By default each reader, each producer and shape, and each mode in each dtype. In the gate every two items of
the readers, producers, shapes, dtypes and modes meet, and each function is in a cell. Functions meet dtypes, and forms,
in test_sums.py."""


def ours(function, x):
    """The function of rows of scores; the second argument of two is made of the first."""
    others = [x[..., ::-1] / (2 + i) for i in range(function.scores - 1)]
    return function.with_rows(*x.shape[:-1]).ours(x, *others, phi=js.exp)


def result(f, mode, z, c, v):
    """The value of f(z, c), its gradient, its derivative along v, or the Hessian product with v."""

    def total(z):
        value = f(z, c)
        weights = jnp.cos(jnp.arange(1.0, 1 + value.size // len(value))).reshape(value.shape[1:]).astype(value.dtype)
        return jnp.sum(jnp.where(jnp.isneginf(value), 0, weights * value))

    if mode == "value":
        return f(z, c)
    if mode == "gradient":
        return jax.grad(total)(z)
    along, of = (f, (z, c)) if mode == "jvp" else (jax.grad(total), (z,))
    return jax.jvp(lambda z: along(z, *of[1:]), (z,), (v,))[1]


@functools.cache
def alone(function):
    """The function compiled by itself, so that its scores are an array, whatever made them."""
    return jax.jit(functools.partial(ours, function))


def arguments(shape, dtype, narrow):
    z = jnp.asarray(scores(shape, narrow), dtype)
    return z, jnp.asarray(1.5, dtype), jnp.cos(z)


def in_one_program(function, producer, mode, given, jit=jit_as_user):
    return jit(functools.partial(result, lambda z, c: ours(function, producer.make(z, c)), mode))(*given)


reference = functools.partial(in_one_program, jit=evaluated)
"""In float64, beside which no compiler's rounding is seen in float32."""


def in_two(function, producer, mode, given):
    return result(lambda z, c: alone(function)(producer.make(z, c)), mode, *given)


def allowed(function, producer, shape, dtype, mode, want):  # noqa: PLR0917
    """The error that MATH 4.4 to 4.6 allow, of results of which the first axis is that of rows."""
    eps = float(jnp.finfo(dtype).eps)
    relative, size = TOLERANCES["bfloat16" if producer.coarse else dtype], np.abs(want)
    if mode != "value":
        relative = 10 * relative
        size = np.max(size.reshape(len(want), -1), 1).reshape(-1, *[1] * (want.ndim - 1))
    absolute = 32 * producer.ulps * eps
    no_bound = function in DERIVATIVES or function in SPARSE_MAPS or function.name == "entropy_expansion"
    if no_bound or mode == "HVP" or (mode != "value" and math.prod(shape) >= paths.LARGE):
        absolute = absolute + 32 * eps * max(1.0, np.max(np.abs(want)))
    return relative * size + absolute + 1e-30


@pytest.mark.parametrize(("function", "producer", "shape", "dtype", "mode"), CELLS, ids=str)
def test_every_function_after_every_producer(function, producer, shape, dtype, mode):
    """As in float64; and float64 as in two programs, of which the second has the scores as an array."""
    if function.orders == 1:  # dense
        shape = (min(shape[0], 5), min(shape[1], 12))
    if function in SPARSE_MAPS and dtype == "bfloat16" and mode != "value":
        producer = PRODUCERS[0]  # it makes exact scores; a rounded one may leave the support, where derivatives jump
    narrow = dtype == "bfloat16" or producer.coarse
    with jax.enable_x64(dtype == "float64"):
        found = np.float64(in_one_program(function, producer, mode, arguments(shape, dtype, narrow)))
    with jax.enable_x64(True):
        other = in_two if dtype == "float64" else reference
        want = np.float64(other(function, producer, mode, arguments(shape, "float64", narrow)))
    finite = np.where(np.isfinite(want), want, 0)
    bound = allowed(function, producer, shape, dtype, mode, finite)
    same = (found == want) | (np.isnan(found) & np.isnan(want)) | (np.abs(found - finite) <= bound)
    assert np.all(same), (np.max(np.abs(found - want)[~same]), np.argwhere(~same)[:3].tolist(), np.mean(~same))


# --- in bfloat16 ---------------------------------------------------------------------------------------------

STEPS = (
    Producer("c z", lambda z, c: c * z),
    Producer("z / T", lambda z, c: z / c),
    Producer("z + c", lambda z, c: z + c),
    Producer("z W", lambda z, c: z[:, :4] @ jnp.cos(jnp.arange(4 * z.shape[1]).reshape(4, -1)).astype(z.dtype)),
)
"""One step, whose result is rounded once; XLA drops the roundings between the steps of a longer one."""

FEWER = ("softmax", "entropy", "cross_entropy")
"""One with a result for each class, one for each row, one of labels: each of the few meets producers above."""


def of_few(*lists):
    """The fewer functions and all items by default, each once; in the gate each reader with every item, and every two
    items."""
    alone = list(itertools.combinations(range(1 + len(lists)), 2))
    return and_full(covering(named(READERS, FEWER), *lists, met=alone), covering(READERS, *lists))


NARROW = of_few(STEPS, [(6, 17), (6, 300), (64, 2100)])


@pytest.mark.parametrize(("function", "step", "shape"), NARROW, ids=str)
def test_scores_in_bfloat16_are_those_of_an_array(function, step, shape):
    """No reader drops the rounding of scores that are made in the same program: all see the same scores."""
    z, c = jnp.asarray(scores(shape), jnp.bfloat16), jnp.asarray(1.7, jnp.bfloat16)
    want = np.float64(in_two(function, step, "value", (z, c, z)))
    found = np.float64(in_one_program(function, step, "value", (z, c, z)))
    narrow = alone(function)(z).dtype == jnp.bfloat16
    np.testing.assert_allclose(found, want, rtol=2.0**-7 if narrow else 1e-4, atol=1e-12)


# --- under transformations -----------------------------------------------------------------------------------


def by_scan(f, z, c):
    return jax.lax.scan(lambda carry, row: (carry, f(row[None], c)[0]), 0, z)[1]


def by_vmap(f, z, c):
    return jax.vmap(lambda row: f(row[None], c)[0])(z)


def by_remat(f, z, c):
    return jax.checkpoint(f)(z, c)


WAYS = of_few([by_scan, by_vmap, by_remat], PRODUCERS[:1] + PRODUCERS[4:6], [(6, 12), (6, 300)])


@pytest.mark.parametrize(("function", "way", "producer", "shape"), WAYS, ids=lambda a: getattr(a, "__name__", str(a)))
def test_rows_made_within_transformations(function, way, producer, shape):
    def f(z, c):
        return ours(function, producer.make(z, c))

    of_rows = jit_as_user(functools.partial(result, functools.partial(way, f), "gradient"))
    found = of_rows(*arguments(shape, "float32", False))
    with jax.enable_x64(True):
        want = np.float64(reference(function, producer, "gradient", arguments(shape, "float64", False)))
    assert np.all(np.abs(found - want) <= allowed(function, producer, shape, "float32", "gradient", want))


SHARDED = [f for f in FUNCTIONS + LOSSES if "axis_name" in inspect.signature(f.function).parameters]
PARTS, WHOLE = PartitionSpec(None, "v"), PartitionSpec()
SIZES = [(6, 16), (512, 512)]
OF_PARTS = and_full(*(covering(functions, SIZES, met=[(0, 1)]) for functions in (named(SHARDED, FEWER), SHARDED)))
"""By default the fewer functions: the others read scores by the same sums. In the gate each of them once."""


@pytest.mark.parametrize(("function", "shape"), OF_PARTS, ids=str)
def test_parts_of_scores_made_on_each_device(function, shape):
    """Value and gradient; along classes on four devices, one of which has the maximum."""

    def of_scores(x, **options):
        options |= {"phi": js.exp}
        return function.with_rows(len(x)).ours(x, *[x / 2] * (function.scores - 1), **options)

    z, c, _ = arguments(shape, "float32", False)
    keeps = of_scores(z).ndim == 2
    of_parts = jax.shard_map(
        lambda z: of_scores(c * jnp.tanh(z / c) * 3, axis_name="v"),
        mesh=mesh(),
        in_specs=PARTS,
        out_specs=PARTS if keeps else WHOLE,
    )

    def whole(z, c):
        f = lambda z, c: of_scores(c * jnp.tanh(z / c) * 3)  # noqa: E731
        return {mode: result(f, mode, z, c, z) for mode in ("value", "gradient")}

    with jax.enable_x64(True):
        wanted = evaluated(whole)(np.float64(z), 1.5)
    for mode, want in jax.tree.map(np.float64, wanted).items():
        found = jit_as_user(functools.partial(result, lambda z, c: of_parts(z), mode))(z, c, z)
        bound = allowed(
            function, PRODUCERS[5], (2**9, 2**9), "float32", mode, want
        )  # MATH 4.5 has that of sharded ones
        assert np.all((found == want) | (np.abs(found - want) <= bound)), mode


# --- heads, samples, densities, temperatures -----------------------------------------------------------------

KEY = jax.random.key(0)
LABELS = jnp.arange(9) * 5


def of_heads(w):
    """Functions of hidden vectors `[9, 8]`, with a bounded weight, so that scores are made within."""
    W = w(np.random.default_rng(0).normal(0, 1, (47, 8)))
    capped = {"soft_cap": 9.0, "block_size": (4, 16)}
    shapes, rng = (
        jax.eval_shape(lambda: heads.adaptive.init(KEY, 8, 47, (11, 30), div_value=2)),
        np.random.default_rng(4),
    )
    params = jax.tree.map(lambda a: w(rng.uniform(-1, 1, a.shape) / a.shape[-1] ** 0.5), shapes)
    return {
        "linear_cross_entropy": lambda h: heads.linear_cross_entropy(h, W, LABELS, **capped, label_smoothing=0.1),
        "of distributions": lambda h: heads.linear_cross_entropy(h, W, jnp.ones((9, 47), h.dtype) / 47, **capped),
        "linear_cross_entropy_sum": lambda h: heads.linear_cross_entropy_sum(h, W, LABELS, soft_cap=9.0)[None],
        "linear_log_normalizer": lambda h: heads.linear_log_normalizer(h, W, **capped),
        "log_prob": lambda h: heads.linear_statistics(h, W, LABELS, **capped).log_prob,
        "entropy": lambda h: heads.linear_statistics(h, W, LABELS, **capped).entropy,
        "linear_kl": lambda h: heads.linear_kl(h, W, h[::-1], W / 2),
        "linear_jsd": lambda h: heads.linear_jsd(h, W, h[::-1], W / 2),
        "linear_top_k": lambda h: heads.linear_top_k(h, W, 3, soft_cap=9.0).log_prob,
        "quadratic": lambda h: heads.quadratic_cross_entropy(h, W, LABELS, phi=js.taylor(2)),
        "sampled": lambda h: heads.sampled_cross_entropy(KEY, h, W, LABELS, 20, log_proposal=w(jnp.zeros(47))),
        "nce": lambda h: heads.nce_loss(KEY, h, W, LABELS, 20, log_proposal=w(jnp.zeros(47))),
        "adaptive": lambda h: heads.adaptive.log_prob(params, h, LABELS),
        "adaptive.entropy": lambda h: heads.adaptive.entropy(params, h),
        "adaptive.top_k": lambda h: heads.adaptive.top_k(params, h, 5).log_prob,
    }


def of_samples(w):
    """Functions of scores `[9, 8]` that draw, or take samples."""
    q = w(np.random.default_rng(1).dirichlet(np.ones(8), 9))
    noise = w(np.random.default_rng(2).gumbel(size=(9, 8)))
    return {
        "concrete": lambda z: gumbel.concrete_log_density(q, z, 0.7),
        "exp_concrete": lambda z: gumbel.exp_concrete_log_density(jnp.log(q), z, 0.7),
        "binary_concrete": lambda z: gumbel.binary_concrete_log_density(q[:, 0], z[:, 0], 0.7),
        "temperature": lambda z: js.temperature_for_entropy(z, 0.9),
        "perturbed": lambda z: js.softmax((z + noise) / 0.3),
        "mean of mixtures": lambda z: js.mixture_log_softmax(jnp.stack([z, z[::-1] * 2], 1), z[:, :2]),
    }


FEW_HEADS = ("linear_cross_entropy", "linear_kl", "quadratic", "adaptive")
FEW_MADE = (*FEW_HEADS, "concrete", "temperature")
"""Each makes its scores, or reads them, by code of its own. The others share it, or have products of
gathered rows: they run in the gate."""


@pytest.mark.parametrize("name", some(of_heads(jnp.float32), FEW_HEADS))
def test_products_keep_all_digits(name):
    """GPUs and TPUs would keep 11 or 8 bits of the factors: forwards, backwards, and in Hessian products."""
    with jax.enable_x64(False):
        f = of_heads(jnp.float32)[name]
        lowered = jax.jit(functools.partial(result, lambda z, _: f(z), "HVP")).trace(*[jnp.ones((9, 8))] * 3)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    found = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert found
    assert all("HIGHEST, HIGHEST" in line for line in found), [line for line in found if "HIGHEST" not in line][:3]


MADE = dict.fromkeys(of_heads(jnp.float32), "heads") | dict.fromkeys(of_samples(jnp.float32), "samples")
OF_ORDERS = ("value", "gradient", "HVP")
OF_MADE = and_full(
    ((name, (mode,)) for name, mode in zip(FEW_MADE, itertools.cycle(OF_ORDERS), strict=False)),
    ((name, OF_ORDERS if name in FEW_MADE else OF_ORDERS[-1:]) for name in MADE),
)
"""By default each of the few in one order, and each order in several: an order's formulas are met in float64, in the
tests of heads and samples. In the gate the few have all orders in float32, the others Hessian products, which need the
value and the gradient."""


@pytest.mark.parametrize(("name", "modes"), OF_MADE, ids=lambda a: a if isinstance(a, str) else " ".join(a))
def test_what_takes_no_scores(name, modes):
    made = {"heads": of_heads, "samples": of_samples}[MADE[name]]
    z = np.random.default_rng(3).normal(0, 1, (9, 8)).astype(np.float32)
    z[1] *= 9  # confident, where its scores are

    def found(dtype):
        f = made(lambda a: jnp.asarray(a, dtype))[name]
        given = [jnp.asarray(a, dtype) for a in (z, 1.5, np.cos(z))]
        jit = evaluated if dtype == "float64" else jit_as_user
        results = jit(lambda *given: {mode: result(lambda z, c: f(c * z), mode, *given) for mode in modes})(*given)
        return {mode: np.float64(a) for mode, a in results.items()}

    with jax.enable_x64(True):
        wanted = found("float64")
    got = found("float32")
    for mode, want in wanted.items():
        scale = np.max(np.abs(want).reshape(len(want), -1), 1).reshape(-1, *[1] * (want.ndim - 1))
        error = np.abs(got[mode] - want)
        enough = (got[mode] == want) | (error <= 1e-4 * scale + (1e-5 if mode == "HVP" else 1e-6))
        assert np.all(enough), (mode, np.max(error / scale))
