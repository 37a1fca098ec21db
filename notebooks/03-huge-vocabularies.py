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
# # Huge vocabularies: memory and time against V
#
# This notebook computes the loss of a linear layer with V outputs and its gradient in five ways:
#
# - from all logits at once, with optax
# - block by block, with `heads.linear_cross_entropy`
# - as a sum whose gradient is computed in the same pass, with `heads.linear_cross_entropy_sum`
# - for a φ of order 2, by an exact shortcut, `heads.quadratic_cross_entropy`
# - for a φ of order 2, by exact steps of SGD that never pass over the classes, with `heads.factored`
#
# Everything is measured here, with the functions of `benchmarks/heads.py`. The formulas are rows 11.1 to 12.4 of
# [MATH.md](../MATH.md).

# %%
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

here = pathlib.Path.cwd()
here = here if (here / "benchmarks").is_dir() else here.parent
sys.path.insert(0, str(here))

import jsoftmax as js
from benchmarks import heads as ways
from benchmarks import measure
from jsoftmax import heads
from jsoftmax.heads import factored

plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
TOKENS, FEATURES = 256, 64
VOCABULARIES = (4_096, 16_384, 65_536)
PHI = js.taylor(2)

# %% [markdown]
# ## The same loss, with and without logits

# %%
hidden, weight, labels = ways.arrays(TOKENS, FEATURES, 4_096)
with_logits = jax.value_and_grad(ways.materialised)(hidden, weight, labels)
without = jax.value_and_grad(ways.streaming)(hidden, weight, labels)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), with_logits, without)
print(
    f"loss {without[0]:.6f}; the largest difference of the gradients {jnp.abs(with_logits[1] - without[1]).max():.1e}"
)

# %% [markdown]
# ## Memory
#
# The table shows the memory that the compiled program needs in addition to its arguments and results. With all logits
# it grows with V in every mode; block by block it does not grow. The sum keeps the products of 256 tokens, which are
# all tokens here, with all classes.

# %%
MODES = {"value and gradient": (ways.gradient, False), "Hessian product": (ways.hessian_product, True)}
WAYS = {"all logits (optax)": ways.materialised, "block by block": ways.streaming, "its sum": ways.summed}


def mebibytes(f, classes, with_direction):
    given = ways.arrays(TOKENS, FEATURES, classes)
    given = (*given, *given[:2]) if with_direction else given
    return jax.jit(f).lower(*given).compile().memory_analysis().temp_size_in_bytes / 2**20


def line(row, unit):
    return "  ".join(f"V = {V:6}: {n:7.2f} {unit}" for V, n in zip(VOCABULARIES, row, strict=True))


memory = {}
for mode, (make, with_direction) in MODES.items():
    for name, f in WAYS.items():
        memory[mode, name] = [mebibytes(make(f), V, with_direction) for V in VOCABULARIES]
        print(f"{mode:20} {name:20}", line(memory[mode, name], "MiB"))

# %% [markdown]
# ## Time
#
# Each time is the median of a few calls; the sizes are small, so that the notebook runs quickly.
# `benchmarks/results/heads-*.json` has times for 2,048 tokens, 512 features and 131,072 classes, beside optax and
# PyTorch. The factored step is a step of SGD on the weight for 256 tokens, with the buffers of its state donated. Its
# line is flat because it visits no class except the labels.


# %%
def of_quadratic(hidden, weight, labels):
    return heads.quadratic_cross_entropy(hidden, weight, labels, phi=PHI).mean()


def milliseconds(program, *given):
    jax.block_until_ready(program(*given))
    return float(np.median([measure.timed(program, *given)[0] for _ in range(5)]))


def of_factored(classes):
    hidden, weight, labels = ways.arrays(TOKENS, FEATURES, classes)
    state, loss = factored.init(weight), factored.log_loss(PHI)
    step = jax.jit(lambda state: factored.loss_and_update(state, hidden, labels, 0.1, loss=loss), donate_argnums=0)
    times = []
    for _ in range(12):
        took, (_, _, state) = measure.timed(step, state)
        times.append(took)
    return float(np.median(times[2:]))


times = {
    name: [milliseconds(jax.jit(ways.gradient(f)), *ways.arrays(TOKENS, FEATURES, V)) for V in VOCABULARIES]
    for name, f in (WAYS | {"order 2, quadratic": of_quadratic}).items()
}
times["order 2, factored SGD"] = [of_factored(V) for V in VOCABULARIES]
for name, row in times.items():
    print(f"{name:22}", line(row, "ms"))

