"""Progress of a long command: a bar on a terminal, and lines where the output is a file or a pipe."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

_T = TypeVar("_T")

SECONDS = 20.0
"""How long the output of a command may be silent, if its steps are shorter."""


def tracked(steps: Iterable[_T], what: str, total: int, console: Console) -> Iterator[_T]:
    """The steps, while the console shows how many are done."""
    if console.is_terminal:
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(steps, total, description=what)
        return
    started = told = time.monotonic()
    for done, step in enumerate(steps, 1):
        yield step
        now = time.monotonic()
        if now - told >= SECONDS or done == total:
            console.print(f"{what}: {done} of {total} after {now - started:.0f} s")  # rich flushes
            told = now
