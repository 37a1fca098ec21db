"""The experiment: it learns, and its linear model with exp is scikit-learn's logistic regression."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import jit_as_user
from interpreter import evaluated
from sklearn.linear_model import LogisticRegression

import jsoftmax as js
from jsoftmax import cli
from jsoftmax.cli import train

(PLAIN,) = train.arms(["cross-entropy"], ["exp"], 0.0)


@pytest.mark.full  # An experiment: it trains a model to its optimum, beside the peer.
def test_linear_model_is_logistic_regression():
    strength = 1e-2
    with jax.enable_x64(True):
        data, test = (train.Data(d.inputs.astype(jnp.float64), d.labels) for d in train.digits())
        parameters = [(jnp.zeros((64, 10)), jnp.zeros(10))]

        def objective(parameters):
            return train.loss(parameters, data, PLAIN) + strength / 2 * jnp.sum(parameters[0][0] ** 2)

        optimiser = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(objective)

        def step(carry, _):
            parameters, state = carry
            value, grad = value_and_grad(parameters, state=state)
            updates, state = optimiser.update(grad, state, parameters, value=value, grad=grad, value_fn=objective)
            return (optax.apply_updates(parameters, updates), state), value

        @jit_as_user
        def trained(parameters):
            return jax.lax.scan(step, (parameters, optimiser.init(parameters)), length=150)[0][0]

        parameters = trained(parameters)
        ours = np.asarray(js.softmax(train.scores(parameters, test.inputs, js.exp)))
    peer = LogisticRegression(C=1 / (strength * len(data.labels)), tol=1e-8, max_iter=5000)
    peer.fit(np.asarray(data.inputs), np.asarray(data.labels))
    np.testing.assert_allclose(ours, peer.predict_proba(np.asarray(test.inputs)), atol=1e-5)


@pytest.mark.full  # It is the experiment's loss; of each φ, far out too: test_phi.py.
def test_every_phi_has_finite_gradients_far_out():
    data, _ = train.digits()
    for phi in js.PHIS:
        (arm,) = train.arms(["cross-entropy"], [str(phi)], 0.0)
        of_arm = evaluated(jax.value_and_grad(lambda parameters, arm=arm: train.loss(parameters, data, arm)))
        for scale in (0.0, 1.0, 100.0):
            parameters = jax.tree.map(lambda a, scale=scale: scale * a, train.initial(jax.random.key(1), (64, 10)))
            value, gradient = of_arm(parameters)
            assert np.isfinite(value), (phi, scale)
            assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient)), (phi, scale)


@pytest.mark.full  # It runs the experiment from end to end.
def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "PHIS", (js.exp,))
    losses = ["cross-entropy", "Z-loss", "sparsemax"]
    options = ["--seeds", "2", "--plot", str(tmp_path / "curves.png"), "--markdown", "--loss", *losses]
    assert cli.main(["train", *options]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == (2 + 2 * 3) + (2 + 3)
    for row in rows[2:8]:
        assert 90 < float(row[3].split("±")[0]) < 100, row
        assert bool(row[4].strip()) != ("Z-loss" in row[1])
    assert "∞" in rows[4][4]
    iterations = [int(row[1]) for row in rows[10:]]
    assert "Newton" in rows[10][0]
    assert iterations[0] < min(iterations[1:])
    assert np.ptp([float(row[3]) for row in rows[10:]]) < 1e-4
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert cli.main(["train", "--seeds", "1"]) == 2


@pytest.mark.full  # It is about the experiment.
def test_which_losses_go_with_which_phi():
    names = [(arm.name, arm.shown_phi) for arm in train.arms(list(train.LOSSES), None, 1.0)]
    assert names[: len(js.PHIS)] == [("cross-entropy", str(phi)) for phi in js.PHIS]
    assert names[len(js.PHIS) :] == [
        *(("soft-margin", "exp"), ("focal", "exp"), ("Poly-1", "exp")),
        *(("Z-loss", ""), ("sparsemax", ""), ("entmax15", "")),
    ]
    chosen = train.arms(["focal", "sparsemax"], ["taylor(2)", "softplus"], 1.0)
    assert [(arm.name, arm.shown_phi) for arm in chosen] == [
        *(("focal", "taylor(2)"), ("focal", "softplus")),
        ("sparsemax", ""),
    ]
    z, labels = jnp.array([[0.3, -0.7, 1.1]]), jnp.array([1])
    for arm in train.arms(list(train.LOSSES), ["exp"], 1.0):
        assert np.isfinite(evaluated(arm.loss)(z, labels)).all()
        if arm.log_p is not None:
            np.testing.assert_allclose(np.exp(evaluated(arm.log_p)(z)).sum(), 1, rtol=1e-6)


def test_a_missing_extra_is_named(monkeypatch, capsys):
    def missing(name):
        raise ModuleNotFoundError("No module named 'optax'", name="optax")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["train"]) == 2
    assert "'optax' is missing" in capsys.readouterr().out
