"""What other trainers do around a head: each equals the same training by all logits, or by one batch.

Complete steps for flax and Equinox are in notebooks/04-recipes.py; losses of a few lines in docs/guides/recipes.md.
"""

import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
import sklearn.calibration
import sklearn.metrics
from cells import some
from interpreter import evaluated

import jsoftmax as js
from jsoftmax import heads
from jsoftmax.heads import adaptive, factored

CLASSES, WIDTH, IGNORED = 60, 8, -100
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, CLASSES, (4, 6)))
LABELS = jnp.asarray(np.where(RNG.random((4, 6)) < 0.3, IGNORED, RNG.integers(0, CLASSES, (4, 6))))


def parameters(dtype=jnp.float32, layers=2):
    keys = jax.random.split(jax.random.key(0), 2)
    embedding = jax.random.normal(keys[0], (CLASSES, WIDTH))
    return {"embedding": embedding.astype(dtype), "layers": jax.random.normal(keys[1], (layers, WIDTH, WIDTH), dtype)}


def layer(x, weight):
    return x + jnp.tanh(x @ weight)


def hidden_states(parameters, tokens, layer=layer):
    return functools.reduce(layer, parameters["layers"], parameters["embedding"][tokens])


def total(parameters, tokens, labels, layer=layer):
    hidden = hidden_states(parameters, tokens, layer)
    return heads.linear_cross_entropy_sum(hidden, parameters["embedding"], labels, ignore_label=IGNORED)


def plain_total(parameters, tokens, labels):
    log_p = jax.nn.log_softmax(hidden_states(parameters, tokens) @ parameters["embedding"].T)
    counts = labels != IGNORED
    of_label = jnp.take_along_axis(log_p, jnp.where(counts, labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(counts, of_label, 0))


def counted(labels):
    return jnp.sum(labels != IGNORED)


def assert_close(ours, theirs, tolerance=1e-4):
    pairs = zip(*(map(np.float32, jax.tree.leaves(tree)) for tree in (ours, theirs)), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.max(np.abs(b), initial=1e-6))


@pytest.mark.full  # The sum and its gradient: test_heads.py.
def test_accumulated_token_means():
    """Sums and numbers over microbatches, divided once, are the token mean of the whole batch, and its gradient."""

    def accumulated(parameters):
        def body(sums, microbatch):
            tokens, labels = microbatch
            made = jax.value_and_grad(total)(parameters, tokens, labels)
            return jax.tree.map(jnp.add, sums, (made, counted(labels))), None

        zeros = jax.tree.map(jnp.zeros_like, ((jnp.zeros(()), parameters), counted(LABELS)))
        (made, count), _ = jax.lax.scan(body, zeros, (TOKENS[:, None], LABELS[:, None]))
        return jax.tree.map(lambda a: a / count, made)

    def mean(parameters):
        return plain_total(parameters, TOKENS, LABELS) / counted(LABELS)

    assert_close(evaluated(accumulated)(parameters()), evaluated(jax.value_and_grad(mean))(parameters()))


@pytest.mark.full  # It is about optax's steps. Gradients in bfloat16 are rounded once: test_heads_machinery.py.
def test_multi_steps_of_bfloat16_parameters():
    """`optax.MultiSteps` adds up the microbatches' gradients in float32: one step is that of their mean."""
    optimizer = optax.MultiSteps(optax.sgd(0.5), every_k_schedule=4)
    start = parameters(jnp.bfloat16)

    @evaluated
    def step(parameters, state, tokens, labels):
        gradient = jax.grad(lambda p: total(p, tokens, labels) / 6)(parameters)
        assert {a.dtype for a in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.bfloat16)}
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    made, state = start, optimizer.init(start)
    for i in range(4):
        made, state = step(made, state, TOKENS[i], LABELS[i])
    assert {a.dtype for a in jax.tree.leaves(made)} == {jnp.dtype(jnp.bfloat16)}
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), start)
    gradient = evaluated(jax.grad(lambda p: plain_total(p, TOKENS, LABELS) / 24))(wide)
    assert_close(made, jax.tree.map(lambda p, g: p - 0.5 * g, wide, gradient), 0.02)


