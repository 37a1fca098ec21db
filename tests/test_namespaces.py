"""What a user sees: `dir()` holds public names alone, rooms are reached by attribute, signatures are short."""

import functools
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jsoftmax as js
from jsoftmax import attention, gumbel, heads, losses, optim, segments
from jsoftmax.checks.names import OTHER_NAMES

ROOMS = ("losses", "gumbel", "heads", "segments", "attention", "optim")
NAMESPACES = (*ROOMS, "heads.adaptive", "heads.factored")


@pytest.mark.parametrize("name", NAMESPACES)
def test_dir_holds_public_names_alone(name):
    module = importlib.import_module(f"jsoftmax.{name}")
    assert sorted(dir(module)) == sorted(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)
    assert not [public for public in module.__all__ if public.startswith("_")]


@pytest.mark.parametrize("name", ROOMS)
def test_a_module_says_what_it_has(name):
    module = importlib.import_module(f"jsoftmax.{name}")
    assert [public for public in module.__all__ if f"`{public}`" not in module.__doc__] == []


def test_dir_of_the_package():
    assert sorted(dir(js)) == sorted([*js.__all__, "__version__"])
    assert all(hasattr(js, public) for public in js.__all__)


def test_rooms_are_imported_when_they_are_named():
    code = (
        "import sys, jsoftmax as js\n"
        "rooms = [m for m in sys.modules if m.startswith(('jsoftmax.heads', 'jsoftmax.gumbel', 'jsoftmax.losses'))]\n"
        "assert not rooms, rooms\n"
        "js.losses.cross_entropy, js.gumbel.categorical, js.heads.factored.init, js.optim.newton_cg\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"jsoftmax.*no_such_name.*dir\(jsoftmax\)"):
        _ = js.no_such_name


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("cross_entropy", "jsoftmax.losses.cross_entropy."),
        ("segment_softmax", "jsoftmax.segments.segment_softmax."),
        ("gumbel_softmax", "jsoftmax.gumbel.gumbel_softmax."),
        ("categorical", "jsoftmax.gumbel.categorical or jsoftmax.heads.adaptive.categorical."),
    ],
)
def test_the_error_says_where_a_name_is(name, places):
    with pytest.raises(AttributeError) as caught:
        getattr(js, name)
    assert str(caught.value).endswith(f"has no attribute {name!r}. It is {places}")


@pytest.mark.parametrize(
    ("module", "name", "place"),
    [
        (
            js,
            "top_k",
            "Here it is jsoftmax.truncate(z, top_k=…), which cuts scores; of a linear layer jsoftmax.heads.li",
        ),
        (js, "loss", "Here it is jsoftmax.losses.cross_entropy."),
        (js, "logsumexp", "Here it is jsoftmax.log_normalizer."),
        (js, "log_normaliser", "It has log_normalizer."),
        (losses, "kl_divergence", "It is jsoftmax.kl_divergence."),
        (losses, "_cross", "dir(jsoftmax.losses) lists the public names."),
        (heads, "cross_entropy", "It is jsoftmax.losses.cross_entropy."),
        (heads, "streaming_", "dir(jsoftmax.heads) lists the public names."),
        (gumbel, "sample", "Here it is jsoftmax.gumbel.categorical."),
        (attention, "softmax", "It is jsoftmax.softmax."),
        (optim, "adam", "dir(jsoftmax.optim) lists the public names."),
        (segments, "scatter_softmax", "Here it is jsoftmax.segments.segment_softmax."),
    ],
)
def test_rooms_say_where_a_name_is(module, name, place):
    with pytest.raises(AttributeError) as caught:
        getattr(module, name)
    start = f"module {module.__name__!r} has no attribute {name!r}. "
    assert str(caught.value).startswith(start + place)


def test_places_of_other_names_exist():
    for name, told in OTHER_NAMES.items():
        places = re.findall(r"\b(?:jsoftmax|jax)(?:\.\w+)+", told)
        assert places, name
        for place in places:
            assert functools.reduce(getattr, place.split(".")[1:], importlib.import_module(place.split(".")[0])), place


def test_the_table_of_names_says_the_same():
    """Each function in the table of docs/coming-from.md is also found by its own name, unless we have that name too."""
    text = (pathlib.Path(__file__).parent.parent / "docs/coming-from.md").read_text()
    (table,) = re.findall(r"^\| PyTorch \| optax.*?\n\n", text, re.S | re.M)
    seen = set()
    for row in table.splitlines()[2:]:
        *others, ours = (re.findall(r"`([\w.]+)", cell) for cell in row.strip("| ").split(" | "))
        for name in {path.rpartition(".")[2] for paths in others for path in paths} - set(js.__all__):
            with pytest.raises(AttributeError) as caught:
                getattr(js, name)
            assert any(place.replace("js.", "jsoftmax.") in str(caught.value) for place in ours), name
            seen.add(name)
    assert len(seen) > 8


def test_a_private_name_imports_nothing():
    code = (
        "import sys, jsoftmax; assert not hasattr(jsoftmax, '__wrapped__'); assert 'jsoftmax.losses' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_has_short_annotations():
    signature = str(inspect.signature(js.softmax))
    assert "z: ArrayLike, axis" in signature
    assert "where: Bool[ArrayLike, '...'] | None = None" in signature
    assert "numpy" not in str(inspect.signature(js.heads.linear_cross_entropy))
    assert "(key: PRNGKeyArray | ArrayLike, z: ArrayLike, index: Integer[ArrayLike, '...'], axis" in str(
        inspect.signature(js.gumbel.conditional_gumbels)
    )
    assert "labels: ArrayLike | TopTargets, bias" in str(inspect.signature(js.heads.linear_cross_entropy))
    assert "banned: Integer[ArrayLike, '...'] | None = None" in str(inspect.signature(js.heads.linear_top_k))


@pytest.mark.parametrize("name", ["no.such", "entropy.no"])
def test_a_dotted_name_is_no_attribute(name):
    assert not hasattr(js, name)
