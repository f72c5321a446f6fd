"""How far a part has come: a bar on a terminal, a plain line at each quarter otherwise. Goes to standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

__all__ = ["progress"]


@contextmanager
def progress(console: Console, what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many of ``total`` are done."""
    if quiet:
        yield lambda done: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _Lines(console, what, total)


class _Lines:
    def __init__(self, console: Console, what: str, total: int) -> None:
        self.console, self.what, self.total = console, what, max(1, total)
        self.quarter = 0

    def __call__(self, done: int) -> None:
        quarter = 4 * done // self.total
        if quarter > self.quarter:
            self.quarter = quarter
            self.console.print(Text(f"{self.what}: {done:,} of {self.total:,}"), soft_wrap=True)
