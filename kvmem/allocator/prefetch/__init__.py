"""Prefetching: what attention will read, in order; windows of a plan; and the calls that bring their bytes closer."""

from kvmem.allocator.prefetch.block_sets import BlockSet
from kvmem.allocator.prefetch.calls import Prefetching, Window
from kvmem.allocator.prefetch.ranges import Ranges
from kvmem.allocator.prefetch.read_sets import ReadSet

__all__ = ["BlockSet", "Prefetching", "Ranges", "ReadSet", "Window"]
