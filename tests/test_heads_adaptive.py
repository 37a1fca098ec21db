"""Adaptive softmax: the plain definition in float64, derivatives, edges, clusters by brute force. PyTorch's numbers are
in test_peers.py."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharding
from cells import some
from interpreter import evaluated
from jax.sharding import PartitionSpec
from jaxprs import equations
from modes import strict_promotion
from platforms import as_on_accelerators, traced_anew

import jsoftmax as js
from jsoftmax import verify
from jsoftmax.heads import adaptive
from jsoftmax.heads.adaptive import CostModel, _blocks, _plan, _streamed

KEY = jax.random.key(0)
ROWS, D, CUTOFFS, CLASSES = 40, 12, (8, 30), 60
H = np.random.default_rng(1).normal(0, 1, (ROWS, D))
LABELS = np.random.default_rng(2).integers(0, CLASSES, ROWS, np.int32)
MIXED = {
    "all tails": LABELS,
    "head only": LABELS % 8,
    "one tail only": 30 + LABELS % 30,
    "every row one class": np.full(ROWS, 59, np.int32),
    "one row in a tail": np.where(np.arange(ROWS) == 17, 12, 3).astype(np.int32),
}


@pytest.fixture(scope="module", autouse=True)
def _own_programs():
    """Traces know how long a chunk is."""
    with traced_anew():
        yield


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Tails of several chunks, one of them with padding."""
    monkeypatch.setattr(_blocks, "_CHUNK", 16 * 9)


@functools.cache
def make(dtype=jnp.float32, bias=True, cutoffs=CUTOFFS):
    return adaptive.init(KEY, D, CLASSES, cutoffs, div_value=2.0, head_bias=bias, dtype=dtype)


def defined(params, h, phi):
    """Log-probabilities of all classes, typed as they stand."""

    def log_softmax(o):
        w = phi.definition(o, verify.Plain)
        return jnp.log(w) - jnp.log(jnp.sum(w, -1, keepdims=True))

    head = log_softmax(h @ params.head.T + (0 if params.bias is None else params.bias))
    first = params.cutoffs[0]
    tails = [
        head[:, first + i, None] + log_softmax(h @ tail.projection.T @ tail.weight.T)
        for i, tail in enumerate(params.tails)
    ]
    return jnp.concatenate([head[:, :first], *tails], -1)


def by_label(log_p, labels):
    return jnp.take_along_axis(log_p, labels[:, None], -1)[:, 0]


def weighted(a):
    return jnp.sum(jnp.cos(jnp.arange(1.0, 1 + a.size)) * jnp.ravel(a))


def assert_close(ours, theirs, rtol=1e-10, atol=1e-12):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def assert_same(f, g, *arguments):
    """Values, gradients, and a Hessian product in a scan, in all arguments: weights, hidden vectors, φ. Those of g, the
    plain one, are made without the scan."""

    def results(f, in_a_scan, *arguments):
        def total(*arguments):
            return weighted(f(*arguments))

        def scanned(*arguments):
            return jax.lax.scan(lambda sum_, _: (sum_ + total(*arguments), None), 0.0, None, length=1)[0]

        of = tuple(range(len(arguments)))
        directions = jax.tree.map(lambda a: jnp.cos(3 * jnp.asarray(a)), arguments)
        return f(*arguments), jax.jvp(jax.grad(scanned if in_a_scan else total, of), arguments, directions)

    ours, theirs = (evaluated(functools.partial(results, *h))(*arguments) for h in ((f, True), (g, False)))
    assert_close(ours, theirs)


# --- the functions -------------------------------------------------------------------------------------------


def test_log_prob():
    """By default of one φ: exp has reverse over reverse below."""
    with jax.enable_x64(True):
        labels = jnp.asarray(LABELS)
        assert_same(
            lambda params, h, phi: adaptive.log_prob(params, h, labels, phi=phi),
            lambda params, h, phi: by_label(defined(params, h, phi), labels),
            make(jnp.float64),
            jnp.asarray(H),
            js.spherical(0.3),
        )


@pytest.mark.parametrize("phi", some([js.exp, js.softplus], [js.softplus]), ids=str)
def test_log_probs_and_entropy(phi):
    """Of exp: values in `test_shapes_and_batches` and `test_digits`."""
    with jax.enable_x64(True):

        def plain(params, h):
            log_p = defined(params, h, phi)
            return jnp.append(jnp.ravel(log_p), -jnp.sum(jnp.exp(log_p) * log_p, -1))

        def ours(params, h):
            log_p = adaptive.log_probs(params, h, phi=phi)
            return jnp.append(jnp.ravel(log_p), adaptive.entropy(params, h, phi=phi))

        assert_same(ours, plain, make(jnp.float64, bias=False), jnp.asarray(H))


@pytest.mark.full  # The rules are those that a scan meets above; the gradient with exp is below.
def test_reverse_over_reverse_and_forward():
    """The derivative of a gradient by reverse mode, and the value's by forward mode."""
    with jax.enable_x64(True):
        labels, h, params = jnp.asarray(LABELS), jnp.asarray(H), make(jnp.float64)

        def results(f):
            def total(params, h):
                return weighted(f(params, h))

            def slope(params, h):
                return sum(weighted(a) for a in jax.tree.leaves(jax.grad(total, (0, 1))(params, h)))

            along = jax.tree.map(jnp.cos, (params, h))
            return jax.grad(slope, (0, 1))(params, h), jax.jvp(f, (params, h), along)[1]

        ours = evaluated(lambda: results(lambda params, h: adaptive.log_prob(params, h, labels)))()
        plain = evaluated(lambda: results(lambda params, h: by_label(defined(params, h, js.exp), labels)))()
        assert_close(ours, plain)


