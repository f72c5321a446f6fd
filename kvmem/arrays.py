"""Integers and int32 arrays from a caller: checked, never rounded, wrapped or converted behind their back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvmem.errors import SpecError

if TYPE_CHECKING:
    import numpy.typing as npt

    Handles = npt.NDArray[np.int32]

__all__ = ["as_int32", "at_least_zero", "check_bool", "check_count", "check_most", "check_seconds", "has_bool"]


def at_least_zero(field: str, value: int) -> int:
    """``value`` as an int, 0 or more, that fits 64 bits; ``SpecError`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise SpecError(f"{field}: got {value!r}; must be an int, 0 or more")
    return check_most(field, int(value), 2**63 - 1)


def check_most(field: str, value: int, most: int) -> int:
    if value > most:
        shown = value if value < 2**64 else f"a number of {value.bit_length()} bits"  # str() of some is an error
        raise SpecError(f"{field}: got {shown}; the largest that works is {most}")
    return value


def check_bool(field: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{field}: got {value!r}; must be True or False")
    return value


def check_count(field: str, value: int) -> int:
    """An int32 for the core, which itself refuses what is negative or too much, with what there is."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
        raise SpecError(f"{field}: got {value!r}; must be an integer")
    if not -(2**31) <= value < 2**31:
        raise SpecError(f"{field}: got {value}; must fit an int32")
    return int(value)


def check_seconds(field: str, value: float) -> float:
    """A time in seconds, above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not value > 0:
        raise SpecError(f"{field}: got {value!r}; must be a time in seconds, above 0")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_int32(field: str, given: Sequence[int] | Handles | torch.Tensor) -> Handles:
    """Integers as int32 [n], contiguous; ``SpecError`` for what would become that only by rounding or wrapping."""
    if isinstance(given, torch.Tensor) and given.device.type != "cpu":
        raise SpecError(
            f"{field}: got a tensor on {given.device}; calls that decide read {field} on the CPU: keep a copy there, "
            "or give .cpu(), which waits for the device"
        )
    try:
        values = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{field}: got {_short(given)}; must be a flat list or array of integers") from error
    if values.ndim != 1:
        raise SpecError(f"{field}: got {_short(given)}, of shape {values.shape}; must be one int32 for each sequence")
    if values.size and (values.dtype.kind not in "iu" or has_bool(given)):
        raise SpecError(f"{field}: got {_short(given)}, of {values.dtype}; must be one int32 for each sequence")
    if values.size and (values.min() < -(2**31) or values.max() >= 2**31):
        raise SpecError(f"{field}: got numbers from {values.min()} to {values.max()}; each must fit an int32")
    return np.ascontiguousarray(values, np.int32)


def has_bool(given: object) -> bool:
    """Whether a list holds a bool, which numpy makes an int of among ints."""
    return isinstance(given, (list, tuple)) and any(isinstance(one, bool) for one in given)


def _short(given: object) -> str:
    if isinstance(given, (np.ndarray, torch.Tensor)):
        return f"{type(given).__name__} {list(given.shape)}"
    shown = repr(given)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
