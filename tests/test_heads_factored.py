"""SGD in factored form against SGD on the dense weight; memory, edges, wrong calls."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells import and_full, some
from interpreter import evaluated
from modes import strict_promotion

import jsoftmax as js
from jsoftmax import losses
from jsoftmax.heads import factored
from jsoftmax.heads.factored import log_loss, z_loss

RNG = np.random.default_rng(11)
V, D, STEPS = 60, 6, 320
WEIGHT = 0.3 * RNG.normal(size=(V, D))
LOSSES = {  # the loss, and the same of scores
    "taylor": (log_loss(js.taylor(2)), functools.partial(losses.cross_entropy, phi=js.taylor(2))),
    "spherical": (log_loss(js.spherical(1.0)), functools.partial(losses.cross_entropy, phi=js.spherical(1.0))),
    "z_loss": (z_loss(1.5, 0.3), functools.partial(losses.spherical_z_loss, scale=1.5, shift=0.3)),
}
RATES = {"taylor": 6.0, "spherical": 6.0, "z_loss": 60.0}


def batches(rows, steps=STEPS, rate=6.0):
    """Batches in which half of the labels are from four classes, so that most batches have some labels twice."""
    rng = np.random.default_rng(rows)
    labels = np.where(rng.random((steps, rows)) < 0.5, rng.integers(4, size=(steps, rows)), rng.integers(V))
    hidden = np.cos(np.arange(V)[:, None] * (1 + np.arange(D)))[labels] + rng.normal(size=(steps, rows, D))
    return hidden, labels, rate / (1 + 0.01 * np.arange(steps))


def train(loss, state, batch, **options):
    """All steps in one scan: losses, gradients of hidden, the mixes, the last state."""

    def body(state, batch):
        value, gradient, state = factored.loss_and_update(state, *batch, loss=loss, **options)
        return state, (value, gradient, state.mix)

    return jax.lax.scan(body, state, batch)


def train_dense(of_scores, weight, batch, weight_decay=0.0):
    def body(weight, batch):
        hidden, labels, eta = batch

        def mean(weight, hidden):
            return jnp.mean(of_scores(jnp.matmul(hidden, weight.T, precision="highest"), labels))

        value, (by_weight, by_hidden) = jax.value_and_grad(mean, (0, 1))(weight, hidden)
        return (1 - eta * weight_decay) * weight - eta * by_weight, (value, by_hidden)

    return jax.lax.scan(body, weight, batch)


OF_SGD = and_full([("taylor", 4), ("z_loss", 9)], itertools.product(LOSSES, [4, 9]))
"""By default a log-loss and the other loss, fewer rows than features and more."""


@pytest.mark.parametrize(("name", "rows"), OF_SGD)
def test_equals_dense_sgd(name, rows):
    """To 1e-10 in float64 over 320 steps with a schedule and weight decay, through folds and labels that meet; of fewer
    rows than features and of more."""
    loss, of_scores = LOSSES[name]
    with jax.enable_x64(True):
        batch = jax.tree.map(jnp.asarray, batches(rows, rate=RATES[name]))
        ours = evaluated(lambda w, b: train(loss, factored.init(w), b, weight_decay=2e-4))
        state, (values, gradients, mixes) = ours(jnp.asarray(WEIGHT), batch)
        theirs = evaluated(lambda w, b: train_dense(of_scores, w, b, weight_decay=2e-4))
        weight, (want, by_hidden) = theirs(jnp.asarray(WEIGHT), batch)
        np.testing.assert_allclose(values, want, rtol=1e-10)
        np.testing.assert_allclose(gradients, by_hidden, rtol=0, atol=1e-10 * np.max(np.abs(by_hidden)))
        got = factored.to_weight(state)
        np.testing.assert_allclose(got, weight, rtol=0, atol=1e-10 * np.max(np.abs(weight)))
        np.testing.assert_allclose(state.gram, got.T @ got, rtol=0, atol=1e-12 * np.max(np.abs(state.gram)))
        np.testing.assert_allclose(state.total, got.sum(0), rtol=0, atol=1e-11 * np.max(np.abs(got)) * V)
        np.testing.assert_allclose(state.inverse @ state.mix, np.eye(D), atol=1e-12)
    folds = np.sum(np.all(np.asarray(mixes) == np.eye(D), (1, 2)))
    assert 2 <= folds <= STEPS / 8
    sizes = np.linalg.svd(np.asarray(mixes), compute_uv=False)
    assert sizes.max() < 2.5  # the estimate of them improves with the steps
    assert sizes.min() > 1 / 2.5
    assert not np.allclose(weight, WEIGHT, atol=0.1)


@pytest.mark.full  # By default the same steps in float64, above.
def test_drift_in_float32():
    """Drift from float64 is like that of dense SGD in float32, with folds and without."""
    loss, of_scores = LOSSES["spherical"]
    with jax.enable_x64(True):
        batch = [jnp.asarray(a, jnp.float32) if a.dtype == float else jnp.asarray(a) for a in batches(4)]
        wide = [a.astype(jnp.float64) if a.dtype == jnp.float32 else a for a in batch]
        weight = np.float32(WEIGHT)
        exact, _ = evaluated(functools.partial(train_dense, of_scores))(jnp.asarray(weight, float), wide)
        dense, _ = jax.jit(functools.partial(train_dense, of_scores))(jnp.asarray(weight), batch)
        run = jax.jit(functools.partial(train, loss))
        errors = [np.linalg.norm(dense - exact)]
        for beyond in (2.0, 1e30):
            state, _ = run(factored.init(weight), batch, fold_beyond=jnp.float32(beyond))
            errors.append(np.linalg.norm(factored.to_weight(state) - exact))
        assert state.rows.dtype == jnp.float32
    assert errors[0] < 1e-5 * np.linalg.norm(np.asarray(exact) - weight)
    assert errors[1] < 5 * errors[0]
    assert errors[2] < 20 * errors[0]


FOLD_BEYOND = inspect.signature(factored.loss_and_update).parameters["fold_beyond"].default


init, to_weight = evaluated(factored.init), evaluated(factored.to_weight)


@evaluated
def taylor_step(state, batch, beyond, decay):
    h, y, eta = batch
    options = {"loss": LOSSES["taylor"][0], "fold_beyond": beyond, "weight_decay": decay}
    return factored.loss_and_update(state, h, y, eta, **options).state


@evaluated
def dense_step(weight, batch):
    return train_dense(LOSSES["taylor"][1], weight, batch)[0]


TIMES = [0.9, 1.0, 1 + 1e-9, 1.7, 3.0]
SINGULAR = and_full([(1.0, 2.0), (1.0, 1e30), (1 + 1e-9, 1e30), (3.0, 2.0)], itertools.product(TIMES, [2.0, 1e30]))
"""By default what is singular, what nearly is, and what reverses a dimension."""


@pytest.mark.parametrize(("times", "beyond"), SINGULAR)
def test_a_step_that_makes_u_singular(times, beyond):
    """If η M has an eigenvalue of 1, the step takes a dimension from the weight; a larger one reverses it. The step
    folds first."""
    with jax.enable_x64(True):
        weight, h, y = np.float64(WEIGHT), np.ones((1, D)) / 3, np.array([3])
        eta = times * np.sum(js.taylor(2)(h @ weight.T)) / np.sum(h * h)
        for rows in (1, 2 * D):
            batch = np.repeat(h, rows, 0), np.repeat(y, rows)
            state = taylor_step(init(weight), (*batch, eta), beyond, 0.0)
            want = dense_step(weight, jax.tree.map(lambda a: np.asarray(a)[None], (*batch, eta)))
            got = np.asarray(to_weight(state))
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.max(np.abs(want)))
            np.testing.assert_allclose(state.gram, got.T @ got, rtol=0, atol=1e-12 * np.max(np.abs(state.gram)))
        wiped = taylor_step(factored.init(weight), (h, y, jnp.asarray(2.0)), FOLD_BEYOND, 0.5)
        assert np.abs(factored.to_weight(wiped)).max() < np.abs(want).max()
        assert np.all(np.isfinite(wiped.rows))


@pytest.mark.parametrize("name", some(LOSSES, ["z_loss"]))
def test_loss_is_that_of_the_scores(name):
    loss, of_scores = LOSSES[name]
    with jax.enable_x64(True):
        hidden, labels, eta = (jnp.asarray(a) for a in batches(8, 3))
        train_all = evaluated(functools.partial(train, loss))
        state, _ = train_all(factored.init(jnp.asarray(WEIGHT)), (hidden, labels, eta))
        weight, h, y = factored.to_weight(state), hidden.reshape(3, 4, 2, D), labels.reshape(3, 4, 2)

        @evaluated
        def results(state, weight, h, y):
            each = [lambda h: factored.loss(state, h, y, loss=loss), lambda h: of_scores(h @ weight.T, y)]
            means = [jax.value_and_grad(lambda h, f=f: jnp.mean(f(h)))(h) for f in each]
            step = factored.loss_and_update(state, h, y, 0.1, loss=loss)
            same = factored.to_weight(state), factored.refresh(state)
            return [f(h) for f in each], means, step, factored.rows(state, y), same

        (ours, theirs), means, (value, gradient, _), rows, (dense, again) = results(state, weight, h, y)
        np.testing.assert_allclose(ours, theirs, rtol=1e-11)
        assert gradient.shape == h.shape
        for mean, by_hidden in means:
            np.testing.assert_allclose(value, mean, rtol=1e-11)
            np.testing.assert_allclose(gradient, by_hidden, rtol=0, atol=1e-12)
        np.testing.assert_allclose(rows, weight[y], rtol=1e-12)
        np.testing.assert_array_equal(again.rows, dense)
        np.testing.assert_array_equal(factored.to_weight(again), dense)
        np.testing.assert_allclose(again.gram, state.gram, atol=1e-11)


def test_equal_scores_have_no_z_loss_slope():
    state = factored.init(jnp.ones((V, D)))
    for h in (jnp.zeros(D), jnp.ones(D)):
        value, slope = jax.value_and_grad(lambda h: factored.loss(state, h, jnp.array(1), loss=z_loss()))(h)
        np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("rows", some([3000, 2048, 100], [3000]))
def test_in_place(rows):
    """With the state donated nothing of the size of V̂ is copied, alone or in a scan; the caller's weight survives."""
    weight = jnp.asarray(np.resize(WEIGHT, (rows, 64)), jnp.float32)
    hidden, labels = jnp.ones((3, 5, 64)), jnp.arange(15).reshape(3, 5)

    def step(state, hidden, labels):
        return factored.loss_and_update(state, hidden, labels, 0.1, loss=LOSSES["taylor"][0])

    def scanned(state, hidden, labels):
        return jax.lax.scan(lambda state, batch: (step(state, *batch).state, None), state, (hidden, labels))[0]

    for f, batch in ((step, (hidden[0], labels[0])), (scanned, (hidden, labels)), (factored.refresh, ())):
        program = jax.jit(f, donate_argnums=0).lower(factored.init(weight), *batch).compile()
        assert not re.search(rf"= f32\[{rows},64\]\S* copy\(", program.as_text()), f
        assert program.memory_analysis().alias_size_in_bytes >= weight.nbytes
        state = factored.init(weight)
        program(state, *batch)
        assert state.rows.is_deleted()
    assert weight.sum() == weight.sum()
    assert not weight.is_deleted()


