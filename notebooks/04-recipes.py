# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Recipes: streaming heads and attention in a training step
#
# The functions of `jsoftmax.heads` take hidden states `[..., d]` and the weight `[V, d]` of the last layer, and compute
# what a loss needs block by block: the logits, tokens × classes numbers, never exist all at once.
#
# Every section has one cell to copy, which is complete in itself, and one that checks it against the plain computation,
# which makes all logits. The models are toys: replace the part that makes the hidden states with your own.

# %% [markdown]
# ## 1. JAX and optax, tied embeddings
#
# The loss is the sum over the tokens that count, divided by their number. This is PyTorch's token mean with
# `ignore_index=-100`, except that a batch without such tokens gives 0, not NaN. Over microbatches or devices, add up
# the sums and the numbers, and divide once. The embedding table `[V, d]` serves as the head's weight without a change;
# its gradient has the parts of both uses.
#
# `ignore_label` has no default: without it, a label of −100 is out of range and the loss is NaN.

# %%
import jax
import jax.numpy as jnp
import optax

from jsoftmax import heads

VOCABULARY, WIDTH, IGNORED = 5000, 32, -100


def initial(key):
    of_embedding, of_layer = jax.random.split(key)
    return {
        "embedding": jax.random.normal(of_embedding, (VOCABULARY, WIDTH)) / WIDTH**0.5,
        "layer": jax.random.normal(of_layer, (WIDTH, WIDTH)) / WIDTH**0.5,
    }


def hidden_states(parameters, tokens):
    """Any model that ends before its last layer; here a running mean and one layer."""
    x = parameters["embedding"][tokens]
    x = jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1)[:, None]
    return x + jnp.tanh(x @ parameters["layer"])


def token_mean(parameters, tokens, labels):
    hidden = hidden_states(parameters, tokens)
    total = heads.linear_cross_entropy_sum(hidden, parameters["embedding"], labels, ignore_label=IGNORED)
    return total / jnp.maximum(jnp.sum(labels != IGNORED), 1)


optimizer = optax.adamw(1e-2)


@jax.jit
def step(parameters, state, tokens, labels):
    value, gradient = jax.value_and_grad(token_mean)(parameters, tokens, labels)
    updates, state = optimizer.update(gradient, state, parameters)
    return optax.apply_updates(parameters, updates), state, value


text = jax.random.randint(jax.random.key(0), (4, 17), 0, VOCABULARY)
lengths = jnp.array([16, 11, 7, 16])
tokens = text[:, :-1]
labels = jnp.where(jnp.arange(16) < lengths[:, None], text[:, 1:], IGNORED)  # the next token; padding is ignored

parameters = initial(jax.random.key(1))
state = optimizer.init(parameters)
losses = []
for _ in range(30):
    parameters, state, value = step(parameters, state, tokens, labels)
    losses.append(float(value))
print(f"{losses[0]:.2f} → {losses[-1]:.2f} nats a token")

# %%
import chex


def plain_token_mean(hidden, weight, labels, bias=0.0):
    """The same by all logits."""
    log_p = jax.nn.log_softmax(hidden @ weight.T + bias)
    counts = labels != IGNORED
    of_label = jnp.take_along_axis(log_p, jnp.where(counts, labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(counts, of_label, 0)) / jnp.sum(counts)


def plain(parameters):
    return plain_token_mean(hidden_states(parameters, tokens), parameters["embedding"], labels)


fused = jax.jit(jax.value_and_grad(token_mean))
wanted = jax.jit(jax.value_and_grad(plain))(parameters)
chex.assert_trees_all_close(fused(parameters, tokens, labels), wanted, rtol=1e-4, atol=1e-7)
assert losses[-1] < losses[0] / 2
assert fused(parameters, tokens, jnp.full_like(labels, IGNORED))[0] == 0  # no token counts

# %% [markdown]
# ## 2. flax
#
# `nnx.Linear` stores its kernel as `[d, V]`, so pass `kernel.T`; the bias is an argument of its own, and may be None.
# The module returns hidden states. Its head is not called, only its parameters are read. So a `dtype` given to the head
# has no effect: cast instead (section 6).

# %%
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jsoftmax import heads

VOCABULARY, WIDTH, IGNORED = 5000, 32, -100


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens):
        return jax.nn.gelu(self.layer(self.embedding(tokens)))


