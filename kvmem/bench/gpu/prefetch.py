"""Decode attention over a layer whose KV was prefetched into the cache in front of the memory, by how much of it was:
from nothing, a cold cache, to more than the cache holds. Where the time rises again, the budget evicts its own bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from kvmem.bench.gpu.attention import queries
from kvmem.bench.gpu.kernels import kernels_of
from kvmem.bench.gpu.measure import FAILURES, Part, spread_us
from kvmem.bench.gpu.memory import Managed
from kvmem.bench.model import BACKENDS, Backend
from kvmem.bench.timing import WARM_UP, Ratio, Spread
from kvmem.plan import prefetch

_SECONDS = 6.0


@dataclass(frozen=True)
class PrefetchRow:
    """``us``: of attention over a layer of ``layer_bytes``, of which ``budget_bytes`` were prefetched after the cache
    was overwritten; ratio: over the same after no prefetch. prefetch_us: until the prefetch is done, launch included.
    """

    kernel: str
    backend: str
    layer_bytes: int
    budget_bytes: int
    prefetch_us: Spread
    us: Spread
    ratio: Ratio


def prefetched(part: Part) -> None:
    """Both backends with the first decode kernel that runs."""
    for backend in BACKENDS:
        part.attempt(backend, _SECONDS, partial(_case, part, backend))


def _case(part: Part, backend: Backend) -> None:
    device, sizes = part.device, part.sizes
    sequences, tokens = sizes.prefetch_case
    model = sizes.model.with_layers(1)
    memory = Managed(model, device, backend, sequences, tokens, page_bytes=sizes.page_bytes)
    memory.ask(1)
    q, alloc = queries(model, memory), memory.allocator
    reads = alloc.read_set(0, memory.batch)
    other = torch.zeros(2 * max(sizes.prefetch_budgets), dtype=torch.uint8, device=device.torch_device)
    windows = {
        budget: prefetch([reads], window_seconds=1, bytes_per_second=1 << 50, budget_bytes=budget)[0]
        for budget in (0, *sizes.prefetch_budgets)
    }
    for kernel in kernels_of(device, "decode"):
        try:
            run = kernel.prepare(memory, model)
            run(q, 0)
            break
        except FAILURES as error:
            part.report.skip(f"{backend}, {kernel.name}", error)
    else:
        return
    times: dict[int, list[float]] = {budget: [] for budget in windows}
    waits: dict[int, list[float]] = {budget: [] for budget in windows}
    for _ in range(WARM_UP + sizes.repetitions):
        for budget, window in windows.items():
            other.add_(1)  # takes the place of all that the cache holds
            device.synchronize()
            waits[budget].append(device.time_us(lambda window=window: alloc.prefetch(window).wait()))  # type: ignore[misc]
            times[budget].append(device.time_us(lambda: run(q, 0)))
    cold = times[0][WARM_UP:]
    for budget, us in times.items():
        row = PrefetchRow(
            kernel.name, backend, reads.num_bytes, budget, spread_us(waits[budget][WARM_UP:]), spread_us(us[WARM_UP:]),
            Ratio.of(us[WARM_UP:], cold),
        )  # fmt: skip
        part.report.add("prefetch", row)
