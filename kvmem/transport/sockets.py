"""The transport that needs no package: TCP, a thread for each reader. The others are measured and tested against it."""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from kvmem.arguments import check_size
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer
from kvmem.transport.base import Piece, Remote, Transport, address_of, fields_of

__all__ = ["SocketTransport"]

_HEAD: Final = struct.Struct("<16sII")  # token, which memory, how many parts; then an offset and a length of each
_PART: Final = struct.Struct("<QQ")
_MOST_PARTS: Final = 4096
_READERS: Final = 64
_STALLED_SECONDS: Final = 60.0  # a reader that takes nothing for so long is left


class SocketTransport(Transport):
    """Reads over TCP.

    host: the address of this machine's network at which others reach it; by default only this machine's processes do.
    port: 0 takes a free one. An address holds a secret, without which nothing is answered; the bytes are not encrypted.
    """

    name = "sockets"

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        check_size("port", port, 0, 65535)
        self._host, self._port = host, port
        self._token = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._memory: list[Buffer] = []
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self._remotes: set[_SocketRemote] = set()  # that were not closed
        self._closed = False

    def expose(self, memory: Buffer) -> bytes:
        with self._lock:
            if self._closed:
                raise TierError("the transport is closed")
            if self._listener is None:
                try:
                    self._listener = socket.create_server((self._host, self._port))
                except OSError as error:
                    raise TierError(f"cannot listen at {self._host}:{self._port}: {error}") from error
                threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
            self._memory.append(memoryview(memory).cast("B"))
            port = self._listener.getsockname()[1]
            return address_of(
                self.name, host=self._host, port=port, token=self._token.hex(), memory=len(self._memory) - 1,
                bytes=len(memory),
            )  # fmt: skip

    def connect(self, address: bytes) -> Remote:
        found = fields_of(address, self.name, host=str, port=int, token=str, memory=int, bytes=int)
        try:
            token = bytes.fromhex(found["token"])
        except ValueError:
            token = b""
        if len(token) != 16 or found["memory"] >> 32:
            raise SpecError("address: its token or its number of the memory is damaged")
        remote = _SocketRemote(found["host"], found["port"], token, found["memory"], found["bytes"])
        remote.forget = self._remotes.discard
        with self._lock:
            if self._closed:
                raise TierError("the transport is closed")
            self._remotes.add(remote)
        return remote

    def close(self) -> None:
        with self._lock:
            self._closed = True
            listener, self._listener = self._listener, None
            left = [*self._open, *([listener] if listener else [])]
        for one in left:  # shutdown wakes the thread that waits in it
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for remote in list(self._remotes):
            remote.hang_up(for_good=True)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed; or there are no file descriptors left, and the next ones may come
                if self._closed:
                    return
                time.sleep(0.1)
                continue
            with self._lock:
                if self._closed or len(self._open) >= _READERS:
                    connection.close()
                    continue
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer requests until one is wrong, or the reader is gone."""
        with suppress(OSError, ValueError), connection:  # ValueError: the memory was released meanwhile
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for readers that go without a word
            connection.settimeout(_STALLED_SECONDS)  # until it has shown that it knows the token
            while True:
                token, which, count = _HEAD.unpack(_received(connection, _HEAD.size))
                if not hmac.compare_digest(token, self._token) or which >= len(self._memory) or count > _MOST_PARTS:
                    break
                connection.settimeout(_STALLED_SECONDS)
                parts, memory = list(_PART.iter_unpack(_received(connection, count * _PART.size))), self._memory[which]
                if any(offset + length > len(memory) for offset, length in parts):
                    break
                for offset, length in parts:
                    connection.sendall(memory[offset : offset + length])
                connection.settimeout(None)
        with self._lock:
            self._open.discard(connection)


class _SocketRemote(Remote):
    """One connection, made by the first read and made again after a failure."""

    def __init__(self, host: str, port: int, token: bytes, memory: int, num_bytes: int) -> None:
        super().__init__(f"{host}:{port}", num_bytes)
        self._place, self._token, self._memory = (host, port), token, memory
        self.forget: Callable[[_SocketRemote], object]
        self._socket: socket.socket | None = None

    def _fill(self, pieces: Sequence[Piece], end: float) -> None:
        try:
            for first in range(0, len(pieces), _MOST_PARTS):
                self._ask(pieces[first : first + _MOST_PARTS], end)
        except (OSError, OverflowError, ValueError) as error:  # the last two: of a port or a host that is none
            self.hang_up()
            raise TierError(f"{self.where}: {error or type(error).__name__}") from error
        except BaseException:  # a signal: what comes next on the connection belongs to this read
            self.hang_up()
            raise

    def _ask(self, pieces: Sequence[Piece], end: float) -> None:
        if (connection := self._socket) is None:
            connection = self._socket = socket.create_connection(self._place, _left(end))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._closed:  # by the transport, meanwhile
            raise ConnectionAbortedError("closed")
        asked = _HEAD.pack(self._token, self._memory, len(pieces))
        connection.settimeout(_left(end))
        connection.sendall(asked + b"".join(_PART.pack(offset, len(buffer)) for offset, buffer in pieces))
        for _, buffer in pieces:
            _receive(connection, buffer, end)

    def _release(self) -> None:
        self.hang_up()
        self.forget(self)

    def hang_up(self, *, for_good: bool = False) -> None:
        self._closed |= for_good
        connection, self._socket = self._socket, None
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # wakes a read in another thread, which close() does not
            connection.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer in time")
    return left


def _receive(connection: socket.socket, buffer: Buffer, end: float) -> None:
    done = 0
    while done < len(buffer):
        connection.settimeout(_left(end))
        count = connection.recv_into(buffer[done:])
        if count == 0:
            raise ConnectionResetError("the other process has closed the connection")
        done += count


def _received(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionResetError
        data += more
    return bytes(data)
