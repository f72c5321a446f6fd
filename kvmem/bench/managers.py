"""kvmem as the workload of `kvmem.bench.workload` drives it: batched, and a call a sequence."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Literal

import numpy as np

from kvmem.bench.memory import Backend
from kvmem.bench.model import load_model
from kvmem.bench.pools import Int32s
from kvmem.bench.workload import Workload

if TYPE_CHECKING:
    from kvmem import Allocator, CacheSpec, Sequence

__all__ = ["Batched", "OneByOne", "heap_bytes", "open_books"]

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
    """A step is one call for the whole batch, and writes all metadata, as far as it has changed."""

    def __init__(self, workload: Workload, allocator: Allocator) -> None:
        self.workload, self.allocator = workload, allocator
        self.ids = np.zeros(workload.sequences, np.int32)
        self.batch = allocator.make_batch(max_new_tokens=workload.sequences, max_tokens=workload.max_tokens)
        self.sequences: list[Sequence | None] = [None] * workload.sequences

    def admit(self, i: int, prompt: Int32s) -> None:
        sequence = self.allocator.sequence(prompt if self.workload.cache else None)
        cached = sequence.num_cached_tokens
        sequence.extend(len(prompt) - cached)
        sequence.commit(prompt[cached:])
        self.ids[i] = sequence.id
        self.sequences[i] = sequence

    def step(self, last: Int32s | None) -> None:
        self.allocator.step(self.ids, self.batch, tokens=last if self.workload.cache else None)

    def release(self, i: int) -> None:
        sequence = self.sequences[i]
        assert sequence is not None
        sequence.free()

    def forget(self) -> None:
        self.allocator.clear_cache()


class OneByOne(Batched):
    """For schedulers that ask for one request at a time: a step is two calls a sequence, and no metadata."""

    def step(self, last: Int32s | None) -> None:
        for i, sequence in enumerate(self.sequences):
            assert sequence is not None
            if last is not None:
                sequence.commit(last[i : i + 1] if self.workload.cache else 1)
            sequence.extend(1)


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
