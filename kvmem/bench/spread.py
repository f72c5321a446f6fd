"""The middle and the edges of many timings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Spread"]


@dataclass(frozen=True)
class Spread:
    """Percentiles of ``count`` timings, in microseconds. Zeros when there were none."""

    count: int
    p10: float
    median: float
    p90: float
    p99: float
    largest: float

    @classmethod
    def of_ns(cls, nanoseconds: npt.ArrayLike) -> Spread:
        values = np.asarray(nanoseconds, dtype=np.float64) / 1000.0
        if values.size == 0:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        p10, median, p90, p99, largest = np.percentile(values, (10, 50, 90, 99, 100)).tolist()
        return cls(values.size, p10, median, p90, p99, largest)
