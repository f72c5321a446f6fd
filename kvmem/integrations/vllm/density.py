"""Chunks of vLLM's CPU tier in the order of one of kvmem's eviction policies. Knows nothing of vLLM's classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvmem import _core

__all__ = ["EvictionOrder"]


class _Last:
    """Kept in a request's context: the key that its next chunk follows."""

    def __init__(self, key: bytes) -> None:
        self.key = key


class _Held:
    """A chunk that is in the tier. node: its id in the policy, which no other content has while a child is cached."""

    def __init__(self, chunk: Any, node: int, parent: int) -> None:
        self.chunk, self.node, self.parent = chunk, node, parent


class EvictionOrder:
    """What vLLM's ``CachePolicy`` asks of a policy: a chunk is found by key, and may go while no transfer uses it.

    capacity: chunks of the tier. name: of a policy of kvmem, as for ``Allocator(policy=)``.
    """

    def __init__(self, capacity: int, name: str) -> None:
        self._capacity, self._name = capacity, name
        self.clear()

    def clear(self) -> None:
        nodes = 2 * self._capacity  # as many may wait for their children as there are children
        self._policy = _core.EvictionPolicy(self._name)
        self._policy.reserve(nodes)
        self._free = list(range(nodes))
        self._held: dict[bytes, _Held] = {}
        self._keys: dict[int, bytes] = {}  # of nodes that are in the tier
        self._children: dict[int, int] = {}
        self._follows: dict[bytes, bytes] = {}  # of keys that are inserted next

    def get(self, key: bytes) -> Any:
        held = self._held.get(key)
        return None if held is None else held.chunk

    def insert(self, key: bytes, chunk: Any) -> None:
        before = self._held.get(self._follows.pop(key, b""))
        held = _Held(chunk, self._free.pop(), -1 if before is None else before.node)
        self._policy.insert(held.node, int.from_bytes(key[:8], "little"), held.parent)
        self._held[key], self._keys[held.node] = held, key
        if held.parent >= 0:
            self._children[held.parent] = self._children.get(held.parent, 0) + 1
        if chunk.ref_cnt == 0:
            self._policy.release(held.node)

    def remove(self, key: bytes) -> None:
        """A store failed: the chunk is in use."""
        self._policy.release(self._held[key].node)
        self._policy.evict(self._held[key].node)
        self._forget(key)

    def _forget(self, key: bytes) -> Any:
        held = self._held.pop(key)
        del self._keys[held.node]
        if not self._children.get(held.node):
            self._free.append(held.node)
        if held.parent >= 0:
            self._children[held.parent] -= 1
            if not self._children[held.parent] and held.parent not in self._keys:
                self._free.append(held.parent)
        return held.chunk

    def touch(self, keys: Iterable[bytes], req_context: Any) -> None:
        """Nothing: hits count at the end of a request."""

    def on_store_miss(self, keys: Iterable[bytes], req_context: Any) -> None:
        """Learn which chunk each follows, so that the end of a prefix goes before its beginning."""
        last = req_context.get_state(_Last)
        before = b"" if last is None else last.key
        self._follows.clear()  # of a store that found no room
        for key in keys:
            if before[-4:] == key[-4:]:  # of one KV cache group
                self._follows[key] = before
            before = key
        if before:
            req_context.set_state(_Last(before))

    def on_request_finished(
        self, key_groups: Sequence[Sequence[bytes]], insertion_only_keys: set[bytes], reused_keys: set[bytes],
        req_context: Any,
    ) -> None:  # fmt: skip
        """A request used what was there before it."""
        for keys in key_groups:
            for key in keys:
                if key in reused_keys and key in self._held:
                    self._policy.hit(self._held[key].node)

    def mark_evictable(self, key: bytes) -> None:
        self._policy.release(self._held[key].node)

    def mark_non_evictable(self, key: bytes) -> None:
        self._policy.use(self._held[key].node)

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, Any]] | None:
        """Return ``n`` chunks, which leave, none of ``protected``; None, and nothing has changed, if fewer can."""
        chosen: list[int] = []
        kept: list[int] = []
        done: list[tuple[Any, int]] = []  # what undoes each call
        while len(chosen) < n and (node := self._policy.victim()) >= 0:
            if self._keys[node] in protected:
                self._policy.use(node)
                done.append((self._policy.undo_use, node))
                kept.append(node)
            else:
                self._policy.evict(node)
                done.append((self._policy.restore, node))
                chosen.append(node)
        if len(chosen) < n:
            for undo, node in reversed(done):
                undo(node)
            return None
        for node in kept:
            self._policy.release(node)
        keys = [self._keys[node] for node in chosen]
        return [(key, self._forget(key)) for key in keys]
