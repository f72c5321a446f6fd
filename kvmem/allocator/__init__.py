"""The allocator and what it gives: sequences, batches, prefix matches, the form for schedulers, statistics, ops."""

from kvmem.allocator.allocator import Allocator
from kvmem.allocator.batch import Batch, GroupBatch
from kvmem.allocator.ops import Op
from kvmem.allocator.prefix import Pin, PrefixMatch
from kvmem.allocator.scheduler import SchedulerCache, TableChanges
from kvmem.allocator.sequence import LiveSequence, Sequence
from kvmem.allocator.stats import Stats

__all__ = [
    "Allocator",
    "Batch",
    "GroupBatch",
    "LiveSequence",
    "Op",
    "Pin",
    "PrefixMatch",
    "SchedulerCache",
    "Sequence",
    "Stats",
    "TableChanges",
]
