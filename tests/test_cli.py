"""The command line: what it says without a command, examples, and tables that fit 80 columns."""

import io

import numpy as np
import pytest
from rich.console import Console

import jsoftmax as js
from jsoftmax import cli, verify
from jsoftmax.cli import _progress, train
from jsoftmax.cli import verify as command


def test_without_a_command_it_says_what_there_is(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    for name in ("verify", "train", "lm"):
        assert f"\n  {name} " in said
        assert f"e.g. python -m jsoftmax {name} " in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize("name", ["verify", "train", "lm"])
def test_help_has_an_example_that_parses(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    example = said.split("example: python -m jsoftmax ")[1]
    given = []
    monkeypatch.setattr(f"jsoftmax.cli.{name}.run", lambda arguments: given.append(arguments) or 0)
    assert cli.main(example.split()) == 0
    assert len(given) == 1


def printed(*tables):
    """Lines in 80 columns."""
    console = Console(width=80, file=io.StringIO())
    console.print(*tables)
    return console.file.getvalue().splitlines()


def test_tables_fit_80_columns():
    good = (1e-16, 1e-16, 1e-16, 1e-16)
    cells = [verify.Cell("entropy", str(phi), good, good, good, good) for phi in js.PHIS]
    once = np.full(3, 0.97)
    results = [
        train.Result("network", name, phi, once, 10 * once, once, once)
        for name, phi in [("cross-entropy", str(phi)) for phi in js.PHIS] + [("soft-margin", "exp"), ("Z-loss", "")]
    ]
    by_phi = [printed(command._table(cells, True)), printed(train._results_table(results))]
    errata = printed(command._errata_table([(erratum, 1.2, 1e-16) for erratum in verify.ERRATA]))
    runs = printed(train._runs_table([train.Run("damped Newton–CG", 4, 1.0, 0.25)]))
    for lines in (*by_phi, errata, runs):
        assert max(map(len, lines)) <= 80
        assert "…" not in "\n".join(lines)
    for phi in js.PHIS:
        for lines in by_phi:
            assert any(line.strip().startswith(f"{phi} ") for line in lines), f"{phi} is folded"
    for erratum in verify.ERRATA:
        assert erratum.claimed in "\n".join(errata)
        assert erratum.true in "\n".join(errata)


def test_progress_is_told_where_there_is_no_terminal(monkeypatch):
    console = Console(width=80, file=io.StringIO())
    monkeypatch.setattr(_progress, "SECONDS", 0.0)
    told = []
    for step in _progress.tracked(iter("ab"), "steps", 2, console):
        assert console.file.getvalue().splitlines() == told
        told.append(f"steps: {'ab'.index(step) + 1} of 2 after 0 s")
    assert console.file.getvalue().splitlines() == told


def test_tables_are_explained():
    good = (1e-16, 1e-16, 1e-16, 1e-16)
    cell = verify.Cell("entropy", "exp", good, good, good, good)
    assert "f: the value; f′: its Jacobian" in "\n".join(printed(command._table([cell], True)))
    once, nothing = np.full(3, 0.9), np.full(3, np.nan)
    plain = train.Result("linear", "cross-entropy", "exp", once, once, once, once)
    assert train._remarks([plain]) == []
    riddles = [
        plain._replace(phi="relu_power(2, 0.1)"),
        plain._replace(loss="Z-loss", phi="", nll=nothing),
        plain._replace(loss="sparsemax", phi="", nll=np.full(3, np.inf)),
    ]
    for riddle, start in zip(riddles, ("relu_power: ", "Z-loss: ", "NLL ∞: "), strict=True):
        (remark,) = train._remarks([plain, riddle])
        assert remark.startswith(start)
    assert len(train._remarks(riddles)) == 3
