"""CONTRIBUTING.md followed literally: its skeletons are run, and what it names is there."""

import ast
import functools
import importlib
import pathlib
import re
import sys
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from interpreter import evaluated

import jsoftmax as js
from jsoftmax import verify

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "jsoftmax"
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:])
PLACES = (ROOT, PACKAGE, ROOT / "tests", PACKAGE / "losses", PACKAGE / "heads")
LAYERS = re.findall(
    r"`([\w.]+)`", re.search(r"never import upper ones when they are loaded:(.*?)\. ", TEXT, re.DOTALL)[1]
)


@functools.cache
def run(section, *changed):
    """The names of a module with the examples of a section, with some of their text changed. Types are checked at run
    time, as in the package."""
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", SECTIONS[section], re.DOTALL | re.MULTILINE)
    text = "\n".join(textwrap.dedent(block) for _, block in blocks)
    for old, new in changed:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    name = "example"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        (pathlib.Path(folder) / f"{name}.py").write_text(text, encoding="utf-8")
        patch.syspath_prepend(folder)
        with jaxtyping.install_import_hook(name, "beartype.beartype"):
            names = vars(importlib.import_module(name))
        del sys.modules[name]
        return names


def entry(section, names):
    """What the section says is added to a list."""
    (written,) = re.findall(r"and in `\w+`: `(.*),`$", SECTIONS[section], re.MULTILINE)
    return eval(written, names)


def named(section):
    """The files that a section names. A folder of the package stands for its modules that the section does not name."""
    paths = {path.strip("`()") for path in re.findall(r"`[\w./-]+`|\([\w./-]+\)", SECTIONS[section])}
    found = [place / path for path in paths for place in PLACES]
    rooms = {path for path in found if path.is_dir() and path.parent == PACKAGE}
    return {path for path in found if path.is_file()} | {
        module for room in rooms for module in room.rglob("*.py") if module.name not in ("__init__.py", "examples.py")
    }


RECORD = {function.name: function for function in verify.FUNCTIONS}


def misses(function, phi):
    """The orders in which float64 misses many digits by more than the record allows."""
    (errors,) = verify.against_digits(function, (phi,), np.float64)
    return [order for order, (e, t) in enumerate(zip(errors, function.tolerance64, strict=False)) if not e <= t]


def test_the_phi():
    names = run("Adding a φ")
    phi = entry("Adding a φ", names)
    np.testing.assert_allclose(phi(jnp.array([0.0, 1.5])), [1, 2])
    for name in ("log_normalizer", "softmax"):
        assert misses(RECORD[name], phi) == []
    with pytest.raises(ValueError, match="squareplus: b must be > 0"):
        names["squareplus"](-1.0)


@pytest.mark.full  # By default orders of two functions, above, and of the function, below, in float64.
def test_verify_all():
    """As `verify --all`, with the functions that meet every order, and the gradient beside a probability near 1."""
    phi = entry("Adding a φ", run("Adding a φ"))
    function = entry("Adding a function", run("Adding a function"))
    for pair in ((RECORD["entropy"], phi), (RECORD["kl_divergence"], phi), (function, js.exp), (function, phi)):
        assert verify.cell(*pair).ok, pair


@pytest.mark.parametrize(
    ("old", "new", "orders"),
    [("return 1 / jnp.hypot", "return -1 / jnp.hypot", [1, 2, 3]), ("return -(z * s)", "return (z * s)", [2, 3])],
)
def test_a_sign_of_the_phi_that_is_flipped(old, new, orders):
    phi = entry("Adding a φ", run("Adding a φ", (old, new)))
    assert misses(RECORD["log_normalizer"], phi) == orders


@pytest.mark.parametrize("phi", [js.exp, js.spherical(0.1)], ids=str)
def test_the_function(phi):
    names = run("Adding a function")
    assert misses(entry("Adding a function", names), phi) == []
    z, keep = jnp.array([[0.0, 1.0, 2.0], [3.0, 0.0, jnp.inf]]), jnp.array([True, True, False])
    found = names["collision_entropy"](z, where=keep, phi=phi)
    p = js.softmax(z[:, :2], phi=phi)
    np.testing.assert_allclose(found, -jnp.log(jnp.sum(p**2, -1)), rtol=1e-5)