POLICIES = [None, jax.checkpoint_policies.dots_saveable]


@pytest.mark.parametrize("policy", some(POLICIES, POLICIES[:1]), ids=["nothing", "dots"])
def test_checkpointed_layers(policy):
    """`jax.checkpoint` on the layers, and on the layers with the head. By default nothing is saved, so that everything
    is computed again; with a policy, a part of that is."""
    checkpoint = functools.partial(jax.checkpoint, policy=policy)
    wanted = evaluated(jax.value_and_grad(plain_total))(parameters(), TOKENS, LABELS)
    of_layers = functools.partial(total, layer=checkpoint(layer))
    for f in (of_layers, checkpoint(total)):
        assert_close(evaluated(jax.value_and_grad(f))(parameters(), TOKENS, LABELS), wanted)


def test_a_head_behind_each_layer_of_a_scan():
    """Early exits: `jax.lax.scan` over the layers, the loss of each layer's states inside it; Hessian product, too."""

    def scanned(parameters, head):
        def body(x, weight):
            x = layer(x, weight)
            return x, head(x, parameters["embedding"])

        return jnp.sum(jax.lax.scan(body, parameters["embedding"][TOKENS], parameters["layers"])[1])

    def streamed(x, weight):
        return heads.linear_cross_entropy_sum(x, weight, LABELS, ignore_label=IGNORED)

    def plain(x, weight):
        log_p = jax.nn.log_softmax(x @ weight.T)
        picked = jnp.take_along_axis(log_p, jnp.where(LABELS == IGNORED, 0, LABELS)[..., None], -1)[..., 0]
        return -jnp.sum(jnp.where(LABELS == IGNORED, 0, picked))

    def results(head, parameters):
        f = jax.value_and_grad(functools.partial(scanned, head=head))
        return jax.jvp(f, (parameters,), (jax.tree.map(jnp.cos, parameters),))

    found, want = (evaluated(functools.partial(results, head))(parameters()) for head in (streamed, plain))
    assert_close(found, want, 1e-3)


def saved_and_loaded(tree, path):
    """By numpy: the leaves in a file, the structure from what a fresh start makes."""
    leaves, structure = jax.tree.flatten(tree)
    np.savez(path, *map(np.asarray, leaves))
    with np.load(path) as file:
        return jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])


@pytest.mark.full  # Saving and loading are numpy's; the heads are met in test_heads_adaptive.py and _factored.py.
def test_checkpoints_go_on_as_if_nothing_had_been(tmp_path):
    """Adaptive parameters with an optimiser's state, and a factored head's state, saved in the middle of training."""
    hidden, labels = jax.random.normal(jax.random.key(1), (24, WIDTH)), jnp.abs(LABELS.ravel()) % CLASSES
    optimizer = optax.adam(0.1)

    @evaluated
    def adaptive_step(made):
        params, state = made
        gradient = jax.grad(lambda params: -adaptive.log_prob(params, hidden, labels).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    @evaluated
    def factored_step(state):
        loss = factored.log_loss(js.taylor(2))
        return factored.loss_and_update(state, hidden, labels, 0.1, loss=loss).state

    params = adaptive.init(jax.random.key(2), WIDTH, CLASSES, (10, 30), div_value=2)
    starts = {
        "adaptive": (adaptive_step, (params, optimizer.init(params))),
        "factored": (factored_step, factored.init(jax.random.normal(jax.random.key(3), (CLASSES, WIDTH)))),
    }
    for name, (step, start) in starts.items():
        halfway = step(start)
        resumed = saved_and_loaded(halfway, tmp_path / f"{name}.npz")
        for a, b in zip(jax.tree.leaves(step(resumed)), jax.tree.leaves(step(halfway)), strict=True):
            np.testing.assert_array_equal(a, b)


# --- docs/guides/recipes.md ----------------------------------------------------------------------------------

TEXT = (pathlib.Path(__file__).parent.parent / "docs/guides/recipes.md").read_text()
PAGE, *OF_PEERS = re.split(r"^## Distributions for ", TEXT, flags=re.M)


def code_of(text):
    return "".join(re.findall(r"```python\n(.*?)```", text, re.S))


PAGE_NAMES: dict = {}
exec(code_of(PAGE), PAGE_NAMES)  # functions only
OF_THE_PAGE = pytest.mark.full
"""A long page, of losses that are made of the package's: these are met where they are tested themselves."""
HIDDEN, WEIGHT = RNG.normal(size=(2, 4, 6, WIDTH)), RNG.normal(size=(CLASSES, WIDTH))


def log_probs(hidden, weight, labels):
    """log p of each label, 0 where it is ignored, and all of them."""
    log_p = jax.nn.log_softmax(hidden @ weight.T)
    of_label = jnp.take_along_axis(log_p, jnp.where(labels == IGNORED, 0, labels)[..., None], -1)[..., 0]
    return jnp.where(labels == IGNORED, 0, of_label), log_p


def assert_equal_training(ours, plain, *given):
    """Value and gradient by every argument."""
    every = tuple(range(len(given)))
    given = tuple(jnp.float32(a) for a in given)
    assert_close(*(evaluated(jax.value_and_grad(f, every))(*given) for f in (ours, plain)))


@OF_THE_PAGE
def test_clip():
    def plain(images, texts, temperature):
        z = images @ texts.T / temperature
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(z)) + jnp.diag(jax.nn.log_softmax(z.T))) / 2

    assert_equal_training(PAGE_NAMES["clip_loss"], plain, WEIGHT[:20], WEIGHT[20:40], 2.0)


