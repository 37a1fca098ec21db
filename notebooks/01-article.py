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
# # The softmax function, section by section, and where the article errs
#
# The article *The softmax function* (September 2024) lists formulas of the softmax. This notebook takes them one by
# one: each stands beside the call that computes it, and is checked against automatic differentiation. Three of the
# article's formulas are wrong; the correct ones stand beside them. Row numbers refer to [MATH.md](../MATH.md).

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jsoftmax as js

jax.config.update("jax_enable_x64", True)
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
z = jnp.array([0.5, -1.0, 2.0, 0.0])
K = len(z)


def check(ours, reference, tolerance=1e-12):
    """The worst error over the largest entry; fails above the tolerance."""
    error = float(jnp.max(jnp.abs(ours - reference)) / jnp.max(jnp.abs(reference)))
    assert error <= tolerance, error
    return f"relative error {error:.0e}"


# %% [markdown]
# ## 1 Basic
#
# $$\sigma(\mathbf z)_i = \frac{e^{z_i}}{\sum_j e^{z_j}}$$
#
# `softmax`, row 1.2. Adding one number to all scores changes nothing.

# %%
p = js.softmax(z)
print(p, p.sum())
check(p, jnp.exp(z) / jnp.exp(z).sum()), check(js.softmax(z + 100), p, 1e-12)

# %% [markdown]
# ## 2 Derivatives
#
# $$\frac{\partial\sigma_i}{\partial z_j} = \sigma_i(\delta_{ij} - \sigma_j)$$
#
# `softmax_jacobian`, row 1.6: a diagonal matrix plus one of rank one, so a product with a vector costs O(K).

# %%
J = js.softmax_jacobian(z)
print(J)
check(J.as_matrix(), jax.jacobian(jax.nn.softmax)(z)), check(J.mv(z), J.as_matrix() @ z)

# %% [markdown]
# The second derivatives form a tensor (row 1.8):
#
# $$T_{ijk} = \sigma_i(\delta_{ij}-\sigma_j)(\delta_{ik}-\sigma_k) - \sigma_i\sigma_j(\delta_{jk}-\sigma_k)$$
#
# The article's general formula is right. In its table of cases, one is wrong (the factor for $i \ne j = k$), and one is
# missing ($i = k \ne j$).

# %%
T = js.softmax_second_derivative(z)
print(check(T, jax.jacfwd(jax.jacrev(jax.nn.softmax))(z)))
i, k = 0, 2
print(f"true      i ≠ j = k: T = {T[i, k, k]:+.6f}, σ_i σ_k (2σ_k − 1) = {p[i] * p[k] * (2 * p[k] - 1):+.6f}")
print(f"article's i ≠ j = k:                    σ_i σ_k (2σ_i − 1) = {p[i] * p[k] * (2 * p[i] - 1):+.6f}")
print(f"missing   i = k ≠ j: T = {T[i, k, i]:+.6f}, σ_i σ_j (2σ_i − 1) = {p[i] * p[k] * (2 * p[i] - 1):+.6f}")

# %% [markdown]
# The same as pictures: the Jacobian, and the four slices of $T$.

# %%
figure, axes = plt.subplots(1, K + 1, figsize=(13, 2.8), layout="constrained")
for axis, (title, matrix) in zip(axes, [("J", J.as_matrix()), *((f"T[{i}]", T[i]) for i in range(K))], strict=True):
    limit = float(jnp.max(jnp.abs(matrix)))
    image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set_title(title)
    axis.grid(visible=False)
    axis.set_xticks(range(K))
    axis.set_yticks(range(K))
    figure.colorbar(image, ax=axis, shrink=0.8)
plt.show()

# %% [markdown]
# ## 3 Non-exponential
#
# $$\Phi(\mathbf z)_i = \frac{\phi(z_i)}{\sum_j \phi(z_j)}$$
#
# The function φ may be any positive one. With ψ = log φ the result is the softmax of ψ(z), so its derivatives need only
# the slope s = ψ′ = φ′/φ and the curvature t = ψ″. The article's Jacobian is right; it simplifies to $J =
# \mathrm{diag}(p s) - p (p s)^\top$ (row 1.6).

