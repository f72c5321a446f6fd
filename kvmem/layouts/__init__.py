"""Caches that are not plain K and V: what a token stores, how it becomes K and V again, and attention over it.

``docs/layouts.md`` compares them.
"""

from kvmem.layouts.base import Layout
from kvmem.layouts.cache import Derived, LayoutCache
from kvmem.layouts.plain import PlainKV
from kvmem.layouts.reading import ByteRanges, TokenReader, read_set

__all__ = ["ByteRanges", "Derived", "Layout", "LayoutCache", "PlainKV", "TokenReader", "read_set"]