@OF_THE_PAGE
def test_policy_loss(rng):
    old, reference = rng.normal(size=(2, 4, 6)) - 4
    advantages = jnp.float32(rng.normal(size=(4, 1)))
    rest = (LABELS, jnp.float32(old), jnp.float32(reference), advantages)

    def plain(hidden, weight):
        log_prob, log_p = log_probs(hidden, weight, LABELS)
        ratio, r = jnp.exp(log_prob - rest[1]), jnp.exp(rest[2] - log_prob)
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return -jnp.mean(gain - 0.05 * (r - 1 - jnp.log(r)) + 0.01 * entropy, where=LABELS != IGNORED)

    assert_equal_training(lambda h, W: PAGE_NAMES["policy_loss"](h, W, *rest), plain, HIDDEN[0], WEIGHT)


@OF_THE_PAGE
def test_actor(rng):
    z, reference, advantages = (jnp.float32(rng.normal(size=shape)) for shape in ((20, 5), (20, 5), 20))
    actions = jnp.asarray(rng.integers(0, 5, 20))

    def plain(z):
        log_p, log_q = (jax.nn.log_softmax(a / 2) for a in (z, reference))
        gain = advantages * log_p[jnp.arange(20), actions]
        return jnp.mean(jnp.sum(jnp.exp(log_p) * (0.05 * (log_p - log_q) + 0.01 * log_p), -1) - gain)

    ours = PAGE_NAMES["actor_gradient"](z, reference, actions, advantages, temperature=2.0)
    assert_close(ours, evaluated(jax.value_and_grad(plain))(z))


@OF_THE_PAGE
def test_distillation(rng):
    """k classes and the rest as one more; and what the page says of the other tails."""
    k, temperature, labels = 5, 2.0, jnp.asarray(rng.integers(0, CLASSES, (4, 6)))
    of_teacher = jnp.float32(rng.normal(size=(4, 6, WIDTH))), jnp.float32(rng.normal(size=(CLASSES, WIDTH)))
    teacher = PAGE_NAMES["teach"](*of_teacher, k, temperature)
    q, classes = jax.lax.top_k(jax.nn.softmax(of_teacher[0] @ of_teacher[1].T / temperature), k)

    def plain(hidden, weight):
        z = hidden @ weight.T
        p = jnp.take_along_axis(jax.nn.softmax(z / temperature), classes, -1)
        soft = -jnp.sum(q * jnp.log(p), -1) - (1 - q.sum(-1)) * jnp.log(1 - p.sum(-1))
        hard = -jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], -1)[..., 0]
        return jnp.mean(0.9 * temperature**2 * soft + 0.1 * hard)

    def ours(hidden, weight):
        return PAGE_NAMES["distillation_loss"](hidden, weight, labels, teacher, temperature)

    assert_equal_training(ours, plain, HIDDEN[0], WEIGHT)
    z = jnp.float32(rng.normal(size=(4, 6, CLASSES)))
    ignored, renormalised = (
        js.losses.cross_entropy(z, js.losses.TopTargets(classes, q, tail)) for tail in ("ignore", "renormalise")
    )
    np.testing.assert_allclose(ignored, q.sum(-1) * renormalised, rtol=1e-5)


