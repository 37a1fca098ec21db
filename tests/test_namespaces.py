"""What a user sees: `dir()` holds public names alone, rooms are reached by attribute, signatures are short."""

import importlib
import inspect
import subprocess
import sys

import pytest

import jsoftmax as js

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