@pytest.mark.full  # Blocks of rows, here against the definition, are by default what the form for accelerators equals.
def test_any_labels():
    """No row is dropped, whatever the labels are; one program for all, as it runs for users."""
    params, h = make(), jnp.asarray(H, jnp.float32)
    f = jax.jit(jax.value_and_grad(lambda p, h, y: weighted(adaptive.log_prob(p, h, y)), (0, 1)))
    g = jax.jit(jax.value_and_grad(lambda p, h, y: weighted(by_label(defined(p, h, js.exp), y)), (0, 1)))
    for labels in MIXED.values():
        y = jnp.asarray(labels, jnp.int32)
        assert_close(f(params, h, y), g(params, h, y), rtol=2e-5, atol=2e-5)


def in_all_modes(params, h, labels, phi=js.exp, **options):
    """Value, gradient, jvp and Hessian product in weights and hidden vectors."""

    def total(params, h):
        value = adaptive.log_prob(params, h, labels, phi=phi, **options)
        return weighted(jnp.where(jnp.isnan(value), 0, value)), value

    along = jax.tree.map(lambda a: jnp.cos(3 * a.astype(jnp.float32)).astype(a.dtype), (params, h))
    gradient, hvp, value = jax.jvp(jax.grad(total, (0, 1), has_aux=True), (params, h), along, has_aux=True)
    return value, jax.jvp(lambda *a: total(*a)[1], (params, h), along)[1], gradient, hvp


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], ["bfloat16"]))
def test_as_on_accelerators(dtype, monkeypatch):
    """Tails of none, few or all rows are what blocks of rows are, in derivatives too: to the digits of the dtype. One
    program takes all labels. By default in the dtype that needs the more casts."""
    given = make(dtype), jnp.asarray(H, dtype)
    mixed = {name: jnp.asarray(a, jnp.int32).at[3].set(-100).at[4].set(CLASSES) for name, a in MIXED.items()}

    def of_each():
        f = evaluated(functools.partial(in_all_modes, ignore_label=-100))
        return {name: f(*given, labels) for name, labels in mixed.items()}

    wanted = of_each()
    monkeypatch.setattr(_streamed, "_SCORES", ROWS * 5)  # several blocks of classes
    with as_on_accelerators():
        found = of_each()
    tolerance = 1e-5 if dtype == "float32" else 0.03
    for name in MIXED:
        for got, want in zip(jax.tree.leaves(found[name]), jax.tree.leaves(wanted[name]), strict=True):
            scale = np.nanmax(np.abs(np.float32(want)))
            np.testing.assert_allclose(np.float32(got), np.float32(want), tolerance, tolerance * scale, err_msg=name)


def test_shapes_and_batches():
    params, plain = make(bias=False), make(cutoffs=())
    h, y = jnp.asarray(H, jnp.float32), jnp.asarray(LABELS)

    @evaluated
    def results(h, y):
        batches = h.reshape(5, 8, D), y.reshape(5, 8)
        want = js.log_softmax(h @ plain.head.T + plain.bias)
        same = [
            adaptive.log_prob(params, *batches).ravel(),
            jax.vmap(functools.partial(adaptive.log_prob, params))(*batches).ravel(),
            adaptive.log_prob(params, h, y),
            by_label(adaptive.log_probs(params, h), y),
        ]
        return same, adaptive.log_prob(params, h[0], y[0]), (adaptive.log_prob(plain, h, y), by_label(want, y))

    def of_few(h, y):
        return adaptive.log_prob(params, h, y), adaptive.entropy(params, h), adaptive.predict(params, h)

    same, one, (ours, want) = results(h, y)
    few = [jax.eval_shape(of_few, h[:n], y[:n]) for n in (0, 1)]
    for other in same[1:]:
        np.testing.assert_allclose(other, same[0], rtol=1e-5)
    np.testing.assert_allclose(one, same[0][0], rtol=1e-5)
    assert [[a.shape for a in result] for result in few] == [[(0,)] * 3, [(1,)] * 3]
    assert plain.cutoffs == (CLASSES,)
    np.testing.assert_allclose(ours, want, rtol=1e-5)
    np.testing.assert_array_equal(adaptive.predict(plain, h), jnp.argmax(h @ plain.head.T + plain.bias, -1))


