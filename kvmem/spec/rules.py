"""What a spec refuses, and why: checks of single fields, element types, and the layouts that do not go together.

Used by the ``spec`` and ``model_config`` modules. Every refusal is a ``SpecError`` that names the field and the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch

from kvmem.errors import SpecError

if TYPE_CHECKING:
    from kvmem.spec import Component, Group

_T = TypeVar("_T")

BYTES_LIMIT: Final = 2**63  # addresses and sizes are int64 in the native half
MAX_LAYERS: Final = 65_536  # far above any model: a larger number is a mistake, and would build a tuple of that length

# Element types a cache may hold, with the exponent bits of the floating ones (bit planes must not cut an exponent).
_EXPONENT_BITS: Final[dict[str, int]] = {
    "float64": 11, "float32": 8, "bfloat16": 8, "float16": 5,
    "float8_e4m3fn": 4, "float8_e4m3fnuz": 4, "float8_e5m2": 5, "float8_e5m2fnuz": 5,
    "int64": 0, "int32": 0, "int16": 0, "int8": 0, "uint8": 0,
}  # fmt: skip
_DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in _EXPONENT_BITS}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_ALIASES: Final = {
    "half": "float16", "fp16": "float16", "bf16": "bfloat16", "float": "float32", "fp32": "float32",
    "double": "float64",
    "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2",
}  # fmt: skip


def parse_dtype(value: torch.dtype | str, field: str = "dtype") -> torch.dtype:
    """``torch.bfloat16``, ``"torch.bfloat16"``, ``"bfloat16"`` or ``"bf16"`` as a ``torch.dtype``."""
    if isinstance(value, torch.dtype) and value in _NAMES:
        return value
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        if (name := _ALIASES.get(name, name)) in _DTYPES:
            return _DTYPES[name]
    raise SpecError(f"{field}: got {value!r}; a cache holds one of {', '.join(_DTYPES)}")


def dtype_name(dtype: torch.dtype) -> str:
    """The name without ``torch.``: what ``CacheSpec.to_dict`` writes."""
    return _NAMES[dtype]


def check_size(field: str, value: object) -> int:
    """A positive int (numpy's too). A bool or a float here is a mistake in the caller, so neither is converted."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise SpecError(f"{field}: got {brief(value)}; must be an integer of at least 1")
    return int(value)


def check_sizes(field: str, value: object, depth: int) -> Any:
    """A size, or up to ``depth`` levels of non-empty tuples of sizes, all entries of one level of the same kind."""
    if depth == 0 or not isinstance(value, (tuple, list)):
        return check_size(field, value)
    if not value:
        raise SpecError(f"{field}: got {value!r}; a per-layer tuple needs an entry")
    entries = tuple(check_sizes(f"{field}[{i}]", entry, depth - 1) for i, entry in enumerate(value))
    if len({isinstance(entry, tuple) for entry in entries}) > 1:
        raise SpecError(
            f"{field}: got {brief(value)}; give widths per layer, or per layer and head group, not a mixture"
        )
    return entries


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise SpecError(f"{field}: got {brief(value)}; must be one of {', '.join(choices)}")


def check_name(field: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise SpecError(f"{field}: got {brief(value)}; must be a non-empty string")


def check_bool(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise SpecError(f"{field}: got {brief(value)}; must be True or False")


def check_members(field: str, value: object, kind: type[_T]) -> tuple[_T, ...]:
    if not isinstance(value, (tuple, list)) or not value or not all(isinstance(item, kind) for item in value):
        raise SpecError(f"{field}: got {brief(value)}; needs a sequence of at least one {kind.__name__}")
    return tuple(value)


def check_layers(field: str, value: object) -> tuple[int, ...]:
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
    for name in names:
        if names.count(name) > 1:
            raise SpecError(f"{field}: got {name!r} {names.count(name)} times; names must differ")


def brief(value: object) -> str:
    """A value in a message: components by name, long things cut."""
    if isinstance(value, (tuple, list)) and value and all(hasattr(item, "name") for item in value):
        return ", ".join(item.name for item in value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _cuts_exponent(c: Component) -> bool:
    exponent = _EXPONENT_BITS[dtype_name(c.dtype)]
    return bool(c.planes) and exponent > 0 and c.planes[0] < 1 + exponent


# (field to name, refuse when, why). The order is that of reading: of several broken rules, the first is reported.
COMPONENT_RULES: Final[tuple[tuple[str, Callable[[Component], bool], str], ...]] = (
    ("planes", lambda c: len(c.planes) == 1,
     "one plane is no split: give at least two, or none"),
    ("planes", lambda c: bool(c.planes) and sum(c.planes) != 8 * c.dtype.itemsize,
     "planes must sum to the bits of the dtype"),
    ("planes", _cuts_exponent,
     "the first plane must hold sign and exponent (bf16 has 8 exponent bits, so 8/4/4 cuts one: use 12/4, or fp16)"),
    ("planes", lambda c: bool(c.planes) and "pre" in c.ropes,
     "planes are read by the magnitude of a stored channel, and rotation mixes channels: store the key after rotation"),
    ("heads", lambda c: c.scope == "shared" and isinstance(c.heads, tuple) and len(c.heads) > 1,
     "one copy shared by all layers has one number of heads"),
    ("width", lambda c: c.scope == "shared" and isinstance(c.width, tuple) and len(c.width) > 1,
     "one copy shared by all layers has one width"),
    ("ragged", lambda c: c.ragged and c.scope == "shared",
     "each layer evicts its own tokens, but one copy shared by all layers has one length: use scope 'layer'"),
    ("ragged", lambda c: c.ragged and c.growth == "fixed",
     "a fixed state holds no tokens, so it has no lengths"),
    ("rope", lambda c: c.growth == "fixed" and c.ropes != {"none"},
     "a fixed state holds no positions to rotate: use 'none'"),
    ("rope", lambda c: c.unequal and "post" in c.ropes,
     "heads of unequal width are latents, and a latent is taken before rotation: use 'pre' or 'none'"),
)  # fmt: skip


def _differ(what: Callable[[Component], object]) -> Callable[[Group], bool]:
    return lambda g: any(what(c) != what(g.components[0]) for c in g.components)


GROUP_RULES: Final[tuple[tuple[str, Callable[[Group], bool], str], ...]] = (
    ("components", _differ(lambda c: c.growth),
     "components of a group live and die together, so they grow alike: put them in groups by growth"),
    ("components", _differ(lambda c: c.ragged),
     "components of a group share lengths: make all ragged or none, or put them in two groups"),
    ("components", lambda g: g.ragged and _differ(lambda c: c.heads)(g),
     "ragged lengths are per head, so all components of the group need the same heads"),
    ("components", lambda g: g.ragged and g.k_only,
     "ragged K with no V: V of any head is derived from the K of every head (Slim), so no head may drop a row alone"),
    ("components", lambda g: g.k_only and g.components[0].dtype.itemsize < 2,
     "8-bit K with no V: deriving V multiplies the rounding of K by the condition number of W_K; store fp16 or wider"),
    ("window_tokens", lambda g: g.window_tokens is not None and g.growth == "fixed",
     "a fixed state holds no tokens, so no window of them"),
    ("window_tokens", lambda g: g.window_tokens is not None and g.growth == "prefill",
     "what is fixed after prefill is read whole by every step: it has no sliding window"),
    ("window_tokens", lambda g: g.window_tokens is not None and g.ragged,
     "ragged rows are compacted, so a block no longer spans a range of positions that a window could leave behind"),
    ("max_tokens", lambda g: g.max_tokens is not None and g.growth != "prefill",
     "only a group that is fixed after prefill has such a limit"),
    ("block_size", lambda g: g.growth == "fixed" and g.block_size != 1,
     "a fixed state is one block per sequence: use 1, or leave it out"),
)  # fmt: skip