# %%
figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
markers = dict(zip(times, "osD^v", strict=True))
for name in WAYS:
    axes[0].loglog(VOCABULARIES, memory["value and gradient", name], marker=markers[name], label=name)
axes[0].set_ylabel("temporaries, MiB")
axes[0].set_title(f"memory of value and gradient, {TOKENS} tokens, d = {FEATURES}")
for name, row in times.items():
    axes[1].loglog(VOCABULARIES, row, marker=markers[name], label=name)
axes[1].set_ylabel("time, ms")
axes[1].set_title("time of value and gradient, or of a step of SGD")
for panel in axes:
    panel.set_xlabel("classes V")
    panel.set_xticks(VOCABULARIES, [f"{V:,}" for V in VOCABULARIES])
    panel.minorticks_off()
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
plt.show()

# %% [markdown]
# One pass also gives the log-probability, the entropy and the most probable class of each token. All but the last are
# differentiable:

# %%
found = heads.linear_statistics(hidden, weight, labels)
logits = hidden @ weight.T
np.testing.assert_allclose(found.entropy, js.entropy(logits), rtol=1e-5)
np.testing.assert_array_equal(found.argmax, jnp.argmax(logits, -1))
print("mean entropy", found.entropy.mean(), "nats, of at most", jnp.log(4_096.0))

# %% [markdown]
# ## The flat line
#
# Here is the factored step alone, up to a million classes: its cost does not depend on their number (MATH 12.2). A step
# of dense SGD under the same φ stands beside it, for the sizes at which it is quick enough.

# %%
MILLION = (4_096, 16_384, 65_536, 262_144, 1_048_576)


def of_dense_descent(classes):
    hidden, weight, labels = ways.arrays(TOKENS, FEATURES, classes)

    def loss(weight):
        return js.losses.cross_entropy(hidden @ weight.T, labels, phi=PHI).mean()

    return milliseconds(jax.jit(lambda weight: weight - 0.1 * jax.grad(loss)(weight)), weight)


flat = [of_factored(V) for V in MILLION]
dense = [of_dense_descent(V) for V in MILLION[:3]]
for V, ms in zip(MILLION, flat, strict=True):
    print(f"V = {V:9,}: {ms:6.2f} ms")

# %%
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.loglog(MILLION, flat, "v-", label="factored SGD")
axes.loglog(MILLION[:3], dense, "o-", label="dense SGD")
axes.set_xticks(MILLION, [f"{V:,}" for V in MILLION])
axes.minorticks_off()
axes.set_xlabel("classes V")
axes.set_ylabel("time of a step, ms")
axes.set_title(f"{TOKENS} tokens, d = {FEATURES}, taylor(2)")
axes.legend()
plt.show()

# %% [markdown]
# ## A real run
#
# This is the table of `python -m jsoftmax lm --head all`, read from `benchmarks/results/lm-jax-0.10.json`. A small
# recurrent network is trained under each head on the docstrings of installed packages; one package is held out as a
# whole.
#
# For comparison, these perplexities were published for other texts and larger networks. For text8 with 44,000 words,
# Grave et al. 2017 report 144 in 83 minutes for the full softmax, 166 in 41 minutes for sampling and 147 in 30 minutes
# for the adaptive softmax. For Penn Treebank, de Brébisson & Vincent 2016 report 126.7, 147.2 and 149.2 for
# log-softmax, log-Taylor and log-spherical softmax.

# %%
run = json.loads((here / "benchmarks/results/lm-jax-0.10.json").read_text())
print(f"{run['text']}; {run['train']:,} words to train, {run['epochs']} times, {run['held_out']:,} held out;")
print(f"vocabulary {run['vocabulary']:,}; jax {run['jax']}, {run['processor']}, {run['cores']} cores\n")
print(f"{'head':10} {'φ':10} {'perplexity':>10} {'words/s':>8} {'minutes':>8} {'MiB':>5} {'temporaries, MiB':>17}")
for row in run["rows"]:
    print(f"{row['head']:10} {row.get('phi', ''):10} {row['perplexity']:10.1f}", end="")
    if row["head"] != "trigram":
        print(f" {row['tokens_per_second']:8,.0f} {row['seconds'] / 60:8.1f}", end="")
        print(f" {row['peak_MiB']:5.0f} {row['temporaries_MiB']:17.0f}", end="")
    print()
