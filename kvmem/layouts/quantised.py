"""K and V in fewer bits: 8-bit floats, or integers of 2 to 8 bits with scales by token or by channel (KIVI,
arXiv:2402.02750).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import torch

from kvmem.arguments import brief, check_bool, check_choice, check_size
from kvmem.errors import SpecError
from kvmem.kernels.write import to_cache_dtype
from kvmem.layouts import bits as codec
from kvmem.layouts.base import Layout, check_spec
from kvmem.layouts.reading import TokenReader
from kvmem.spec import CacheSpec, Component, Group
from kvmem.spec.dtypes import parse_dtype

__all__ = ["QuantisedKV"]

Scales = str | float | Sequence[float]
Rows = dict[str, torch.Tensor]

_PLAIN: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS: Final = {f"int{bits}": bits for bits in codec.BITS}


class QuantisedKV(Layout):
    """Stores K (after rotation) and V in fewer bits, each in a format of its own.

    ==================  ==============================  ==========================================================
    format              scales                          stored of a token and a head of width W
    ==================  ==============================  ==========================================================
    float, 16 bits up   none                            ``k``: W floats
    float8              one, or one for each layer      ``k``: W bytes
    float8, intN        ``"token"``: of ``group_size``  ``k_codes``: W * N / 8 bytes; ``k_scales``: W / group_size
                        channels of one token           scales, and for integers as many zero points
    float8, intN        ``"channel"``: of the tokens    ``k_codes``: W * N / 8 bytes; ``k_scales``: W / block_size
                        of a block in one channel       scales, and for integers as many zero points
    ==================  ==============================  ==========================================================

    The names of V begin with ``v``. KIVI's split is the default: K by channel, because a few channels of K are large in
    all tokens, and V by token.

    By channel, a block is encoded when its last token is written. Until then it is read from ``k_tail``, which holds
    the newest tokens in the spec's dtype. The tail's group has a window of one token, and a window keeps the whole
    block that it lies in. So committed tokens can be truncated to the start of the incomplete block and no further; and
    until ``commit()``, a prefill holds the tail of all its tokens: prefill in chunks. ``spec.bytes_per_token`` counts
    the tail of a new token; what an old one keeps is ``spec.groups[0].bytes_per_token``.

    Exact: incomplete blocks, and floats of the spec's dtype. Integers are off by half a scale at most
    (``bits.quantise``), normal 8-bit floats by 1/16 (e4m3) or 1/8 (e5m2) of the number. In 8 bits and less, what is out
    of range saturates; in incomplete blocks and longer floats it is infinite, as in plain K and V. NaN stays NaN, and
    makes those that share its scale NaN, unless that was given. ``attend`` and ``derive`` compute from what is stored,
    and dequantise every token that they read in each call: fewer bytes, more arithmetic. Kernels of other packages read
    floats with one scale for each layer (``kernel_args``).
    """

    def __init__(
        self, spec: CacheSpec, *, k: str | torch.dtype = "int4", v: str | torch.dtype = "int4",
        k_scales: Scales | None = None, v_scales: Scales | None = None, group_size: int | None = None,
        scale_dtype: str | torch.dtype = torch.float16, rotate: bool = False,
    ) -> None:  # fmt: skip
        """spec: plain K and V, as ``CacheSpec.kv()`` gives it: one group, without a sliding window.

        k, v: ``"int8"``, ``"int4"``, ``"int3"``, ``"int2"``, or a floating-point dtype or its name, such as
            ``"fp8_e4m3"`` and ``"fp8_e5m2"``.
        k_scales, v_scales: see the table. Default: K ``"channel"``, V ``"token"``; for float8 1.0.
        group_size: channels that share a scale of a token; default all of a head. scale_dtype: of scales, zero points.
        rotate: multiply heads by a Hadamard matrix before quantising, which spreads outliers (``bits.hadamard``).

        ``SpecError`` for what does not fit: a scale that is not a number above 0, a group size that does not divide the
        width, a block size that does not divide the numbers of a head (by channel, they lie spread over its tokens).
        """
        group, how = _plain_group(spec), _How(parse_dtype(scale_dtype, "scale_dtype"), rotate, group_size)
        check_bool("rotate", rotate)
        check_choice("scale_dtype", str(how.scale_dtype)[6:], codec.SCALES)
        self._sides = _stored(group, "k", k, k_scales, "channel", how), _stored(group, "v", v, v_scales, "token", how)
        if group_size is not None and not any(isinstance(side, _PerToken) for side in self._sides):
            raise SpecError(f"group_size: got {group_size}, but neither K nor V is an integer with scales by token")
        parts = tuple(c for side in self._sides for c in side.components())
        tails = tuple(c for side in self._sides for c in side.tails())
        groups = [replace(group, components=parts)]
        if tails:
            groups.append(replace(group, name=f"{group.name}_tail", components=tails, window_tokens=1))
        self.spec = replace(spec, groups=tuple(groups), components=None)

    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """values: k (after rotation) and v, ``[T, KV heads, width]`` each, of any floating-point dtype."""
        if len(values) != 2:
            raise SpecError(f"values: got {len(values)} tensors; must be k and v")
        for side, x in zip(self._sides, values, strict=True):
            expected = (len(positions), self.spec.groups[0].heads(side.components()[0].name, layer), side.width)
            if tuple(x.shape) != expected or not x.is_floating_point():
                raise SpecError(f"{side.name}: got {x.dtype} {tuple(x.shape)}; must be floats of shape {expected}")
        return {n: r for side, x in zip(self._sides, values, strict=True) for n, r in side.encode(layer, x).items()}

    def tail(self, layer: int) -> tuple[str, ...]:
        """``k_tail`` and ``v_tail`` of what is scaled by channel."""
        return tuple(c.name for side in self._sides for c in side.tails())

    def encode_blocks(self, layer: int, tail: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Codes and scales of what is scaled by channel."""
        sides = [side for side in self._sides if isinstance(side, _PerChannel)]
        return {n: r for side in sides for n, r in side.encode_blocks(tail[f"{side.name}_tail"]).items()}

    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New tensors in float32 (float64 for tails in float64); of floats of 16 bits or more, what the cache holds."""
        k, v = self._sides
        return k.derive(reader, first, end), v.derive(reader, first, end)

    def derive_into(self, reader: TokenReader, first: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Without tensors in between for float32, unless heads are rotated."""
        for side, room in zip(self._sides, (k, v), strict=True):
            pieces = [(first, end)] if side.writes(room.dtype) else self.tiles(first, end)
            for begin, stop in pieces:
                piece = room[begin - first : stop - first]
                found = side.derive(reader, begin, stop, piece)
                if found is not piece:
                    piece.copy_(to_cache_dtype(found, room.dtype))

    def kernel_args(self, layer: int) -> dict[str, Any]:
        """``{"k_scale": float, "v_scale": float}`` for float8, as FlashInfer's ``run()`` takes them, and for
        ``kernels.base.Step(scales=...)``, which passes them on to any kernel; nothing for longer floats.

        ``SpecError`` for integers, and for K and V of two dtypes: kernels take one for both.
        """
        k, v = self._sides
        if not (isinstance(k, _Floats) and isinstance(v, _Floats)) or k.dtype != v.dtype:
            got = ", ".join(f"{c.name} in {c.dtype}" for side in self._sides for c in side.components())
            raise SpecError(
                f"kernels read K and V of one floating-point dtype; this layout stores {got}: use "
                "LayoutCache.attend(), or give a kernel the K and V of LayoutCache.derive()"
            )
        return {"k_scale": k.scales[layer], "v_scale": v.scales[layer]} if k.dtype.itemsize == 1 else {}


