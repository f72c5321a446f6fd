"""Joining chunks that were computed apart (CacheBlend, arXiv:2405.16444): keys are rotated to their new positions, and
the tokens whose keys deviate most from a real prefill are computed anew, with all layers' attention.

The manager rotates, scores, selects, scatters; the engine computes q, k and v of the selected tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvmem.allocator import Allocator
from kvmem.allocator.prefix import Tokens, token_ids
from kvmem.allocator.sequence import Sequence
from kvmem.arguments import brief, check_size
from kvmem.chunks.chunk import Chunk, Ropes, check_import, commit, placed_parts, sections_of
from kvmem.chunks.format import ChunkFile
from kvmem.errors import SpecError
from kvmem.kernels.blocks import scatter_tokens
from kvmem.layouts.attention import compute_dtype, described
from kvmem.layouts.reading import Held

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Composition", "compose"]


def compose(
    alloc: Allocator, sequence: Sequence, chunks: List[Chunk | ChunkFile], new_tokens: Tokens, *, ratio: float = 0.15,
    check_layer: int = 1, rope: Ropes = None,
) -> Composition:  # fmt: skip
    """Append chunks, wherever they were computed, and new tokens to a sequence; return the plan of one forward pass.

    chunks: in their order; of a ``ChunkFile`` one layer at a time is in host memory. new_tokens: ids that no chunk has,
    such as the question; they come last and are always computed. ratio: the share of the chunks' tokens that is
    computed in the layers behind ``check_layer``, the one whose keys are compared. rope: how the model rotates keys
    (``import_``).

    The pass, in which ``plan.tokens`` and ``plan.positions`` are those of all rows, chunks and new tokens::

        with compose(alloc, seq, chunks, question, rope=rope) as plan:
            for layer in range(num_layers):
                plan.load(layer)                         # the chunks' K and V, rotated
                q, k, v = ...                            # of the rows of x
                if layer == plan.check_layer:
                    rows = plan.select(k)                # indices, ascending; from here on only these are computed
                    x, q, k, v = x[rows], q[rows], k[rows], v[rows]
                plan.write(layer, k=k, v=v)
                ...                                      # q attends to plan.read(layer, "k"), plan.read(layer, "v")
            plan.commit()

    Nothing is committed before ``commit()``; leaving the block without it cuts the tokens off. They are committed by
    count, since they are approximations: no other prompt finds them. ``SpecError``: as ``import_``; ``OutOfMemory``.
    """
    new = token_ids(new_tokens)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
        raise SpecError(f"ratio: got {brief(ratio)}; must be from 0 to 1")
    check_size("check_layer", check_layer, 0, alloc.spec.num_layers - 1)
    if not chunks or not all(isinstance(chunk, (Chunk, ChunkFile)) for chunk in chunks):
        raise SpecError(f"chunks: got {brief(chunks)}; must be at least one Chunk or ChunkFile")
    start = at = sequence.num_committed_tokens
    for chunk in chunks:
        check_import(alloc, sequence, chunk.head, at - chunk.head.position, rope)
        at += len(chunk.head.tokens)
    try:
        sequence.extend(at - start + len(new))
        return Composition(alloc, sequence, list(chunks), new, ratio, check_layer, rope)
    except BaseException:
        sequence.truncate(start)
        raise


class Composition:
    """One forward pass over chunks and new tokens; ``compose`` makes it. A context manager.

    tokens: the ids of all rows, int32 ``[n]``; positions: int64 ``[n]``, on the cache's device. num_loaded: how many
    of the rows are chunks' tokens, the first ones. rows: the rows that are computed, int64; all until ``select``.
    check_layer: as given.
    """

    def __init__(
        self, alloc: Allocator, sequence: Sequence, chunks: list[Chunk | ChunkFile], new: npt.NDArray[np.int32],
        ratio: float, check_layer: int, rope: Ropes,
    ) -> None:  # fmt: skip
        self.check_layer = check_layer
        self._alloc, self._sequence, self._rope, self._ratio = alloc, sequence, rope, ratio
        self._feeds, self._next = [(chunk.head, iter(chunk.sections)) for chunk in chunks], 0
        self._start = sequence.num_committed_tokens
        self._batch = alloc.batch([sequence])
        self.tokens = np.concatenate([*(chunk.head.tokens for chunk in chunks), new])
        self.num_loaded = len(self.tokens) - len(new)
        self.positions = self._batch.positions.long()
        self.rows = torch.arange(len(self.tokens), device=self.positions.device)

    def load(self, layer: int) -> None:
        """Write the chunks' bytes of a layer, keys rotated to their new positions, to the sequence.

        Each layer once, in ascending order, before the pass needs it: in another thread, say, while the layer before it
        is computed. Errors: as ``Allocator.tensor``, and ``TierError`` from a file.
        """
        self._batch.check_current()
        if layer != self._next:
            raise SpecError(f"layer: got {brief(layer)}; layers are loaded in order, and the next one is {self._next}")
        self._next += 1
        wanted = [section for section in sections_of(self._alloc.spec) if section[0].layer == layer]
        first = 0
        for head, sections in self._feeds:
            end = first + len(head.tokens)
            shift = self._start + first - head.position
            for section in wanted:
                for part, _, values in placed_parts(
                    self._batch, head, section, next(sections, None), shift, self._rope
                ):
                    slots = self._batch.group(part.group).slot_mapping[first:end]
                    scatter_tokens(self._alloc.tensor(layer, part.name), slots, values.to(slots.device))
            first = end

    def read(self, layer: int, component: str) -> torch.Tensor:
        """Return a component of all tokens of the sequence, ``[tokens, heads, width]``, also before the chunks."""
        self._batch.check_current()
        held = Held(self._alloc, self._batch, layer, component)
        return held.tokens(0, *held.span(0))

    def deviations(self, k: torch.Tensor, component: str = "k") -> torch.Tensor:
        """Return ``||k - stored||**2`` of each of the chunks' tokens in the check layer, ``[num_loaded]``.

        k: the keys of all rows, ``[n, heads, width]``, as the cache stores them.
        """
        stored = self.read(self.check_layer, component)[-len(self.tokens) :]
        if not isinstance(k, torch.Tensor) or k.shape != stored.shape or k.device != stored.device:
            raise SpecError(f"k: got {described(k)}; must be of all rows, {described(stored)}")
        dtype = compute_dtype(k)
        return (k.to(dtype) - stored.to(dtype))[: self.num_loaded].square().sum((1, 2))

    def select(self, k: torch.Tensor, component: str = "k") -> torch.Tensor:
        """Return the rows that are computed from here on, ascending: the share ``ratio`` of the chunks' tokens, rounded
        up, whose keys deviate most, and all new tokens. REQUIRES: the check layer is loaded and not yet written.
        """
        most = self.deviations(k, component).sort(descending=True, stable=True).indices
        chosen = most[: ceil(self._ratio * self.num_loaded - 1e-9)]
        self.rows = torch.cat((chosen.sort().values, self.rows.new_tensor(range(self.num_loaded, len(self.tokens)))))
        return self.rows

    def write(self, layer: int, **components: torch.Tensor) -> None:
        """Overwrite the selected rows of a layer, by component: ``k=..., v=...``, each ``[rows, heads, width]``."""
        self._batch.check_current()
        for name, values in components.items():
            group = self._batch.group(self._alloc.spec.group_of(layer, name))
            scatter_tokens(self._alloc.tensor(layer, name), group.slot_mapping[self.rows], values)

    def commit(self) -> None:
        """Declare the tokens as written. ``SpecError`` if a layer was not loaded; ``TierError`` if a file goes on."""
        if self._next < self._alloc.spec.num_layers:
            raise SpecError(f"commit: {self._next} of {self._alloc.spec.num_layers} layers were loaded")
        for _, sections in self._feeds:
            next(sections, None)
        commit(self._alloc, self._sequence, self.tokens, exact=False)

    def __enter__(self) -> Composition:
        return self

    def __exit__(self, *_: object) -> None:
        alive = self._alloc.core.is_live(self._sequence.id)
        if alive and self._sequence.num_committed_tokens == self._start:
            self._sequence.truncate(self._start)
