"""The thread that runs the model, and what connects it with the server's event loop.

Requests and aborts go in through a queue, which the thread empties before each step. Tokens come out by one call into
the loop a step. Neither side waits for the other: what a slow client has not read stays in its own ``Stream``, at most
``max_tokens`` ids, and it reads all of them at once.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from examples.engine.scheduler import Output, Request, Scheduler

__all__ = ["Busy", "Engine", "Stream"]


class Busy(Exception):
    """Too many requests are here, or the engine has ended."""


class Observer(Protocol):
    """Told of the seconds since a request came, at its first token and at its end."""

    def first_token(self, seconds: float) -> None: ...

    def end(self, seconds: float) -> None: ...


class Stream:
    """The answer to a request: lists of token ids, and with the last one the reason of the end."""

    def __init__(self, request: Request) -> None:
        self.request, self.began = request, time.monotonic()
        self._tokens: list[int] = []
        self._reason: str | None = None
        self._fresh = asyncio.Event()

    def push(self, token: int | None, reason: str | None) -> None:
        self._tokens += [] if token is None else [token]
        self._reason = reason
        self._fresh.set()

    async def __aiter__(self) -> AsyncIterator[tuple[list[int], str | None]]:
        reason = None
        while reason is None:
            await self._fresh.wait()
            self._fresh.clear()
            tokens, self._tokens, reason = self._tokens, [], self._reason
            yield tokens, reason


class Engine:
    """Belongs to the event loop in which it is made. max_requests: how many may be running or waiting."""

    def __init__(self, scheduler: Scheduler, *, max_requests: int, observer: Observer) -> None:
        self.scheduler, self._max_requests, self._observer = scheduler, max_requests, observer
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[Request, Stream] = {}
        self._loop = asyncio.get_running_loop()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._ending

    @contextmanager
    def open(self, request: Request) -> Iterator[Stream]:
        """Queue a request, or raise ``Busy``. Leaving the body ends it within a step, unless it has ended."""
        if self._ending or len(self._streams) >= self._max_requests:
            raise Busy("the engine has ended" if self._ending else f"{len(self._streams)} requests are here; try later")
        stream = self._streams[request] = Stream(request)
        self._inbox.put(lambda: self.scheduler.add(request))
        try:
            yield stream
        finally:
            if self._streams.pop(request, None) is not None:
                self._inbox.put(lambda: self.scheduler.abort(request))

    def close(self) -> None:
        """End every request, and the thread, after the step that is under way."""
        self._ending = True
        self._inbox.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        """Of the thread."""
        scheduler = self.scheduler
        try:
            while not self._ending:
                idle = not scheduler.running and not scheduler.waiting
                with suppress(queue.Empty):
                    while True:
                        self._inbox.get(block=idle)()
                        idle = False
                if outputs := scheduler.step():
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
                elif not scheduler.running:
                    time.sleep(0.001)  # a tier brings what the first requests need
        finally:  # also after an error, which the thread's hook prints: nobody waits for ever
            self._ending = True
            scheduler.close()
            with suppress(RuntimeError):  # the loop has ended, and its clients with it
                self._loop.call_soon_threadsafe(self._fail)

    def _deliver(self, outputs: list[Output]) -> None:
        """Of the loop."""
        for request, token, reason in outputs:
            if (stream := self._streams.get(request)) is None:
                continue  # its client is gone
            seconds = time.monotonic() - stream.began
            if len(request.tokens) == len(request.prompt) + 1:
                self._observer.first_token(seconds)
            if reason is not None:
                self._observer.end(seconds)
                del self._streams[request]
            stream.push(token, reason)

    def _fail(self) -> None:
        for stream in self._streams.values():
            stream.push(None, "error")
        self._streams.clear()
