"""Covering arrays: each pair meets, and the same rows come whenever asked."""

import itertools
from types import SimpleNamespace

import pytest
from cells import and_full, covering, named, product, some

LISTS = [
    ("abc",),
    ("abc", range(4)),
    (range(7), range(3), range(3)),
    (range(35), range(10), range(11), range(3), range(4)),
    (range(1), range(5), range(1)),
]


@pytest.mark.parametrize("lists", LISTS, ids=lambda lists: " x ".join(str(len(a)) for a in lists))
def test_every_pair_meets(lists):
    rows = covering(*lists)
    for (i, a), (j, b) in itertools.combinations(enumerate(lists), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(a, b))
    for i, a in enumerate(lists):
        assert {row[i] for row in rows} == set(a)
    assert len(set(rows)) == len(rows)
    assert rows == covering(*lists)
    longest = sorted(map(len, lists))[-2:]
    assert len(rows) <= 1.5 * longest[0] * longest[-1]


def test_pairs_that_meet_elsewhere():
    rows = covering(range(9), range(13), range(2), met=[(0, 1)])
    assert len(rows) == 26
    for i, j in ((0, 2), (1, 2)):
        assert len({(row[i], row[j]) for row in rows}) == (9, 13)[i] * 2
    assert len(covering(range(9), range(13), met=[(0, 1)])) == 13


def test_a_product_has_every_cell():
    lists = ("abcd", range(3), "xy")
    cells = product(*lists)
    assert [cell.values for cell in cells] == list(itertools.product(*lists))
    assert [cell.values for cell in cells if not cell.marks] == covering(*lists)
    assert [bool(cell.marks) for cell in some("abc", "ac")] == [False, True, False]
    short, *more = [(1, 2), (3, 4)], [(1, 2), (5, 6)], [(5, 6), (7, 8)]
    found = and_full(iter(short), *more)
    assert found[:2] == short
    assert [(cell.values, bool(cell.marks)) for cell in found[2:]] == [((5, 6), True), ((7, 8), True)]


def test_a_name_that_does_not_exist_is_an_error():
    functions = [SimpleNamespace(name=name) for name in "abc"]
    assert named(functions, ("c", "a")) == [functions[0], functions[2]]
    with pytest.raises(AssertionError, match="d"):
        named(functions, ("a", "d"))
    with pytest.raises(AssertionError, match="d"):
        some("abc", "ad")
