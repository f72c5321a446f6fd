"""The suite of tiers on disks: each way to read and write, with and without the page cache, each policy. And io_uring:
it is used where package, processor and kernel allow it, and else named or left alone.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_support import IOS, open_disk
from tier_suite import LARGEST, TierSuite

from kvmem.errors import SpecError, TierError
from kvmem.tiers import Tier
from kvmem.tiers.disk import DiskTier
from kvmem.tiers.disk.file_io import ThreadIO, UringIO, open_io
from kvmem.tiers.disk.files import Files

CASES: dict[str, dict[str, Any]] = {
    "threads": dict(threads=3),
    "one thread, page cache": dict(threads=1, direct=False),
    "density": dict(threads=2, policy="density"),
    "io_uring": dict(io="io_uring"),
    "io_uring, page cache": dict(io="io_uring", direct=False),
}


class TestDisk(TierSuite):
    @pytest.fixture(params=CASES)
    def make(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Tier]]:
        options, tiers = CASES[request.param], list[DiskTier]()
        if options.get("io", "threads") not in IOS:
            pytest.skip("needs the package liburing, and a kernel that allows io_uring")

        def opened(num_blocks: int = 64) -> Tier:
            tiers.append(open_disk(tmp_path / f"disk{len(tiers)}", num_blocks, LARGEST, **options))
            return tiers[-1]

        yield opened
        for tier in tiers:
            tier.close()


def test_io_uring_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liburing", None)
    with pytest.raises(SpecError, match=r"pip install 'kvmem\[io-uring\]'"):
        open_disk(tmp_path / "disk", io="io_uring")
    assert not (tmp_path / "disk").exists()
    with open_disk(tmp_path / "disk", io="auto") as tier:
        assert isinstance(tier._io, ThreadIO)


@pytest.mark.parametrize(
    ("ring", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("raise PermissionError(1, 'Operation not permitted')", "Operation not permitted"),
    ],
)
def test_a_package_that_does_not_work_here_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring: str, reason: str
) -> None:
    """Published wheels end the process on processors without AVX-512: a process of its own finds out."""
    (tmp_path / "liburing.py").write_text(f"def Ring():\n    {ring}\n")
    monkeypatch.delitem(sys.modules, "liburing", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TierError, match=f"liburing does not work here .*{reason}.*threads"):
        open_disk(tmp_path / "disk", io="io_uring")
    with open_disk(tmp_path / "disk", io="auto") as tier:
        assert isinstance(tier._io, ThreadIO)


def test_a_package_that_works_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = "\n".join(f"def io_uring_{name}(*_): pass" for name in ("queue_init", "queue_exit", "register_eventfd"))
    (tmp_path / "liburing.py").write_text(f"class Ring: pass\nclass Cqe: pass\n{calls}\n")
    monkeypatch.delitem(sys.modules, "liburing", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    io = open_io("auto", Files(), threads=1)
    assert isinstance(io, UringIO)
    io.close()


@pytest.mark.skipif("io_uring" not in IOS, reason="needs the package liburing, and a kernel that allows io_uring")
def test_a_kernel_that_refuses_io_uring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import liburing

    def refused(*_: object) -> int:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(liburing, "io_uring_queue_init", refused)
    with pytest.raises(TierError, match="Operation not permitted.*threads"):
        open_disk(tmp_path / "disk", io="io_uring")
    with open_disk(tmp_path / "disk", io="auto") as tier:
        assert isinstance(tier._io, ThreadIO)
