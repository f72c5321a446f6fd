"""Each system call of a disk tier fails in turn: a typed error at opening, a result in use, and nothing wrong after it."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from disk_simulated import KINDS, SimulatedFiles
from disk_support import IOS, open_disk, version_in
from tier_suite import get, key_of, payload_of, put

from kvmem.errors import TierError
from kvmem.tiers import Result, Status, fault_log
from kvmem.tiers.base import Buffer
from kvmem.tiers.disk import DiskTier, segments
from kvmem.tiers.disk.file_io import PAGE, Move, UringIO, _Ring

KEYS = [key_of(n) for n in range(8)]
CODES = (errno.EIO, errno.ENOSPC, errno.EINTR, errno.EACCES, errno.EINVAL)


class Model:
    """What each key may hold: versions, and None for absent. It knows no more than the results said."""

    def __init__(self) -> None:
        self.allowed: dict[bytes, set[int | None]] = {key: {None} for key in KEYS}

    def put(self, tier: DiskTier, keys: Sequence[bytes], version: int) -> None:
        contents = {key: payload_of(key, version, 4500) for key in keys}
        for key, result in zip(keys, put(tier, contents), strict=True):
            assert result.ok or (result.status in (Status.FAILED, Status.FULL) and result.reason), result
            self.allowed[key] = {version, None} if result.ok else self.allowed[key] | {None}  # None: it may be evicted

    def check(self, tier: DiskTier) -> int:
        found = 0
        for key in KEYS:
            data = get(tier, key, 6000)
            if isinstance(data, Result):
                assert data.reason and None in self.allowed[key], data
            else:
                assert version_in(key, data) in self.allowed[key]
                found += 1
        return found

    def delete(self, tier: DiskTier, key: bytes) -> None:
        (result,) = tier.delete([key])
        assert result.status in (Status.OK, Status.MISS, Status.FAILED), result
        if result.status is not Status.FAILED:
            self.allowed[key] = {None}


def workload(files: SimulatedFiles, model: Model) -> None:
    with open_disk("disk", num_slots=7, files=files) as tier:
        model.put(tier, KEYS[6:], 0)
    with open_disk("disk", files=files) as tier:  # smaller: the last of its segments is removed
        model.put(tier, KEYS[:5], 1)
        model.check(tier)
        model.put(tier, KEYS[3:8], 2)  # replaces and evicts
        model.delete(tier, KEYS[4])
        model.check(tier)
    with open_disk("disk", files=files, read_only=True) as reader:
        reader.contains(KEYS)
        model.check(reader)


def run_with_faults(kind: str, first: int, code: int, for_ever: bool) -> bool:
    """Run the workload with the ``first`` call of a kind failing, and all after it if ``for_ever``; return whether there
    was such a call. code: of the error; 0: the transfer stops short instead."""
    files, model, count = SimulatedFiles(), Model(), 0

    def before(called: str, number: int) -> None:
        nonlocal count
        if called != kind:
            return
        count += 1
        if count == first or (for_ever and count > first):
            if not code:
                files.shorten = 1 + number % 9000
            else:
                raise OSError(code, os.strerror(code))

    files.before = before
    try:
        workload(files, model)
    except TierError as error:
        assert "path" in str(error) or "capacity" in str(error), error
    met = count >= first
    files.before = lambda kind, number: None
    with open_disk("disk", files=files) as tier:  # the lock was released, and the folder can be used
        model.check(tier)
        model.put(tier, KEYS[:2], 9)
        assert [get(tier, key, 6000) for key in KEYS[:2]] == [payload_of(key, 9, 4500) for key in KEYS[:2]]
    return met


@pytest.mark.parametrize("for_ever", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_call_fails_in_turn(
    kind: str, for_ever: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.CRITICAL)
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 3 * 12288)  # two slots
    for code in (*CODES, *([0] if kind in ("preadv", "pwritev") else [])):
        first = 1
        while run_with_faults(kind, first, code, for_ever):
            first += 1
        assert first > 1, f"the workload never calls {kind}"


def test_a_signal_does_not_matter() -> None:
    """EINTR and short transfers, now and then, change no result."""
    files = SimulatedFiles()
    tier = open_disk("disk", files=files)

    def before(kind: str, number: int) -> None:
        if kind in ("preadv", "pwritev"):
            if number % 3 == 0:
                raise InterruptedError(errno.EINTR, "signal")
            files.shorten = 4096 if number % 3 == 1 else 0

    files.before = before
    contents = {key: payload_of(key, 1, 6000) for key in KEYS[:6]}
    assert all(r.ok for r in put(tier, contents))
    assert {key: get(tier, key, 6000) for key in contents} == contents


def test_a_read_that_fails_is_no_loss() -> None:
    files = SimulatedFiles()
    tier = open_disk("disk", files=files)
    put(tier, {KEYS[0]: payload_of(KEYS[0], 1, 6000)})

    def before(kind: str, number: int) -> None:
        if kind == "preadv":
            raise OSError(errno.EIO, "Input/output error")

    files.before = before
    result = get(tier, KEYS[0], 6000)
    assert isinstance(result, Result) and result.status is Status.FAILED and "Input/output error" in result.reason
    files.before = lambda kind, number: None
    assert get(tier, KEYS[0], 6000) == payload_of(KEYS[0], 1, 6000)


def test_a_slot_with_a_torn_write_is_not_believed_by_the_next_opening() -> None:
    """The write fails half way, and clearing its header fails too: the slot is given up, and its old block with it."""
    files = SimulatedFiles()
    tier = open_disk("disk", num_slots=1, files=files)
    put(tier, {KEYS[0]: payload_of(KEYS[0], 1, 6000)})
    writes = 0

    def before(kind: str, number: int) -> None:
        nonlocal writes
        if kind == "pwritev":
            writes += 1
            files.shorten = 4096 if writes == 1 else 0  # header and the first page
            if writes > 1:
                raise OSError(errno.EIO, "Input/output error")

    files.before = before
    assert put(tier, {KEYS[1]: payload_of(KEYS[1], 1, 6000)})[0].status is Status.FAILED
    files.before = lambda kind, number: None
    assert put(tier, {KEYS[2]: b"no slot is left"})[0].status is Status.FULL
    with open_disk("disk", num_slots=1, files=files.copy()) as opened:
        for key in KEYS[:3]:
            result = get(opened, key, 6000)
            assert isinstance(result, Result) and result.status in (Status.MISS, Status.CORRUPT)
        assert put(opened, {KEYS[2]: b"used again"})[0].ok


def test_a_sync_beside_a_write() -> None:
    """Another thread's delete syncs while a write is under way, which the sync need not cover: close() syncs again."""
    files = SimulatedFiles()
    tier = open_disk("disk", files=files)

    def before(kind: str, number: int) -> None:
        if kind == "pwritev":
            files.before = lambda kind, number: None
            thread = threading.Thread(target=tier.delete, args=([KEYS[1]],))
            thread.start()
            thread.join()

    files.before = before
    put(tier, {KEYS[0]: b"zero"})
    tier.close()
    assert not files.inodes["segment-00000.kvmem"].pending