def _plain_group(spec: CacheSpec) -> Group:
    """The only group of a spec of plain K and V."""
    check_spec(spec)
    group = spec.groups[0]
    names = sorted(c.name for g in spec.groups for c in g.components)
    if len(spec.groups) > 1 or names != ["k", "v"] or group.window_tokens or group.growth != "token" or group.ragged:
        raise SpecError(
            f"spec: got {len(spec.groups)} groups with {', '.join(names)}, the first with window_tokens="
            f"{group.window_tokens} and growth={group.growth!r}; QuantisedKV takes one group with k and v, which grow "
            "by token, and of which all tokens are read"
        )
    for c in group.components:
        if not isinstance(c.width, int) or c.scope == "shared" or c.planes or c.dtype not in _PLAIN:
            raise SpecError(
                f"spec: {c.name} has width {c.width}, scope {c.scope!r}, planes {c.planes} and {c.dtype}; QuantisedKV "
                f"takes one width for all layers, scope 'layer', no planes, and the model's dtype, one of {_PLAIN}"
            )
    return group


@dataclass(frozen=True)
class _How:
    """How integers are made, of K and of V."""

    scale_dtype: torch.dtype
    rotate: bool
    group_size: int | None


def _stored(group: Group, name: str, given: object, scales: Scales | None, default: str, how: _How) -> _Stored:
    plain, kind = group.component(name), _kind(name, given)
    if isinstance(kind, torch.dtype) and not (kind in codec.FLOAT8 and isinstance(scales, str)):
        return _Floats(plain, kind, scales, group.layers)
    scales = default if scales is None else scales
    check_choice(f"{name}_scales", scales, ("token", "channel"))
    return _PerToken(plain, kind, how) if scales == "token" else _PerChannel(plain, kind, how, group.block_size)


