"""Where each byte of a token lies in a block, how blocks lie in memory, and the tensors that show them."""

from kvmem.geometry.group_layout import GroupLayout, Interleave, Slice, resolve_interleave
from kvmem.geometry.views import CacheTensor, plain

__all__ = ["CacheTensor", "GroupLayout", "Interleave", "Slice", "plain", "resolve_interleave"]
