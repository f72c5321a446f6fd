"""The blocks of a prompt by their keys, and where device and host have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmem.events.digests import Key

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Ids = npt.NDArray[np.int32]
    Name = tuple[int, int]  # a host slot and its generation

__all__ = ["Located", "Prompt"]


class Prompt(NamedTuple):
    """Whole blocks of some tokens.

    ids: int32 [blocks * block_size]. keys: salt, and adapter with extra keys, for the core (``encode_keys``).
    digests: of each block, with all blocks before it. root: salt and adapter. marks: the extra keys, with positions.
    """

    ids: Ids
    keys: tuple[bytes, bytes]
    digests: list[bytes]
    root: tuple[Key, Key]
    marks: list[tuple[int, bytes]]

    @property
    def num_blocks(self) -> int:
        return len(self.digests)


class Located:
    """Where device and host have a prompt's blocks.

    names: of host slots by (block, group), for what is not on the device.
    """

    def __init__(self, device: npt.NDArray[np.uint8], names: dict[tuple[int, int], Name]) -> None:
        self._device, self.names = device, names

    def on_device(self, block: int, group: int) -> bool:
        return bool(self._device[block, group])

    def has(self, block: int, group: int) -> bool:
        return bool(self._device[block, group]) or (block, group) in self.names
