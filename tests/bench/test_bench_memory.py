"""`bench mapping` and `bench rectangle`: small runs of the real thing, and what their tables say."""

from __future__ import annotations

from kvmem.bench.mapping import EXTEND, mapping
from kvmem.bench.memory_report import mapping_tables, rectangle_tables
from kvmem.bench.rectangle import PLAIN, rectangle


def test_a_run_of_pages_is_one_driver_call_and_steady_decode_makes_none() -> None:
    report = mapping(repetitions=1, pages=(64 << 10,), runs=(1, 4))
    managed = [row for row in report.rows if row.way == EXTEND]
    assert [(row.run_pages, row.driver_calls) for row in managed] == [(1, 1.0), (4, 1.0)]
    assert all(row.us.count == 96 and row.us.median > 0 for row in report.rows)
    assert report.decode.driver_calls == 0
    tables = list(mapping_tables(report.to_dict(["mapping"])["results"]))
    assert [len(rows) for _, _, rows in tables] == [len(report.rows), 1]


def test_attention_over_both_backends_beside_a_plain_tensor() -> None:
    report = rectangle((1, 3), (80,), repetitions=2)
    for batch in (1, 3):
        rows = {row.memory: row for row in report.rows if row.sequences == batch}
        assert {PLAIN, "virtual", "virtual, K and V apart", "paged"} <= set(rows)
        assert rows[PLAIN].ratio.median == 1.0
        assert 0 < max(row.worst_error for row in rows.values()) < 2e-2  # bfloat16 rounds, and nothing worse
    ((_, columns, cells),) = rectangle_tables(report.to_dict(["rectangle"])["results"])
    assert len(cells) == len(report.rows) and all(len(row) == len(columns) for row in cells)
