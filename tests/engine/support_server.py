"""The engine's server in this process, on a port of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from examples.engine.scheduler import Scheduler
from examples.engine.server import Server


class Serving:
    """A server that is up. scheduler: its own; its allocator may be looked at from any thread."""

    def __init__(self, scheduler: Scheduler, tokenizer: Any, **options: Any) -> None:
        self.scheduler, self.alloc = scheduler, scheduler.allocator
        # Little room in the kernel for what a client does not read, so that it holds up the server soon.
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(512)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = Server(scheduler, tokenizer, "tiny", **options).app
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._socket])))
        self._thread.start()
        wait_until(lambda: self._server.started)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    @property
    def answering(self) -> int:
        """How many answers are being sent."""
        return len(self._server.server_state.tasks)

    def settle(self) -> None:
        """Wait until no request is left."""
        wait_until(lambda: not self.scheduler.running and not self.scheduler.waiting and not len(self.scheduler.cache))


@contextmanager
def serving(scheduler: Scheduler, tokenizer: Any, **options: Any) -> Iterator[Serving]:
    server = Serving(scheduler, tokenizer, **options)
    try:
        yield server
    finally:
        server.close()


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """seconds: how long a busy machine may take before it is a failure."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "what the test waits for did not come"
        time.sleep(0.01)