def _kind(name: str, given: object) -> codec.Kind:
    """The bits of an integer, or a floating-point dtype."""
    text = str(given) if isinstance(given, (str, torch.dtype)) else ""
    if bits := _INTEGERS.get(text.removeprefix("torch.")):
        return bits
    try:
        dtype = parse_dtype(given, name)  # type: ignore[arg-type]
    except SpecError:
        dtype = torch.uint8
    if not dtype.is_floating_point:
        raise SpecError(f"{name}: got {brief(given)}; must be one of {', '.join(_INTEGERS)}, or a floating-point dtype")
    return dtype


class _Stored(ABC):
    """K or V, as it is stored. name: ``"k"`` or ``"v"``. width: of a head."""

    def __init__(self, plain: Component) -> None:
        assert isinstance(plain.width, int)
        self.plain, self.name, self.width = plain, plain.name, plain.width

    @abstractmethod
    def components(self) -> tuple[Component, ...]:
        """All but the tail."""

    def tails(self) -> tuple[Component, ...]:
        return ()

    @abstractmethod
    def encode(self, layer: int, x: torch.Tensor) -> Rows: ...

    @abstractmethod
    def derive(self, reader: TokenReader, first: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """out: where it may be written, if dtype and layout fit; then it is what is returned."""

    def writes(self, dtype: torch.dtype) -> bool:
        """Whether ``derive`` writes into an ``out`` of this dtype without tensors of its own."""
        return dtype == torch.float32


class _Floats(_Stored):
    """Floats; those of 8 bits are divided by a number. scales: by layer."""

    def __init__(self, plain: Component, dtype: torch.dtype, scales: Scales | None, layers: Sequence[int]) -> None:
        super().__init__(plain)
        self.dtype, name, field = dtype, plain.name, f"{plain.name}_scales"
        if scales is not None and self.dtype.itemsize > 1:
            raise SpecError(f"{field}: got {brief(scales)}; {name} is stored as {self.dtype}, which is not scaled")
        many: list[Any] = list(scales) if isinstance(scales, (list, tuple)) else [scales] * len(layers)
        if len(many) != len(layers):
            raise SpecError(f"{field}: got {len(many)} numbers; must be one, or {len(layers)}: one for each layer")
        for one in many if scales is not None else ():
            if isinstance(one, bool) or not isinstance(one, (int, float)) or not 2.0**-126 <= one <= 2.0**127:
                raise SpecError(f"{field}: got {brief(one)}; {self.dtype} is divided by an int or float above 0")
        self.scales = {layer: float(one or 1.0) for layer, one in zip(layers, many, strict=True)}

    def components(self) -> tuple[Component, ...]:
        return (replace(self.plain, dtype=self.dtype),)

    def encode(self, layer: int, x: torch.Tensor) -> Rows:
        if self.dtype.itemsize > 1:
            return {self.name: to_cache_dtype(x, self.dtype, name=self.name)}
        return {self.name: codec.to_float8(x, self.dtype, self.scales[layer], name=self.name)}

    def derive(self, reader: TokenReader, first: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        rows = reader.rows(self.name, first, end)
        return codec.from_float8(rows, self.scales[reader.layer], out=out) if self.dtype.itemsize == 1 else rows

    def writes(self, dtype: torch.dtype) -> bool:
        return dtype == (torch.float32 if self.dtype.itemsize == 1 else self.dtype)


class _Grouped(_Stored):
    """Packed codes, and scales of groups of numbers. scale_width: how many, zero points too, a token and head has."""

    scale_width: int

    def __init__(self, plain: Component, kind: codec.Kind, how: _How) -> None:
        super().__init__(plain)
        self._kind, self._how, self._bits = kind, how, kind if isinstance(kind, int) else 8
        if self.width * self._bits % 8:
            raise SpecError(
                f"{self.name}: got int{kind} for a width of {self.width}, which leaves part of a byte: use int8, or a "
                f"width that is a multiple of {8 // math.gcd(8, self._bits)}"
            )
        if how.rotate:
            codec.hadamard(self.width, field="head_dim")  # refuses a width of which there is none

    def components(self) -> tuple[Component, ...]:
        codes = replace(self.plain, name=f"{self.name}_codes", width=self.width * self._bits // 8, dtype=torch.uint8)
        scales = replace(codes, name=f"{self.name}_scales", width=self.scale_width, dtype=self._how.scale_dtype)
        return codes, scales

    def rotated(self, x: torch.Tensor, *, back: bool = False) -> torch.Tensor:
        """``[..., width]`` by the Hadamard matrix, if there is to be one."""
        if not self._how.rotate:
            return x
        h = _rotation(self.width, x.device)
        return x.float() @ (h.T if back else h)

    def writes(self, dtype: torch.dtype) -> bool:
        return super().writes(dtype) and not self._how.rotate


class _PerToken(_Grouped):
    """A scale is that of some channels of one token."""

    def __init__(self, plain: Component, kind: codec.Kind, how: _How) -> None:
        super().__init__(plain, kind, how)
        self._size = self.width if how.group_size is None else check_size("group_size", how.group_size)
        if self.width % self._size:
            near = _nearest_divisor(self.width, self._size)
            raise SpecError(f"group_size: got {self._size}, which does not divide the width {self.width}: use {near}")
        self.scale_width = self.width // self._size * codec.parts_of(kind)

    def encode(self, layer: int, x: torch.Tensor) -> Rows:
        found = codec.quantise_rows(self.rotated(x), self._kind, size=self._size, scale_dtype=self._how.scale_dtype)
        return dict(zip((f"{self.name}_codes", f"{self.name}_scales"), found, strict=True))

    def derive(self, reader: TokenReader, first: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        codes, scales = (reader.rows(f"{self.name}_{part}", first, end) for part in ("codes", "scales"))
        return self.rotated(codec.dequantise_rows(codes, scales, self._kind, size=self._size, out=out), back=True)


class _PerChannel(_Grouped):
    """A scale is that of one channel of a block's tokens. The scales and zero points of a block, ``[heads, n]``, lie in
    its rows as ``[block_size, heads, n / block_size]``, so that a block holds all that it takes to read it.
    """

    def __init__(self, plain: Component, kind: codec.Kind, how: _How, block_size: int) -> None:
        super().__init__(plain, kind, how)
        self._size, count = block_size, self.width * codec.parts_of(kind)
        if count % block_size:
            raise SpecError(
                f"block_size: got {block_size}; by channel, the {count} scales and zero points of a head of "
                f"{plain.name} lie spread over the tokens of a block: use {_nearest_divisor(count, block_size)}"
            )
        self.scale_width = count // block_size

    def tails(self) -> tuple[Component, ...]:
        return (replace(self.plain, name=f"{self.name}_tail"),)

    def encode(self, layer: int, x: torch.Tensor) -> Rows:
        return {f"{self.name}_tail": x.to(self.plain.dtype)}

    def encode_blocks(self, tail: torch.Tensor) -> Rows:
        found = codec.quantise_blocks(self.rotated(tail), self._kind, scale_dtype=self._how.scale_dtype)
        return dict(zip((f"{self.name}_codes", f"{self.name}_scales"), found, strict=True))

    def derive(self, reader: TokenReader, first: int, end: int, out: torch.Tensor | None = None) -> torch.Tensor:
        dtype = torch.promote_types(self.plain.dtype, torch.float32)
        split = max(first, min(end, reader.length // self._size * self._size))  # complete blocks end there
        codes = reader.rows(f"{self.name}_codes", first, split)
        if out is None or out.dtype != dtype:
            out = torch.empty(end - first, codes.shape[1], self.width, dtype=dtype, device=codes.device)
        if first < split:
            blocks, room = (
                (first // self._size * self._size, -(-split // self._size) * self._size),
                out[: split - first],
            )
            scales = reader.rows(f"{self.name}_scales", *blocks)
            found = codec.dequantise_blocks(
                codes, scales, self._kind, size=self._size, skip=first - blocks[0], out=room
            )
            if self._how.rotate or found is not room:
                room.copy_(self.rotated(found, back=True))
        if split < end:
            out[split - first :] = reader.rows(f"{self.name}_tail", split, end)
        return out


@lru_cache(maxsize=16)
def _rotation(width: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # or autograd could not use it later
        return codec.hadamard(width, device=device)


def _nearest_divisor(number: int, wanted: int) -> int:
    return min((n for n in range(1, number + 1) if number % n == 0), key=lambda n: abs(n - wanted))
