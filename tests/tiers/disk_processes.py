"""What tests of the disk tier do with processes: a writer is killed, readers read beside a writer, a child is forked.

``python disk_processes.py FOLDER KILLS ROUNDS SEED`` imports what it needs once and forks from there, before it has any
thread. It prints what each part found as JSON, or its traceback. Processes take turns with the ways to read and write
that work here.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

from disk_support import IOS, open_disk, version_in
from tier_suite import get, key_of, payload_of, put

from kvmem.errors import TierError
from kvmem.tiers import Result
from kvmem.tiers.base import Buffer
from kvmem.tiers.files import Files

KEYS = [key_of(n) for n in range(10)]
SLOTS, BLOCK_BYTES = 7, 20_000
ENTRY = struct.Struct("<BBI")  # what, the key's number, the version
PUT, WAS_PUT, DELETE, WAS_DELETED = range(1, 5)


class Diary:
    """What the writer was about to do and has done, in memory that outlives it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 20)

    def start(self) -> None:
        self._memory[:8] = bytes(8)

    def note(self, what: int, keys: Sequence[int], version: int = 0) -> None:
        (count,) = struct.unpack("<Q", self._memory[:8])
        for key in keys:
            at = 8 + ENTRY.size * count
            self._memory[at : at + ENTRY.size] = ENTRY.pack(what, key, version)
            count += 1
        self._memory[:8] = struct.pack("<Q", count)

    def allow(self, allowed: list[set[int | None]]) -> None:
        """Bring up to date which versions each key may have; None: none."""
        (count,) = struct.unpack("<Q", self._memory[:8])
        for n in range(count):
            what, key, version = ENTRY.unpack_from(self._memory, 8 + n * ENTRY.size)
            if what == PUT:
                allowed[key] |= {version, None}
            elif what == WAS_PUT:
                allowed[key] = {version, None}  # None: it may be evicted
            elif what == DELETE:
                allowed[key] |= {None}
            else:
                allowed[key] = {None}


