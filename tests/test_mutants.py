"""The mutants of mutants.py are true: each text occurs once, so that each is one mistake; the tests named exist."""

import shlex

import pytest
from mutants import MUTANTS, ROOT, occurrences, row


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.new}")
def test_its_text_occurs_once(mutant):
    assert occurrences(mutant) == 1
    assert mutant.old != mutant.new
    files = [part for part in shlex.split(mutant.killed_by) if part.startswith("tests/")]
    assert files
    assert all((ROOT / file).exists() for file in files)


def test_the_table_has_each():
    rows = [line for line in (ROOT / "tests/mutants.md").read_text().splitlines() if "→" in line]
    for mutant, found in zip(MUTANTS, rows, strict=True):
        assert found.startswith(row(mutant.file, mutant.change, mutant.killed_by))


def test_each_is_another():
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
