"""Faults of a tier in the log: one line for each kind and minute, however many blocks it meets."""

from __future__ import annotations

import logging
import time
from typing import ClassVar

__all__ = ["FaultLog"]

SECONDS = 60.0


class FaultLog:
    """Warns through the logger ``"kvmem"``. Two threads at once may write two lines."""

    _next: ClassVar[dict[tuple[str, str], float]] = {}  # when the next line of a tier and kind may be written

    def __init__(self, tier: str) -> None:
        self._tier = tier

    def warn(self, kind: str, message: str) -> None:
        """Write the message, unless one of this kind was written within the last minute."""
        now = time.monotonic()
        if now >= self._next.get((self._tier, kind), 0.0):
            self._next[self._tier, kind] = now + SECONDS
            logging.getLogger("kvmem").warning("%s: %s (further ones are not logged for a minute)", self._tier, message)