class KillingFiles(Files):
    """Ends the process at its call number ``step``: before it, after it, or with part of the bytes written."""

    def __init__(self, step: int, rng: random.Random) -> None:
        self._step, self._rng = step, rng

    def _killed(self) -> bool:
        self._step -= 1
        return self._step == 0

    def pwritev(self, fd: int, views: Sequence[Buffer], offset: int) -> int:
        if self._killed():
            data = b"".join(views)
            part = mmap.mmap(-1, max(4096, self._rng.randrange(0, len(data) + 4096, 4096)))
            part[:] = data[: len(part)].ljust(len(part), b"\0")
            if self._rng.random() < 0.8:
                super().pwritev(fd, [memoryview(part)], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pwritev(fd, views, offset)


for _name in ("open", "preadv", "allocate", "sync", "touch"):

    def _call(self: KillingFiles, *args: object, _name: str = _name) -> object:
        if self._killed():
            if self._rng.random() < 0.5:
                getattr(super(KillingFiles, self), _name)(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(super(KillingFiles, self), _name)(*args)

    setattr(KillingFiles, _name, _call)


def write(folder: str, diary: Diary, rng: random.Random, first: int, io: str, files: Files | None) -> None:
    """Put and delete until killed. first: the first version that no one used before."""
    tier = open_disk(folder, SLOTS, BLOCK_BYTES, io=io, threads=1 if files else 3, files=files)
    for version in range(first, first + 2000):
        numbers = rng.sample(range(len(KEYS)), rng.randint(1, 4))
        if rng.random() < 0.85:
            diary.note(PUT, numbers, version)
            put(tier, {KEYS[n]: payload_of(KEYS[n], version, rng.randint(8, BLOCK_BYTES)) for n in numbers})
            diary.note(WAS_PUT, numbers, version)
        else:
            diary.note(DELETE, numbers)
            tier.delete([KEYS[n] for n in numbers])
            diary.note(WAS_DELETED, numbers)
    os._exit(3)


def kills(folder: str, count: int, seed: int) -> dict[str, int]:
    """Kill a writer of one folder again and again, half of the times at a chosen system call; after each, every block is
    one that it may be, or absent."""
    rng, diary, found, absent, written = random.Random(seed), Diary(), 0, 0, 1
    allowed: list[set[int | None]] = [{None} for _ in KEYS]
    for n in range(count):
        diary.start()
        chosen, io, child_seed = n % 2 == 0, IOS[n // 2 % len(IOS)], rng.random()
        child = os.fork()
        if child == 0:
            try:
                own = random.Random(child_seed)
                write(folder, diary, own, written, io, KillingFiles(own.randint(1, 60), own) if chosen else None)
            except Exception:  # noqa: BLE001 - the parent sees the exit code
                traceback.print_exc()
            finally:
                os._exit(2)
        if not chosen:
            time.sleep(rng.uniform(0.001, 0.03))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        written += 2000
        diary.allow(allowed)
        with open_disk(folder, SLOTS, BLOCK_BYTES, io=io) as tier:
            for number, key in enumerate(KEYS):
                data = get(tier, key, BLOCK_BYTES)
                if isinstance(data, Result):
                    absent += 1
                    allowed[number] = {None}
                else:
                    assert version_in(key, data) in allowed[number], (n, number, allowed[number])
                    allowed[number] = {version_in(key, data)}
                    found += 1
    return {"kills": count, "found": found, "absent": absent}


def read(folder: str, seed: int, io: str, done: mmap.mmap) -> None:
    """Read beside the writer until it is done, then until all that it left was seen."""
    rng, seen = random.Random(seed), 0
    with open_disk(folder, SLOTS, BLOCK_BYTES, io=io, read_only=True) as tier:
        newest = [0] * len(KEYS)
        while not done[0] or seen < 100:
            number = rng.randrange(len(KEYS))
            data = get(tier, KEYS[number], BLOCK_BYTES)
            if isinstance(data, bytes):
                version = version_in(KEYS[number], data)
                assert version >= newest[number], "an older payload came back"
                newest[number] = version
                seen += 1
        left = json.loads(bytes(done[8 : 8 + int.from_bytes(done[1:8], "little")]))
        deadline = time.monotonic() + 30
        while any((version_of(tier, key) or None) != left[n] for n, key in enumerate(KEYS)):
            assert time.monotonic() < deadline, "the reader never saw what the writer left"


def version_of(tier: object, key: bytes) -> int:
    data = get(tier, key, BLOCK_BYTES)  # type: ignore[arg-type]
    return version_in(key, data) if isinstance(data, bytes) else 0


def readers(folder: str, rounds: int, seed: int) -> dict[str, int]:
    """One writer, which checks itself against a dict, and two readers, which start before there is a folder's content."""
    done, rng = mmap.mmap(-1, 4096), random.Random(seed)
    with open_disk(folder, SLOTS, BLOCK_BYTES, io="threads"):
        pass
    children = []
    for n in range(2):
        if (child := os.fork()) == 0:
            code = 2
            try:
                read(folder, seed + n, IOS[n % len(IOS)], done)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    with open_disk(folder, SLOTS, BLOCK_BYTES, io=IOS[-1], threads=2) as tier:
        model: dict[int, bytes] = {}
        for version in range(1, rounds + 1):
            numbers = rng.sample(range(len(KEYS)), 2)
            if rng.random() < 0.9:
                contents = {n: payload_of(KEYS[n], version, rng.randint(8, BLOCK_BYTES)) for n in numbers}
                assert all(r.ok for r in put(tier, {KEYS[n]: data for n, data in contents.items()}))
                model.update(contents)
            else:
                tier.delete([KEYS[n] for n in numbers])
                for n in numbers:
                    model.pop(n, None)
            for n in numbers:
                data = get(tier, KEYS[n], BLOCK_BYTES)
                assert isinstance(data, Result) != (n in model) and (n not in model or data == model[n])
            for n in [n for n in model if tier.contains([KEYS[n]]) == 0]:
                del model[n]  # evicted
        left = json.dumps([version_of(tier, key) or None for key in KEYS]).encode()
        done[8 : 8 + len(left)], done[1:8] = left, len(left).to_bytes(7, "little")
        done[0] = 1
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], codes
    return {"rounds": rounds, "left": len(model)}


def forked(folder: str) -> dict[str, str]:
    """A forked child cannot use the tier of its parent, and does not keep its lock."""
    (wait, go), (answer, say) = os.pipe(), os.pipe()
    tier = open_disk(folder)
    if (child := os.fork()) == 0:
        try:
            os.close(go)
            tier.contains(KEYS)
        except TierError as e:
            os.write(say, str(e).encode())
            tier.close()
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.close(say)
    said = os.read(answer, 500).decode()
    tier.close()
    open_disk(folder).close()  # while the child lives
    os.close(go)
    os.waitpid(child, 0)
    return {"said": said}


def outcome(part: Callable[..., object], *args: object) -> object:
    try:
        return part(*args)
    except Exception:  # noqa: BLE001 - shown by the test
        return traceback.format_exc()


if __name__ == "__main__":
    logging.disable()
    place, seed = sys.argv[1], int(sys.argv[4])
    found = {
        "forked": outcome(forked, f"{place}/forked"),
        "kills": outcome(kills, f"{place}/kills", int(sys.argv[2]), seed),
        "readers": outcome(readers, f"{place}/readers", int(sys.argv[3]), seed),
    }
    print(json.dumps(found))
