"""Prefetches behind the all-reduces of two ranks over gloo on this machine: blocks from a disk to host memory, and KV
from memory to the CPU's caches; wall time beside the same reads after the all-reduces, and beside the virtual clock.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kvmem import Allocator, CacheSpec
from kvmem.allocator.prefetch import Window
from kvmem.bench.timing import WARM_UP, Ratio, Spread
from kvmem.plan import play, prefetch
from kvmem.plan.clock import Clock
from kvmem.tiers import Identity, Tiers, largest_block_bytes
from kvmem.tiers.disk import DiskTier

__all__ = ["PrefetchRow", "near_prefetch"]

_SPEC = CacheSpec.kv(num_layers=8, num_kv_heads=4, head_dim=64, dtype="float16", block_size=64)
_WINDOWS, _BLOCKS = 8, 48
_PROMPT = list(range(_BLOCKS * 64 + 1))
_SIZES: dict[str, Any] = dict(device="cpu", memory="64MiB", max_sequences=2, max_tokens=4096)
_Way = Literal["collective", "after", "behind"]


@dataclass(frozen=True)
class PrefetchRow:
    """One pass over ``windows`` all-reduces, with ``window_bytes`` read for each, on rank 0.

    medium: ``"disk"``, to host memory, or ``"memory"``, to the CPU's caches. collective_us: the all-reduces alone.
    after_us: each read after its all-reduce; behind_us: prefetched while that runs. share: of the second in the first,
    by repetition. predicted_us: the second by the virtual clock, from the medians of the other two; error: of that.
    """

    medium: str
    windows: int
    window_bytes: int
    collective_us: Spread
    after_us: Spread
    behind_us: Spread
    share: Ratio
    predicted_us: float
    error: float


@dataclass(frozen=True)
class _Reads:
    """windows: what is read. use(i): computes with what the i-th brings. waits: whether that must be there first."""

    alloc: Allocator
    windows: list[Window]
    use: Callable[[int], object]
    waits: bool

    def run(self, way: _Way, partial: torch.Tensor) -> int:
        """Nanoseconds of a pass."""
        if self.waits:
            self.alloc.tiering.clear()  # the blocks are on disk only
        dist.barrier()
        start = time.perf_counter_ns()
        for i, window in enumerate(self.windows):
            reading = self.alloc.prefetch(window) if way == "behind" else None
            dist.all_reduce(partial)
            if way != "collective":
                if self.waits:
                    (reading or self.alloc.prefetch(window)).wait()
                self.use(i)
        return time.perf_counter_ns() - start


def near_prefetch(
    folder: Path | None = None, *, repetitions: int = 10, collective_bytes: int = 8 << 20
) -> list[PrefetchRow]:
    """Return a row for each medium. folder: on the disk to measure; default where temporary files are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory(dir=folder) as temporary:
        rows = mp.get_context("spawn").SimpleQueue()
        args = (port, temporary, rows, repetitions, collective_bytes)
        mp.spawn(_rank, args, nprocs=2)  # type: ignore[attr-defined,no-untyped-call]
        return [rows.get() for _ in ("disk", "memory")]


def _rank(rank: int, port: int, folder: str, rows: Any, repetitions: int, collective_bytes: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    partial = torch.zeros(collective_bytes // 4)
    for medium, opened in (("disk", _from_disk(Path(folder) / str(rank), rank)), ("memory", _from_memory())):
        times: dict[_Way, list[int]] = {"collective": [], "after": [], "behind": []}
        with opened as reads:
            for repetition in range(WARM_UP + repetitions):
                for way, found in times.items():
                    took = reads.run(way, partial)
                    found += [took] * (repetition >= WARM_UP)
            if rank == 0:
                rows.put(_row(medium, reads.windows, times))
    dist.destroy_process_group()


def _row(medium: str, windows: list[Window], times: dict[_Way, list[int]]) -> PrefetchRow:
    alone, after, behind = (Spread.of_ns(found) for found in times.values())
    reads = [window.parts for window in windows]
    rate = sum(window.num_bytes for window in windows) / max(1e-3, after.median - alone.median)  # bytes a microsecond
    clock, seconds = Clock(), alone.median / len(windows)
    ideal = prefetch(reads, window_seconds=seconds, bytes_per_second=rate, budget_bytes="1GiB")
    play(clock, ideal, bytes_per_second=rate)
    predicted = float(clock.now)
    return PrefetchRow(
        medium, len(windows), windows[0].num_bytes, alone, after, behind, Ratio.of(times["behind"], times["after"]),
        predicted, predicted / behind.median - 1,
    )  # fmt: skip


@contextmanager
def _from_disk(folder: Path, rank: int) -> Iterator[_Reads]:
    me, size = Identity("bench", rank=rank, ranks=2), largest_block_bytes(_SPEC)
    with DiskTier(folder, block_bytes=size, fingerprint=me.fingerprint(_SPEC), capacity="64MiB") as tier:
        tiers = Tiers(host="64MiB", lower=[tier], identity=me)
        with Allocator(_SPEC, tiers=tiers, **_SIZES) as alloc:
            with alloc.sequence() as sequence:
                sequence.extend(_BLOCKS * 64)
                sequence.commit(_PROMPT[:-1])
            alloc.store(_PROMPT)
            alloc.flush()
            alloc.clear_cache()
            alloc.tiering.clear()
            blocks = alloc.block_set(_PROMPT, to="host")
            share = blocks.num_bytes // _WINDOWS
            windows = prefetch([blocks] * _WINDOWS, window_seconds=1, bytes_per_second=share, budget_bytes=share)
            yield _Reads(alloc, windows, lambda i: None, True)


@contextmanager
def _from_memory() -> Iterator[_Reads]:
    with Allocator(_SPEC, interleave="none", **_SIZES) as alloc, alloc.sequence() as sequence:
        sequence.extend(4000)
        sequence.commit(count=4000)
        caches = [sequence.kv(layer) for layer in range(_SPEC.num_layers)]
        for k, v in caches:
            k.fill_(1), v.fill_(1)
        sets = [alloc.read_set(layer, [sequence]) for layer in range(_SPEC.num_layers)]
        windows = prefetch(sets, window_seconds=1, bytes_per_second=1 << 40, budget_bytes="1GiB")
        yield _Reads(alloc, windows, lambda i: [one.view(torch.int16).amax() for one in caches[i]], False)
