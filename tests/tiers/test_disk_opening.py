"""Opening a disk tier: what is refused and how, what comes back after a restart, and who may open what at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from disk_simulated import SimulatedFiles
from disk_support import FINGERPRINT, IOS, OTHER_FINGERPRINT, capacity_of, open_disk
from tier_suite import assert_miss, get, key_of, payload_of, put

from kvmem.errors import SpecError, TierError
from kvmem.tiers import Result, Status
from kvmem.tiers.disk import DiskTier, segments
from kvmem.tiers.disk.files import Files

SEGMENT = "segment-00000.kvmem"


def listing(folder: Path) -> dict[str, bytes | str]:
    """What a refusal must leave as it was."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else ""
        for p in folder.rglob("*")
        if p.name != segments.LOCK_NAME and not stat.S_ISFIFO(p.lstat().st_mode)
    }


def filled(folder: Path, **options: Any) -> dict[bytes, bytes]:
    contents = {key_of(n): payload_of(key_of(n), 1, 5000) for n in range(5)}
    with open_disk(folder, **options) as tier:
        assert all(r.ok for r in put(tier, contents))
    return contents


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(path=7), "path: got 7"),
        (dict(path=""), "path"),
        (dict(path=b"bytes"), "path"),
        (dict(path="nul\0"), "path"),
        (dict(capacity="1000PiB"), "the largest capacity that works is 2638"),
        (dict(capacity="9PiB", block_bytes=1), "the largest capacity that works"),
        (dict(capacity=None), "capacity: got None"),
        (dict(capacity=0), "capacity: got 0; one block of 6000 bytes takes 16384"),
        (dict(capacity=16383), "16384"),
        (dict(capacity="many"), "capacity: got 'many'"),
        (dict(capacity=1.5), "capacity"),
        (dict(block_bytes=0), "block_bytes: got 0"),
        (dict(block_bytes=1.0), "block_bytes"),
        (dict(fingerprint=b"short"), "fingerprint: got b'short'"),
        (dict(fingerprint="x" * 32), "fingerprint"),
        (dict(io="mmap"), "io: got 'mmap'; must be one of auto, io_uring, threads"),
        (dict(threads=0), "threads: got 0"),
        (dict(threads=1000), "256"),
        (dict(direct=1), "direct: got 1"),
        (dict(read_only="no"), "read_only"),
        (dict(policy="fifo"), "policy: got 'fifo'"),
    ],
)
def test_arguments(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    options = dict(path=tmp_path / "disk", capacity=1 << 20, block_bytes=6000, fingerprint=FINGERPRINT) | options
    with pytest.raises(SpecError, match=words):
        DiskTier(options.pop("path"), **options)
    assert not (tmp_path / "disk").exists()


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    """Another model, another block size, another format, foreign content under our names, and names that are no files."""
    filled(folder := tmp_path / "disk")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (lambda file: None, dict(fingerprint=OTHER_FINGERPRINT), "another model"),
        (lambda file: None, dict(block_bytes=7000), "block_bytes=6000"),
        (lambda file: file.write_bytes(b"kvmemseg\x02\0\0\0" + file.read_bytes()[12:]), {}, "format version 2"),
        (lambda file: file.write_bytes(b"a photograph"), {}, "no segment of kvmem"),
        (lambda file: (file.rename(tmp_path / "aside"), file.symlink_to(tmp_path / "aside")), {}, "no regular file"),
        (lambda file: (file.unlink(), file.mkdir()), {}, "no regular file"),
        (lambda file: (file.rmdir(), os.mkfifo(file)), {}, "no regular file"),
    ]
    for change, options, words in cases:
        change(folder / SEGMENT)
        before = listing(tmp_path)
        for read_only in (False, True):
            with pytest.raises(TierError, match=words) as caught:
                open_disk(folder, read_only=read_only, **options)
            assert str(folder) in str(caught.value) and SEGMENT in str(caught.value)
        assert listing(tmp_path) == before
    (folder / SEGMENT).unlink()
    filled(folder)  # the lock was released by each


