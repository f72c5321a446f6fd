"""The element types that a cache may hold."""

from __future__ import annotations

from typing import Final

import torch

from kvmem.arguments import brief
from kvmem.errors import SpecError

# With the exponent bits of floating-point types, because the first bit plane must hold a whole exponent.
EXPONENT_BITS: Final[dict[str, int]] = {
    "float64": 11, "float32": 8, "bfloat16": 8, "float16": 5,
    "float8_e4m3fn": 4, "float8_e4m3fnuz": 4, "float8_e5m2": 5, "float8_e5m2fnuz": 5,
    "int64": 0, "int32": 0, "int16": 0, "int8": 0, "uint8": 0,
}  # fmt: skip
_DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in EXPONENT_BITS}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_ALIASES: Final = {
    "half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32",
    "double": "float64",
    "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2",
}  # fmt: skip


def parse_dtype(value: torch.dtype | str, field: str = "dtype") -> torch.dtype:
    """Return ``torch.bfloat16`` for ``torch.bfloat16``, ``"torch.bfloat16"``, ``"bfloat16"`` or ``"bf16"``.

    ``SpecError`` for types that a cache cannot hold.
    """
    if isinstance(value, torch.dtype) and value in _NAMES:
        return value
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        if (name := _ALIASES.get(name, name)) in _DTYPES:
            return _DTYPES[name]
    raise SpecError(f"{field}: got {brief(value)}; a cache holds one of {', '.join(_DTYPES)}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type that a cache may hold, without ``torch.``, as ``CacheSpec.to_dict`` writes it."""
    return _NAMES[dtype]
