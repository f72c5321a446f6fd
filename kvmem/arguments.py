"""All checks of arguments: integers, names, byte sizes as text, int32 arrays. No value is rounded, wrapped or converted
silently: what a check refuses is a ``SpecError`` that names the field and the value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch

from kvmem.errors import SpecError

if TYPE_CHECKING:
    import numpy.typing as npt

    Handles = npt.NDArray[np.int32]

_T = TypeVar("_T")

INT32_MAX: Final = 2**31 - 1  # ids, lengths and what kernels count are int32
INT64_MAX: Final = 2**63 - 1  # addresses and sizes are int64 in the native module
MAX_LAYERS: Final = 65_536  # far above any model: a larger number is a mistake, and each layer costs memory


def check_size(field: str, value: object, least: int = 1, most: int = INT64_MAX) -> int:
    """Return ``value``, an int or a NumPy integer, as an int; ``SpecError`` unless it is from ``least`` to ``most``.

    A bool or a float is refused, because it is a mistake of the caller.
    """
    if type(value) is int and least <= value <= most:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise SpecError(f"{field}: got {brief(value)}; must be an integer of at least {least}")
    if int(value) > most:
        raise SpecError(f"{field}: got {brief(int(value))}; the largest that works is {most}")
    return int(value)


def check_count(field: str, value: int) -> int:
    """Return ``value`` as an int, which must fit an int32. The core checks it against the allocator's state."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
        raise SpecError(f"{field}: got {brief(value)}; must be an integer")
    if not -(2**31) <= value < 2**31:
        raise SpecError(f"{field}: got {brief(value)}; must fit an int32")
    return int(value)


def check_group(field: str, value: int, count: int) -> int:
    """Return ``value`` as the index of one of ``count`` groups."""
    index = check_size(field, value, 0)
    if index >= count:
        raise SpecError(f"{field}: got {index}; the spec has {count}, of which the last is {count - 1}")
    return index


def check_seconds(field: str, value: float) -> float:
    """Return a time in seconds, which must be above 0, as a float; ``inf`` is allowed."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not value > 0:
        raise SpecError(f"{field}: got {value!r}; must be a time in seconds, above 0")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_number(field: str, value: object, *, above: float = -math.inf, most: float = 1e300) -> float:
    """Return a number, which must be above ``above`` and at most ``most``, as a float. NaN is no number."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not above < value <= most:  # type: ignore[operator]
        must = "a number" + f" above {above:g}" * (above > -math.inf) + f", {most:g} at most" * (most < math.inf)
        raise SpecError(f"{field}: got {brief(value)}; must be {must}")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:  # an int, where infinity is allowed
        return math.inf


def check_sizes(field: str, value: object, depth: int) -> Any:
    """Return a size, or up to ``depth`` levels of non-empty tuples of sizes.

    All entries of a level must be of the same kind: sizes, or tuples.
    """
    if depth == 0 or not isinstance(value, (tuple, list)):
        return check_size(field, value)
    if not value:
        raise SpecError(f"{field}: got {value!r}; a per-layer tuple needs at least one entry")
    entries = tuple(check_sizes(f"{field}[{i}]", entry, depth - 1) for i, entry in enumerate(value))
    if len({isinstance(entry, tuple) for entry in entries}) > 1:
        raise SpecError(
            f"{field}: got {brief(value)}; give widths per layer, or per layer and head group, not a mixture"
        )
    return entries


def check_bool(field: str, value: bool) -> bool:
    """Return ``value``, which must be a bool."""
    if not isinstance(value, bool):
        raise SpecError(f"{field}: got {brief(value)}; must be True or False")
    return value


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``SpecError`` unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise SpecError(f"{field}: got {brief(value)}; must be one of {', '.join(choices)}")


