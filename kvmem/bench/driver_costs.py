"""What a GPU driver's calls cost, so that counted calls become seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmem.bench.pools import Totals

__all__ = ["PUBLISHED", "CallCosts", "DriverCosts"]


@dataclass(frozen=True)
class CallCosts:
    """Microseconds of one call: ``map`` of a page, ``set_access`` and ``unmap`` of a run of pages."""

    page_bytes: int
    map_us: float
    set_access_us: float
    unmap_us: float


@dataclass(frozen=True)
class DriverCosts:
    """Call costs at two page sizes of one device; between and beyond them a line through both."""

    device: str
    source: str
    small: CallCosts
    large: CallCosts

    def at(self, page_bytes: int) -> CallCosts:
        share = (page_bytes - self.small.page_bytes) / (self.large.page_bytes - self.small.page_bytes)

        def between(small: float, large: float) -> float:
            return max(0.0, small + share * (large - small))

        return CallCosts(
            page_bytes,
            between(self.small.map_us, self.large.map_us),
            between(self.small.set_access_us, self.large.set_access_us),
            between(self.small.unmap_us, self.large.unmap_us),
        )

    def seconds(self, calls: Totals, page_bytes: int) -> float:
        """Of all maps, accesses and unmaps; what is created and reserved once at start is left out."""
        one = self.at(page_bytes)
        us = calls.map * one.map_us + calls.set_access * one.set_access_us + calls.unmap * one.unmap_us
        return us / 1e6


#: kvcached's pull request #331 (nsys, H100): total time over calls, 100 calls for the large size. Not measured here.
PUBLISHED = DriverCosts(
    "H100",
    "kvcached PR #331",
    CallCosts(2 << 20, 3.3, 60.0, 42.0),
    CallCosts(112 << 20, 5.0, 80.0, 60.0),
)
