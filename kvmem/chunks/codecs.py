"""Codecs of a section: none, integers of 8 or 4 bits, and CacheGen's levels with an entropy coder (arXiv:2310.07240).

A codec changes how sections are stored, never what is in memory. All but ``none`` are lossy. Parts that hold no floats
of two bytes or more (codes, states in int8), and those that would not become smaller, are stored as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import torch

from kvmem.arguments import check_choice
from kvmem.errors import SpecError
from kvmem.layouts.bits import dequantise_rows, quantise_rows
from kvmem.tiers.checksum import checksum

if TYPE_CHECKING:
    from kvmem.chunks.chunk import Part

    Places = Sequence[tuple[Part, int, int]]

__all__ = ["CODECS", "Codec", "codec_named"]

_RAW, _CODED = b"\0", b"\1"


class Codec:
    """The bytes as they are; others derive from it. name: as a file's header has it. exact: whether decoding gives the
    same bytes.
    """

    name: ClassVar[str] = "none"
    exact: ClassVar[bool] = True

    def encode(self, data: torch.Tensor, places: Places) -> memoryview | bytes:
        """Return the section as it is stored. data: uint8. places: ``Head.places`` of the section."""
        return data.numpy().data

    def decode(self, stored: torch.Tensor, places: Places) -> torch.Tensor:
        """Return the section, uint8; ``ValueError`` for what ``encode`` cannot have returned."""
        return stored


class Lossy(Codec, ABC):
    """Codes each part by itself: a tag, the length if it is coded, its bytes."""

    exact = False

    def encode(self, data: torch.Tensor, places: Places) -> bytes:
        found: list[bytes | memoryview] = []
        for part, at, size in places:
            raw = data[at : at + size]
            coded = self.encode_part(part, _floats(part, raw)) if size and _is_wide(part) else None
            small = coded is not None and len(coded) < size
            found += [_CODED, len(coded).to_bytes(8, "little"), coded] if small and coded else [_RAW, raw.numpy().data]
        return b"".join(found)

    def decode(self, stored: torch.Tensor, places: Places) -> torch.Tensor:
        data, at = stored.numpy().data, 0
        found = [torch.empty(0, dtype=torch.uint8)]  # each only when its stored bytes have the right length
        for part, _, size in places:
            tag, length, at = bytes(data[at : at + 1]), size, at + 1
            if tag == _CODED:
                length, at = int.from_bytes(data[at : at + 8], "little"), at + 8
            if tag not in (_RAW, _CODED) or length > len(data) - at:
                raise ValueError(f"component {part.name!r} does not fit its section")
            piece, at, count = data[at : at + length], at + length, size // part.token_bytes
            if tag == _RAW:
                found += [torch.frombuffer(piece, dtype=torch.uint8)] if size else []
            elif not count or not _is_wide(part):
                raise ValueError(f"component {part.name!r} cannot be coded")
            else:
                values = self.decode_part(part, np.frombuffer(piece, np.uint8), count)
                found.append(values.to(part.dtype).flatten().view(torch.uint8))
        if at != len(data):
            raise ValueError("the section goes on after its last component")
        return torch.cat(found)

    @abstractmethod
    def encode_part(self, part: Part, x: torch.Tensor) -> bytes | None:
        """Return the floats ``[n, heads, width]`` of a part as bytes; None if they cannot be coded."""

    @abstractmethod
    def decode_part(self, part: Part, data: np.ndarray, count: int) -> torch.Tensor:
        """Return what ``encode_part`` was given, approximately. data: uint8. ``ValueError``: as ``decode``."""


class Integers(Lossy):
    """Codes of 8 or 4 bits with a scale and a zero point, float16, for each 32 neighbours of a head: off by half a
    scale at most, for entries within the range of float16.
    """

    bits: ClassVar[int]

    def encode_part(self, part: Part, x: torch.Tensor) -> bytes | None:
        size = self._size(part)
        if part.width * self.bits % 8 or not x.isfinite().all() or x.abs().max() > torch.finfo(torch.float16).max:
            return None
        packed, scales = quantise_rows(x, self.bits, size=size)
        return packed.numpy().tobytes() + scales.numpy().tobytes()

    def decode_part(self, part: Part, data: np.ndarray, count: int) -> torch.Tensor:
        codes = (count, part.heads, part.width * self.bits // 8)
        scales = (count, part.heads, 2 * (part.width // self._size(part)))
        split = int(np.prod(codes))
        if len(data) != split + 2 * int(np.prod(scales)):
            raise ValueError(f"component {part.name!r} has {len(data)} bytes, too few or too many")
        packed = torch.from_numpy(data[:split].reshape(codes).copy())
        return dequantise_rows(packed, torch.from_numpy(data[split:].copy()).view(torch.float16).view(scales),
                               self.bits, size=self._size(part))  # fmt: skip

    @staticmethod
    def _size(part: Part) -> int:
        return gcd(part.width, 32)


class Int8(Integers):
    """Half of the bytes of 16-bit floats, plus scales."""

    name, bits = "int8", 8


class Int4(Integers):
    """A quarter of them, plus scales."""

    name, bits = "int4", 4


class CacheGen(Lossy):
    """Differences to an anchor token, quantised in levels that depend on the layer, through a range coder.

    The first of each ten tokens is an anchor in 8 bits; the others are differences to the anchor as it is decoded. Each
    token has one scale, float16, the largest of its entries. K has 32 levels in the first 10 layers and 16 after, V 32
    in the first 2 and 16 after, as published. The coder (package constriction) takes a normal distribution for each
    channel, fitted to this section: tables of its counts would cost half as much again as the symbols of 256 tokens of
    SmolLM2. The symbols have a checksum, since distributions are computed in floating point.
    """

    name = "cachegen"
    group_tokens: ClassVar[int] = 10
    anchor_top: ClassVar[int] = 127
    rows_at_once: ClassVar[int] = 256  # the coder is given 16 bytes of distribution with each symbol

    def __init__(self) -> None:
        try:
            self._stream: Any = import_module("constriction").stream
        except ImportError as error:
            raise SpecError(
                "codec: 'cachegen' needs the package constriction: pip install 'kvmem[cachegen]'"
            ) from error

    def encode_part(self, part: Part, x: torch.Tensor) -> bytes | None:
        x = x.float().flatten(1)
        anchors, others, which = self._roles(len(x))
        scales, symbols = torch.zeros(len(x), dtype=torch.float16), torch.zeros(x.shape, dtype=torch.int32)
        base = torch.zeros_like(x)
        for rows, top in ((anchors, self.anchor_top), (others, _top_of(part))):
            rest = x[rows] - base[rows]
            scales[rows] = rest.abs().amax(1).half() if len(rows) else scales[rows]
            if not scales.isfinite().all():
                return None
            step = _step(scales[rows], top)
            symbols[rows] = (rest / step).nan_to_num_(0).round_().clamp_(-top, top).int()
            base = (symbols[anchors] * _step(scales[anchors], self.anchor_top))[which]
        encoder, models = self._stream.queue.RangeEncoder(), []
        for rows, top in ((anchors, self.anchor_top), (others, _top_of(part))):
            q = symbols[rows].numpy()
            mean, spread = (f(q, 0).astype(np.float16) if len(q) else np.zeros(x.shape[1], np.float16)
                            for f in (np.mean, np.std))  # fmt: skip
            models += [mean, np.maximum(spread, _LEAST_SPREAD)]
            for at in range(0, len(q), self.rows_at_once):
                piece = q[at : at + self.rows_at_once]
                encoder.encode(piece.ravel(), self._family(top), *_by_symbol(models[-2:], len(piece)))
        words = encoder.get_compressed().astype("<u4")
        parts = (scales.numpy(), *models, words)
        return checksum(symbols.numpy().data) + b"".join(array.tobytes() for array in parts)

    def decode_part(self, part: Part, data: np.ndarray, count: int) -> torch.Tensor:
        channels = part.heads * part.width
        ends = np.cumsum([16, 2 * count, *4 * [2 * channels]])
        if len(data) < ends[-1] or (len(data) - ends[-1]) % 4:
            raise ValueError(f"component {part.name!r} has {len(data)} bytes, too few or a part of a word")
        total, *arrays, words = np.split(data, ends)
        scales, *models = (array.copy().view(np.float16) for array in arrays)
        if not all(np.isfinite(array).all() for array in (scales, *models)) or min(map(np.min, models[1::2])) <= 0:
            raise ValueError(f"component {part.name!r} has distributions or scales that are none")
        anchors, others, which = self._roles(count)
        symbols, decoder = torch.zeros(count, channels, dtype=torch.int32), self._stream.queue.RangeDecoder
        try:
            coder = decoder(words.copy().view("<u4").astype(np.uint32))
            for rows, top, model in ((anchors, self.anchor_top, models[:2]), (others, _top_of(part), models[2:])):
                for at in range(0, len(rows), self.rows_at_once):
                    piece = rows[at : at + self.rows_at_once]
                    found = coder.decode(self._family(top), *_by_symbol(model, len(piece)))
                    symbols[piece] = torch.from_numpy(found).view(len(piece), channels)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"component {part.name!r}: {error}") from error
        if checksum(symbols.numpy().data) != total.tobytes():
            raise ValueError(f"component {part.name!r} decodes to other symbols than were encoded")
        tops = torch.full((count,), _top_of(part))
        tops[anchors] = self.anchor_top
        values = symbols * _step(torch.from_numpy(scales), tops.unsqueeze(1))
        values[others] += values[anchors][which[others]]
        return values

    def _roles(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the anchors, the other tokens, and for each token the index of its anchor."""
        tokens = torch.arange(count)
        first = tokens % self.group_tokens == 0
        return tokens[first], tokens[~first], tokens // self.group_tokens

    def _family(self, top: int) -> Any:
        return self._stream.model.QuantizedGaussian(-top, top)


