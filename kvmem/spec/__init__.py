"""What one token stores, as pure data with exact integer arithmetic. No device, no tensor, no strides."""

from kvmem.spec.cache_spec import BlockOrder, CacheSpec, Group
from kvmem.spec.component import Component, Growth, Rope, Scope
from kvmem.spec.dtypes import dtype_name, parse_dtype

__all__ = ["BlockOrder", "CacheSpec", "Component", "Group", "Growth", "Rope", "Scope", "dtype_name", "parse_dtype"]
