"""The interface of a layout: what a token stores when that is not plain K and V, and attention over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kvmem.arguments import brief
from kvmem.errors import SpecError
from kvmem.kernels.merge import merge_levels
from kvmem.kernels.write import to_cache_dtype
from kvmem.layouts.attention import Partial, attend_tile, described
from kvmem.spec import CacheSpec

if TYPE_CHECKING:
    from kvmem.layouts.reading import TokenReader

__all__ = ["Layout", "check_floats", "check_spec", "of_layer"]

_W = TypeVar("_W")


def check_spec(spec: object) -> None:
    """``SpecError`` for what is no ``CacheSpec``."""
    if not isinstance(spec, CacheSpec):
        raise SpecError(f"spec: got {brief(spec)}; must be a CacheSpec, as CacheSpec.kv() gives it")


def check_floats(values: Sequence[object], shapes: Sequence[tuple[int, ...]], must_be: str) -> None:
    """``SpecError`` unless values are floats ``[T, *shape]``, one for each shape. must_be: the same in words."""
    given = [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if len(given) != len(values) or [tuple(value.shape[1:]) for value in given] != list(shapes):
        raise SpecError(f"values: got {described(values)}; must be {must_be}")


def of_layer(weights: Mapping[int, _W], layer: int) -> _W:
    """Return the weights of a layer; ``SpecError``, with the layers that have some, for any other."""
    if layer not in weights:
        raise SpecError(f"layer: got {brief(layer)}; must be one of {brief(tuple(weights))}")
    return weights[layer]


class Layout(ABC):
    """How the keys and values of a model are stored: the components of a token, and how they become K and V again.

    A layout holds weights and options, and no state of any sequence: one layout serves any number of allocators.
    ``LayoutCache(layout, alloc)`` joins both. Growth, sharing, eviction and copies see components and bytes only.

    spec: the components. Make the allocator with it.
    out_widths: of what ``attend`` returns, by layer, unless it is that of the queries.
    tile_tokens: how many tokens ``attend`` derives at a time, by default.

    Queries are given as the model's attention takes them: after rotation.
    """

    spec: CacheSpec
    out_widths: Mapping[int, int] = MappingProxyType({})
    tile_tokens: int = 256

    @abstractmethod
    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return what is stored of new tokens: rows ``[T, heads, width]`` by component, in the dtype of the component
        or in one that ``kernels.write.to_cache_dtype`` converts.

        values: what the layout stores, ``[T, ...]``; the layout says which. positions: int64 ``[T]``.
        ``SpecError`` for values of a wrong shape.
        """

    @abstractmethod
    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of tokens ``[first, end)``, each ``[n, KV heads, width]``, K after rotation.

        reader: one sequence and one layer. Both are new tensors, or views into the cache: they are not written.
        """

    def derive_into(self, reader: TokenReader, first: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write what ``derive`` returns into k and v, ``[n, KV heads, width]`` of any float dtype. This form derives
        ``tile_tokens`` tokens at a time; a layout that need not make tensors of its own for that overrides it.
        """
        for begin, stop in self.tiles(first, end):
            parts = self.derive(reader, begin, stop)
            for room, part in zip((k, v), parts, strict=True):
                room[begin - first : stop - first].copy_(to_cache_dtype(part, room.dtype))

    def attend(
        self, q: torch.Tensor, reader: TokenReader, *, scale: float | None = None, causal: bool = True
    ) -> Partial:
        """Return ``(out [n, query heads, width], lse [n, query heads])`` of the last n tokens over all tokens.

        q: ``[n, query heads, width]``. scale: of the scores, default ``width ** -0.5``. causal: a query sees the tokens
        up to its own. lse: natural logarithm. Both are float32, or float64 for a query in float64. This form derives K
        and V of ``tile_tokens`` tokens at a time; a layout that reads compressed bytes overrides it.
        """
        begin, length = self.span(reader)
        window = self.window_tokens(reader.layer)
        if window is not None:
            begin = max(begin, length - len(q) - window + 1)
        how: Any = {"length": length, "scale": scale, "causal": causal, "window": window}
        tiles = self.tiles(begin, length)
        return merge_levels(attend_tile(q, *self.derive(reader, *tile), first=tile[0], **how) for tile in tiles)

    def tiles(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return ``[first, end)`` in pieces of ``tile_tokens``; for no tokens an empty piece, which has shapes too."""
        size = self.tile_tokens
        return [(at, min(at + size, end)) for at in range(first, end, size) or [first]]

    def span(self, reader: TokenReader) -> tuple[int, int]:
        """Return which tokens can be derived, ``[first, end)``: those held, of the encoder in cross attention."""
        return reader.first, reader.length

    def window_tokens(self, layer: int) -> int | None:
        """Return how many tokens a query of the layer sees, itself included; None for all."""
        return None

    # --- components that are encoded a whole block at a time ---

    def tail(self, layer: int) -> tuple[str, ...]:
        """Return what ``encode_blocks`` is computed from, for a layout that encodes components a whole block at a time:
        components of a sliding-window group, which hold the newest tokens as they were written and from which an
        incomplete block is read; and others that ``encode`` writes, if need be. Empty for most.
        """
        return ()

    def encode_blocks(self, layer: int, tail: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return what is stored of whole blocks: ``[m, block_size, heads, width]`` by component.

        tail: ``[m, block_size, heads, width]`` of each component that ``tail()`` names. Called once for each block,
        when its last token is written.
        """
        raise NotImplementedError

    # --- kernels of other packages ---

    def kernel_args(self, layer: int) -> dict[str, Any]:
        """Return keyword arguments with which attention kernels of other packages read ``Allocator.kv(layer)`` as it
        is, such as scales. ``SpecError`` if they cannot: derive K and V into a scratch with ``LayoutCache.derive``.
        """
        raise SpecError(
            f"{type(self).__name__} stores no K and V that other kernels read: use LayoutCache.attend(), or give a "
            "kernel the K and V of LayoutCache.derive()"
        )
