"""Mapped pages beside a bare mmap, and one SDPA call over a batch: small runs of the real thing, and their tables."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from benchmarks.memory import sweep_mapping, sweep_sdpa
from kvmem import PagePool
from kvmem.bench.attention import PLAIN
from kvmem.bench.host import EXTEND, open_rows
from kvmem.bench.render import tables


def test_a_run_of_pages_is_one_driver_call() -> None:
    found = sweep_mapping(1, pages=(64 << 10,), runs=(1, 4))
    managed = [row for row in found if row.way == EXTEND]
    assert [(row.run_pages, row.driver_calls) for row in managed] == [(1, 1.0), (4, 1.0)]
    assert all(row.us.count == 96 and row.us.median > 0 for row in found)
    (table,) = tables({}, {"mapping": [asdict(row) for row in found]})
    assert len(table.rows) == len(found) and all(len(row) == len(table.columns) for row in table.rows)


def test_a_batch_over_parked_rows_decodes_without_driver_calls_with_the_mapper_on() -> None:
    sequences, prompt, steps, page_bytes = 16, 256, 256, 64 << 10
    longest = prompt + steps + 64
    pool = PagePool(device="cpu", memory=2 * sequences * longest // 16 * page_bytes, page_bytes=page_bytes)
    allocator = open_rows(pool, page_bytes, sequences, longest, map_ahead_tokens=32)
    one = np.ones(sequences, dtype=np.int32)
    for found in ("nothing mapped", "parked rows"):
        ids = allocator.open_batch(sequences)
        allocator.extend_batch(ids, one * prompt)
        allocator.commit_batch(ids, one * prompt)
        before = allocator.stats().driver_calls
        for _ in range(steps):
            allocator.extend_batch(ids, one)
            allocator.commit_batch(ids, one)
        calls = allocator.stats().driver_calls - before
        assert (calls == 0) == (found == "parked rows"), found
        allocator.free_batch(ids)


def test_attention_over_both_backends_beside_a_plain_tensor() -> None:
    found = sweep_sdpa(2, batches=(1, 3), contexts=(80,))
    for batch in (1, 3):
        rows = {row.memory: row for row in found if row.sequences == batch}
        assert {PLAIN, "virtual", "virtual, K and V apart", "paged"} <= set(rows)
        assert rows[PLAIN].ratio.median == 1.0
        assert 0 < max(row.worst_error for row in rows.values()) < 2e-2  # bfloat16 rounds, and nothing worse
    (table,) = tables({}, {"sdpa": [asdict(row) for row in found]})
    assert len(table.rows) == len(found) and all(len(row) == len(table.columns) for row in table.rows)
