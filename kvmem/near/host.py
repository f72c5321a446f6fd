"""Attention in host memory, in place: over sequences of an allocator on the CPU, and over blocks in host slots."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from kvmem.allocator import Allocator, Batch, Sequence
from kvmem.allocator.ids import handle as handle_of
from kvmem.allocator.tiers.held import HeldBlocks
from kvmem.arguments import brief
from kvmem.errors import SpecError, StaleHandle
from kvmem.geometry import plain
from kvmem.kernels.checks import check_queries
from kvmem.kernels.write import write_kv
from kvmem.layouts.attention import compute_dtype
from kvmem.near.base import DTYPES, Near, Part, Shape, Traffic, check_step
from kvmem.near.compute import attend_blocks, tokens_of
from kvmem.near.sparse import Reader, SparF, attend_sparse

__all__ = ["HostAttention"]

_LINE = 64  # bytes of a cache line: what memory gives for a single element
_Sums = dict[int, tuple[int, torch.Tensor]]  # by layer: of how many first tokens, and the sum of their V


@dataclass
class _Rows:
    """Where K and V of a layer lie: all blocks, and those of each sequence. owners: handles, or what is held."""

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    lengths: list[int]
    owners: list[Any]

    @property
    def shape(self) -> Shape:
        return Shape(self.k.shape[2], self.k.shape[3], self.v.shape[3], self.k.dtype)


class HostAttention(Near):
    """Attention by this process's CPU over what lies in its memory; only queries, new rows and outputs are copied.

    alloc: an allocator with ``device="cpu"``: ``sequences`` are its own. Reserve the new tokens with ``extend``, attend
    in each layer, which writes their rows, and ``commit`` them. Or any allocator with tiers: ``sequences`` are what
    ``Allocator.hold`` gave, to which nothing can be appended.

    Queries and new rows may be on any device; results are on that of the queries. Sliding windows are refused: their
    few tokens are better loaded. SparF keeps the sum of V of the tokens that a sequence had before the latest step;
    call ``forget`` when some of these were cut off and replaced. Not thread-safe.
    """

    def __init__(self, alloc: Allocator) -> None:
        if not isinstance(alloc, Allocator):
            raise SpecError(f"alloc: got {brief(alloc)}; must be an Allocator")
        self._alloc, self.traffic = alloc, Traffic()
        self._batch: tuple[Any, Batch] | None = None  # of the latest step, which the next layer asks for again
        self._sums: dict[int, _Sums] = {}  # by handle
        self._held: WeakKeyDictionary[HeldBlocks, _Sums] = WeakKeyDictionary()

    def attend(
        self, layer: int, sequences: Many[Sequence | int | HeldBlocks], q: torch.Tensor,
        new_k: torch.Tensor | None = None, new_v: torch.Tensor | None = None, *, counts: Many[int] | None = None,
        sparse: SparF | None = None,
    ) -> Part:  # fmt: skip
        """As ``Near.attend``; without new rows a query sees all committed tokens. Cost: one pass over K and V."""
        check_queries(q)
        given, each = check_step(sequences, counts, len(q), (new_k, new_v), sparse)
        held, appends = [s for s in given if isinstance(s, HeldBlocks)], new_k is not None
        if held and (len(held) != len(given) or appends):
            raise SpecError("sequences: blocks in host slots are attended apart from others, and nothing is appended")
        rows = self._held_rows(layer, held) if held else self._rows(layer, given, each, q, (new_k, new_v))
        rows.shape.check_queries(q)
        if sparse is not None and rows.k.dtype.itemsize == 1:
            raise SpecError(f"sparse: the cache holds {rows.k.dtype}; SparF reads {', '.join(map(str, DTYPES))}")
        here = q.detach().to("cpu")
        if sparse is None:
            part = Part(*attend_blocks(here, rows.k, rows.v, rows.table, rows.lengths, each, causal=appends))
        else:
            part = self._attend_sparse(layer, sparse, here, rows, each, appends)
        self._count(rows, q, each, appends, sparse)
        return Part(part.out.to(q.device, q.dtype), part.lse.to(q.device), part.exact)

    def forget(self, sequence: Sequence | int) -> None:
        """Forget the sum of V of a sequence, so that SparF adds it up again."""
        self._sums.pop(handle_of("sequence", sequence, self._alloc.core), None)

    def _rows(self, layer: int, given: list[Any], each: list[int], q: torch.Tensor, new: tuple[Any, Any]) -> _Rows:
        """Where the sequences' rows lie, with the new ones written."""
        handles = [handle_of("sequences", sequence, self._alloc.core) for sequence in given]
        if len(set(handles)) != len(handles):
            raise SpecError(f"sequences: got {brief(handles)}; each may occur once")
        spec, index = self._alloc.spec, self._alloc.spec.group_of(layer, "k")
        if self._alloc.device.type != "cpu":
            raise SpecError(f"sequences: their K and V are on {self._alloc.device}; this attends in host memory")
        group = spec.groups[index]
        if spec.group_of(layer, "v") != index or group.window_tokens or group.growth != "token":
            raise SpecError(f"layer: got {layer}; its K and V must be of one group of full attention")
        cache = self._alloc.kv(layer)
        k, v = plain(cache[0]), plain(cache[1])
        Shape(k.shape[2], k.shape[3], v.shape[3], k.dtype).check_queries(q)
        batch = self._batch_of(handles, [0] * len(handles) if new[0] is None else each).group(index)
        if new[0] is not None:
            write_kv(cache, batch, *(x.to("cpu") if isinstance(x, torch.Tensor) else x for x in new))
        return _Rows(k, v, batch.block_table, batch.seq_lens_cpu.tolist(), handles)

    def _batch_of(self, handles: list[int], each: list[int]) -> Batch:
        lengths = [(self._alloc.core.committed(handle), self._alloc.core.tokens(handle)) for handle in handles]
        key = handles, each, lengths
        if self._batch is not None and self._batch[0] == key:
            try:
                self._batch[1].check_current()
                return self._batch[1]
            except StaleHandle:
                pass
        self._batch = key, self._alloc.batch(np.array(handles, np.int32), new_tokens=each)
        return self._batch[1]

    def _held_rows(self, layer: int, held: list[HeldBlocks]) -> _Rows:
        if any(one.tiering is not self._alloc.tiering for one in held):
            raise SpecError("sequences: these blocks are held for another allocator")
        found = [one.blocks(self._alloc.spec, layer) for one in held]
        table = torch.nn.utils.rnn.pad_sequence([slots for _, _, slots in found], batch_first=True)
        return _Rows(found[0][0], found[0][1], table, [one.num_tokens for one in held], held)

    def _attend_sparse(
        self, layer: int, sparse: SparF, q: torch.Tensor, rows: _Rows, each: list[int], appends: bool
    ) -> Part:
        heads, width = rows.shape.kv_heads, rows.shape.v_width
        wide = compute_dtype(q)
        parts = [(torch.zeros(0, q.shape[1], width, dtype=wide), torch.zeros(0, q.shape[1], dtype=wide), True)]
        for i, (mine, length, count) in enumerate(zip(torch.split(q, each), rows.lengths, each, strict=True)):
            place = tokens_of(rows.table[i], length, rows.k.shape[1])
            old = length - count if appends else length
            total = self._sum_of(layer, rows, rows.owners[i], old, place) if sparse.blend else None
            sees = [old + j + 1 if appends else length for j in range(count)]
            parts.append(attend_sparse(sparse, mine, _reader(rows, place, old, total), heads, sees, width))
        outs, lses, exact = zip(*parts, strict=True)
        return Part(torch.cat(outs), torch.cat(lses), all(exact))

    def _sum_of(
        self, layer: int, rows: _Rows, owner: Any, old: int, place: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The sum of V of the first ``old`` tokens, float64 ``[heads, width]``. What was added up is not read again."""
        if len(self._sums) > self._alloc.max_sequences:  # some of them were freed
            self._sums = {handle: sums for handle, sums in self._sums.items() if self._alloc.core.is_live(handle)}
        held = isinstance(owner, HeldBlocks)
        sums = self._held.setdefault(owner, {}) if held else self._sums.setdefault(owner, {})
        tokens, total = sums.get(layer, (0, torch.zeros(rows.v.shape[2:], dtype=torch.float64)))
        if tokens > old:  # it was cut
            tokens, total = 0, torch.zeros_like(total)
        new = rows.v[place[0][tokens:old], place[1][tokens:old]]
        self.traffic["media_read_bytes"] += new.nbytes
        sums[layer] = old, total + new.sum(0, dtype=torch.float64)
        return sums[layer][1]

    def _count(self, rows: _Rows, q: torch.Tensor, each: list[int], appends: bool, sparse: SparF | None) -> None:
        shape, traffic = rows.shape, self.traffic
        traffic["link_bytes"] += len(q) * q.shape[1] * (shape.k_width + shape.v_width) * q.element_size()
        traffic["link_bytes"] += len(q) * shape.kv_heads * shape.row_bytes if appends else 0
        traffic["lse_bytes"] += len(q) * q.shape[1] * max(4, q.element_size())
        item, row = shape.dtype.itemsize, shape.row_bytes
        for length, count in zip(rows.lengths, each, strict=True):
            if sparse is None:
                read = used = shape.kv_heads * row * length * bool(count)
            else:
                r, k = min(sparse.r, shape.k_width), min(sparse.k, length)
                lines = min(r, -(-shape.k_width * item // _LINE))  # at most a line for each channel
                steps = count * shape.kv_heads * (k < length) * length
                read = steps * min(lines * _LINE, shape.k_width * item) + count * shape.kv_heads * k * row
                used = steps * r * item + count * shape.kv_heads * k * row
            traffic["media_read_bytes"] += read
            traffic["delivered_bytes"] += used


def _reader(rows: _Rows, place: tuple[torch.Tensor, torch.Tensor], old: int, total: torch.Tensor | None) -> Reader:
    """Of blocks in memory. old, total: the tokens before the new ones, and the sum of their V."""
    block, offset = place
    heads = torch.arange(rows.k.shape[2])[:, None]

    def mean_v(tokens: int) -> torch.Tensor:
        assert total is not None
        return (total + rows.v[block[old:tokens], offset[old:tokens]].sum(0, dtype=torch.float64)) / tokens

    return Reader(
        lambda channels, tokens: rows.k[
            block[:tokens, None], offset[:tokens, None], heads[..., None], channels[:, None]
        ],
        lambda tokens: (rows.k[block[tokens], offset[tokens], heads], rows.v[block[tokens], offset[tokens], heads]),
        mean_v,
    )