def test_layout():
    """Every row of a group has one place, in a block of its group; also where each group leaves a block unfilled."""
    lay_out = jax.jit(_blocks.lay_out, static_argnums=(1, 2))
    rng = np.random.default_rng(0)
    worst = np.repeat([0, 1, 2], [17, 17, 30])
    cases = [(rng.permutation(worst), 3, 16), (np.zeros(1, int), 1, 16), (np.full(7, 3), 3, 4)]
    cases += [(rng.integers(0, 4, 64), 3, 4) for _ in range(4)]  # group 3 is none
    for groups, count, length in cases:
        layout = lay_out(jnp.asarray(groups, jnp.int32), count, length)
        row, taken = np.asarray(layout.row), np.asarray(layout.taken)
        assert sorted(row[taken]) == list(np.flatnonzero(groups < count))
        place = np.asarray(layout.place)
        for n in np.flatnonzero(groups < count):
            assert row.ravel()[place[n]] == n
            assert layout.group[place[n] // length] == groups[n]


def test_skipped_blocks_cost_no_copy_of_the_weights():
    """In the gradient's program a branch hands weights, and the sum of their gradients, on as it got them, or adds to
    them; none makes zeros of that size."""
    params = make()
    gradient = jax.make_jaxpr(jax.grad(lambda p: jnp.sum(adaptive.log_prob(p, H.astype(np.float32), LABELS))))(params)
    sizes = [(_blocks._chunk_length(len(tail.weight), 16), tail.weight.shape[1]) for tail in params.tails]
    made_by = set()
    for equation in equations(gradient.jaxpr):
        for branch in equation.params["branches"] if equation.primitive.name == "cond" else ():
            makers = {v: e.primitive.name for e in branch.jaxpr.eqns for v in e.outvars}
            handed_on = [v for v in branch.jaxpr.outvars if v.aval.shape in sizes]
            made_by |= {makers.get(v, "argument") for v in handed_on}
    assert made_by - {"argument"} == {"add_any"}


def test_predict():
    params, h = jax.tree.map(lambda a: 3 * np.asarray(a), make()), np.float32(H)
    params.bias[8:] += 1
    predict = evaluated(adaptive.predict)
    for phi in (js.exp, js.spherical(0.3)):
        best = evaluated(lambda *given, phi=phi: jnp.argmax(adaptive.log_probs(*given, phi=phi), -1))
        np.testing.assert_array_equal(predict(params, h, phi=phi), best(params, h))
    mode = np.asarray(predict(params, h))
    assert len(set(np.digitize(mode, CUTOFFS))) == 3  # of the head and of both tails
    even = jax.tree.map(np.zeros_like, params)
    np.testing.assert_array_equal(predict(even, h), 0)
    in_tail = even._replace(bias=np.float32(9 * (np.arange(10) == 9)))
    np.testing.assert_array_equal(predict(in_tail, h), 30)
    third = np.arange(ROWS) == 3
    np.testing.assert_array_equal(predict(params, np.where(third[:, None], np.nan, h)), np.where(third, -1, mode))
    assert not evaluated(jax.grad(lambda h: adaptive.predict(params, h).sum() * 1.0))(h).any()


# --- the most probable classes, and draws --------------------------------------------------------------------


@pytest.mark.parametrize("phi", some([js.exp, js.spherical(0.3)], [js.spherical(0.3)]), ids=str)
def test_top_k(phi):
    """Values and derivatives, of the head and of both tails."""
    with jax.enable_x64(True):
        params = make(jnp.float64)
        params = params._replace(bias=params.bias.at[8:].add(2.0))
        assert_same(
            lambda params, h: adaptive.top_k(params, h, 11, phi=phi).log_prob,
            lambda params, h: jax.lax.top_k(defined(params, h, phi), 11)[0],
            params,
            jnp.asarray(H),
        )


def test_top_k_of_log_probs():
    """Also where no tail is searched, or none of the head's classes is among them; for one class and for all."""
    made, h, counts = jax.tree.map(lambda a: 3 * a, make()), jnp.asarray(H, jnp.float32), (1, 5, 20, CLASSES)

    log_probs, every = jax.jit(adaptive.log_probs), jax.jit(lambda *a: [adaptive.top_k(*a, k) for k in counts])
    for tail_bias, k in itertools.product((-9.0, 0.0, 2.0, 9.0), range(len(counts))):
        params = made._replace(bias=made.bias.at[8:].add(tail_bias))
        found, (best, index) = every(params, h)[k], jax.lax.top_k(log_probs(params, h), counts[k])
        np.testing.assert_array_equal(found.indices, index)
        np.testing.assert_allclose(found.log_prob, best, rtol=1e-6)


@pytest.mark.full  # The largest by parts are in test_heads.py, `test_top_k_of_long_blocks`.
def test_top_k_of_many_classes():
    """A tail of so many that its largest are found by parts, with a class that is there twice."""
    params = adaptive.init(KEY, 8, 1500, (20,), div_value=1)
    weight = params.tails[0].weight.at[700].set(params.tails[0].weight[30])
    params = params._replace(tails=(params.tails[0]._replace(weight=weight),))
    at_both = jnp.linalg.pinv(params.tails[0].projection) @ weight[30]
    h = jnp.concatenate([jax.random.normal(KEY, (37, 8)), at_both[None]])
    log_p = adaptive.log_probs(params, 3 * h)
    for k in (1, 4):
        np.testing.assert_array_equal(adaptive.top_k(params, 3 * h, k).indices, jax.lax.top_k(log_p, k)[1])


def test_top_k_of_equals():
    """The first first: all of the head, then all of either tail."""
    even = jax.tree.map(jnp.zeros_like, make())
    found = adaptive.top_k(even, jnp.ones((3, 2, D)), CLASSES)
    np.testing.assert_array_equal(found.indices, np.broadcast_to(np.arange(CLASSES), (3, 2, CLASSES)))
    as_one = even._replace(bias=even.bias.at[8:].set(jnp.log(jnp.array([22.0, 30.0]))))  # 1/60 each, but for rounding
    np.testing.assert_allclose(adaptive.top_k(as_one, jnp.ones(D), 20).log_prob, -np.log(60), rtol=1e-6)


def spoil(tail):
    return tail._replace(weight=tail.weight.at[3].set(jnp.nan))


@pytest.mark.full  # By default bad rows of losses, entropies and modes, and impossible classes of top k, below.
def test_bad_rows_of_top_k_and_draws():
    """NaN in the head is in that row alone; in a tail in rows that searched it, whatever their neighbours did."""
    params, h = make(), jnp.asarray(H, jnp.float32)
    top = jax.jit(functools.partial(adaptive.top_k, k=5))
    draw = functools.partial(adaptive.categorical, KEY, shape=(7, ROWS), return_log_prob=True)
    draw = jax.jit(draw, static_argnames="replace")
    clean = jax.tree.map(np.asarray, top(params, h))
    for bad in (jnp.nan, jnp.inf):
        one, spoilt_h = np.arange(ROWS) == 5, h.at[5].set(bad)
        found = top(params, spoilt_h)
        np.testing.assert_array_equal(found.indices, np.where(one[:, None], -1, clean.indices))
        np.testing.assert_array_equal(found.log_prob, np.where(one[:, None], np.nan, clean.log_prob))
        for replace in (True, False):
            drawn, log_p = draw(params, spoilt_h, replace=replace)
            want, want_log_p = map(np.asarray, draw(params, h, replace=replace))
            np.testing.assert_array_equal(drawn, np.where(one, -1, want))
            np.testing.assert_allclose(log_p, np.where(one, np.nan, want_log_p), rtol=1e-6)
    spoilt = params._replace(tails=(params.tails[0], spoil(params.tails[1])))
    found = top(spoilt, h)
    head, log_p = jax.jit(lambda: (js.log_softmax(h @ params.head.T + params.bias), adaptive.log_probs(params, h)))()
    searched = np.asarray(head)[:, 9] > np.sort(np.asarray(log_p)[:, :30], -1)[:, -5]
    assert 0 < np.sum(searched) < ROWS
    np.testing.assert_array_equal(np.isnan(found.log_prob[:, 0]), searched)
    np.testing.assert_array_equal(found.indices, np.where(searched[:, None], -1, clean.indices))
    drawn, log_p = draw(spoilt, h, replace=True)
    want = np.asarray(draw(params, h, replace=True)[0])
    np.testing.assert_array_equal(drawn, np.where(want >= 30, -1, want))
    np.testing.assert_array_equal(np.isnan(log_p), want >= 30)


def impossible():
    """φ, weights and hidden vectors with which some classes are impossible; and weights with which all are."""
    params = make()
    nothing = params._replace(head=0 * params.head, bias=jnp.full(10, -9.0))
    return js.q_exponential(0.5), params, 9 * jnp.asarray(H, jnp.float32), nothing


def test_impossible_classes_of_top_k():
    """Beyond the classes that are possible: −inf and −1; without any, the mode is −1."""
    phi, params, h, nothing = impossible()

    @evaluated
    def results(params, h, nothing):
        best, index = jax.lax.top_k(adaptive.log_probs(params, h, phi=phi), CLASSES)
        return best, index, adaptive.top_k(params, h, CLASSES, phi=phi), adaptive.predict(nothing, h, phi=phi)

    best, index, found, mode = results(params, h, nothing)
    assert np.any(best == -jnp.inf)
    np.testing.assert_allclose(found.log_prob, best, rtol=1e-5)
    np.testing.assert_array_equal(found.indices, jnp.where(best > -jnp.inf, index, -1))
    np.testing.assert_array_equal(mode, -1)


@pytest.mark.full  # By default those of top k, above.
def test_impossible_classes_of_draws():
    """Beyond the classes that are possible: −inf and −1."""
    phi, params, h, nothing = impossible()

    @evaluated
    def results(params, h):
        distinct = {"shape": (CLASSES, ROWS), "replace": False, "phi": phi, "return_log_prob": True}
        return adaptive.log_probs(params, h, phi=phi), adaptive.categorical(KEY, params, h, **distinct)

    log_p, (every, every_log_p) = results(params, h)
    possible = jnp.where(log_p > -jnp.inf, jnp.arange(CLASSES), -1)
    assert np.any(possible == -1)
    np.testing.assert_array_equal(jnp.sort(every, 0).T, jnp.sort(possible, 1))
    np.testing.assert_array_equal(every_log_p == -jnp.inf, every == -1)
    none = adaptive.categorical(KEY, nothing, h, phi=phi, return_log_prob=True)
    np.testing.assert_array_equal(none, [[-1] * ROWS, [-jnp.inf] * ROWS])


@pytest.mark.full  # Derivatives where φ is 0 are those of maps.py, which are in test_edges.py.
def test_derivatives_beside_impossible_classes_of_top_k_and_draws():
    """They are finite."""
    phi, params, h, _ = impossible()

    def total(h):
        a = adaptive.top_k(params, h, CLASSES, phi=phi).log_prob
        b = adaptive.categorical(KEY, params, h, phi=phi, return_log_prob=True)[1]
        return jnp.sum(jnp.where(a > -jnp.inf, a, 0)) + jnp.sum(b)

    assert np.isfinite(evaluated(jax.grad(total))(h)).all()


def chi_square(drawn, p):
    """Σ (n − m p)²/(m p) in standard deviations from its mean, classes of fewer than five expected draws as one."""
    counts, expected = np.bincount(drawn, minlength=len(p)), drawn.size * np.float64(p)
    few = expected < 5
    counts, expected = (np.append(a[~few], a[few].sum()) for a in (counts, expected))
    degrees = len(counts) - 1
    return (np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-9)) - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("many_rows", [False, True])
