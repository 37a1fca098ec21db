"""Second-order training: closed forms assembled into whole-model Hessians, and the steps that use them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cells import some
from interpreter import evaluated
from jax.flatten_util import ravel_pytree

import jsoftmax as js
from jsoftmax import optim
from jsoftmax.verify import PHIS


def data(rows=5, features=4, classes=3):
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.normal(size=(rows, features)))
    targets = jax.nn.one_hot(rng.integers(classes, size=rows), classes, dtype=inputs.dtype)
    return inputs, 0.9 * targets + 0.1 / classes


def network(parameters, inputs):
    (w1, b1), (w2, b2) = parameters
    return jnp.tanh(inputs @ w1 + b1) @ w2 + b2


def initial(features=4, hidden=2, classes=3):
    rng = np.random.default_rng(2)
    shapes = (((features, hidden), (hidden,)), ((hidden, classes), (classes,)))
    return [tuple(jnp.asarray(rng.normal(size=shape) / 2) for shape in layer) for layer in shapes]


def loss_of(scores, phi):
    def loss(parameters, inputs, targets):
        return -jnp.mean(jnp.sum(targets * js.log_softmax(scores(parameters, inputs), phi=phi), -1))

    return loss


@pytest.mark.parametrize("phi", some([js.exp, js.softplus, js.taylor(2)], [js.softplus]), ids=str)
def test_hessian_of_a_whole_model(phi):
    """jax.hessian of the loss = Σ_n (J_nᵀ B_n J_n + Σ_k g_nk ∇²z_nk) / N, with the closed forms B and g."""
    with jax.enable_x64(True):
        inputs, targets = data()
        flat, unravel = ravel_pytree(initial())

        def scores(flat):
            return network(unravel(flat), inputs)

        loss = loss_of(network, phi)

        @evaluated
        def results(flat):
            z, J, curvature = scores(flat), jax.jacobian(scores)(flat), jax.hessian(scores)(flat)
            B = js.cross_entropy_hessian(z, targets, phi=phi).as_matrix()
            g = (js.softmax(z, phi=phi) - targets) * jax.vmap(jax.vmap(jax.grad(phi.log)))(z)
            first = jnp.einsum("nka,nkl,nlb->ab", J, B, J)
            assembled = (first + jnp.einsum("nk,nkab->ab", g, curvature)) / len(z)
            product = optim.gauss_newton(scores, flat, lambda z: js.cross_entropy_hessian(z, targets, phi=phi))
            by_autodiff = jax.hessian(lambda f: loss(unravel(f), inputs, targets))(flat)
            return assembled, by_autodiff, jax.vmap(product)(jnp.eye(flat.size)), first / len(z)

        assembled, by_autodiff, products, first = results(flat)
        np.testing.assert_allclose(assembled, by_autodiff, rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(products, first, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("phi", some(PHIS, [js.exp, js.relu_power(2, 0.1)]), ids=str)
def test_fisher_information(phi):
    """φ enters by the slope of log φ, which test_phi.py has of every φ."""
    with jax.enable_x64(True):
        z = jnp.array([0.3, -0.7, 1.1])

        @evaluated
        def results(z):
            p, J = js.softmax(z, phi=phi), jax.jacobian(lambda z: js.log_softmax(z, phi=phi))(z)
            return js.fisher_information(z, phi=phi), jnp.einsum("y,yi,yj->ij", p, J, J)

        F, want = results(z)
        np.testing.assert_allclose(F.as_matrix(), want, rtol=1e-10, atol=1e-14)
        assert F.covariance == (phi == js.exp)


@pytest.mark.parametrize("phi", some([js.exp, js.softplus], [js.softplus]), ids=str)
def test_steps_are_damped_solves(phi):
    with jax.enable_x64(True):
        inputs, targets = data(rows=20)
        W = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3))) / 3
        loss, damping = loss_of(lambda W, inputs: inputs @ W, phi), 0.1
        gradient = evaluated(jax.grad(loss))(W, inputs, targets)
        hessian = np.asarray(evaluated(jax.hessian(loss))(W, inputs, targets)).reshape(12, 12)
        want = -np.linalg.solve(hessian + damping * np.eye(12), gradient.ravel()).reshape(4, 3)
        newton = optim.newton_cg(lambda W, inputs: inputs @ W, damping, phi=phi)
        update = evaluated(newton.update)
        np.testing.assert_allclose(
            update(gradient, newton.init(W), W, inputs=inputs, targets=targets)[0], want, rtol=1e-5, atol=1e-6
        )
        natural = optim.natural_gradient(lambda W, inputs: inputs @ W, damping, phi=phi)
        step = evaluated(natural.update)(gradient, natural.init(W), W, inputs=inputs)[0]
        F = js.fisher_information(inputs @ W, phi=phi).as_matrix()
        J = jnp.einsum("nf,kl->nkfl", inputs, jnp.eye(3)).reshape(20, 3, 12)
        matrix = jnp.einsum("nka,nkl,nlb->ab", J, F, J) / 20 + damping * np.eye(12)
        np.testing.assert_allclose(step.ravel(), -np.linalg.solve(matrix, gradient.ravel()), rtol=1e-5, atol=1e-6)


def test_newton_with_a_line_search_converges_in_a_few_steps():
    """As optax users compose it: weight decay of strength `damping` makes the step exact, so convergence quadratic."""
    with jax.enable_x64(True):
        inputs, targets = data(rows=50)
        W, damping = jnp.zeros((4, 3)), 1e-2
        plain = loss_of(lambda W, inputs: inputs @ W, js.exp)

        def loss(W, inputs, targets):
            return plain(W, inputs, targets) + damping / 2 * jnp.sum(W**2)

        optimizer = optax.chain(
            optim.newton_cg(lambda W, inputs: inputs @ W, damping), optax.scale_by_backtracking_linesearch(20)
        )
        state = optimizer.init(W)

        @evaluated
        def step(W, state):
            value, gradient = jax.value_and_grad(loss)(W, inputs, targets)
            updates, state = optimizer.update(
                gradient, state, W, value=value, grad=gradient, value_fn=loss, inputs=inputs, targets=targets
            )
            return optax.apply_updates(W, updates), state, jnp.linalg.norm(gradient)

        for _ in range(4):
            W, state, norm = step(W, state)
        assert norm < 1e-6


@pytest.mark.parametrize("phi", [js.taylor(2), js.spherical(0.1), js.relu_power(2, 0.1)], ids=str)
def test_newton_points_downhill(phi):
    """The Hessian of these φ is indefinite at many points; plain conjugate gradients climb from some of them."""

    def linear(W, inputs):
        return inputs @ W

    loss, damping, indefinite = loss_of(linear, phi), 1e-3, 0
    newton = optim.newton_cg(linear, damping, phi=phi)

    @evaluated
    def step(W, inputs, targets):
        gradient = jax.grad(loss)(W, inputs, targets)
        hessian = jax.hessian(loss)(W, inputs, targets).reshape(W.size, W.size)
        update, _ = newton.update(gradient, newton.init(W), W, inputs=inputs, targets=targets)
        return jnp.vdot(update, gradient), jnp.vdot(gradient, gradient), jnp.linalg.eigvalsh(hessian)[0]

    with jax.enable_x64(True):
        inputs, targets = data(rows=20)
        for seed in range(20):
            W = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 3)))
            slope, size, lowest = step(W, inputs, targets)
            assert slope < 0 or size == 0, seed
            indefinite += bool(lowest < -damping)
    assert indefinite > 5


def test_iterations_and_a_traced_damping():
    """One iteration is steepest descent with the exact step; the damping is an array like another."""
    with jax.enable_x64(True):
        inputs, targets = data(rows=20)
        W = jnp.asarray(np.random.default_rng(3).normal(size=(4, 3)))
        gradient = jax.grad(loss_of(lambda W, inputs: inputs @ W, js.exp))(W, inputs, targets)

        @evaluated
        def step(damping):
            newton = optim.newton_cg(lambda W, inputs: inputs @ W, damping, iterations=1)
            return newton.update(gradient, newton.init(W), W, inputs=inputs, targets=targets)[0]

        product = optim.gauss_newton(lambda W: inputs @ W, W, lambda z: js.cross_entropy_hessian(z, targets))(gradient)
        curvature = jnp.vdot(gradient, product + 0.3 * gradient)
        np.testing.assert_allclose(step(0.3), -gradient * jnp.vdot(gradient, gradient) / curvature, rtol=1e-12)


LABELS = jnp.zeros(4, int)
FOUR = {"inputs": jnp.zeros((4, 2))}


def update(f, **given):
    W = jnp.zeros((2, 4))
    return f(lambda W, inputs: inputs @ W, damping=1.0).update(W, (), W, **given)


def test_newton_takes_no_labels_for_weights():
    """With as many rows as classes, labels would broadcast to weights, and must be rejected."""
    for targets in (LABELS, LABELS[:, None], jnp.zeros((1, 4))):
        with pytest.raises(ValueError, match=r"newton_cg: targets must be distributions.*one_hot"):
            update(optim.newton_cg, targets=targets, **FOUR)
    with pytest.raises(TypeError, match=r"newton_cg: update needs .* targets=targets; got no targets"):
        update(optim.newton_cg, **FOUR)


def test_wrong_products():
    with pytest.raises(TypeError, match="gauss_newton: operator must return a DiagonalPlusLowRank"):
        optim.gauss_newton(lambda W: W, jnp.zeros(3), lambda z: js.entropy_hessian(z).as_matrix())
    with pytest.raises(TypeError, match="gauss_newton: scores must be a function of parameters; got Array"):
        inspect.unwrap(optim.gauss_newton)(jnp.zeros(3), jnp.zeros(3), js.entropy_hessian)


WRONG = [
    (lambda f: f(3, damping=1.0), TypeError, "scores must be a function", "int"),
    (lambda f: f(network, damping=0), ValueError, "damping must be > 0", "got 0"),
    (lambda f: f(network, damping=jnp.ones(2)), ValueError, "damping must be > 0", "got shape (2,)"),
    (lambda f: f(network, damping=None), TypeError, "damping must be an array or a number", "NoneType"),
    (lambda f: f(network, damping=1.0, iterations=0), ValueError, "iterations must be an int >= 1", "got 0"),
    (lambda f: f(network, damping=1.0, iterations=2.5), ValueError, "iterations must be an int >= 1", "got 2.5"),
    (
        lambda f: f(network, damping=1.0).update(0.0, (), 0.0),
        TypeError,
        "update needs the parameters and inputs=inputs",
        "got no inputs",
    ),
    (
        lambda f: f(network, damping=1.0).update({"W": FOUR}, (), {"V": FOUR}, inputs=0, targets=0),
        ValueError,
        "the gradient must have the structure and shapes of the parameters",
        "jax.grad",
    ),
    (lambda f: f(network, damping=1.0, phi=jnp.exp), TypeError, "phi must be a φ", "from_callable"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong[2]}, {wrong[3]}")
@pytest.mark.parametrize("f", [optim.newton_cg, optim.natural_gradient], ids=lambda f: f.__name__)
def test_wrong_calls(f, wrong):
    call, error, *says = wrong
    with pytest.raises(error, match=f.__name__) as caught:
        call(inspect.unwrap(f))
    for part in says:
        assert part in str(caught.value)