def test_the_head():
    linear_entropy = run("Adding a head")["linear_entropy"]
    hidden, weight = (jax.random.normal(jax.random.key(i), (n, 4)) for i, n in enumerate((5, 23)))

    def of_both(hidden, weight):
        streamed = linear_entropy(hidden, weight, block_size=(2, 8), phi=js.softplus)
        return streamed, js.entropy(hidden @ weight.T, phi=js.softplus)

    @evaluated
    def results(hidden, weight):
        return of_both(hidden, weight), [
            jax.grad(lambda *given, i=i: of_both(*given)[i].sum(), (0, 1))(hidden, weight) for i in range(2)
        ]

    for found, want in results(hidden, weight):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_digits():
    names = run("How do I find a numerical bug?")
    z, v = (np.array(names[name], float) for name in "zv")

    def entropy(z):
        return js.entropy(z, phi=js.softplus)

    with jax.enable_x64(True):
        np.testing.assert_allclose(names["H"], entropy(z), rtol=1e-13)
        np.testing.assert_allclose(np.array(names["gradient"], float), jax.grad(entropy)(z), rtol=1e-12)
        along = jax.jvp(jax.grad(entropy), (z,), (v,))[1]
        np.testing.assert_allclose(np.array(names["along_v"], float), along, rtol=1e-12)


FILES = {section: re.findall(r"`([\w./-]+\.(?:py|md|yml|toml|ipynb))`", text) for section, text in SECTIONS.items()}
IN = [
    (section, name, file)
    for section, text in SECTIONS.items()
    for names, file in re.findall(r"((?:`\w+`(?:,\s| and\s)?)+),?\s+(?:in|of|from)\s+`([\w./]+\.py)`", text)
    for name in re.findall(r"`(\w+)`", names)
]


@pytest.mark.parametrize("section", [section for section, files in FILES.items() if files])
def test_files_are_there(section):
    for name in FILES[section]:
        if (ROOT / ".github").exists() or not name.startswith(".github"):  # a source distribution has no such folder
            assert any((place / name).exists() for place in PLACES), name


@pytest.mark.parametrize(("section", "name", "file"), IN)
def test_names_are_in_their_files(section, name, file):
    """Where the text says "`name` in `file`"."""
    assert re.search(rf"\b{name}\b", code_of(ROOT / file))


def test_dotted_names_are_there():
    """Those of modules of the package: `maps.log_sum`."""
    rooms = "|".join(name for name in LAYERS if name != "plot")  # which needs matplotlib
    names = set(re.findall(rf"`((?:{rooms})\.[a-zA-Z]\w*)[`(]", TEXT)) - set(LAYERS)
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"jsoftmax.{module}"), attribute), name


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("Adding a φ", "sigsoftmax"),
        ("Adding a function", "varentropy"),
        ("Adding an option of a loss", "label_smoothing"),
        ("Adding an option of a loss", "smoothing"),
        ("Adding a head", "linear_jsd"),
    ],
)
def test_the_files_to_touch_are_named(section, model):
    """What is there already is in no other file of the package and of its guides and reference."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "docs/guides").glob("*.md"), *(ROOT / "docs/api").glob("*.md")]
    within = {file for file in [*files, ROOT / "MATH.md"] if re.search(rf"\b{model}\b", code_of(file))}
    assert within
    assert within - named(section) == set()


@functools.cache
def code_of(file):
    """A module without its docstrings and comments; another file as it is."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return ast.unparse(tree)


def layer(module):
    """The number of the last layer that the module is in."""
    within = [name for name in LAYERS if f"{module}.".startswith(f"{name}.")]
    assert within, f"CONTRIBUTING.md has no layer for {module}"
    return LAYERS.index(max(within, key=len))


def loaded(tree):
    """The statements that run when a module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from loaded(node)


def imports(tree):
    """The modules of the package that a module imports when it is loaded."""
    for node in loaded(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "jsoftmax")
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            if node.module.split(".")[0] == "jsoftmax":
                for name in node.names:
                    path = f"{node.module}.{name.name}"
                    file = ROOT / path.replace(".", "/")
                    yield path if file.is_dir() or file.with_suffix(".py").exists() else node.module


def test_lower_modules_never_import_upper_ones():
    met = set()
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module in ("jsoftmax", "jsoftmax.__main__"):
            continue
        own = layer(module.removeprefix("jsoftmax."))
        met.add(own)
        for other in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if other == "jsoftmax":  # the public functions
                assert LAYERS[own] in LAYERS[LAYERS.index("attention") + 1 :], (module, other)
            else:
                assert layer(other.removeprefix("jsoftmax.")) <= own, (module, other)
    assert met == set(range(len(LAYERS)))
