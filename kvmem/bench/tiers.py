"""Tiers beside their plain limits: host memory beside memcpy, a disk beside reads in order, Redis beside a socket; the
cost of verification, the prompt length from which on loading is faster than prefill, and a trace replayed with tiers.

A tier and its limit move the same bytes in turn, so that a slow moment of the machine affects both.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import thread_time_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmem import Allocator, CacheSpec, _core
from kvmem.bench.model import BACKENDS, Backend, Model
from kvmem.bench.reuse import Workload, replay_tiers
from kvmem.bench.text import BenchError, Progress
from kvmem.bench.timing import Ratio, Spread, in_turn
from kvmem.tiers import Tier, Tiers
from kvmem.tiers.base import Buffer

_GOAL = 0.9  # the share of the plain limit that a tier should reach
_SERVER_SECONDS = 30.0
_Memory = dict[Backend, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class TierRow:
    """A run of ``blocks`` moved by one call of a tier, and by its plain ``limit``.

    ``us``, ``limit_us``: of the run; ``bytes_per_second``, ``limit_bytes_per_second``: at the median. ``share``: of the
    limit's speed, by repetition. ``goal``: for its median, or None.
    """

    tier: str
    call: str
    blocks: int
    block_bytes: int
    us: Spread
    bytes_per_second: float
    limit: str
    limit_us: Spread
    limit_bytes_per_second: float
    share: Ratio
    goal: float | None

    @classmethod
    def of(cls, what: tuple[str, str, int, int], limit: str, times: Sequence[int], limit_times: Sequence[int],
           goal: float | None = _GOAL) -> TierRow:  # fmt: skip
        """``what``: tier, call, blocks, and bytes of a block."""
        us, limit_us, size = Spread.of_ns(times), Spread.of_ns(limit_times), 1e6 * what[2] * what[3]
        speeds = size / us.median, size / limit_us.median
        return cls(*what, us, speeds[0], limit, limit_us, speeds[1], Ratio.of(limit_times, times), goal)


@dataclass(frozen=True)
class VerificationRow:
    """The checksum of a run of ``blocks`` over the time of the disk's ``get`` of it."""

    blocks: int
    block_bytes: int
    us: Spread
    share: Ratio
    goal: float = 0.1


@dataclass(frozen=True)
class BreakEvenRow:
    """Loading from a tier beside computing again at ``prefill_tokens_per_second``.

    ``start_us``: before the first block moves, and ``tokens_per_second`` from then on: a line through the times of the
    shortest and the longest run. ``least_tokens``: from which prompt length on loading is faster; None: never.
    """

    tier: str
    start_us: float
    tokens_per_second: float
    prefill_tokens_per_second: float
    least_tokens: int | None


class _Host:
    """One backend's allocator on the CPU, whose content goes to host memory and comes back."""

    def __init__(self, spec: CacheSpec, backend: Backend, blocks: int) -> None:
        size = spec.groups[0].block_size
        block_bytes, self.tokens = spec.bytes_per_token * size, blocks * size
        # A page is a block, as on a GPU; hardly more of them than needed, so that all have been touched soon.
        self.alloc = Allocator(
            spec, backend=backend, device="cpu", memory=(blocks + 2) * block_bytes, page_bytes=block_bytes,
            max_sequences=2, max_tokens=self.tokens + size, interleave="all", tail_guard_tokens=0,
            tiers=Tiers(host=(blocks + 2) * block_bytes),
        )  # fmt: skip
        self.ids = np.arange(self.tokens + 1, dtype=np.int32)
        with self.alloc.sequence() as sequence:
            sequence.extend(self.tokens)
            sequence.commit(self.ids[:-1])

    def store(self) -> None:
        self.alloc.store(self.ids)

    def leave_device(self) -> None:
        """What the device has goes to host memory, and it has nothing."""
        self.alloc.core.clear_cache()
        self.alloc.tiering.settle()

    def promote(self) -> None:
        with self.alloc.sequence(self.ids) as sequence:
            if sequence.num_cached_tokens != self.tokens:
                raise BenchError(f"host memory gave {sequence.num_cached_tokens} of {self.tokens} tokens back")