@OF_THE_PAGE
def test_dpo(rng):
    reference = jnp.float32(rng.normal(size=(2, 4)) - 20)

    def ours(chosen, rejected, weight):
        of = [PAGE_NAMES["sequence_log_prob"](hidden, weight, LABELS) for hidden in (chosen, rejected)]
        return PAGE_NAMES["dpo_loss"](*of, *reference)

    def plain(chosen, rejected, weight):
        of = [jnp.sum(log_probs(hidden, weight, LABELS)[0], -1) for hidden in (chosen, rejected)]
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * (of[0] - reference[0] - of[1] + reference[1])))

    assert_equal_training(ours, plain, *HIDDEN, WEIGHT)


@OF_THE_PAGE
def test_speculative_tokens_have_the_law_of_the_target(rng):
    """The first token of many drafts, and the second of those whose first stands."""
    target, draft = (jnp.float32(rng.normal(size=(n, 7)) * 1.5) for n in (3, 2))
    draws = 40_000

    @jax.jit
    @jax.vmap
    def tokens(key):
        of_draft, of_target = jax.random.split(key)
        drawn = js.gumbel.categorical(of_draft, draft)
        count, following = PAGE_NAMES["speculate"](of_target, target, draft, drawn)
        return jnp.where(jnp.arange(3) < count, jnp.append(drawn, -1), -1).at[count].set(following)

    made = np.asarray(tokens(jax.random.split(jax.random.key(0), draws)))
    for place in range(3):
        seen = made[:, place][made[:, place] >= 0]
        p = np.asarray(js.softmax(target[place]))
        error = np.abs(np.bincount(seen, minlength=7) / len(seen) - p)
        assert np.all(error < 5 * np.sqrt(p * (1 - p) / len(seen)) + 1e-4)


def router_objective(of_weights, balance, penalty, weights):
    """A number to which everything adds that a router is trained by."""
    return jnp.sum(of_weights * weights) + 3 * balance + penalty


MAPS = [js.softmax, js.entmax15, js.sparsemax]


@OF_THE_PAGE
@pytest.mark.parametrize("probabilities", some(MAPS, MAPS[:1]), ids=lambda f: f.__name__)
def test_router(probabilities, rng):
    """By default by softmax: the router is a recipe for any map, and the sparse maps are in test_sparse.py."""
    tokens, experts, k = 40, 8, 2
    z, of_weights = jnp.float32(rng.normal(size=(tokens, experts)) * 2), rng.normal(size=(tokens, k))
    chosen = np.argsort(-np.asarray(probabilities(z)), -1, kind="stable")[:, :k]
    counted = [sum(expert in row for row in chosen) / (tokens * k) for expert in range(experts)]

    def ours(z):
        found, weights, balance, penalty = PAGE_NAMES["route"](z, k, probabilities)
        return router_objective(of_weights, balance, penalty, weights), found

    def plain(z):
        p = probabilities(z)
        picked = jnp.stack([row[own] for row, own in zip(p, chosen, strict=True)])
        balance = experts * sum(f * jnp.mean(p[:, e]) for e, f in enumerate(counted))
        penalty = jnp.mean(jax.nn.logsumexp(z, -1) ** 2)
        return router_objective(of_weights, balance, penalty, picked / picked.sum(-1, keepdims=True))

    np.testing.assert_array_equal(ours(z)[1], chosen)
    assert_equal_training(lambda z: ours(z)[0], plain, z)