@evaluated
def step_of_taylor(state, h, y, eta, beyond):
    return factored.loss_and_update(state, h, y, eta, loss=LOSSES["taylor"][0], fold_beyond=beyond)


@pytest.mark.parametrize("bad", ["label", "negative", "hidden", "infinite", "rate", "state"])
def test_a_bad_step_leaves_the_state_as_it_was(bad):
    """Loss NaN, every leaf the same to the bit, in place or not, also where a fold is due."""
    h, y, eta = (np.asarray(a)[0] for a in batches(4, 1))
    h, loss, good = np.float32(h), LOSSES["taylor"][0], factored.init(np.float32(WEIGHT))
    if bad == "label":
        y = np.array([1, V, 0, 1])
    elif bad == "negative":
        y = np.array([1, -1, 0, 1])
    elif bad in ("hidden", "infinite"):
        h[2, 1] = np.nan if bad == "hidden" else np.inf
    elif bad == "rate":
        eta = jnp.float32(jnp.nan)
    else:
        good = good._replace(total=good.total * jnp.nan)
    for beyond in (2.0, 1.0):
        value, gradient, state = step_of_taylor(good, h, y, jnp.float32(eta), jnp.float32(beyond))
        assert np.isnan(value)
        for a, b in zip(state, good, strict=True):
            np.testing.assert_array_equal(a, b)
    if bad in ("label", "negative", "hidden"):
        wrong = 2 if bad == "hidden" else 1
        np.testing.assert_array_equal(np.isnan(gradient).any(-1), np.arange(4) == wrong)
        unreduced = factored.loss(good, h, y, loss=loss)
        np.testing.assert_array_equal(np.isnan(unreduced), np.arange(4) == wrong)
    if bad == "label":
        np.testing.assert_array_equal(np.isnan(factored.rows(good, y)).any(-1), np.arange(4) == 1)


