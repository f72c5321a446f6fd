"""What a replay drives: one small protocol, met by kvmem's allocator and by a static pool for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from kvmem.arguments import format_bytes
from kvmem.bench.errors import BenchError

if TYPE_CHECKING:
    from kvmem import Allocator

__all__ = ["AllocatorPool", "ByLength", "Int32s", "Pool", "StaticPool", "Totals", "Usage"]

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Usage:
    """Bytes at one moment. ``mapped = used + wasted + parked``; ``free`` is what sequences can still be given (unmapped
    or parked).
    """

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

    def admit(self, request: int, tokens: int) -> Int32s | None:
        """A new sequence with memory for the first tokens of a request of the trace, all of them committed; None where
        it does not fit.
        """

    def try_extend(self, ids: Int32s, counts: Int32s) -> bool:
        """Room for more tokens in every sequence, or False and nothing changed."""

    def commit(self, ids: Int32s, counts: Int32s) -> None:
        """The KV of so many more tokens is valid."""

    def free(self, ids: Int32s) -> None:
        """Ends sequences."""

    def usage(self) -> Usage:
        """A moment's account. No driver call."""

    def totals(self) -> Totals: ...


class ByLength:
    """A pool whose sequences have lengths only, and that calls no driver."""

    def admit(self: Pool, request: int, tokens: int) -> Int32s | None:
        ids, counts = self.open(1), np.array([tokens], dtype=np.int32)
        if not self.try_extend(ids, counts):
            self.free(ids)
            return None
        self.commit(ids, counts)
        return ids

    def totals(self) -> Totals:
        return Totals()


class AllocatorPool(ByLength):
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
        return Usage(
            stats.mapped_bytes, stats.used_bytes, stats.wasted_bytes, stats.parked_bytes, free, stats.driver_calls
        )

    def totals(self) -> Totals:
        calls, stats = self.allocator.pool.core.driver_counters(), self.allocator.stats()
        return Totals(calls.map, calls.set_access, calls.unmap, stats.lookup_tokens, stats.hit_tokens)


class StaticPool(ByLength):
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
