"""`python -m jsoftmax lm`: a small language model on the docstrings of installed packages, with every head."""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import platform
import sys
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jsoftmax
from jsoftmax.cli import _corpus, _lm_network
from jsoftmax.cli._corpus import END, Corpus
from jsoftmax.cli._lm_heads import HEADS, PHI_CHOICES, Trainer, choose_phi
from jsoftmax.cli._machine import processor
from jsoftmax.cli._trigram import Trigram

EPOCHS, BATCH = 2, 32
"""A batch has 32 windows, which are 1024 words."""
QUICK = 50_000
"""Words of training text; a fifth as many are held out."""
SMALLEST = 100


class Job(NamedTuple):
    """One head to train in a process of its own."""

    head: str
    phi: str | None
    rates: tuple[float, float]
    corpus: Corpus

    @property
    def steps(self) -> tuple[int, int]:
        """The number of steps of an epoch, and of all epochs."""
        windows = -(-len(self.corpus.train) // _lm_network.CONTEXT)
        in_epoch = max(windows // BATCH, 1)
        return in_epoch, EPOCHS * in_epoch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `lm`."""
    which = f"which head (default streaming): {', '.join(HEADS)}, or all"
    parser.add_argument("--head", choices=[*HEADS, "all"], default="streaming", metavar="HEAD", help=which)
    which = f"φ (default exp, taylor(2) where a head needs order 2): {', '.join(PHI_CHOICES)}"
    parser.add_argument("--phi", choices=PHI_CHOICES, metavar="PHI", help=which)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=pathlib.Path, metavar="FILE", help="your own text; its last tenth is held out")
    packages, default = list(_corpus.PACKAGES), _corpus.HELD_OUT
    which = f"the package held out (default {default}): {', '.join(packages)}"
    text.add_argument("--hold-out", choices=packages, default=default, metavar="PACKAGE", help=which)
    parser.add_argument("--quick", action="store_true", help="a small text, Python's help topics if none is given")
    help_rate = "Adam's, and that of the factored head's SGD (default: tuned for each head)"
    parser.add_argument("--learning-rate", type=float, nargs="+", metavar="R", help=help_rate)
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE", help="write everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Read the text, train, print, write."""
    names = list(HEADS) if arguments.head == "all" else [arguments.head]
    console = Console()
    try:
        for name in names:
            choose_phi(name, arguments.phi)
        rates = {name: _rates(name, arguments.learning_rate) for name in names}
        if arguments.output and not arguments.output.parent.is_dir():
            raise ValueError(f"lm: --output must be in a folder that exists; got {arguments.output}. Make it first.")
        corpus = _read(arguments)
    except (ValueError, OSError) as wrong:
        print(wrong if str(wrong).startswith("lm:") else f"lm: --text cannot be read: {wrong}.")
        return 2
    about = environment()
    console.print(" · ".join(f"{name} {value}" for name, value in about.items()))
    console.print(
        f"{corpus.description}: {len(corpus.train):,} words to train, {EPOCHS} times, {len(corpus.held_out):,} held "
        f"out ({corpus.unknown:.1%} unknown), a vocabulary of {len(corpus.words):,}."
    )
    started = time.perf_counter()
    baseline = Trigram(corpus.train, len(corpus.words)).perplexity(corpus.held_out, corpus.words.index(END))
    rows: list[dict[str, Any]] = [{"head": "trigram", "perplexity": baseline, "seconds": time.perf_counter() - started}]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for name in names:
            rows.append(_in_process(Job(name, arguments.phi, rates[name], corpus), progress))
            if arguments.output:
                _write(arguments.output, about, corpus, rows)  # what is done stays, should a later head fail
    console.print(_table(rows))
    console.print(
        "Perplexity of the held-out words over the whole vocabulary. Words/s of training, compilation and evaluation "
        "left out. MiB: by how much the process of each head grew at its peak while it compiled and trained; step MiB: "
        "the temporaries of the compiled step."
    )
    if arguments.output:
        console.print(f"written to {arguments.output}")
    return 0


def _rates(name: str, given: list[float] | None) -> tuple[float, float]:
    head = HEADS[name]
    if given is None:
        return head.rate, head.sgd_rate
    if len(given) > 2 or not all(rate > 0 for rate in given):
        raise ValueError(f"lm: --learning-rate must be one or two numbers > 0, Adam's and SGD's; got {given}.")
    return given[0], given[-1] if len(given) > 1 else head.sgd_rate


def _read(arguments: argparse.Namespace) -> Corpus:
    """The text that was asked for, or the small one if the packages are missing."""
    if arguments.text:
        found = _corpus.of_paragraphs(arguments.text.read_text("utf8"), arguments.text.name)
    elif arguments.quick:
        found = _corpus.of_topics()
    else:
        try:
            found = _corpus.of_packages(arguments.hold_out)
        except ModuleNotFoundError as missing:
            print(f"lm: the package {missing.name!r} is missing, so the text is Python's own, which is small.")
            found = _corpus.of_topics()
    if min(len(found.train), 10 * len(found.held_out)) < SMALLEST:
        raise ValueError(
            f"lm: --text must have at least {SMALLEST} words to train and paragraphs, apart by empty lines, to hold "
            f"out; got {len(found.train)} and {len(found.held_out)} words. Give a longer one."
        )
    if arguments.quick:
        found = found._replace(train=found.train[:QUICK], held_out=found.held_out[: QUICK // 5])
    return found


# --- one head, in a process of its own ---------------------------------------------------------------------------


def _in_process(job: Job, progress: Progress) -> dict[str, Any]:
    """The result of `train` for a head, in a fresh process, so that the measured memory is its own."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, its), daemon=True)
    process.start()
    its.close()
    task = progress.add_task(job.head, total=job.steps[1])
    try:
        while isinstance(message := ours.recv(), int):
            progress.update(task, completed=message)
    except EOFError:
        raise RuntimeError(f"lm: the process of the head {job.head} ended early; what it printed says why.") from None
    finally:
        process.join(10)
    return message


def _work(job: Job, connection: multiprocessing.connection.Connection) -> None:
    connection.send(train(job, connection.send))


def train(job: Job, report: Any = lambda _: None) -> dict[str, Any]:
    """Trains one head and returns its row of the table. `report` is called with the number of steps that are done."""
    corpus, (in_epoch, steps) = job.corpus, job.steps
    end = corpus.words.index(END)
    contexts, labels, _ = _lm_network.windows(corpus.train, end)
    phi = choose_phi(job.head, job.phi)
    trainer = Trainer(job.head, phi, corpus, steps, job.rates)
    jax.block_until_ready(trainer.state)
    before = peak_mebibytes()
    size = min(BATCH, len(contexts))
    # every head sees the same windows in the same order; the last of a text has filling, and waits outside
    draw = np.random.default_rng(0)
    order = [draw.permutation(len(contexts))[: in_epoch * size].reshape(in_epoch, size) for _ in range(EPOCHS)]
    chosen = np.concatenate(order)
    program = trainer.step.lower(trainer.state, contexts[:size], labels[:size], np.int32(0)).compile()
    memory = program.memory_analysis()
    values, begun = [], time.perf_counter()
    for turn, rows in enumerate(chosen):
        trainer.state, value = program(trainer.state, contexts[rows], labels[rows], np.int32(turn))
        values.append(value)
        if turn % 20 == 19:
            jax.block_until_ready(value)
            report(turn + 1)
    jax.block_until_ready(trainer.state)
    seconds = time.perf_counter() - begun
    after = peak_mebibytes()
    tenth = np.array_split(np.asarray(values, np.float64), 10)
    return {
        "head": job.head,
        "phi": str(phi),
        "rates": job.rates if job.head == "factored" else job.rates[:1],
        "perplexity": trainer.perplexity(corpus.held_out, end, BATCH),
        "seconds": seconds,
        "tokens_per_second": chosen.size * _lm_network.CONTEXT / seconds,
        "peak_MiB": after - before,
        "temporaries_MiB": memory.temp_size_in_bytes / 2**20,  # pyright: ignore[reportOptionalMemberAccess]
        "training_loss": [float(part.mean()) for part in tenth if len(part)],
    }


def peak_mebibytes() -> float:
    """The largest memory that this process has had; NaN if the system does not tell."""
    try:
        import resource  # noqa: PLC0415  (not on Windows)
    except ModuleNotFoundError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --- what is shown -----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """The versions and the machine that the numbers depend on."""
    packages = {name: version(name) for name in ("jax", "optax", "numpy")}
    return {
        "jsoftmax": jsoftmax.__version__,
        **packages,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": str(os.cpu_count()),
    }


def _write(path: pathlib.Path, about: dict[str, str], corpus: Corpus, rows: list[dict[str, Any]]) -> None:
    text = {
        "text": corpus.description,
        "vocabulary": len(corpus.words),
        "train": len(corpus.train),
        "held_out": len(corpus.held_out),
        "held_out_unknown": corpus.unknown,
        "epochs": EPOCHS,
        "batch": BATCH * _lm_network.CONTEXT,
    }
    path.write_text(json.dumps({**about, **text, "rows": rows}, indent=1) + "\n")


_COLUMNS = ("head", "φ", "rate", "perplexity", "words/s", "minutes", "MiB", "step MiB")


def _cells(row: dict[str, Any]) -> list[str]:
    """One line of the table. The trigram has no φ, no steps and no program."""
    cells = [row["head"], row.get("phi", ""), " ".join(f"{rate:g}" for rate in row.get("rates", ()))]
    cells += [f"{row['perplexity']:.1f}", f"{row['tokens_per_second']:,.0f}" if "phi" in row else ""]
    cells += [f"{row['seconds'] / 60:.1f}"]
    return cells + [f"{row[name]:,.0f}" if name in row else "" for name in ("peak_MiB", "temporaries_MiB")]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("head", "φ") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table
