"""kvmem: a memory manager for the KV caches of language models. One allocator, two page tables."""

from kvmem.allocator import Allocator
from kvmem.allocator.batch import Batch
from kvmem.allocator.prefix import Pin, PrefixMatch
from kvmem.allocator.scheduler import SchedulerCache, TableChanges
from kvmem.allocator.sequence import LiveSequence, Sequence
from kvmem.allocator.stats import Stats
from kvmem.errors import DeviceError, KVMemError, NotReady, OutOfMemory, SpecError, StaleHandle, TierError
from kvmem.memory.pool import PagePool
from kvmem.spec import CacheSpec, Component, Group

__version__ = "0.1.0"

__all__ = [
    "Allocator",
    "Batch",
    "CacheSpec",
    "Component",
    "DeviceError",
    "Group",
    "KVMemError",
    "LiveSequence",
    "NotReady",
    "OutOfMemory",
    "PagePool",
    "Pin",
    "PrefixMatch",
    "SchedulerCache",
    "Sequence",
    "SpecError",
    "StaleHandle",
    "Stats",
    "TableChanges",
    "TierError",
]
