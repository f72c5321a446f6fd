"""Rounding: what a sequence maps beyond its last token, because a page is mapped whole. Exact integers, no allocator.

A sequence of n tokens in address ranges of b1, b2, ... bytes a token maps ``ceil(n * b / page)`` pages of each, since a
token may straddle two pages. One range for all layers wastes less than one page; one range for each layer's K and V up
to a page each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvmem.bench.model import Model
from kvmem.bench.traces import Trace

_SWEEP_PAGES = tuple(1 << shift for shift in range(16, 26))  # 64 KiB (patched kernel modules) to 32 MiB


@dataclass(frozen=True)
class Rounding:
    """Bytes of all requests of a trace when each ends: in use, and mapped in whole pages."""

    layout: str
    page_bytes: int
    page_tokens: float  # tokens of one range that a page holds
    used_bytes: int
    mapped_bytes: int


def round_up_at_end(tokens: npt.NDArray[np.int64], range_bytes: Sequence[int], page_bytes: int) -> tuple[int, int]:
    """(bytes in use, bytes mapped) summed over sequences of ``tokens`` int64 [n]."""
    used = mapped = 0
    for size, ranges in Counter(range_bytes).items():
        used += int(tokens.sum()) * size * ranges
        mapped += int((-(-(tokens * size) // page_bytes)).sum()) * page_bytes * ranges
    return used, mapped


def rounding_table(trace: Trace, model: Model, page_bytes: int) -> list[Rounding]:
    """The layouts a user chooses from, at one page size."""
    layers = len(model.layer_bytes)
    choices = [("all layers in one range", layers)]
    choices += [(f"{group} layers in a range", group) for group in (8,) if group < layers]
    choices += [("one range a layer", 1), ("one range for each layer's K and V", 0)]
    rows = []
    for name, group in choices:
        ranges = model.ranges(group)
        used, mapped = round_up_at_end(trace.total_tokens, ranges, page_bytes)
        rows.append(Rounding(name, page_bytes, page_bytes / max(ranges), used, mapped))
    return rows


def rounding_sweep(trace: Trace, model: Model) -> list[Rounding]:
    """Every layout of `rounding_table` against page sizes from 64 KiB to 32 MiB."""
    return [row for page_bytes in _SWEEP_PAGES for row in rounding_table(trace, model, page_bytes)]
