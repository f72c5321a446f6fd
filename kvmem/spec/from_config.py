"""Cache specs from published model configs (``config.json``): which layers cache what, and in which shape.

Configs are read by field names, so a family that uses the usual names needs no entry in ``model_families``. A field
that affects the shape of a cache and is not understood is refused with the reason, never guessed: a wrong spec
corrupts results silently, whereas a refusal costs the user a spec written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from kvmem.arguments import MAX_LAYERS, brief, check_size
from kvmem.errors import SpecError
from kvmem.spec import model_families as families
from kvmem.spec.cache_spec import CacheSpec, Group
from kvmem.spec.component import Component, Rope, Scope
from kvmem.spec.dtypes import parse_dtype
from kvmem.spec.model_names import KNOWN

__all__ = ["spec_from_config"]


class _Fields:
    """A config completed with the defaults of its family. Look-ups check types; errors name field, value and family."""

    def __init__(self, values: Mapping[str, Any], nested: bool, assumed: str | None) -> None:
        stated = values.get("model_type") or ""
        if not isinstance(stated, str):
            raise SpecError(f"model_type: got {brief(stated)}; must be a string")
        known = stated in KNOWN or stated in families.REFUSED_FAMILIES
        self.is_known = known or not stated or assumed is not None
        self.family = family = stated if known or assumed is None else assumed
        defaults = families.DEFAULTS.get(family, {}) | (families.NESTED_DEFAULTS.get(family, {}) if nested else {})
        self.values = defaults | dict(values)
        self.where = f" (model_type {stated!r})" if stated else ""

    def get(self, *names: str) -> Any:
        """Return the value of the first of ``names`` that is present and not null, or None."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def size(self, *names: str) -> int | None:
        """Return the positive int under the first of ``names`` that is set, or None; ``SpecError`` for other values."""
        for name in names:
            if self.values.get(name) is not None:
                return check_size(name, self.values[name])
        return None

    def need(self, *names: str) -> int:
        """Return the same as ``size``; ``SpecError`` if none is set."""
        value = self.size(*names)
        if value is None:
            others = f" (nor {', '.join(names[1:])})" if len(names) > 1 else ""
            raise SpecError(f"{names[0]}: missing{others} from the config{self.where}; add the field")
        return value

    def refuse(self, field: str, why: str) -> SpecError:
        return SpecError(f"{field}: got {brief(self.values.get(field))}{self.where}; {why}: {families.BY_HAND}")


def spec_from_config(
    config: Mapping[str, Any] | str | PathLike[str] | object,
    *,
    dtype: torch.dtype | str | None = None,
    block_size: int = 16,
    assume: str | None = None,
) -> CacheSpec:
    """Return the cache spec of a published model, exact to the byte.

    config: a dict; a path to ``config.json`` or to its directory; or an object with ``to_dict()`` (transformers).
    dtype: the element type of the cache; by default what the config states (``dtype`` or ``torch_dtype``).
    block_size: tokens of a block.
    assume: the family by whose rules an unknown ``model_type`` is read, e.g. ``"llama"`` for one that stores K and V of
        each KV head and uses the usual field names. A known ``model_type`` is always read by its own rules.

    Supports MHA, GQA, MQA, MLA, sliding windows on all or some layers, KV shared by layers, and cross attention; of a
    multimodal config, the text decoder. The groups are named ``full``, ``sliding`` and ``cross``; ``full_shared`` and
    ``sliding_shared`` have the layers that read one common copy.

    Raises ``SpecError``, which names field and value, for what is missing, invalid or cannot be described by a spec.
    """
    outer = _load(config)
    values, nested = _decoder_of(outer)
    fields = _Fields(values, nested, _check_assumed(assume))
    _refuse_unknown(fields)
    if dtype is None:
        dtype = fields.get("dtype", "torch_dtype") or outer.get("dtype") or outer.get("torch_dtype")
        if dtype is None:
            raise SpecError(f"dtype: missing from the config{fields.where}; pass dtype=, for example torch.bfloat16")
    num_layers = fields.size(*families.DECODER_LAYERS) or fields.need(*families.LAYERS)
    if num_layers > MAX_LAYERS:
        raise SpecError(f"num_hidden_layers: got {num_layers}{fields.where}; at most {MAX_LAYERS}")
    heads = fields.size(*families.DECODER_HEADS) or fields.need(*families.HEADS)
    groups = _groups(fields, num_layers, heads, parse_dtype(dtype))
    return CacheSpec(groups, num_layers=num_layers, block_size=block_size, num_query_heads=heads)


def _refuse_unknown(fields: _Fields) -> None:
    if (why := families.REFUSED_FAMILIES.get(fields.family)) is not None:
        raise fields.refuse("model_type", why)
    if fields.family in families.ENCODERS and fields.get("is_decoder") is not True:
        raise fields.refuse(
            "model_type", "an encoder keeps no KV between steps (set is_decoder if this one is a decoder)"
        )
    if fields.get("use_bidirectional_attention") is True:
        raise fields.refuse("use_bidirectional_attention", "an encoder keeps no KV between steps")
    for pattern, why in families.REFUSED_FIELDS:
        for field in sorted(_matching(pattern, fields.values)):
            raise fields.refuse(field, why)
    if not fields.is_known:
        raise SpecError(
            f"model_type: got {brief(fields.family)}, which is not known; pass assume='llama' if it stores K and V of "
            f"each KV head and its config has the usual fields, or else {families.BY_HAND}"
        )