def test_a_slot_is_reused_while_it_is_read() -> None:
    """Between the index and the read, another thread evicts the block and writes into its slot: a miss."""
    files = SimulatedFiles()
    tier = open_disk("disk", num_slots=1, files=files)
    put(tier, {KEYS[0]: payload_of(KEYS[0], 1, 6000)})

    def before(kind: str, number: int) -> None:
        if kind == "preadv":
            files.before = lambda kind, number: None
            thread = threading.Thread(target=put, args=(tier, {KEYS[1]: payload_of(KEYS[1], 1, 6000)}))
            thread.start()
            thread.join()

    files.before = before
    result = get(tier, KEYS[0], 6000)
    assert isinstance(result, Result) and result.status is Status.MISS and "replaced" in result.reason
    assert get(tier, KEYS[1], 6000) == payload_of(KEYS[1], 1, 6000)


def test_one_line_for_each_kind_and_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    files, now = SimulatedFiles(), [1e9]
    monkeypatch.setattr(fault_log.time, "monotonic", lambda: now[0])
    with open_disk("one line", files=files, num_slots=6) as tier:
        put(tier, {key: bytes(5000) for key in KEYS[:6]})
        for n in range(6):
            files.inodes["segment-00000.kvmem"].content[4096 + n * 12288 + 5000] ^= 1
        assert [get(tier, key, 6000).status for key in KEYS[:3]] == [Status.CORRUPT] * 3  # type: ignore[union-attr]
        files.before = lambda kind, number: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk"))
        get(tier, KEYS[3], 6000)
        get(tier, KEYS[4], 6000)
        files.before = lambda kind, number: None
        assert [line.name for line in caplog.records] == ["kvmem", "kvmem"]
        assert "damaged" in caplog.messages[0] and "bad disk" in caplog.messages[1]
        assert all("one line" in message for message in caplog.messages)
        now[0] += 61
        get(tier, KEYS[5], 6000)
        assert len(caplog.records) == 3


