"""The bench's rows of module batching: the plans are done as they say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from kvmem.bench.near_modules import CASES, SHAPE, module_batching


def test_rows(backend: Any) -> None:
    shape = replace(SHAPE, num_layers=2, hidden=64, expert_hidden=64, vocab=50)
    rows = module_batching(backend, batch=6, context=40, repetitions=2, shape=shape)
    assert [row.case for row in rows] == list(CASES)
    assert json.loads(json.dumps([asdict(row) for row in rows]))
    for row in rows:
        assert (row.backend, row.B, row.context, row.us.count) == (backend, 6, 40, 2)
        assert row.predicted_us > 0 and 0 < row.ratio.p10 <= row.ratio.p90
    planned, staged, in_place, alone = rows
    assert (staged.omega, in_place.omega, alone.omega, alone.ba) == (0, 1, 0, 1)
    assert planned.predicted_us <= min(row.predicted_us for row in rows)
