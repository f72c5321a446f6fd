"""The rows of the bench: what they count is exact, whatever the machine's speed; and how a crossover is found."""

from __future__ import annotations

import pytest

pytest.importorskip("rich", reason="the bench needs the extra kvmem[bench]")

from kvmem.bench.near.tiers import NearRow, _crossover, near_tiers
from kvmem.bench.timing import Ratio, Spread


def test_rows_of_every_place_and_context() -> None:
    seen: list[int] = []
    found = near_tiers(kv_heads=2, group=3, width=32, contexts=(64, 128), repetitions=1, done=seen.append)
    assert [(row.place, row.context) for row in found["near"]] == [
        (place, context) for place in ("disk", "disk, SparF at 1/8", "host") for context in (64, 128)
    ]
    for row in found["near"]:
        size = 2 * row.context * 2 * 32 * 4  # of K and V
        assert (row.link_bytes, row.copied_bytes) == (2 * 2 * 3 * 32 * 4, size)
        assert row.delivered_bytes == (size // 8 if "SparF" in row.place else size) <= row.media_read_bytes
    assert seen == [1, 2] and [row.place for row in found["near_crossover"]] == ["disk", "disk, SparF at 1/8", "host"]


@pytest.mark.parametrize(
    ("speedups", "context"), [([2, 2, 2], 1), ([0.5, 2, 2], 2), ([2, 0.5, 2], 3), ([2, 2, 0.5], None), ([], None)]
)
def test_the_crossover_is_where_all_longer_contexts_are_faster_too(speedups: list[float], context: int | None) -> None:
    spread = Spread.of_ns([1])
    rows = [NearRow("host", i + 1, spread, spread, Ratio(s, s, s), 0, 0, 0, 0) for i, s in enumerate(speedups)]
    assert (
        _crossover([*reversed(rows), NearRow("disk", 9, spread, spread, Ratio(0, 0, 0), 0, 0, 0, 0)], "host").context
        == context
    )