# %%
for phi in js.PHIS:
    jacobian = js.softmax_jacobian(z / 2, phi=phi).as_matrix()

    def plain(z, phi=phi):
        w = phi.definition(z, jnp)
        return w / w.sum()

    print(f"{phi!s:28}", check(jacobian, jax.jacobian(plain)(z / 2)))

# %%
grid = jnp.linspace(-4, 4, 401)
chosen = [js.exp, js.taylor(2), js.spherical(0.1), js.softplus, js.sigsoftmax, js.elu1]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for phi in chosen:
    left.plot(grid, phi(grid), label=str(phi))
    scores = jnp.stack([grid, jnp.zeros_like(grid)], -1)
    right.plot(grid, js.softmax(scores, phi=phi)[:, 0], label=str(phi))
left.set(yscale="log", xlabel="z", title="φ(z)")
right.set(xlabel="z", title="probability of the first of the scores (z, 0)")
right.legend()
plt.show()

# %% [markdown]
# The Taylor and spherical φ are not monotone: with them, the most probable class need not have the largest score.
#
# ## 4 Log-Taylor softmax
#
# The article leaves this section open. The log-Taylor softmax is the logarithm of the softmax in which a Taylor
# polynomial of even order replaces the exponential (row 3.2). It is computed through ψ = n log|z| + …, so that nothing
# overflows.

# %%
taylor = js.taylor(2)
print(js.log_softmax(z, phi=taylor))
plain_taylor = jnp.log(1 + z + z**2 / 2) - jnp.log(jnp.sum(1 + z + z**2 / 2))
print(check(js.log_softmax(z, phi=taylor), plain_taylor))
print("scores of 1e30 in float32:", js.log_softmax(jnp.array([1e30, -1e30, 1.0], jnp.float32), phi=taylor))

# %% [markdown]
# ## 5 Via Gumbel
#
# If the $g_i$ are independent Gumbel variables, $\arg\max_i (\log\phi(z_i) + g_i)$ is a sample from $p$. This holds for
# every φ.

# %%
draws = 200_000
for phi in (js.exp, js.spherical(0.1)):
    noise = jax.random.gumbel(jax.random.key(0), (draws, K))
    frequencies = jnp.bincount(jnp.argmax(phi.log(z) + noise, -1), length=K) / draws
    probabilities = js.softmax(z, phi=phi)
    print(f"{phi!s:15} p = {np.round(probabilities, 4)}  frequencies = {np.round(frequencies, 4)}")
    assert jnp.max(jnp.abs(frequencies - probabilities)) < 5 / (2 * draws**0.5)

# %% [markdown]
# ## 6 Entropy
#
# ### 6.1 Softmax
#
# $$H = -\sum_i p_i \log p_i$$
#
# The article's gradient is $-1 + p$. That is not the gradient of $H$ but the gradient of $L - \sum_i z_i$. With $c =
# \log p + H$ the true gradient is $-p\,c$ (row 1.5).

# %%
H = js.entropy(z)


def plain(z):
    """The entropy as it is usually written."""
    return -jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z))


autodiff = jax.grad(plain)(z)
print("claimed", -1 + p)
print("true   ", js.entropy_gradient(z))
print("autodiff", autodiff)
check(js.entropy_gradient(z), autodiff)

# %%
scores = jnp.stack([grid, jnp.zeros_like(grid)], -1)
figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
axis.plot(grid, js.entropy(scores), color="0.6", label="H of the scores (z, 0)")
axis.plot(grid, js.entropy_gradient(scores)[:, 0], label="∂H/∂z, true: −p (log p + H)")
axis.plot(grid[::20], jax.vmap(jax.grad(plain))(scores)[::20, 0], "k.", label="by autodiff of −Σ p log p")
axis.plot(grid, -1 + js.softmax(scores)[:, 0], "--", color="C3", label="the article's: −1 + p")
axis.set(xlabel="z", title="The entropy's gradient: what the article claims, and what is true")
axis.legend()
plt.show()

# %% [markdown]
# The article's Hessian, $\mathrm{diag}(p) - p p^\top$, is therefore that of $L$, which is always positive
# semi-definite. The true Hessian (row 1.8) is indefinite:
#
# $$\nabla^2 H = p p^\top + (pc) p^\top + p (pc)^\top - \mathrm{diag}(p(1+c))$$

