"""kvmem: a memory manager for the KV caches of language models. One allocator, two page tables."""

from kvmem.allocator import Allocator
from kvmem.batch import Batch
from kvmem.errors import DeviceError, KVMemError, OutOfMemory, SpecError, StaleHandle, TierError
from kvmem.pool import PagePool
from kvmem.prefix import Pin, PrefixMatch
from kvmem.scheduler import SchedulerCache, TableChanges
from kvmem.sequence import LiveSequence, Sequence
from kvmem.spec import CacheSpec, Component, Group
from kvmem.stats import Stats

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