@OF_THE_PAGE
def test_router_of_equal_and_of_far_scores():
    """Equal means of the probabilities give the balance 1; underflow gives no NaN."""
    route = jax.jit(lambda z: PAGE_NAMES["route"](z, 2))
    assert route(jnp.zeros((5, 4)))[2] == 1
    far = jnp.array([[0.0, 300.0, -300.0], [1e4, 0.0, -1e4]])
    _, weights, balance, _ = route(far)
    np.testing.assert_array_equal(weights, [[1, 0], [1, 0]])
    assert balance == 1.5  # two of three experts have half of the mass and of the choices each

    def objective(z):
        _, weights, balance, penalty = route(z)
        return router_objective(jnp.ones(2), balance, penalty, weights)

    assert np.all(np.isfinite(jax.jit(jax.grad(objective))(far)))


@OF_THE_PAGE
@pytest.mark.parametrize("scale", [0.3, 3.0, 300.0])
def test_calibration(scale, rng):
    """Scores that are `scale` times too large; scikit-learn's measures of probabilities before and after."""
    right = jnp.float32(rng.normal(size=(20_000, 3)) * 1.5)
    labels = js.gumbel.categorical(jax.random.key(1), right)
    z = scale * right
    t = PAGE_NAMES["fit_temperature"](z, labels)

    def loss(log_t):
        log_p = np.float64(right) * scale / np.exp(log_t)
        log_p -= scipy.special.logsumexp(log_p, -1, keepdims=True)
        return -np.mean(log_p[np.arange(len(labels)), labels])

    best = scipy.optimize.minimize_scalar(loss, np.log(scale) + np.array([-1, 1]), method="brent", tol=1e-9)
    np.testing.assert_allclose(t, np.exp(best.x), rtol=1e-4)
    np.testing.assert_allclose(t, scale, rtol=0.1)
    measured = []
    for p in map(np.asarray, (js.softmax(z), js.softmax(z / t))):
        brier = sum(sklearn.metrics.brier_score_loss(labels == k, p[:, k]) for k in range(3))
        np.testing.assert_allclose(PAGE_NAMES["brier_score"](p, labels), brier, rtol=1e-5)
        correct, confidence = p.argmax(-1) == labels, p.max(-1)
        accuracies, means = sklearn.calibration.calibration_curve(correct, confidence, n_bins=15)
        counts = np.bincount(np.searchsorted(np.linspace(0, 1, 16)[1:-1], confidence))
        error = np.sum(np.abs(accuracies - means) * counts[counts > 0]) / len(labels)
        np.testing.assert_allclose(PAGE_NAMES["calibration_error"](p, labels), error, rtol=1e-4, atol=1e-6)
        measured.append((brier, error))
    (brier_before, error_before), (brier_after, error_after) = measured
    assert brier_after < brier_before
    assert error_after < 0.03 < error_before / 3


@OF_THE_PAGE
@pytest.mark.parametrize("phi", [js.exp, js.taylor(2)], ids=str)
def test_pairs_are_bernoulli(phi, rng):
    z = jnp.float32(rng.normal(size=9) * 3)
    odds = phi.definition(z, jnp) / phi.definition(0.0, jnp)
    np.testing.assert_allclose(js.softmax(PAGE_NAMES["pair"](z), phi=phi)[:, 1], odds / (1 + odds), rtol=1e-5)


@OF_THE_PAGE
def test_binary_cross_entropy(rng):
    """Beside optax, and far out beside mpmath, where the naive computation has nothing."""
    z, labels = jnp.float32(rng.normal(size=(4, 5)) * 3), jnp.asarray(rng.integers(0, 2, (4, 5)))
    ours = PAGE_NAMES["binary_cross_entropy"]
    of_optax = optax.sigmoid_binary_cross_entropy
    assert_equal_training(lambda z: ours(z, labels).sum(), lambda z: of_optax(z, labels).sum(), z)
    q = jnp.float32(rng.random((4, 5)))
    np.testing.assert_allclose(ours(z, jnp.stack([1 - q, q], -1)), of_optax(z, q), rtol=1e-5)
    far = jnp.array([40.0, -40.0, 80.0, 16.5])
    for sign, label in ((1, 1), (-1, 0)):
        value, gradient = jax.vmap(jax.value_and_grad(lambda z, label=label: ours(z, label)))(sign * far)
        np.testing.assert_allclose(value, [float(mpmath.log1p(mpmath.exp(-a))) for a in far.tolist()], rtol=1e-6)
        want = [-sign / float(1 + mpmath.exp(a)) for a in far.tolist()]
        np.testing.assert_allclose(gradient, want, rtol=1e-6)
    naive = jax.value_and_grad(lambda z: -jnp.log(jax.nn.sigmoid(z)))(40.0)
    assert naive == (0, 0)


