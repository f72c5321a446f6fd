"""Handles of loads: blocks on their way from the tiers below to host slots, and on to the device."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from kvmem.tiers.keys import slot_key

if TYPE_CHECKING:
    from kvmem.allocator.tiers.places import Prompt
    from kvmem.allocator.tiers.transfers import Transfers

__all__ = ["POLL_SECONDS", "Arrivals", "Block", "Load", "Place", "wait_until"]

POLL_SECONDS = 0.0005
Place = tuple[int, int]  # block of a prompt, group


def wait_until(ended: Callable[[], bool], timeout: float | None) -> bool:
    """Ask until ``ended()``, ``timeout`` seconds at most, or without an end for None; return whether it has."""
    end = None if timeout is None else time.monotonic() + timeout
    while not ended():
        if end is not None and time.monotonic() >= end:
            return False
        time.sleep(POLL_SECONDS)
    return True


class Block(NamedTuple):
    """One group's bytes of a block: its digest, and the host slot that has them."""

    group: int
    digest: bytes
    name: tuple[int, int]

    @property
    def key(self) -> bytes:
        """The key in tiers below the host."""
        return slot_key(self.digest, self.group)


class Arrivals:
    """What the thread of a load and its handle share: the thread does not keep the handle, so that it ends when nobody
    has that any more.
    """

    def __init__(self, prompt: Prompt, to_device: bool) -> None:
        self.prompt, self.to_device, self.reason = prompt, to_device, ""
        self.cancelled = threading.Event()
        self.starved = threading.Event()  # the thread waits for a free slot
        self.abandoned = False
        self.held: list[tuple[int, int]] = []  # slots that have arrived

    @property
    def over(self) -> bool:
        return self.abandoned or self.cancelled.is_set()

    def give_to(self, left: deque[tuple[int, int]]) -> None:
        """Hand over what is held. One by one, so that a signal finds each in one place."""
        with suppress(IndexError):  # another thread was faster
            while self.held:
                left.append(self.held.pop())


class Load:
    """Blocks on their way from lower tiers to the device or to host slots. It ends when nobody has it any more.

    Attributes: ``num_blocks`` of the prompt that are wanted; ``num_reached``, behind which a sequence can begin once
    the load is done; ``reason`` why it is not more, or ``""``.
    """

    _arrivals: Arrivals | None = None

    def __init__(self, engine: Transfers, arrivals: Arrivals) -> None:
        self._engine, self._to_device = engine, arrivals.to_device
        self.prompt, self.num_blocks, self.num_reached = arrivals.prompt, arrivals.prompt.num_blocks, 0
        self._finished, self._until = False, engine.clock() + engine.deadline_seconds
        self.cancelled, self.starved = arrivals.cancelled, arrivals.starved
        self.future: Future[None] | None = None
        self._arrivals = arrivals

    def __del__(self) -> None:
        if self._arrivals is not None:  # no lock is taken, because the collector may run anywhere
            self._arrivals.abandoned = True
            try:
                self._arrivals.give_to(self._engine.left)
            finally:  # once more, where a signal ended it: no one else can
                self._arrivals.give_to(self._engine.left)

    @property
    def reason(self) -> str:
        return "" if self._arrivals is None else self._arrivals.reason

    def advance(self) -> bool:
        """Copy to the device what has arrived, if all has, if host slots are short, or if the deadline is over. Return
        whether the load is done.

        Must be called until then: nothing else changes the device's memory. Never waits. Cost: the copies.
        """
        if self._finished:
            return True
        arrived = self.future is None or self.future.done()
        late = not arrived and self._engine.clock() >= self._until
        if not (arrived or late or self.starved.is_set()):
            return False
        if self._to_device and not self.cancelled.is_set():
            self.num_reached = self._engine.tiering.promote(self.prompt)
        self._let_go()
        if (arrived or late) and not self._finished:
            if not self._to_device and not self.cancelled.is_set():
                located = self._engine.tiering.locate(self.prompt)
                self.num_reached = self._engine.tiering.reach(self.num_blocks, located.has)
            if late:
                self._give_up()
            self._finished = True
        return arrived or late

    def _give_up(self) -> None:
        """Leave a tier that does not answer alone: its thread ends with the answer, which nobody waits for."""
        if self._arrivals is not None:
            self._arrivals.reason = f"no answer within {self._engine.deadline_seconds:g} s"
        self._engine.count_late(self.reason)
        self.cancel()

    def done(self) -> bool:
        """Return whether the load has ended; the same as ``advance()``."""
        return self.advance()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the load is done, ``timeout`` seconds at most; return whether it is."""
        return wait_until(self.advance, timeout)

    def cancel(self) -> None:
        """Stop the load. What has arrived stays in host slots."""
        self.cancelled.set()
        self._let_go()

    def _let_go(self) -> None:
        if self._arrivals is not None:
            self._arrivals.give_to(self._engine.left)
        self._engine.release_left()
        self.starved.clear()