def token_mean(model, tokens, labels):
    hidden, head = model(tokens), model.head
    total = heads.linear_cross_entropy_sum(hidden, head.kernel.T, labels, head.bias, ignore_label=IGNORED)
    return total / jnp.maximum(jnp.sum(labels != IGNORED), 1)


@nnx.jit
def step(model, optimizer, tokens, labels):
    value, gradient = nnx.value_and_grad(token_mean)(model, tokens, labels)
    optimizer.update(model, gradient)
    return value


model = Model(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
tokens, labels = jax.random.randint(jax.random.key(0), (2, 4, 16), 0, VOCABULARY)
labels = labels.at[0, 9:].set(IGNORED)
losses = [float(step(model, optimizer, tokens, labels)) for _ in range(30)]
print(f"{losses[0]:.2f} → {losses[-1]:.2f} nats a token")

# %%
import chex


def plain(model):
    return plain_token_mean(model(tokens), model.head.kernel.T, labels, model.head.bias)


fused = nnx.jit(nnx.value_and_grad(token_mean))(model, tokens, labels)
chex.assert_trees_all_close(fused, nnx.jit(nnx.value_and_grad(plain))(model), rtol=1e-4, atol=1e-7)
assert losses[-1] < losses[0] / 2

# %% [markdown]
# `kernel.T` is not free: the loop reads blocks of rows, so the compiled program holds a transposed copy of the kernel,
# and one of its gradient. A weight stored as `[V, d]` is read in place: the `embedding` of an `nnx.Embed`, tied or not,
# or a plain `nnx.Param`. The compiler reports this much temporary memory:


# %%
def of_weight(hidden, weight, labels):
    return heads.linear_cross_entropy_sum(hidden, weight, labels)


def of_kernel(hidden, kernel, labels):
    return heads.linear_cross_entropy_sum(hidden, kernel.T, labels)


def temporary(f, *shape):
    """MiB for the loss of 64 tokens and its gradient, with a weight of that shape."""
    arguments = jnp.zeros((64, 256)), jnp.zeros(shape), jnp.zeros(64, int)
    compiled = jax.jit(jax.value_and_grad(f, (0, 1))).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


print("a weight of 32 MiB; for loss and gradient, temporary,")
print(f"as [V, d]: {temporary(of_weight, 32768, 256):.0f} MiB, as kernel.T: {temporary(of_kernel, 256, 32768):.0f} MiB")

# %% [markdown]
# In linen the parameters are a tree, and the head's kernel is one of its leaves. `init` calls the module so that the
# head gets parameters; one token is enough.

# %%
import jax
import jax.numpy as jnp
from flax import linen

from jsoftmax import heads

VOCABULARY, WIDTH, IGNORED = 5000, 32, -100


class LinenModel(linen.Module):
    def setup(self):
        self.embedding = linen.Embed(VOCABULARY, WIDTH)
        self.layer = linen.Dense(WIDTH)
        self.head = linen.Dense(VOCABULARY)

    def hidden(self, tokens):
        return jax.nn.gelu(self.layer(self.embedding(tokens)))

    def __call__(self, tokens):
        return self.head(self.hidden(tokens))


def token_mean(variables, tokens, labels):
    hidden = model.apply(variables, tokens, method="hidden")
    head = variables["params"]["head"]
    total = heads.linear_cross_entropy_sum(hidden, head["kernel"].T, labels, head["bias"], ignore_label=IGNORED)
    return total / jnp.maximum(jnp.sum(labels != IGNORED), 1)


model = LinenModel()
variables = model.init(jax.random.key(0), jnp.zeros((1, 1), int))
tokens, labels = jax.random.randint(jax.random.key(0), (2, 4, 16), 0, VOCABULARY)
value, gradient = jax.jit(jax.value_and_grad(token_mean))(variables, tokens, labels)

# %%
import chex
import optax


def plain(variables):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(variables, tokens), labels).mean()


chex.assert_trees_all_close((value, gradient), jax.jit(jax.value_and_grad(plain))(variables), rtol=1e-4, atol=1e-7)

# %% [markdown]
# ## 3. Equinox
#
# `eqx.nn.Linear` stores its weight as `[V, d]`, so pass it as it is. Equinox maps layers over the tokens with `vmap`;
# the head takes all tokens at once and needs no `vmap`.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from jsoftmax import heads

