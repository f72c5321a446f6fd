"""Work that may take long, in threads that nobody waits for: a tier that never answers must not hold up an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["Background"]

_T = TypeVar("_T")


class Background:
    """A few daemon threads, which end with the process at the latest.

    threads: how many tasks run at once; more wait. ``concurrent.futures`` would wait for all of them at exit.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._left = set[Future[Any]]()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Return the future of ``work``, which may be cancelled before it begins."""
        future: Future[_T] = Future()
        given = [work]
        future.add_done_callback(lambda _: given.clear())  # what was cancelled keeps no memory, whenever its turn comes

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(given[0]())
                except BaseException as error:  # noqa: BLE001  the future carries it to whoever asks
                    future.set_exception(error)

        self._tasks.put(run)
        return future

    def leave(self, future: Future[Any]) -> None:
        """Wait no more for ``future``: it is cancelled, or its thread counts as stuck until it has ended."""
        if not future.cancel() and not future.done():
            self._left.add(future)

    @property
    def is_stuck(self) -> bool:
        """Whether every thread is with work that was left, so that new work would only wait for it."""
        self._left = {future for future in self._left if not future.done()}
        return len(self._left) >= len(self._threads)

    def close(self, seconds: float) -> None:
        """Let the threads end when what was submitted is done; wait that long at most in all."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(seconds / len(self._threads))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
