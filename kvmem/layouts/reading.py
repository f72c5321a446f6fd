"""What one sequence stores of a layer, as a layout reads it; and the byte ranges that a kernel reads of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvmem.allocator import Allocator, Batch
from kvmem.allocator.batch import GroupBatch
from kvmem.arguments import brief, check_members
from kvmem.errors import SpecError
from kvmem.kernels.checks import as_bytes, flat_tokens, plain

__all__ = ["ByteRanges", "Held", "TokenReader", "check_batch_of", "read_set"]


def check_batch_of(alloc: Allocator, batch: object, kind: type[GroupBatch], field: str = "batch") -> None:
    """``SpecError`` unless the batch is of this kind and filled by this allocator; ``StaleHandle`` if not current."""
    if not isinstance(batch, kind) or batch._core is not alloc.core:
        raise SpecError(f"{field}: got {brief(batch)}; must be a batch of this allocator: alloc.batch(sequences)")
    batch.check_current()


class Held:
    """One component of a layer, as the rows of a batch hold it until the batch is refilled.

    group: the batch of the component's group. blocks: ``[num_blocks, block_size, heads, width]``.
    """

    def __init__(self, alloc: Allocator, batch: Batch, layer: int, component: str) -> None:
        self.group = group = batch.group(alloc.spec.group_of(layer, component))
        self.blocks = plain(alloc.tensor(layer, component))
        self._firsts, self._lengths = group.first_tokens_cpu.numpy(), group.seq_lens_cpu.numpy()
        self._starts = None if group.row_starts_cpu is None else group.row_starts_cpu.numpy()
        self._tokens = flat_tokens(self.blocks)

    def span(self, row: int) -> tuple[int, int]:
        """Return the tokens that a row holds, ``[first, end)``."""
        return int(self._firsts[row]), int(self._lengths[row])

    def tokens(self, row: int, first: int, end: int) -> torch.Tensor:
        """Return tokens ``[first, end)`` of a row, ``[n, heads, width]``: a view on the virtual backend."""
        if self._starts is not None:
            start = int(self._starts[row])
            return self._tokens[start + first : start + end]
        size = self.group.block_size
        ids = self.group.block_table[row, first // size : -(-end // size)]
        found = as_bytes(self.blocks).index_select(0, ids).view(self.blocks.dtype)
        return found.flatten(0, 1)[first % size : first % size + end - first]


class TokenReader:
    """One row of a batch, until it is refilled, and one layer. What is read is counted in the allocator's ledger.

    layer. first: the first token that is held, 0 without a sliding window. length: tokens of the sequence, this step's
    included. block_size: of the batch's own group, as ``first`` and ``length``. device: of the cache.
    """

    def __init__(
        self, alloc: Allocator, batch: Batch, layer: int, row: int, held: dict[str, Held] | None = None
    ) -> None:
        """held: by component, found on first use; the readers of a batch and layer may share it."""
        self._alloc, self._batch, self._row = alloc, batch, row
        self._held: dict[str, Held] = {} if held is None else held
        self.layer, self.device = layer, alloc.device
        self.block_size = batch.block_size
        self.first, self.length = int(batch.first_tokens_cpu[row]), int(batch.seq_lens_cpu[row])

    def span(self, component: str) -> tuple[int, int]:
        """Return the tokens of a component that the sequence holds, ``[first, end)``, which differ by group."""
        return self._of(component).span(self._row)

    def rows(
        self, component: str, first: int = 0, end: int | None = None, *, count: bool = True
    ) -> torch.Tensor:  # fmt: skip
        """Return tokens ``[first, end)`` of a component, ``[n, heads, width]``: a view on the virtual backend, gathered
        blocks on the paged one. end: default all. A state of fixed size is one token. count: False for a caller that
        counts what it reads by itself. ``SpecError`` for tokens that the sequence does not hold, such as those out of
        window, whose memory may be unmapped.
        """
        part = self._of(component)
        held, length = part.span(self._row)
        end = length if end is None else end
        if not held <= first <= end <= length:
            raise SpecError(f"{component}: got tokens [{first}, {end}); the sequence holds [{held}, {length})")
        found = part.tokens(self._row, first, end)
        if count:
            self.count_read(component, found.numel() * found.element_size())
        return found

    def blocks(self, component: str, first: int = 0, end: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all blocks of a component, ``[num_blocks, block_size, heads, width]``, and the ids, int64 ``[n]``, of
        this sequence's blocks ``[first, end)``. end: default the complete ones. Nothing is counted: the caller reads a
        part of these blocks and calls ``count_read``.
        """
        part = self._of(component)
        end = part.span(self._row)[1] // part.group.block_size if end is None else end
        return part.blocks, part.group.block_table[self._row, first:end].long()

    def count_read(self, component: str, bytes: int) -> None:
        """Add to ``alloc.ledger.read``."""
        self._alloc.ledger.count_read(component, bytes)

    def _of(self, component: str) -> Held:
        self._batch.check_current()
        if component not in self._held:
            self._held[component] = Held(self._alloc, self._batch, self.layer, component)
        return self._held[component]


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
    if not isinstance(alloc, Allocator):
        raise SpecError(f"alloc: got {brief(alloc)}; must be an Allocator")
    check_batch_of(alloc, batch, Batch)
    components = check_members("components", components, str)
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
