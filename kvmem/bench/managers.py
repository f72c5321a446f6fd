"""kvmem as the workload of `kvmem.bench.workload` drives it: batched, a call a sequence, and by `SchedulerCache`."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Literal

import numpy as np

from kvmem.bench.memory import Backend
from kvmem.bench.model import load_model
from kvmem.bench.pools import Int32s
from kvmem.bench.workload import Manager, Workload

if TYPE_CHECKING:
    from kvmem import Allocator, CacheSpec, Sequence

__all__ = ["Batched", "ByRequest", "OneByOne", "heap_bytes", "open_books", "open_manager"]

_MALLINFO2 = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
_TRASH_BLOCKS = 2
_PAGE_BYTES = {"meta": 2 << 20, "cpu": 64 << 10}


def open_books(workload: Workload, backend: Backend, device: Literal["meta", "cpu"] = "meta") -> Allocator:
    """An allocator with room for ``workload.pool`` blocks. ``"meta"``: Llama 3 8B, of which a block is a page of 2 MiB;
    ``"cpu"``: real memory, with 64 bytes a token.
    """
    from kvmem import Allocator

    spec = _spec(workload, device)
    page_bytes = _PAGE_BYTES[device]
    block_bytes = spec.bytes_per_token * workload.block
    room = -(-(workload.pool + _TRASH_BLOCKS) * block_bytes // page_bytes) * page_bytes
    if device == "cpu":  # a row ends anywhere in a page
        room += workload.sequences * page_bytes
    return Allocator(
        spec,
        backend=backend,
        device=device,
        memory=room,
        max_sequences=workload.sequences,
        max_tokens=workload.max_tokens,
        page_bytes=page_bytes,
        map_ahead_tokens=0,
        tail_guard_tokens=0,
        prefix_cache=workload.cache,
    )


def _spec(workload: Workload, device: str) -> CacheSpec:
    if device == "meta":
        return load_model(None, dtype="bfloat16", block_size=workload.block).spec
    from kvmem import CacheSpec

    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "num_key_value_heads": 1}  # fmt: skip
    return CacheSpec.from_config(config, dtype="bfloat16", block_size=workload.block)


class Batched:
    """A step is one call for the whole batch, and writes all metadata, as far as it has changed.

    Without a prefix cache an admission is one call too: there is nothing to publish, and the first step commits the
    prompt with all else that is reserved. The floor's admission does no more.
    """

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        self.workload, self.allocator = workload, allocator
        self.ids = np.zeros(workload.sequences, np.int32)
        self.batch = allocator.make_batch(max_new_tokens=workload.sequences, max_tokens=workload.max_tokens)
        self.each = [self.ids[i : i + 1] for i in range(workload.sequences)]
        self.prompt = np.full(1, workload.prompt, np.int32)

    def admit(self, i: int, prompt: Int32s) -> None:
        ids, cached = self.allocator.admit_batch(prompt)
        self.ids[i] = ids.item()
        if self.workload.cache:
            rest = prompt[cached.item() :]
            count = self.prompt if len(rest) == len(prompt) else self.prompt - cached
            self.allocator.commit_batch(self.each[i], count, rest)

    def step(self, last: Int32s | None) -> None:
        self.allocator.step(self.ids, self.batch, tokens=last if self.workload.cache else None)

    def release(self, i: int) -> None:
        self.allocator.free_batch(self.each[i])

    def forget(self) -> None:
        self.allocator.clear_cache()


class OneByOne:
    """For schedulers that ask for one request at a time: a step is a call a sequence, and no metadata."""

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        self.workload, self.allocator = workload, allocator
        self.sequences: list[Sequence] = []

    def admit(self, i: int, prompt: Int32s) -> None:
        sequence = self.allocator.sequence(prompt if self.workload.cache else None)
        cached = sequence.num_cached_tokens
        sequence.extend(len(prompt) - cached)
        sequence.commit(prompt[cached:])
        self.sequences.append(sequence)

    def step(self, last: Int32s | None) -> None:
        if last is None or not self.workload.cache:
            for sequence in self.sequences:
                sequence.step()
        else:
            for i, sequence in enumerate(self.sequences):
                sequence.step(1, last[i : i + 1])

    def release(self, i: int) -> None:
        self.sequences.pop(0).free()

    def forget(self) -> None:
        self.allocator.clear_cache()


class ByRequest:
    """`SchedulerCache`, asked about one request at a time, as vLLM's scheduler asks its manager: a step is a call a
    request, takes what each answer changes into a block table, and the events; all metadata: that table is copied to
    where kernels read it. As with `Batched`, the first step commits a prompt that is not to be found.
    """

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        from kvmem import SchedulerCache

        self.workload, self.allocator = workload, allocator
        self.cache = SchedulerCache(allocator)
        self.table = np.zeros((workload.sequences, workload.max_tokens // workload.block), np.int32)
        self.read_table = np.zeros_like(self.table)

    def admit(self, i: int, prompt: Int32s) -> None:
        cached = self.workload.cache
        began = self.cache.allocate(i, tokens=prompt) if cached else self.cache.allocate(i, len(prompt))
        assert began is not None, "the pool is too small"
        began.write(self.table, i)
        if cached:
            self.cache.publish(i, prompt[self.cache.num_cached_tokens(i) :]).write(self.table, i)

    def step(self, last: Int32s | None) -> None:
        step, table, n = self.cache.step, self.table, self.workload.sequences
        ids = [None] * n if last is None or not self.workload.cache else [[token] for token in last.tolist()]
        for i, tokens in enumerate(ids):
            written = step(i, 1, tokens)
            assert written is not None, "the pool is too small"
            if written:
                written.write(table, i)
        self.cache.take_events()
        if self.workload.metadata:
            np.copyto(self.read_table, self.table)

    def release(self, i: int) -> None:
        self.cache.free(i)

    def forget(self) -> None:
        self.cache.clear_cache()


def open_manager(name: str, workload: Workload) -> Manager:
    """By name: ``paged`` or ``virtual``, then ``cpu`` for real memory, ``one by one`` for a call a sequence,
    ``SchedulerCache`` for that.
    """
    words = name.split(", ")
    backend: Backend = "paged" if words[0] == "paged" else "virtual"
    allocator = open_books(workload, backend, "cpu" if "cpu" in words else "meta")
    if "SchedulerCache" in words:
        return ByRequest(workload, allocator)
    return OneByOne(workload, allocator) if "one by one" in words else Batched(workload, allocator)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]


def heap_bytes() -> int | None:
    """Bytes that malloc has given out in this process; Python's own small objects lie elsewhere. None without glibc."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)
