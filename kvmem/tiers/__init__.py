"""Where blocks live behind the device: host memory, disk, remote stores. A tier's answer is right, or it is a miss."""

from kvmem.tiers.base import Capacity, Result, Status, Tier
from kvmem.tiers.config import Tiers
from kvmem.tiers.keys import Identity
from kvmem.tiers.slot_form import largest_block_bytes

__all__ = ["Capacity", "Identity", "Result", "Status", "Tier", "Tiers", "largest_block_bytes"]