def test_draws(many_rows):
    """Frequencies of draws with and without replacement, many of a row or one of each of many."""
    params = jax.tree.map(lambda a: 2 * a, make())
    params = params._replace(bias=params.bias.at[8:].add(1.0))
    draws, h = 6000, jnp.asarray(H[:1], jnp.float32)
    p = np.exp(np.float64(adaptive.log_probs(params, h)[0]))
    if many_rows:
        drawn = adaptive.categorical(KEY, params, jnp.broadcast_to(h, (draws, D)))
    else:
        drawn = adaptive.categorical(KEY, params, h, shape=(draws, 1)).ravel()
    assert chi_square(drawn, p) < 4
    assert chi_square(drawn, p[::-1]) > 100
    first, second = adaptive.categorical(KEY, params, jnp.broadcast_to(h, (draws, D)), shape=(2, draws), replace=False)
    assert not np.any(first == second)
    assert chi_square(first, p) < 4
    assert chi_square(second, p * (np.sum(p / (1 - p)) - p / (1 - p))) < 4
    pairs = 8 * np.minimum(first, 7) + np.minimum(second, 7)  # of the classes below 7, and of the others
    q = np.append(p[:7], p[7:].sum())
    joint = q[:, None] * q / (1 - q[:, None])
    inner = np.sum(p[7:] * (1 - p[:7].sum() - p[7:]) / (1 - p[7:]))  # two of the others
    joint[7, :7], joint[7, 7] = np.sum(p[7:, None] * p[:7] / (1 - p[7:, None]), 0), inner
    joint[np.arange(7), np.arange(7)] = 0
    assert chi_square(pairs, joint.ravel()) < 4


