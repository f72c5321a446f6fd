"""The records that join the deciding half to the acting half, as plain data.

An op is ``(kind, at, a, b, c, d)``: one name and five integers, so that a list of them goes through msgpack, JSON or a
pipe as it is. ``Allocator.take_ops()`` returns what was decided, ``Allocator.apply()`` follows it. ``FIELDS`` says what
the integers of each kind mean; those that it does not name are 0::

    for kind, fields in kvmem.allocator.ops.FIELDS.items():
        print(kind, fields)

A list that is not empty begins with ``HEADER``, the version of the form that it has. ``apply()`` refuses a list of
another version, and one that begins with anything else; lists may be put together to one, each with its header.

``load`` and ``store`` move bytes between an arena and a tier behind the device. They have a form already, and nobody
decides or executes them yet: ``apply()`` refuses them with a ``SpecError``.
"""

from __future__ import annotations

from kvmem import _core

__all__ = ["FIELDS", "HEADER", "KINDS", "PHYSICAL", "Op"]

Op = tuple[str, int, int, int, int, int]

_ROWS = _core.op_kinds()
#: What the integers of each kind mean ...
FIELDS = {name: fields for name, _, fields in _ROWS}
#: ... every kind there is ...
KINDS = tuple(FIELDS)
#: ... and those that the acting half executes on a device.
PHYSICAL = tuple(name for name, is_physical, _ in _ROWS if is_physical)
#: What every list begins with.
HEADER: Op = _core.ops_header()
