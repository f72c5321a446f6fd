"""Work that may take long, in threads that nobody waits for: a tier that never answers must not hold up an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

__all__ = ["Background"]

_T = TypeVar("_T")


class Background:
    """A few daemon threads, which end with the process at the latest.

    threads: how many tasks run at once; more wait. ``concurrent.futures`` would wait for all of them at exit.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Return the future of ``work``, which may be cancelled before it begins."""
        future: Future[_T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001  the future carries it to whoever asks
                    future.set_exception(error)

        self._tasks.put(run)
        return future

    def close(self, seconds: float) -> None:
        """Let the threads end when what was submitted is done; wait that long at most in all."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(seconds / len(self._threads))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
