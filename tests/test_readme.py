"""README and documentation: public names have their place, tables come from files, links lead there, examples run."""

import inspect
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jsoftmax
from benchmarks import render
from jsoftmax import attention, gumbel, heads, losses, optim, segments, verify
from jsoftmax.cli import train

ROOMS = [name for name in jsoftmax.__all__ if isinstance(getattr(jsoftmax, name), types.ModuleType)]
ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MATH = (ROOT / "MATH.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = "\n".join(page.read_text() for page in sorted((ROOT / "docs/guides").glob("*.md")))
REFERENCE = "\n".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))


def test_the_readme_is_short_and_begins_with_use():
    lines = README.splitlines()
    assert len(lines) <= 200
    assert lines.index("```python") < 40
    first, second, *_ = re.findall(r"```sh\n(.*?)```", README, re.S)
    assert "jsoftmax verify" in first
    assert "-m pytest" in second


@pytest.mark.parametrize("name", [name for name in jsoftmax.__all__ if name != "PHIS"])
def test_tables_are_complete(name):
    if name in ROOMS:
        assert f"(docs/guides/{'second-order' if name == 'optim' else name}.md)" in README
    else:
        assert re.search(rf"^\| `{name}\b", GUIDES, re.M), name


def test_tables_follow_the_lists():
    scored = [function.name for function in verify.FUNCTIONS + verify.DERIVATIVES]
    entropy = (ROOT / "docs/guides/entropy.md").read_text()
    assert re.findall(r"^\| `(\w+)\(z", entropy, re.M) == scored
    for room in (losses, segments, gumbel, heads, attention):
        name = room.__name__.rpartition(".")[2]
        listed = re.findall(rf"^\| `{name}\.(\w+)", GUIDES, re.M)
        assert set(listed) == {public for public in room.__all__ if public.islower()}
    families = list(dict.fromkeys(phi.name for phi in jsoftmax.PHIS))
    assert re.findall(r"^\| `(\w+)[^|]*\|[^|]*\|[^|]*\| 3\.", GUIDES, re.M) == families


def test_the_reference_is_complete():
    public = {name for name in jsoftmax.__all__ if name not in ROOMS}
    for room in (losses, segments, gumbel, heads, attention, optim, heads.factored, heads.adaptive):
        inside = {"adaptive", "factored"} if room is heads else set()
        public |= {f"{room.__name__.removeprefix('jsoftmax.')}.{name}" for name in set(room.__all__) - inside}
    assert sorted(re.findall(r"^::: jsoftmax\.([\w.]+)$", REFERENCE, re.M)) == sorted(public | {"phi.Phi"})


def test_results_cover_every_phi():
    table = (ROOT / "docs/benchmarks/digits.md").read_text()
    for phi in jsoftmax.PHIS:
        assert table.count(f"| cross-entropy | {phi} |") == 2, phi
    for name in train.LOSSES:
        assert table.count(f"| {name} | ") >= 2, name


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_tables_come_from_the_files(page):
    assert render.filled(page.read_text()) == page.read_text(), "run python -m benchmarks --render"


def test_the_picture_shows_what_its_text_says():
    (run,) = render.load_plain("digits")
    *small, _ = run["panels"]
    for panel in small:
        assert min(panel["digits"]["jsoftmax"]) > 6.4, panel["name"]
        for peer in set(panel["digits"]) - {"jsoftmax"}:
            assert min(panel["digits"][peer]) < 1.5, (panel["name"], peer)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def run_examples(page):
    """The names that the page's examples make, run one after the other."""
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S):
        exec(code, names)
    return names


def test_readme_example():
    names = run_examples("README.md")
    np.testing.assert_allclose(names["H"], [0.8323954, 4.328423e-08], rtol=1e-6)
    np.testing.assert_allclose(names["loss"], [0.4076059, 2.0611537e-09], rtol=1e-6)
    assert names["curvature"].shape == (2, 3, 3)
    assert np.all(np.isfinite(names["curvature"]))
    assert np.isnan(-jnp.sum(jax.nn.softmax(names["z"]) * jax.nn.log_softmax(names["z"]), -1)[1])
    assert names["drawn"].shape == (1000, 2)
    np.testing.assert_allclose(names["token_losses"], np.log(1000), rtol=1e-5)


def test_home_example():
    names = run_examples("docs/index.md")
    np.testing.assert_allclose(names["loss"], [0.4076059, 2.0611537e-09], rtol=1e-6)
    assert np.all(np.isfinite(names["H"]))
    assert np.all(np.isfinite(names["hessians"]))


