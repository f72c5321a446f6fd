"""K and V as they are: the layout that every attention kernel reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvmem.errors import SpecError
from kvmem.layouts.base import Layout, check_spec
from kvmem.layouts.reading import TokenReader
from kvmem.spec import CacheSpec

__all__ = ["PlainKV"]


class PlainKV(Layout):
    """Stores K after rotation, and V. Exact up to the dtype of the cache."""

    def __init__(self, spec: CacheSpec) -> None:
        """spec: K and V of each layer, as ``CacheSpec.kv()`` and ``CacheSpec.from_config()`` give it."""
        check_spec(spec)
        for layer in range(spec.num_layers):
            groups = [(g.growth, *sorted(c.name for c in g.components)) for g in spec.groups if layer in g.layers]
            if groups != [("token", "k", "v")]:
                raise SpecError(f"spec: layer {layer} has {groups}; PlainKV stores k and v of every layer in one group")
        self.spec = spec

    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """values: k (after rotation) and v, ``[T, KV heads, width]`` each."""
        if len(values) != 2:
            raise SpecError(f"values: got {len(values)}; PlainKV stores two: k and v")
        return dict(zip("kv", values, strict=True))

    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views on the virtual backend, gathered on the paged one."""
        return reader.rows("k", first, end), reader.rows("v", first, end)

    def derive_into(self, reader: TokenReader, first: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """A copy."""
        if k.dtype.itemsize == 1 or v.dtype.itemsize == 1:  # which saturates
            return super().derive_into(reader, first, end, k, v)
        k.copy_(reader.rows("k", first, end)), v.copy_(reader.rows("v", first, end))

    def span(self, reader: TokenReader) -> tuple[int, int]:
        """As ``Layout.span``, of the group that holds the layer: those of other groups have other windows."""
        return reader.span("k")

    def window_tokens(self, layer: int) -> int | None:
        """The window of the group that holds the layer."""
        return self.spec.groups[self.spec.group_of(layer, "k")].window_tokens

    def kernel_args(self, layer: int) -> dict[str, Any]:
        """Nothing: kernels read ``Allocator.kv(layer)`` as it is."""
        return {}
