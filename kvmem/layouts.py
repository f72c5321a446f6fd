"""Byte layout: where each component of each layer lies within a token, for a given ``interleave``.

A group's layers are cut into runs of ``interleave`` layers; each run has one arena (one reserved address range), in
which tokens lie one after the other, ``token_bytes`` apart. Within a token, the layers of the run follow each other,
and within a layer its components (K, then V)::

    arena 0:  | token 0: [layer 0: K V][layer 1: K V] ... | token 1: [layer 0: K V] ...
    arena 1:  | token 0: [layer G: K V] ...

With all layers in one run, a 2 MiB page holds 16 tokens of an 8B model instead of 1,024 tokens of one layer: that is
how a stock driver gets fine granularity (vAttention's tensor slicing). K and V of a layer have equal shape and
strides, and the last dimension is dense, which is all that paged kernels ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvmem.errors import SpecError
from kvmem.spec import Component, Group

__all__ = ["GroupLayout", "Slice", "resolve_interleave"]

#: Kernels load 16 bytes at a time, so every component of every token starts at a multiple of that.
ALIGN_BYTES = 16


@dataclass(frozen=True)
class Slice:
    """Where one component of one layer lies: ``offset_bytes`` into each token of arena ``arena`` of its group."""

    arena: int
    offset_bytes: int
    heads: int
    width: int
    dtype: torch.dtype


class GroupLayout:
    """The layout of one group.

    token_bytes: per arena, bytes from one token to the next (payload plus padding to 16 bytes).
    """

    def __init__(self, group: Group, interleave: int) -> None:
        self.group = group
        self.interleave = min(interleave, len(group.layers))
        self.token_bytes: list[int] = []
        self._slices: dict[tuple[int, str], Slice] = {}
        runs = [group.layers[i : i + self.interleave] for i in range(0, len(group.layers), self.interleave)]
        for arena, layers in enumerate(runs):
            self.token_bytes.append(self._lay_out(arena, layers))
        if not all(self.token_bytes):  # a run of layers that read a shared copy only
            self.token_bytes = [b for b in self.token_bytes if b]

    def _lay_out(self, arena: int, layers: Sequence[int]) -> int:
        offset = 0
        shared = [c for c in self.group.components if c.scope == "shared"] if arena == 0 else []
        for component in shared:
            where = self._slice(component, self.group.layers[0], arena, offset)
            self._slices.update({(layer, component.name): where for layer in self.group.layers})
            offset += self._padded(component, self.group.layers[0])
        for layer in layers:
            for component in (c for c in self.group.components if c.scope == "layer"):
                self._slices[layer, component.name] = self._slice(component, layer, arena, offset)
                offset += self._padded(component, layer)
        return offset

    def _padded(self, component: Component, layer: int) -> int:
        row = self.group.row_bytes(component.name, layer)
        return -(-row // ALIGN_BYTES) * ALIGN_BYTES

    def _slice(self, component: Component, layer: int, arena: int, offset: int) -> Slice:
        widths = self.group.widths(component.name, layer)
        heads = self.group.heads(component.name, layer)
        if component.planes:  # planes are read by their own kernels, as bytes
            return Slice(arena, offset, 1, self.group.row_bytes(component.name, layer), torch.uint8)
        if len(set(widths)) > 1:  # heads of unequal width have no rectangular shape: one flat row
            return Slice(arena, offset, 1, sum(widths) * (heads // len(widths)), component.dtype)
        return Slice(arena, offset, heads, widths[0], component.dtype)

    def slice(self, layer: int, component: str) -> Slice:
        """Where ``component`` of ``layer`` lies; ``SpecError`` if the group has no such thing."""
        try:
            return self._slices[layer, component]
        except KeyError:
            raise SpecError(
                f"group {self.group.name!r} has no component {component!r} in layer {layer!r}; it has "
                f"{', '.join(c.name for c in self.group.components)} in layers {self.group.layers}"
            ) from None

    @property
    def total_token_bytes(self) -> int:
        """Bytes one token takes in all arenas, padding included."""
        return sum(self.token_bytes)


def resolve_interleave(interleave: int | str, num_layers: int) -> int:
    """``"all"`` or a positive int, as an int."""
    if interleave == "all":
        return num_layers
    if isinstance(interleave, bool) or not isinstance(interleave, int) or interleave < 1:
        raise SpecError(f'interleave: got {interleave!r}; must be "all" or a number of layers from 1 to {num_layers}')
    return min(interleave, num_layers)