# %%
true = js.entropy_hessian(z).as_matrix()
claimed = js.log_normalizer_hessian(z).as_matrix()
print("eigenvalues, true:   ", np.round(np.linalg.eigvalsh(true), 4))
print("eigenvalues, claimed:", np.round(np.linalg.eigvalsh(claimed), 4))
check(true, jax.hessian(plain)(z))

# %% [markdown]
# The article's second-order expansion inherits both errors. The true expansion is `entropy_expansion` (row 6.5); its
# error is of third order.

# %%
center, direction = jnp.array([0.8, 0.0, -0.4]), jnp.array([1.0, -0.5, 0.3])
steps = jnp.logspace(-3, 0, 30)
q = js.softmax(center)


def articles_expansion(z, dz):
    p = js.softmax(z)
    return js.entropy(z) + (p - 1) @ dz + dz @ (jnp.diag(p) - jnp.outer(p, p)) @ dz / 2


exact = jax.vmap(lambda h: js.entropy(center + h * direction))(steps)
errors = {
    "the article's": jax.vmap(lambda h: articles_expansion(center, h * direction))(steps) - exact,
    "order 1, true": jax.vmap(lambda h: js.entropy_expansion(center, h * direction, 1))(steps) - exact,
    "order 2, true": jax.vmap(lambda h: js.entropy_expansion(center, h * direction))(steps) - exact,
}
figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
for (name, error), style in zip(errors.items(), ("C3--", "C0-", "C2-"), strict=True):
    axis.loglog(steps, jnp.abs(error), style, label=name)
axis.set(xlabel="length of the step", ylabel="|expansion − H|", title="Errors of the expansions")
axis.legend()
plt.show()
slope = np.polyfit(np.log(steps[:15]), np.log(np.abs(errors["order 2, true"][:15])), 1)[0]
assert abs(slope - 3) < 0.1

# %% [markdown]
# The pictures show $H$ of three scores as the first two of them change, and both expansions about the point that the
# white dot marks.

# %%
side = jnp.linspace(-3, 3, 81)
a, b = jnp.meshgrid(side, side)
dz = jnp.stack([a, b, jnp.zeros_like(a)], -1)
point = jnp.array([0.8, 0.2, 0.0])
surfaces = {
    "H": js.entropy(point + dz),
    "its true expansion": js.entropy_expansion(jnp.broadcast_to(point, dz.shape), dz),
    "the article's expansion": jax.vmap(jax.vmap(lambda d: articles_expansion(point, d)))(dz),
}
figure, axes = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained", sharey=True)
for axis, (title, surface) in zip(axes, surfaces.items(), strict=True):
    image = axis.contourf(side, side, jnp.clip(surface, -0.5, 1.5), np.linspace(-0.5, 1.5, 21), cmap="viridis")
    axis.plot(0, 0, "wo")
    axis.set(title=title, xlabel="change of the first score")
axes[0].set_ylabel("change of the second score")
figure.colorbar(image, ax=axes, label="nats (clipped to [−0.5, 1.5])")
plt.show()

# %% [markdown]
# ### 6.2 Non-exponential
#
# The article's gradient of the generalised entropy is right; it simplifies to $-p\,c\,s$ (row 1.5). The Hessian is
# $\mathrm{diag}(s)[\,\cdot\,]\mathrm{diag}(s) - \mathrm{diag}(p c t)$; between the brackets stands the Hessian of
# section 6.1 (row 1.8).

# %%
for phi in js.PHIS:

    def plain_entropy(z, phi=phi):
        w = phi.definition(z, jnp)
        p = w / w.sum()
        return -jnp.sum(p * jnp.log(p))

    gradient = check(js.entropy_gradient(z / 2, phi=phi), jax.grad(plain_entropy)(z / 2))
    hessian = check(js.entropy_hessian(z / 2, phi=phi).as_matrix(), jax.hessian(plain_entropy)(z / 2), 1e-10)
    print(f"{phi!s:28} gradient: {gradient}   Hessian: {hessian}")

# %% [markdown]
# `python -m jsoftmax verify` checks all of this at once, for every function and every φ, in float64 and in float32.
