"""Shares and times as people read them; sizes are in `kvmem.units`."""

from __future__ import annotations

__all__ = ["format_percent", "format_seconds", "format_us"]


def format_percent(share: float) -> str:
    """Two decimals, where fewer would hide what is small: 0.06 %, 21.87 %, but 574 %."""
    return f"{100 * share:.{0 if share >= 1 else 2}f} %"


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def format_us(microseconds: float) -> str:
    return f"{microseconds:,.0f}" if microseconds >= 100 else f"{microseconds:.3g}"
