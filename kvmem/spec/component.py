"""One component of a cache: the type, number and growth of its elements. ``kvmem.spec`` re-exports it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from math import gcd
from typing import Any, Final, Literal, get_args

import torch

from kvmem import arguments as check
from kvmem.errors import SpecError
from kvmem.spec.dtypes import EXPONENT_BITS, dtype_name, parse_dtype

Scope = Literal["layer", "shared"]
Growth = Literal["token", "prefill", "fixed"]
Rope = Literal["none", "pre", "post"]
Width = int | tuple[int, ...] | tuple[tuple[int, ...], ...]


def assign(instance: object, **values: object) -> None:
    """Set normalised fields of a frozen instance. Only for ``__post_init__``."""
    for field, value in values.items():
        object.__setattr__(instance, field, value)


@dataclass(frozen=True)
class Component:
    """One thing that a group stores for a token (or, with ``growth="fixed"``, for a sequence).

    name: readers give a meaning to ``k`` and ``v`` (self attention), ``cross_k`` and ``cross_v`` (cross attention),
        ``ckv`` (latent) and ``kpe`` (rotary key) of MLA. Other names are free.
    width: elements of a head: an int; a tuple with one int per layer; or a tuple with one tuple per layer, which has
        one int per head group (the heads of the layer are split evenly over the groups, as for the unequal ranks of
        Palu, arXiv:2407.21118).
    dtype: of the elements: a ``torch.dtype``, or a name such as ``"bfloat16"``, which is converted.
    heads: KV heads, latent groups, or rows of a state matrix: an int, or a tuple with one int per layer.
    scope: ``"layer"``: each layer has a copy; ``"shared"``: all layers of the group read one copy.
    growth: ``"token"``: an entry for each token; ``"prefill"``: written once, at prefill (cross attention);
        ``"fixed"``: of constant size for each sequence (recurrent state).
    rope: ``"pre"``: stored before rotation; ``"post"``: after; ``"none"``: never rotated. One value, or one per layer.
        It informs readers; kvmem rotates nothing.
    planes: the bits of each plane into which elements are split, most significant first (AlignedKV, arXiv:2409.16546);
        empty for plain elements. An ``Allocator`` stores such a component whole and shows it as ``uint8`` of shape
        ``[..., 1, bytes of a token]``: the writer splits elements into planes, the reader joins them, and ``write_kv``
        takes only such bytes.
    ragged: True if each (sequence, head) has a length of its own, as with eviction of tokens per head. A
        spec can describe it and count its bytes; an ``Allocator`` refuses it, and ``kvmem.layouts.lanes`` stores it.

    Raises ``SpecError`` for fields that are invalid or contradict each other.
    """

    name: str
    _: KW_ONLY
    width: Width
    dtype: torch.dtype
    heads: int | tuple[int, ...] = 1
    scope: Scope = "layer"
    growth: Growth = "token"
    rope: Rope | tuple[Rope, ...] = "none"
    planes: tuple[int, ...] = ()
    ragged: bool = False

    def __post_init__(self) -> None:
        check.check_name("Component.name", self.name)
        here = f"component {self.name!r}: "
        assign(
            self,
            heads=check.check_sizes(here + "heads", self.heads, 1),
            width=check.check_sizes(here + "width", self.width, 2),
        )
        assign(self, dtype=parse_dtype(self.dtype, here + "dtype"))
        if not isinstance(self.planes, (tuple, list)):
            raise SpecError(f"{here}planes: got {self.planes!r}; must be a tuple of bits, highest plane first")
        assign(self, planes=tuple(check.check_size(f"{here}planes[{i}]", bits) for i, bits in enumerate(self.planes)))
        check.check_choice(here + "scope", self.scope, get_args(Scope))
        check.check_choice(here + "growth", self.growth, get_args(Growth))
        if isinstance(self.rope, list):
            assign(self, rope=tuple(self.rope))
        for rope in self.rope if isinstance(self.rope, tuple) and self.rope else (self.rope,):
            check.check_choice(here + "rope", rope, get_args(Rope))
        check.check_bool(here + "ragged", self.ragged)
        for field, refused, why in COMPONENT_RULES:
            if refused(self):
                raise SpecError(f"{here}{field}: got {check.brief(getattr(self, field))}; {why}")

    @property
    def ropes(self) -> set[str]:
        """The rotations that occur in any layer."""
        return set(self.rope) if isinstance(self.rope, tuple) else {self.rope}

    @property
    def unequal(self) -> bool:
        """True if the heads of one layer differ in width."""
        return isinstance(self.width, tuple) and any(isinstance(w, tuple) and len(set(w)) > 1 for w in self.width)

    # These three take an index in the group's layers; Group translates layer numbers.
    def heads_at(self, index: int) -> int:
        """Return the number of heads in the group's layer number ``index``."""
        return self.heads[index] if isinstance(self.heads, tuple) else self.heads

    def widths_at(self, index: int) -> tuple[int, ...]:
        """Return the elements of a head for each head group of the layer; one entry if all heads are equal."""
        width = self.width[index] if isinstance(self.width, tuple) else self.width
        return width if isinstance(width, tuple) else (width,)

    def elements_at(self, index: int) -> int:
        """Return the elements of a token in the layer, over all heads."""
        widths = self.widths_at(index)
        return sum(widths) * (self.heads_at(index) // len(widths))


def canonical(component: Component, num_layers: int, here: str) -> Component:
    """Return the component in its canonical form: of equal shapes the shortest spelling, heads=8 for heads=(8, 8).

    ``SpecError`` where a tuple does not fit the number of layers.
    """
    count = 1 if component.scope == "shared" else num_layers
    for field in ("heads", "width", "rope"):
        value = getattr(component, field)
        if isinstance(value, tuple) and len(value) != count:
            raise SpecError(
                f"{here}{field}: got {len(value)} entries, {check.brief(value)}; needs {count}, one per copy"
            )
    widths = []
    for index in range(count):
        groups, heads, elements = component.widths_at(index), component.heads_at(index), component.elements_at(index)
        if heads % len(groups):
            raise SpecError(f"{here}width: got {len(groups)} head groups {groups!r}, which do not divide {heads} heads")
        if any(elements * bits % 8 for bits in component.planes):
            raise SpecError(
                f"{here}planes: got {component.planes!r}; {elements} elements a token leave a plane with part of a byte"
            )
        # The longest run length that divides all runs of equal widths: (64, 64, 32, 32) means the same as (64, 32).
        run = gcd(len(groups), *(i for i in range(1, len(groups)) if groups[i] != groups[i - 1]))
        widths.append(groups[::run])
    flat = tuple(w[0] for w in widths) if all(len(w) == 1 for w in widths) else tuple(widths)
    return replace(component, heads=_collapse(component.heads), width=_collapse(flat), rope=_collapse(component.rope))


def _collapse(value: Any) -> Any:
    """Return 8 for (8, 8, 8). Unequal head groups stay per layer: a lone tuple would read as one width per layer."""
    alike = isinstance(value, tuple) and len(set(value)) == 1 and not isinstance(value[0], tuple)
    return value[0] if alike else value


def _cuts_exponent(c: Component) -> bool:
    exponent = EXPONENT_BITS[dtype_name(c.dtype)]
    return bool(c.planes) and exponent > 0 and c.planes[0] < 1 + exponent


# (field to name, condition to refuse, reason). The first rule that is broken is reported.
COMPONENT_RULES: Final[tuple[tuple[str, Callable[[Component], bool], str], ...]] = (
    ("planes", lambda c: len(c.planes) == 1,
     "a single plane splits nothing: give at least two, or none"),
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
