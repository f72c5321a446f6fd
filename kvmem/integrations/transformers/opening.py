"""From a model of transformers to the memory for its cache, and to one layer object for each of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DummyLayer

from kvmem.allocator import Allocator
from kvmem.arguments import brief
from kvmem.errors import SpecError
from kvmem.integrations.dense_batch import DenseBatch
from kvmem.integrations.transformers.layer import KVMemLayer
from kvmem.spec import CacheSpec

__all__ = ["CROSS", "SELF", "as_stored", "has_cross_attention", "make_layers", "open_rows", "read_prompt"]

# The components that attention passes to update() as keys and values: K and V, or under MLA the latent and rotated key.
SELF = (("k", "v"), ("ckv", "kpe"))
CROSS = (("cross_k", "cross_v"),)

# Models whose attention calls view() on cached keys, which fails on strided memory.
_DENSE = frozenset({"gpt_neox_japanese"})

# Models in which every token's KV depends on the picture or protein, for which there is no id.
_MORE_THAN_IDS = frozenset({"evolla", "idefics"})


def open_rows(
    source: PreTrainedModel | PreTrainedConfig | Allocator,
    max_batch: int | None,
    max_tokens: int | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    assume: str | None,
    options: dict[str, Any],
) -> DenseBatch:
    """Return rows in the given allocator, or in a new one for the given model or config; see ``KVMemCache``."""
    if isinstance(source, Allocator):
        given = {
            "max_batch": max_batch, "max_tokens": max_tokens, "dtype": dtype, "device": device, "assume": assume,
            **options,
        }  # fmt: skip
        if wrong := [name for name, value in given.items() if value is not None]:
            raise SpecError(f"{', '.join(wrong)}: an allocator has its own; leave out what comes after it")
        return DenseBatch(source)
    if max_batch is None or max_tokens is None:
        raise SpecError(
            f"max_batch, max_tokens: got {max_batch} and {max_tokens}; a cache needs both, and they cost only addresses"
        )
    config = source
    if isinstance(source, PreTrainedModel):
        config, dtype = source.config, dtype or source.dtype
        if options.get("pool") is None:  # else the pool's device
            device = device or source.device
    spec = CacheSpec.from_config(as_stored(config), dtype=dtype, assume=assume)
    # Twice the rows, because beams are forked before those that they replace are freed.
    alloc = Allocator(spec, max_sequences=2 * max_batch, max_tokens=max_tokens, device=device, **options)
    rows = DenseBatch(alloc, max_batch)
    rows.dense = getattr(config, "model_type", None) in _DENSE
    rows.more_than_ids = getattr(config, "model_type", None) in _MORE_THAN_IDS
    rows.placeholders = _placeholders(config)
    if isinstance(source, PreTrainedModel):
        text = source.config.get_text_config(decoder=True)  # of an encoder-decoder, a copy
        rows.config = text if any(text is part for part in vars(source.config).values()) else source.config
    return rows


def _placeholders(config: PreTrainedConfig) -> dict[str, int]:
    names = [f"{kind}_token_{word}" for kind in ("image", "video", "audio") for word in ("id", "index")]
    parts = [getattr(config, name, None) for name in ("vision_config", "audio_config")]  # as Phi 4 has them
    found = [(name, getattr(part, name, None)) for part in (*parts, config) for name in names]
    return {name: value for name, value in found if isinstance(value, int)}


def as_stored(config: PreTrainedConfig) -> PreTrainedConfig | Mapping[str, Any]:
    """Return the config, changed for models whose cache in transformers has another shape than the config says."""
    if getattr(config, "model_type", None) == "falcon" and config.new_decoder_architecture:
        # K and V are broadcast to all query heads before they are cached.
        return {**config.to_dict(), "num_kv_heads": config.num_attention_heads}
    return config


def has_cross_attention(rows: DenseBatch) -> bool:
    """Return whether layers have cross attention beside self attention; ``SpecError`` if some have it instead."""
    by_growth: dict[str, set[int]] = {"token": set(), "prefill": set(), "fixed": set()}
    for group in rows.alloc.spec.groups:
        by_growth[group.growth].update(group.layers)
    if alone := sorted(by_growth["prefill"] - by_growth["token"]):
        raise SpecError(
            f"layers {brief(alone)} have cross attention in place of self attention (Mllama), which transformers keeps "
            "in one cache with the others and kvmem's caches do not: use DynamicCache"
        )
    return bool(by_growth["prefill"])


def make_layers(rows: DenseBatch, pairs: tuple[tuple[str, str], ...]) -> list[KVMemLayer | DummyLayer]:
    """Return one object for each layer of the model: a dummy if it caches nothing or reads what an earlier one stored.

    pairs: names of the components that attention stores; each layer takes the first pair that it has, and ``SpecError``
        if it has none.
    """
    spec = rows.alloc.spec
    layers: list[KVMemLayer | DummyLayer] = []
    for number in range(spec.num_layers):
        components = {c.name: c for c in spec.layer_components(number)}
        names = next((pair for pair in pairs if components.keys() >= set(pair)), None)
        if components and names is None:
            raise SpecError(
                f"layer {number} stores {', '.join(components)}; the attention of transformers stores "
                f"{' or '.join(' and '.join(pair) for pair in pairs)}, which this spec does not describe"
            )
        if names is None:
            layers.append(DummyLayer())
            continue
        first = spec.groups[spec.group_of(number, names[0])].layers[0]
        reads_another = components[names[0]].scope == "shared" and number != first
        layers.append(DummyLayer() if reads_another else KVMemLayer(rows, number, names))
    return layers


def read_prompt(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[np.ndarray, list[int]]:
    """Return the ids, int32 [B, tokens], and for each row how many tokens on the left are padding.

    ``SpecError`` for other ids, or for padding that is not on the left.
    """
    right = isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and input_ids.shape[1] > 0
    if not right or input_ids.is_floating_point():
        raise SpecError(f"input_ids: got {_shape_of(input_ids)}; must be ids [B, tokens] of 1 token or more")
    if input_ids.dtype == torch.bool:
        raise SpecError("input_ids: got bools; must be ids")
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < 2**31:
        raise SpecError(f"input_ids: got {int(input_ids.min())} to {int(input_ids.max())}; ids are 0 to 2**31 - 1")
    ids = input_ids.cpu().numpy().astype(np.int32)
    if attention_mask is None:
        return ids, [0] * len(ids)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        raise SpecError(f"attention_mask: got {_shape_of(attention_mask)}; must be of input_ids' shape {ids.shape}")
    seen = attention_mask.cpu().numpy().astype(bool)
    padding = (~seen).sum(axis=1)
    if not (seen == (np.arange(ids.shape[1]) >= padding[:, None])).all():
        raise SpecError(
            "attention_mask: hides tokens after ones that it shows; begin() takes prompts that are padded on the left"
        )
    return ids, padding.tolist()


def _shape_of(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
