"""Prompts with content: what a trace's block ids say is equal is found again by the allocator's prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmem.bench.errors import BenchError
from kvmem.bench.pools import AllocatorPool, Int32s
from kvmem.bench.traces import Trace

if TYPE_CHECKING:
    from kvmem import Allocator

__all__ = ["ContentPool"]

_GENERATED = 1 << 30  # ids of generated tokens begin here
_MOST_GENERATED = 1 << 13  # of a request; beyond that, ids come round


class ContentPool(AllocatorPool):
    """An allocator whose sequences have token ids: position j of the trace's block ``id`` is token ``id * size + j``,
    and what a request generates is its own. Raises `BenchError` for a trace that does not name its blocks.
    """

    def __init__(self, allocator: Allocator, name: str, max_tokens: int, trace: Trace) -> None:
        super().__init__(allocator, name, max_tokens)
        if trace.prefix_ids is None or trace.prefix_offsets is None or not trace.prefix_block_tokens:
            raise BenchError(
                f"{trace.name}: a trace of format {trace.format} has lengths only; --content needs one that names its "
                "blocks (`hash_ids`), such as Mooncake's or Qwen-Bailian's"
            )
        _, self._ids = np.unique(trace.prefix_ids, return_inverse=True)
        self._offsets, self._size, self._inputs = trace.prefix_offsets, trace.prefix_block_tokens, trace.input_tokens
        distinct = int(self._ids.max(initial=-1)) + 1
        if distinct * self._size >= _GENERATED:
            raise BenchError(f"{trace.name}: {distinct:,} blocks are more than have token ids below 2**30")
        self._held: dict[int, tuple[int, int]] = {}  # by handle: the request, and its tokens that are committed

    def admit(self, request: int, tokens: int) -> Int32s | None:
        """As `Pool.admit`; what is cached is taken over, the rest is committed with its ids."""
        prompt = self.tokens(request, 0, tokens)
        handles, cached = self.allocator.admit_batch(prompt)
        if len(handles) == 0:
            return None
        rest = np.array([tokens - cached[0]], dtype=np.int32)
        self.allocator.commit_batch(handles, rest, prompt[cached[0] :])
        self._held[int(handles[0])] = (request, tokens)
        return handles

    def commit(self, ids: Int32s, counts: Int32s) -> None:
        parts = []
        for handle, count in zip(ids.tolist(), counts.tolist(), strict=True):
            request, begin = self._held[handle]
            parts.append(self.tokens(request, begin, begin + count))
            self._held[handle] = (request, begin + count)
        self.allocator.commit_batch(ids, counts, np.concatenate(parts))

    def free(self, ids: Int32s) -> None:
        self.allocator.free_batch(ids)
        for handle in ids.tolist():
            del self._held[handle]

    def tokens(self, request: int, begin: int, end: int) -> Int32s:
        """The ids of tokens [begin, end) of a request: int32 [end - begin]."""
        length = int(self._inputs[request])
        position = np.arange(begin, end)
        generated = _GENERATED + (request * _MOST_GENERATED + position - length) % _GENERATED
        blocks = self._ids[self._offsets[request] : self._offsets[request + 1]]
        if begin >= length or not len(blocks):
            return generated.astype(np.int32)
        block = np.minimum(position // self._size, len(blocks) - 1)  # a prompt may be longer than the blocks it names
        return np.where(position < length, blocks[block] * self._size + position % self._size, generated).astype(
            np.int32
        )