@pytest.mark.skipif("io_uring" not in IOS, reason="needs the package liburing, and a kernel that allows io_uring")
class TestCompletions:
    """What io_uring reports is changed on its way: the bytes are moved, but the tier is told otherwise."""

    @pytest.fixture
    def reports(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Takes the answers for the next completions: an error's number, -1 for a page less, or None for the truth."""
        answers, original = list[Any](), _Ring._completions

        def changed(ring: _Ring) -> Iterator[tuple[int, int]]:
            for number, count in original(ring):
                answer = answers.pop(0) if answers else None
                yield number, count if answer is None else count - PAGE if answer == -1 else -answer

        monkeypatch.setattr(_Ring, "_completions", changed)
        return answers

    def test_faults(self, reports: list[Any], tmp_path: Any) -> None:
        tier = open_disk(tmp_path, io="io_uring", num_slots=8)
        contents = {key: payload_of(key, 1, 6000) for key in KEYS}
        reports += [errno.EINTR, -1, None, errno.EAGAIN]
        assert all(r.ok for r in put(tier, contents))  # what stopped short goes on
        reports += [-1, errno.EINTR, None, -1]
        assert {key: get(tier, key, 6000) for key in contents} == contents
        reports += [errno.EIO]
        result = get(tier, KEYS[0], 6000)
        assert isinstance(result, Result) and result.status is Status.FAILED
        reports += [errno.ENOSPC]
        assert put(tier, {KEYS[0]: b"new"})[0].status is Status.FULL
        reports += [errno.EINTR] * 40  # no end of signals is an error in the end
        result = get(tier, KEYS[1], 6000)
        assert isinstance(result, Result) and result.status is Status.FAILED
        del reports[:]
        assert get(tier, KEYS[1], 6000) == contents[KEYS[1]]
        tier.close()

    def test_the_kernel_takes_no_request(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
        """The ring is given up, and the next call has a new one."""
        import liburing

        with open_disk(tmp_path, io="io_uring") as tier:
            contents = {key: payload_of(key, 1, 6000) for key in KEYS[:6]}
            put(tier, contents)

            def refused(ring: Any) -> int:
                raise OSError(errno.EBUSY, "busy")

            with monkeypatch.context() as patch:
                patch.setattr(liburing, "io_uring_submit", refused)
                buffers = [memoryview(bytearray(6000)) for _ in contents]
                assert {r.status for r in tier.get(list(contents), buffers)} == {Status.FAILED}
            assert {key: get(tier, key, 6000) for key in contents} == contents

    def test_every_request_ends_before_an_exception_leaves(self, tmp_path: Any) -> None:
        """Or the kernel would write into memory that the caller uses again."""
        (tmp_path / "file").write_bytes(bytes(64 * PAGE))
        fd, ended, io = os.open(tmp_path / "file", os.O_RDONLY), list[int](), UringIO()

        class Recorded(Move):
            def begin(self) -> list[Buffer]:
                return [memoryview(bytearray(PAGE))]

            def end(self, error: OSError | None) -> None:
                ended.append(self.offset)
                if self.offset == 3 * PAGE:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            io.run([Recorded(fd, n * PAGE) for n in range(16)])
        assert len(ended) == len(set(ended)) >= 1
        assert not io._rings[0]._flying
        del ended[:]
        io.run([Recorded(fd, 8 * PAGE)])
        assert ended == [8 * PAGE]
        io.close()
        os.close(fd)


def test_a_tier_that_is_collected_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector may run in a thread that holds what the tier's threads need to end."""
    tier = open_disk(tmp_path / "disk", 8, threads=3)
    keys = [key_of(i) for i in range(6)]
    assert all(result.ok for result in put(tier, dict.fromkeys(keys, b"x" * 100)))
    joined: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "join", lambda thread, timeout=None: joined.append(thread))
    del tier
    gc.collect()
    assert not joined
    with open_disk(tmp_path / "disk", 8) as again:  # and the folder is free
        assert again.contains(keys) == 6
