"""Byte layout: where each component of each layer lies within a token, for a given ``interleave``.

A group's layers are cut into runs of ``interleave`` layers; each run has one arena (one reserved address range), in
which tokens lie one after the other, ``token_bytes`` apart. Within a token, the layers of the run follow each other,
and within a layer its components (K, then V)::

    arena 0:  | token 0: [layer 0: K V][layer 1: K V] ... | token 1: [layer 0: K V] ...
    arena 1:  | token 0: [layer G: K V] ...

With all layers in one run, a 2 MiB page holds 16 tokens of an 8B model instead of 1,024 tokens of one layer's K: that
is how a stock driver gets fine granularity (vAttention's tensor slicing). With ``"none"`` each component of each layer
has an arena of its own (joined components one together), and lies there as densely as in a contiguous tensor::

    arena 0:  | layer 0, K: token 0, token 1, token 2 ...
    arena 1:  | layer 0, V: token 0, token 1, token 2 ...

That is the order ``"tokens"`` of ``Group.block_order``. In the others, a component has the same bytes of a block, in
other places: it begins ``block_size * offset_bytes`` behind the block's start, and heads come before tokens there::

    "heads":   [layer 0, K: head 0: token 0, 1 ... | head 1: token 0, 1 ...][layer 0, V: ...][layer 1, K: ...]
    "joined":  [layer 0: head 0: K of token 0, 1 ..., V of token 0, 1 ... | head 1: ...][layer 1: ...]

A component that layers share is there once: at the start of arena 0's tokens, or in an arena of its own. K and V of a
layer have equal shape and strides, and the last dimension is dense, which is all that paged kernels ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import torch

from kvmem.errors import SpecError
from kvmem.spec import Component, Group

__all__ = ["GroupLayout", "Interleave", "Slice", "resolve_interleave"]

#: How many layers lie side by side; ``"none"``: not even the components of one.
Interleave = int | Literal["none"]

#: Kernels load 16 bytes at a time, so every component of every token starts at a multiple of that.
ALIGN_BYTES = 16


@dataclass(frozen=True)
class Slice:
    """Where one component of one layer lies in arena ``arena`` of its group: ``offset_bytes`` into each token; where
    heads come first, ``offset_bytes`` into each block, with ``head_bytes`` from one head to the next.
    """

    arena: int
    offset_bytes: int
    heads: int
    width: int
    dtype: torch.dtype
    head_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        """The bytes of one head of one token."""
        return self.width * self.dtype.itemsize


class GroupLayout:
    """The layout of one group.

    token_bytes: per arena, bytes from one token to the next (payload plus padding to 16 bytes).
    """

    def __init__(self, group: Group, interleave: Interleave) -> None:
        self.group = group
        self.token_bytes: list[int] = []
        self._slices: dict[tuple[int, str], Slice] = {}
        for arena, parts in enumerate(_arenas(group, interleave)):
            offset = 0
            for component, layers in parts:
                where = self._slice(component, layers[0], arena, offset)
                self._slices.update({(layer, component.name): where for layer in layers})
                offset += self._padded(component, layers[0])
            self.token_bytes.append(offset)

    def _padded(self, component: Component, layer: int) -> int:
        return _aligned(self.group.row_bytes(component.name, layer))

    def _slice(self, component: Component, layer: int, arena: int, offset: int) -> Slice:
        widths = self.group.widths(component.name, layer)
        heads = self.group.heads(component.name, layer)
        if component.planes:  # planes are read by their own kernels, as bytes
            return Slice(arena, offset, 1, self.group.row_bytes(component.name, layer), torch.uint8)
        if self.group.block_order != "tokens":
            return self._by_head(component, Slice(arena, offset, heads, widths[0], component.dtype))
        if len(set(widths)) > 1:  # heads of unequal width have no rectangular shape: one flat row
            return Slice(arena, offset, 1, sum(widths) * (heads // len(widths)), component.dtype)
        return Slice(arena, offset, heads, widths[0], component.dtype)

    def _by_head(self, component: Component, where: Slice) -> Slice:
        size, members = self.group.block_size, self.group.components
        part = size * where.row_bytes
        if self.group.block_order == "heads":
            return replace(where, offset_bytes=size * where.offset_bytes, head_bytes=part)
        before = members.index(component)  # of as many bytes each, so that the first one is where the layer begins
        first = where.offset_bytes - before * _aligned(where.heads * where.row_bytes)
        return replace(where, offset_bytes=size * first + before * part, head_bytes=len(members) * part)

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


def _aligned(bytes: int) -> int:
    return -(-bytes // ALIGN_BYTES) * ALIGN_BYTES


#: A component, and the layers that one copy of it is for: one layer, or all of the group.
_Part = tuple[Component, tuple[int, ...]]


def _arenas(group: Group, interleave: Interleave) -> list[list[_Part]]:
    """What lies side by side in each arena, in order."""
    shared: list[_Part] = [(c, group.layers) for c in group.components if c.scope == "shared"]
    layers: list[list[_Part]] = [
        [(c, (layer,)) for c in group.components if c.scope == "layer"] for layer in group.layers
    ]
    if interleave == "none" and group.block_order == "joined":
        interleave = 1  # the components of a layer have one arena
    if interleave == "none":
        return [[part] for part in chain(shared, *layers)]
    runs = [list(chain(*layers[i : i + interleave])) for i in range(0, len(layers), interleave)]
    runs[0] = shared + runs[0]
    return [run for run in runs if run]  # layers that read a shared copy only leave empty ones


def resolve_interleave(interleave: int | str, num_layers: int) -> Interleave:
    """``"all"``, ``"none"`` or a positive int: ``"all"`` and what is too many as the number of layers."""
    if interleave == "all":
        return num_layers
    if interleave == "none":
        return "none"
    if isinstance(interleave, bool) or not isinstance(interleave, int) or interleave < 1:
        raise SpecError(
            f'interleave: got {interleave!r}; must be "all", "none" or a number of layers from 1 to {num_layers}'
        )
    return min(interleave, num_layers)