@pytest.mark.full  # By default draws by noise of other functions, in test_gumbel_statistics.py.
def test_one_draw_as_on_accelerators():
    """By noise there; the same law."""
    params, h = make(), jnp.broadcast_to(jnp.asarray(H[:1], jnp.float32), (4000, D))
    p = np.exp(np.float64(adaptive.log_probs(params, h[0])))
    with as_on_accelerators():
        drawn = adaptive.categorical(KEY, params, h)
    assert chi_square(drawn, p) < 4


@pytest.mark.full  # By default those of the losses, above.
def test_shapes_of_top_k_and_draws():
    params, h = make(), jnp.asarray(H, jnp.float32)
    for rows in (0, 1, 17):
        drawn = adaptive.categorical(KEY, params, h[:rows], shape=(2, 3, rows), replace=False)
        assert drawn.shape == (2, 3, rows)
        assert adaptive.top_k(params, h[:rows], 3).indices.shape == (rows, 3)
    for replace in (True, False):
        assert adaptive.categorical(KEY, params, h, shape=(0, ROWS), replace=replace).shape == (0, ROWS)
    plain = make(cutoffs=())
    assert set(adaptive.categorical(KEY, plain, h[0], shape=(500,)).tolist()) <= set(range(CLASSES))
    assert adaptive.categorical(jax.random.PRNGKey(0), params, h[0]).shape == ()


@pytest.mark.full  # Batches are made rows in one place for all functions; those of the losses are above.
def test_batches_of_top_k_and_draws():
    """As of rows, mapped over and in a loop, too."""

    @evaluated
    def results(params, h):
        top, batches = functools.partial(adaptive.top_k, params, k=3), h.reshape(5, 8, D)
        tops = [f(batches) for f in (top, jax.vmap(top), functools.partial(jax.lax.map, top))]
        draws = [adaptive.categorical(KEY, params, a, shape=(4, *a.shape[:-1])) for a in (h, batches)]
        mapped = jax.vmap(adaptive.categorical, (None, None, 0))(KEY, params, batches)
        return top(h), tops, draws, mapped, adaptive.categorical(KEY, params, batches[0])

    whole, tops, (drawn, of_batches), mapped, of_one = results(make(), jnp.asarray(H, jnp.float32))
    for found in tops:
        np.testing.assert_array_equal(found.indices.reshape(ROWS, 3), whole.indices)
        np.testing.assert_allclose(found.log_prob.reshape(ROWS, 3), whole.log_prob, rtol=1e-6)
    np.testing.assert_array_equal(of_batches.reshape(4, ROWS), drawn)
    assert mapped.shape == (5, 8)
    np.testing.assert_array_equal(mapped[0], of_one)


@pytest.mark.parametrize("replace", some([True, False], [False]))
def test_log_prob_of_draws(replace):
    """What `log_prob` says of them, derivatives too. By default of distinct ones, which take the same way and a longer
    one."""
    params, h = make(), jnp.asarray(H, jnp.float32)

    def of_draws(params, h):
        return adaptive.categorical(KEY, params, h, shape=(3, ROWS), replace=replace, return_log_prob=True)

    @evaluated
    def ours_and_plain(params, h):
        drawn, _ = of_draws(params, h)

        def ours(params, h):
            return weighted(of_draws(params, h)[1])

        def plain(params, h):
            return weighted(jnp.stack([by_label(defined(params, h, js.exp), y) for y in drawn]))

        return [jax.value_and_grad(f, (0, 1))(params, h) for f in (ours, plain)]

    assert_close(*ours_and_plain(params, h), rtol=1e-4, atol=1e-4)


CUT = PartitionSpec("v")
OVER_ROWS = {"mesh": sharding.mesh(), "in_specs": (PartitionSpec(), CUT)}


@pytest.mark.full  # Rows are independent of each other; heads are differentiated in shard_map in test_heads_sharded.py.
def test_derivatives_of_rows_on_several_devices():
    """Gradient and Hessian product of top k inside shard_map."""
    params, h = make(), jnp.asarray(H, jnp.float32)
    top = functools.partial(adaptive.top_k, k=4)
    sharded = jax.shard_map(top, out_specs=CUT, **OVER_ROWS)

    def results(f):
        gradient = jax.grad(lambda params, h: weighted(jnp.exp(f(params, h).log_prob)), (0, 1))
        return evaluated(lambda *given: jax.jvp(gradient, given, given))(params, h)

    sharding.assert_close(results(sharded), results(top), 1e-4)


@pytest.mark.full  # Rows are independent of each other, as the batches of the losses show.
@pytest.mark.parametrize("replace", [True, False])
def test_rows_on_several_devices(replace):
    """Top k and draws of rows that are sharded, inside shard_map and under jit."""
    params, h = make(), jnp.asarray(H, jnp.float32)
    top = evaluated(functools.partial(adaptive.top_k, k=4))
    whole = top(params, h)
    placed = jax.device_put(h, jax.NamedSharding(OVER_ROWS["mesh"], CUT))
    inside = evaluated(jax.shard_map(functools.partial(adaptive.top_k, k=4), out_specs=CUT, **OVER_ROWS))
    for found in (top(params, placed), inside(params, h)):
        np.testing.assert_array_equal(found.indices, whole.indices)
        np.testing.assert_allclose(found.log_prob, whole.log_prob, rtol=1e-5)
    draw = functools.partial(adaptive.categorical, KEY, replace=replace, shape=(6, 10))
    drawn = evaluated(jax.shard_map(draw, out_specs=PartitionSpec(None, "v"), **OVER_ROWS))(params, h)
    of_part = evaluated(draw)
    for i in range(sharding.DEVICES):
        part = of_part(params, h[10 * i :][:10])
        assert np.mean(drawn[:, 10 * i :][:, :10] == part) > 0.95  # a rounding may move a draw


