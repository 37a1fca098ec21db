"""What other trainers do around a head: each equals the same training by all logits, or by one batch.

Complete steps for flax and Equinox are in notebooks/04-recipes.py; losses of a few lines in docs/guides/recipes.md.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jsoftmax as js
from jsoftmax import heads
from jsoftmax.heads import adaptive, factored
from jsoftmax.verify import jit_formulas

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

    assert_close(jit_formulas(accumulated)(parameters()), jit_formulas(jax.value_and_grad(mean))(parameters()))


def test_multi_steps_of_bfloat16_parameters():
    """`optax.MultiSteps` adds up the microbatches' gradients in float32: one step is that of their mean."""
    optimizer = optax.MultiSteps(optax.sgd(0.5), every_k_schedule=4)
    start = parameters(jnp.bfloat16)

    @jit_formulas
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
    gradient = jit_formulas(jax.grad(lambda p: plain_total(p, TOKENS, LABELS) / 24))(wide)
    assert_close(made, jax.tree.map(lambda p, g: p - 0.5 * g, wide, gradient), 0.02)


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable], ids=["nothing", "dots"])
def test_checkpointed_layers(policy):
    """`jax.checkpoint` on the layers, and on the layers with the head."""
    checkpoint = functools.partial(jax.checkpoint, policy=policy)
    wanted = jit_formulas(jax.value_and_grad(plain_total))(parameters(), TOKENS, LABELS)
    of_layers = functools.partial(total, layer=checkpoint(layer))
    for f in (of_layers, checkpoint(total)):
        assert_close(jit_formulas(jax.value_and_grad(f))(parameters(), TOKENS, LABELS), wanted)


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

    found, want = (jit_formulas(functools.partial(results, head))(parameters()) for head in (streamed, plain))
    assert_close(found, want, 1e-3)


def saved_and_loaded(tree, path):
    """By numpy: the leaves in a file, the structure from what a fresh start makes."""
    leaves, structure = jax.tree.flatten(tree)
    np.savez(path, *map(np.asarray, leaves))
    with np.load(path) as file:
        return jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])


def test_checkpoints_go_on_as_if_nothing_had_been(tmp_path):
    """Adaptive parameters with an optimiser's state, and a factored head's state, saved in the middle of training."""
    hidden, labels = jax.random.normal(jax.random.key(1), (24, WIDTH)), jnp.abs(LABELS.ravel()) % CLASSES
    optimizer = optax.adam(0.1)

    @jit_formulas
    def adaptive_step(made):
        params, state = made
        gradient = jax.grad(lambda params: -adaptive.log_prob(params, hidden, labels).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    @jit_formulas
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

PAGE = (pathlib.Path(__file__).parent.parent / "docs/guides/recipes.md").read_text()
PAGE_NAMES: dict = {}
exec("".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)), PAGE_NAMES)  # functions only
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
    assert_close(*(jax.jit(jax.value_and_grad(f, every))(*given) for f in (ours, plain)))


def test_clip():
    def plain(images, texts, temperature):
        z = images @ texts.T / temperature
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(z)) + jnp.diag(jax.nn.log_softmax(z.T))) / 2

    assert_equal_training(PAGE_NAMES["clip_loss"], plain, WEIGHT[:20], WEIGHT[20:40], 2.0)


def test_policy_loss():
    old, reference = RNG.normal(size=(2, 4, 6)) - 4
    advantages = jnp.float32(RNG.normal(size=(4, 1)))
    rest = (LABELS, jnp.float32(old), jnp.float32(reference), advantages)

    def plain(hidden, weight):
        log_prob, log_p = log_probs(hidden, weight, LABELS)
        ratio, r = jnp.exp(log_prob - rest[1]), jnp.exp(rest[2] - log_prob)
        gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.8, 1.2) * advantages)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
        return -jnp.mean(gain - 0.05 * (r - 1 - jnp.log(r)) + 0.01 * entropy, where=LABELS != IGNORED)

    assert_equal_training(lambda h, W: PAGE_NAMES["policy_loss"](h, W, *rest), plain, HIDDEN[0], WEIGHT)


def test_dpo():
    reference = jnp.float32(RNG.normal(size=(2, 4)) - 20)

    def ours(chosen, rejected, weight):
        of = [PAGE_NAMES["sequence_log_prob"](hidden, weight, LABELS) for hidden in (chosen, rejected)]
        return PAGE_NAMES["dpo_loss"](*of, *reference)

    def plain(chosen, rejected, weight):
        of = [jnp.sum(log_probs(hidden, weight, LABELS)[0], -1) for hidden in (chosen, rejected)]
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * (of[0] - reference[0] - of[1] + reference[1])))

    assert_equal_training(ours, plain, *HIDDEN, WEIGHT)


def test_speculative_tokens_have_the_law_of_the_target():
    """The first token of many drafts, and the second of those whose first stands."""
    target, draft = (jnp.float32(RNG.normal(size=(n, 7)) * 1.5) for n in (3, 2))
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
