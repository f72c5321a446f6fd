"""The bench of prefetches behind all-reduces: two ranks, both media, the figures that it promises."""

from __future__ import annotations

import math
from dataclasses import asdict

from kvmem.bench.near.prefetch import near_prefetch


def test_both_media_are_measured() -> None:
    rows = near_prefetch(repetitions=2, collective_bytes=1 << 16)
    assert [row.medium for row in rows] == ["disk", "memory"]
    for row in rows:
        assert (row.windows, row.collective_us.count, row.after_us.count, row.behind_us.count) == (8, 2, 2, 2)
        assert row.window_bytes > 1 << 20 and row.predicted_us > 0 and row.share.median > 0
        assert math.isclose(row.error, row.predicted_us / row.behind_us.median - 1)
        assert asdict(row)
