"""KV cache events: which blocks an allocator has cached, in the form that request routers read."""

from kvmem.events.digests import DIGEST_BYTES, ChainDigest, ExtraKey, Key, block_digests
from kvmem.events.stream import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    EventBatch,
    EventStream,
    group_kind,
    to_wire,
)

__all__ = [
    "DIGEST_BYTES",
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "ChainDigest",
    "Event",
    "EventBatch",
    "EventStream",
    "ExtraKey",
    "Key",
    "block_digests",
    "group_kind",
    "to_wire",
]
