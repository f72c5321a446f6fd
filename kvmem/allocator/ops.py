"""The records that join the deciding half to the acting half, as plain data.

An op is ``(kind, at, a, b, c, d)``: one name and five integers, so that a list of them goes through msgpack, JSON or a
pipe as it is. ``Allocator.take_ops()`` gives what was decided, ``Allocator.apply()`` follows it; ``csrc/base/ops.h``
says what the integers mean.

==========  =====================================================================================================
kind        meaning of (at; a, b, c, d)
==========  =====================================================================================================
create      a: first page, b: count. Physical pages come into being.
destroy     a: first page, b: count. They go back to the system.
map         at: arena; a: first slot, b: first page, c: count. Slot a+i shows page b+i.
unmap       at: arena; a: first slot, b: first page, c: count, d: the fence to wait for.
zero        at: arena; a: offset in bytes, b: bytes.
copy        at: arena; a: to offset, b: from offset, c: bytes.
fence       a: number. Marks what the device has been given so far.
open        a: sequence handle.
close       a: sequence handle.
bind        a: sequence handle, b: row (virtual backend).
unbind      a: sequence handle, b: row.
length      at: group; a: sequence handle, b: tokens, c: tokens before.
commit      at: group; a: sequence handle, b: committed tokens, c: before.
front       at: group; a: sequence handle, b: first token still held, c: before.
block       at: group; a: sequence handle, b: ordinal, c: block, d: block before; 0 is none (paged backend).
==========  =====================================================================================================
"""

from __future__ import annotations

__all__ = ["KINDS", "PHYSICAL", "Op"]

Op = tuple[str, int, int, int, int, int]

#: What the acting half executes on a device ...
PHYSICAL = ("create", "destroy", "map", "unmap", "zero", "copy", "fence")
#: ... and every kind there is.
KINDS = (*PHYSICAL, "open", "close", "bind", "unbind", "length", "commit", "front", "block")
