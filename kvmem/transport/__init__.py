"""Blocks between processes and machines: memory that others read, and the tiers on both of its ends."""

from kvmem.transport.base import Remote, Transport
from kvmem.transport.exposed import ExposedTier
from kvmem.transport.peer import PeerTier

__all__ = ["ExposedTier", "PeerTier", "Remote", "Transport"]
