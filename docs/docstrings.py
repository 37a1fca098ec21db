"""An extension of griffe that turns docstrings, laid out as CONTRIBUTING.md describes, into Markdown."""

import pathlib
import re
from typing import Any

import griffe
from markdown.extensions.toc import slugify

MATH = (pathlib.Path(__file__).parent.parent / "MATH.md").read_text()
ANCHORS = {n: slugify(f"{n}. {title}", "-") for n, title in re.findall(r"^## (\d+)\. (.*)$", MATH, re.M)}
CITED = re.compile(r" {4,}(\(MATH \d.*?\))$", re.M)
ROW = re.compile(r"\d+(?:\.\d+)?")
CITATION = re.compile(rf"MATH {ROW.pattern}(?:(?:, | and | to |–){ROW.pattern})*")
SECTIONS = re.compile(r"^(Args|Returns|Raises|Source):[ \t]*", re.M)


def markdown(text: str) -> str:
    """A docstring (one line, formula, sections and examples) as Markdown."""
    text, _, examples = re.sub(r"^>>> ", "\0>>> ", text, count=1, flags=re.M).partition("\0")
    before, *parts = SECTIONS.split(text)
    made = [_prose(before)]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        made.append(_arguments(body) if title == "Args" else _prose(f"**{title}:** " + _dedent(body)))
    if examples:
        made.append(f"```pycon\n{examples.rstrip()}\n```")
    text = "\n\n".join(part.strip("\n") for part in made)
    return CITATION.sub(lambda cited: ROW.sub(_link, cited[0]), text)


def _link(row: re.Match[str]) -> str:
    """To a row, or to a section."""
    return f"[{row[0]}](../MATH.md#{ANCHORS.get(row[0], 'row-' + row[0])})"


def _prose(text: str) -> str:
    """Paragraphs. A paragraph that ends with rows of MATH.md is a formula, and keeps its lines; so does an indented
    one."""
    made = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.splitlines()
        if all(line.startswith("    ") for line in lines) or CITED.search(lines[-1]):
            cited = "; ".join(CITED.findall(paragraph))
            plain = (CITED.sub("", line).removeprefix("    ") for line in lines)
            made += ["```text\n" + "\n".join(plain) + "\n```", cited]
        else:
            made.append(paragraph)
    return "\n\n".join(filter(None, made))


def _arguments(body: str) -> str:
    """A list of arguments. A line that is indented less than what follows it begins an argument."""
    body = _dedent(body.strip("\n"))
    entries = re.split(r"\n(?=\S)", body)
    return "**Args:**\n\n" + "\n".join(
        "- " + re.sub(r"^([^:`]+):", r"`\1`:", " ".join(entry.split()), count=1) for entry in entries if entry.strip()
    )


def _dedent(body: str) -> str:
    return re.sub(r"^ {2}", "", body, flags=re.M)


class Docstrings(griffe.Extension):
    """Rewrites every docstring. An instance of a φ gets the docstring of its class."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Runs once the package is loaded."""
        for module in pkg["phi"].modules.values():
            for attribute in module.attributes.values():
                made_by = re.fullmatch(r"(\w+)\(\)", str(attribute.value))
                if made_by and made_by[1] in module.members:
                    attribute.docstring = module[made_by[1]].docstring
        self._rewrite(pkg, set())

    def _rewrite(self, thing: Any, seen: set[int]) -> None:
        if thing.is_alias:
            return
        if thing.docstring and id(thing.docstring) not in seen:
            seen.add(id(thing.docstring))
            thing.docstring.value = markdown(thing.docstring.value)
        for member in thing.members.values():
            self._rewrite(member, seen)
