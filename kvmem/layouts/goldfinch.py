"""GoldFinch (arXiv:2407.12077): a compressed key and the id of each token, from which every attention layer makes its
own K and V; and recurrent states of fixed size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import embedding, layer_norm, pad

from kvmem.arguments import brief, check_bool, check_size
from kvmem.errors import SpecError
from kvmem.layouts.attention import described
from kvmem.layouts.base import Layout, check_spec, of_layer
from kvmem.layouts.reading import TokenReader
from kvmem.layouts.rope import Rope, check_rope
from kvmem.spec import CacheSpec, Component, Group
from kvmem.spec.dtypes import parse_dtype

__all__ = ["GoldFinch", "GoldLayer", "GoldShared", "goldfinch_spec"]

#: What the published model adds to the norm that it divides by.
RMS_EPSILON = 1e-8


def goldfinch_spec(
    *, num_layers: int, d_model: int, dtype: torch.dtype | str, recurrent_layers: int | None = None,
    compression: int = 16, state_width: int = 64, states: bool = True, state_dtype: torch.dtype | str = "float32",
    block_size: int = 16,
) -> CacheSpec:  # fmt: skip
    """Return the spec of a GoldFinch model.

    ======  ======================================  ==================================================================
    c       ``[d_model / compression]``, dtype      of a token, one copy for all GOLD layers: the compressed key
    tok     ``[1]``, int32                          of a token, one copy: its id
    wkv     ``[d_model, state_width]``              of a sequence, in each recurrent layer: a matrix ``[state_width,
                                                    state_width]`` for each head of that width, in state_dtype
    shift   ``[2, d_model]``, dtype                 of a sequence, in each layer: the last inputs of attention (time
                                                    mixing) and of the channel mixing, for their token shift
    ======  ======================================  ==================================================================

    recurrent_layers: how many come first; the others are GOLD layers. Default two thirds, rounded down, as published.
    states: False leaves ``wkv`` and ``shift`` out, for a model that keeps them elsewhere: prefixes are then found
        without snapshots, and are of use only to someone who has the states.

    A token takes ``d_model / compression`` elements and 4 bytes, whatever the number of layers: ``bytes_per_token``
    says so, as the ledger does. In memory each row is padded to 16 bytes, so an id takes 16. ``SpecError`` for sizes
    that do not divide, and for a dtype that is no float.
    """
    check_size("num_layers", num_layers, 2), check_bool("states", states)
    first = num_layers * 2 // 3 if recurrent_layers is None else check_size("recurrent_layers", recurrent_layers, 0)
    if first >= num_layers:
        raise SpecError(f"recurrent_layers: got {first} of {num_layers} layers; at least one must be a GOLD layer")
    for field, part in (("compression", compression), ("state_width", state_width)):
        if check_size("d_model", d_model) % check_size(field, part):
            raise SpecError(f"{field}: got {part}, which does not divide d_model={d_model}")
    kind, state_kind = parse_dtype(dtype, "dtype"), parse_dtype(state_dtype, "state_dtype")
    for field, each in (("dtype", kind), ("state_dtype", state_kind)):
        if not each.is_floating_point or each.itemsize == 1:
            raise SpecError(f"{field}: got {each}; must be a float such as bfloat16: nothing here is quantised")
    gold = tuple(range(first, num_layers))
    groups = [Group("gold", _shared_components(d_model // compression, kind), gold)]
    shift = Component("shift", heads=2, width=d_model, dtype=kind, growth="fixed")
    wkv = Component("wkv", heads=d_model, width=state_width, dtype=state_kind, growth="fixed")
    if states and first:
        groups.append(Group("state", (wkv, shift), tuple(range(first))))
    if states:
        groups.append(Group("gold state", (shift,), gold))
    return CacheSpec(tuple(groups), num_layers=num_layers, block_size=block_size)


def _shared_components(width: int, dtype: torch.dtype) -> tuple[Component, ...]:
    return (
        Component("c", width=width, dtype=dtype, scope="shared", rope="pre"),
        Component("tok", width=1, dtype=torch.int32, scope="shared"),
    )


class _Weights:
    """A dataclass whose fields are tensors."""

    def check(self, where: str, device: torch.device, **shapes: tuple[int, ...]) -> None:
        """``SpecError`` for a tensor of another shape, no float, or on another device."""
        for name, tensor in vars(self).items():
            if not isinstance(tensor, torch.Tensor):
                raise SpecError(f"{where}.{name}: got {described(tensor)}; must be a tensor")
            if tuple(tensor.shape) != shapes[name]:
                raise SpecError(f"{where}.{name}: got shape {tuple(tensor.shape)}; must be {shapes[name]}")
            if not tensor.dtype.is_floating_point or tensor.device != device:
                got = f"{tensor.dtype} on {tensor.device}"
                raise SpecError(f"{where}.{name}: got {got}; must be a float on {device}, as the embedding table")


@dataclass(frozen=True)
class GoldShared(_Weights):
    """The weights that all GOLD layers share; d is ``d_model`` and w the width of ``c``. In brackets, the names of the
    published checkpoints.

    embedding: ``[vocabulary, d]`` (emb.weight). norm: ``[2, d]``, weight and bias of the LayerNorm of an embedding
    (blocks.0.ln0). expand: ``[d + w, d]``, the transpose of w_kv_cache_b.weight: from the normalised embedding, then
    ``c``, to the key that all layers begin with.
    """

    embedding: torch.Tensor
    norm: torch.Tensor
    expand: torch.Tensor


@dataclass(frozen=True)
class GoldLayer(_Weights):
    """The weights with which one GOLD layer makes its K and V; r and R are the ranks of the adapter and of the
    residuals. In brackets, the names of the published checkpoints.

    mix: ``[3, d]``, the constant part of the token shift of the adapter's input, of K and of V (time_maa_v_cache,
    time_maa_k, time_maa_v). adapter_in: ``[d, 2 r]``, adapter_out: ``[2, r, d]``, the part that depends on the token,
    for K and V (time_maa_kv_w1, _w2). residual_in: ``[2, d, R]``, residual_out: ``[2, R, d]``, for K and V (time_key_w1
    and time_value_w1; _w2). norm: ``[2, 2, d]``, weight and bias of the LayerNorm of K, then of V (ln_k, ln_v).
    """

    mix: torch.Tensor
    adapter_in: torch.Tensor
    adapter_out: torch.Tensor
    residual_in: torch.Tensor
    residual_out: torch.Tensor
    norm: torch.Tensor


class GoldFinch(Layout):
    """Stores the compressed key and the id of each token, once for all GOLD layers, and derives K and V of a tile for
    one layer at a time. Exact, apart from rounding ``c`` to the dtype of the cache. (The published code caches the
    expanded keys, ``compression`` times as many elements.)

    The stored bytes mean something else under other weights, the embedding table among them. So a key for what leaves
    the process must contain ``fingerprint``.

    The model itself reads and writes the recurrent states, ``Allocator.tensor(layer, "wkv")`` and ``"shift"``. A state
    belongs to one position: ``Sequence.truncate()`` does not restore it, so ``fork()`` before draft tokens, or keep a
    copy; and a prompt finds a cached prefix only where ``Sequence.snapshot()`` was called.
    """

    def __init__(
        self, spec: CacheSpec, shared: GoldShared, layers: Mapping[int, GoldLayer], *, num_heads: int,
        rope: Rope | None, interleaved: bool = True, tile_tokens: int = 256,
    ) -> None:  # fmt: skip
        """Weights are converted once, to float64 where ``c`` is stored in float64, else to float32; the embedding table
        is used as it is.

        spec: of ``goldfinch_spec``. layers: by number, those of the spec's group ``"gold"``. num_heads: of attention;
        K, V and queries have as many. rope: the rotation of K, which is the last step; None for none. interleaved: it
        pairs elements 2 i and 2 i + 1, as the published model does; False: i and i + half, as ``Rope`` does.
        tile_tokens: what ``attend`` derives at a time. ``SpecError`` for weights that do not fit the spec.
        """
        check_spec(spec)
        self.spec, self.num_heads = spec, check_size("num_heads", num_heads)
        check_rope(rope)
        check_bool("interleaved", interleaved)
        self.rope, self.interleaved, self.tile_tokens = rope, interleaved, check_size("tile_tokens", tile_tokens)
        self.gold_layers, self.width, dtype = _gold_group(spec)
        right = isinstance(layers, Mapping) and all(isinstance(weights, GoldLayer) for weights in layers.values())
        if not right or set(layers) != set(self.gold_layers):
            got = brief(sorted(layers)) if right else described(layers)
            raise SpecError(f"layers: got {got}; must be the spec's GOLD layers, {list(self.gold_layers)}")
        if not isinstance(shared, GoldShared):
            raise SpecError(f"shared: got {brief(shared)}; must be a GoldShared")
        self._check(shared, layers)
        self.head_dim = shared.embedding.shape[1] // self.num_heads
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._shared = GoldShared(shared.embedding, *(t.to(self.dtype) for t in (shared.norm, shared.expand)))
        self._layers = {
            layer: GoldLayer(**{name: tensor.to(self.dtype) for name, tensor in vars(weights).items()})
            for layer, weights in sorted(layers.items())
        }

    def _check(self, shared: GoldShared, layers: Mapping[int, GoldLayer]) -> None:
        """``SpecError`` unless all weights, heads and the rotation have sizes that fit."""
        table = shared.embedding
        if table.ndim != 2 or 0 in table.shape:
            raise SpecError(f"shared.embedding: got shape {tuple(table.shape)}; must be [vocabulary, d_model]")
        d = table.shape[1]
        shared.check("shared", table.device, embedding=(len(table), d), norm=(2, d), expand=(d + self.width, d))
        for layer, weights in layers.items():
            r, big = weights.adapter_in.shape[-1] // 2, weights.residual_in.shape[-1]
            weights.check(
                f"layers[{layer}]", table.device, mix=(3, d), adapter_in=(d, 2 * r), adapter_out=(2, r, d),
                residual_in=(2, d, big), residual_out=(2, big, d), norm=(2, 2, d),
            )  # fmt: skip
        if d % self.num_heads:
            raise SpecError(f"num_heads: got {self.num_heads}, which does not divide d_model={d}")
        if self.rope is not None and 2 * len(self.rope.inv_freq) != d // self.num_heads:
            turned = f"{2 * len(self.rope.inv_freq)} elements of a head"
            raise SpecError(f"rope: turns {turned}; GOLD layers turn all, {d // self.num_heads} with these num_heads")
        widths = {group.widths("shift", group.layers[0])[0] for group in self.spec.groups if group.growth == "fixed"}
        if widths - {d}:
            raise SpecError(f"spec: its states are for d_model={widths.pop()}; the embedding table is for {d}")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, as 64 hex digits, of what K and V depend on beside the stored bytes: the spec, the options and all
        weights, the embedding table among them. Equal in every process. Cost: reads all weights once.
        """
        angles = None if self.rope is None else (self.rope.factor, self.rope.inv_freq.tolist())
        digest = hashlib.sha256(repr((self.spec.fingerprint, self.num_heads, angles, self.interleaved)).encode())
        everything: list[_Weights] = [self._shared, *self._layers.values()]
        for weights in everything:
            for name, tensor in vars(weights).items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def encode(self, layer: int, *values: torch.Tensor, positions: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """values: c, ``[T, d_model / compression]``, and the token ids, integers ``[T]``.

        layer: any GOLD layer. They read one copy, so write once for all of them. ``SpecError`` for an id that is not in
        the vocabulary; on a GPU ids are not looked at, because that would wait for the device.
        """
        of_layer(self._layers, layer)
        if len(values) != 2 or values[0].shape[1:] != (self.width,) or values[1].shape != values[0].shape[:1]:
            raise SpecError(f"values: got {described(values)}; must be c, [T, {self.width}], and the token ids, [T]")
        c, ids = values
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise SpecError(f"values: got token ids of {ids.dtype}; must be integers")
        known = len(self._shared.embedding)
        if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < known:
            got = f"from {int(ids.min())} to {int(ids.max())}"
            raise SpecError(f"values: got token ids {got}; the embedding table has 0 to {known - 1}")
        return {"c": c.unsqueeze(1), "tok": ids.to(torch.int32)[:, None, None]}

    def derive(self, reader: TokenReader, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """New tensors. Each token is mixed with the one before it, so a tile reads one row more; what comes before the
        first token is zero. Cost: a few torch calls a tile; for each token about ``d_model**2 * (1 + 1 /
        compression)`` multiplications, which every layer repeats, and those of the adapter and the residuals.
        """
        weights = of_layer(self._layers, reader.layer)
        base = self._base(reader, max(first - 1, 0), end)
        if first == 0:
            base = pad(base, (0, 0, 1, 0))
        now, before = base[:, 1:], base[:, :-1]  # [2, n, d]: of K and of V
        step = before - now
        adapter = torch.tanh((now[1] + step[1] * weights.mix[0]) @ weights.adapter_in)
        chosen = torch.stack(adapter.chunk(2, dim=1)) @ weights.adapter_out
        mixed = now + step * (weights.mix[1:].unsqueeze(1) + chosen)
        mixed = mixed + torch.tanh(mixed @ weights.residual_in) @ weights.residual_out
        scale, bias = weights.norm.unsqueeze(2).unbind(1)
        k, v = (layer_norm(mixed, mixed.shape[-1:]) * scale + bias).view(2, end - first, self.num_heads, self.head_dim)
        return self._rotate(k, torch.arange(first, end, device=k.device)), v

    def _base(self, reader: TokenReader, first: int, end: int) -> torch.Tensor:
        """Return what every GOLD layer begins with, ``[2, n, d]``: the expanded key, and the normalised embedding."""
        c = reader.rows("c", first, end).squeeze(1).to(self.dtype)
        ids = reader.rows("tok", first, end).flatten()
        rows = embedding(ids, self._shared.embedding).to(self.dtype)
        x = layer_norm(rows, rows.shape[-1:], *self._shared.norm)
        return _rms_norm(torch.stack((torch.cat((x, c), dim=-1) @ self._shared.expand, x)))

    def _rotate(self, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.rope is None:
            return k
        if not self.interleaved:
            return self.rope.apply(k, positions)
        halves = torch.cat((k[..., ::2], k[..., 1::2]), dim=-1)
        return torch.stack(self.rope.apply(halves, positions).chunk(2, dim=-1), dim=-1).flatten(-2)


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / (norm / math.sqrt(x.shape[-1]) + RMS_EPSILON)


def _gold_group(spec: CacheSpec) -> tuple[tuple[int, ...], int, torch.dtype]:
    """Return the layers of the spec's group ``"gold"``, the width of ``c``, and its dtype."""
    for group in spec.groups:
        if group.name == "gold" and [component.name for component in group.components] == ["c", "tok"]:
            (width,), dtype = group.widths("c", group.layers[0]), group.component("c").dtype
            if group.components == _shared_components(width, dtype) and group.window_tokens is None:
                return group.layers, width, dtype
    raise SpecError(f"spec: got groups {[g.name for g in spec.groups]}; GoldFinch takes what goldfinch_spec() returns")