def host(spec: CacheSpec, blocks: int, repetitions: int) -> list[TierRow]:
    """Runs of ``blocks`` from the device to host memory and back, on both backends: CPU time of one thread.

    The device of a CPU is shared memory in small pages, and so is that of the memcpy. On the virtual backend pages are
    mapped for what comes back, and the first touch of each is a fault, which a GPU does not have: its limit does both.
    """
    size = spec.bytes_per_token * spec.groups[0].block_size
    rigs = {backend: _Host(spec, backend, blocks) for backend in BACKENDS}
    # Memory of its own for each, or the copies would find more in the processor's caches than the tiers.
    files = {backend: os.memfd_create("bench") for backend in BACKENDS}
    device = {backend: _mapped(fd, blocks * size) for backend, fd in files.items()}
    memory = {backend: np.ones(blocks * size, np.uint8) for backend in BACKENDS}

    def memcpy(source: _Memory, target: _Memory, backend: Backend) -> None:  # block by block, as the tier copies
        if target is device and backend == "virtual":
            device[backend] = _mapped(files[backend], blocks * size)
        for first in range(0, blocks * size, size):
            target[backend][first : first + size] = source[backend][first : first + size]

    def after(name: str, result: object) -> None:
        if name.startswith("store"):
            rigs[name.split()[1]].leave_device()  # type: ignore[index]

    calls: dict[str, Callable[[], object]] = {}
    for call, source, target in (("store", device, memory), ("promote", memory, device)):
        calls |= {f"{call} {backend}": getattr(rig, call) for backend, rig in rigs.items()}
        calls |= {f"limit of {call} {backend}": partial(memcpy, source, target, backend) for backend in BACKENDS}
    times = in_turn(calls, repetitions, clock=thread_time_ns, look=after)
    for fd in files.values():
        os.close(fd)
    limits = dict.fromkeys(calls, "memcpy") | {"promote virtual": "mmap and memcpy"}
    return [
        TierRow.of((f"host, {backend}", call, blocks, size), limits[name], times[name], times[f"limit of {name}"])
        for backend in BACKENDS
        for call in ("store", "promote")
        for name in [f"{call} {backend}"]
    ]


def _mapped(fd: int, size: int) -> npt.NDArray[np.uint8]:
    os.ftruncate(fd, size)
    return np.frombuffer(mmap.mmap(fd, size), np.uint8)


def _run_of(blocks: int, block_bytes: int) -> tuple[list[bytes], list[Buffer], list[Buffer]]:
    """Keys, payloads that no store can compress, and buffers for them that lie on pages."""
    draw = np.random.default_rng(blocks)
    keys = [hashlib.sha256(b"%d of %d" % (i, blocks)).digest() for i in range(blocks)]
    memory = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(2 * blocks)]
    for view in memory[:blocks]:
        view[:] = draw.bytes(block_bytes)
    return keys, memory[:blocks], memory[blocks:]


class _Store:
    """A tier that is measured through its interface; all results must be right."""

    def __init__(self, tier: Tier, blocks: int, block_bytes: int) -> None:
        self.tier, (self.keys, self.payloads, self.buffers) = tier, _run_of(blocks, block_bytes)

    def put(self) -> None:
        self._check(self.tier.put(self.keys, self.payloads))

    def get(self) -> None:
        self._check(self.tier.get(self.keys, self.buffers))

    def _check(self, results: Sequence[Any]) -> None:
        if bad := next((result for result in results if not result.ok), None):
            raise BenchError(f"{self.tier.name}: {bad.reason}")


