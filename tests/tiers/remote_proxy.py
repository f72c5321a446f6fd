"""A TCP proxy that does to a connection what networks and broken servers do. What it does can be changed at any time."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

# A mode gets each piece that passes and whether it comes from the server. It returns what goes on; None cuts the connection.
Mode = Callable[[bytes, bool], bytes | None]


def plain(data: bytes, from_server: bool) -> bytes:
    return data


def swallow(data: bytes, from_server: bool) -> bytes:
    """The server is never heard of again."""
    return b"" if from_server else data


def cut(data: bytes, from_server: bool) -> bytes | None:
    return None if from_server else data


def garbage(data: bytes, from_server: bool) -> bytes:
    """Another protocol."""
    return b"SSH-2.0-OpenSSH_9.2\r\n" if from_server else data


def delay(seconds: float) -> Mode:
    def mode(data: bytes, from_server: bool) -> bytes:
        if from_server:
            time.sleep(seconds)
        return data

    return mode


def flip(rng: random.Random, rate: float, requests: bool = False) -> Mode:
    """Flip one bit of a byte in a share of the pieces."""

    def mode(data: bytes, from_server: bool) -> bytes:
        if from_server != requests and rng.random() < rate:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        return data

    return mode


class Proxy:
    """Between clients and a port of this machine. ``drip``: seconds between single bytes of the server's answers.
    ``greeting``: what a client hears first."""

    def __init__(self, target: int) -> None:
        self.drip, self.greeting, self.connections = 0.0, b"", 0
        self.mode: Mode = plain
        self._target, self._lock, self._closed = target, threading.Lock(), False
        self._clients, self._servers = list[socket.socket](), list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        threading.Thread(target=work, args=args, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._serve(self._listener.accept()[0])

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target), 5)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self.connections += 1
            self._clients.append(client)
            self._servers.append(server)
            closed = self._closed
        if closed:
            self.close()
        with suppress(OSError):
            client.sendall(self.greeting)
        self._start(self._pump, client, server, False)
        self._start(self._pump, server, client, True)

    def _pump(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                passed = self.mode(data, from_server)
                if passed is None:
                    break
                if from_server and self.drip:
                    for i in range(len(passed)):
                        sink.sendall(passed[i : i + 1])
                        time.sleep(self.drip)
                else:
                    sink.sendall(passed)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def open_connections(self) -> int:
        """Connections of clients that are still there."""
        with self._lock:
            return sum(map(_connected, self._clients))

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._closed = True
            for end in self._clients + self._servers:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


def _connected(end: socket.socket) -> bool:
    try:
        end.getpeername()
    except OSError:
        return False
    return True
