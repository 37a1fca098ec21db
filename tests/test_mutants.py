"""The mutants of mutants.py are true: each text occurs once, so that each is one mistake; the tests named exist."""

import shlex

import pytest
from mutants import MUTANTS, ROOT, occurrences


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.new}")
def test_its_text_occurs_once(mutant):
    assert occurrences(mutant) == 1
    assert mutant.old != mutant.new
    files = [part for part in shlex.split(mutant.killed_by) if part.startswith("tests/")]
    assert files
    assert all((ROOT / file).exists() for file in files)


def test_each_is_another():
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