def test_states_can_be_mapped_over():
    h, y, _ = (np.asarray(a)[0] for a in batches(4, 1))
    h = np.float32(h)
    states = evaluated(jax.vmap(factored.init))(np.float32([WEIGHT, -WEIGHT]))

    def one(state, eta):
        return factored.loss_and_update(state, h, y, eta, loss=LOSSES["z_loss"][0])

    def part(tree, i):
        return jax.tree.map(lambda a: np.asarray(a)[i], tree)

    got, of_one = evaluated(jax.vmap(one))(states, jnp.array([0.1, 300.0])), evaluated(one)
    for i, rate in enumerate((0.1, 300.0)):
        want = of_one(part(states, i), rate)
        np.testing.assert_allclose(np.asarray(got.loss)[i], want.loss, rtol=1e-5)
        weights = [np.asarray(to_weight(state)) for state in (part(got.state, i), want.state)]
        np.testing.assert_allclose(*weights, rtol=0, atol=1e-4 * np.abs(weights[1]).max())


@pytest.mark.parametrize("dtype", some([jnp.bfloat16, jnp.float32, jnp.float64], [jnp.bfloat16]))
def test_dtypes_under_strict_promotion_and_debug_nans(dtype):
    with jax.enable_x64(dtype == jnp.float64), strict_promotion(), jax.debug_nans(True):
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        state = factored.init(jnp.asarray(WEIGHT, dtype))
        h, y, _ = (jnp.asarray(a)[0] for a in batches(9, 1))
        for loss, _ in LOSSES.values():
            step = factored.loss_and_update(
                state, h.astype(dtype), y.astype(jnp.uint8), 0.1, loss=loss, weight_decay=0.01
            )
            assert step.loss.dtype == wide
            assert step.gradient.dtype == dtype
            assert {a.dtype for a in step.state} == {jnp.dtype(wide)}


