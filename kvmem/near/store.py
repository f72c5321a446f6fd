"""K and V of sequences in pages on a disk, and attention over them: what a worker process holds (InstInfer,
arXiv:2409.04992).

A page has the rows of 16 tokens of one head: K, then V. New rows wait in memory (the group buffer) until a page is
full. With ``channels_per_page``, K is there a second time, in pages of 4 KiB with some channels of many tokens, so that
SparF reads few channels without whole rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvmem.errors import SpecError
from kvmem.layouts.attention import compute_dtype
from kvmem.near.base import Part, Shape, Traffic
from kvmem.near.compute import attend_blocks
from kvmem.near.page_file import Region, Scratch, open_file
from kvmem.near.sparse import Reader, SparF, attend_sparse
from kvmem.tiers.disk.file_io import PAGE, open_io, padded
from kvmem.tiers.disk.files import Files

__all__ = ["TOKENS", "Store"]

TOKENS = 16  # of a page


@dataclass(frozen=True)
class Rows:
    """One layer of one sequence. Appending makes a new object; the old one stays right until its pages are given back.

    pages: of each head. k_tail, v_tail: ``[heads, 16, width]``, of which ``length % 16`` tokens are in no page.
    total: sum of V, float64 ``[heads, width]``. columns: of each head, the pages of each full range of tokens, one for
    each ``channels_per_page`` channels. c_tail: ``[heads, tokens of a range, width]``, K that is not in them.
    """

    length: int
    pages: list[list[int]]
    k_tail: torch.Tensor
    v_tail: torch.Tensor
    total: torch.Tensor
    columns: list[list[int]]
    c_tail: torch.Tensor


class Store:
    """See the module. Not thread-safe. What its functions are given was checked, but for the numbers of sequences.

    shape: the fields of a ``Shape``, the dtype by name. channels_per_page: 0 for no second copy of K.
    """

    def __init__(
        self, folder: str, capacity: int, layers: Sequence[int], shape: dict[str, Any], channels_per_page: int
    ) -> None:
        self._shape = s = Shape(**{**shape, "dtype": getattr(torch, shape["dtype"])})
        self.traffic, self._layers, self._channels = Traffic(), list(layers), channels_per_page
        item, page_bytes = s.dtype.itemsize, padded(TOKENS * s.row_bytes)
        self._k_span = padded(TOKENS * s.k_width * item)  # what is read of a page for K alone
        self._range = PAGE // (channels_per_page * item) if channels_per_page else 1  # tokens of a channel page
        self._pages_of_range = s.k_width // channels_per_page if channels_per_page else 0
        token_bytes = page_bytes // TOKENS + s.k_width * item * bool(channels_per_page)
        count = capacity // token_bytes // TOKENS
        columns = (capacity - count * page_bytes) // PAGE if channels_per_page else 0
        if count < s.kv_heads:
            raise SpecError(f"capacity: got {capacity} bytes; a page of each head takes {s.kv_heads * page_bytes}")
        self._fd = open_file(folder, count * page_bytes + columns * PAGE)
        self._io = open_io("auto", Files(), 4)
        self._row_pages = Region(self._fd, self._io, 0, page_bytes, count)
        self._column_pages = Region(self._fd, self._io, count * page_bytes, PAGE, columns)
        self._scratch, self._sequences = Scratch(), dict[int, dict[int, Rows]]()

    def close(self) -> None:
        self._io.close()
        os.close(self._fd)

    # --- sequences ---

    def open(self, sequence: int) -> None:
        if sequence in self._sequences:
            raise SpecError(f"sequence: got {sequence}, which is open already; free it, or take another number")
        s = self._shape
        widths = (TOKENS, s.k_width), (TOKENS, s.v_width), (self._range, s.k_width * bool(self._channels))
        nothing = [list[int]() for _ in range(s.kv_heads)]
        self._sequences[sequence] = {}
        for layer in self._layers:
            k, v, c = (torch.zeros(s.kv_heads, tokens, width, dtype=s.dtype) for tokens, width in widths)
            total = torch.zeros(s.kv_heads, s.v_width, dtype=torch.float64)
            self._sequences[sequence][layer] = Rows(0, nothing, k, v, total, nothing, c)

    def _of(self, sequence: int) -> dict[int, Rows]:
        if sequence not in self._sequences:
            raise SpecError(f"sequences: got {sequence}, which is not open")
        return self._sequences[sequence]

    def num_tokens(self, sequence: int, layer: int) -> int:
        return self._of(sequence)[layer].length

    def used_pages(self) -> int:
        return self._row_pages.used + self._column_pages.used

    def free(self, sequence: int) -> None:
        for rows in self._of(sequence).values():
            self._give(rows, None)
        del self._sequences[sequence]

    def _give(self, rows: Rows, kept: Rows | None) -> None:
        """Give back the pages of ``rows`` that ``kept``, an earlier or later state of it, has not."""
        for h in range(self._shape.kv_heads):
            keeps = (0, 0) if kept is None else (len(kept.pages[h]), len(kept.columns[h]))
            self._row_pages.give(rows.pages[h][keeps[0] :])
            self._column_pages.give(rows.columns[h][keeps[1] :])

    def append(
        self, k: torch.Tensor, v: torch.Tensor, *, layer: int, sequences: Sequence[int], counts: list[int]
    ) -> list[Rows]:
        """Append, and return what was there before, for ``_undo``. After an error nothing has changed."""
        done = list[Rows]()
        try:
            for sequence, mine, values in zip(sequences, torch.split(k, counts), torch.split(v, counts), strict=True):
                before = self._of(sequence)[layer]
                self._sequences[sequence][layer] = self._appended(before, mine.transpose(0, 1), values.transpose(0, 1))
                done.append(before)
        except BaseException:
            self._undo(layer, sequences, done)
            raise
        return done

    def _undo(self, layer: int, sequences: Sequence[int], before: Sequence[Rows]) -> None:
        for sequence, rows in zip(sequences, before, strict=False):
            self._give(self._sequences[sequence][layer], rows)
            self._sequences[sequence][layer] = rows

    def _appended(self, rows: Rows, k: torch.Tensor, v: torch.Tensor) -> Rows:
        """rows with k and v, ``[heads, n, width]``, behind them, and the full pages written."""
        heads, n = k.shape[:2]
        k_full, k_tail = _filled(rows.k_tail, rows.length % TOKENS, k)
        v_full, v_tail = _filled(rows.v_tail, rows.length % TOKENS, v)
        c_full, c_tail = rows.c_tail[:, :0], rows.c_tail
        if self._channels:
            c_full, c_tail = _filled(rows.c_tail, rows.length % self._range, k)
        full, columns = k_full.shape[1] // TOKENS, c_full.shape[1] // self._range * self._pages_of_range
        taken, taken_columns = list[int](), list[int]()
        try:
            taken += self._row_pages.take(heads * full)
            taken_columns += self._column_pages.take(heads * columns)
            if full:
                self._write_rows(taken, k_full, v_full)
            if columns:
                self._write_columns(taken_columns, c_full)
                by_range = torch.tensor(taken_columns).view(heads, self._pages_of_range, -1).transpose(1, 2)
                taken_columns[:] = by_range.flatten().tolist()
        except BaseException:
            self._row_pages.give(taken)
            self._column_pages.give(taken_columns)
            raise
        return Rows(
            rows.length + n, _extended(rows.pages, taken), k_tail, v_tail,
            rows.total + v.sum(1, dtype=torch.float64), _extended(rows.columns, taken_columns), c_tail,
        )  # fmt: skip

    def _write_rows(self, numbers: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        memory, page = self._take(len(numbers))
        middle, end = TOKENS * self._shape.k_width, TOKENS * (self._shape.k_width + self._shape.v_width)
        page[:, :middle] = k.reshape(len(numbers), -1)
        page[:, middle:end] = v.reshape(len(numbers), -1)
        page[:, end:] = 0
        self._row_pages.write(numbers, memory)
        self.traffic.update(page_writes=len(numbers), media_written_bytes=len(memory))

    def _write_columns(self, numbers: list[int], k: torch.Tensor) -> None:
        """Of each head, the pages of some channels for all ranges lie side by side, so that they are read as one."""
        memory = self._scratch.take(len(numbers) * PAGE)
        ranges = k.reshape(k.shape[0], -1, self._range, self._pages_of_range, self._channels)
        _elements(memory, self._shape.dtype).copy_(ranges.permute(0, 3, 1, 4, 2).flatten())
        self._column_pages.write(numbers, memory)
        self.traffic.update(channel_page_writes=len(numbers), media_written_bytes=len(memory))

    def _take(self, count: int) -> tuple[memoryview, torch.Tensor]:
        """Memory for pages, and the same as ``[count, elements of a page]``."""
        size = self._row_pages.page_bytes
        memory = self._scratch.take(count * size)
        return memory, _elements(memory, self._shape.dtype).view(count, size // self._shape.dtype.itemsize)

    def truncate(self, sequence: int, num_tokens: int, layer: int | None) -> None:
        mine = self._of(sequence)
        layers = [one for one in (mine if layer is None else [layer]) if mine[one].length > num_tokens]
        cut = {one: self._truncated(mine[one], num_tokens) for one in layers}  # reads, and may fail
        for one, rows in cut.items():
            self._give(mine[one], rows)
            mine[one] = rows

    def _truncated(self, rows: Rows, n: int) -> Rows:
        whole, ranges = n // TOKENS, n // self._range * self._pages_of_range
        first = whole * TOKENS
        k, v = self._tokens(rows, first, rows.length)
        total = rows.total - v[:, n - first :].sum(1, dtype=torch.float64)
        if n == 0 or not total.isfinite().all():  # what is left may be finite
            total = self._tokens(rows, 0, n)[1].sum(1, dtype=torch.float64)
        k_tail, v_tail, c_tail = (torch.zeros_like(tail) for tail in (rows.k_tail, rows.v_tail, rows.c_tail))
        k_tail[:, : n - first], v_tail[:, : n - first] = k[:, : n - first], v[:, : n - first]
        if self._channels and ranges == len(rows.columns[0]):
            c_tail = rows.c_tail
        elif self._channels:
            begin = n // self._range * self._range
            c_tail[:, : n - begin] = self._tokens(rows, begin, n)[0]
        pages, columns = [p[:whole] for p in rows.pages], [c[:ranges] for c in rows.columns]
        return Rows(n, pages, k_tail, v_tail, total, columns, c_tail)

    def _tokens(self, rows: Rows, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of tokens ``[first, end)``, ``[heads, n, width]``, copied. first: a multiple of 16."""
        k, v = self._blocks(rows, first // TOKENS, -(-end // TOKENS))
        heads, n = self._shape.kv_heads, end - first
        k, v = (x.reshape(heads, x.shape[0] // heads * TOKENS, x.shape[3])[:, :n].clone() for x in (k, v))
        return k, v

    def _blocks(self, rows: Rows, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of blocks ``[first, end)`` of 16 tokens, those of one head after the other: ``[heads * blocks, 16, 1,
        width]``, in memory that the next read overwrites. The last block may be that of the group buffer.
        """
        heads, size, s = self._shape.kv_heads, self._row_pages.page_bytes, self._shape
        blocks, whole = end - first, min(end, rows.length // TOKENS)
        memory, page = self._take(heads * blocks)
        places = [memory[h * blocks * size :][: (whole - first) * size] for h in range(heads)]
        self._row_pages.read([(p[first:whole], place) for p, place in zip(rows.pages, places, strict=True)])
        self.traffic["media_read_bytes"] += heads * (whole - first) * size
        middle, last = TOKENS * s.k_width, TOKENS * (s.k_width + s.v_width)
        if whole < end:
            page.view(heads, blocks, -1)[:, -1, :middle] = rows.k_tail.flatten(1)
            page.view(heads, blocks, -1)[:, -1, middle:last] = rows.v_tail.flatten(1)
        shape = heads * blocks, TOKENS, 1
        return page[:, :middle].view(*shape, s.k_width), page[:, middle:last].view(*shape, s.v_width)

    # --- attention ---

    def attend(
        self, q: torch.Tensor, *new: torch.Tensor, layer: int, sequences: Sequence[int], counts: list[int],
        sparse: dict[str, Any] | None,
    ) -> Part:  # fmt: skip
        before = self.append(*new, layer=layer, sequences=sequences, counts=counts) if new else []
        try:
            chosen, parts = None if sparse is None else SparF(**sparse), list[Part]()
            for i, (sequence, mine) in enumerate(zip(sequences, torch.split(q, counts), strict=True)):
                parts.append(self._attend(self._of(sequence)[layer], mine, before[i] if new else None, chosen))
        except BaseException:
            self._undo(layer, sequences, before)
            raise
        empty = Part(
            q.new_zeros(0, q.shape[1], self._shape.v_width), torch.zeros(0, q.shape[1], dtype=compute_dtype(q))
        )
        outs, lses, exact = zip(empty, *parts, strict=True)
        return Part(torch.cat(outs), torch.cat(lses), all(exact))

    def _attend(self, rows: Rows, q: torch.Tensor, before: Rows | None, sparse: SparF | None) -> Part:
        heads, n, length = self._shape.kv_heads, len(q), rows.length
        if sparse is not None:
            sees = [length if before is None else before.length + i + 1 for i in range(n)]
            out, lse, exact = attend_sparse(sparse, q, self._reader(rows), heads, sees, self._shape.v_width)
            return Part(out.to(q.dtype), lse, exact)
        blocks = -(-length // TOKENS) if n else 0
        k, v = self._blocks(rows, 0, blocks)
        self.traffic["delivered_bytes"] += heads * length * self._shape.row_bytes * bool(n)
        # Head by head, so that the result does not depend on how many of them are here.
        tables = torch.arange(heads * blocks).view(heads, 1, blocks)
        dense = [
            attend_blocks(mine, k, v, table, [length], [n], causal=before is not None)
            for mine, table in zip(q.view(n, heads, q.shape[1] // heads, q.shape[2]).unbind(1), tables, strict=True)
        ]
        return Part(torch.cat([out for out, _ in dense], 1), torch.cat([lse for _, lse in dense], 1))

    def _reader(self, rows: Rows) -> Reader:
        read = partial(self._read_rows, rows)

        def mean_v(tokens: int) -> torch.Tensor:
            total = rows.total
            if tokens < rows.length:  # of several new tokens not the last
                later = torch.arange(tokens, rows.length).expand(self._shape.kv_heads, -1)
                total = total - read(later)[1].sum(1, dtype=torch.float64)
            return total / tokens

        return Reader(partial(self._read_columns, rows), read, mean_v)

    def _read_rows(self, rows: Rows, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of some tokens of each head: whole pages are read, and these rows are left."""
        whole, size, s = rows.length // TOKENS * TOKENS, self._row_pages.page_bytes, self._shape
        pages = [torch.unique(mine[mine < whole] // TOKENS, return_inverse=True) for mine in tokens]
        memory, page = self._take(sum(len(numbers) for numbers, _ in pages))
        parts, begins, begin = [], [], 0
        for own, (numbers, _) in zip(rows.pages, pages, strict=True):
            begins.append(begin)
            parts.append(([own[i] for i in numbers.tolist()], memory[begin * size : (begin + len(numbers)) * size]))
            begin += len(numbers)
        self._row_pages.read(parts)
        self.traffic.update(media_read_bytes=len(memory), delivered_bytes=tokens.numel() * s.row_bytes)
        middle, end = TOKENS * s.k_width, TOKENS * (s.k_width + s.v_width)
        found = []
        for part, tail in ((page[:, :middle], rows.k_tail), (page[:, middle:end], rows.v_tail)):
            stored = part.view(begin, TOKENS, tail.shape[2])
            found.append(torch.stack([
                torch.cat([stored[first + at, mine[: len(at)] % TOKENS], tail[h, mine[len(at) :] - whole]])
                for h, (mine, (_, at), first) in enumerate(zip(tokens, pages, begins, strict=True))
            ]))  # fmt: skip
        return found[0], found[1]

    def _read_columns(self, rows: Rows, channels: torch.Tensor, tokens: int) -> torch.Tensor:
        """Some channels of K of the first tokens of each head."""
        self.traffic["delivered_bytes"] += tokens * channels.numel() * self._shape.dtype.itemsize
        if not self._channels:
            return self._columns_of_rows(rows, channels)[:, :tokens]
        ranges, found = rows.length // self._range, []
        pages = [torch.unique(mine // self._channels, return_inverse=True) for mine in channels]
        numbers = [
            [own[r * self._pages_of_range + i] for i in of_pages.tolist() for r in range(ranges)]
            for own, (of_pages, _) in zip(rows.columns, pages, strict=True)
        ]
        memory = self._scratch.take(sum(map(len, numbers)) * PAGE)
        self._column_pages.read([([number for own in numbers for number in own], memory)])
        self.traffic["media_read_bytes"] += len(memory)
        stored = _elements(memory, self._shape.dtype).view(-1, ranges, self._channels, self._range) if ranges else None
        begin = 0
        for mine, (of_pages, at), tail in zip(channels, pages, rows.c_tail, strict=True):
            waiting = tail[:, mine]
            if stored is not None:
                waiting = torch.cat([stored[begin + at, :, mine % self._channels].flatten(1).T, waiting])
            found.append(waiting)
            begin += len(of_pages)
        return torch.stack(found)[:, :tokens]

    def _columns_of_rows(self, rows: Rows, channels: torch.Tensor) -> torch.Tensor:
        """The same from the pages of rows, of which the part with K is read."""
        heads, s = self._shape.kv_heads, self._shape
        numbers = [number for own in rows.pages for number in own]
        memory = self._scratch.take(len(numbers) * self._k_span)
        self._row_pages.read([(numbers, memory)], 0, self._k_span)
        self.traffic["media_read_bytes"] += len(memory)
        page = _elements(memory, s.dtype).view(len(numbers), self._k_span // s.dtype.itemsize)
        k = page[:, : TOKENS * s.k_width].reshape(heads, len(numbers) // heads * TOKENS, s.k_width)
        of_head = [torch.cat([k[h], rows.k_tail[h]])[:, mine] for h, mine in enumerate(channels)]
        return torch.stack(of_head)


def _elements(memory: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=dtype) if memory else torch.empty(0, dtype=dtype)  # torch refuses no bytes


def _filled(tail: torch.Tensor, fill: int, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the full blocks, ``[heads, blocks * size, width]``, that new rows make with the first ``fill`` of a tail
    ``[heads, size, width]``, and the tail of what is left: the same one if nothing is full.
    """
    size = tail.shape[1]
    full = (fill + new.shape[1]) // size * size
    if not full:
        tail[:, fill : fill + new.shape[1]] = new
        return new[:, :0], tail
    rows, rest = torch.cat([tail[:, :fill], new], 1), torch.zeros_like(tail)
    rest[:, : rows.shape[1] - full] = rows[:, full:]
    return rows[:, :full], rest


def _extended(numbers: list[list[int]], taken: list[int]) -> list[list[int]]:
    """Lists of pages with an equal share of those taken behind each; the same lists if there are none."""
    share = len(taken) // max(len(numbers), 1)
    return [own + taken[h * share : (h + 1) * share] for h, own in enumerate(numbers)] if share else numbers