CUTS = np.float32([-1, 0, 1e-5, 3]).tolist()


@OF_THE_PAGE
def test_ordinal_training(rng):
    score, labels = rng.normal(size=12), jnp.arange(12) % 5

    def ours(score, cuts):
        return jnp.mean(js.losses.cross_entropy(PAGE_NAMES["ordinal_log_p"](score, cuts), labels))

    def plain(score, cuts):
        below = jax.nn.sigmoid(cuts - score[:, None])
        at_most = jnp.concatenate([jnp.zeros((12, 1)), below, jnp.ones((12, 1))], -1)
        return -jnp.mean(jnp.log(jnp.diff(at_most)[jnp.arange(12), labels]))

    with jax.enable_x64(True):
        every, given = (0, 1), (jnp.asarray(score), jnp.asarray(CUTS))
        assert_close(*(evaluated(jax.value_and_grad(f, every))(*given) for f in (ours, plain)), 1e-6)


@OF_THE_PAGE
@pytest.mark.parametrize("score", [-60.0, -20.0, 0.0, 20.0, 60.0])
def test_ordinal_digits(score):
    """float32 beside differences of 100 digits; a narrow class, and scores at which σ rounds to 0 and 1."""
    found = PAGE_NAMES["ordinal_log_p"](jnp.float32(score), jnp.float32(CUTS))
    rates = jax.jacobian(PAGE_NAMES["ordinal_log_p"])(jnp.float32(score), jnp.float32(CUTS))
    with mpmath.workdps(100):
        at_most = [0, *(1 / (1 + mpmath.exp(score - mpmath.mpf(c))) for c in CUTS), 1]
        density = [F * (1 - F) for F in at_most]  # −∂F/∂s
        p = [b - a for a, b in itertools.pairwise(at_most)]
        log_p = [float(mpmath.log(p_j)) for p_j in p]
        by_score = [float((density[j] - density[j + 1]) / p[j]) for j in range(5)]
    np.testing.assert_allclose(found, log_p, rtol=1e-6)
    np.testing.assert_allclose(rates, by_score, rtol=1e-4, atol=1e-6)


def made_for(peer):
    """What the page makes for a package of the extra `peers`."""
    pytest.importorskip(peer)
    (section,) = (part for part in OF_PEERS if part.startswith(f"{peer}\n"))
    names = dict(PAGE_NAMES)
    exec(code_of(section), names)
    return names


PHIS = [js.exp, js.taylor(2), js.spherical(0.1)]
SCORES, DRAWS, TAU = jnp.float32(RNG.normal(size=(3, 4)) * 2), jnp.asarray(RNG.integers(0, 4, (7, 3))), 0.7


def frequencies(draws):
    """Of classes drawn from three rows of four."""
    return np.stack([np.bincount(column, minlength=4) / len(column) for column in np.asarray(draws).T])


