"""A pool in twenty obvious lines: the oracle for what a replay counts, and a stand-in where the allocator is not the
subject.
"""

from __future__ import annotations

import numpy as np

from kvmem.bench.pools import Int32s, Pool, Usage


class ModelPool(Pool):
    """Every sequence owns whole pages. No parking, no sharing: the memory is full when the pages of all sequences
    exceed the budget.
    """

    name = "model"

    def __init__(self, memory_bytes: int, bytes_per_token: int, page_bytes: int, max_tokens: int = 1 << 30) -> None:
        self.bytes_per_token, self.page_bytes, self.max_tokens = bytes_per_token, page_bytes, max_tokens
        self.budget_pages = memory_bytes // page_bytes
        self.tokens: dict[int, int] = {}
        self.committed: dict[int, int] = {}
        self.next_id = 0

    def pages(self, tokens: int) -> int:
        return -(-tokens * self.bytes_per_token // self.page_bytes)

    def mapped_pages(self) -> int:
        return sum(self.pages(tokens) for tokens in self.tokens.values())

    def open(self, count: int) -> Int32s:
        ids = range(self.next_id, self.next_id + count)
        self.next_id += count
        self.tokens.update(dict.fromkeys(ids, 0))
        self.committed.update(dict.fromkeys(ids, 0))
        return np.array(ids, dtype=np.int32)

    def try_extend(self, ids: Int32s, counts: Int32s) -> bool:
        wanted = {int(i): self.tokens[int(i)] + int(c) for i, c in zip(ids, counts, strict=True)}
        more = sum(self.pages(tokens) - self.pages(self.tokens[i]) for i, tokens in wanted.items())
        if self.mapped_pages() + more > self.budget_pages or max(wanted.values()) > self.max_tokens:
            return False
        self.tokens.update(wanted)
        return True

    def commit(self, ids: Int32s, counts: Int32s) -> None:
        for i, count in zip(ids, counts, strict=True):
            self.committed[int(i)] += int(count)
            assert self.committed[int(i)] <= self.tokens[int(i)]

    def free(self, ids: Int32s) -> None:
        for i in ids:
            del self.tokens[int(i)], self.committed[int(i)]

    def usage(self) -> Usage:
        mapped = self.mapped_pages() * self.page_bytes
        used = sum(self.tokens.values()) * self.bytes_per_token
        return Usage(mapped, used, mapped - used, 0, self.budget_pages * self.page_bytes - mapped, 0)