def disk(folder: Path, blocks: int, block_bytes: int, repetitions: int) -> tuple[list[TierRow], VerificationRow]:
    """Runs of ``blocks`` in files in ``folder``, which must be on the disk that is meant, beside files read and written
    in order past the page cache, block by block; and the checksums that are part of each ``get``.
    """
    from kvmem.tiers.checksum import checksum
    from kvmem.tiers.disk import DiskTier

    capacity, own = (blocks + 2) * (block_bytes + 2 * mmap.PAGESIZE), folder / f"tier_{blocks}"
    with DiskTier(own, capacity=capacity, block_bytes=block_bytes, fingerprint=bytes(32)) as tier:
        store = _Store(tier, blocks, block_bytes)
        with _plain_file(folder / f"plain_{blocks}") as fd:
            calls: dict[str, Callable[[], object]] = {
                "write": lambda: [os.pwritev(fd, [p], i * block_bytes) for i, p in enumerate(store.payloads)],
                "put": store.put,
                "read": lambda: [os.preadv(fd, [b], i * block_bytes) for i, b in enumerate(store.buffers)],
                "get": store.get,
                "verify": lambda: [checksum(buffer) for buffer in store.buffers],
            }
            times = in_turn(calls, repetitions)
    shutil.rmtree(own)
    size = blocks, block_bytes
    rows = [
        TierRow.of(("disk", "get", *size), "reads in order", times["get"], times["read"]),
        TierRow.of(("disk", "put", *size), "writes in order", times["put"], times["write"], None),
    ]
    return rows, VerificationRow(*size, Spread.of_ns(times["verify"]), Ratio.of(times["verify"], times["get"]))


@contextmanager
def _folder(within: Path | None) -> Iterator[Path]:
    try:
        made = TemporaryDirectory(dir=within)
    except OSError as error:
        raise BenchError(f"--folder: cannot make a folder in {within}: {error.strerror}") from error
    with made as name:
        yield Path(name)