def _check_assumed(assume: str | None) -> str | None:
    if assume is not None and (not isinstance(assume, str) or assume not in KNOWN):
        raise SpecError(f"assume: got {brief(assume)}; must be a known model_type, for example 'llama'")
    return assume


def _decoder_of(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """Return the part of a config that describes the decoder, and whether it was nested."""
    nested = False
    while True:
        names = families.TEXT + (families.DECODER if values.get("is_encoder_decoder") is True else ())
        key = next((name for name in names if isinstance(values.get(name), Mapping) and values[name]), None)
        if key is None:
            return values, nested
        # The decoder of an encoder-decoder has cross attention, whatever its own part of the config says.
        part = {"is_decoder": True, "add_cross_attention": True} if key in families.DECODER else {}
        values, nested = {**values[key], **part}, True


def _load(config: object) -> Mapping[str, Any]:
    to_dict = getattr(config, "to_dict", None)
    if isinstance(config, Mapping):
        values: object = config
    elif isinstance(config, (str, PathLike)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SpecError(
                f"config: cannot read {str(path)!r} ({error.strerror}); give a config.json or its directory"
            ) from error
        except ValueError as error:
            raise SpecError(f"config: {str(path)!r} is not JSON ({error})") from error
    elif callable(to_dict):
        values = to_dict()
    else:
        values = config
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise SpecError(f"config: got {brief(values)}; must be a dict by names, a path or an object with to_dict()")
    return values


def _matching(pattern: str, values: Mapping[str, Any]) -> list[str]:
    """Return the names of set fields that match; null, false, zero and empty values mean that a feature is off."""
    stem = pattern.removesuffix("*")
    return [
        name for name, value in values.items() if value and (name.startswith(stem) if stem != pattern else name == stem)
    ]


def _is_encoder_decoder(fields: _Fields) -> bool:
    return fields.get("is_encoder_decoder") is True


def _groups(fields: _Fields, num_layers: int, heads: int, dtype: torch.dtype) -> tuple[Group, ...]:
    kinds = _layer_kinds(fields, num_layers)
    groups = []
    for kind in ("full", "sliding"):
        layers = tuple(layer for layer in range(num_layers) if kinds[layer] == kind)
        window = fields.need("sliding_window") if kind == "sliding" and layers else None
        for name, members, scope in _copies(fields, kind, layers, num_layers):
            ropes = tuple(_rope(fields, layer, kinds) for layer in members)
            components = _self_components(fields, heads, dtype, ropes if scope == "layer" else ropes[:1])
            components = tuple(replace(c, scope=scope) for c in components)
            groups.append(Group(name, components, members, window_tokens=window))
    cross = tuple(layer for layer in range(num_layers) if kinds[layer] == "cross")
    if _is_encoder_decoder(fields) or fields.get("add_cross_attention") is True:
        cross = tuple(range(num_layers))
    if cross:
        pair = _kv(fields, heads, dtype, ("none",))
        components = tuple(replace(c, name=f"cross_{c.name}", growth="prefill") for c in pair)
        groups.append(Group("cross", components, cross, max_tokens=fields.size("max_source_positions")))
    return tuple(groups)


def _layer_kinds(fields: _Fields, num_layers: int) -> list[str]:
    """Return ``full``, ``sliding`` or ``cross`` (cross attention instead of self attention) for each layer."""
    stated = fields.get("layer_types")
    kinds = _implied_kinds(fields, num_layers) if stated is None else _stated_kinds(fields, stated, num_layers)
    cross = fields.get("cross_attention_layers") or ()
    for layer in cross if isinstance(cross, (list, tuple)) else (cross,):
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise SpecError(f"cross_attention_layers: got {brief(layer)}; needs layer numbers under {num_layers}")
        kinds[layer] = "cross"
    return kinds


def _stated_kinds(fields: _Fields, stated: object, num_layers: int) -> list[str]:
    if not isinstance(stated, (list, tuple)) or len(stated) != num_layers:
        raise SpecError(
            f"layer_types: got {brief(stated)}{fields.where}; needs one entry for each of {num_layers} layers"
        )
    known = {"full_attention": "full", "attention": "full", "sliding_attention": "sliding"}
    for entry in stated:
        if not isinstance(entry, str) or entry not in known:
            why = "other layers than full and sliding attention keep states or drop tokens by rules of their own"
            raise SpecError(f"layer_types: got {brief(entry)}{fields.where}; {why}: {families.BY_HAND}")
    kinds = [known[entry] for entry in stated]
    if "sliding" in kinds and fields.get("use_sliding_window") is False:
        raise SpecError(
            f"use_sliding_window: got False{fields.where}; but layer_types has sliding_attention: make them agree"
        )
    return kinds


def _implied_kinds(fields: _Fields, num_layers: int) -> list[str]:
    """Return the kinds of layers of a config without layer_types, by the rule of its family."""
    if not fields.get("sliding_window") or fields.get("use_sliding_window") is False:
        return ["full"] * num_layers
    if (pattern := fields.size("sliding_window_pattern")) is not None:
        return ["sliding" if (layer + 1) % pattern else "full" for layer in range(num_layers)]
    if fields.family in families.SLIDE_FROM_LAYER:
        first = fields.values.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise SpecError(f"max_window_layers: got {brief(first)}{fields.where}; needs a number of full layers")
        return ["full" if layer < first else "sliding" for layer in range(num_layers)]
    if fields.family in families.ALL_SLIDE:
        return ["sliding"] * num_layers
    raise fields.refuse("sliding_window", "which layers slide is not stated; add layer_types to the config, or")


def _copies(
    fields: _Fields, kind: str, layers: tuple[int, ...], num_layers: int
) -> Iterator[tuple[str, tuple[int, ...], Scope]]:
    """Yield the groups of one kind: layers with a copy each, then layers that read one copy (the last of Gemma-3n)."""
    shared = fields.size("num_kv_shared_layers") if fields.values.get("num_kv_shared_layers") != 0 else None
    owners = tuple(layer for layer in layers if layer < num_layers - (shared or 0))
    readers = layers[len(owners) :]
    if readers and not owners:
        raise SpecError(
            f"num_kv_shared_layers: got {shared}{fields.where}; no {kind} layer before them holds the KV they read"
        )
    alone = owners[:-1] if readers else owners
    if alone:
        yield kind, alone, "layer"
    if readers:
        yield f"{kind}_shared", (owners[-1], *readers), "shared"


def _self_components(fields: _Fields, heads: int, dtype: torch.dtype, ropes: tuple[Rope, ...]) -> tuple[Component, ...]:
    if fields.get("kv_lora_rank") is None:
        return _kv(fields, heads, dtype, ropes)
    # MLA: one latent for all heads, and beside it the rotary part of the key.
    latent = Component("ckv", width=fields.need("kv_lora_rank"), dtype=dtype)
    return latent, Component("kpe", width=fields.need("qk_rope_head_dim"), dtype=dtype, rope=ropes)


def _kv(fields: _Fields, heads: int, dtype: torch.dtype, ropes: tuple[Rope, ...]) -> tuple[Component, ...]:
    kv_heads = _kv_heads(fields, heads)
    if heads % kv_heads:
        raise SpecError(
            f"num_key_value_heads: got {kv_heads}{fields.where}; does not divide num_attention_heads {heads}"
        )
    head_dim = fields.size(*families.HEAD_DIM)
    if head_dim is None:
        hidden = fields.need(*families.HIDDEN)
        if hidden % heads:
            raise SpecError(
                f"hidden_size: got {hidden}{fields.where}; num_attention_heads {heads} does not divide it: "
                "give head_dim"
            )
        head_dim = hidden // heads
    rope = ropes[0] if len(set(ropes)) == 1 else ropes
    k = Component("k", heads=kv_heads, width=head_dim, dtype=dtype, rope=rope)
    return k, Component("v", heads=kv_heads, width=fields.size("v_head_dim") or head_dim, dtype=dtype)


def _kv_heads(fields: _Fields, heads: int) -> int:
    attn_config = fields.get("attn_config")  # MPT and DBRX nest the number of KV heads
    if isinstance(attn_config, Mapping) and attn_config.get("kv_n_heads") is not None:
        return check_size("attn_config.kv_n_heads", attn_config["kv_n_heads"])
    # Falcon's larger models set both fields; with the new architecture, multi_query has no effect.
    if fields.get("multi_query") is True and fields.get("new_decoder_architecture") is not True:
        return 1
    return fields.size(*families.DECODER_KV_HEADS, *families.KV_HEADS) or heads


def _rope(fields: _Fields, layer: int, kinds: list[str]) -> Rope:
    """Return how ``layer`` stores its keys: ``post`` if its family rotates them, as published caches do."""
    rotary = any(fields.get(name) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling"))
    if not rotary and (_is_encoder_decoder(fields) or fields.family in families.NO_ROPE):
        return "none"
    if fields.get("alibi") is True or fields.get("position_embedding_type") in families.UNROTATED:
        return "none"
    unrotated = fields.get("no_rope_layers")  # an entry is 1 for a layer that rotates, 0 for one that does not
    if isinstance(unrotated, (list, tuple)) and unrotated:
        if layer >= len(unrotated):
            raise SpecError(f"no_rope_layers: got {len(unrotated)} entries{fields.where}; needs one for each layer")
        return "post" if unrotated[layer] else "none"
    interval = fields.size("no_rope_layer_interval")
    if interval is not None and (layer + 1) % interval == 0:
        return "none"
    skips = fields.family in families.ROPE_ON_SLIDING_ONLY and "sliding" in kinds
    return "none" if skips and kinds[layer] == "full" else "post"
