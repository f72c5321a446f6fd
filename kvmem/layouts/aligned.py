"""AlignedKV (arXiv:2409.16546): K and V in bit planes, of which attention reads no more than the result can show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import gcd

import torch

from kvmem import _core
from kvmem.arguments import check_choice, check_size
from kvmem.errors import SpecError
from kvmem.kernels.blocks import Impl, pick
from kvmem.layouts.attention import Partial, masked_scores, normalise
from kvmem.layouts.base import Layout, check_spec
from kvmem.layouts.planes import (
    BLOCK,
    FORMATS,
    Format,
    bits_of,
    cut_planes,
    join_planes,
    open_nibbles,
    split_columns,
    split_planes,
)  # fmt: skip
from kvmem.layouts.reading import TokenReader
from kvmem.spec import CacheSpec, Component, Group

__all__ = ["AlignedKV", "key_levels", "value_levels"]

#: The least that memory is read in.
SECTOR_BYTES = 32
#: How many tokens the size of the output is estimated from.
ESTIMATE_TOKENS = 32
#: Where more queries than these share a read, hardly anything can be left out.
MOST_QUERIES = 8
#: Stands for the exponent of zero.
_NOTHING = -(1 << 16)


class AlignedKV(Layout):
    """Stores K (after rotation) and V whole, and reads of each channel of K and each token of V as many bits as matter.

    A product that is much smaller than the sum it is added to loses its low bits there, so they need not be read. This
    saves reads, not memory. ``derive`` is exact, and so is ``attend`` for more than 8 queries of a sequence (prompts);
    for fewer (decoding) it leaves out bits and assumes the middle of what they can be. How many it leaves out depends
    on the data: many where a few channels of K are much larger than the others and a few tokens have most of the
    weight, few for random data. An output depends on no bit that was not read. Measured with 4 of 128 channels 16 times
    larger, over 2,048 tokens: fp16 reads 29 % fewer bytes with a relative error of 1.5e-3, bf16 19 % with 1.1e-2. Where
    V is alike in all tokens, what is left out adds up: to 4e-3 (fp16) and 3e-2 (bf16) at worst in what was tried.

    A block of 64 tokens lies in the rows of its tokens: K as ``[channels, 64]``, so that a channel can be left out; V
    row by row, so that a token can; ``max_exponent`` as the largest biased exponent of each channel of K, then of V. K
    is encoded when its block is complete; ``k_tail`` holds the newest two blocks as they were written. Reads are
    counted by plane (``k.high``, ``k.mid``, ``k.low``, and so for V) in whole sectors of 32 bytes.
    """

    def __init__(self, spec: CacheSpec, *, guard: int = 1, impl: Impl | None = None) -> None:
        """spec: plain K and V in fp16 or bf16 with ``block_size=64``, as ``CacheSpec.kv()`` gives it. guard: bits to
        read beyond those that the rules ask for. impl: of ``attend``; default Triton for a cache on a GPU, where it is
        installed, else torch. Queries in float64 always take torch.

        ``SpecError`` for a sliding window, for another dtype or block size, where K and V differ in shape, and where
        64 does not divide KV heads x width: a burst would not lie whole in a row.
        """
        self.guard = check_size("guard", guard, 0, -_NOTHING)
        if impl is not None:
            check_choice("impl", impl, ("torch", "triton"))
        group, k, v = _checked(spec)
        self.impl, self.dtype, self.format = impl, k.dtype, FORMATS[k.dtype]
        planes = tuple(replace(c, planes=self.format.planes) for c in (k, v))
        widths = tuple(group.row_bytes("k", layer) // BLOCK for layer in group.layers)  # 2 bytes a channel and block
        exponents = Component("max_exponent", width=widths, dtype=torch.uint8)
        groups = (
            Group("all", planes, group.layers),
            # A group of its own: beside K and V, rows this short would put bursts across sectors.
            Group("exponents", (exponents,), group.layers),
            Group("tail", (replace(k, name="k_tail"),), group.layers, window_tokens=2 * BLOCK),
        )
        self.spec = CacheSpec(
            groups, num_layers=spec.num_layers, block_size=BLOCK, num_query_heads=spec.num_query_heads
        )

    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """values: k (after rotation) and v, ``[T, KV heads, width]`` each."""
        shape = (len(positions), *self._shape(layer))
        if [(tuple(x.shape), x.is_floating_point()) for x in values] != [(shape, True)] * 2:
            got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in values)
            raise SpecError(f"values: got {got}; must be k and v, floats of shape {shape}")
        k, v = values
        return {"k_tail": k, "v": split_planes(v.to(self.dtype)).unsqueeze(1)}

    def tail(self, layer: int) -> tuple[str, ...]:
        """K as it was written, and V, which is encoded, for the exponents of the block."""
        return "k_tail", "v"

    def encode_blocks(self, layer: int, tail: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """K in planes, and the largest exponents of K and V."""
        k, v = tail["k_tail"], join_planes(tail["v"].squeeze(2), self._shape(layer)[0], self.dtype)
        # The largest magnitude has the largest exponent.
        largest = torch.stack([(x.view(torch.int16) & 0x7FFF).amax(1) for x in (k, v)], dim=1)
        exponents = self.format.exponents(largest).to(torch.uint8).view(len(k), BLOCK, 1, -1)
        return {"k": split_columns(k).unsqueeze(2), "max_exponent": exponents}

    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Every bit that was written. Blocks of K are read whole."""
        heads, width = self._shape(reader.layer)
        complete = _complete(reader.length)
        if reader.device.type == "cpu" and self._joins(reader, first, end):
            both = torch.empty(2, end - first, heads, width, dtype=self.dtype)
            self._join(reader, first, end, *both)
            return both[0], both[1]
        start, stop = _complete(first), min(_complete(end + BLOCK - 1), complete)
        tail = reader.rows("k_tail", complete, max(end, complete))
        levels = torch.full((heads, width), 2, device=tail.device)
        k = self._keys(reader, levels, start, max(start, stop))
        v = self._read(reader, "v", levels[:1, :1].expand(end - first, heads), first, end)
        return torch.cat((k, tail))[first - start : end - start], self._numbers(v)

    def derive_into(self, reader: TokenReader, first: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """On the CPU in one pass over the memory (csrc/codec), for the layout's own dtype."""
        if k.device.type == "cpu" and k.dtype == v.dtype == self.dtype and self._joins(reader, first, end):
            return self._join(reader, first, end, k, v)
        super().derive_into(reader, first, end, k, v)

    def _joins(self, reader: TokenReader, first: int, end: int) -> bool:
        """Whether these tokens are whole blocks of K, and what lies in the tail."""
        return first % BLOCK == 0 and (end % BLOCK == 0 or end >= _complete(reader.length))

    def _join(self, reader: TokenReader, first: int, end: int, k: torch.Tensor, v: torch.Tensor) -> None:
        whole = max(first, min(end, _complete(reader.length)))
        _core.join_columns(k[: whole - first], reader.rows("k", first, whole, count=False))
        if whole < end:
            k[whole - first :] = reader.rows("k_tail", whole, end)
        _core.join_planes(v, reader.rows("v", first, end, count=False))
        for component, numbers in (("k", k[: whole - first].numel()), ("v", v.numel())):
            for plane, bytes in (("high", numbers), ("mid", numbers // 2), ("low", numbers // 2)):
                reader.count_read(f"{component}.{plane}", bytes)

    def attend(
        self, q: torch.Tensor, reader: TokenReader, *, scale: float | None = None, causal: bool = True
    ) -> Partial:
        """As ``Layout.attend``; up to 8 queries read only the bits that the rules ask for. Queries that share a KV head
        share its reads, so each bit is read that one of them needs. Cost: the device is waited for a few times, to
        count what was read.
        """
        if reader.length == 0 or not 0 < len(q) <= MOST_QUERIES:
            return super().attend(q, reader, scale=scale, causal=causal)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        complete = _complete(reader.length)
        tail = reader.rows("k_tail", complete, reader.length)
        newest = masked_scores(q, tail, first=complete, length=reader.length, scale=scale, causal=causal)  # checks q
        k_top, v_top = self._largest_exponents(reader, tail)
        levels = key_levels(q, k_top, self.format, self.guard)
        older = self._scores(q, reader, levels, scale, causal) if complete else newest[..., :0]
        weights, lse = normalise(torch.cat((older, newest), dim=-1))
        levels = value_levels(weights, self._magnitude(weights, reader), v_top, self.format, self.guard)
        return self._weighted(weights, reader, levels), lse

    # --- what is read ---

    def _largest_exponents(self, reader: TokenReader, tail: torch.Tensor) -> torch.Tensor:
        """Return the largest biased exponent of each channel over all tokens, of K and of V: ``[2, KV heads, width]``.

        tail: K of the incomplete block. What V has there is seen in the first planes of its rows.
        """
        heads, width = self._shape(reader.layer)
        complete = _complete(reader.length)
        blocks = reader.rows("max_exponent", 0, complete).reshape(-1, 2, heads, width).int()
        floor = torch.full((len(tail), heads), self.format.floor, device=tail.device)
        values = self._read(reader, "v", floor, complete, reader.length)
        newest = torch.stack([self.format.exponents(bits) for bits in (bits_of(tail), values)], dim=1)
        return torch.cat((blocks, newest)).amax(0)

    def _keys(self, reader: TokenReader, levels: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return K of whole blocks, ``[n, KV heads, width]``; levels: ``[KV heads, width]``."""
        heads, width = levels.shape
        blocks = (end - first) // BLOCK
        bursts = levels.view(BLOCK, -1).repeat(blocks, 1)
        bits = self._read(reader, "k", bursts, first, end).view(blocks, heads, width, BLOCK)
        return self._numbers(bits).permute(0, 3, 1, 2).reshape(-1, heads, width)

    def _magnitude(self, weights: torch.Tensor, reader: TokenReader) -> torch.Tensor:
        """Return an estimate of the size of each element of the output, ``[query heads, n, width]``: the sum of weight
        times absolute value, over the tokens with the largest weights of a KV head, from their first planes.
        """
        heads, width = self._shape(reader.layer)
        queries, new, tokens = weights.shape
        grouped = weights.view(heads, queries // heads, new, tokens)
        chosen = grouped.amax((1, 2)).topk(min(ESTIMATE_TOKENS, tokens)).indices.T  # [tokens, KV heads]
        read = torch.full((tokens, heads), -1, device=weights.device).scatter_(0, chosen, self.format.floor)
        _count(reader, "v", read, width)
        blocks, ids = reader.blocks("v", 0, -(-tokens // BLOCK))
        at = (ids[chosen // BLOCK], chosen % BLOCK, torch.arange(heads, device=ids.device).expand_as(chosen))
        values = self._numbers(_gather(blocks, at, torch.full_like(chosen, self.format.floor), heads)).abs()
        picked = grouped.gather(-1, chosen.T[:, None, None].expand(*grouped.shape[:3], -1))
        return torch.einsum("hgqt,thd->hgqd", picked, values.to(weights.dtype)).flatten(0, 1)

    def _read(self, reader: TokenReader, component: str, levels: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Return the bits of rows ``[first, end)``, ``[n, units, elements]``, as ``_gather`` does, and count them.

        levels: ``[n, units]``; a unit is a burst of a row of K, or a head of a row of V.
        """
        blocks, ids = reader.blocks(component, first // BLOCK, -(-end // BLOCK))
        row = torch.arange(first % BLOCK, first % BLOCK + end - first, device=ids.device)[:, None]
        units = levels.shape[1]
        unit = torch.arange(units, device=ids.device)
        at = tuple(index.expand(levels.shape) for index in (ids[row // BLOCK], row % BLOCK, unit))
        bits = _gather(blocks, at, levels, units)
        _count(reader, component, levels, bits.shape[-1])
        return bits

    # --- the two sums, in torch or in Triton ---

    def _scores(
        self, q: torch.Tensor, reader: TokenReader, levels: torch.Tensor, scale: float, causal: bool
    ) -> torch.Tensor:
        """Return the scores of the complete blocks, as ``masked_scores`` does."""
        blocks, ids = reader.blocks("k")
        if self._pick(blocks, q.dtype) == "torch":
            keys = self._keys(reader, levels, 0, _complete(reader.length))
            return masked_scores(q, keys, first=0, length=reader.length, scale=scale, causal=causal)
        from kvmem.layouts import aligned_triton

        _count(reader, "k", levels.view(BLOCK, -1).repeat(len(ids), 1), BLOCK)
        return aligned_triton.scores(q, blocks, ids, levels, self.dtype, reader.length, scale=scale, causal=causal)

    def _weighted(self, weights: torch.Tensor, reader: TokenReader, levels: torch.Tensor) -> torch.Tensor:
        """Return the sum of V with these weights, ``[n, query heads, width]``."""
        blocks, ids = reader.blocks("v", 0, -(-reader.length // BLOCK))
        if self._pick(blocks, weights.dtype) == "torch":
            v = self._numbers(self._read(reader, "v", levels, 0, reader.length))
            grouped = weights.view(v.shape[1], -1, *weights.shape[1:])
            return torch.einsum("hgqk,khd->qhgd", grouped, v.to(weights.dtype)).flatten(1, 2)
        from kvmem.layouts import aligned_triton

        _count(reader, "v", levels, self._shape(reader.layer)[1])
        return aligned_triton.weighted(weights, blocks, ids, levels, self.dtype)

    def _pick(self, blocks: torch.Tensor, dtype: torch.dtype) -> Impl:
        return "torch" if dtype == torch.float64 else pick(blocks, self.impl)

    def _numbers(self, bits: torch.Tensor) -> torch.Tensor:
        return bits.to(torch.int16).view(self.dtype)

    def _shape(self, layer: int) -> tuple[int, int]:
        group = self.spec.groups[0]
        return group.heads("k", layer), group.widths("k", layer)[0]


# --- the rules ---


def key_levels(q: torch.Tensor, largest: torch.Tensor, format: Format, guard: int) -> torch.Tensor:
    """Return the level of each channel of K, int32 ``[KV heads, width]``, by how far its products can lie below the
    largest product of the head; the closest of all queries that share the KV head counts.

    q: ``[n, query heads, width]``. largest: biased exponents ``[KV heads, width]``. A channel that holds infinity or
    NaN is read whole, and the others as if it were not there.
    """
    heads, width = largest.shape
    sizes = _exponent(q).view(len(q), heads, -1, width) + largest.unsqueeze(1)
    whole = largest == format.top
    delta = sizes.masked_fill(whole.unsqueeze(1), _NOTHING).amax(-1, keepdim=True) - sizes
    return format.levels(delta.amin((0, 2)), guard).masked_fill(whole, 2)


def value_levels(
    weights: torch.Tensor, magnitude: torch.Tensor, largest: torch.Tensor, format: Format, guard: int
) -> torch.Tensor:
    """Return the level of each token of V, int32 ``[tokens, KV heads]``, by how far weight times value can lie below
    the output, in the channel where it comes closest; the closest of all queries that share the KV head counts.

    weights: ``[query heads, n, tokens]``. magnitude: an estimate of the output, ``[query heads, n, width]``, of which
    half is relied on. largest: biased exponents ``[KV heads, width]``. Heads that hold infinity or NaN are read whole.
    """
    heads = len(largest)
    output = _exponent(magnitude).view(heads, -1, *magnitude.shape[1:]) - 1
    # The bias of the exponents is half of the largest.
    room = (output + format.top // 2 - largest[:, None, None]).amin(-1, keepdim=True)
    delta = room - _exponent(weights).view(heads, -1, *weights.shape[1:])
    whole = (largest == format.top).any(-1)
    return format.levels(delta.amin((1, 2)), guard).masked_fill(whole.unsqueeze(1), 2).T


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """Return ``floor(log2(|x|))`` as int32."""
    return (torch.frexp(x).exponent - 1).masked_fill(x == 0, _NOTHING)


# --- reads ---


def _gather(blocks: torch.Tensor, at: tuple[torch.Tensor, ...], levels: torch.Tensor, units: int) -> torch.Tensor:
    """Return the bits of units, int32 ``[*levels.shape, n]``; of planes above a unit's level nothing is read, and the
    middle of what they can hold is assumed.

    blocks: ``[num_blocks, 64, 1, row bytes]``. at: block, row and unit, each of the shape of ``levels``.
    """
    high, *nibbles = cut_planes(blocks.squeeze(2), units)
    bits = high[at].int() << 8
    for level, (plane, shift) in enumerate(zip(nibbles, (4, 0), strict=True), start=1):
        read = levels >= level
        bits[read] |= open_nibbles(plane[tuple(index[read] for index in at)]) << shift
    return bits | torch.tensor((0x80, 0x08, 0), dtype=torch.int32, device=bits.device)[levels].unsqueeze(-1)


def _count(reader: TokenReader, component: str, levels: torch.Tensor, elements: int) -> None:
    """Count the sectors that reading units of a row touches. levels: ``[rows, units]``, -1 for what is not read."""
    for level, (plane, bytes) in enumerate((("high", elements), ("mid", elements // 2), ("low", elements // 2))):
        piece = gcd(bytes, SECTOR_BYTES)
        pieces = (levels >= level).repeat_interleave(bytes // piece, dim=-1)
        sectors = pieces.unfold(-1, SECTOR_BYTES // piece, SECTOR_BYTES // piece).any(-1).sum()
        reader.count_read(f"{component}.{plane}", int(sectors) * SECTOR_BYTES)


def _complete(tokens: int) -> int:
    return tokens // BLOCK * BLOCK


# --- refusals ---


def _checked(spec: CacheSpec) -> tuple[Group, Component, Component]:
    """Return the only group of a spec of plain K and V, and both; ``SpecError`` for what cannot be cut into planes."""
    check_spec(spec)
    names = [sorted(component.name for component in group.components) for group in spec.groups]
    if names != [["k", "v"]]:
        raise SpecError(f"spec: got groups of {names}; AlignedKV takes one, of k and v, as CacheSpec.kv() gives it")
    (group,) = spec.groups
    k, v = group.component("k"), group.component("v")
    if group.window_tokens is not None:
        raise SpecError(f"window_tokens: got {group.window_tokens}; AlignedKV has full attention only: use None")
    like = replace(k, name="v", rope=v.rope)
    if v != like or (k.growth, k.scope, k.planes) != ("token", "layer", ()) or k.unequal or k.ragged:
        raise SpecError(f"spec: got {k} and {v}; both must be of one shape and dtype, by layer and token, and not cut")
    if k.dtype not in FORMATS:
        raise SpecError(f"dtype: got {k.dtype}; must be torch.float16 or torch.bfloat16, which planes are cut from")
    if group.block_size != BLOCK:
        raise SpecError(f"block_size: got {group.block_size}; must be {BLOCK}, the tokens that a burst of K holds")
    for layer in group.layers:
        heads, width = group.heads("k", layer), group.widths("k", layer)[0]
        if width % 2:
            raise SpecError(
                f"head_dim: got {width}; must be even, as bytes hold two nibbles: the nearest is {width + 1}"
            )
        if heads * width % BLOCK:
            nearest = max(BLOCK, round(heads * width / BLOCK) * BLOCK)
            raise SpecError(
                f"num_kv_heads x head_dim: got {heads} x {width} = {heads * width}; must be a multiple of {BLOCK}, so "
                f"that the burst of a channel lies whole in the row of one token: the nearest is {nearest}"
            )
    return group, k, v
