"""What the tests of peers' issues share: an allocator over each tier that runs without a server, and a tier that does
something else when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from disk_support import capacity_of
from tier_world import MORE, SPECS, World, make

import kvmem
from kvmem.tiers import Capacity, Identity, Result, Status, Tier, largest_block_bytes
from kvmem.tiers.base import Buffer
from kvmem.tiers.disk import DiskTier
from kvmem.tiers.host import HostTier

LOWER = ("host", "disk")
PLACES = ("slots", *LOWER)  # where blocks are found again: the allocator's own host slots, and tiers below them
PATIENT = 30.0  # seconds until a test that waits for a thread gives up


def open_tier(place: str, name: str, folder: Path, blocks: int = 400) -> Tier:
    """A tier for the blocks of a spec of ``tier_world``."""
    spec = (SPECS | MORE)[name]()
    size = largest_block_bytes(spec)
    if place == "host":
        return HostTier(capacity=-(-size // 64) * 64 * blocks, block_bytes=size)
    fingerprint = Identity("toy").fingerprint(spec)
    capacity = capacity_of(blocks, size)
    return DiskTier(folder / "disk", capacity=capacity, block_bytes=size, fingerprint=fingerprint, io="threads", threads=2)  # fmt: skip


class FaultyTier(Tier):
    """Another tier, of which one call does something else. before: by stage (``"contains"``, ``"get"``, ``"put"``), what
    the calling thread does first. asked: every key of every ``get``."""

    def __init__(self, inner: Tier) -> None:
        self.inner, self.name = inner, inner.name
        self.stage, self.what, self.left, self.every, self.happened = "", "", 0, False, 0
        self.before: dict[str, Callable[[], object]] = {}
        self.asked: list[bytes] = []
        self.broken: dict[bytes, str] = {}  # keys of which each get does something else

    def arm(self, stage: str, what: str, nth: int = 1) -> None:
        """The ``nth`` call of a stage from now on (0: every one) raises, fails, lies, or answers with less."""
        self.stage, self.what, self.left, self.every = stage, what, nth, nth == 0

    def _strikes(self, stage: str) -> bool:
        self.before.get(stage, lambda: None)()
        if stage != self.stage:
            return False
        self.left -= self.left > 0
        if self.left != 0:
            return False
        self.happened += 1
        if not self.every:
            self.stage = ""
        if self.what == "raises":
            raise ConnectionError("the store is gone")
        return True

    def contains(self, keys: Sequence[bytes]) -> int:
        return len(keys) if self._strikes("contains") else self.inner.contains(keys)

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self.asked += keys
        strikes = self._strikes("get")
        results = self.inner.get(keys, buffers)
        for i, (key, buffer) in enumerate(zip(keys, buffers, strict=True)):
            what = self.broken.get(key) or (self.what if strikes and i == len(keys) // 2 else "")
            if what == "raises":
                raise ConnectionError("the store is gone")
            if what == "short":
                buffer[-1] ^= 0xFF
                results[i] = Result(Status.OK, len(buffer) - 1)
            elif what:
                buffer[:] = b"\xee" * len(buffer)
                results[i] = Result(Status(what), 0, "asked to fail")
        return results

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        if self._strikes("put"):
            return [Result(Status(self.what), 0, "asked to fail")] * len(keys)
        return self.inner.put(keys, buffers)

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        return self.inner.delete(keys)

    def capacity(self) -> Capacity:
        return self.inner.capacity()

    def close(self) -> None:
        self.inner.close()


class Case(World):
    """A world of prompts over one place. Of ``tier``, only calls that the test makes itself go past the faults."""

    tier: FaultyTier

    def __init__(self, name: str, backend: str, place: str, folder: Path, *, blocks: int = 400, **options: Any) -> None:
        self.place, lower = place, list[Tier]()
        if place != "slots":
            self.tier = FaultyTier(open_tier(place, name, folder, blocks))
            lower.append(self.tier)
        super().__init__(
            make(name, backend, lower=lower, **{"host_blocks": 40, "max_tokens": 128, "debug": False} | options)
        )

    def leave_below(self) -> None:
        """Take from the device, and from host slots if there is a tier below them, all that is cached."""
        assert self.alloc.flush(PATIENT)
        if self.place == "slots":
            self.alloc.core.clear_cache()  # which leaves host slots alone
        else:
            self.alloc.clear_cache()
            assert self.alloc.flush(PATIENT)  # what the device gave to slots meanwhile

    def put_down(self, text: list[int]) -> None:
        """Compute a prompt; then only the place has its blocks."""
        self.run(text)
        self.alloc.store(text)
        self.leave_below()

    def end(self) -> None:
        """Every slot can be taken, and nothing is left of what was under way."""
        alloc, tiering = self.alloc, self.alloc.tiering
        if alloc.closed:
            return
        alloc.free_batch([live.id for live in alloc.sequences()])
        assert alloc.flush(PATIENT)
        tiering.transfers.close()  # also loads that nobody asked for have ended
        alloc.clear_cache()
        tiering.settle()
        assert [tiering.core.free_slots(g) for g in range(len(tiering.counts))] == tiering.counts
        assert not tiering.leaving and alloc.check() == []
        alloc.close()
        if self.place != "slots":
            self.tier.close()


@contextmanager
def case(name: str, backend: str, place: str, folder: Path, **options: Any) -> Iterator[Case]:
    world = Case(name, backend, place, folder, **options)
    yield world
    world.end()


class Stop:
    """Where a thread of the engine stops until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        if not self.go_on.wait(PATIENT):
            raise AssertionError("nobody let the thread go on")

    def wait(self) -> None:
        assert self.reached.wait(PATIENT)


def words(n: int, seed: int = 1) -> list[int]:
    """``n`` token ids that differ from place to place and from seed to seed."""
    return [(i * 7919 + seed * 104729) % 50_000 for i in range(n)]


def key_of(alloc: kvmem.Allocator, text: list[int], block: int, group: int = 0) -> bytes:
    """The key in lower tiers of one group's bytes of a block."""
    from kvmem.tiers.keys import slot_key

    digests = alloc.tiering.block_keys.chain(text, salt=None, marks=[], adapter=None)
    return slot_key(digests[block], group)
