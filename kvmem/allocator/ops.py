"""The ops: records of what an allocator decided, as plain data, for execution elsewhere.

An op is ``(kind, at, a, b, c, d)``, one name and five integers, so that msgpack, JSON or a pipe can carry a list of ops
unchanged. ``Allocator.take_ops()`` returns ops, ``Allocator.apply()`` executes them. ``FIELDS`` says what the integers
of each kind mean; an integer that it does not name is 0::

    for kind, fields in kvmem.allocator.ops.FIELDS.items():
        print(kind, fields)

A list that is not empty begins with ``HEADER``, the version of its format. ``apply()`` refuses a list of another
version, or without a header. Several lists may be concatenated, each with its header.

``load`` and ``store`` move bytes between an arena and a tier behind the device. No allocator decides or executes them
yet: ``apply()`` refuses them with a ``SpecError``.
"""

from __future__ import annotations

from kvmem import _core

__all__ = ["FIELDS", "HEADER", "KINDS", "PHYSICAL", "Op"]

#: One record: ``(kind, at, a, b, c, d)``.
Op = tuple[str, int, int, int, int, int]

_ROWS = _core.op_kinds()
#: By kind, the meaning of its integers.
FIELDS = {name: fields for name, _, fields in _ROWS}
#: Every kind.
KINDS = tuple(FIELDS)
#: The kinds that are executed on a device.
PHYSICAL = tuple(name for name, is_physical, _ in _ROWS if is_physical)
#: The first record of every list.
HEADER: Op = _core.ops_header()
