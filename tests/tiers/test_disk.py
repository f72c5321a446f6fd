"""The suite of tiers on disks: each way to read and write, with and without the page cache, each policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disk_support import IOS, open_disk
from tier_suite import LARGEST, TierSuite

from kvmem.tiers import Tier
from kvmem.tiers.disk import DiskTier

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
