"""What a transport is: one process exposes memory, another reads ranges of it. Nothing else crosses.

One-sided reads are what RDMA, NIXL and Mooncake have in common; a connection of sockets does them too. The process that
exposes memory takes no part in a read, so it is neither asked nor delayed, and cannot say that a range has changed: who
reads must be able to tell from the bytes (Pilaf, USENIX ATC 2013: self-verifying records).
"""

from __future__ import annotations

import json
import mmap
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

import numpy as np

from kvmem.arguments import brief, check_size
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer

__all__ = ["Piece", "RegisteredTransport", "Remote", "ScratchRemote", "Transport", "address_of", "fields_of"]

Piece = tuple[int, Buffer]
"""An offset in the remote memory, and where its bytes go."""
_POLL_SECONDS: Final = 0.0002
Registration = TypeVar("Registration")
Transfer = TypeVar("Transfer")


class Transport(ABC):
    """Exposes memory to other processes, and reads theirs. Thread-safe."""

    #: What addresses and reports call it.
    name: str = ""

    @abstractmethod
    def expose(self, memory: Buffer) -> bytes:
        """Let other processes read the memory until ``close()``; return its address, ASCII bytes to hand to them.

        Whoever has the address can read it. memory: writable, and neither moved nor unmapped before ``close()``.
        """

    @abstractmethod
    def connect(self, address: bytes) -> Remote:
        """Return a reader of the memory with that address; ``SpecError`` if it is none of this transport's.

        Does not wait for the other process: whether it is there, the first read says.
        """

    @abstractmethod
    def close(self) -> None:
        """End what was exposed, and every ``Remote``. Closing twice is no error."""

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Remote(ABC):
    """Memory of another process. Thread-safe; reads take turns.

    where: for messages. num_bytes: how much there is.
    """

    def __init__(self, where: str, num_bytes: int) -> None:
        self.where, self.num_bytes = where, num_bytes
        self._lock, self._closed = threading.Lock(), False

    def read(self, parts: Sequence[tuple[int, int]], seconds: float) -> list[bytearray]:
        """Return the bytes of each part, an offset and a length, as the caller's own.

        The other process may write at the same time: the bytes may be torn, and must say whether they are right.
        ``TierError`` if it is gone or has not answered within ``seconds``. ``SpecError`` for a part that is not inside.
        """
        for offset, length in parts:
            if offset < 0 or length < 0 or offset + length > self.num_bytes:
                raise SpecError(f"{self.where}: no {length} bytes at {offset}; it has {self.num_bytes}")
        end = time.monotonic() + seconds
        found = [bytearray(length) for _, length in parts]
        pieces = [(offset, memoryview(data)) for (offset, _), data in zip(parts, found, strict=True) if data]
        if not self._lock.acquire(timeout=max(0.0, seconds)):
            raise TierError(f"{self.where}: another read was under way for {seconds:.3g} s")
        try:
            if self._closed:
                raise TierError(f"{self.where}: closed")
            self._fill(pieces, end)
        finally:
            self._lock.release()
        return found

    def close(self) -> None:
        """Release what reading took, once a read that is under way has ended. Closing twice is no error."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._release()

    @abstractmethod
    def _fill(self, pieces: Sequence[Piece], end: float) -> None:
        """Fill every buffer by ``end`` of ``time.monotonic``, or raise ``TierError``."""

    @abstractmethod
    def _release(self) -> None:
        """Close connections and release memory."""


class RegisteredTransport(Transport, Generic[Registration]):
    """A transport whose client has to be told of memory, on both sides, before it moves bytes."""

    def __init__(self, scratch_bytes: int) -> None:
        self.scratch_bytes = check_size("scratch_bytes", scratch_bytes, 4096)
        self._lock = threading.Lock()
        self._registered: dict[int, tuple[Registration, Buffer]] = {}  # by address; keeps the memory alive
        self._closed = False

    @abstractmethod
    def _enter(self, where: int, num_bytes: int) -> Registration:
        """Tell the client of memory. REQUIRES ``_lock``, as the next two do."""

    @abstractmethod
    def _leave(self, where: int, registration: Registration) -> None:
        """Tell the client that it is gone."""

    @abstractmethod
    def _end(self) -> None:
        """Close the client."""

    def register(self, memory: Buffer) -> int:
        """Return the address of the memory, which the client knows from now on."""
        where = np.frombuffer(memory, np.uint8).ctypes.data
        with self._lock:
            if self._closed:
                raise TierError("the transport is closed")
            self._registered[where] = self._enter(where, len(memory)), memory
        return int(where)

    def forget(self, where: int) -> None:
        """Deregister memory, unless that has been done."""
        with self._lock:
            if where in self._registered:
                self._leave(where, self._registered.pop(where)[0])

    def close(self) -> None:
        with self._lock:
            closed, self._closed = self._closed, True
            while self._registered:
                where, (registration, _) = self._registered.popitem()
                self._leave(where, registration)
            if not closed:
                self._end()


class ScratchRemote(Remote, Generic[Transfer]):
    """A remote whose client writes to registered memory only: reads go to a scratch, and are copied out of it.

    A transfer that cannot be taken back may write to the scratch at any later time. So after a read that was given up,
    the next one waits until that transfer has ended, and fails if it does not.
    """

    def __init__(self, transport: RegisteredTransport[Any], where: str, num_bytes: int) -> None:
        super().__init__(where, num_bytes)
        self._scratch = memoryview(mmap.mmap(-1, transport.scratch_bytes)).cast("B")
        self._scratch_at = transport.register(self._scratch)
        self._forget = transport.forget
        self._left: Transfer | None = None  # given up, and perhaps still writing

    @abstractmethod
    def _begin(self, offsets: Sequence[int], at: Sequence[int], lengths: Sequence[int]) -> Transfer:
        """Start to read ``lengths`` bytes at ``offsets`` to the places ``at`` of the scratch."""

    @abstractmethod
    def _ended(self, transfer: Transfer) -> bool:
        """Return whether all bytes have come; ``TierError`` if they will not."""

    @abstractmethod
    def _cancel(self, transfer: Transfer) -> bool:
        """Give the transfer up; return whether it writes nothing any more."""

    def _release(self) -> None:
        if self._left is None:  # else it may still be written to
            self._forget(self._scratch_at)

    def _fill(self, pieces: Sequence[Piece], end: float) -> None:
        if self._left is not None:
            ended = True
            with suppress(TierError):  # it has failed, so it has ended
                ended = self._waited(self._left, end)
            if not ended:
                raise TierError(f"{self.where}: an earlier read has not ended")
        batch: list[Piece] = []
        used, room = 0, len(self._scratch)
        for offset, buffer in pieces:
            for first in range(0, len(buffer), room):
                part = buffer[first : first + room]
                if used + len(part) > room:
                    self._move(batch, end)
                    batch, used = [], 0
                batch.append((offset + first, part))
                used += len(part)
        self._move(batch, end)

    def _waited(self, transfer: Transfer, end: float) -> bool:
        """Return whether the transfer has ended by ``end``; ``TierError`` if it has failed."""
        try:
            while not self._ended(transfer):
                if time.monotonic() >= end:
                    return False
                time.sleep(_POLL_SECONDS)
        except TierError:
            self._left = None
            raise
        self._left = None
        return True

    def _move(self, batch: Sequence[Piece], end: float) -> None:
        if not batch:
            return
        at, total = [], 0
        for _, buffer in batch:
            at.append(total)
            total += len(buffer)
        transfer = self._begin([offset for offset, _ in batch], at, [len(buffer) for _, buffer in batch])
        self._left = transfer  # until it has ended, also if a signal ends this call
        if not self._waited(transfer, end):
            self._left = None if self._cancel(transfer) else transfer
            raise TierError(f"{self.where}: no answer in time")
        for place, (_, buffer) in zip(at, batch, strict=True):
            buffer[:] = self._scratch[place : place + len(buffer)]


def address_of(transport: str, **fields: str | int) -> bytes:
    """Return an address: the transport's name and what it needs, as JSON."""
    return json.dumps({"transport": transport, **fields}, separators=(",", ":")).encode("ascii")


def fields_of(address: bytes, transport: str, **types: type) -> dict[str, Any]:
    """Return the fields of an address, of these names and types; ``SpecError`` if it is no such address."""
    try:
        found = json.loads(address)
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"address: got {brief(address)}; must be what the other process's transport gave") from error
    if not isinstance(found, dict) or found.get("transport") != transport:
        raise SpecError(f"address: got {brief(address)}; must be of the transport {transport!r}, as on the other side")
    for name, kind in types.items():
        if type(found.get(name)) is not kind or (kind is int and not 0 <= found[name] < 1 << 63):
            raise SpecError(f"address: {name} is {brief(found.get(name))}; the address is damaged")
    return found
