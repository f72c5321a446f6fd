"""Faults of a tier in the log: one line for each kind and minute, however many blocks it meets."""

from __future__ import annotations

import logging
import time

__all__ = ["FaultLog", "logger"]

logger = logging.getLogger("kvmem")

SECONDS = 60.0


class FaultLog:
    """Warns through ``logger``. Two threads at once may write two lines."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._next: dict[str, float] = {}  # when the next line of a kind may be written

    def warn(self, kind: str, message: str) -> None:
        """Write the message, unless one of this kind was written within the last minute."""
        now = time.monotonic()
        if now >= self._next.get(kind, 0.0):
            self._next[kind] = now + SECONDS
            logger.warning("%s: %s (further ones are not logged for a minute)", self._tier, message)