def test_quick_start():
    names = run_examples("docs/quick-start.md")
    np.testing.assert_allclose(names["H"], [0.8323954, 4.328423e-08], rtol=1e-6)
    assert np.all(np.isfinite(names["gradient"]))
    assert np.all(np.isfinite(names["hessians"]))
    np.testing.assert_allclose(names["taylor"], [1 / 8.5, 2.5 / 8.5, 5 / 8.5], rtol=1e-6)
    assert names["token_losses"].shape == (6,)


def test_entropy_guide():
    names = run_examples("docs/guides/entropy.md")
    assert names["hessians"].shape == (2, 3, 3)
    assert np.all(np.isfinite(names["hessians"]))
    np.testing.assert_allclose(names["exact"], [0.8323954, 4.328423e-08], rtol=1e-6)
    assert np.isnan(names["naive"][1])
    np.testing.assert_allclose(names["five_percent_low"], 4.122307e-08, rtol=1e-6)


@pytest.mark.full  # What the page calls is met in test_phi.py.
def test_phi_guide():
    names = run_examples("docs/guides/phi.md")
    assert 0 < abs(names["by_a"]) < np.inf
    np.testing.assert_allclose(names["p"], [0.11764706, 0.29411766, 0.58823529], rtol=1e-6)
    np.testing.assert_allclose(names["by_theta"]["scale"], 0.36613, rtol=1e-4)
    for flat in (jsoftmax.spherical(0.1), jsoftmax.relu_power(2, 0.1), jsoftmax.quadratic(1, 0, 2)):
        assert not np.any(jax.grad(losses.cross_entropy)(jnp.zeros(3), jnp.array(1), phi=flat))


def test_the_phi_guide_names_the_functions_without_phi():
    scored = {"z", "logits", "scores"}
    without = []
    for prefix, module in (("", jsoftmax), ("losses.", losses), ("segments.", segments), ("gumbel.", gumbel)):
        for name in module.__all__:
            f = getattr(module, name)
            if inspect.isfunction(f):
                parameters = inspect.signature(f).parameters.keys()
                without += [f"`{prefix}{name}`"] if parameters & scored and "phi" not in parameters else []
    (listed,) = re.findall(r"map of their own instead:\n(.*?)\.\n", (ROOT / "docs/guides/phi.md").read_text(), re.S)
    assert sorted(re.findall(r"`[\w.]+`", listed)) == sorted(without)


def test_losses_guide():
    np.testing.assert_allclose(run_examples("docs/guides/losses.md")["loss"], [2.0611537e-09, 0.3132617], rtol=1e-6)


@pytest.mark.full  # What the page calls is met in test_sparse.py, test_mixtures.py, test_truncation.py.
def test_sparse_guide():
    names = run_examples("docs/guides/sparse.md")
    np.testing.assert_allclose(names["p"], [0, 0.32600734, 0.67399275], rtol=1e-4)
    np.testing.assert_allclose(jsoftmax.entropy(names["z"] / names["t"]), 0.5, rtol=1e-5)
    np.testing.assert_allclose(names["nucleus"], [0.625, 0.375, 0, 0], rtol=1e-6)


@pytest.mark.full  # What the page calls is met in test_segments.py.
def test_segments_guide():
    names = run_examples("docs/guides/segments.md")
    np.testing.assert_allclose(names["p"], [0.2119416, 0.5761169, 1, 0.2119416], rtol=1e-6)
    np.testing.assert_allclose(names["H"], [jsoftmax.entropy(jnp.array([0.0, 1.0, 0.0])), 0], rtol=1e-6)
    assert names["drawn"].tolist() in ([0, 2, -1], [1, 2, -1], [3, 2, -1])
    scores, values, attended = (np.asarray(names[name]) for name in ("scores", "values", "attended"))
    for node, edges in ((1, [0, 1, 2]), (2, [3, 4])):
        p = np.exp(scores[edges]) / np.exp(scores[edges]).sum(0)
        want = np.einsum("eh,ehf->hf", p, values[names["senders"][jnp.array(edges)]])
        np.testing.assert_allclose(attended[node], want, rtol=1e-5)
    assert not attended[0].any()


