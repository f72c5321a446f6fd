"""Prefetch from GPU memory into the L2 cache, as a Triton kernel of few programs.

Not run on a GPU yet: its source is compiled to PTX by a test, and its launch is checked with a stand-in.
"""

# No `from __future__ import annotations`: Triton reads those of its kernels, and real ones need no parsing.

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

__all__ = ["LINE_BYTES", "MOST_RANGES", "PROGRAMS", "L2Prefetcher"]

#: Programs of a launch. Few, because the collective that runs beside it needs processors too.
PROGRAMS = 8
MOST_RANGES = 4096
LINE_BYTES = 128
_LINES = 256  # that a program asks for at once


@triton.jit  # type: ignore[untyped-decorator]
def _prefetch(table, PROGRAMS: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    # The number of ranges is read from memory, so that a captured graph can be given other ranges. Loops are `while`,
    # because Triton's interpreter takes no tensor for a range().
    n = tl.load(table)
    row = table + 1
    while n > 0:
        address, size, count, stride = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
        lines = (size + 2 * LINE - 2) // LINE  # a piece that begins within a line reaches into one more
        step = tl.program_id(0).to(tl.int64)
        while step * LINES < count * lines:
            at = step * LINES + tl.arange(0, LINES)
            begin = address + (at // lines) * stride
            line = (begin // LINE + at % lines) * LINE
            here = ((at < count * lines) & (line < begin + size)).to(tl.int32)
            tl.inline_asm_elementwise(
                "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
                "=r,l,r", [line, here], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
            step += PROGRAMS
        row += 4
        n -= 1


class L2Prefetcher:
    """Ranges in a buffer of the device whose address never changes, and the launch that prefetches them.

    For a captured CUDA graph: capture ``launch()``, and on the same stream, before each replay,
    ``fill(alloc.current_ranges(window))``.
    """

    def __init__(self, device: torch.device, *, most_ranges: int = MOST_RANGES) -> None:
        self.device, self.most_ranges = device, most_ranges
        self.buffer = torch.zeros(1 + 4 * most_ranges, dtype=torch.int64, device=device)

    def fill(self, table: "np.ndarray[Any, np.dtype[np.int64]]") -> int:
        """Copy ranges, int64 [n, 4] as of ``Ranges.table``, to the buffer, on the current stream. Return how many bytes
        they are; ranges beyond ``most_ranges`` are left out.
        """
        table = table[: self.most_ranges]
        held = torch.from_numpy(np.r_[len(table), table.ravel()])
        held = held.pin_memory() if self.device.type == "cuda" else held
        self.buffer[: len(held)].copy_(held, non_blocking=True)
        return int((table[:, 1] * table[:, 2]).sum())

    def launch(self) -> None:
        """Prefetch what the buffer names, on the current stream. REQUIRES: all of it is mapped, and its allocator knows
        the stream (``pool.streams.include``), so that nothing is unmapped before the kernel ends.
        """
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            _prefetch[(PROGRAMS,)](self.buffer, PROGRAMS=PROGRAMS, LINE=LINE_BYTES, LINES=_LINES)
