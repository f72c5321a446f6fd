"""Sizes, shares and times as people write and read them."""

from __future__ import annotations

import re

from kvmem.bench.errors import BenchError

__all__ = ["format_bytes", "format_percent", "format_seconds", "parse_bytes"]

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
          "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip


def parse_bytes(text: str, what: str) -> int:
    """``80GiB``, ``24GB``, ``2097152``. Raises `BenchError` that names ``what`` was asked."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    scale = _UNITS.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise BenchError(f"{what} is {text!r}; expected a number of bytes with a unit, such as 80GiB, 512MiB or 24GB")
    return int(float(match[1]) * scale)


def format_bytes(size: float) -> str:
    """Three significant figures in the largest binary unit below ``size``."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(size) >= scale:
            value = size / scale
            return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {unit}"
    return f"{size:.0f} B"


def format_percent(share: float) -> str:
    """Two decimals, where one would hide what is small: 0.06 %, 21.87 %."""
    return f"{100 * share:.2f} %"


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