def check_name(field: str, value: object) -> None:
    """Raise ``SpecError`` unless ``value`` is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise SpecError(f"{field}: got {brief(value)}; must be a non-empty string")


def check_members(field: str, value: object, kind: type[_T]) -> tuple[_T, ...]:
    """Return a tuple or list of at least one ``kind`` as a tuple."""
    if not isinstance(value, (tuple, list)) or not value or not all(isinstance(item, kind) for item in value):
        raise SpecError(f"{field}: got {brief(value)}; needs a sequence of at least one {kind.__name__}")
    return tuple(value)


def check_layers(field: str, value: object) -> tuple[int, ...]:
    """Return layer numbers as a tuple; they must ascend."""
    if not isinstance(value, (tuple, list, range)) or not 0 < len(value) <= MAX_LAYERS:
        raise SpecError(f"{field}: got {brief(value)}; needs 1 to {MAX_LAYERS} layer numbers")
    for layer in value:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= int(layer) < MAX_LAYERS:
            raise SpecError(f"{field}: got {brief(layer)}; a layer number is an integer from 0 to {MAX_LAYERS - 1}")
    layers = tuple(int(layer) for layer in value)
    if any(a >= b for a, b in pairwise(layers)):
        raise SpecError(f"{field}: got {brief(layers)}; must ascend with no repeats")
    return layers


def check_unique(field: str, names: Sequence[str]) -> None:
    """Raise ``SpecError`` for a name that occurs twice."""
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"{field}: got {name!r} {names.count(name)} times; names must differ")


def as_int32(
    field: str, given: Sequence[Any] | Handles | torch.Tensor, number_of: Callable[[str, Any], int] | None = None
) -> Handles:
    """Return integers as a contiguous int32 array [n]; ``SpecError`` for values that would be rounded or wrapped.

    number_of: converts an entry that is not an integer, given the field and the entry. It is called only for arrays of
        objects, so that arrays of integers cost nothing extra.
    """
    if isinstance(given, torch.Tensor) and given.device.type != "cpu":
        raise SpecError(
            f"{field}: got a tensor on {given.device}; {field} is read on the CPU: pass a copy that is there, or "
            ".cpu(), which waits for the device"
        )
    try:
        values = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{field}: got {_shape(given)}; must be a flat list or array of integers") from error
    if number_of is not None and values.ndim == 1 and values.dtype.kind == "O":
        given = [number_of(field, one) for one in values]
        values = np.asarray(given)
    if values.ndim != 1:
        raise SpecError(f"{field}: got {_shape(given)}, of shape {values.shape}; must be one int32 for each sequence")
    if values.size and (values.dtype.kind not in "iu" or has_bool(given)):
        raise SpecError(f"{field}: got {_shape(given)}, of {values.dtype}; must be one int32 for each sequence")
    if values.size and (values.min() < -(2**31) or values.max() >= 2**31):
        least, most = brief(values.min()), brief(values.max())
        raise SpecError(f"{field}: got numbers from {least} to {most}; each must fit an int32")
    return np.ascontiguousarray(values, np.int32)


def has_bool(given: object) -> bool:
    """Return whether a list holds a bool, which NumPy would silently convert to an integer."""
    return isinstance(given, (list, tuple)) and any(isinstance(one, bool) for one in given)


def _shape(given: object) -> str:
    if isinstance(given, (np.ndarray, torch.Tensor)):
        return f"{type(given).__name__} {list(given.shape)}"
    return brief(given)


_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate("KMGTP")}
_UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGTP")}
_UNITS |= {letter: 1024 ** (i + 1) for i, letter in enumerate("KMGTP")}


def parse_bytes(field: str, value: int | str) -> int:
    """Return a number of bytes from an integer or a text; ``SpecError`` for anything else.

    ``"20GiB"`` and ``"20G"`` are binary, as in Linux tools (``dd``, ``truncate``, systemd); ``"500MB"`` is decimal.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 0:
        return check_size(field, value, 0)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value) if isinstance(value, str) else None
    unit = None if match is None else _UNITS.get(match.group(2))
    if match is None or unit is None:
        raise SpecError(
            f'{field}: got {brief(value)}; must be bytes as an int, or a text such as "20GiB", "20G" or "500MB"'
        )
    number = match.group(1)
    if "." in number and not match.group(2):
        raise SpecError(
            f"{field}: got {value!r}, a text without a unit; write one ('{number}GiB'), or a fraction as a float (0.9)"
        )
    if len(number) > 20:  # longer than any size in bytes; int() refuses texts of some thousand digits
        raise SpecError(f"{field}: got a number of {len(number)} digits; must be below 2**63 bytes")
    return check_size(field, int(float(number) * unit) if "." in number else int(number) * unit, 0)


def is_auto(value: object) -> bool:
    """Return whether ``value`` is the text ``"auto"``; an array is not compared entry by entry."""
    return isinstance(value, str) and value == "auto"


def is_fraction(field: str, value: object) -> bool:
    """Return whether ``value`` is a float, i.e. a fraction of a total; ``SpecError`` unless above 0 and at most 1."""
    if not isinstance(value, (float, np.floating)):
        return False
    if not 0 < value <= 1:
        raise SpecError(f"{field}: got {value!r}; a float is a fraction, above 0 and at most 1: give bytes as an int")
    return True


def format_bytes(count: int) -> str:
    """Return a size as text with a binary unit and three significant digits: ``1536`` as ``"1.5 KiB"``."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(size) < 1024 or unit == "PiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}"


def brief(value: object) -> str:
    """Return a value as a text for a message: components by name, long texts shortened."""
    if isinstance(value, int) and abs(value) >= 2**64:  # str() refuses integers of some thousand digits
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (tuple, list)) and value:
        names = [name for item in value if isinstance(name := getattr(item, "name", None), str)]  # a tensor's is None
        if len(names) == len(value):
            return ", ".join(names)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
