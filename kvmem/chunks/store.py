"""A store of chunks by content, over any tiers: what was computed once is found again in every process that shares a
tier (Knowledge Delivery Network; LMCache's store and retrieve).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence as List
from typing import NamedTuple

import numpy as np

from kvmem.allocator import Allocator
from kvmem.allocator.prefix import Salt, Tokens, token_ids
from kvmem.allocator.sequence import Sequence
from kvmem.arguments import brief, check_size
from kvmem.chunks.chunk import Chunk, digest_before, export, import_, is_exact, sections_of
from kvmem.chunks.codecs import codec_named
from kvmem.chunks.folder import FolderTier
from kvmem.chunks.format import FRAME_BYTES, MOST_HEADER_BYTES, blob_of, chunk_in
from kvmem.errors import SpecError, TierError
from kvmem.events.digests import ExtraKey
from kvmem.spec import CacheSpec
from kvmem.tiers.base import Status, Tier
from kvmem.tiers.keys import BlockKeys, Identity

__all__ = ["ChunkStore", "Found"]


class Found(NamedTuple):
    """What a store has of a key: the chunk, or None and the reason, as a sentence."""

    chunk: Chunk | None
    reason: str = ""


class ChunkStore:
    """Chunks of ``chunk_tokens`` tokens under two kinds of keys: *chained* ones name a chunk and all tokens before it,
    for prefixes; *position-free* ones name the tokens alone, for ``compose``. Both cover spec, model, RoPE, rank, salt,
    adapter, chunk size and codec, so what differs in one of these is not found. A chunk that is found is right.

    tiers: a folder, a tier, or several, the fastest first: a chunk is put in all of them, and one that a slower tier
    has is put in the faster ones when it is found. Each keeps what it has room for. The caller closes tiers that it
    opened.
    codec: how chunks are stored, ``"none"``, ``"int8"``, ``"int4"`` or ``"cachegen"``. What comes back through a lossy
    one is not shared with other prompts.

    The last, incomplete chunk of a prompt is not stored: its key would change with each token, and a prompt that goes
    on would not find it.
    """

    def __init__(
        self, tiers: str | os.PathLike[str] | Tier | List[Tier], *, spec: CacheSpec, identity: Identity,
        chunk_tokens: int = 256, codec: str = "none",
    ) -> None:  # fmt: skip
        if isinstance(tiers, (str, os.PathLike)):
            tiers = FolderTier(tiers)
        self._tiers = [tiers] if isinstance(tiers, Tier) else list(tiers)
        if not self._tiers or not all(isinstance(tier, Tier) for tier in self._tiers):
            raise SpecError(f"tiers: got {brief(tiers)}; must be a folder, a Tier, or a list of at least one")
        self.chunk_tokens = check_size("chunk_tokens", chunk_tokens)
        self._spec, self._identity, self._codec = spec, identity, codec_named(codec).name
        root = identity.fingerprint(spec)
        if codec != "none":  # who asks for exact bytes never finds others
            root = hashlib.sha256(root + codec.encode()).digest()
        self._keys = BlockKeys(root, self.chunk_tokens)

    # --- chunks for composition ---

    def put(self, chunk: Chunk, *, salt: Salt = None, adapter: str | None = None) -> str:
        """Store a chunk under its position-free key; return ``""``, or why some tier does not have it now.

        A tier that has the key is not written. ``SpecError`` for a chunk of another spec or identity, for one that is
        not exact, and for one that was computed behind other tokens, on which its KV depends.
        """
        if not chunk.head.exact or chunk.head.before != digest_before(np.zeros(0, np.int32)):
            raise SpecError("chunk: is not exact or was computed behind other tokens; compute its tokens alone")
        return self._put(self._keys.chunk(chunk.head.tokens, salt=salt, adapter=adapter), chunk)

    def get(self, tokens: Tokens, *, salt: Salt = None, adapter: str | None = None) -> Found:
        """Return the chunk of these tokens, computed alone."""
        ids = token_ids(tokens)
        return self._get(self._keys.chunk(ids, salt=salt, adapter=adapter), ids)

    def _put(self, key: bytes, chunk: Chunk) -> str:
        if chunk.head.spec != self._spec or chunk.head.identity != self._identity:
            raise SpecError("chunk: is of another spec or identity than the store's")
        lacking = [tier for tier in self._tiers if not tier.contains([key])]
        blob = blob_of(chunk, codec=self._codec, extra={"key": key.hex()}) if lacking else memoryview(b"")
        results = [(tier.name, tier.put([key], [blob])[0]) for tier in lacking]
        return "; ".join(f"{name}: {result.reason}" for name, result in results if not result.ok)

    def _get(self, key: bytes, ids: np.ndarray) -> Found:
        parts = [part for section in sections_of(self._spec) for part in section]
        most = len(ids) * (4 + sum(part.token_bytes for part in parts)) + MOST_HEADER_BYTES + 2 * FRAME_BYTES
        buffer = memoryview(bytearray(most + (FRAME_BYTES + 9) * len(parts)))
        reasons = []
        for tier in self._tiers:
            result = tier.get([key], [buffer])[0]
            found = self._believed(key, ids, buffer[: result.num_bytes], tier.name) if result.ok else result.reason
            if isinstance(found, Chunk):
                for faster in self._tiers[: self._tiers.index(tier)]:
                    faster.put([key], [buffer[: result.num_bytes]])
                return Found(found)
            if result.status in (Status.OK, Status.CORRUPT):
                tier.delete([key])  # or it would keep a good one out
            reasons.append(f"{tier.name}: {found}")
        return Found(None, "; ".join(reasons))

    def _believed(self, key: bytes, ids: np.ndarray, blob: memoryview, name: str) -> Chunk | str:
        try:
            chunk, extra = chunk_in(blob, name, spec=self._spec, identity=self._identity)
        except TierError as error:
            return str(error)
        mine = extra == {"key": key.hex()} and np.array_equal(chunk.head.tokens, ids)
        return chunk if mine else "the chunk belongs to another key"

    # --- prefixes of prompts ---

    def store(
        self, alloc: Allocator, sequence: Sequence, tokens: Tokens, *, salt: Salt = None, adapter: str | None = None,
        extra_key: ExtraKey = None,
    ) -> int:  # fmt: skip
        """Store the complete chunks of a sequence's committed tokens under their chained keys; return how many tokens
        the first tier has of it then, from the start.

        tokens: the ids of the sequence, from its start on. salt, adapter, extra_key: as it was opened with. What all
        tiers have is not read from the device; what is approximate is not stored. REQUIRES and errors: as ``export``.
        """
        ids, size = token_ids(tokens), self.chunk_tokens
        complete = min(len(ids), sequence.num_committed_tokens) // size if is_exact(alloc, sequence) else 0
        keys = self._chain(ids, salt, adapter, extra_key)[:complete]
        for at in range(min(tier.contains(keys) for tier in self._tiers), len(keys)):
            first = at * size
            self._put(keys[at], export(alloc, sequence, ids, identity=self._identity, first=first, end=first + size))
        return self._tiers[0].contains(keys) * size

    def lookup(
        self, tokens: Tokens, *, salt: Salt = None, adapter: str | None = None, extra_key: ExtraKey = None
    ) -> int:
        """Return how many tokens of a prompt, from its start, some tier seems to have. ``retrieve`` may find fewer."""
        keys = self._chain(token_ids(tokens), salt, adapter, extra_key)
        count = 0
        while more := max(tier.contains(keys[count:]) for tier in self._tiers):
            count += more
        return count * self.chunk_tokens

    def retrieve(
        self, alloc: Allocator, sequence: Sequence, tokens: Tokens, *, salt: Salt = None, adapter: str | None = None,
        extra_key: ExtraKey = None,
    ) -> int:  # fmt: skip
        """Append to a sequence the chunks that the store has of ``tokens``, up to the first that is missing, and return
        how many tokens that added. At least one token is left to compute.

        tokens: the whole prompt, of which the sequence has the first ``num_committed_tokens``, such as those that it
        found cached. salt, adapter, extra_key: as it was opened with. ``OutOfMemory`` leaves the tokens that were
        appended before it.
        """
        ids, start, size = token_ids(tokens), sequence.num_committed_tokens, self.chunk_tokens
        keys = self._chain(ids, salt, adapter, extra_key)[: max(0, len(ids) - 1) // size]
        for at in range(start // size, len(keys)):
            begin, first = sequence.num_committed_tokens, at * size
            chunk = self._get(keys[at], ids[first : first + size]).chunk
            if chunk is None or chunk.head.position != first:
                break
            import_(alloc, sequence, chunk, prefix=ids[:begin], skip=begin - first)
        return sequence.num_committed_tokens - start

    def _chain(self, ids: np.ndarray, salt: Salt, adapter: str | None, extra_key: ExtraKey) -> list[bytes]:
        return self._keys.chain(ids, salt=salt, extra_key=extra_key, adapter=adapter)
