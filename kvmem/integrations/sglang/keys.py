"""Keys of SGLang's pages in kvmem's tiers.

SGLang names a page by a SHA-256 over its namespace (cache salt, extra key and LoRA adapter) and all tokens up to the
page's end. What else its bytes depend on is in the fingerprint: model, weights, data type, layout, page size and rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass

from kvmem.errors import SpecError

__all__ = ["PageKeys", "Rank", "fingerprint"]


@dataclass(frozen=True)
class Rank:
    """Which shard of the model's KV a process holds: tensor, pipeline and context parallel rank, each of so many."""

    tensor: int = 0
    tensors: int = 1
    pipeline: int = 0
    pipelines: int = 1
    context: int = 0
    contexts: int = 1

    def shared(self) -> Rank:
        """Return the rank of KV that all tensor-parallel ranks hold alike, such as latent (MLA) KV."""
        return Rank(0, 1, *astuple(self)[2:])

    def __str__(self) -> str:
        return "tp{}of{}-pp{}of{}-cp{}of{}".format(*astuple(self))


def fingerprint(*parts: object) -> bytes:
    """Return 32 bytes over ``parts``, which JSON can write; equal parts give equal bytes in every process."""
    return hashlib.sha256(b"kvmem sglang 1" + json.dumps(parts, sort_keys=True).encode()).digest()


class PageKeys:
    """Computes the keys of pages.

    identity: ``fingerprint`` of what the bytes of all pools depend on. ranks: the shard of each pool, by name.
    version: of the weights, asked at each call, because SGLang can replace them while it runs.
    """

    def __init__(self, identity: bytes, ranks: dict[str, Rank], version: Callable[[], str]) -> None:
        self._identity, self._ranks, self._version = identity, ranks, version

    def of(self, pool: str, pages: Iterable[str]) -> list[bytes]:
        """Return the keys of a pool's pages, 32 bytes each. pages: SGLang's hashes. Cost: a microsecond a page."""
        if pool not in self._ranks:
            raise SpecError(f"pool: got {pool!r}; SGLang registered {sorted(self._ranks)}")
        root = fingerprint(self._identity.hex(), str(pool), str(self._ranks[pool]), self._version())
        return [hashlib.sha256(root + page.encode()).digest() for page in pages]
