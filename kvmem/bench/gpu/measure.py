"""What all parts share: their time, the errors that a case may raise, and timing in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic

import numpy as np
import torch

from kvmem.bench.document import PartReport, part_path
from kvmem.bench.gpu.device import BenchDevice, Call
from kvmem.bench.gpu.sizes import Sizes
from kvmem.bench.timing import WARM_UP, Spread
from kvmem.errors import KVMemError

#: Errors that end one kernel or case, not the part: ours, torch's and FlashInfer's, and those of calls that another
#: version of a package does not accept.
FAILURES = (KVMemError, RuntimeError, TypeError, ValueError, AttributeError)


class Part:
    """A part that runs: its device, sizes and report, and the ``seconds`` that it may take from now on."""

    def __init__(
        self, name: str, device: BenchDevice, sizes: Sizes, seconds: float, folder: Path | None, command: list[str]
    ) -> None:  # fmt: skip
        self.device, self.sizes, self.seconds, self._begin = device, sizes, seconds, monotonic()
        path = None if folder is None else part_path(folder, name, device.name)
        model = {key: value if isinstance(value, int) else str(value).removeprefix("torch.")
                 for key, value in asdict(sizes.model).items()}  # fmt: skip
        self.report = PartReport(name, device.facts(), command, path, model=model, device=device.name)

    @property
    def spent(self) -> float:
        return monotonic() - self._begin

    def allows(self, case: str, seconds: float) -> bool:
        """Whether ``seconds``, which ``case`` takes on a GPU, are left; if not, the report says so."""
        if self.spent + (seconds if self.device.kind == "cuda" else 0) <= self.seconds:
            return True
        self.report.skip(case, "the part's time was up")
        return False

    def attempt(self, case: str, seconds: float, run: Callable[[], None]) -> None:
        """Runs ``case`` if there is time, and reports its error (mostly a shortage of memory)."""
        if not self.allows(case, seconds):
            return
        try:
            run()
        except FAILURES as error:
            self.report.skip(case, error)
        self.device.give_back()


def spread_us(microseconds: Sequence[float]) -> Spread:
    return Spread.of_ns(np.asarray(microseconds, dtype=np.float64) * 1e3)


def interleave(
    device: BenchDevice, calls: Mapping[str, Call], repetitions: int, most_seconds: float = 5.0
) -> dict[str, list[float]]:
    """Microseconds of each call in turn, A B A B, so that a slow moment of the device affects all: ``repetitions``
    times each, or at least 5 times once ``most_seconds`` are spent.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    for repetition in range(WARM_UP + repetitions):
        for name, call in calls.items():
            us = device.time_us(call)
            spent += us
            if repetition >= WARM_UP:
                times[name].append(us)
        if repetition >= WARM_UP + 4 and spent > most_seconds * 1e6:
            break
    return times


def copy_bandwidth(device: BenchDevice, size: int, repetitions: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    times = interleave(device, {"copy": lambda: target.copy_(source)}, repetitions)["copy"]
    return float(2 * size / (np.median(times) / 1e6))
