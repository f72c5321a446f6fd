"""The parts by name, in the order of their value, and how one of them is run."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmem.bench.gpu.admit import admit
from kvmem.bench.gpu.attend import FAILURES, queries
from kvmem.bench.gpu.attention import attention
from kvmem.bench.gpu.decode import decode
from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.elastic import elastic
from kvmem.bench.gpu.kernels import KERNELS, Kernel
from kvmem.bench.gpu.layout import layout
from kvmem.bench.gpu.memory import Managed
from kvmem.bench.gpu.part import Budget, Report
from kvmem.bench.gpu.sizes import ModelShape, Sizes
from kvmem.bench.gpu.vmm import vmm
from kvmem.bench.threads import one_thread

__all__ = ["PARTS", "WARM_UP", "Part", "run_part"]

WARM_UP = "warm-up"
#: They cover every module that the parts load; FlashInfer compiles each once, into a folder that the parts share.
_COMPILED = ("FlashInfer decode, CUDA cores", "FlashInfer prefill, fa2")


@dataclass(frozen=True)
class Part:
    """share: of the time for all parts."""

    run: Callable[[BenchDevice, Sizes, Budget, Report], None]
    share: float


def _compile_kernels(device: BenchDevice, sizes: Sizes, budget: Budget, report: Report) -> None:
    """Compiles what FlashInfer has not compiled yet, so that no part spends its time on it."""
    chosen = [kernel for kernel in KERNELS if kernel.kind == device.kind and kernel.name in _COMPILED]

    def prepare(kernel: Kernel) -> None:
        model = ModelShape(layers=1)
        memory = Managed(model, device, "paged", 2, 32)
        memory.ask(1)
        try:
            kernel.prepare(memory, model)(queries(model, memory), 0)
        except FAILURES as error:
            report.skip(kernel.name, error)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(prepare, chosen))


PARTS: dict[str, Part] = {
    WARM_UP: Part(_compile_kernels, 0.20),
    "vmm": Part(vmm, 0.07),
    "admit": Part(admit, 0.09),
    "decode": Part(decode, 0.19),
    "attention": Part(attention, 0.23),
    "layout": Part(layout, 0.13),
    "elastic": Part(elastic, 0.09),
}


def run_part(
    name: str, device: BenchDevice, sizes: Sizes, seconds: float, folder: Path | None, command: list[str]
) -> dict[str, Any]:
    """One part in this process; its document, which is in ``folder`` too. Errors are the caller's to see."""
    report, budget = Report(name, device, sizes, folder if name != WARM_UP else None, command), Budget(seconds)
    with one_thread() if device.torch_device.type == "cpu" else nullcontext():
        PARTS[name].run(device, sizes, budget, report)
    report.close(budget.spent, None)
    return report.document