@pytest.mark.full  # Blocks bound the memory of each head alike: test_heads_machinery.py measures it.
def test_memory_of_top_k_and_draws():
    """No array of rows × classes."""
    rows, classes = 16384, 4000
    params = jax.eval_shape(lambda: adaptive.init(KEY, 16, classes, (500,)))
    hidden = jax.ShapeDtypeStruct((rows, 16), jnp.float32)

    def gradient(params, h):
        return jax.grad(lambda p, h: jnp.sum(adaptive.top_k(p, h, 3).log_prob), (0, 1))(params, h)

    def draws(params, h, replace):
        return adaptive.categorical(KEY, params, h, shape=(2, rows), replace=replace)

    for f in (gradient, functools.partial(draws, replace=True), functools.partial(draws, replace=False)):
        found = verify.jit_formulas(f).lower(params, hidden).compile().memory_analysis().temp_size_in_bytes
        assert found < 4 * rows * classes / 8


def certain(gap):
    """Weights by which one row is sure of a class of tail 1, in float32 numbers."""
    params = jax.tree.map(jnp.zeros_like, make(bias=False))
    (one, other), head = params.tails, params.head.at[9, 0].set(gap)
    other = other._replace(projection=other.projection.at[0, 0].set(1.0), weight=other.weight.at[25, 0].set(gap))
    return params._replace(head=head, tails=(one, other)), jnp.eye(1, D)[0]


def test_digits():
    """Losses and entropies near 0 keep theirs, over several chunks."""
    xp = verify.ManyDigits()
    for gap in (4, 12, 20, 40):
        params, h = certain(gap)
        small, head, tail = xp.mp.exp(-gap), xp.mp.mpf(9), xp.mp.mpf(29)
        loss = xp.mp.log1p(head * small) + xp.mp.log1p(tail * small)
        np.testing.assert_allclose(-adaptive.log_prob(params, h, jnp.array(55)), float(loss), rtol=1e-6)
        one_p = 1 / (1 + head * small)
        H = [xp.mp.log1p(n * small) + n * small / (1 + n * small) * gap for n in (head, tail)]
        H = H[0] + one_p * H[1] + small * one_p * xp.mp.log(22)
        np.testing.assert_allclose(adaptive.entropy(params, h), float(H), rtol=1e-6)