VOCABULARY, WIDTH, IGNORED = 5000, 32, -100


class Model(eqx.Module):
    embedding: eqx.nn.Embedding
    layer: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        of_embedding, of_layer, of_head = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(VOCABULARY, WIDTH, key=of_embedding)
        self.layer = eqx.nn.Linear(WIDTH, WIDTH, key=of_layer)
        self.head = eqx.nn.Linear(WIDTH, VOCABULARY, key=of_head)

    def __call__(self, tokens):
        return jax.nn.gelu(jax.vmap(self.layer)(jax.vmap(self.embedding)(tokens)))


def token_mean(model, tokens, labels):
    hidden, head = jax.vmap(model)(tokens), model.head
    total = heads.linear_cross_entropy_sum(hidden, head.weight, labels, head.bias, ignore_label=IGNORED)
    return total / jnp.maximum(jnp.sum(labels != IGNORED), 1)


optimizer = optax.adamw(1e-2)


@eqx.filter_jit
def step(model, state, tokens, labels):
    value, gradient = eqx.filter_value_and_grad(token_mean)(model, tokens, labels)
    updates, state = optimizer.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, value


model = Model(jax.random.key(0))
state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
tokens, labels = jax.random.randint(jax.random.key(1), (2, 4, 16), 0, VOCABULARY)
labels = labels.at[0, 9:].set(IGNORED)
losses = []
for _ in range(30):
    model, state, value = step(model, state, tokens, labels)
    losses.append(float(value))
print(f"{losses[0]:.2f} → {losses[-1]:.2f} nats a token")

# %%
import chex


def plain(model):
    return plain_token_mean(jax.vmap(model)(tokens), model.head.weight, labels, model.head.bias)


fused = eqx.filter_jit(eqx.filter_value_and_grad(token_mean))(model, tokens, labels)
chex.assert_trees_all_close(fused, eqx.filter_jit(eqx.filter_value_and_grad(plain))(model), rtol=1e-4, atol=1e-7)
assert losses[-1] < losses[0] / 2

# %% [markdown]
# ## 4. Policy gradients: PPO, GRPO
#
# In one pass, `linear_statistics` gives the log-probability of each drawn token and the entropy of its distribution,
# both differentiable. `linear_kl` is the exact divergence from a reference over the whole vocabulary, not an estimate
# from the drawn token. The hidden states of the reference may have another width: only the classes must be the same.
#
# Prompt and padding have the label `IGNORED`; their log-probability and entropy are 0. `linear_kl` takes no labels: it
# computes the divergence of every token, and the mask is applied afterwards. If the policy has a temperature, pass
# `temperature=` to both functions.

# %%
import jax
import jax.numpy as jnp

from jsoftmax import heads

VOCABULARY, WIDTH, IGNORED = 5000, 32, -100
CLIP, BONUS, PENALTY = 0.2, 0.01, 0.05


def hidden_states(policy, tokens):
    """Any model that ends before its last layer."""
    x = policy["embedding"][tokens]
    return x + jnp.tanh(x @ policy["layer"])


def policy_loss(policy, reference, batch):
    """Arrays of the batch are `[sequences, time]`; advantages may be `[sequences, 1]`."""
    hidden = hidden_states(policy, batch["tokens"])
    of_reference = hidden_states(reference, batch["tokens"])
    actions, advantages = batch["actions"], batch["advantages"]
    found = heads.linear_statistics(hidden, policy["head"], actions, ignore_label=IGNORED)
    ratio = jnp.exp(found.log_prob - batch["old_log_prob"])
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    kl = heads.linear_kl(hidden, policy["head"], of_reference, reference["head"])
    responses = actions != IGNORED
    objective = jnp.where(responses, gain + BONUS * found.entropy - PENALTY * kl, 0)
    return -jnp.sum(objective) / jnp.maximum(jnp.sum(responses), 1)