@contextmanager
def _plain_file(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        raise BenchError(f"--folder: {path.parent} has no O_DIRECT ({error.strerror}); name one on a disk") from error
    try:
        yield fd
    finally:
        os.close(fd)
        path.unlink()


def redis(program: str, blocks: int, block_bytes: int, repetitions: int) -> list[TierRow]:
    """Runs of ``blocks`` in a server on this machine, beside the same bytes through a bare TCP socket of it."""
    from kvmem.tiers.redis import RedisTier

    with ExitStack() as stack:
        command = redis_command(program, port := free_port(), (64 << 20) + 4 * blocks * block_bytes)
        stack.enter_context(listening(command, port))
        store = _Store(stack.enter_context(RedisTier(f"redis://127.0.0.1:{port}", check=True)), blocks, block_bytes)
        receive = stack.enter_context(_socket(store.payloads, store.buffers))
        times = in_turn({"put": store.put, "socket": receive, "get": store.get}, repetitions)
    return [
        TierRow.of(("redis", call, blocks, block_bytes), "a socket", times[call], times["socket"], None)
        for call in ("get", "put")
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def redis_command(program: str, port: int, most_bytes: int) -> list[str]:
    """Of a server that saves nothing and listens on this machine only."""
    words = f"--port {port} --bind 127.0.0.1 --appendonly no --daemonize no --maxmemory {most_bytes} --save".split()
    return [program, *words, ""]


@contextmanager
def listening(command: Sequence[str], port: int) -> Iterator[None]:
    """A server that listens on the port of this machine, until the end of the block."""
    try:
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise BenchError(f"cannot start {command[0]}: {error.strerror}") from error
    try:
        end = time.monotonic() + _SERVER_SECONDS
        while time.monotonic() < end and server.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        else:
            raise BenchError(f"{command[0]} does not listen on port {port} (exit code {server.poll()})")
        yield
    finally:
        server.kill()
        server.wait()


@contextmanager
def _socket(payloads: Sequence[Buffer], buffers: Sequence[Buffer]) -> Iterator[Callable[[], None]]:
    """Yields a function that asks a thread for all payloads and receives them in the buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()

    def serve() -> None:
        while there.recv(1):
            for payload in payloads:
                there.sendall(payload)

    def receive() -> None:
        here.sendall(b"?")
        for buffer in buffers:
            here.recv_into(buffer, len(buffer), socket.MSG_WAITALL)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield receive
    finally:
        here.close()
        thread.join()
        there.close()


class TierBench:
    """What was asked for, checked before anything is measured. ``steps``: for a bar of progress. ``runs``: blocks that
    are moved at once, ``"16,64"``. ``redis_server``: the program, or None. ``prefill_tokens_per_second``: or None.
    """

    def __init__(
        self, model: Model, workload: Workload, *, repetitions: int, runs: str, folder: Path | None,
        redis_server: str | None, device_blocks: int, host_blocks: int, prefill_tokens_per_second: float | None,
    ) -> None:  # fmt: skip
        self.runs = sorted({int(word) for word in runs.split(",") if re.fullmatch("[1-9][0-9]{0,4}", word)})
        if len(self.runs) != runs.count(",") + 1:
            raise BenchError(f"--runs: got {runs!r}; give different numbers of blocks, from 1 on, such as 16,64")
        if len(model.spec.groups) > 1 or model.spec.fixed_bytes:
            raise BenchError(f"{model.name}: has {len(model.spec.groups)} groups; this measures models with one")
        if device_blocks < workload.longest:
            raise BenchError(f"--device-blocks is {device_blocks}; the longest request has {workload.longest} blocks")
        self.model, self.workload, self.folder, self.repetitions = model, workload, folder, repetitions
        self.sizes, self.prefill = (device_blocks, host_blocks), prefill_tokens_per_second
        self.redis_server = redis_server or shutil.which("redis-server")
        self.steps = 3 * len(self.runs) + len(BACKENDS) * len(_core.eviction_policy_names()) ** 2
        self.setup = {
            "model": model.name, "bytes_per_token": model.bytes_per_token, "repetitions": repetitions,
            "redis": self.redis_server is not None, "trace": workload.facts,
        }  # fmt: skip

    def measure(self, done: Progress = lambda count: None) -> dict[str, list[Any]]:
        """Rows by part."""
        spec, tiers, checks = self.model.spec, list[TierRow](), list[VerificationRow]()
        block_tokens = spec.groups[0].block_size
        with _folder(self.folder) as folder:
            for i, blocks in enumerate(self.runs):
                size = blocks, block_tokens * spec.bytes_per_token, self.repetitions
                tiers += host(spec, blocks, self.repetitions)
                done(3 * i + 1)
                rows, check = disk(folder, *size)
                tiers, checks = tiers + rows, [*checks, check]
                done(3 * i + 2)
                tiers += redis(self.redis_server, *size) if self.redis_server else []
                done(3 * i + 3)
        tiers.sort(key=lambda row: row.tier)
        even = break_even(tiers, block_tokens, self.prefill) if self.prefill and len(self.runs) > 1 else []
        found = replay_tiers(self.workload, *self.sizes, lambda count: done(3 * len(self.runs) + count))
        return {"tiers": tiers, "verification": checks, "break_even": even, "tier_replay": found}


def break_even(rows: Sequence[TierRow], block_tokens: int, prefill: float) -> list[BreakEvenRow]:
    """A row for each tier with runs of two lengths. ``prefill``: tokens a second."""
    found = []
    back = [row for row in rows if row.call in ("promote", "get")]
    for tier in dict.fromkeys(row.tier for row in back):
        short, *_, long = sorted((row for row in back if row.tier == tier), key=lambda row: row.blocks)
        each = (long.us.median - short.us.median) / ((long.blocks - short.blocks) * block_tokens)  # us a token
        start, saved = max(0.0, short.us.median - each * short.blocks * block_tokens), 1e6 / prefill - each
        least = int(start / saved) + 1 if saved > 0 else None
        found.append(BreakEvenRow(tier, start, 1e6 / each if each > 0 else float("inf"), prefill, least))
    return found
