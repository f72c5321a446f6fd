"""Physical memory: devices by name, the pool of pages that allocators share, and streams."""

from kvmem.memory.device import Device, open_device
from kvmem.memory.pool import PagePool
from kvmem.memory.streams import Streams

__all__ = ["Device", "PagePool", "Streams", "open_device"]
