"""Sizes as people write them."""

from __future__ import annotations

import re

import numpy as np

from kvmem.arrays import check_most
from kvmem.errors import SpecError

__all__ = ["format_bytes", "is_fraction", "parse_bytes"]

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGTP")}
_UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGTP")}
_UNITS |= {letter: 1024 ** (i + 1) for i, letter in enumerate("KMGTP")}


def parse_bytes(field: str, value: int | str) -> int:
    """Bytes from an integer, or a text: ``"20GiB"``; ``"20G"``, which is the same, as Linux tools have it (``dd``,
    ``truncate``, systemd); ``"500MB"``, which is decimal. ``SpecError`` otherwise.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0:
        return check_most(field, int(value), 2**63 - 1)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    unit = None if match is None else _UNITS.get(match.group(2))
    if match is None or unit is None:
        raise SpecError(f'{field}: got {value!r}; must be bytes as an int, or a text such as "20GiB", "20G" or "500MB"')
    number = match.group(1)
    if "." in number and not match.group(2):
        raise SpecError(
            f"{field}: got {value!r}, a text without a unit; write one ('{number}GiB'), or a part of what there is as "
            "a float (0.9)"
        )
    if len(number) > 20:  # more digits than any size of bytes has, and int() reads a few thousand at most
        raise SpecError(f"{field}: got a number of {len(number)} digits; must be below 2**63 bytes")
    return check_most(field, int(float(number) * unit) if "." in number else int(number) * unit, 2**63 - 1)


def is_fraction(field: str, value: object) -> bool:
    """Whether ``value`` is a float, that is a part of what there is. ``SpecError`` unless above 0 and at most 1."""
    if not isinstance(value, (float, np.floating)):
        return False
    if not 0 < value <= 1:
        raise SpecError(f"{field}: got {value!r}; a float is a fraction, above 0 and at most 1: give bytes as an int")
    return True


def format_bytes(count: int) -> str:
    """``1536`` as ``"1.5 KiB"``: three significant digits, binary units."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(size) < 1024 or unit == "PiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"
