"""Attention where the bytes are beside copying them first: host slots and a disk, by context, and SparF on the disk.

Both sides compute the same attention on this machine's CPU, so a row shows what the copy costs, not what a GPU gains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kvmem import Allocator, CacheSpec
from kvmem.bench.text import Progress
from kvmem.bench.tiers import _folder, _plain_file
from kvmem.bench.timing import Ratio, Spread, in_turn
from kvmem.kernels.write import write_kv
from kvmem.near import DiskAttention, HostAttention, Near, SparF
from kvmem.near.compute import attend_blocks
from kvmem.near.store import TOKENS
from kvmem.tiers import Tiers
from kvmem.tiers.disk.file_io import pages

__all__ = ["CrossoverRow", "NearRow", "near_tiers"]

_Attend = Callable[[], object]


@dataclass(frozen=True)
class NearRow:
    """One query token over ``context`` tokens of one layer.

    us: in place. copy_us: the copy, then the attention. speedup: of in place, by repetition. link_bytes,
    media_read_bytes, delivered_bytes: of one call in place (``kvmem.near.Traffic``). copied_bytes: of the other.
    """

    place: str
    context: int
    us: Spread
    copy_us: Spread
    speedup: Ratio
    link_bytes: int
    media_read_bytes: int
    delivered_bytes: int
    copied_bytes: int


@dataclass(frozen=True)
class CrossoverRow:
    """The shortest context measured from which on, in all longer ones too, in place is faster; None: in no such."""

    place: str
    context: int | None


def near_tiers(
    *, kv_heads: int = 8, group: int = 4, width: int = 128, dtype: torch.dtype = torch.float32,
    contexts: Sequence[int] = (64, 256, 1024, 4096, 16384), repetitions: int = 15, folder: Path | None = None,
    done: Progress = lambda count: None,
) -> dict[str, list[NearRow] | list[CrossoverRow]]:  # fmt: skip
    """Return rows by part: ``"near"`` and ``"near_crossover"``. contexts: multiples of 16. folder: on the disk that is
    meant. done: is told how many contexts have been measured.
    """
    rows = list[NearRow]()
    spec = CacheSpec.kv(num_layers=1, num_kv_heads=kv_heads, head_dim=width, dtype=dtype, block_size=TOKENS)
    with _folder(folder) as where:
        for i, context in enumerate(contexts):
            k, v = (torch.randn(context, kv_heads, width).to(dtype) for _ in "kv")
            q = torch.randn(1, kv_heads * group, width).to(dtype)
            rows += [_host(spec, k, v, q, repetitions), *_disk(spec, k, v, q, repetitions, where)]
            done(i + 1)
    rows.sort(key=lambda row: row.place)
    return {"near": rows, "near_crossover": [_crossover(rows, place) for place in dict.fromkeys(r.place for r in rows)]}


def _crossover(rows: Sequence[NearRow], place: str) -> CrossoverRow:
    least = None
    for row in sorted((row for row in rows if row.place == place), key=lambda row: -row.context):
        if row.speedup.median < 1:
            break
        least = row.context
    return CrossoverRow(place, least)


def _row(place: str, near: Near, calls: dict[str, _Attend], names: tuple[str, str], times: dict[str, list[int]],
         context: int, copied: int) -> NearRow:  # fmt: skip
    """names: of the call in place, and of the other."""
    near.traffic.clear()
    calls[names[0]]()
    seen, mine, other = near.traffic, times[names[0]], times[names[1]]
    return NearRow(
        place, context, Spread.of_ns(mine), Spread.of_ns(other), Ratio.of(other, mine),
        seen["link_bytes"], seen["media_read_bytes"], seen["delivered_bytes"], copied,
    )  # fmt: skip


def _host(spec: CacheSpec, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, repetitions: int) -> NearRow:
    """Blocks in host slots; the other side copies them to blocks like a device's first."""
    context, size = len(k), k.nbytes + v.nbytes
    room, ids = 2 * size + (1 << 20), np.arange(context, dtype=np.int32)
    with Allocator(
        spec, backend="paged", device="cpu", memory=room, max_sequences=1, max_tokens=context, tiers=Tiers(host=room)
    ) as alloc:
        with alloc.sequence() as sequence:
            sequence.extend(context)
            write_kv(alloc.kv(0), alloc.batch([sequence]), k, v)
            sequence.commit(ids)
        alloc.core.clear_cache()
        with alloc.hold(ids) as held:
            near, (keys, values, slots) = HostAttention(alloc), held.blocks(spec, 0)
            device = [torch.zeros(len(slots), *x.shape[1:], dtype=x.dtype) for x in (keys, values)]
            table = torch.arange(len(slots)).unsqueeze(0)

            def copy_then_attend() -> None:
                for target, source in zip(device, (keys, values), strict=True):
                    torch.index_select(source, 0, slots, out=target)
                attend_blocks(q, device[0], device[1], table, [context], [1], causal=False)

            calls: dict[str, _Attend] = {"near": partial(near.attend, 0, [held], q), "copy": copy_then_attend}
            times = in_turn(calls, repetitions)
            return _row("host", near, calls, ("near", "copy"), times, context, size)


def _disk(
    spec: CacheSpec, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor, repetitions: int, folder: Path
) -> Iterator[NearRow]:
    """Pages on a disk, by a worker; the other side reads them in order and attends here."""
    context, size, width = len(k), k.nbytes + v.nbytes, k.shape[2]
    eighth = SparF(max(1, width // 8), max(1, context // 16))
    with ExitStack() as stack:
        near = DiskAttention(folder, spec, capacity=3 * size + (1 << 20), k_channels_per_page=4)
        stack.enter_context(near)
        near.open(0)
        near.append(0, [0], k, v)
        attend_copy = stack.enter_context(_read_then_attend(folder / "plain", k, v, q))
        calls: dict[str, _Attend] = {
            "near": partial(near.attend, 0, [0], q),
            "sparse": partial(near.attend, 0, [0], q, sparse=eighth),
            "copy": attend_copy,
        }
        times = in_turn(calls, repetitions)
        yield _row("disk", near, calls, ("near", "copy"), times, context, size)
        yield _row("disk, SparF at 1/8", near, calls, ("sparse", "copy"), times, context, size)


@contextmanager
def _read_then_attend(path: Path, k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> Iterator[_Attend]:
    memory = pages(k.nbytes + v.nbytes)
    rows = torch.frombuffer(memory, dtype=k.dtype).view(2, len(k) // TOKENS, TOKENS, *k.shape[1:])
    rows[0], rows[1] = k.view_as(rows[0]), v.view_as(rows[1])
    table = torch.arange(rows.shape[1]).unsqueeze(0)
    with _plain_file(path) as fd:
        os.pwritev(fd, [memory], 0)

        def read_then_attend() -> None:
            os.preadv(fd, [memory], 0)
            attend_blocks(q, rows[0], rows[1], table, [len(k)], [1], causal=False)

        yield read_then_attend
