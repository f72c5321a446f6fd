"""The transports that are installed, and a process that exposes memory by one of them.

``make transport-peers`` installs NIXL and Mooncake in ``build/peers/transports``, or in the folder that
``KVMEM_TRANSPORTS`` names.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import PROCESSES, kill, start
from tier_suite import LARGEST, key_of, payload_of, put

from kvmem.transport import ExposedTier, Transport
from kvmem.transport.directory import Directory
from kvmem.transport.sockets import SocketTransport

KINDS = ["sockets", "nixl", "mooncake"]
sys.path.append(os.environ.get("KVMEM_TRANSPORTS", str(Path(__file__).parents[2] / "build" / "peers" / "transports")))
os.environ.setdefault("UCX_TLS", "tcp")  # what this machine has; read when UCX is loaded
os.environ.setdefault("UCX_NET_DEVICES", "lo")


def open_transport(kind: str) -> Transport:
    if kind == "nixl":
        from kvmem.transport.nixl import NixlTransport

        return NixlTransport(scratch_bytes=1 << 20)
    if kind == "mooncake":
        from kvmem.transport.mooncake import MooncakeTransport

        return MooncakeTransport(scratch_bytes=1 << 20)
    return SocketTransport()


def need(kind: str) -> None:
    """Skip the test where the package of the transport is missing."""
    names = {"nixl": "nixl._api", "mooncake": "mooncake.engine"}
    if kind in names:
        pytest.importorskip(names[kind], exc_type=ImportError, reason=f"no {kind}: make transport-peers")


def capacity_of(blocks: int, block_bytes: int = LARGEST) -> int:
    """Bytes of an exposed tier that holds so many blocks."""
    one = Directory.of(1 << 30, block_bytes).slot_bytes
    return next(
        n for n in range(blocks * one, 1 << 30, 64) if Directory.of(max(n, one + 2000), block_bytes).slots == blocks
    )


def pattern(count: int, seed: int) -> bytes:
    """Bytes of which no two places within reach of each other look the same."""
    return (np.arange(-(-count // 8), dtype="<u8") * 8 + seed).tobytes()[:count]


def _expose(kind: str, count: int, seed: int, pipe: Connection) -> None:
    transport = open_transport(kind)
    memory = memoryview(mmap.mmap(-1, count)).cast("B")
    memory[:] = pattern(count, seed)
    pipe.send(transport.expose(memory))
    pipe.recv()


def _expose_tier(kind: str, blocks: int, rewrite: bool, pipe: Connection) -> None:
    """A tier with keys 0 to blocks - 1. rewrite: puts other versions and other keys for ever."""
    transport = open_transport(kind)
    tier = ExposedTier(transport, capacity=capacity_of(blocks), block_bytes=LARGEST)
    put(tier, {key_of(n): payload_of(key_of(n), 1, LARGEST) for n in range(blocks)})
    pipe.send(tier.address)
    version = 1
    while rewrite and not pipe.poll():
        version += 1
        for n in range(2 * blocks):
            put(tier, {key_of(n): payload_of(key_of(n), version, LARGEST)})
    pipe.recv()


@contextmanager
def other_process(work: Any, *args: Any) -> Iterator[tuple[Any, bytes]]:
    """A process that does ``work(*args, pipe)``, and the address that it has sent."""
    mine, theirs = PROCESSES.Pipe()
    process = start(work, *args, theirs)
    theirs.close()
    try:
        assert mine.poll(60), "the other process has sent no address"
        yield process, mine.recv()
    finally:
        kill(process)
        mine.close()


def exposed(kind: str, count: int, seed: int) -> Any:
    return other_process(_expose, kind, count, seed)


def exposed_tier(kind: str, blocks: int, rewrite: bool = False) -> Any:
    return other_process(_expose_tier, kind, blocks, rewrite)
