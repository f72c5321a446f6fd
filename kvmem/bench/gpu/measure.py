"""Contenders in turn, A B A B, so that a slow moment of the device falls on all; ratios are of times taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvmem.bench.gpu.device import BenchDevice, Call
from kvmem.bench.spread import Spread

__all__ = ["Ratio", "copy_bandwidth", "interleave", "spread_us"]

_WARM_UP = 2


@dataclass(frozen=True)
class Ratio:
    """Of times measured in the same repetition: the median of the ratios, and their spread."""

    p10: float
    median: float
    p90: float

    @classmethod
    def of(cls, times: Sequence[float], base: Sequence[float]) -> Ratio:
        pairs = np.asarray(times, dtype=np.float64) / np.asarray(base, dtype=np.float64)
        p10, median, p90 = np.percentile(pairs, (10, 50, 90)).tolist()
        return cls(p10, median, p90)


def spread_us(microseconds: Sequence[float]) -> Spread:
    return Spread.of_ns(np.asarray(microseconds, dtype=np.float64) * 1e3)


def interleave(
    device: BenchDevice, calls: Mapping[str, Call], repetitions: int, most_seconds: float = 5.0
) -> dict[str, list[float]]:
    """Microseconds of each call, ``repetitions`` times each, fewer (but 5) once ``most_seconds`` are spent."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    for repetition in range(_WARM_UP + repetitions):
        for name, call in calls.items():
            us = device.time_us(call)
            spent += us
            if repetition >= _WARM_UP:
                times[name].append(us)
        if repetition >= _WARM_UP + 4 and spent > most_seconds * 1e6:
            break
    return times


def copy_bandwidth(device: BenchDevice, size: int, repetitions: int) -> float:
    """Bytes a second, read and written, of a copy on the device: what its memory really gives."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    times = interleave(device, {"copy": lambda: target.copy_(source)}, repetitions)["copy"]
    return float(2 * size / (np.median(times) / 1e6))
