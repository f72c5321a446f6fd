"""Attention where the bytes are: in host memory, and beside a disk (``docs/near.md``)."""

from kvmem.near.base import Near, Part, Traffic, merge
from kvmem.near.disk import DiskAttention
from kvmem.near.host import HostAttention
from kvmem.near.near_store import NearStore
from kvmem.near.shards import HeadShards
from kvmem.near.sparse import SparF

__all__ = ["DiskAttention", "HeadShards", "HostAttention", "Near", "NearStore", "Part", "SparF", "Traffic", "merge"]
