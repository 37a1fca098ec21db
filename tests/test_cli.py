"""The command line: what it says without a command, examples, and tables that fit 80 columns."""

import io

import numpy as np
import pytest
from rich.console import Console

import jsoftmax as js
from jsoftmax import cli, verify
from jsoftmax.cli import train
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
