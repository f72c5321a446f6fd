"""What remote tiers share, over a store in this process that waits, fails and miscounts when it is told to."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from tier_suite import get, key_of, put

pytest.importorskip("xxhash", reason="needs the extra kvmem[tiers]")

from kvmem.tiers import Capacity, Result, Status
from kvmem.tiers.base import Buffer
from kvmem.tiers.remote import ABSENT, Breaker, Call, Limits, RemoteTier, failed

PATIENT = 30.0


class HeldTier(RemoteTier):
    """A dict, behind a gate. ``parts``: the sizes of the parts that it was asked for."""

    name = "held"
    part_keys = 5

    def __init__(self, seconds: float = PATIENT, **limits: Any) -> None:
        super().__init__("held", seconds, "test", Limits(batch_seconds=PATIENT, **limits))
        self.contents, self.parts, self.gate = dict[str, bytes](), list[int](), threading.Event()
        self.answers: list[Any] | Exception | None = None
        self.gate.set()

    def _pass(self, items: Sequence[object]) -> None:
        self.parts.append(len(items))
        assert self.gate.wait(PATIENT)

    def _ping(self, call: Call) -> list[object]:
        return [None]

    def _exists(self, call: Call, names: Sequence[str]) -> list[bool]:
        self._pass(names)
        return [name in self.contents for name in names]

    def _read(self, call: Call, names: Sequence[str], sizes: Sequence[int]) -> list[Any]:
        self._pass(names)
        if isinstance(self.answers, Exception):
            raise self.answers
        return [self.contents.get(name) for name in names] if self.answers is None else self.answers

    def _write(self, call: Call, names: Sequence[str], records: Sequence[tuple[bytes, Buffer]]) -> list[Result]:
        self._pass(names)
        self.contents |= {name: b"".join(record) for name, record in zip(names, records, strict=True)}
        return [Result(Status.OK)] * len(names)

    def _remove(self, call: Call, names: Sequence[str]) -> list[Result]:
        return [Result(Status.OK) if self.contents.pop(name, None) is not None else ABSENT for name in names]

    def _measure(self, call: Call) -> list[Capacity]:
        return [Capacity(None, 0, len(self.contents))]

    def _release(self, idle: bool) -> None:
        self.contents.clear()


def test_a_put_that_was_given_up_vouches_for_nothing_else() -> None:
    """The caller fills its buffer anew, and then the put arrives."""
    with HeldTier(0.1) as tier:
        tier.gate.clear()
        buffer = bytearray(b"right" * 50)
        assert tier.put([key_of(0)], [memoryview(buffer)])[0].status is Status.FAILED
        buffer[:] = b"wrong" * 50
        tier.gate.set()
        until = time.monotonic() + PATIENT
        while not tier.contents and time.monotonic() < until:
            time.sleep(0.01)
        result = get(tier, key_of(0))
        assert tier.parts == [1, 1] and isinstance(result, Result) and result.status is Status.CORRUPT


def test_a_get_that_was_given_up_writes_nothing_later() -> None:
    with HeldTier(0.1) as tier:
        assert put(tier, {key_of(0): b"stored"})[0].ok
        tier.gate.clear()
        buffer = bytearray(b"caller's")
        assert tier.get([key_of(0)], [memoryview(buffer)])[0].status is Status.FAILED
        tier.gate.set()
        assert put(tier, {key_of(1): b"x"})[0].ok  # and so the first call has ended, or soon will
        time.sleep(0.05)
        assert buffer == b"caller's"


def test_batches_are_split_by_bytes_and_keys_and_blocks_are_not() -> None:
    with HeldTier(batch_bytes=1000) as tier:
        sizes = [300, 300, 300, 5000, 0, 0, 0, 0, 0, 0, 904, 0]  # and 96 each
        contents = {key_of(n): bytes(size) for n, size in enumerate(sizes)}
        assert [r.num_bytes for r in put(tier, contents)] == sizes
        assert tier.parts == [2, 1, 1, 5, 1, 1, 1]
        assert tier.contains([*contents, key_of(99)]) == len(sizes)


def test_calls_beyond_the_limit_wait_for_one_and_no_longer_than_the_bound() -> None:
    with HeldTier(0.3, calls=2, faults=100) as tier:
        tier.gate.clear()
        threads = [threading.Thread(target=get, args=(tier, key_of(0))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENT)
        result = get(tier, key_of(0))  # the two calls that were given up are under way
        assert isinstance(result, Result) and "all 2 calls were under way" in result.reason and tier.parts == [1, 1]
        tier.gate.set()
        until = time.monotonic() + PATIENT
        while not put(tier, {key_of(0): b"x"})[0].ok:
            assert time.monotonic() < until


@pytest.mark.parametrize("answers", [[], [None, None], [b""], [b"short"]])
def test_answers_that_make_no_sense(answers: list[Any]) -> None:
    with HeldTier() as tier:
        tier.answers = answers
        result = get(tier, key_of(0))
        assert isinstance(result, Result) and result.reason and result.status in (Status.FAILED, Status.CORRUPT)


def test_reasons_hold_no_signatures() -> None:
    assert (
        failed(OSError("GET https://host/x?sig=secret failed\nmore")).reason == "OSError: GET https://host/x?... failed"
    )


def test_the_breaker() -> None:
    breaker = Breaker(faults=2, pause_seconds=PATIENT)
    assert breaker.admits() and breaker.note(False) == 0 and breaker.admits() and breaker.note(True) == 1
    assert breaker.note(False) == 0 and breaker.note(False) == 1 and not breaker.admits()
    assert breaker.note(True) == 2 and breaker.admits()  # a call from before it opened was answered
    quick = Breaker(faults=1, pause_seconds=0.05)
    quick.note(False)
    while not quick.admits():
        time.sleep(0.01)
    assert not quick.admits()  # one tries, alone


def test_one_line_as_long_as_it_is_gone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("kvmem.tiers.fault_log.SECONDS", 0.0)
    caplog.set_level(logging.INFO, "kvmem")
    with HeldTier(faults=2, pause_seconds=0.01) as tier:
        tier.answers = OSError("gone")
        for _ in range(5):
            assert isinstance(get(tier, key_of(0)), Result)
            time.sleep(0.02)
        tier.answers = None
        while not put(tier, {key_of(0): b"x"})[0].ok:
            time.sleep(0.01)
    assert [r.getMessage() for r in caplog.records] == [
        "held: failed: OSError: gone; its blocks are misses until it answers (further ones are not logged for a minute)",
        "held: answers again",
    ]
