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
# # Gradients through a drawn class: bias and variance
#
# The example is a bandit on scanned digits. The policy sees an image and draws one of ten prototypes; the reward is the
# log-likelihood of the image under that prototype's pixels. With ten actions, the expected reward and its gradient are
# sums of ten terms, so the bias and the variance of each estimator can be measured against the exact gradient. The
# policy's entropy is added to the reward with a weight; its gradient has a closed form, −p c (row 1.5 of
# [MATH.md](../MATH.md)), and needs no sampling.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jsoftmax as js
from jsoftmax import gumbel

plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
digits = load_digits()
images = jnp.asarray(digits.data / 16, jnp.float32)
means = np.stack([digits.data[digits.target == k].mean(0) / 16 for k in range(10)])
PIXELS = jnp.asarray(np.log((means + 0.05) / (1.05 - means)), jnp.float32)  # logits of the prototypes' pixels
BONUS = 0.5  # nats of reward a nat of entropy is worth


def reward(D, image):
    """Log-likelihood of an image under the prototype that the one-hot D picks; smooth in D, and not quadratic."""
    logits = D @ PIXELS
    return jnp.sum(image * logits - jnp.logaddexp(0.0, logits))


def scores(W, image):
    return image @ W


def expected(W, image):
    """What the policy is worth: the exact mean reward and the exact entropy."""
    z = scores(W, image)
    rewards = jax.vmap(reward, (0, None))(jnp.eye(10), image)
    return js.softmax(z) @ rewards + BONUS * js.entropy(z)


# %% [markdown]
# The policy is first trained for 25 steps with the exact gradient, so that it is neither uniform nor certain.

# %%
W = jnp.zeros((64, 10))
optimizer = optax.adam(0.02)
state = optimizer.init(W)


@jax.jit
def step(W, state):
    value, gradient = jax.value_and_grad(lambda W: -jnp.mean(jax.vmap(expected, (None, 0))(W, images)))(W)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(W, updates), state, -value


for _ in range(25):
    W, state, value = step(W, state)
entropy = js.entropy(images @ W).mean()
print(f"worth {value:.2f} nats, entropy {entropy:.2f} of {np.log(10):.2f} nats")

# %% [markdown]
# ## The estimators
#
# Each estimator is a function of a key, the scores and the image; its gradient in the scores estimates the exact
# gradient. The entropy's part is exact, and the same for all of them.
#
# - straight-through: `gumbel_softmax(…, hard=True)`
# - Rao–Blackwell: `rao_blackwellised`, which has the same mean but averages over the noise, here over 10 draws of it
# - ReinMax: `reinmax`, which is accurate to second order
# - REINFORCE: (reward − baseline) ∇ log p of the class drawn; the baseline is the reward of a second draw


# %%
def straight_through(key, z, image, tau):
    return reward(gumbel.gumbel_softmax(key, z, tau, hard=True), image)


def rao_blackwell(key, z, image, tau):
    of_class, of_noise = jax.random.split(key)
    return reward(gumbel.rao_blackwellised(of_noise, z, gumbel.categorical(of_class, z), tau, 10), image)


def reinmax(key, z, image, tau):
    return reward(gumbel.reinmax(key, z, tau), image)


def reinforce(key, z, image, tau):
    index, other = gumbel.categorical(key, z, shape=(2,))
    gain = reward(jax.nn.one_hot(index, 10), image) - reward(jax.nn.one_hot(other, 10), image)
    return jax.lax.stop_gradient(gain) * js.log_softmax(z)[index]


ESTIMATORS = {
    "straight-through": (straight_through, (0.3, 0.5, 1.0, 2.0)),
    "Rao–Blackwell": (rao_blackwell, (0.3, 0.5, 1.0, 2.0)),
    "ReinMax": (reinmax, (1.0, 1.5, 2.0)),
    "REINFORCE": (reinforce, (1.0,)),
}
some = images[:100]
z = scores(W, some)
exact = jax.vmap(jax.grad(lambda z, image: js.softmax(z) @ jax.vmap(reward, (0, None))(jnp.eye(10), image)))(z, some)
exact = exact + BONUS * js.entropy_gradient(z)
DRAWS = 4000


