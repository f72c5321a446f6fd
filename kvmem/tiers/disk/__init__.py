"""Blocks on a local disk."""

from kvmem.tiers.disk.tier import DiskTier

__all__ = ["DiskTier"]