_LEAST_SPREAD: Final = np.float16(0.1)  # a narrower one would make a symbol beside the mean cost dozens of bits


def _top_of(part: Part) -> int:
    """The largest symbol: of 32 levels 15, of 16 levels 7."""
    fine = 10 if part.name.startswith(("k", "cross_k")) else 2
    return 15 if part.layer < fine else 7


def _step(scales: torch.Tensor, top: int | torch.Tensor) -> torch.Tensor:
    return scales.float().unsqueeze(1) / top


def _by_symbol(model: Sequence[np.ndarray], rows: int) -> list[np.ndarray]:
    return [np.tile(parameter.astype(np.float64), rows) for parameter in model]


def _is_wide(part: Part) -> bool:
    return part.dtype.is_floating_point and part.dtype.itemsize > 1


def _floats(part: Part, raw: torch.Tensor) -> torch.Tensor:
    raw = raw.clone() if raw.storage_offset() % part.dtype.itemsize else raw
    return raw.view(part.dtype).view(-1, part.heads, part.width)


_KINDS: Final = {kind.name: kind for kind in (Codec, Int8, Int4, CacheGen)}
CODECS: Final = tuple(_KINDS)


def codec_named(name: str) -> Codec:
    """Return the codec of this name; ``SpecError`` for another, or where its package is missing."""
    check_choice("codec", name, CODECS)
    return _KINDS[name]()
