"""A layout over an allocator: what is written, derived and attended to in a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary, WeakSet

import torch

from kvmem.allocator import Allocator, Batch
from kvmem.allocator.batch import GroupBatch
from kvmem.arguments import brief, check_bool, check_number
from kvmem.errors import SpecError
from kvmem.kernels.checks import check_queries
from kvmem.kernels.write import write_all
from kvmem.layouts.attention import Partial, compute_dtype, described
from kvmem.layouts.base import Layout
from kvmem.layouts.reading import Held, TokenReader, check_batch_of
from kvmem.spec.dtypes import parse_dtype

__all__ = ["Derived", "LayoutCache", "check_whole_blocks"]

#: The caches of each allocator: its ledger holds the scratches of all of them.
_CACHES: WeakKeyDictionary[Allocator, WeakSet[LayoutCache]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Derived:
    """K and V of all tokens that a batch holds, for kernels that take packed sequences (``varlen``).

    k, v: ``[N, KV heads, width]``, one sequence after the other, in a scratch that the next ``derive()`` overwrites.
    cu_seqlens_k: int32 ``[rows + 1]``, their running sum. max_seqlen_k: the longest.
    """

    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_k: int


class LayoutCache:
    """The cache of one allocator, written and read through a layout.

    Sequences, batches, sharing and memory are the allocator's; a step looks like this::

        alloc.extend_batch(ids, counts)
        batch = alloc.batch(ids)
        for layer in range(num_layers):
            cache.write(layer, batch, k, v)                    # what Layout.encode() takes
            out, lse = cache.attend(q, layer, batch)           # or kernels over cache.derive(layer, batch)

    Everything read is counted in ``alloc.ledger``, and so is the scratch that ``derive`` keeps.
    """

    def __init__(self, layout: Layout, alloc: Allocator) -> None:
        """``SpecError`` unless ``alloc`` was made with ``layout.spec`` and has memory (device "meta" has none); and on
        the virtual backend, for a layout that encodes whole blocks, unless a page holds whole blocks.
        """
        if not isinstance(layout, Layout) or not isinstance(alloc, Allocator) or alloc.device.type == "meta":
            raise SpecError(
                f"layout, alloc: got {brief(layout)}, {brief(alloc)}; give Layout and Allocator with memory"
            )
        if alloc.spec != layout.spec:
            raise SpecError(f"alloc: made with another spec than the layout's: Allocator({type(layout).__name__}.spec)")
        _check_pages(layout, alloc)
        self.layout, self.alloc = layout, alloc
        self._scratch: dict[str, torch.Tensor] = {}
        _CACHES.setdefault(alloc, WeakSet()).add(self)

    @torch.no_grad()
    def write(self, layer: int, batch: Batch, *values: torch.Tensor) -> None:
        """Write the new tokens of a layer. values: what ``layout.encode`` takes, ``[T, ...]``, packed as the batch is.

        ``SpecError`` for values that do not fit, ``StaleHandle`` for a batch that is not current; nothing is written
        then. Cost: the layout's encoding and one write for each component; layouts that encode whole blocks also read
        each block's tail once, when it is complete.
        """
        self._check(layer, batch)
        device = batch.positions.device
        if not all(isinstance(value, torch.Tensor) and value.device == device for value in values):
            raise SpecError(f"values: got {described(values)}; must be tensors on {device}, where the cache is")
        with self._own_dtypes():
            rows = self.layout.encode(layer, *values, positions=batch.positions.long())
        write_all(
            [
                (name, self.alloc.tensor(layer, name), self._group(batch, layer, name), row, 1.0)
                for name, row in rows.items()
            ]
        )
        if tail := self.layout.tail(layer):
            self._write_blocks(layer, batch, tail)

    def readers(self, layer: int, batch: Batch) -> list[TokenReader]:
        """Return one reader for each sequence of the batch, padding rows left out, in order. Errors: as ``write``."""
        self._check(layer, batch)
        held: dict[str, Held] = {}
        return [TokenReader(self.alloc, batch, layer, row, held) for row in range(len(batch.buffers.handles))]

    def attend(
        self, q: torch.Tensor, layer: int, batch: Batch, *, scale: float | None = None, causal: bool = True,
        queries: GroupBatch | None = None,
    ) -> Partial:  # fmt: skip
        """Return ``(out [T, query heads, width], lse float32 [T, query heads])`` of the new tokens over all tokens.

        q: ``[T, query heads, width]``, packed by ``cu_seqlens_q``, after rotation. scale: of the scores, default
        ``width ** -0.5``. causal: a query sees the tokens up to its own; False for cross attention. queries: the batch
        that q is packed by, if that is another group's (cross attention). out: in q's dtype; its width is that of V, or
        what the layout says. For q in float64, the lse is float64 too. Rows of padding are zero, their lse -inf.

        Cost: a few torch calls for each sequence and tile.
        """
        readers, packed = self.readers(layer, batch), batch if queries is None else queries
        check_batch_of(self.alloc, packed, GroupBatch, "queries")
        if packed.buffers.handles != batch.buffers.handles:
            raise SpecError(f"queries: got {brief(queries)}; must be another group's batch of the same sequences")
        check_queries(q)
        check_bool("causal", causal)
        scale = None if scale is None else check_number("scale", scale)
        starts, device = packed.cu_seqlens_q_cpu.tolist(), batch.positions.device
        if len(q) != starts[-1] or q.device != device:
            raise SpecError(f"q: got {described(q)}; must be [{starts[-1]}, query heads, width] on {device}")
        with self._own_dtypes():
            parts = [
                (begin, end, self.layout.attend(q[begin:end], reader, scale=scale, causal=causal))
                for reader, begin, end in zip(readers, starts, starts[1:], strict=False)
                if begin < end
            ]
        width = parts[0][2][0].shape[-1] if parts else self.layout.out_widths.get(layer, q.shape[-1])
        out, lse = q.new_zeros(*q.shape[:2], width), q.new_full(q.shape[:2], -torch.inf, dtype=compute_dtype(q))
        for begin, end, (o, s) in parts:
            out[begin:end], lse[begin:end] = o.to(q.dtype), s
        return out, lse

    @torch.no_grad()  # the scratch would keep the graph of every call
    def derive(self, layer: int, batch: Batch, *, dtype: torch.dtype | str | None = None) -> Derived:
        """Return K and V of all tokens of the batch, in a scratch of one layer that the next call overwrites.

        dtype: of the scratch, a float; those of 8 bits saturate. Default: what the layout derives. Cost:
        ``layout.derive`` and one write. The scratch grows to the most that a call needed, and the ledger holds it, with
        those of the allocator's other caches, as ``"scratch"``; ``release_scratch()`` frees it. No gradients.
        """
        if dtype is not None and not (dtype := parse_dtype(dtype)).is_floating_point:
            raise SpecError(f"dtype: got {dtype}; K and V would be truncated: derive floats, such as torch.float16")
        readers = self.readers(layer, batch)
        spans = [self.layout.span(reader) for reader in readers]
        lengths = [end - first for first, end in spans]
        if not readers:
            raise SpecError("batch: got no sequences; there is nothing to derive")
        with self._own_dtypes():
            shapes = self.layout.derive(readers[0], spans[0][0], spans[0][0])
            k, v = (self._room(name, sum(lengths), like, dtype) for name, like in zip("kv", shapes, strict=True))
            done = 0
            for reader, (first, end) in zip(readers, spans, strict=True):
                at = slice(done, done := done + end - first)
                self.layout.derive_into(reader, first, end, k[at], v[at])
        return Derived(k, v, torch.tensor([0, *lengths], device=k.device).cumsum(0).int(), max(lengths))

    def release_scratch(self) -> None:
        """Free the scratch of ``derive``. Results of earlier calls keep their memory while they are referenced."""
        self._scratch.clear()
        self._hold_scratch()

    def _hold_scratch(self) -> None:
        sizes = [len(buffer) for cache in _CACHES[self.alloc] for buffer in cache._scratch.values()]
        self.alloc.ledger.hold("scratch", sum(sizes))

    def _room(self, name: str, tokens: int, like: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Return ``[tokens, *like.shape[1:]]`` of the scratch: bytes, which layers of several dtypes reuse."""
        kind, numbers = dtype or like.dtype, tokens * math.prod(like.shape[1:])
        known, bytes = self._scratch.get(name), numbers * kind.itemsize
        if known is None or known.device != like.device or len(known) < bytes:
            self._scratch[name] = known = torch.empty(bytes, dtype=torch.uint8, device=like.device)
            self._hold_scratch()
        return known[:bytes].view(kind).view(tokens, *like.shape[1:])

    def _own_dtypes(self) -> torch.autocast:
        """Layouts compute in the dtypes that they choose, under ``torch.autocast`` too."""
        return torch.autocast(self.alloc.device.type, enabled=False)

    def _check(self, layer: int, batch: Batch) -> None:
        self.alloc.spec.layer_components(layer)  # refuses a layer that the spec does not have
        check_batch_of(self.alloc, batch, Batch)

    def _group(self, batch: Batch, layer: int, component: str) -> GroupBatch:
        return batch.group(self.alloc.spec.group_of(layer, component))

    # --- components that are encoded a whole block at a time ---

    def _write_blocks(self, layer: int, batch: Batch, tail: tuple[str, ...]) -> None:
        """Encode each block whose last token this step has written."""
        lengths = batch.seq_lens_cpu.tolist()
        new = batch.cu_seqlens_q_cpu.diff().tolist()
        size = batch.block_size
        runs = [
            (row, (lengths[row] - new[row]) // size, lengths[row] // size) for row in range(len(batch.buffers.handles))
        ]
        if not (runs := [(row, first, end) for row, first, end in runs if first < end]):
            return
        held = {name: Held(self.alloc, batch, layer, name) for name in tail}
        with self._own_dtypes():
            tokens = {
                name: torch.cat([part.tokens(row, first * size, end * size) for row, first, end in runs])
                for name, part in held.items()
            }
            encoded = self.layout.encode_blocks(
                layer, {name: x.view(-1, size, *x.shape[1:]) for name, x in tokens.items()}
            )
        for component, values in encoded.items():
            table, blocks = self._group(batch, layer, component).block_table, self.alloc.tensor(layer, component)
            blocks[torch.cat([table[row, first:end] for row, first, end in runs]).long()] = values.to(blocks.dtype)


def _check_pages(layout: Layout, alloc: Allocator) -> None:
    """Forks and hits share whole pages, and may end within a block. Each then encodes that block anew, from its first
    token on, which must not lie in a page that the other reads.
    """
    for index, group in enumerate(alloc.spec.groups):
        tails = {name for layer in group.layers for name in layout.tail(layer)}
        if tails and not tails >= {component.name for component in group.components}:
            check_whole_blocks(alloc, index, "are encoded whole")


def check_whole_blocks(alloc: Allocator, group: int, why: str) -> None:
    """``SpecError`` where a block may lie in two pages, as the paged backend never puts it. why: what forbids that."""
    page, found = alloc.pool.page_bytes, alloc.spec.groups[group]
    blocks = [n * found.block_size for n in alloc._layouts[group].token_bytes]
    if alloc.backend == "virtual" and any(page % block for block in blocks):
        fits = math.lcm(alloc.pool.device.info.granularity_bytes, *blocks)
        raise SpecError(
            f"page_bytes: got {page}; blocks of group {found.name!r} take {sorted(set(blocks))} bytes and {why}, so a "
            f'page must hold whole blocks: use page_bytes={fits} or a multiple, interleave="none" for smaller ones, or '
            'backend="paged"'
        )
