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
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kvmem import Allocator, CacheSpec
from kvmem.allocator.prefetch import BlockSet, ReadSet, Window
from kvmem.bench.timing import Ratio, Spread
from kvmem.plan.clock import Clock
from kvmem.plan.prefetch import play, prefetch
from kvmem.tiers import Identity, Tiers, largest_block_bytes
from kvmem.tiers.disk import DiskTier

__all__ = ["PrefetchRow", "near_prefetch"]

_SPEC = CacheSpec.kv(num_layers=8, num_kv_heads=4, head_dim=64, dtype="float16", block_size=64)
_WINDOWS, _BLOCKS = 8, 48
_PROMPT = list(range(_BLOCKS * 64 + 1))
_SIZES: dict[str, Any] = dict(device="cpu", memory="64MiB", max_sequences=2, max_tokens=4096)


@dataclass(frozen=True)
class PrefetchRow:
    """One pass over ``windows`` all-reduces, with ``window_bytes`` read for each; of rank 0.

    medium: ``"disk"``, to host memory, or ``"memory"``, to the CPU's caches. collective_us: the all-reduces alone.
    after_us: each read after its all-reduce; behind_us: prefetched while that runs. share: of the second in the first,
    by repetition. predicted_us: the second by the virtual clock, from the medians of the other two. error: of that.
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


def near_prefetch(
    folder: Path | None = None, *, repetitions: int = 10, collective_bytes: int = 8 << 20
) -> list[PrefetchRow]:
    """Return a row for each medium. folder: on the disk to measure; default where temporary files are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory(dir=folder) as temporary:
        context = mp.get_context("spawn")
        rows = context.SimpleQueue()
        args = (port, temporary, rows, repetitions, collective_bytes)
        mp.spawn(_rank, args, nprocs=2)  # type: ignore[no-untyped-call]
        return [rows.get() for _ in ("disk", "memory")]


def _rank(rank: int, port: int, folder: str, rows: Any, repetitions: int, collective_bytes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    partial = torch.zeros(collective_bytes // 4)
    with _from_disk(Path(folder) / str(rank), rank) as disk, _from_memory() as memory:
        for medium, reads in (("disk", disk), ("memory", memory)):
            row = _measure(medium, reads, partial, repetitions)
            if rank == 0:
                rows.put(row)
    dist.destroy_process_group()


class _Reads:
    """What each window reads: ``fetch(window)`` does it at once, ``use(i)`` computes with it."""

    def __init__(self, alloc: Allocator, sets: list[BlockSet] | list[ReadSet], use: Callable[[int], object]) -> None:
        size = sets[0].num_bytes if isinstance(sets[0], ReadSet) else sets[0].num_bytes // _WINDOWS
        fits: dict[str, Any] = dict(window_seconds=1, bytes_per_second=size, budget_bytes="1GiB")
        self.alloc, self.plan, self.use, self.window_bytes = alloc, prefetch(sets, **fits), use, size
        self.waits = isinstance(sets[0], BlockSet)  # for what is not in host memory, a computation has to

    def forget(self) -> None:
        """The next pass finds the blocks on disk only."""
        if self.waits:
            self.alloc.tiering.clear()

    def all(self, i: int, window: Window | None) -> None:
        """Read and use what the i-th window brings; window: None if it was prefetched."""
        if window is not None and self.waits:
            self.alloc.prefetch(window).wait()
        self.use(i)


def _measure(medium: str, reads: _Reads, partial: torch.Tensor, repetitions: int) -> PrefetchRow:
    times: dict[str, list[int]] = {"collective": [], "after": [], "behind": []}
    for _ in range(2 + repetitions):
        for way, found in times.items():
            reads.forget()
            dist.barrier()
            start = time.perf_counter_ns()
            for i, window in enumerate(reads.plan):
                under_way = reads.alloc.prefetch(window) if way == "behind" else None
                dist.all_reduce(partial)
                if under_way is not None and reads.waits:
                    under_way.wait()
                if way != "collective":
                    reads.all(i, window if way == "after" else None)
            found.append(time.perf_counter_ns() - start)
    spreads = {way: Spread.of_ns(found[2:]) for way, found in times.items()}
    predicted = _predict(reads.plan, spreads)
    measured = spreads["behind"].median
    ratio = Ratio.of(times["behind"][2:], times["after"][2:])
    return PrefetchRow(medium, len(reads.plan), reads.window_bytes, *spreads.values(), ratio, predicted,
                       (predicted - measured) / measured)  # fmt: skip


def _predict(plan: list[Window], spreads: dict[str, Spread]) -> float:
    """Return the time of the plan on the virtual clock, in microseconds."""
    window = spreads["collective"].median / len(plan)
    rate = sum(w.num_bytes for w in plan) / max(1e-3, spreads["after"].median - spreads["collective"].median)
    reads = [part for w in plan for part in w.parts]
    clock = Clock()
    play(
        clock, prefetch(reads, window_seconds=window, bytes_per_second=rate, budget_bytes="1GiB"), bytes_per_second=rate
    )
    return float(clock.now)


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
            yield _Reads(alloc, [blocks] * _WINDOWS, lambda i: None)


@contextmanager
def _from_memory() -> Iterator[_Reads]:
    with Allocator(_SPEC, interleave="none", **_SIZES) as alloc, alloc.sequence() as sequence:
        sequence.extend(4000)
        sequence.commit(count=4000)
        caches = [sequence.kv(layer) for layer in range(_SPEC.num_layers)]
        for cache in caches:
            for one in cache:
                one.fill_(1)
        sets = [alloc.read_set(layer, [sequence]) for layer in range(_SPEC.num_layers)]
        yield _Reads(alloc, sets, lambda i: [one.view(torch.int16).amax() for one in caches[i]])
