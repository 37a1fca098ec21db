"""The README names every public name, its tables are the lists, and its example runs."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jsoftmax
from jsoftmax import gumbel, heads, losses, optim, verify
from jsoftmax.cli import train

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
MATH = (pathlib.Path(__file__).parent.parent / "MATH.md").read_text()


@pytest.mark.parametrize("name", [name for name in jsoftmax.__all__ if name != "PHIS"])
def test_tables_are_complete(name):
    assert re.search(rf"^\| `{name}\b", README, re.M), name


def test_tables_follow_the_lists():
    tables = README.split("## Losses")[0]
    scored = [function.name for function in verify.FUNCTIONS + verify.DERIVATIVES]
    assert re.findall(r"^\| `(\w+)\(z", tables, re.M) == scored
    assert re.findall(r"^\| `losses\.(\w+)\(", README, re.M) == [
        *("cross_entropy", "focal_cross_entropy", "poly_cross_entropy"),
        *("kl_to_target", "spherical_z_loss", "plackett_luce_log_prob"),
    ]
    assert set(losses.__all__) == set(re.findall(r"^\| `losses\.(\w+)\(", README, re.M))
    listed = set(re.findall(r"^\| `gumbel\.(\w+)\(", README, re.M))
    assert listed == {name for name in gumbel.__all__ if name.islower()}
    listed = set(re.findall(r"^\| `heads\.(\w+)", README, re.M))
    assert listed == {name for name in heads.__all__ if name.islower()}
    families = list(dict.fromkeys(phi.name for phi in jsoftmax.PHIS))
    assert re.findall(r"^\| `(\w+)[^|]*\|[^|]*\|[^|]*\| 3\.", README, re.M) == families


def test_results_cover_every_phi():
    table = README.split("## Scanned digits")[1]
    for phi in jsoftmax.PHIS:
        assert table.count(f"| cross-entropy | {phi} |") == 2, phi
    for name in train.LOSSES:
        assert table.count(f"| {name} | ") >= 2, name


def test_example():
    names = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(code, names)
    assert names["hessians"].shape == (2, 3, 3)
    assert np.all(np.isfinite(names["hessians"]))
    np.testing.assert_allclose(jsoftmax.entropy(names["z"]), jnp.array([0.8323954, 4.328423e-08]), rtol=1e-6)
    np.testing.assert_allclose(names["p"], [0, 0.32600734, 0.67399275], rtol=1e-4)
    np.testing.assert_allclose(jsoftmax.entropy(names["z"][0] / names["t"]), 0.5, rtol=1e-5)
    np.testing.assert_allclose(names["by_theta"]["scale"], 0.36613, rtol=1e-4)
    assert jnp.abs(jax.grad(names["value"])(names["W"], names["inputs"], names["targets"])).max() < 1e-4
    np.testing.assert_allclose(jnp.bincount(names["draws"]) / 1e6, jsoftmax.softmax(names["z"][0]), atol=0.003)
    assert set(np.unique(names["soft"]).tolist()) == {0.0, 1.0}
    assert names["sample"].indices.shape == (2,)
    assert names["curved"].shape == names["by_hidden"].shape == (6, 16)
    mean = names["token_mean"](names["hidden"], names["weight"])
    np.testing.assert_allclose(-names["found"].log_prob.sum() / 4, mean, rtol=1e-6)
    assert np.isfinite(names["value_of_step"])
    check_step(names)
    labels = jnp.array([3, 1023, 500, 0])
    whole = jsoftmax.losses.cross_entropy(np.asarray(names["z_sharded"]), labels)
    np.testing.assert_allclose(names["loss_of_rows"], whole, rtol=1e-6)
    want = jsoftmax.gumbel.categorical(jax.random.key(0), np.asarray(names["z_sharded"]))
    np.testing.assert_array_equal(names["drawn_of_rows"], want)
    assert np.all(names["likelihood_of_labels"] < 0)
    np.testing.assert_allclose(names["loss"], jnp.array([2.0611537e-09, 0.3132617]), rtol=1e-6)


def check_step(names):
    """That of the mesh is that of one device."""

    def objective(params, inputs, labels):
        hidden = jnp.tanh(inputs @ params["layer"])
        found = heads.linear_statistics(hidden, params["weight"], labels)
        return jnp.mean(-found.log_prob - 0.01 * found.entropy)

    params = {"layer": jnp.eye(16), "weight": names["weight"]}
    inputs = jnp.cos(jnp.arange(128.0)).reshape(8, 16)
    value, by_params = jax.jit(jax.value_and_grad(objective))(params, inputs, jnp.arange(8))
    np.testing.assert_allclose(names["value_of_mesh"], value, rtol=1e-6)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    updates, _ = optimizer.update(by_params, optimizer.init(params), params)
    for name, before in params.items():
        np.testing.assert_allclose(names["trained"][name], before + updates[name], atol=1e-5)
    assert names["trained"]["weight"].sharding.spec == jax.sharding.PartitionSpec("classes")


CITING = {name: getattr(jsoftmax, name) for name in jsoftmax.__all__ if name.islower()}
CITING |= {name: getattr(losses, name) for name in losses.__all__}
CITING |= {name: getattr(gumbel, name) for name in gumbel.__all__ if name.islower()}
CITING |= {name: getattr(heads, name) for name in heads.__all__ if name.islower()}
CITING |= {name: getattr(heads.factored, name) for name in ("init", "loss", "loss_and_update", "refresh", "z_loss")}
CITING |= {f"adaptive.{name}": getattr(heads.adaptive, name) for name in ("init", "log_prob", "plan_clusters")}
CITING |= {f.__name__: f for f in (optim.gauss_newton, optim.newton_cg, optim.natural_gradient)}


@pytest.mark.parametrize("name", CITING)
def test_docstrings_cite_rows_that_exist(name):
    thing = CITING[name]
    text = (type(thing) if name in map(str, jsoftmax.PHIS) else thing).__doc__
    rows = re.findall(r"MATH (\d+\.\d+)", text)
    assert rows, name
    for row in rows:
        assert f"**{row} " in MATH, (name, row)
