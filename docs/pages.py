"""A hook of mkdocs for pages that are kept elsewhere in the repository, and for links between files as on disk."""

import base64
import html
import json
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent.parent
ELSEWHERE = ("MATH.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "benchmarks/results/*.png", "tests/*.md")
ROW = re.compile(r"^((?:- )?\*\*(\d+\.\d+) .*?\*\*)", re.M)
TEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)
NAME = re.compile(r'(?<=class="doc doc-object-name doc-)([\w-]+">)([\w.]+)')
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")
TABLE = re.compile(r"^\|.*\| MATH\.md \|\n(?:\|.*\n)+", re.M)  # of functions, each with its rows of MATH.md
FUNCTION = re.compile(r"^\| (`([\w.]+)[^`]*`)", re.M)
LAST = re.compile(r"(?<=\| )\d+\.\d+.*(?= \|$)", re.M)
REFERENCE = {
    name: f"api/{path.name}#{name}"
    for path in (ROOT / "docs/api").glob("*.md")
    for name in re.findall(r"^::: (\S+)$", path.read_text(), re.M)
}
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Adds these pages under their path in the repository; a notebook as Markdown with its pictures."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for name, content in notebook(path):
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def notebook(path: pathlib.Path) -> Iterator[tuple[str, str | bytes]]:
    """The files that show a notebook."""
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ""  # of several outputs that follow one another
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{number}.png"
                yield name, base64.b64decode(data["image/png"])
                parts.append(f"![the picture that the code above draws]({name})")
            else:
                printed += "".join(output.get("text", data.get("text/plain", "")))
        if printed.strip():
            parts.append(f"```text\n{printed.rstrip()}\n```")
    yield f"{path.stem}.md", "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Turns a link to a file of the repository, written as on disk, into one to its page."""
    source = page.file.abs_src_path or str(ROOT / page.file.src_uri)
    pages = {str(pathlib.Path(f.abs_src_path).resolve()): f.src_uri for f in files if f.abs_src_path}
    pages |= {str(path): f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}

    def link(found: re.Match[str]) -> str:
        uri = pages.get(str((pathlib.Path(source).parent / found[2]).resolve()))
        if uri is None:
            return found[0]
        return found[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri)) + found[3]

    markdown = LINK.sub(link, markdown)
    to_root = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")
    markdown = TABLE.sub(lambda table: _linked(table[0], to_root), markdown)
    if page.file.src_uri.startswith("api/"):
        page.meta["search"] = {"boost": 4}  # the reference comes before what mentions a name
    if page.file.src_uri == "MATH.md":
        markdown = ROW.sub(r"\1{#row-\2}", markdown)  # every row can be linked to
    return PICTURE.sub(r"[\g<0>](\1)", markdown)  # a picture leads to itself, which a phone can enlarge


def _linked(table: str, to_root: str) -> str:
    """The table, with each function linked to its reference and each row to MATH.md."""

    def function(found: re.Match[str]) -> str:
        place = REFERENCE.get(f"jsoftmax.{found[2]}")
        return f"| [{found[1]}]({to_root}/{place})" if place else found[0]

    def rows(found: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d+", lambda row: f"[{row[0]}]({to_root}/MATH.md#row-{row[0]})", found[0])

    return LAST.sub(rows, FUNCTION.sub(function, table))


def on_page_content(content: str, **_: Any) -> str:
    """Formulas in TeX become MathML, which needs no script of another server; long names may break at . and _."""

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(found[2]), display=display)

    content = NAME.sub(lambda found: found[1] + re.sub(r"([._])", r"\1<wbr>", found[2]), content)
    return TEX.sub(formula, content)
