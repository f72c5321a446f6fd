"""The thread that runs the model. Requests and aborts go in through a queue, which it empties before each step. Tokens
come out by one call into the server's event loop a step, into the queue of each client. That has room for a whole
answer, so a slow client delays nobody."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from examples.engine.metrics import Metrics
from examples.engine.protocol import ApiError
from examples.engine.scheduler import Output, Request, Scheduler

#: Of one client: tokens, and with the last one the reason of the end. None: there are no more.
Tokens = asyncio.Queue[tuple[int | None, str | None]]


class Engine:
    """Belongs to the event loop in which it is made. max_requests: how many may be running or waiting."""

    def __init__(self, scheduler: Scheduler, *, max_requests: int, metrics: Metrics) -> None:
        self._scheduler, self._max_requests, self._metrics = scheduler, max_requests, metrics
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._clients: dict[Request, Tokens] = {}
        self._loop, self.alive = asyncio.get_running_loop(), True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @contextmanager
    def open(self, request: Request) -> Iterator[Tokens]:
        """Queue a request, or raise a 503. Leaving the body ends it within a step, unless it has ended."""
        if not self.alive or len(self._clients) >= self._max_requests:
            raise ApiError(503, "the engine has ended, or has as many requests as it takes: try again later")
        tokens = self._clients[request] = Tokens(request.sampling.max_tokens + 2)
        self._inbox.put(lambda: self._scheduler.add(request))
        try:
            yield tokens
        finally:
            if self._clients.pop(request, None) is not None:
                self._inbox.put(lambda: self._scheduler.abort(request))

    def close(self) -> None:
        """End every request, and the thread, after the step that is under way."""
        self.alive = False
        self._inbox.put(lambda: None)
        self._thread.join()

    def _run(self) -> None:
        scheduler = self._scheduler
        try:
            while self.alive:
                while not self._inbox.empty() or (self.alive and not scheduler.running and not scheduler.waiting):
                    self._inbox.get()()
                if outputs := scheduler.step():
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
                elif not scheduler.running:
                    time.sleep(0.001)  # a tier brings what the first requests need
        finally:  # also after an error, which the thread's hook prints: nobody waits for ever
            self.alive = False
            with suppress(RuntimeError):  # the loop has ended, and its clients with it
                self._loop.call_soon_threadsafe(self._fail)
            for request in [*scheduler.running, *scheduler.waiting]:
                scheduler.abort(request)

    def _deliver(self, outputs: list[Output]) -> None:
        """Of the loop, as ``_fail``."""
        for request, token, reason in outputs:
            if request in self._clients:  # else its client is gone
                client = self._clients[request] if reason is None else self._clients.pop(request)
                client.put_nowait((token, reason))
                self._metrics.token(request, reason is not None)

    def _fail(self) -> None:
        while self._clients:
            self._clients.popitem()[1].put_nowait((None, "error"))