def initial(key):
    shapes = {"embedding": (VOCABULARY, WIDTH), "layer": (WIDTH, WIDTH), "head": (VOCABULARY, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    return {n: 3 * jax.random.normal(k, s) / WIDTH**0.5 for (n, s), k in zip(shapes.items(), keys, strict=True)}


def moved(policy, seed):
    keys = jax.random.split(jax.random.key(seed), len(policy))
    return {n: a + 0.02 * jax.random.normal(k, a.shape) for (n, a), k in zip(policy.items(), keys, strict=True)}


reference = initial(jax.random.key(0))  # frozen: an argument without a gradient
old = moved(reference, 1)  # drew the actions
policy = moved(old, 2)  # some steps later
tokens, actions = jax.random.randint(jax.random.key(3), (2, 4, 16), 0, VOCABULARY)  # in earnest by `old`: section 5
actions = actions.at[:, :5].set(IGNORED)  # the prompt
hidden = hidden_states(old, tokens)
rewards = jnp.array([1.0, 0.0, 0.0, 1.0])
batch = {
    "tokens": tokens,
    "actions": actions,
    "advantages": ((rewards - rewards.mean()) / (rewards.std() + 1e-6))[:, None],  # of a group, as GRPO has them
    "old_log_prob": heads.linear_statistics(hidden, old["head"], actions, ignore_label=IGNORED).log_prob,
}
value, gradient = jax.jit(jax.value_and_grad(policy_loss))(policy, reference, batch)
print(f"loss {value:.4f}")

# %%
import chex


def plain_policy_loss(policy, reference, batch):
    log_p = jax.nn.log_softmax(hidden_states(policy, batch["tokens"]) @ policy["head"].T)
    log_q = jax.nn.log_softmax(hidden_states(reference, batch["tokens"]) @ reference["head"].T)
    responses = batch["actions"] != IGNORED
    log_prob = jnp.take_along_axis(log_p, jnp.where(responses, batch["actions"], 0)[..., None], -1)[..., 0]
    ratio = jnp.exp(log_prob - batch["old_log_prob"])
    advantages = batch["advantages"]
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, -1)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
    gain, entropy, kl = (jnp.mean(a, where=responses) for a in (gain, entropy, kl))
    clipped = jnp.mean(jnp.abs(ratio - 1) > CLIP, where=responses)
    return -(gain + BONUS * entropy - PENALTY * kl), {"entropy": entropy, "kl": kl, "clipped": clipped}


(wanted, seen), by_policy = jax.jit(jax.value_and_grad(plain_policy_loss, has_aux=True))(policy, reference, batch)
print({name: round(float(a), 3) for name, a in seen.items()})
chex.assert_trees_all_close((value, gradient), (wanted, by_policy), rtol=1e-4, atol=1e-7)
assert 0 < seen["clipped"] < 1

# %% [markdown]
# ## 5. Forward mode, Hessian-vector products, draws
#
# All results except classes are differentiable in both modes and to any order, block by block as before.

# %%
import jax
import jax.numpy as jnp

from jsoftmax import heads

tokens, width, vocabulary = 16, 32, 5000
of_hidden, of_weight, of_labels, of_direction = jax.random.split(jax.random.key(0), 4)
hidden = jax.random.normal(of_hidden, (tokens, width))
weight = jax.random.normal(of_weight, (vocabulary, width)) / width**0.5
labels = jax.random.randint(of_labels, (tokens,), 0, vocabulary)
point = (hidden, weight)
direction = tuple(jax.random.normal(k, a.shape) for k, a in zip(jax.random.split(of_direction), point, strict=True))


def total(point):
    return heads.linear_cross_entropy_sum(*point, labels)


@jax.jit
def rate(point, direction):
    """The loss and its derivative along a direction."""
    return jax.jvp(total, (point,), (direction,))


@jax.jit
def hessian_product(point, direction):
    """H v, of hidden states and weight together."""
    return jax.jvp(jax.grad(total), (point,), (direction,))[1]


along, product = rate(point, direction), hessian_product(point, direction)

# %%
import chex


def plain(point):
    log_p = jax.nn.log_softmax(point[0] @ point[1].T)
    return -jnp.sum(jnp.take_along_axis(log_p, labels[:, None], -1))


@jax.jit
def plain_derivatives(point, direction):
    (value, _), (rate, product) = jax.jvp(jax.value_and_grad(plain), (point,), (direction,))
    return (value, rate), product


plain_along, plain_product = plain_derivatives(point, direction)
chex.assert_trees_all_close(along, plain_along, rtol=1e-4)
chex.assert_trees_all_close(product, plain_product, rtol=1e-3, atol=1e-4)

# %% [markdown]
# The head can draw from all classes, at a temperature, or from the k most probable classes. `shape` ends in the shape
# of the tokens; without it, there is one draw for each token. With `replace=False` the draws of one token are distinct.

# %%
import jax
import jax.numpy as jnp

from jsoftmax import heads

tokens, width, vocabulary = 16, 32, 5000
hidden = jax.random.normal(jax.random.key(0), (tokens, width))
weight = jax.random.normal(jax.random.key(1), (vocabulary, width)) / width**0.5
key, of_temperature, of_top = jax.random.split(jax.random.key(2), 3)

drawn = heads.linear_categorical(key, hidden, weight, shape=(500, tokens))  # 500 for each token
cooler = heads.linear_categorical(of_temperature, hidden, weight, shape=(500, tokens), temperature=0.7)

top = heads.linear_top_k(hidden, weight, 50)  # log_prob and indices, [tokens, 50]
place = jax.random.categorical(of_top, top.log_prob)
from_top = jnp.take_along_axis(top.indices, place[:, None], -1)[:, 0]  # [tokens]

# %%
import chex
import numpy as np

log_p = jax.nn.log_softmax(hidden @ weight.T)
values, classes = jax.lax.top_k(log_p, 50)
chex.assert_trees_all_close(top.log_prob, values, rtol=1e-5)
chex.assert_trees_all_equal(top.indices, classes)
assert jnp.all(jnp.any(from_top[:, None] == classes, -1))

for draws, temperature in ((drawn, 1.0), (cooler, 0.7)):
    p = np.asarray(jax.nn.softmax(log_p / temperature))
    for count in (20, 500):  # how often one of the most probable classes is drawn
        most = np.argsort(-p, -1)[:, :count]
        expected = np.take_along_axis(p, most, -1).sum(-1)
        seen = (np.asarray(draws)[:, :, None] == most).any(-1)
        error = np.sqrt(np.sum(expected * (1 - expected)) / len(draws))  # of the sum over the tokens
        assert abs(seen.mean(0).sum() - expected.sum()) < 4 * error

# %% [markdown]
# ## 6. Mixed precision
#
# Let hidden states and weight be in bfloat16. The logits are products of bfloat16 numbers, summed in float32, and the
# results are float32. A gradient has the dtype of its argument; it is summed in float32 before it is rounded to
# bfloat16. If one of the two arguments is float32, the products are float32 too, so cast both. For parameters that are
# kept in float32, put the cast into the loss: their gradient is float32, and is rounded to bfloat16 once on its way.

# %%
import jax
import jax.numpy as jnp

from jsoftmax import heads

VOCABULARY, WIDTH, IGNORED = 5000, 256, -100


def token_mean(hidden, weight, labels):
    total = heads.linear_cross_entropy_sum(hidden, weight, labels, ignore_label=IGNORED)
    return total / jnp.maximum(jnp.sum(labels != IGNORED), 1)


def of_parameters(hidden, weight, labels):
    return token_mean(hidden, weight.astype(jnp.bfloat16), labels)


hidden = jax.random.normal(jax.random.key(0), (4, 64, WIDTH)).astype(
    jnp.bfloat16
)  # of a model that computes in bfloat16
weight = jax.random.normal(jax.random.key(1), (VOCABULARY, WIDTH)) / WIDTH**0.5  # kept in float32
labels = jax.random.randint(jax.random.key(2), (4, 64), 0, VOCABULARY).at[0, 40:].set(IGNORED)

value, gradients = jax.jit(jax.value_and_grad(of_parameters, (0, 1)))(hidden, weight, labels)
print("value", value.dtype, " gradients", *(g.dtype for g in gradients))

# %%
import numpy as np


@jax.jit
def plain(hidden, weight):
    log_p = jax.nn.log_softmax(hidden @ weight.T)
    counts = labels != IGNORED
    of_label = jnp.take_along_axis(log_p, jnp.where(counts, labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(jnp.where(counts, of_label, 0)) / jnp.sum(counts)


narrow = (hidden, weight.astype(jnp.bfloat16))
exact, wanted = jax.jit(jax.value_and_grad(plain, (0, 1)))(*(a.astype(jnp.float32) for a in narrow))
print(f"error of the loss: {abs(value - exact):.0e}; with logits in bfloat16: {abs(plain(*narrow) - exact):.0e}")

assert [a.dtype for a in (value, *gradients)] == [jnp.float32, jnp.bfloat16, jnp.float32]
of_narrow = jax.eval_shape(jax.grad(token_mean, (0, 1)), *narrow, labels)
assert [a.dtype for a in of_narrow] == [jnp.bfloat16, jnp.bfloat16]
np.testing.assert_allclose(value, exact, rtol=1e-5)
for g, w in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(g.astype(jnp.float32), w, rtol=2**-8, atol=1e-7)  # rounded to bfloat16 once

# %% [markdown]
# ## 7. Forward mode through attention: a mean-flow step
#
# At each step, the losses of mean flows and of consistency models need the derivative of a network along a direction (a
# `jax.jvp`), and then the gradient of a loss that contains it. `js.attention.dot_product_attention` takes the arguments
# of `jax.nn.dot_product_attention`, works in all modes of differentiation, and never makes an array of queries × keys.
#
# The network u(z_t, r, t) is the mean velocity from time r to time t along z_t = (1 − t) x + t e, whose velocity is v =
# e − x. It satisfies u = v − (t − r) du/dt; the right-hand side is the target of the training (Geng et al. 2025,
# arXiv:2505.13447).

# %%
import jax
import jax.numpy as jnp
import optax

import jsoftmax as js

LENGTH, WIDTH, HEADS = 64, 32, 4


def init(key):
    keys = jax.random.split(key, 6)
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    weights = {name: jax.random.normal(k, s) / s[0] ** 0.5 for k, (name, s) in zip(keys, shapes.items(), strict=False)}
    return weights | {"times": jax.random.normal(keys[4], (2, WIDTH)), "sink": jnp.zeros(HEADS)}


def normalized(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def mean_velocity(params, z, r, t, attend=js.attention.dot_product_attention):
    """u(z, r, t) by one block of a transformer: z `[batch, length, width]`, times `[batch]`."""
    h = z + jnp.sin(jnp.stack([r, t], -1) @ params["times"])[:, None]
    q, k, v = jnp.split((normalized(h) @ params["qkv"]).reshape(*h.shape[:2], HEADS, -1), 3, -1)
    h = h + attend(q, k, v, sink=params["sink"]).reshape(h.shape) @ params["out"]
    return z + jax.nn.gelu(normalized(h) @ params["up"]) @ params["down"]


def loss(params, key, x, **options):
    keys = jax.random.split(key, 3)
    e, r, t = jax.random.normal(keys[0], x.shape), *jnp.sort(jax.random.uniform(keys[1], (2, x.shape[0])), 0)
    z, v = (1 - t[:, None, None]) * x + t[:, None, None] * e, e - x
    along = (v, jnp.zeros_like(r), jnp.ones_like(t))
    u, u_dot = jax.jvp(lambda z, r, t: mean_velocity(params, z, r, t, **options), (z, r, t), along)
    target = jax.lax.stop_gradient(v - (t - r)[:, None, None] * u_dot)
    return jnp.mean((u - target) ** 2)


optimiser = optax.adam(1e-3)


@jax.jit
def step(params, state, key, x):
    value, gradient = jax.value_and_grad(loss)(params, key, x)
    updates, state = optimiser.update(gradient, state)
    return optax.apply_updates(params, updates), state, value


params = init(jax.random.key(0))
state = optimiser.init(params)
x = jnp.sin(jnp.linspace(0, 6, LENGTH)[:, None] * jnp.arange(1.0, WIDTH + 1))[None].repeat(8, 0)
values = []
for i in range(20):
    params, state, value = step(params, state, jax.random.key(i), x)
    values.append(float(value))
print("loss of the first and the last five steps:", sum(values[:5]) / 5, sum(values[-5:]) / 5)

# %%
import numpy as np


def plain(q, k, v, sink):
    """The same with an array of queries × keys."""
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
    s = jnp.concatenate([s, jnp.broadcast_to(sink[:, None, None], (*s.shape[:3], 1))], -1)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s)[..., :-1], v)


ours, wanted = (
    jax.jit(jax.value_and_grad(lambda p, o=o: loss(p, jax.random.key(9), x, **o)))(params)
    for o in ({}, {"attend": plain})
)
for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())
assert sum(values[-5:]) < sum(values[:5])
