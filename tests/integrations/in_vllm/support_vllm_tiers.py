"""What the connector's tests share: a tier that fails when it is told to, and worlds that end with their test."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from dict_tier import DictTier
from vllm_world import PAGE, Request, World, next_token

from kvmem.tiers.base import Buffer, Result, Status
from kvmem.tiers.host import HostTier

BLOCK = 2 * PAGE  # a payload: a block of two layers


class Faulty(DictTier):
    """A tier of which one call in turn does something else. at: the call's name and its number, from 1 on."""

    def __init__(self, at: str = "", what: str = "", nth: int = 1) -> None:
        super().__init__(10_000, BLOCK)
        self.at, self.what, self.nth, self.gate = at, what, nth, threading.Event()
        self.happened, self.hung = 0, False

    def arm(self, at: str, what: str) -> None:
        self.at, self.what, self.nth = at, what, 1

    def fails(self, call: str) -> bool:
        if call != self.at:
            return False
        self.nth -= 1
        if self.nth != 0:
            return False
        self.happened += 1
        if self.what == "raises":
            raise OSError("the store is gone")
        if self.what == "hangs":
            self.hung = True
            self.gate.wait(30)
        return True

    def contains(self, keys: Sequence[bytes]) -> int:
        return len(keys) if self.fails("contains") and self.what == "lies" else super().contains(keys)

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        if not self.fails("get"):
            return super().get(keys, buffers)
        found = super().get(keys, buffers)
        if self.what == "hangs":
            return found
        buffers[-1][:] = b"\xee" * len(buffers[-1])
        wrong = {"fails": Result(Status.FAILED, 0, "no answer"), "corrupt": Result(Status.CORRUPT, 0, "bad checksum"),
                 "short": Result(Status.OK, len(buffers[-1]) - 1)}  # fmt: skip
        return [*found[:-1], wrong[self.what]]

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        if self.fails("put") and self.what == "full":
            return [Result(Status.FULL, 0, "no room") for _ in keys]
        return super().put(keys, buffers)


@pytest.fixture
def make(rng: random.Random) -> Iterator[Callable[..., World]]:
    worlds = []

    def open_world(**given: Any) -> World:
        worlds.append(World(rng, **given))
        return worlds[-1]

    yield open_world
    for world in worlds:
        for tier in world.transfers._tiers:
            if isinstance(tier, Faulty):
                tier.gate.set()
        world.close()


def expected(prompt: list[int], outputs: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(outputs):
        tokens.append(next_token(tokens))
    return tokens


def host(blocks: int = 1000) -> HostTier:
    return HostTier(capacity=blocks * BLOCK, block_bytes=BLOCK, tells_evicted=True)


def first_and_second(
    world: World, length: int = 26, between: Callable[[], None] = lambda: None
) -> tuple[list[int], list[int]]:
    """Run one prompt twice, its blocks in between gone from the KV cache; return what each run has generated."""
    prompt = [i * 7 % 50 for i in range(length)]
    runs = []
    for name in ("first", "second"):
        request = world.add(Request(name, prompt, 5))
        world.run()
        if name == "first":
            world.settle()
            between()
        world.kv.fill_(0x5A)
        runs.append(request.all_token_ids)
    assert runs[0] == expected(prompt, 5)
    return runs[0], runs[1]
