"""Which cells of a product of lists run by default: those of a covering array. More cells are marked `full`.

A mistake nearly always needs at most two causes: a function and a φ, a transformation and an option. So each pair of
items of two lists is in a cell that `pytest` or `verify` runs, unless both items only repeat what others of their lists
do; a comment says so then. `pytest -m "full or not full"` runs the cells that are marked, too.
"""

import inspect
import itertools

import pytest


def covering(*lists, met=()):
    """Rows with one item of each list, in which every two items of two lists meet. The rows are the same at every call.

    Each row begins with a pair that has not met yet. Then each list adds the item that makes most such pairs meet; if
    several do, the one that is in the fewest rows.

    Args:
      lists: lists of anything; of a dict its keys.
      met: pairs of lists, by their numbers, whose items meet in other tests. Here each of their items is in some row.
    """
    counts = [range(len(items)) for items in lists]
    return [_row(lists, row) for row in _covering(counts, met)]


def product(*lists, met=()):
    """Every cell as a parameter of pytest. Cells beyond the covering array are marked `full`."""
    counts = [range(len(items)) for items in lists]
    short = set(_covering(counts, met))
    return [
        pytest.param(*_row(lists, row), marks=() if row in short else pytest.mark.full)
        for row in itertools.product(*counts)
    ]


def and_full(short, *more):
    """Rows that run by default; and the others of these lists of rows, marked `full`."""
    short, rest = list(short), []
    for row in itertools.chain(*more):
        if row not in short and row not in rest:
            rest.append(row)
    return [*short, *(pytest.param(*row, marks=pytest.mark.full) for row in rest)]


def some(items, kept):
    """The items as parameters of pytest. Those that are not in `kept`, all of which are items, are marked `full`."""
    missing = [item for item in kept if item not in items]
    assert not missing, missing
    return [pytest.param(item, marks=() if item in kept else pytest.mark.full) for item in items]


def named(functions, names):
    """The functions that have one of these names, each of which a function has."""
    missing = set(names) - {function.name for function in functions}
    assert not missing, missing
    return [function for function in functions if function.name in names]


def returning(module, result):
    """The names of a module's public functions whose annotation says that they return this."""
    functions = {name: getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    return {name for name, f in functions.items() if inspect.signature(f).return_annotation is result}


def _row(lists, row):
    return tuple([*items][i] for items, i in zip(lists, row, strict=True))


def _covering(counts, met):
    factors = sorted(range(len(counts)), key=lambda i: -len(counts[i]))  # the longest first
    apart = {frozenset(pair) for pair in met}
    missing = dict.fromkeys(frozenset({(i, a)}) for i in factors for a in counts[i])  # each item alone
    for i, j in itertools.combinations(factors, 2):
        if frozenset({i, j}) not in apart:
            missing |= dict.fromkeys(frozenset({(i, a), (j, b)}) for a in counts[i] for b in counts[j])
    uses = {(i, a): 0 for i in factors for a in counts[i]}
    rows = []
    while missing:
        row = set(max(missing, key=len) if not rows else next(iter(missing)))
        for i in factors:
            if all(j != i for j, _ in row):
                gains = [
                    (sum(frozenset({(i, a), *other}) in missing for other in [(), *((o,) for o in row)]), -uses[i, a])
                    for a in counts[i]
                ]
                row.add((i, gains.index(max(gains))))
        for size in (1, 2):
            for part in itertools.combinations(row, size):
                missing.pop(frozenset(part), None)
        for item in row:
            uses[item] += 1
        rows.append(tuple(a for _, a in sorted(row)))
    return sorted(rows)
