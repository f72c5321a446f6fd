"""Blocks of a prompt that stay in host slots while somebody reads them there, instead of coming back to the device."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from kvmem.errors import SpecError, TierError
from kvmem.geometry.views import slot_view

if TYPE_CHECKING:
    from kvmem.allocator.tiers.engine import Tiering
    from kvmem.allocator.tiers.places import Prompt
    from kvmem.spec import CacheSpec

__all__ = ["HeldBlocks"]


class HeldBlocks:
    """The first run of a prompt's whole blocks that host slots have and the device has not. The slots are given to
    nothing else until ``release()``, the end of the ``with`` statement, or the end of this object. What clears or
    closes the allocator does not wait for it: the bytes stay. ``Allocator.hold`` makes it.

    tiering: of the allocator. first_token, num_tokens: the range of the prompt that they are. What the prompt has
    before it is on the device.
    """

    _held: list[bool] = []  # noqa: RUF012  # of each of _names, whether it is held; of one that was not made, none

    def __init__(self, tiering: Tiering, prompt: Prompt) -> None:
        """``TierError`` if the device has not filled the slots within a bound."""
        self.tiering, self._left = tiering, tiering.transfers.left
        full, located, core = tiering.full_groups, tiering.locate(prompt), tiering.core
        blocks = range(prompt.num_blocks)
        first = next((k for k in blocks if not all(located.on_device(k, g) for g in full)), prompt.num_blocks)
        there = takewhile(lambda k: all((k, g) in located.names for g in full), blocks[first:])
        wanted = [[located.names[k, g] for g in full] for k in there]
        self._names, self._held = [name for block in wanted for name in block], list[bool]()
        self._held[:] = core.hold_slots(self._names)  # one statement: __del__ gives them back if a signal ends this
        whole = [*self._held, False].index(False) // max(len(full), 1)  # what was given away meanwhile ends the run
        self._slots = {g: [block[i][0] for block in wanted[:whole]] for i, g in enumerate(full)}
        self.first_token, self.num_tokens = first * tiering.block_size, whole * tiering.block_size
        self._memory = torch.from_numpy(core.host_bytes())  # keeps it, also when the allocator has gone
        try:
            tiering.transfers.wait_for(core.latest_fence())
        except TimeoutError as error:
            raise TierError(f"hold: {error}") from error

    def __del__(self) -> None:
        try:  # no lock is taken, because the collector may run anywhere
            self._give()
        finally:  # once more, where a signal ended it: no one else can
            self._give()

    def _give(self) -> None:
        """Leave the slots to the engine. One by one, so that a signal finds each in one place."""
        while self._held:
            self._left.extend(self._names[len(self._held) - 1 :][: self._held.pop()])

    def release(self) -> None:
        """Let go of the slots. Tensors of ``blocks()`` must not be read any more. Twice is no error."""
        self._give()
        self.tiering.transfers.release_left()

    def blocks(self, spec: CacheSpec, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return K and V of a layer, ``[slots, block_size, heads, width]`` in host memory, and the slots of these
        blocks in order, int64. Other slots may change at any time. ``SpecError`` after ``release()``, and for a layer
        whose group drops tokens.
        """
        index = spec.group_of(layer, "k")
        if index not in self._slots or spec.group_of(layer, "v") != index:
            raise SpecError(f"layer: got {layer}; its K and V must be of one group of full attention")
        if spec.groups[index].block_order != "tokens":
            raise SpecError(f"layer: got {layer}; its blocks are head-major, which nothing reads in host slots")
        if not self._held and self.num_tokens:
            raise SpecError("blocks: these were released; hold them again")
        tiering, tokens = self.tiering, self.tiering.block_size
        first, layout, found = sum(tiering.counts[:index]), tiering.layouts[index], []
        for component in ("k", "v"):
            where = layout.slice(layer, component)
            begin = tiering.core.slot_offset(first) + tokens * sum(layout.token_bytes[: where.arena])
            strides = tiering.forms[index].slot_bytes, layout.token_bytes[where.arena]
            found.append(slot_view(self._memory, where, (tiering.counts[index], tokens), strides, begin))
        return found[0], found[1], torch.tensor(self._slots[index], dtype=torch.int64) - first

    def __enter__(self) -> HeldBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
