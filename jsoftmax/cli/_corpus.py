"""English text that needs no download: the docstrings of installed packages, as numbers of words."""

import ast
import collections
import importlib.util
import pathlib
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pydoc_data import topics
from typing import NamedTuple

import numpy as np

PACKAGES = {"numpy": "numpy", "scipy": "scipy", "scikit-learn": "sklearn"}
"""The packages by their names for pip, with their names in Python."""
HELD_OUT = "numpy"
UNKNOWN, END = "<unk>", "<eos>"
LARGEST = 30_000

Tokens = tuple[str, ...]


class Corpus(NamedTuple):
    """Training and held-out text as word numbers; the words are sorted by count, the most frequent is 0."""

    words: Tokens
    train: np.ndarray
    held_out: np.ndarray
    description: str

    @property
    def counts(self) -> np.ndarray:
        """How often each word is in the training text."""
        return np.bincount(self.train, minlength=len(self.words))

    @property
    def unknown(self) -> float:
        """The share of the held-out words that the vocabulary does not have."""
        return float(np.mean(self.held_out == self.words.index(UNKNOWN)))


# sections of numpydoc that hold no prose, and those that are tables, of which only the descriptions do
_NO_PROSE = {"see also", "references", "methods"}
_TABLES = {"parameters", "other parameters", "returns", "yields", "attributes", "raises", "warns"}
_HEADING = re.compile(r"^(\S.*)\n[-=~^]{3,}[ ]*$", re.MULTILINE)
_MARKUP = re.compile(r":[\w:]+:(?=`)|[`*]|\\\\")
_WORD = re.compile(r"[^\W\d_]\w*|\d+(?:\.\d+)?|[^\w\s]")


def prose(docstring: str) -> list[str]:
    """The paragraphs of a docstring without doctests, directives, lists of references, and the names of its tables."""
    first, *sections = _HEADING.split(docstring)
    bodies = [("", first), *zip(sections[::2], sections[1::2], strict=True)]
    paragraphs = []
    for heading, body in bodies:
        section = heading.strip().lower()
        if section in _NO_PROSE:
            continue
        text = re.sub(r"^\S.*$", "", body, flags=re.MULTILINE) if section in _TABLES else body
        for paragraph in re.split(r"\n\s*\n", text):
            lines = [line.strip() for line in paragraph.splitlines()]
            if not paragraph.strip().startswith((">>>", "..", "+--", "===", "---")):  # what a doctest prints goes, too
                paragraphs.append(" ".join(lines).strip())
    return [paragraph for paragraph in paragraphs if paragraph]


def tokens(paragraph: str) -> Tokens:
    """Words in lower case, punctuation, and N for a number; markup is dropped."""
    text = _MARKUP.sub("", paragraph.lower())
    return tuple("N" if word[0].isdigit() else word for word in _WORD.findall(text))


def docstrings(package: str) -> Iterator[str]:
    """All docstrings of an installed package, read from its files without importing it, in the order of their names."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    for file in sorted(pathlib.Path(found.origin).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node)
                if docstring:
                    yield docstring


def corpus(train: Iterable[Tokens], held_out: Iterable[Tokens], description: str) -> Corpus:
    """Numbers of the words. Each paragraph counts once, and not as held out if it is in the training text as well.

    A word that occurs once in the training text, or is not among the most frequent, counts as `UNKNOWN`.
    """
    kept = dict.fromkeys(filter(None, train))
    tested = [paragraph for paragraph in dict.fromkeys(filter(None, held_out)) if paragraph not in kept]
    counts = collections.Counter(word for paragraph in kept for word in paragraph)
    known = [(word, n) for word, n in counts.most_common(LARGEST - 2) if n > 1]
    rest = counts.total() - sum(n for _, n in known)
    known += [(END, len(kept)), (UNKNOWN, rest)]
    words = tuple(word for word, _ in sorted(known, key=lambda entry: (-entry[1], entry[0])))
    number = {word: i for i, word in enumerate(words)}
    unknown, end = number[UNKNOWN], number[END]

    def numbers(paragraphs: Iterable[Tokens]) -> np.ndarray:
        stream = [i for paragraph in paragraphs for i in (*(number.get(word, unknown) for word in paragraph), end)]
        return np.asarray(stream, np.int32)

    return Corpus(words, numbers(kept), numbers(tested), description)


def of_packages(held_out: str = HELD_OUT) -> Corpus:
    """The docstrings of `PACKAGES`, one of which is held out as a whole."""
    paragraphs = {name: [tokens(p) for d in docstrings(module) for p in prose(d)] for name, module in PACKAGES.items()}
    test = paragraphs.pop(held_out)
    named = [f"{name} {version(name)}" for name in paragraphs]
    description = f"docstrings of {' and '.join(named)}; held out {held_out} {version(held_out)}"
    return corpus((p for part in paragraphs.values() for p in part), test, description)


def of_paragraphs(text: str, description: str) -> Corpus:
    """A text of paragraphs with empty lines between them; the last tenth of them is held out."""
    found = [tokens(paragraph) for paragraph in re.split(r"\n\s*\n", text)]
    found = list(dict.fromkeys(filter(None, found)))
    split = len(found) - len(found) // 10
    return corpus(found[:split], found[split:], f"{description}; held out its last tenth")


def of_topics() -> Corpus:
    """The help that comes with Python: a small text for when the packages are missing."""
    return of_paragraphs("\n\n".join(topics.topics[name] for name in sorted(topics.topics)), "Python's help topics")