def test_edges():
    params, h, y = make(), jnp.asarray(H, jnp.float32), jnp.asarray(LABELS)
    f = jax.jit(lambda h, y, where: adaptive.log_prob(params, h, y, where))
    entropy, every = jax.jit(functools.partial(adaptive.entropy, params)), jnp.ones(ROWS, bool)
    clean = f(h, y, every)
    for bad in (-1, CLASSES, 10**6):
        got = f(h, y.at[5].set(bad), every)
        np.testing.assert_array_equal(got, clean.at[5].set(jnp.nan))
    for bad in (jnp.nan, jnp.inf):
        np.testing.assert_array_equal(np.isnan(f(h.at[5].set(bad), y, every)), np.arange(ROWS) == 5)
        np.testing.assert_array_equal(np.isnan(entropy(h.at[5].set(bad))), np.arange(ROWS) == 5)
    # a row left out may hold anything, and has no part in the gradients
    quiet = every.at[5].set(False)
    spoilt = f(h.at[5].set(jnp.nan), y.at[5].set(-1), quiet)
    np.testing.assert_allclose(spoilt, clean.at[5].set(0), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda p, h, y, w: jnp.sum(adaptive.log_prob(p, h, y, w)), (0, 1)))
    one = gradient(params, h.at[5].set(jnp.nan), y.at[5].set(-1), quiet)
    other = gradient(params, h.at[5].set(0.0), y, quiet)
    assert_close(one, other, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(one[1][5], 0)
    # a class whose φ is 0
    out = adaptive.log_prob(params, 9 * h, y, phi=js.q_exponential(0.5))
    assert np.any(np.isneginf(out))
    assert not np.any(np.isnan(out))


def everything(params, h, y):
    """Gradients of each function, floats and classes."""

    def drawn(params):
        classes, log_p = adaptive.categorical(KEY, params, h, return_log_prob=True)
        return -jnp.sum(log_p), classes

    def top(params):
        found = adaptive.top_k(params, h, 3)
        return -jnp.sum(found.log_prob), found.indices

    def loss(params):
        return -jnp.sum(adaptive.log_prob(params, h, y)), adaptive.predict(params, h)

    made = [jax.value_and_grad(f, has_aux=True)(params) for f in (loss, top, drawn)]
    floats = [of for (of, _), _ in made] + [adaptive.entropy(params, h), adaptive.log_probs(params, h)]
    return [gradient for _, gradient in made], floats, [classes for (_, classes), _ in made]


@pytest.mark.full  # Dtypes are known when a program is traced, which is below.
def test_dtypes_under_strict_promotion_and_debug_nans():
    """Narrow inputs give float32, and gradients whose sums over blocks are rounded once."""
    y = jnp.asarray(30 + LABELS % 30, jnp.int8)
    with strict_promotion(), jax.debug_nans(True):
        f = evaluated(everything)
        narrow = make(jnp.bfloat16, cutoffs=(8,)), jnp.asarray(H, jnp.bfloat16)
        gradient, floats, classes = f(*narrow, y)
        by_float32, *_ = f(*jax.tree.map(lambda a: a.astype(jnp.float32), narrow), y)
    assert {a.dtype for a in floats} == {jnp.dtype(jnp.float32)}
    assert {a.dtype for a in classes} == {jnp.dtype(jnp.int32)}
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(by_float32), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_array_equal(a, b.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", some([jnp.float64, jnp.bfloat16], [jnp.bfloat16]))  # a narrow one needs more casts
def test_strict_promotion(dtype):
    with jax.enable_x64(dtype == jnp.float64), strict_promotion():
        given = make(dtype, cutoffs=(8,)), jnp.asarray(H, dtype), jnp.asarray(LABELS)
        gradient, floats, classes = jax.eval_shape(everything, *given)
        assert {a.dtype for a in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}
        assert {a.dtype for a in floats} == {jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)}
        assert {a.dtype for a in classes} == {jnp.dtype(jnp.int32)}


# --- weights -------------------------------------------------------------------------------------------------


def test_init():
    params = adaptive.init(KEY, 512, 2000, (100, 400), head_bias=True)
    shapes = [(102, 512), (102,), (128, 512), (300, 128), (32, 512), (1600, 32)]
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == shapes
    assert params.cutoffs == (100, 400, 2000)
    for leaf in jax.tree.leaves(params):
        limit = 512**-0.5 if leaf.ndim == 1 else leaf.shape[1] ** -0.5
        assert np.abs(leaf).max() <= limit
        np.testing.assert_allclose(np.std(leaf), limit / 3**0.5, rtol=0.1)
    assert adaptive.init(KEY, 512, 2000, (100,)).bias is None


def test_state():
    for bias in (True, False):
        params = make(bias=bias)
        back = adaptive.from_torch(adaptive.to_state(params))
        assert_close(params, back, rtol=0, atol=0)
        assert back.cutoffs == params.cutoffs
    narrow = adaptive.to_state(make(jnp.bfloat16))
    assert {value.dtype for value in narrow.values()} == {np.dtype(np.float32)}


# --- where to cut --------------------------------------------------------------------------------------------


def cost(cutoffs, counts, *, d, batch, model, div_value):
    """The cost of a plan, typed as it stands."""
    p = counts / counts.sum()
    edges = [*cutoffs, len(counts)]
    total = model(edges[0] + len(cutoffs), batch, d)
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        width, rows = d // div_value ** (i + 1), batch * p[a:b].sum()
        total += model(b - a, rows, width) + model.per_product * d * width * rows
    return total


@pytest.mark.parametrize(
    "model",
    [
        CostModel(1e-4, 1e-9, 0.0),
        CostModel(0.0, 1e-9, 1e-8, 1e-9, 30.0),
        CostModel(2e-6, 1e-9, 0.0, 0.0, 100.0),
        CostModel(1.0, 1e-9, 0.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("classes", [2, 14])
def test_plan_equals_brute_force(classes, model):
    counts = 1 / np.arange(1.0, classes + 1) ** 1.2
    plan = adaptive.plan_clusters(counts, 64, 50, model, div_value=2)
    options = {"d": 64, "batch": 50, "model": model, "div_value": 2}
    every = [c for tails in range(5) for c in itertools.combinations(range(1, classes), tails)]
    costs = [cost(cutoffs, counts, **options) for cutoffs in every]
    np.testing.assert_allclose(plan.seconds, min(costs), rtol=1e-12)
    np.testing.assert_allclose(cost(plan.cutoffs, counts, **options), min(costs), rtol=1e-12)


def test_plan_of_many_classes():
    """On the grid: near the plan of all edges for 1,500 classes, fast for more, and what `init` takes."""
    model = CostModel(1e-4, 2e-11, 5e-10, 1e-10, 1000.0)
    counts = 1 / np.arange(1.0, 1501)
    exact = adaptive.plan_clusters(counts, 256, 512, model, candidates=1500)
    assert 1 <= adaptive.plan_clusters(counts, 256, 512, model).seconds / exact.seconds < 1.01
    counts = 1 / np.arange(1.0, 1_000_001)
    plan = adaptive.plan_clusters(counts, 256, 512, model)
    np.testing.assert_allclose(
        plan.seconds, cost(plan.cutoffs, counts, d=256, batch=512, model=model, div_value=4.0), rtol=1e-9
    )
    assert 1 <= len(plan.cutoffs) <= 4
    assert all(c % 512 == 0 for c in plan.cutoffs if c > 2**14)
    assert len(adaptive.plan_clusters(counts, 256, 512, model, max_tails=1).cutoffs) == 1
    assert adaptive.plan_clusters(counts, 3, 512, model).cutoffs == ()  # no width is left for a tail
    shapes = jax.eval_shape(lambda: adaptive.init(KEY, 256, 1_000_000, plan.cutoffs))
    assert shapes.cutoffs == (*plan.cutoffs, 1_000_000)


def test_cost_model(monkeypatch):
    """The fit finds what made the times. What is measured runs in the docstring's example."""
    for want in (
        CostModel(1e-4, 2e-11, 3e-10, 1e-10),
        CostModel(0.0, 2e-11),
        CostModel(1e-5, 2e-11, 0.0, 0.0, 128 * 512.0),
    ):
        monkeypatch.setattr(_plan, "_seconds", lambda point, *_, want=want: float(want(*point)))
        np.testing.assert_allclose(adaptive.measure_cost_model(512, 2048), want, rtol=1e-8, atol=1e-20)
    noise = iter(np.exp(np.random.default_rng(0).normal(0, 0.05, 12)))
    want = CostModel(1e-4, 2e-11, 3e-10)
    monkeypatch.setattr(_plan, "_seconds", lambda point, *_: next(noise) * float(want(*point)))
    np.testing.assert_allclose(adaptive.measure_cost_model(512, 2048)(5000, 300, 128), want(5000, 300, 128), rtol=0.1)


# --- wrong calls ---------------------------------------------------------------------------------------------

raw = inspect.unwrap
P = make()
STATE = adaptive.to_state(P)
MODEL = CostModel(1.0, 1.0)
init, log_prob, plan = map(raw, (adaptive.init, adaptive.log_prob, adaptive.plan_clusters))
WRONG = [
    (lambda: init(0, 8, 20, (5,)), TypeError, "init: key must be one PRNG key"),
    (lambda: init(KEY, 8.0, 20, (5,)), TypeError, "init: d must be an int >= 1; got 8.0"),
    (lambda: init(KEY, 8, 0, (5,)), ValueError, "init: num_classes must be an int >= 1; got 0"),
    (lambda: init(KEY, 8, 20, 5), TypeError, "init: cutoffs must be a tuple of ints; got 5"),
    (lambda: init(KEY, 8, 20, (5, 5)), ValueError, "init: cutoffs must increase"),
    (lambda: init(KEY, 8, 20, (5, 20)), ValueError, "init: cutoffs must increase inside [1, num_classes - 1]"),
    (lambda: init(KEY, 8, 20, (0, 5)), ValueError, "init: cutoffs must increase"),
    (lambda: init(KEY, 8, 20, (5,), div_value=0), ValueError, "init: div_value must be > 0 and finite; got 0"),
    (lambda: init(KEY, 8, 20, (5, 9)), ValueError, "init: every tail must keep a width of at least 1"),
    (lambda: init(KEY, 8, 20, (5,), dtype=int), TypeError, "init: dtype must be floating"),
    (lambda: log_prob(tuple(P), H, LABELS), TypeError, "log_prob: params must be AdaptiveParams; got tuple"),
    (
        lambda: log_prob(P._replace(head=P.head[:2]), H, LABELS),
        ValueError,
        "log_prob: params must have shapes that fit",
    ),
    (lambda: log_prob(P._replace(bias=P.head[0]), H, LABELS), ValueError, "log_prob: params must have shapes that fit"),
    (lambda: log_prob(P._replace(tails=P.tails[:1]), H[:, :3], LABELS), ValueError, "log_prob: hidden must have 12"),
    (lambda: log_prob(P, H.astype(int), LABELS), TypeError, "log_prob: hidden must be floating; got dtype int"),
    (lambda: log_prob(P, H, LABELS[:3]), ValueError, "log_prob: labels must have the shape of hidden without"),
    (lambda: log_prob(P, H, LABELS * 1.0), TypeError, "log_prob: labels must be integers; got dtype float"),
    (lambda: log_prob(P, H, LABELS, LABELS), TypeError, "log_prob: where must be boolean"),
    (lambda: log_prob(P, H, LABELS, phi=jnp.exp), TypeError, "log_prob: phi must be a φ"),
    (lambda: adaptive.log_probs(P, H[:, 1:]), ValueError, "log_probs: hidden must have 12 numbers"),
    (lambda: raw(adaptive.predict)(P, H, phi=1), TypeError, "predict: phi must be a φ"),
    (lambda: raw(adaptive.top_k)(P, H, LABELS), TypeError, "top_k: k must be an int known at trace time"),
    (lambda: raw(adaptive.top_k)(P, H, 61), ValueError, "top_k: k must be an int in [1, 60]; got 61"),
    (lambda: raw(adaptive.top_k)(P, H[:, 1:], 3), ValueError, "top_k: hidden must have 12 numbers"),
    (lambda: raw(adaptive.categorical)(P, H, KEY), TypeError, "categorical: key must be one PRNG key"),
    (lambda: raw(adaptive.categorical)(KEY, H, P), TypeError, "categorical: params must be AdaptiveParams"),
    (lambda: raw(adaptive.categorical)(KEY, P, H, shape=(3,)), ValueError, "categorical: shape must end in the"),
    (lambda: raw(adaptive.categorical)(KEY, P, H, replace=1), TypeError, "categorical: replace must be True or False"),
    (
        lambda: raw(adaptive.categorical)(KEY, P, H, shape=(61, ROWS), replace=False),
        ValueError,
        "categorical: shape must ask for no more draws than there are classes, 60",
    ),
    (lambda: raw(adaptive.entropy)(None, H), TypeError, "entropy: params must be AdaptiveParams; got NoneType"),
    (lambda: adaptive.from_torch(3), TypeError, "from_torch: module_or_state must be a module or its state_dict"),
    (lambda: adaptive.from_torch({"x": 1}), ValueError, "from_torch: module_or_state must have head.weight"),
    (lambda: adaptive.from_torch(STATE | {"head.bias": H}), ValueError, "from_torch: params must have shapes that fit"),
    (lambda: raw(adaptive.to_state)(STATE), TypeError, "to_state: params must be AdaptiveParams; got dict"),
    (lambda: plan(np.arange(9), 8, 9, MODEL), ValueError, "plan_clusters: frequencies must be in decreasing order"),
    (lambda: plan(-H[:, 0], 8, 9, MODEL), ValueError, "plan_clusters: frequencies must be a [V] array of counts"),
    (lambda: jax.jit(lambda f: plan(f, 8, 9, MODEL))(H[0]), TypeError, "plan_clusters: frequencies must be numbers"),
    (lambda: plan(np.ones(9), 8, 9.5, MODEL), TypeError, "plan_clusters: batch must be an int >= 1; got 9.5"),
    (lambda: plan(np.ones(9), 8, 9, MODEL, max_tails=-1), ValueError, "plan_clusters: max_tails must be an int >= 0"),
    (lambda: plan(np.ones(9), 8, 9, (1, 2)), TypeError, "plan_clusters: cost_model must be a CostModel; got tuple"),
    (lambda: adaptive.measure_cost_model(0, 9), ValueError, "measure_cost_model: d must be an int >= 1; got 0"),
    (lambda: adaptive.measure_cost_model(8, 9, classes=(1,)), ValueError, "measure_cost_model: classes must be"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong[2])
def test_wrong_calls(wrong):
    call, error, says = wrong
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(says)
