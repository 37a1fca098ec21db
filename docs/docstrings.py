"""An extension of griffe: Markdown of the docstrings' layout, which CONTRIBUTING.md describes."""

import re
from typing import Any

import griffe

SECTIONS = re.compile(r"^(Args|Returns|Raises|Source):[ \t]*", re.M)


def markdown(text: str) -> str:
    """One line, formula, sections and examples, as Markdown."""
    text, _, examples = re.sub(r"^>>> ", "\0>>> ", text, count=1, flags=re.M).partition("\0")
    before, *parts = SECTIONS.split(text)
    made = [_prose(before)]
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        made.append(_arguments(body) if title == "Args" else _prose(f"**{title}:** " + _dedent(body)))
    if examples:
        made.append(f"```pycon\n{examples.rstrip()}\n```")
    return "\n\n".join(part.strip("\n") for part in made)


def _prose(text: str) -> str:
    """Paragraphs; one that cites a row of MATH.md is a formula and keeps its lines, as does one that is indented."""
    made = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = paragraph.splitlines()
        indented = all(line.startswith("    ") for line in lines)
        is_formula = re.search(r" {4,}\(MATH [\d., to]+.*\)$", paragraph, re.S) and not paragraph.startswith("**")
        if indented or is_formula:
            made.append("```text\n" + "\n".join(line.removeprefix("    ") for line in lines) + "\n```")
        else:
            made.append(paragraph)
    return "\n\n".join(made)


def _arguments(body: str) -> str:
    """A list: a line that is indented less than what follows it begins an argument."""
    body = _dedent(body.strip("\n"))
    entries = re.split(r"\n(?=\S)", body)
    return "**Args:**\n\n" + "\n".join(
        "- " + re.sub(r"^([^:`]+):", r"`\1`:", " ".join(entry.split()), count=1) for entry in entries if entry.strip()
    )


def _dedent(body: str) -> str:
    return re.sub(r"^ {2}", "", body, flags=re.M)


class Docstrings(griffe.Extension):
    """Rewrites every docstring; one that is a φ has that of its class."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Once the package is loaded."""
        for module in (pkg["phi"], pkg["phis"]):
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