def test_draws_of_rows():
    """The recipe's draws have the rates of the rows' softmax; a row of which every score is left out has none."""
    text = (ROOT / "docs/guides/segments.md").read_text()
    recipe = re.findall(r"^perturbed = .*?\n.*?\ndrawn = .*?$", text, re.S | re.M)[0]
    z, row = jnp.array([0.0, 1.0, 5.0, 0.0, -jnp.inf]), jnp.array([0, 0, 1, 0, 2])

    def draw(key):
        names = {"key": key, "z": z, "row": row, "js": jsoftmax, "jnp": jnp, "jax": jax}
        exec(recipe, names)
        return names["drawn"]

    drawn = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(1), 100_000))
    assert np.all(drawn[:, 1:] == jnp.array([2, -1]))
    np.testing.assert_allclose(
        jnp.bincount(drawn[:, 0], length=4) / 1e5, jsoftmax.softmax(z[:4], where=row[:4] == 0), atol=0.006
    )


@pytest.mark.full  # What the page calls is met in test_gumbel.py and test_gumbel_statistics.py.
def test_gumbel_guide():
    names = run_examples("docs/guides/gumbel.md")
    np.testing.assert_allclose(jnp.bincount(names["draws"]) / 1e6, jsoftmax.softmax(names["z"][0]), atol=0.003)
    assert set(np.unique(names["soft"]).tolist()) == {0.0, 1.0}
    assert names["sample"].indices.shape == (2,)


@pytest.mark.full  # What the page calls is met in test_heads*.py.
def test_heads_guide():
    names = run_examples("docs/guides/heads.md")
    assert names["curved"].shape == names["by_hidden"].shape == (6, 16)
    mean = names["token_mean"](names["hidden"], names["weight"])
    np.testing.assert_allclose(-names["found"].log_prob.sum() / 4, mean, rtol=1e-6)
    assert np.isfinite(names["value_of_step"])
    assert np.all(names["likelihood_of_labels"] < 0)
    assert np.all(names["log_prob"] <= 0)
    assert not np.any(np.asarray(names["drawn"])[:, None] == names["banned"])
    assert names["from_top"].shape == (6,)


@pytest.mark.full  # What the page calls is met in test_sharded.py and test_heads_sharded.py.
def test_devices_guide():
    names = run_examples("docs/guides/devices.md")
    check_step(names)
    labels = jnp.array([3, 1023, 500, 0])
    whole = jsoftmax.losses.cross_entropy(np.asarray(names["z_sharded"]), labels)
    np.testing.assert_allclose(names["loss_of_rows"], whole, rtol=1e-6)
    want = jsoftmax.gumbel.categorical(jax.random.key(0), np.asarray(names["z_sharded"]))
    np.testing.assert_array_equal(names["drawn_of_rows"], want)


@pytest.mark.full  # What the page calls is met in test_operators.py and test_optim.py.
def test_second_order_guide():
    names = run_examples("docs/guides/second-order.md")
    assert jnp.abs(jax.grad(names["value"])(names["W"], names["inputs"], names["targets"])).max() < 1e-4


@pytest.mark.full  # What the page calls is met in test_losses.py, test_heads.py and test_peers.py.
def test_coming_from():
    names = run_examples("docs/coming-from.md")
    logits, w = np.asarray(names["logits"], float), np.asarray(names["w"])

    def torch_mean(z, smoothing, w):
        """As torch.nn.functional.cross_entropy defines it, for labels (0, ignored, 2)."""
        log_p = (z - np.log(np.sum(np.exp(z), -1, keepdims=True)))[[0, 2]]
        of_labels = -(w[0] * log_p[0, 0] + w[2] * log_p[1, 2])
        return ((1 - smoothing) * of_labels - smoothing / 3 * np.sum(w * log_p)) / (w[0] + w[2])

    z = np.asarray(names["hidden"], float) @ np.asarray(names["weight"], float).T
    np.testing.assert_allclose(names["mean"], torch_mean(logits, 0, np.ones(3)), rtol=1e-6)
    np.testing.assert_allclose(names["as_torch"], torch_mean(logits, 0.1, w), rtol=1e-6)
    np.testing.assert_allclose(names["without_smoothing"], torch_mean(z, 0, w), rtol=1e-6)
    np.testing.assert_allclose(names["with_smoothing"], torch_mean(z, 0.1, w), rtol=1e-6)


def test_article():
    names = run_examples("docs/article.md")
    np.testing.assert_allclose(names["true"], names["by_autodiff"], atol=1e-6)
    assert np.abs(names["claimed"] - names["by_autodiff"]).max() > 0.5


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


CITING = {name: getattr(jsoftmax, name) for name in jsoftmax.__all__ if name.islower() and name not in ROOMS}
CITING |= {name: getattr(segments, name) for name in segments.__all__}
CITING |= {name: getattr(losses, name) for name in losses.__all__}
CITING |= {name: getattr(gumbel, name) for name in gumbel.__all__ if name.islower()}
CITING |= {name: getattr(attention, name) for name in attention.__all__ if name.islower()}
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