def test_the_lock_file_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "precious").write_text("not to be cut off")
    (tmp_path / "disk" / segments.LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(TierError, match=r"kvmem\.lock .* no regular file"):
        open_disk(tmp_path / "disk")
    assert (tmp_path / "precious").read_text() == "not to be cut off"


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        for read_only in (False, True):
            with pytest.raises(TierError, match="name a folder"):
                open_disk(path, read_only=read_only)
    with pytest.raises(TierError, match="a writer makes the folder"):
        open_disk(tmp_path / "nothing", read_only=True)
    assert listing(tmp_path) == {"file": b"content"}


def test_no_permission(tmp_path: Path) -> None:
    """For a user who may not write a writer is refused, and a reader works."""
    contents = filled(folder := tmp_path / "disk")
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(TierError, match="Permission denied; give this user the permission"):
            open_disk(folder)
        with pytest.raises(TierError, match="Permission denied"):
            open_disk(folder / "below")
        with open_disk(folder, read_only=True) as reader:
            assert {key: get(reader, key, 6000) for key in contents} == contents
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written(code: int, tmp_path: Path) -> None:
    class Refusing(Files):
        def allocate(self, fd: int, size: int) -> None:
            raise OSError(code, os.strerror(code))

    (tmp_path / "disk").mkdir()
    with pytest.raises(TierError, match=os.strerror(code)):
        open_disk(tmp_path / "disk", files=Refusing())
    assert listing(tmp_path) == {"disk": ""}  # the file that it had made is gone
    filled(tmp_path / "disk")


def test_more_than_the_file_system_has(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="the largest capacity that works is [0-9]+"):
        open_disk(tmp_path / "disk", capacity="20TiB")
    assert listing(tmp_path) == {"disk": ""}


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (folder := tmp_path / "disk").mkdir()
    foreign = {
        "readme.txt": b"mine",
        "segment-1.kvmem": b"x",
        "segment-00000.kvmem.bak": b"y",
        "segment-000000.kvmem": b"z",
    }
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    (folder / "segments").mkdir()
    filled(folder)
    with open_disk(folder, num_slots=2):
        pass
    assert {name: (folder / name).read_bytes() for name in foreign} == foreign and (folder / "segments").is_dir()


def test_two_writers(tmp_path: Path) -> None:
    with open_disk(tmp_path), pytest.raises(TierError, match=rf"process {os.getpid()} on .* read_only=True"):
        open_disk(tmp_path)
    with open_disk(tmp_path), open_disk(tmp_path, read_only=True), open_disk(tmp_path, read_only=True):
        pass
    with open(tmp_path / segments.LOCK_NAME, "r+b") as other:  # a holder that wrote no name
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(0)
        with pytest.raises(TierError, match="another process"):
            open_disk(tmp_path)
    tier = open_disk(tmp_path)
    del tier  # forgotten, not closed: its lock goes with it
    open_disk(tmp_path).close()


def test_restart(tmp_path: Path) -> None:
    """A thousand blocks come back, byte for byte; what is put next replaces the oldest."""
    contents = {key_of(n): payload_of(key_of(n), 1, 500 + n) for n in range(1000)}
    with open_disk(tmp_path, 1000, 1500) as tier:
        assert all(r.ok for r in put(tier, contents))
        assert tier.capacity()[1:] == (1000 * 8192, 1000)
    for io in IOS:
        with open_disk(tmp_path, 1000, 1500, io=io) as tier:
            assert tier.contains(list(contents)) == 1000
            assert {key: get(tier, key, 1500) for key in contents} == contents
    with open_disk(tmp_path, 1000, 1500) as tier:
        put(tier, {key_of(5000): b"new"})
        assert_miss(tier, key_of(0))
        assert tier.contains([*list(contents)[1:], key_of(5000)]) == 1000


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    """After a restart: the one that was put first, wherever it lies."""
    contents = filled(tmp_path, num_slots=5)
    with open_disk(tmp_path, num_slots=5) as tier:
        for key in list(contents)[:2]:  # put again, into their old slots
            assert put(tier, {key: contents[key]})[0].ok
    with open_disk(tmp_path, num_slots=5) as tier:
        assert get(tier, key_of(2), 6000) == contents[key_of(2)]
        for n, gone in enumerate((3, 4, 0)):
            put(tier, {key_of(9 + n): b"new"})
            assert_miss(tier, key_of(gone))
        assert tier.contains([key_of(1), key_of(2)]) == 2


def test_the_newest_payload_comes_back(tmp_path: Path) -> None:
    files = SimulatedFiles()
    with open_disk(tmp_path, files=files) as tier:
        put(tier, {key_of(0): b"old"})
    old = bytes(files.inodes[SEGMENT].content)
    for version in range(3):
        with open_disk(tmp_path, files=files) as tier:
            put(tier, {key_of(0): b"new %d" % version})
    content = files.inodes[SEGMENT].content  # as if no header had been cleared: a crash came first
    free = next(at for at in range(4096, len(content), 12288) if not any(content[at : at + 96]))
    content[free : free + 12288] = old[4096 : 4096 + 12288]
    with open_disk(tmp_path, files=files) as tier:
        assert get(tier, key_of(0)) == b"new 2" and tier.capacity().num_blocks == 1
        tier.delete([key_of(0)])
    with open_disk(tmp_path, files=files) as tier:
        assert_miss(tier, key_of(0))


def test_capacity_grows_and_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several segments; the files never take more than the capacity."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 3 * 12288)  # two slots of 6,000 bytes
    for slots in (1, 7, 4, 3, 8, 2):
        with open_disk(tmp_path, num_slots=slots) as tier:
            put(tier, {key_of(n): payload_of(key_of(n), n, 6000) for n in range(8)})
            assert tier.capacity() == (slots * 12288, slots * 12288, slots)
        files = [p.stat().st_size for p in tmp_path.glob("segment-*")]
        assert len(files) == -(-slots // 2) and sum(files) == capacity_of(slots, 6000)
        with open_disk(tmp_path, num_slots=slots, read_only=True) as tier:
            assert sum(get(tier, key_of(n), 6000) == payload_of(key_of(n), n, 6000) for n in range(8)) == slots


@pytest.mark.parametrize("size", [0, 10, 4096, 4097, 4096 + 100, 4096 + 12288 * 2, 4096 + 12288 * 2 + 5000])
def test_a_truncated_segment(size: int, tmp_path: Path) -> None:
    contents = filled(tmp_path)
    os.truncate(tmp_path / SEGMENT, size)
    if size == 10:  # not even a superblock
        with pytest.raises(TierError, match="no segment of kvmem"):
            open_disk(tmp_path)
        return
    with open_disk(tmp_path, read_only=True) as tier:
        assert tier.capacity().num_blocks == max(0, size - 4096) // 12288
    for _ in range(2):
        with open_disk(tmp_path) as tier:
            found = {key: data for key in contents if isinstance(data := get(tier, key, 6000), bytes)}
            assert found.items() <= contents.items() and len(found) >= max(0, size - 4096) // 12288
            assert put(tier, {key_of(20): b"new"})[0].ok
    with open_disk(tmp_path) as tier:
        assert all(r.ok for r in put(tier, contents))
        assert {key: get(tier, key, 6000) for key in contents} == contents


def present(tier: DiskTier) -> list[int]:
    return [n for n in range(9) if tier.contains([key_of(n)])]


def test_a_reader_learns_what_the_writer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a segment that is added or removed. A reader writes nothing."""
    monkeypatch.setattr(segments, "SEGMENT_BYTES", 3 * 12288)
    monkeypatch.setattr(
        "kvmem.tiers.disk.tier._RESCAN_SHARE", 0
    )  # or it may wait for ten times what its last look took
    tmp_path.joinpath("disk").mkdir()
    with open_disk(tmp_path / "disk", read_only=True) as reader:
        assert_miss(reader, key_of(0))
        with open_disk(tmp_path / "disk", num_slots=2) as writer:
            put(writer, {key_of(0): b"zero"})
            assert get(reader, key_of(0)) == b"zero"
            writer.delete([key_of(0)])
            assert_miss(reader, key_of(0))
            put(writer, {key_of(1): b"one", key_of(2): b"two"})
            assert reader.contains([key_of(2), key_of(1)]) == 2
        with open_disk(tmp_path / "disk", num_slots=6) as writer:
            put(writer, {key_of(n): b"%d" % n for n in range(3, 7)})
            assert [get(reader, key_of(n)) for n in (2, 6)] == [b"two", b"6"]
            assert reader.capacity().num_blocks == 6
        with open_disk(tmp_path / "disk", num_slots=5) as writer:  # the last segment is cut
            assert_miss(reader, key_of(8))
            assert len(present(reader)) == 5 and present(reader) == present(writer)
        with open_disk(tmp_path / "disk", num_slots=2) as writer:  # and here removed
            assert_miss(reader, key_of(8))
            assert present(reader) == present(writer)
        before = listing(tmp_path)
        for result in (reader.put([key_of(1)], [memoryview(b"x")])[0], reader.delete([key_of(1)])[0]):
            assert result.status is Status.FAILED and "read_only" in result.reason
        assert listing(tmp_path) == before


def test_a_reader_ignores_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment of another model that appears later is no error, finds nothing, and uses up no descriptors."""
    monkeypatch.setattr("kvmem.tiers.disk.tier._RESCAN_SHARE", 0)
    (folder := tmp_path / "disk").mkdir()
    with open_disk(folder, read_only=True) as reader:
        filled(folder, fingerprint=OTHER_FINGERPRINT)
        count = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            assert_miss(reader, key_of(0))
        assert len(os.listdir("/proc/self/fd")) == count


@pytest.mark.parametrize("where", ["open", "preadv", "nowhere"])
def test_without_direct_io(where: str, tmp_path: Path) -> None:
    """A file system that refuses O_DIRECT, at opening a file or at the first read, is used through the page cache."""

    class Refusing(Files):
        def open(self, folder: int, name: str, flags: int) -> int:
            if where == "open" and flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().open(folder, name, flags)

        def preadv(self, fd: int, views: Any, offset: int) -> int:
            if where == "preadv" and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return super().preadv(fd, views, offset)

    with open_disk(tmp_path, files=Refusing()) as tier:
        put(tier, {key_of(0): b"zero"})
        assert get(tier, key_of(0)) == b"zero"
        flags = [fcntl.fcntl(segment.fd, fcntl.F_GETFL) & os.O_DIRECT for segment in tier._folder.segments.values()]
    assert where == "nowhere" or not any(flags)


def test_descriptors_and_threads_are_released(tmp_path: Path) -> None:
    count = len(os.listdir("/proc/self/fd"))
    for io in IOS:
        for _ in range(3):
            filled(tmp_path, io=io, threads=3)
        with pytest.raises(TierError):
            open_disk(tmp_path, io=io, fingerprint=OTHER_FINGERPRINT)
    assert len(os.listdir("/proc/self/fd")) == count


def test_corrupt_slots_are_used_again(rng: random.Random) -> None:
    files = SimulatedFiles()
    with open_disk("disk", num_slots=2, files=files) as tier:
        for n in range(20):
            put(tier, {key_of(n): payload_of(key_of(n), n, 6000)})
            content = files.inodes[SEGMENT].content
            at = next(at for at in (4096, 16384) if content[at + 16 : at + 48] == key_of(n))
            content[at + 4096 + rng.randrange(6000)] ^= 1
            result = get(tier, key_of(n), 6000)
            assert isinstance(result, Result) and result.status is Status.CORRUPT
            assert tier.capacity().num_blocks == 0
        assert all(r.ok for r in put(tier, {key_of(n): b"x" for n in (30, 31)})) and tier.capacity().num_blocks == 2
