"""The benchmark's errors and progress, and shares and times as text (sizes: `kvmem.arguments`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmem.errors import KVMemError

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[int], None]


class BenchError(KVMemError, ValueError):
    """An argument or a file that the benchmark cannot use. The command line prints it as one line: exit code 2."""


class TraceError(BenchError):
    """A trace file that is missing, of no known format, malformed or cut. Names file, line and what is wrong."""


def format_percent(share: float) -> str:
    """Two decimals, where fewer would hide what is small: 0.06 %, 21.87 %, but 574 %."""
    return f"{100 * share:.{0 if share >= 1 else 2}f} %"


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_us(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.3g}"


@contextmanager
def progress(console: Console, what: str, total: int, quiet: bool = False) -> Iterator[Progress]:
    """Yields a function that takes how many of ``total`` are done: it moves a bar on a terminal, and prints a line at
    each quarter otherwise. ``console`` is that of standard error.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if quiet or not console.is_terminal:
        quarters = set(range(1, 5)) if not quiet else set()

        def say(done: int) -> None:
            if (quarter := 4 * done // max(1, total)) in quarters:
                quarters.difference_update(range(quarter + 1))
                console.print(f"{what}: {done:,} of {total:,}", soft_wrap=True, markup=False)

        yield say
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
