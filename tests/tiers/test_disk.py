"""The suite of tiers on disks: each way to read and write, with and without the page cache, each policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_support import FINGERPRINT, IOS, capacity_of
from tier_suite import LARGEST, TierSuite

from kvmem.tiers import Tier
from kvmem.tiers.disk import DiskTier


class DiskSuite(TierSuite):
    options: dict[str, Any] = {}

    @pytest.fixture
    def make(self, tmp_path: Path) -> Iterator[Callable[..., Tier]]:
        tiers = list[DiskTier]()

        def opened(num_blocks: int = 64) -> Tier:
            options = dict(capacity=capacity_of(num_blocks, LARGEST), block_bytes=LARGEST, fingerprint=FINGERPRINT)
            tiers.append(DiskTier(tmp_path / f"disk{len(tiers)}", **options, **self.options))
            return tiers[-1]

        yield opened
        for tier in tiers:
            tier.close()


class TestThreads(DiskSuite):
    options = dict(io="threads")


class TestOneThreadBuffered(DiskSuite):
    options = dict(io="threads", threads=1, direct=False)


class TestDensity(DiskSuite):
    options = dict(io="threads", threads=2, policy="density")


@pytest.mark.skipif("io_uring" not in IOS, reason="needs the package liburing, and a kernel that allows io_uring")
class TestUring(DiskSuite):
    options = dict(io="io_uring")


@pytest.mark.skipif("io_uring" not in IOS, reason="needs the package liburing, and a kernel that allows io_uring")
class TestUringBuffered(DiskSuite):
    options = dict(io="io_uring", direct=False)