def test_learning_rates_and_parameters_compile_once():
    h, y, _ = (jnp.asarray(a)[0] for a in batches(4, 1))
    count = []

    @jax.jit
    def step(state, eta, scale):
        count.append(1)
        return factored.loss_and_update(state, h, y, eta, loss=z_loss(scale), weight_decay=eta / 10)

    state = factored.init(jnp.float32(WEIGHT))
    for rate in (0.1, 0.2):
        state = step(state, rate, 1 + rate).state
    assert len(count) == 1


# --- wrong calls ---------------------------------------------------------------------------------------------

STATE = factored.init(jnp.float32(WEIGHT))
H, Y = jnp.zeros((4, D)), jnp.zeros(4, int)


def call(*args, loss=LOSSES["taylor"][0], **options):
    given = list(args) + [STATE, H, Y, 0.1][len(args) :]
    return inspect.unwrap(factored.loss_and_update)(*given, loss=loss, **options)


NAME = "loss_and_update: "
WRONG = [  # call, error, what the message says
    (lambda: log_loss(js.exp), ValueError, "log_loss: phi must be of the second order", "got exp", "taylor(2)"),
    (lambda: inspect.unwrap(log_loss)(js.taylor), TypeError, "log_loss: phi must be a φ"),
    (lambda: z_loss(0.0), ValueError, "z_loss: scale must be > 0"),
    (lambda: z_loss(1.0, float("inf")), ValueError, "z_loss: shift must be finite"),
    (lambda: factored.init(WEIGHT[0]), ValueError, "init: weight must have shape [V, d]", "(6,)"),
    (lambda: factored.init(np.ones((2, 3), int)), TypeError, "init: weight must be floating"),
    (lambda: call(jnp.float32(WEIGHT)), TypeError, NAME + "state must be a State", "heads.factored.init(weight)"),
    (lambda: call(STATE._replace(gram=H)), ValueError, NAME + "state must have rows [V, d] and gram [6, 6]", "(4, 6)"),
    (lambda: call(loss=js.taylor(2)), TypeError, NAME + "loss must be log_loss(φ) or z_loss(…)", "got taylor(2)"),
    (lambda: call(STATE, H[:, :2]), ValueError, NAME + "hidden must end with the width 6", "(4, 2)"),
    (lambda: call(STATE, Y), TypeError, NAME + "hidden must be floating"),
    (lambda: call(STATE, H[:0], Y[:0]), ValueError, NAME + "hidden must have at least one row", "(0, 6)"),
    (lambda: call(STATE, H, H), TypeError, NAME + "labels must be integers"),
    (lambda: call(STATE, H, Y[:2]), ValueError, NAME + "labels must have the shape", "(4,)", "(2,)"),
    (lambda: call(STATE, H, Y, -0.1), ValueError, NAME + "learning_rate must be >= 0", "got -0.1"),
    (lambda: call(STATE, H, Y, jnp.ones(2)), ValueError, NAME + "learning_rate must be one number", "(2,)"),
    (lambda: call(weight_decay=-1), ValueError, NAME + "weight_decay must be >= 0"),
    (lambda: call(fold_beyond=0.5), ValueError, NAME + "fold_beyond must be >= 1", "got 0.5"),
    (lambda: inspect.unwrap(factored.to_weight)(H), TypeError, "to_weight: state must be a State"),
    (lambda: inspect.unwrap(factored.refresh)(None), TypeError, "refresh: state must be a State", "NoneType"),
    (lambda: factored.rows(STATE, jnp.zeros(2)), TypeError, "rows: labels must be integers"),
    (lambda: inspect.unwrap(factored.loss)(H, H, Y, loss=z_loss()), TypeError, "loss: state must be a State"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_wrong_calls(wrong):
    f, error, *says = wrong
    with pytest.raises(error) as raised:
        f()
    for text in says:
        assert text in str(raised.value)
