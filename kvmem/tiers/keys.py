"""Keys of blocks outside of the device's memory: SHA-256 over what the bytes of a block depend on.

A chained key names a block and all blocks before it; a position-free key names the tokens of a chunk alone (Knowledge
Delivery Network). Equal keys mean equal content: the fingerprint covers spec, model, RoPE and rank, the root covers
salt and adapter. Ids are hashed as little-endian int32, so keys are equal in every process.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from kvmem.errors import SpecError
from kvmem.events.digests import ExtraKey, Key, encode_key, key_marks, placed, tag_of_block
from kvmem.spec import CacheSpec

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["KEY_BYTES", "BlockKeys", "Identity", "slot_key"]

KEY_BYTES: Final = 32


@dataclass(frozen=True)
class Identity:
    """What the bytes of a cache depend on besides its tokens.

    model: names the weights, their revision too. rope: how positions are encoded, if the model's name does not say.
    rank, ranks: of a tensor-parallel group, each of which stores its own shard.
    """

    model: str
    rope: str = ""
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise SpecError(
                f"model: got {self.model!r}; name the weights and their revision, so that no other model finds them"
            )
        if not isinstance(self.rope, str):
            raise SpecError(f"rope: got {self.rope!r}; must be a text")
        if not (isinstance(self.rank, int) and isinstance(self.ranks, int) and 0 <= self.rank < self.ranks):
            raise SpecError(f"rank: got {self.rank!r} of {self.ranks!r} ranks; must be from 0 to ranks - 1")

    def fingerprint(self, spec: CacheSpec) -> bytes:
        """Return 32 bytes that differ wherever spec, model, RoPE, rank or the number of ranks differ."""
        parts = (spec.fingerprint, self.model, self.rope, self.rank, self.ranks)
        return hashlib.sha256(b"kvmem cache 1" + encode_key(parts)).digest()


class BlockKeys:
    """Computes the keys of blocks.

    fingerprint: ``Identity.fingerprint``. block_size: tokens of a block.
    """

    def __init__(self, fingerprint: bytes, block_size: int) -> None:
        self.block_size = block_size
        self._root = hashlib.sha256(b"kvmem root 1" + fingerprint)
        self._chunk = hashlib.sha256(b"kvmem chunk 1" + fingerprint)

    def root(self, salt: Key, adapter: Key) -> bytes:
        """Return the digest from which all chains of this salt and adapter start."""
        state = self._root.copy()
        state.update(encode_key(salt) + encode_key(adapter))
        return state.digest()

    def block(self, before: bytes, tokens: bytes | memoryview, tag: bytes = b"") -> bytes:
        """Return the digest of a block. before: that of the block before it, or the root's. tokens: its ids as
        little-endian int32. tag: the extra keys that begin in it.
        """
        return hashlib.sha256(b"".join((before, tokens, tag))).digest()

    def chain(
        self,
        tokens: npt.ArrayLike,
        *,
        salt: Key = None,
        extra_key: ExtraKey = None,
        adapter: Key = None,
        marks: list[tuple[int, bytes]] | None = None,
    ) -> list[bytes]:
        """Return the digests of the full blocks of ``tokens``, the first block's first. Cost: a microsecond a block.

        marks: instead of ``extra_key``, if the prompt goes on behind ``tokens``: as ``placed()`` returns them.
        """
        ids = np.ascontiguousarray(tokens, "<i4")
        if marks is None:
            marks = placed(key_marks(extra_key), ids)
        size, before, data = self.block_size, self.root(salt, adapter), ids.data.cast("B")
        found, block = [], self.block
        for at in range(0, len(ids) // size * size, size):
            before = block(before, data[4 * at : 4 * (at + size)], tag_of_block(marks, at, size) if marks else b"")
            found.append(before)
        return found

    def chunk(self, tokens: npt.ArrayLike, *, salt: Key = None, adapter: Key = None) -> bytes:
        """Return the key of a chunk of tokens wherever it stands in a prompt."""
        ids = np.ascontiguousarray(tokens, "<i4")
        state = self._chunk.copy()
        state.update(encode_key(salt) + encode_key(adapter) + ids.tobytes())
        return state.digest()


def slot_key(digest: bytes, group: int) -> bytes:
    """Return the key of one group's bytes of a block."""
    return hashlib.sha256(b"kvmem slot 1" + group.to_bytes(4, "little") + digest).digest()
