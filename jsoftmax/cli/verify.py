"""`python -m jsoftmax verify`: the oracle's table; exit code 1 on any miss."""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import time

import jax
import mpmath  # noqa: F401  (the oracle's; named here so that a missing extra is reported before any work)
from rich import box
from rich.console import Console
from rich.table import Table

import jsoftmax
from jsoftmax import verify
from jsoftmax.cli._progress import tracked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `verify`."""
    everything = "third derivatives, autodiff of the plain definitions, and XLA's optimisations of code for CPU, too"
    parser.add_argument("--all", action="store_true", help=everything)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write every error and tolerance as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, write; 1 if anything misses."""
    console = Console()
    about = environment()
    told = [f"{name} {value}" for name, value in about.items()]
    console.print(" · ".join(told[:2]), " · ".join(told[2:]), sep="\n")
    started = time.perf_counter()
    cells: list[verify.Cell] = []
    sure: list[verify.Sure] = []
    total = len(verify.PAIRS) + len(verify.SURE)
    for found in tracked(verify.checks(arguments.all), "function × φ", total, console):
        cells.append(found) if isinstance(found, verify.Cell) else sure.append(found)
    errata = [(erratum, *erratum.errors()) for erratum in verify.ERRATA]
    console.print(_table(cells, arguments.all), _sure_table(sure), _errata_table(errata))
    missed = sum(not found.ok for found in (*cells, *sure)) + sum(
        not e.ok(claimed, true) for e, claimed, true in errata
    )
    seconds = time.perf_counter() - started
    if arguments.json:
        rows = [{**dataclasses.asdict(cell), "ok": cell.ok} for cell in cells]
        wrong = [{"where": e.where, "claimed": c, "true": t, "ok": e.ok(c, t)} for e, c, t in errata]
        gradients = [{"function": str(s.function), "error32": s.error32, "ok": s.ok} for s in sure]
        found = {**about, "cells": rows, "gradients_of_confident_rows": gradients, "errata": wrong}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"written to {arguments.json}")
    checks = sum(len(cell.error64) + len(cell.error32) for cell in cells) + len(sure) + len(errata)
    console.print(f"{checks} comparisons in {seconds:.0f} s: " + (f"{missed} MISSED" if missed else "no miss"))
    if not arguments.all:
        third = sum(function.orders == 4 for function, _ in verify.PAIRS)
        console.print(
            f"Left out: third derivatives (pairs of function and φ: {third}), second ones of the expansion, float64 "
            "against autodiff of the plain definitions, and XLA's optimisations of code for CPU; --all has them, too."
        )
    return 1 if missed else 0


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    device = jax.devices()[0]
    return {
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "jsoftmax": jsoftmax.__version__,
        "python": platform.python_version(),
    }


_EXPLAINED = "f: the value; f′: its Jacobian; f″, f‴: the Jacobian's derivatives along one line"
"""The columns of the table."""


def _table(cells: list[verify.Cell], autodiff: bool) -> Table:
    """One line a φ, in 80 columns."""
    wide = "float64" if verify.wide_dtype() == "float64" else "float32"
    also = f"{wide} against autodiff of the plain definitions, too\n" if autodiff else ""
    table = Table(
        title="Worst relative error against many digits\n"
        f"left: {wide}, right: float32; ! is a miss\n{also}{_EXPLAINED}",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("", max_width=28, overflow="fold")
    orders = verify.ORDERS[: max(len(cell.error64) for cell in cells)]
    for order in 2 * orders:
        table.add_column(order, justify="right", no_wrap=True)
    previous = None
    for cell in cells:
        if cell.function != previous:
            table.add_row(f"[bold]{cell.function}[/]")
        marked = []
        for errors, tolerances in ((cell.error64, cell.tolerance64), (cell.error32, cell.tolerance32)):
            of_side = [
                f"{e:.0e}" if e <= t else f"[bold red]{e:.0e}![/]" for e, t in zip(errors, tolerances, strict=True)
            ]
            marked += of_side + [""] * (len(orders) - len(of_side))
        table.add_row(f"  {cell.phi}", *marked)
        previous = cell.function
    return table


def _sure_table(sure: list[verify.Sure]) -> Table:
    table = Table(
        title="Gradients where one class is almost certain (MATH.md 4.5), φ = exp:\n"
        "worst error of an output's gradient over its largest entry, float32 against many digits",
        box=box.SIMPLE_HEAD,
    )
    for column in ("", "f′"):
        table.add_column(column, no_wrap=True)
    for of_function in sure:
        missed = "" if of_function.ok else "[bold red]![/]"
        table.add_row(str(of_function.function), f"{of_function.error32:.0e}{missed}")
    return table


def _errata_table(errata: list[tuple[verify.Erratum, float, float]]) -> Table:
    table = Table(title="Where the article errs (MATH.md 2): relative error against autodiff", box=box.SIMPLE_HEAD)
    for column in ("", "formula", "error"):
        table.add_column(column, no_wrap=True)
    for erratum, claimed, true in errata:
        table.add_row(f"[bold]{erratum.where}[/]")
        table.add_row("  the article", erratum.claimed, f"[red]{claimed:.1f}[/]")
        table.add_row("  true", erratum.true, f"{true:.0e}")
    return table
