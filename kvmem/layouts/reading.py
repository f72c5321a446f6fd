"""What one sequence stores of a layer, as a layout reads it; and the byte ranges that a kernel reads of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvmem.allocator import Allocator, Batch
from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.checks import as_bytes, flat_tokens, plain

__all__ = ["ByteRanges", "TokenReader", "check_batch_of", "read_set", "read_tokens"]


def check_batch_of(alloc: Allocator, batch: object, kind: type[GroupBatch], field: str = "batch") -> None:
    """``SpecError`` unless the batch is of this kind and filled by this allocator; ``StaleHandle`` if not current."""
    if not isinstance(batch, kind) or batch._core is not alloc.core:
        raise SpecError(f"{field}: got {batch!r:.200}; must be a batch of this allocator: alloc.batch(sequences)")
    batch.check_current()


class TokenReader:
    """One row of a batch, until it is refilled, and one layer. What is read is counted in the allocator's ledger.

    layer. first: the first token that is held, 0 without a sliding window. length: tokens of the sequence, this step's
    included. block_size: of the batch's own group, as ``first`` and ``length``.
    """

    def __init__(self, alloc: Allocator, batch: Batch, layer: int, row: int) -> None:
        self._alloc, self._batch, self._row = alloc, batch, row
        self.layer = layer
        self.block_size = batch.block_size
        self.first, self.length = int(batch.first_tokens_cpu[row]), int(batch.seq_lens_cpu[row])

    def span(self, component: str) -> tuple[int, int]:
        """Return the tokens of a component that the sequence holds, ``[first, end)``, which differ by group."""
        group = self._group(component)
        return int(group.first_tokens_cpu[self._row]), int(group.seq_lens_cpu[self._row])

    def rows(self, component: str, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Return tokens ``[first, end)`` of a component, ``[n, heads, width]``: a view on the virtual backend, gathered
        blocks on the paged one. end: default all. A state of fixed size is one token. ``SpecError`` for tokens that
        the sequence does not hold, such as those out of window, whose memory may be unmapped.
        """
        group = self._group(component)
        held, length = self.span(component)
        end = length if end is None else end
        if not held <= first <= end <= length:
            raise SpecError(f"{component}: got tokens [{first}, {end}); the sequence holds [{held}, {length})")
        found = read_tokens(self._alloc, group, self.layer, component, self._row, first, end)
        self.count_read(component, found.numel() * found.element_size())
        return found

    def blocks(self, component: str, first: int = 0, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all blocks of a component, ``[num_blocks, block_size, heads, width]``, and the ids, int64 ``[n]``, of
        this sequence's blocks ``[first, end)``. end: default the complete ones. Nothing is counted: the caller reads a
        part of these blocks and calls ``count_read``.
        """
        group = self._group(component)
        end = int(group.seq_lens_cpu[self._row]) // group.block_size if end is None else end
        return plain(self._alloc.tensor(self.layer, component)), group.block_table[self._row, first:end].long()

    def count_read(self, component: str, bytes: int) -> None:
        """Add to ``alloc.ledger.read``."""
        self._alloc.ledger.count_read(component, bytes)

    def _group(self, component: str) -> GroupBatch:
        self._batch.check_current()
        return self._batch.group(self._alloc.spec.group_of(self.layer, component))


def read_tokens(
    alloc: Allocator, group: GroupBatch, layer: int, component: str, row: int, first: int, end: int
) -> torch.Tensor:
    """Return tokens ``[first, end)`` of a row of a batch, ``[n, heads, width]``; group: that of the component."""
    blocks = alloc.tensor(layer, component)
    if group.row_starts_cpu is not None:
        start = int(group.row_starts_cpu[row])
        return flat_tokens(blocks)[start + first : start + end]
    size = group.block_size
    ids = group.block_table[row, first // size : -(-end // size)]
    found = as_bytes(plain(blocks)).index_select(0, ids).view(blocks.dtype)
    return found.flatten(0, 1)[first % size : first % size + end - first]


@dataclass(frozen=True)
class ByteRanges:
    """Half-open ranges of addresses, in reading order; neighbours are joined.

    begin, end: int64 ``[n]``, addresses of the device.
    """

    begin: np.ndarray[tuple[int], np.dtype[np.int64]]
    end: np.ndarray[tuple[int], np.dtype[np.int64]]

    @property
    def bytes(self) -> int:
        """The bytes of all ranges."""
        return int((self.end - self.begin).sum())


def read_set(alloc: Allocator, batch: Batch, layer: int, components: tuple[str, ...] = ("k", "v")) -> ByteRanges:
    """Return the exact bytes that a kernel reads of a layer for this batch: for each sequence in turn, the tokens in
    order, and of each token the components as they lie in memory, whatever the order of ``components``; those that lie
    in ranges of their own (``interleave="none"``) one after the other. For prefetching, and to account for reads.

    Tokens that no new token's window reaches and padding rows are not read, although the blocks of such tokens may
    still be held; what several sequences share is read by each. Of a sequence without new tokens, what its next token
    will read. Ranges that touch are joined: K and V side by side (``interleave="all"`` with one layer, or the whole
    rows of ``"none"``) make one range. Errors: as ``check_batch_of``. Cost: linear in tokens and components.
    """
    check_batch_of(alloc, batch, Batch)
    begins, ends = [], []
    for row in range(len(batch.buffers.handles)):
        parts = [_token_ranges(alloc, batch, layer, component, row) for component in components]
        by_arena: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for arena, begin, size in parts:
            by_arena.setdefault(arena, []).append((begin, begin + size))
        for pieces in by_arena.values():  # components of one arena lie in one token; others are apart
            pieces.sort(key=lambda piece: piece[0][:1].tolist())
            begins.append(np.stack([begin for begin, _ in pieces], axis=1).ravel())
            ends.append(np.stack([end for _, end in pieces], axis=1).ravel())
    begin, end = (np.concatenate(x) if x else np.zeros(0, np.int64) for x in (begins, ends))
    first = np.ones(len(begin), bool)
    first[1:] = begin[1:] != end[:-1]
    last = np.ones(len(begin), bool)
    last[:-1] = first[1:]
    return ByteRanges(begin[first], end[last])


def _token_ranges(
    alloc: Allocator, batch: Batch, layer: int, component: str, row: int
) -> tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]], int]:
    """Return a number of the arena, the address of each token, and the bytes of a token."""
    index = alloc.spec.group_of(layer, component)
    group = batch.group(index)
    blocks = plain(alloc.tensor(layer, component))
    size, element = group.block_size, blocks.element_size()
    first, end = int(group.first_tokens_cpu[row]), int(group.seq_lens_cpu[row])
    if (window := alloc.spec.groups[index].window_tokens) is not None:  # blocks are held whole, so first may be lower
        new = int(group.cu_seqlens_q_cpu[row + 1] - group.cu_seqlens_q_cpu[row])
        first = max(first, end - new - window + 1)
    tokens = np.arange(first, end)
    ids = group.block_table[row].cpu().numpy().astype(np.int64)
    token_bytes, heads, width = blocks.stride(1) * element, *blocks.shape[2:]
    at = blocks.data_ptr() + (ids[tokens // size] * size + tokens % size) * token_bytes
    return blocks.untyped_storage().data_ptr(), at, heads * width * element
