"""The tables and pictures of README and docs, made from the JSON files of `benchmarks/results`."""

import json
import pathlib
import re
from typing import Any, NamedTuple

RESULTS = pathlib.Path(__file__).parent / "results"
ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / page for page in ("README.md", "docs/benchmarks/index.md", "docs/benchmarks/language-model.md")]
"""What has tables between `<!-- name -->` and `<!-- /name -->`."""
PICTURE = RESULTS / "family.png"
DIGITS = RESULTS / "digits.png"
PROGRAMS = pathlib.Path(__file__).parent / "programs.md"
DEVICES = pathlib.Path(__file__).parent / "device.md"


def load_plain(name: str) -> list[dict[str, Any]]:
    """The runs as the files have them."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}*.json"))]


def load(name: str) -> list[dict[str, Any]]:
    """The runs with only those rows that compare something of ours."""
    runs = load_plain(name)
    return [{**run, "rows": [row for row in run["rows"] if row["group"] != "limits"]} for run in runs]


def label(row: dict[str, Any]) -> tuple[str, str]:
    """A case's name and shape, which label a line of the table and of the picture."""
    shape = " × ".join(f"{n:,}" for n in row["shape"])
    return row["name"], shape + (" bf16" if row["dtype"] == "bfloat16" else "")


def table(runs: list[dict[str, Any]]) -> str:
    """A table with one line for each case and one column for each run: our time in ms, and its ratio to each peer as
    median [quartiles]."""
    titles = [f"jax {run['jax']}, {run['processor']}, {run['cores']} cores" for run in runs]
    lines = ["| | scores | " + " | ".join(titles) + " |", "|---|---|" + "---|" * len(runs)]
    by_case = [{label(row): row for row in run["rows"]} for run in runs]
    for case in by_case[0]:
        cells = [_cell(rows[case]) if case in rows else "" for rows in by_case]
        lines.append("| " + " | ".join((*case, *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    ratios = (f"{peer} {middle:.2f} [{low:.2f}, {high:.2f}]" for peer, (low, middle, high) in row["ratio"].items())
    memory = row.get("MiB", {}) if row["group"] in ("heads", "attention") else {}
    shown = ", ".join(f"{name} {n:,.0f} MiB" for name, n in memory.items())
    text = f"{row['ms']['ours']:.2f} ms" + (f"; / {', / '.join(ratios)}" if row["ratio"] else "")
    return text + (f"; {shown}" if shown else "")


def models() -> str:
    """A table of the language models of `python -m jsoftmax lm --head all`: one line for each model of a run."""
    (run,) = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("lm*.json"))]
    title = f"jax {run['jax']}, {run['processor']}, {run['cores']} cores"
    lines = [f"| {title} | φ | perplexity | words/s | minutes | MiB | temporaries, MiB |", "|---|---|" + "---:|" * 5]
    for row in run["rows"]:
        numbers = [f"{row['perplexity']:.1f}"]
        if row["head"] != "trigram":
            minutes, memory = f"{row['seconds'] / 60:.1f}", (row["peak_MiB"], row["temporaries_MiB"])
            numbers += [f"{row['tokens_per_second']:,.0f}", minutes, *(f"{n:,.0f}" for n in memory)]
        numbers += [""] * (5 - len(numbers))
        lines.append("| " + " | ".join((row["head"], row.get("phi", ""), *numbers)) + " |")
    return "\n".join(lines) + "\n"


def picture(runs: list[dict[str, Any]]) -> None:
    """A picture of ratios as dots with their quartiles, on a log axis. Left of 1 ours is faster."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415  (an extra)

    names = ["  ".join(label(row)) for row in runs[0]["rows"]]
    figure = Figure(figsize=(10, 0.26 * len(names) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colours = {"jax.nn": "C0", "distrax": "C1", "jax.hessian": "C2", "writing": "0.5"}
    for run, marker in zip(runs, "os^D", strict=False):
        for i, row in enumerate(run["rows"]):
            for peer, (low, middle, high) in row["ratio"].items():
                colour = colours.get(peer, "C3")
                axes.plot([low, high], [i, i], color=colour, linewidth=2, alpha=0.5)
                axes.plot(middle, i, marker, color=colour, markersize=5)
    axes.axvline(1, color="0.3", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.tick_params(top=True, labeltop=True)  # the picture is taller than a screen: both ends say what the axis is
    meaning = "time of jsoftmax / time of the peer (median, quartiles); left of 1 jsoftmax is faster"
    axes.set_xlabel(meaning)
    axes.set_title(meaning, fontsize=10)
    for peer, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=peer)
    for run, marker in zip(runs, "os^D", strict=False):
        axes.plot([], [], marker, color="0.2", label=f"jax {run['jax']}", fillstyle="none")
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def digits_picture(run: dict[str, Any]) -> None:
    """A picture of the correct digits of the worst row, with one panel for each result."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(run["panels"]), sharey=True)
    styles = (("C0", "o-", 2.5), ("C1", "s-", 1.5), ("C2", "^--", 1.5))
    for axes, panel in zip(panels, run["panels"], strict=True):
        for (peer, digits), (colour, style, width) in zip(panel["digits"].items(), styles, strict=False):
            axes.plot(panel["x"], digits, style, color=colour, linewidth=width, markersize=4, label=peer)
        if panel["name"].startswith("divergence"):
            axes.set_xscale("log")
            axes.invert_xaxis()
            axes.margins(x=0.09)  # the last tick's label stays inside the picture
            axes.set_xlabel("difference of the scores")
        else:
            axes.set_xlabel("lead over the other scores")
        axes.set_title(panel["name"], fontsize=11)
        axes.grid(alpha=0.3)
        top = 1 if panel["name"].startswith("divergence") else 0.79  # between the curves
        axes.legend(fontsize=8.5, loc="upper right", bbox_to_anchor=(1, top))
        axes.set_ylim(-0.3, 8)
    panels[0].set_ylabel("correct digits, float32")
    figure.savefig(DIGITS, dpi=176)


class Measured(NamedTuple):
    """A line of the README's table: a row of a file of results, and what the line shows of it."""

    what: str
    file: str
    name: str
    shape: tuple[int, ...]
    peer: str
    shows: str = "ratio"


MEASURED = (
    Measured("entropy, value and gradient", "family", "entropy, value and gradient", (256, 32768), "distrax"),
    Measured("sparsemax, forward and backward", "losses", "sparsemax, forward and backward", (1024, 1024), "optax"),
    Measured("1.5-entmax, forward and backward", "losses", "entmax15, forward and backward", (1024, 1024), "entmax"),
    Measured("one draw a row", "gumbel", "one draw a row", (64, 131072), "jax.random"),
    Measured(
        "loss of a head, with gradients",
        "heads",
        "linear_cross_entropy, value and gradient",
        (2048, 512, 131072),
        "optax",
        "MiB",
    ),
    Measured("softmax", "family", "softmax", (1024, 1024), "jax.nn"),
)


def measured() -> str:
    """The README's table of results beside the usual packages: digits, times and memory, each with its command."""
    (digits,) = load_plain("digits")
    lines = ["| | here | instead of | measured by `python -m benchmarks` |", "|---|---:|---:|---|"]
    entropy, loss = (digits["example"][name] for name in ("entropy", "loss of the leading class"))
    low = f"{entropy['distrax']:.3e} by distrax ({100 * (1 - entropy['distrax'] / entropy['exact']):.0f} % low)"
    lines.append(f"| entropy of scores (0, −20), float32 | {entropy['jsoftmax']:.3e} | {low} | `digits` |")
    lines.append(f"| loss of its first class | {loss['jsoftmax']:.3e} | {loss['optax']:g} by optax | `digits` |")
    for line in MEASURED:
        run = load(line.file)[0]
        (row,) = (r for r in run["rows"] if (r["name"], tuple(r["shape"]), r["dtype"]) == (*line[2:4], "float32"))
        shape = " × ".join(f"{n:,}" for n in line.shape)
        if line.shows == "MiB":
            cells = f"{row['MiB']['ours']:,.0f} MiB | {row['MiB'][line.peer]:,.0f} MiB by {line.peer}"
        else:
            cells = f"{row['ms']['ours']:,.3g} ms | {row['ms'][line.peer]:,.3g} ms by {line.peer}"
        lines.append(f"| {line.what}, {shape} | {cells} | `{line.file}` |")
    return "\n".join(lines) + "\n"


ABOUT_PROGRAMS = """# Programs compiled for an H100 and a TPU v5e

`python -m benchmarks programs --device h100` (and `v5e`) and `python -m benchmarks --render` make this page. XLA
compiles for both devices on a machine that has neither. The numbers are counts of the optimised program, not times:
the kernels that are launched, and the memory that they read and write. They are the same on every machine. The peer is
`jax.nn`, optax or `jax.random`, or the formula as a user would write it in plain JAX (`benchmarks/programs.py`). A
sort, the peer's way to truncate a law, counts as one pass over the scores here, though a GPU needs several.
"""


def programs() -> str:
    """A table for each device: kernels and MiB of memory traffic of ours and of the peer's program, and the ratio."""
    parts = [ABOUT_PROGRAMS]
    for path in sorted(RESULTS.glob("programs-*.json")):
        run = json.loads(path.read_text())
        parts.append(f"## {run['device']}, jax {run['jax']}")
        tokens, features, classes = run["heads"][0]["sizes"]
        title = f"{tokens:,} × {features:,} × {classes:,}, bfloat16, value and gradients"
        lines = [f"| {title} | kernels | traffic, GiB | temporaries, MiB |", "|---|" + "---:|" * 3]
        for row in run["heads"]:
            memory = f"{row['traffic'] / 2**30:.1f} | {row['temporaries'] / 2**20:,.0f}"
            lines.append(f"| {row['name']} | {row['kernels']} | {memory} |")
        parts.append("\n".join(lines))
        if not run["rows"]:
            continue
        head = "| | | scores | kernels | traffic, MiB | the peer's kernels | its traffic, MiB | ratio |"
        parts.append(f"{head}\n|---|---|---|" + "---:|" * 5)
        for row in run["rows"]:
            name, shape = label(row)
            ours, peer = row["ours"], row.get("peer")
            cells = [str(ours["kernels"]), f"{ours['traffic'] / 2**20:,.1f}", "", "", ""]
            if peer:
                ratio = f"{ours['traffic'] / max(1, peer['traffic']):.2f}"
                cells[2:] = [str(peer["kernels"]), f"{peer['traffic'] / 2**20:,.1f}", ratio]
            parts[-1] += "\n| " + " | ".join((name, row["mode"], shape, *cells)) + " |"
    return "\n\n".join(part.strip() for part in parts) + "\n"


ABOUT_DEVICES = """# Times on accelerators

`python -m benchmarks device`, on a machine that has an accelerator, and `python -m benchmarks --render` make this page.
Arrays have 256 MiB of float32 scores. Calls are queued, and queues of ours and of the peers follow one another in one
process. The tables have medians in ms, and the ratio of ours to each peer as median [quartiles]. The peers are those of
[programs.md](programs.md).
"""


def devices() -> str:
    """A table for each device: the heads, and every case beside its peers."""
    parts = [ABOUT_DEVICES]
    for path in sorted(RESULTS.glob("device-*.json")):
        run = json.loads(path.read_text())
        about = f"a copy moves {run['copy_GB_per_s']:,.0f} GB/s; jsoftmax at {run['commit']}"
        parts.append(f"## {run['device']}, jax {run['jax']}\n\n{about}")
        tokens, features, classes = run["heads"][0]["sizes"]
        title = f"{tokens:,} × {features:,} × {classes:,}, bfloat16, value and gradients"
        lines = [f"| {title} | ms | temporaries, MiB | TFLOP/s of three products |", "|---|" + "---:|" * 3]
        for row in run["heads"]:
            lines.append(f"| {row['name']} | {row['ms']:.1f} | {row['MiB']:,.0f} | {row['TFLOP/s']:.0f} |")
        parts.append("\n".join(lines))
        peers = list(dict.fromkeys(peer for row in run["rows"] for peer in row["ratio"]))
        lines = [
            "| | | scores | ms | " + " | ".join(f"/ {p}" for p in peers) + " |",
            "|---|---|---|" + "---:|" * (1 + len(peers)),
        ]
        for row in run["rows"]:
            ratios = [row["ratio"].get(peer) for peer in peers]
            shown = [f"{r[1]:.2f} [{r[0]:.2f}, {r[2]:.2f}]" if r else "" for r in ratios]
            cells = [*label(row), f"{row['ms']['ours']:.3f}", *shown]
            lines.append("| " + " | ".join((cells[0], row["mode"], *cells[1:])) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def startup() -> str:
    """A table of the cost of starting: ms to trace and compile, and of a call outside `jit`."""
    (run,) = load_plain("startup")
    lines = ["| | | ours, ms | the peer's, ms | ratio |", "|---|---|---:|---:|---:|"]
    for row in run["rows"]:
        mode = "a call outside `jit`" if row["mode"] == "call" else f"trace and compile: {row['mode']}"
        times = (f"{row['ms'][side]:.{3 if row['mode'] == 'call' else 0}f}" for side in ("ours", "peer"))
        lines.append(f"| {row['name']} | {mode} | {' | '.join(times)} | {row['ratio']:.2f} |")
    return "\n".join([*lines, "", f"`import jsoftmax` adds {run['import_ms']:.0f} ms to `import jax`."]) + "\n"


OWN_TABLES = {"lm": models, "measured": measured, "startup": startup}


def filled(text: str) -> str:
    """A page with its tables filled in again."""
    names = re.findall(r"<!-- (\w+) -->", text)
    for name in names:
        made = OWN_TABLES[name]() if name in OWN_TABLES else table(load(name))
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        text = between.sub(lambda found, made=made: found[1] + made + found[2], text)
    return text


def render() -> None:
    PROGRAMS.write_text(programs())
    DEVICES.write_text(devices())
    for page in PAGES:
        page.write_text(filled(page.read_text()))
    picture(load("family"))
    digits_picture(load_plain("digits")[0])
    print(f"written: {', '.join(str(path) for path in (*PAGES, PROGRAMS, DEVICES, PICTURE, DIGITS))}")
