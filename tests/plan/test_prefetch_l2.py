"""The kernel that prefetches into a GPU's L2: what it is launched with, which lines it names, and that it compiles."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prefetch_world import grow, make

from kvmem.memory.streams import Streams

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install -e .[triton]"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"),
]


class Side:
    """A stream."""

    handle = 9
    record_event: Any


class Kernel:
    """In the kernel's place: notes its grid, its arguments and the ranges in the buffer."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, dict[str, int], list[int]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(buffer: torch.Tensor, **fixed: int) -> None:
            self.launches.append((grid, fixed, buffer[: 1 + 4 * int(buffer[0])].tolist()))

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    from kvmem.allocator.prefetch import l2_triton

    found = Kernel()
    monkeypatch.setattr(l2_triton, "_prefetch", found)
    return found


def test_a_launch_names_the_ranges_of_the_buffer(kernel: Kernel) -> None:
    from kvmem.allocator.prefetch.l2_triton import LINE_BYTES, PROGRAMS, L2Prefetcher

    prefetcher = L2Prefetcher(torch.device("cpu"), most_ranges=3)
    address = prefetcher.buffer.data_ptr()
    for rows in ([[5, 6, 7, 8]], [[1, 2, 3, 4]] * 3, [[1, 2, 3, 4]] * 5, []):
        table = np.array(rows, np.int64).reshape(-1, 4)
        assert prefetcher.fill(table) == sum(row[1] * row[2] for row in rows[:3])
        prefetcher.launch()
        grid, fixed, buffer = kernel.launches[-1]
        assert grid == (PROGRAMS,) and fixed["LINE"] == LINE_BYTES and fixed["PROGRAMS"] == PROGRAMS <= 8
        assert buffer == [len(rows[:3]), *np.ravel(rows[:3]).tolist()]
    assert prefetcher.buffer.data_ptr() == address  # for a captured graph


def test_an_allocator_launches_it_on_the_stream(
    backend: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    alloc, on = make(backend, prefix_cache=False), list[Any]()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on.append(stream) or nullcontext())
    monkeypatch.setattr(alloc.pool.streams, "include", lambda stream: on.append(("include", stream)))
    monkeypatch.setattr(type(alloc), "_touch", type(alloc)._touch_cuda)
    event = SimpleNamespace(query=lambda: True)
    side = Side()
    side.record_event = lambda: event
    sequence = alloc.sequence()
    grow(sequence, 40, rng)
    from kvmem.plan import prefetch

    reads = alloc.read_set(0, [sequence])
    (item,) = prefetch([reads], window_seconds=1, bytes_per_second=1 << 30, budget_bytes="1MiB")
    for times in (1, 2):
        under_way = alloc.prefetch(item, side)
        assert under_way.done() and under_way.issued_bytes == reads.num_bytes
        assert len(kernel.launches) == times and on.count(("include", side)) == 1 and on[-1] is side
        assert kernel.launches[-1][2] == [len(reads.table), *reads.table.ravel().tolist()]
    sequence.free()
    assert alloc.prefetch(item, side).skipped_bytes == reads.num_bytes and len(kernel.launches) == 2


def test_fences_cover_a_stream_beside_and_order_it_once() -> None:
    calls = list[tuple[int, bool]]()
    pool = SimpleNamespace(set_stream=lambda handle, only=True: calls.append((handle, only)))
    info = SimpleNamespace(has_streams=True, captured_code=900)
    device = SimpleNamespace(info=info, current_stream=lambda: 7, stream_handle=lambda stream: stream.handle)
    streams, side = Streams(pool, device), Side()  # type: ignore[arg-type]
    calls.clear()
    for _ in range(2):
        streams.include(side)
        assert calls == [(9, False), (7, False)] and streams.handle == 7
    current = Side()
    current.handle = 7
    streams.include(current)
    assert len(calls) == 2


INTERPRETED = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from kvmem.allocator.prefetch import l2_triton as l2
seen = []
def ask(asm, constraints, args, dtype, is_pure, pack):
    line, here = (np.asarray(a.handle.data).ravel() for a in args)
    seen.extend(line[here != 0].tolist())
l2.tl.inline_asm_elementwise = ask
rng = np.random.default_rng(int(sys.argv[2]))
for case in range(4):
    table = np.stack([rng.integers(0, 1 << 40, 3), rng.integers(1, 700, 3), rng.integers(1, 50, 3), rng.integers(700, 3000, 3)], 1)
    table[0] = [1 << 40, 300_000, 1, 300_000]
    expected = [line * 128 for a, b, n, s in table.tolist() for k in range(n)
                for line in range((a + k * s) // 128, (a + k * s + b - 1) // 128 + 1)]
    prefetcher = l2.L2Prefetcher(torch.device("cpu"), most_ranges=8)
    assert prefetcher.fill(table) == sum(b * n for _, b, n, _ in table.tolist())
    seen.clear(); prefetcher.launch()
    assert sorted(seen) == sorted(expected), (len(seen), len(expected))
"""


def test_the_kernel_asks_for_every_line_of_the_ranges_once(seed: int) -> None:
    """In Triton's interpreter, which is chosen on import."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, str(Path(__file__).parents[2]), str(seed)], capture_output=True, text=True,
        check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_kernel_compiles_for_gpus_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from kvmem.allocator.prefetch import l2_triton

    fixed = {"PROGRAMS": 8, "LINE": 128, "LINES": 256}
    names = l2_triton._prefetch.arg_names
    signature = {"table": "*i64"} | dict.fromkeys(fixed, "constexpr")
    for generation in (80, 90, 100):
        source = ASTSource(l2_triton._prefetch, signature, {(names.index(n),): v for n, v in fixed.items()})
        found = compile(source, target=GPUTarget("cuda", generation, 32)).asm
        assert "@p prefetch.global.L2 [" in found["ptx"] and found["cubin"]
