"""The interface of a selector: the summary that it keeps of each block, and how it scores blocks for a query."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from kvmem.allocator import Allocator
from kvmem.allocator.batch import GroupBatch
from kvmem.errors import SpecError
from kvmem.kernels.checks import as_bytes, plain
from kvmem.layouts.base import check_spec
from kvmem.spec import CacheSpec, Component, Group

__all__ = ["LayerView", "Selector", "objection", "spread"]


def objection(group: Group) -> str | None:
    """Return why no blocks can be chosen in a group, or None."""
    if group.window_tokens is not None:
        return f"it has a sliding window of {group.window_tokens} tokens, which says what is read"
    if group.growth != "token" or group.ragged or not {"k", "v"} <= {c.name for c in group.components}:
        return "it does not store k and v of every token, with one length for all heads"
    k = group.component("k")
    if not isinstance(k.width, int) or k.scope != "layer" or k.planes or not k.dtype.is_floating_point:
        stored = f"width {k.width}, scope {k.scope!r}, planes {k.planes} and {k.dtype}"
        return f"its k has {stored}; selectors score plain floats of one width, which each layer has for itself"
    if "pre" in k.ropes:
        return "its k is stored before rotation, and queries come after it"
    return None


def spread(name: str, elements: Iterable[int], block_size: int, dtype: torch.dtype) -> Component:
    """Return a component that holds ``elements`` numbers of each block of a layer (one count for each layer).

    The core stores components by token, so the numbers of a block lie spread over its tokens. They are written when the
    block is complete.
    """
    return Component(name, width=tuple(-(-n // block_size) for n in elements), dtype=dtype)


class LayerView:
    """What a selector reads of one layer for a batch of ``B`` rows, of which the longest has ``M`` blocks.

    layer. block_size. table: int64 ``[B, M]``, block ids, past a row's end those of another one. lengths: int64
    ``[B]``, tokens. heads, width: of K. Reads are counted in the allocator's ledger.
    """

    def __init__(self, alloc: Allocator, layer: int, group: GroupBatch, num_blocks: int) -> None:
        self._alloc, self.layer = alloc, layer
        self.block_size = group.block_size
        self.table, self.lengths = group.block_table[:, :num_blocks].long(), group.seq_lens.long()
        lengths = group.seq_lens_cpu
        if num_blocks:  # block 0, which the rest of the table names, may be unmapped
            longest = self.table[int(lengths.argmax())]
            past = torch.arange(num_blocks, device=longest.device) * self.block_size >= self.lengths.unsqueeze(1)
            self.table = torch.where(past, longest, self.table)
        self._tokens, self._complete = int(lengths.sum()), int((lengths // group.block_size).sum())
        self.k = plain(alloc.tensor(layer, "k"))
        self.heads, self.width = self.k.shape[2:]

    def summary(self, name: str, elements: int) -> torch.Tensor:
        """Return the numbers of every block, ``[B, M, elements]``; those of incomplete blocks have no meaning."""
        blocks = plain(self._alloc.tensor(self.layer, name))
        self._alloc.ledger.count_read(name, self._complete * elements * blocks.element_size())
        found = as_bytes(blocks).index_select(0, self.table.flatten()).view(blocks.dtype)
        return found.view(*self.table.shape, math.prod(blocks.shape[1:]))[..., :elements]

    def channels(self, wanted: torch.Tensor) -> torch.Tensor:
        """Return channels of K of every token, ``[B, M, block_size, heads, r]``; past a row's end without a meaning.

        wanted: int64 ``[B, heads, r]``.
        """
        self._alloc.ledger.count_read("k", self._tokens * math.prod(wanted.shape[1:]) * self.k.element_size())
        device = wanted.device
        offsets = torch.arange(self.block_size, device=device).view(-1, 1, 1)
        heads = torch.arange(self.heads, device=device).unsqueeze(1)
        at = self.table[:, :, None, None, None], offsets, heads, wanted[:, None, None]
        return as_bytes(self.k)[at].view(self.k.dtype)

    def tokens_held(self) -> torch.Tensor:
        """Return bool ``[B, M, block_size]``: False past a row's end."""
        positions = torch.arange(self.table.shape[1] * self.block_size, device=self.table.device)
        return (positions < self.lengths.unsqueeze(1)).view(*self.table.shape, self.block_size)


class Selector(ABC):
    """A rule that scores blocks for a query, from a summary that it keeps of each block. ``Chooser`` applies it.

    A selector holds options and no state. What it keeps are components of the group of K and V: so a summary is shared,
    forked, found by prefix, evicted, moved and stored in tiers with its block, on both backends. It exists for complete
    blocks only, because the newest block is always read.
    """

    def extend(self, spec: CacheSpec) -> CacheSpec:
        """Return the spec with this selector's summaries, with which the allocator must be made.

        Groups in which nothing can be chosen, such as sliding windows, stay as they are; ``SpecError`` with the reasons
        if all are so.
        """
        check_spec(spec)
        reasons = [f"group {group.name!r}: {why}" for group in spec.groups if (why := objection(group))]
        if len(reasons) == len(spec.groups):
            raise SpecError(f"spec: no blocks can be chosen: {'; '.join(reasons)}")
        groups = [
            group if objection(group) else replace(group, components=group.components + self.components(group))
            for group in spec.groups
        ]
        return replace(spec, groups=tuple(groups), components=None)

    def components(self, group: Group) -> tuple[Component, ...]:
        """Return what is kept of each block of a group, made by ``spread``; empty for nothing."""
        return ()

    def summarise(self, keys: torch.Tensor, runs: list[int]) -> Mapping[str, torch.Tensor]:
        """Return the numbers of each block by component, ``[m, elements]``.

        keys: K of m blocks that have just become complete, ``[m, block_size, heads, width]``. runs: how many of them
        follow each other in a sequence, for each sequence; their sum is m.
        """
        return {}

    @abstractmethod
    def logits(self, q: torch.Tensor, view: LayerView, scale: float) -> torch.Tensor:
        """Return the estimated logarithm of each block's attention mass, up to a constant: ``[B, n, H, g, M]``, or a
        shape that expands to it.

        q: ``[B, n, H, g, width]`` in float32 or float64: n new tokens of each row (zeros where there are fewer), g
        query heads of each of H KV heads. scale: of the scores. Blocks without a summary do not count.
        """