@pytest.mark.parametrize("phi", PHIS, ids=str)
def test_distributions_for_numpyro(phi):
    """Beside numpyro's own of the logits log φ, and its relaxed Bernoulli variable for two classes."""
    names = made_for("numpyro")
    of_numpyro, logits = names["distributions"], jnp.log(phi.definition(SCORES, jnp))
    ours = names["Categorical"](SCORES, phi, validate_args=True)
    theirs = of_numpyro.Categorical(logits=logits)
    of_both = [evaluated(lambda law: law.log_prob(DRAWS))(law) for law in (ours, theirs)]
    np.testing.assert_allclose(*of_both, rtol=1e-5)
    assert ours.expand((2, 3)).sample(jax.random.key(0), (5,)).shape == (5, 2, 3)
    drawn = ours.sample(jax.random.key(1), (40_000,))
    np.testing.assert_allclose(frequencies(drawn), js.softmax(SCORES, phi=phi), atol=0.012)

    relaxed = names["RelaxedOneHot"](TAU, SCORES, phi, validate_args=True)
    points = relaxed.sample(jax.random.key(2), (40_000,))
    assert points.shape == (40_000, 3, 4)
    np.testing.assert_allclose(frequencies(jnp.argmax(points, -1)), js.softmax(SCORES, phi=phi), atol=0.012)
    two = names["RelaxedOneHot"](TAU, SCORES[:, :2], phi)
    x = two.sample(jax.random.key(3), (9,))
    of_bernoulli = of_numpyro.RelaxedBernoulli(TAU, logits=logits[:, 0] - logits[:, 1])
    np.testing.assert_allclose(two.log_prob(x), of_bernoulli.log_prob(x[..., 0]), rtol=1e-4, atol=1e-5)


def test_inference_by_numpyro():
    """The density of a model with observed classes, and variational inference by relaxed samples."""
    names = made_for("numpyro")
    import numpyro  # noqa: PLC0415  (the extra)

    def model(scores):
        with numpyro.plate("rows", 3):
            numpyro.sample("class", names["Categorical"](scores, js.taylor(2)), obs=DRAWS[0])

    def density(scores):
        return numpyro.infer.util.log_density(model, (scores,), {}, {})[0]

    def plain(scores):
        w = 1 + scores + scores**2 / 2
        return jnp.sum(jnp.log((w / w.sum(-1, keepdims=True))[jnp.arange(3), DRAWS[0]]))

    assert_equal_training(density, plain, SCORES)

    def relaxed_model(seen):
        x = numpyro.sample("x", names["RelaxedOneHot"](TAU, jnp.zeros(4)))
        numpyro.sample("seen", numpyro.distributions.Normal(x @ jnp.arange(4.0), 0.3), obs=seen)

    def guide(seen):
        scores = numpyro.param("scores", jnp.zeros(4))
        numpyro.sample("x", names["RelaxedOneHot"](TAU, scores))

    svi = numpyro.infer.SVI(relaxed_model, guide, optax.adam(0.1), numpyro.infer.Trace_ELBO(16))
    result = svi.run(jax.random.key(0), 100, jnp.array(3.0), progress_bar=False)
    assert jnp.argmax(result.params["scores"]) == 3
    assert jnp.mean(result.losses[-10:]) < jnp.mean(result.losses[:10])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its import
@pytest.mark.parametrize("phi", PHIS, ids=str)
def test_distributions_for_distrax(phi):
    """Beside its own Categorical of the logits log φ, and the relaxed one of the library that it is made of."""
    names = made_for("distrax")
    from tensorflow_probability.substrates import jax as tfp  # noqa: PLC0415  (distrax needs it)

    logits = jnp.log(phi.definition(SCORES, jnp))
    ours, theirs = names["Categorical"](SCORES, phi), names["distrax"].Categorical(logits)
    for of_law in (lambda law: law.log_prob(DRAWS), lambda law: law.entropy(), lambda law: law.mode()):
        np.testing.assert_allclose(evaluated(of_law)(ours), of_law(theirs), rtol=1e-5)
    assert (ours.batch_shape, ours.event_shape) == ((3,), ())
    drawn, log_prob = ours.sample_and_log_prob(seed=1, sample_shape=(40, 1000))
    assert drawn.shape == log_prob.shape == (40, 1000, 3)
    np.testing.assert_allclose(frequencies(drawn.reshape(-1, 3)), js.softmax(SCORES, phi=phi), atol=0.012)

    relaxed = names["RelaxedOneHot"](TAU, SCORES, phi)
    x = relaxed.sample(seed=2, sample_shape=9)
    assert (x.shape, relaxed.batch_shape, relaxed.event_shape) == ((9, 3, 4), (3,), (4,))
    of_tfp = tfp.distributions.RelaxedOneHotCategorical(TAU, logits=logits)
    np.testing.assert_allclose(relaxed.log_prob(x), of_tfp.log_prob(x), rtol=1e-4, atol=1e-4)
