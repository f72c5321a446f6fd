"""Integers and int32 arrays from a caller: checked, never rounded, wrapped or converted behind their back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kvmem.errors import SpecError

if TYPE_CHECKING:
    import numpy.typing as npt

    Handles = npt.NDArray[np.int32]

__all__ = ["as_int32", "at_least_zero", "check_bool", "check_count", "check_most", "check_seconds", "not_int32"]


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


def as_int32(field: str, given: Sequence[int] | Handles) -> Handles:
    """Integers as int32 [n]; ``SpecError`` for what would only become that by rounding or wrapping round."""
    values = np.asarray(given)
    fits = values.size == 0 or (values.dtype.kind in "iu" and values.min() >= -(2**31) and values.max() < 2**31)
    if values.ndim != 1 or not fits:
        raise SpecError(f"{field}: got {given!r}; must be one int32 for each sequence")
    return np.ascontiguousarray(values, np.int32)


def not_int32(*arrays: object) -> SpecError:
    """The error for arrays that the core did not take."""
    got = " and ".join(f"{a.dtype} {list(a.shape)}" if isinstance(a, np.ndarray) else repr(a) for a in arrays)
    return SpecError(f"got {got}; batched calls take contiguous int32 [n] buffers (numpy, torch on the CPU)")