@functools.partial(jax.jit, static_argnums=0)
def moments(f, tau):
    """Mean and variance of an estimator's gradient for each image, by sums over the draws."""

    def gradient(key, z, image):
        return jax.grad(lambda z: f(key, z, image, tau))(z) + BONUS * js.entropy_gradient(z)

    def add(sums, key):
        g = jax.vmap(gradient)(jax.random.split(key, len(some)), z, some)
        return (sums[0] + g, sums[1] + g**2), None

    zero = jnp.zeros_like(z)
    (first, second), _ = jax.lax.scan(add, (zero, zero), jax.random.split(jax.random.key(1), DRAWS))
    return first / DRAWS, second / DRAWS - (first / DRAWS) ** 2


size = jnp.sqrt(jnp.mean(jnp.sum(exact**2, -1)))
table = {}
for name, (f, temperatures) in ESTIMATORS.items():
    for tau in temperatures:
        mean, variance = moments(f, tau)
        # the sampling error of the mean adds its variance to the squared bias, and is taken off
        squared = jnp.mean(jnp.sum((mean - exact) ** 2 - variance / DRAWS, -1))
        noise = jnp.sqrt(jnp.mean(jnp.sum(variance, -1)) / DRAWS) / size
        bias = jnp.sqrt(jnp.maximum(squared, 0)) / size
        table[name, tau] = float(bias), float(jnp.sqrt(jnp.mean(jnp.sum(variance, -1))) / size), float(noise)
        print(f"{name:18} τ = {tau:3}   bias {table[name, tau][0]:.3f}   standard deviation {table[name, tau][1]:.3f}")

# %% [markdown]
# Bias and standard deviation are given in units of the exact gradient's length (root mean square over a hundred
# images). REINFORCE has no bias: the number printed for it is below the sampling error of the mean. The
# straight-through estimator trades bias for variance through τ. Rao–Blackwell has the same bias and less variance.
# ReinMax at τ = 1 has hardly any bias here, and about the variance of REINFORCE.

# %%
assert table["REINFORCE", 1.0][0] <= table["REINFORCE", 1.0][2]
for tau in (0.3, 0.5, 1.0, 2.0):  # the same mean, less variance
    assert table["Rao–Blackwell", tau][1] < table["straight-through", tau][1]

fig, axes = plt.subplots(figsize=(8, 5.5))
floor = 0.005
places = {"straight-through": (7, 4), "Rao–Blackwell": (-38, -10), "ReinMax": (-36, 5), "REINFORCE": (7, 3)}
places["ReinMax", 2.0] = (7, -5)
for (name, (_, temperatures)), marker in zip(ESTIMATORS.items(), "os^D", strict=True):
    bias, deviation = np.array([table[name, tau][:2] for tau in temperatures]).T
    axes.plot(np.maximum(bias, floor), deviation, marker + "-", label=name, alpha=0.8)
    for x, y, tau in zip(bias, deviation, temperatures, strict=True):
        text = "no bias" if name == "REINFORCE" else f"τ = {tau}"
        place = places.get((name, tau), places[name])
        axes.annotate(text, (max(x, floor), y), xytext=place, textcoords="offset points", fontsize=8)
axes.set_xscale("log")
axes.set_yscale("log")
axes.set_xlim(right=1.6)
axes.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
axes.set_yticks([0.6, 1, 2, 3, 4], ["0.6", "1", "2", "3", "4"])
axes.minorticks_off()
axes.set_xlabel("bias / length of the exact gradient")
axes.set_ylabel("standard deviation / length of the exact gradient")
axes.set_title("Gradient estimators of one draw, against the exact gradient")
axes.legend()
plt.show()
