"""Blocks in a Mooncake Store, the distributed memory pool of Mooncake (FAST '25), through its package's client."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Sequence
from typing import Any, Final

from kvmem.arguments import check_size
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status
from kvmem.tiers.remote import ABSENT, Call, Limits, Record, RemoteTier, failed

__all__ = ["MooncakeTier"]

_PLACE: Final = re.compile(r"([A-Za-z0-9_.-]+):([0-9]{1,5})")
_NO_ROOM, _NOT_FOUND = -200, -704  # of mooncake-store's ErrorCode
_FEW_CALLS: Final = Limits(calls=4)  # each may hold batch_bytes of the client's buffer


class MooncakeTier(RemoteTier):
    """A tier in the memory that the clients of one Mooncake master pool.

    Each block is an object ``NAMESPACE/VERSION/KEY``. The master drops what was not read for longest when memory is
    short. Mooncake's client cannot be opened without its master, so this raises ``TierError`` if none answers within
    ``timeout_seconds``. The client writes a log of its own to the standard error.

    master: ``host:port`` of its RPC. host: this machine, as other clients reach it. segment_bytes: memory that this
    process gives to the pool, and takes with it when it ends. protocol, devices, metadata: Mooncake's; only ``tcp``
    with ``P2PHANDSHAKE`` is tested. metrics_port: the master's HTTP port, from which alone ``capacity`` is known; None
    asks nobody. timeout_seconds, namespace, limits: see :class:`~kvmem.tiers.remote.RemoteTier`. ``SpecError`` for a
    bad argument, or without Mooncake's package. Cost: one copy of each payload in and out, and
    ``limits.calls * limits.batch_bytes`` and a quarter of memory for it; no block may have more than ``batch_bytes``.
    """

    name = "mooncake"

    def __init__(
        self, master: str, *, host: str = "127.0.0.1", segment_bytes: int = 0, protocol: str = "tcp",
        devices: str = "", metadata: str = "P2PHANDSHAKE", metrics_port: int | None = 9003,
        timeout_seconds: float = 2.0, namespace: str = "kvmem", limits: Limits = _FEW_CALLS,
    ) -> None:  # fmt: skip
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as e:  # also without a library that it is linked to
            raise SpecError(
                f"MooncakeTier needs the package mooncake-transfer-engine: pip install 'kvmem[mooncake]', and Debian's "
                f"libibverbs1 ({e})"
            ) from e
        found = _PLACE.fullmatch(master) if isinstance(master, str) else None
        if found is None or not 0 < int(found[2]) < 65536:
            raise SpecError(f"master: got {master!r}; must be 'host:port', such as '127.0.0.1:50051'")
        check_size("segment_bytes", segment_bytes, 0)
        self._metrics: str | None = None
        if metrics_port is not None:
            self._metrics = f"http://{found[1]}:{check_size('metrics_port', metrics_port, 1, 65535)}/metrics"
        super().__init__(f"mooncake://{master}", timeout_seconds, namespace, limits)
        self._probe(found[1], int(found[2]))
        self._store: Any = MooncakeDistributedStore()
        staging = limits.calls * limits.batch_bytes * 5 // 4
        code = self._store.setup(host, metadata, segment_bytes, staging, protocol, devices, master)
        if code:
            raise TierError(f"{self._where}: Mooncake's client refused to start with code {code}; its log says why")

    def _probe(self, host: str, port: int) -> None:
        """Raise ``TierError`` unless a master is there: the client would try for minutes, and hold the GIL meanwhile.

        A master hangs up on what is not its protocol. One that is stuck accepts, and says nothing. (One that gets stuck
        after this answer holds the caller as long as Mooncake does.)
        """
        try:
            with socket.create_connection((host, port), self._seconds) as probe:
                probe.settimeout(self._seconds)
                probe.sendall(bytes(64))
                answer = probe.recv(64)
        except ConnectionResetError:
            answer = b""
        except OSError as e:
            raise TierError(f"{self._where}: no master answers there ({e}); start mooncake_master") from e
        if answer:
            raise TierError(f"{self._where}: another protocol answers there, not a master: {answer!r}")

    def _ping(self, call: Call) -> Sequence[object] | Result:
        return self._exists(call, [self._prefix])

    def _exists(self, call: Call, names: Sequence[str]) -> list[bool] | Result:
        codes: list[int] = self._store.batch_is_exist(list(names))
        return next((_failed(code) for code in codes if code < 0), None) or [code == 1 for code in codes]

    def _read(self, call: Call, names: Sequence[str], sizes: Sequence[int]) -> Sequence[Record] | Result:
        there = self._exists(call, names)  # or a master that is gone would look like a miss
        if isinstance(there, Result):
            return there
        known = list({name: None for name, is_there in zip(names, there, strict=True) if is_there})  # each once
        found = dict(zip(known, self._store.batch_get_buffer(known), strict=True))
        return [_record(found[name]) if name in found else None for name in names]

    def _write(self, call: Call, names: Sequence[str], records: Sequence[tuple[bytes, Buffer]]) -> list[Result]:
        return [self._write_one(name, parts) for name, parts in zip(names, records, strict=True)]

    def _write_one(self, name: str, parts: tuple[bytes, Buffer]) -> Result:
        size, most = sum(map(len, parts)), self._limits.batch_bytes
        if size > most:  # than the client's buffer is sure to hold
            return Result(Status.FULL, 0, f"the record has {size} bytes, and limits.batch_bytes is {most}")
        code = self._store.upsert_parts(name, *parts)
        if code == _NO_ROOM:
            return Result(Status.FULL, 0, "the pool has no room; add memory to it, or wait until blocks are dropped")
        return _failed(code) if code else Result(Status.OK)

    def _remove(self, call: Call, names: Sequence[str]) -> list[Result]:
        codes = self._store.batch_remove(list(names), True)  # also what was read lately, and has a lease
        return [Result(Status.OK) if not c else ABSENT if c == _NOT_FOUND else _failed(c) for c in codes]

    def _measure(self, call: Call) -> list[Capacity]:
        """Of the whole pool."""
        if self._metrics is None:
            return [self._capacity]
        with urllib.request.urlopen(self._metrics, timeout=self._seconds) as answer:
            said = dict(re.findall(rb"^master_(\w+) (\d+)$", answer.read(1 << 20), re.MULTILINE))
        return [Capacity(*(int(said[n]) for n in (b"total_capacity_bytes", b"allocated_bytes", b"key_count")))]

    def _release(self, idle: bool) -> None:
        if idle:  # a call that is under way would crash in a client that is closed
            self._store.close()


def _record(handle: Any) -> Record:
    return (
        failed("Mooncake knows the block and does not deliver it") if handle is None else memoryview(handle).cast("B")
    )


def _failed(code: int) -> Result:
    return failed(f"Mooncake's client answered {code}")
