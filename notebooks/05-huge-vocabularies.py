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
# The loss of a linear layer with V outputs, its value and gradient, in four ways: all logits at once with optax; block
# by block (`heads.linear_cross_entropy`), or its sum with the gradient made on the way
# (`heads.linear_cross_entropy_sum`); and, for a φ of order 2, the exact shortcut (`heads.quadratic_cross_entropy`) and
# exact SGD that never passes over the classes (`heads.factored`). Everything is measured here, by the functions of
# `benchmarks/heads.py`; rows 11.1 to 12.4 of `MATH.md` have the formulas.

# %%
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

here = pathlib.Path.cwd()
sys.path.insert(0, str(here if (here / "benchmarks").is_dir() else here.parent))

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
# What the compiled program needs beside its arguments and results. All logits grow with V in every mode; block by block
# nothing does. Its sum keeps the products of 256 tokens with all classes, here all tokens.

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
# Medians of a few calls each; small sizes, so that the notebook is quick. `benchmarks/results/heads-*.json` has 2,048
# tokens, 512 features and 131,072 classes beside optax and PyTorch. The factored step is one of SGD on the weight, its
# state donated, of 256 tokens; its line is flat: it passes over no class but the labels.


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
# In one pass come also the log-probability, the entropy and the mode of each token, all but the last differentiable:

# %%
found = heads.linear_statistics(hidden, weight, labels)
logits = hidden @ weight.T
np.testing.assert_allclose(found.entropy, js.entropy(logits), rtol=1e-5)
np.testing.assert_array_equal(found.argmax, jnp.argmax(logits, -1))
print("mean entropy", found.entropy.mean(), "nats, of at most", jnp.log(4_096.0))
