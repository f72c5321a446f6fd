"""Plans are done as they say: steps take no more memory than was declared, and the bench compares their times."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from typing import Any

import torch

import kvmem
from kvmem import SpecError
from kvmem.bench.near.modules import CASES, SHAPE, RandomMixtral, module_batching
from kvmem.plan import Grid, HardwareProfile, Link, MatmulRate, ModuleStep, StagingRing, expert_batches, modules

TINY = replace(SHAPE, num_layers=2, hidden=64, num_query_heads=4, head_dim=16, expert_hidden=64, vocab=50)


def test_rows(backend: Any) -> None:
    rows = module_batching(backend, batch=6, context=40, repetitions=2, shape=TINY)
    assert [row.case for row in rows] == list(CASES)
    assert json.loads(json.dumps([asdict(row) for row in rows]))
    for row in rows:
        assert (row.backend, row.B, row.context, row.us.count) == (backend, 6, 40, 2)
        assert row.predicted_us > 0 and 0 < row.ratio.p10 <= row.ratio.p90
    planned, staged, in_place, alone = rows
    assert (staged.omega, in_place.omega, alone.omega, alone.ba) == (0, 1, 0, 1)
    assert planned.predicted_us <= min(row.predicted_us for row in rows)


def test_a_step_takes_no_more_memory_than_its_plan(backend: Any, seed: int) -> None:
    draw, done = random.Random(seed), 0
    model, context = RandomMixtral(TINY), 24
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=16, dtype="float32", block_size=4)
    for _ in range(12):
        links = [Link(name, 10 ** draw.uniform(7, 10)) for name in ("up", "down", "memory", "attention", "cpu")]
        sizes = (int(10 ** draw.uniform(5, 6.5)), int(10 ** draw.uniform(6, 6.5)))
        profile = HardwareProfile("drawn", *sizes, *links, (MatmulRate("float32", 1, 1e9),))
        grid = Grid(omega=(draw.choice([0.0, 0.3, 1.0]),), ba=(draw.randrange(1, 9),))
        try:
            plan = modules(spec, TINY, profile, context=context, queries=20, grid=grid)
        except SpecError:
            continue
        with kvmem.Allocator(
            spec, backend=backend, device="cpu", memory="2MiB", page_bytes=4096, max_sequences=20, max_tokens=context
        ) as host:
            sequences = [host.sequence() for _ in range(plan.B)]
            for seq in sequences:
                seq.extend(context - 1)
                seq.commit(count=context - 1)
            ring = StagingRing(host, blocks=plan.staging_blocks, buffers=plan.staging_buffers)
            with ModuleStep(ring, sequences, micro_batch=plan.ba, omega=plan.omega) as step:
                assert (step.cpu_rows, [range(r.start, r.stop) for r in step._rows]) == (
                    plan.cpu_rows, plan.micro_batches(),
                )  # fmt: skip
                model.logits(torch.zeros(plan.B, dtype=torch.int64), step.positions, step.attend, plan.be)
                step.commit([0] * plan.B)
            assert ring.peak_bytes <= ring.bytes == plan.staging_bytes <= plan.device_bytes <= sizes[0]
            weights = 2 * (TINY.dense_bytes + 8 * TINY.expert_bytes)
            assert weights + host.stats().used_bytes <= plan.host_bytes <= sizes[1]
        chosen = torch.randint(8, (plan.B, 2))
        assert max(len(rows) for _, rows, _ in expert_batches(chosen, plan.be)) <= plan.be
        done += 1
    assert done > 2
