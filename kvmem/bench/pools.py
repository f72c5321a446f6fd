"""The interface that a replay drives, and its implementations: kvmem's allocator, for prompts that are lengths only or
have content, and a static pool for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvmem.arguments import format_bytes
from kvmem.bench.text import BenchError

if TYPE_CHECKING:
    from kvmem import Allocator
    from kvmem.bench.traces import Trace

Int32s = npt.NDArray[np.int32]
_GENERATED = 1 << 30  # ids of generated tokens begin here
_MOST_GENERATED = 1 << 13  # of a request; beyond that, ids repeat


@dataclass(frozen=True)
class Usage:
    """Bytes at one moment. ``mapped = used + wasted + parked``; ``free``: unmapped or parked."""

    mapped_bytes: int
    used_bytes: int
    wasted_bytes: int
    parked_bytes: int
    free_bytes: int
    driver_calls: int


@dataclass(frozen=True)
class Totals:
    """Since the pool was made: driver calls by kind, and tokens of prompts looked up and found in the cache."""

    map: int = 0
    set_access: int = 0
    unmap: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0


class Pool(Protocol):
    """Memory for many sequences. ``ids`` and ``counts`` are int32 [n]; ``counts`` are tokens to add."""

    name: str
    max_tokens: int

    def open(self, count: int) -> Int32s:
        """New, empty sequences. Takes no memory."""

    def try_extend(self, ids: Int32s, counts: Int32s) -> bool:
        """Room for more tokens in every sequence, or False and nothing changed."""

    def commit(self, ids: Int32s, counts: Int32s) -> None:
        """Marks the KV of ``counts`` more tokens as valid."""

    def free(self, ids: Int32s) -> None:
        """Ends sequences."""

    def usage(self) -> Usage:
        """The bytes at this moment. Makes no driver call."""

    def totals(self) -> Totals:
        return Totals()

    def admit(self, request: int, tokens: int) -> Int32s | None:
        """A new sequence with memory for the first tokens of a request of the trace, all of them committed; None where
        it does not fit. Here sequences have lengths only.
        """
        ids, counts = self.open(1), np.array([tokens], dtype=np.int32)
        if not self.try_extend(ids, counts):
            self.free(ids)
            return None
        self.commit(ids, counts)
        return ids


class AllocatorPool(Pool):
    """`kvmem.Allocator` through its batched calls, one Python call a verb."""

    def __init__(self, allocator: Allocator, name: str, max_tokens: int) -> None:
        self.allocator, self.name, self.max_tokens = allocator, name, max_tokens

    def open(self, count: int) -> Int32s:
        return self.allocator.open_batch(count)

    def try_extend(self, ids: Int32s, counts: Int32s) -> bool:
        return self.allocator.try_extend_batch(ids, counts)

    def commit(self, ids: Int32s, counts: Int32s) -> None:
        self.allocator.commit_batch(ids, counts)

    def free(self, ids: Int32s) -> None:
        self.allocator.free_batch(ids)

    def usage(self) -> Usage:
        stats = self.allocator.stats()
        free = stats.budget_bytes - stats.mapped_bytes + stats.parked_bytes
        held = stats.mapped_bytes, stats.used_bytes, stats.wasted_bytes, stats.parked_bytes
        return Usage(*held, free, stats.driver_calls)

    def totals(self) -> Totals:
        calls, stats = self.allocator.pool.core.driver_counters(), self.allocator.stats()
        return Totals(calls.map, calls.set_access, calls.unmap, stats.lookup_tokens, stats.hit_tokens)


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
        """As `Pool.admit`; what is cached is reused, the rest is committed with its ids."""
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
        ids = np.where(position < length, blocks[block] * self._size + position % self._size, generated)
        return ids.astype(np.int32)


class StaticPool(Pool):
    """The layout that kvmem replaces: every sequence slot is allocated at start for the longest possible sequence.

    All slots are mapped always; the slots of no sequence count as parked, the unused rest of a slot in use as wasted.
    """

    name = "static"

    def __init__(self, memory_bytes: int, bytes_per_token: int, max_tokens: int, max_sequences: int) -> None:
        self.max_tokens = max_tokens
        self._token_bytes, self._slot_bytes = bytes_per_token, bytes_per_token * max_tokens
        self.num_slots = min(memory_bytes // self._slot_bytes, max_sequences)
        if self.num_slots < 1:
            raise BenchError(
                f"a static pool reserves {max_tokens:,} tokens = {format_bytes(self._slot_bytes)} for each sequence; "
                f"there are {format_bytes(memory_bytes)}, which hold {memory_bytes // bytes_per_token:,} tokens. "
                "Give more --memory or fewer --max-tokens"
            )
        self._tokens = np.zeros(max_sequences, dtype=np.int64)
        self._closed = list(range(max_sequences))[::-1]
        self._taken = 0

    def open(self, count: int) -> Int32s:
        return np.array([self._closed.pop() for _ in range(count)], dtype=np.int32)

    def try_extend(self, ids: Int32s, counts: Int32s) -> bool:
        held = self._tokens[ids]
        taken = self._taken + int(np.count_nonzero((held == 0) & (counts > 0)))
        if taken > self.num_slots or int((held + counts).max(initial=0)) > self.max_tokens:
            return False
        self._tokens[ids] = held + counts
        self._taken = taken
        return True

    def commit(self, ids: Int32s, counts: Int32s) -> None:
        """A static pool does not know which tokens are valid."""

    def free(self, ids: Int32s) -> None:
        self._taken -= int(np.count_nonzero(self._tokens[ids]))
        self._tokens[ids] = 0
        self._closed.extend(ids.tolist())

    def usage(self) -> Usage:
        used = int(self._tokens.sum()) * self._token_bytes
        taken, spare = self._taken * self._slot_bytes, (self.num_slots - self._taken) * self._slot_bytes
        return Usage(taken + spare, used, taken - used, spare, spare, 0)
