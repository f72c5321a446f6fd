"""What the plug-in knows of vLLM's blocks: where they lie, what their bytes depend on, and the keys that follow.

A block is stored whole, as opaque bytes, because a kernel may order them as it likes (vLLM's CPU kernel packs K inside
a block). So the key covers everything that the order depends on, beside the tokens: ``fingerprint``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import lcm
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import torch

from kvmem import SpecError
from kvmem.events.digests import encode_key, key_marks, tag_of_block
from kvmem.integrations.vllm.memory import Placement
from kvmem.integrations.weights import weights_name
from kvmem.tiers.keys import BlockKeys

__all__ = ["Block", "Chain", "Group", "Load", "Name", "Report", "Step", "chain_of", "groups_of", "ranks_of", "tier_key"]

Name: TypeAlias = tuple[int, bytes]
"""A group, and the digest of all tokens up to the end of a block."""

_SERVED: Final = {"FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "SlidingWindowMLASpec"}

# What changes a picture or video between the item that a request names and the model's input.
_IMAGES: Final = ("mm_processor_kwargs", "media_io_kwargs", "video_pruning_rate", "video_pruning_method")


class Block(NamedTuple):
    """A block of vLLM, and what it holds or will hold."""

    name: Name
    block_id: int


@dataclass
class Load:
    """Blocks that a request waits for, in the order of its tokens."""

    request_id: str
    blocks: list[Block]


@dataclass
class Step:
    """What the scheduler's half tells the workers, once a step. released: blocks whose memory is not needed. waits: a
    request waits for the answer of a shared tier.
    """

    loads: list[Load] = field(default_factory=list)
    saves: list[Block] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    waits: bool = False


@dataclass
class Report:
    """What workers tell the scheduler's half. saved, held: on how many ranks a block came to some tier, to host memory;
    dropped: was not saved; gone: left host memory; failed: was not loaded, and ``requests`` waited for it.
    """

    saved: Counter[Name] = field(default_factory=Counter)
    held: Counter[Name] = field(default_factory=Counter)
    dropped: set[Name] = field(default_factory=set)
    gone: set[Name] = field(default_factory=set)
    failed: set[Name] = field(default_factory=set)
    requests: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def add(self, other: Report) -> None:
        """Take in what another rank reports."""
        for name, known in vars(self).items():
            known.update(vars(other)[name])  # a Counter adds


@dataclass(frozen=True)
class Group:
    """A KV cache group. layers: where each layer keeps its blocks, by name. window_tokens: 0 for full attention.

    A payload is a block of all layers, one behind the other, in this order.
    """

    block_size: int
    window_tokens: int
    layers: dict[str, Placement]

    @property
    def payload_bytes(self) -> int:
        return sum(place.page_bytes for place in self.layers.values())

    def first_needed(self, tokens: int) -> int:
        """Return the first block that attention after so many tokens reads."""
        return max(0, tokens - self.window_tokens + 1) // self.block_size if self.window_tokens else 0


def groups_of(kv_cache_config: Any) -> tuple[Group, ...]:
    """Return the groups of vLLM's ``KVCacheConfig``. ``SpecError`` if one is of a kind that is not served."""
    places: dict[str, tuple[int, int]] = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        for i, layer in enumerate(tensor.layers):
            places[layer] = (tensor.offset + i * tensor.layer_stride, tensor.block_stride)
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        each = getattr(group.kv_cache_spec, "kv_cache_specs", None) or dict.fromkeys(
            group.layer_names, group.kv_cache_spec
        )
        kinds = {type(spec).__name__ for spec in each.values()}
        windows = {_window(spec) for spec in each.values()}
        if kinds - _SERVED or len(windows) != 1 or group.is_eagle_group or group.host_resident:
            raise SpecError(
                f"kvmem's connector serves full attention and sliding windows, and this model has a group of "
                f"{'draft layers' if group.is_eagle_group else ', '.join(sorted(kinds))}; serve it without"
            )
        layers = {name: Placement(*places[name], each[name].page_size_bytes) for name in group.layer_names}
        groups.append(Group(group.kv_cache_spec.block_size, windows.pop(), layers))
    if not groups:
        raise SpecError("kvmem's connector: this model has no KV cache")
    return tuple(groups)


def _window(spec: Any) -> int:
    return int(spec.sliding_window) if type(spec).__name__.startswith("SlidingWindow") else 0


def ranks_of(vllm_config: Any, kv_cache_config: Any, version: str, isa: Sequence[str], model: str) -> list[bytes]:
    """Return the fingerprint of each tensor-parallel rank: 32 bytes over everything that a block's bytes depend on.

    version: of vLLM, whose layouts may change. isa: what the attention kernel's layout depends on. model: the weights'
    name; ``""`` takes what the engine loads, as ``weights_name`` names it.
    """
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    for what in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, what) > 1:
            raise SpecError(f"kvmem's connector: {what} is {getattr(parallel, what)}; it serves 1 only")
    described = {k: v for k, v in config.hf_config.to_dict().items() if k not in ("_name_or_path", "_commit_hash")}
    specs = [repr(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    layers = [list(group.layer_names) for group in kv_cache_config.kv_cache_groups]
    ranks = parallel.tensor_parallel_size
    weights = model or weights_name(config.model, config.revision)
    dummy = str(vllm_config.load_config.load_format) == "dummy"
    # Some models choose their rotary embedding by the longest request that the engine allows.
    images = [str(getattr(config.multimodal_config, name, None)) for name in _IMAGES]
    parts = [
        *("vllm", version, weights, str(dummy), str(config.max_model_len), *images),
        *(str(config.dtype), str(config.quantization)),
        *(str(vllm_config.cache_config.cache_dtype), str(kv_cache_config.kv_cache_layout), *isa),
        json.dumps([described, specs, layers, ranks], sort_keys=True, default=str),
    ]
    common = hashlib.sha256(b"kvmem vllm 1" + encode_key(tuple(parts))).digest()
    return [hashlib.sha256(common + rank.to_bytes(4, "little")).digest() for rank in range(ranks)]


def names_images(vllm_config: Any) -> bool:
    """Return whether vLLM names an image by its content. Without caches of its own it only numbers them, from 1 on in
    each process, so that another process's image has the same name.
    """
    images, cache = vllm_config.model_config.multimodal_config, vllm_config.cache_config
    return images is None or images.mm_processor_cache_gb > 0 or bool(cache.enable_prefix_caching)


class Chain:
    """The digests of a request's full blocks, which grow with its tokens.

    unit: tokens of a digest, the greatest common divisor of the groups' block sizes.
    """

    def __init__(self, keys: BlockKeys, salt: str | None, adapter: Any, marks: list[tuple[int, bytes]]) -> None:
        self._keys, self._marks, self._root = keys, marks, keys.root(salt, adapter)
        self._digests: list[bytes] = []

    def extend(self, tokens: Sequence[int], stop: int) -> None:
        """Learn ``tokens[:stop]``, of which those of earlier calls have not changed."""
        size = self._keys.block_size
        first = len(self._digests) * size
        ids = np.fromiter(tokens[first : max(first, stop) // size * size], "<i4")
        data = ids.data.cast("B")
        for at in range(first, first + len(ids), size):
            tag = tag_of_block(self._marks, at, size) if self._marks else b""
            before = self._digests[-1] if self._digests else self._root
            self._digests.append(self._keys.block(before, data[4 * (at - first) : 4 * (at - first + size)], tag))

    def name(self, group: int, block_size: int, block: int) -> Name:
        """Return the name of a full block. REQUIRES: its tokens are learned."""
        return group, self._digests[(block + 1) * block_size // self._keys.block_size - 1]


def chain_of(request: Any, keys: BlockKeys) -> Chain | None:
    """Return the chain of a request of vLLM; None if tokens and keys do not tell what its KV is."""
    if request.prompt_embeds is not None or request.prompt_is_token_ids is not None or request.resumable:
        return None
    adapter = request.lora_request
    if adapter is not None:
        if adapter.load_inplace:
            return None  # another adapter may have the name
        try:
            adapter = (adapter.lora_name, _adapter_files(adapter.lora_path, adapter.lora_int_id))
        except OSError:
            return None  # nobody knows which it is
    items = sorted((item.mm_position.offset, f"{item.modality} {item.identifier}") for item in request.mm_features)
    return Chain(keys, request.cache_salt, adapter, key_marks(items or None))


@lru_cache(maxsize=1024)
def _adapter_files(path: str, adapter_id: int) -> str:
    """Return a name of an adapter's weights. vLLM reads them once for each id, so they are looked at once."""
    return weights_name(path, None)


def tier_key(fingerprint: bytes, name: Name) -> bytes:
    """Return the key of a rank's bytes of a block. fingerprint: the rank's."""
    return hashlib.sha256(b"kvmem vllm block 1" + fingerprint + name[0].to_bytes(4, "little") + name[1]).digest()


def unit_of(groups: Sequence[Group]) -> int:
    """Return the number of tokens at which a prefix of all groups can end."""
    return lcm(*(group.block_size for group in groups))


def storage_of(kv_caches: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the bytes of the one allocation that all layers lie in, uint8. ``SpecError`` if there are several."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in kv_caches.values()}
    if len(storages) != 1:
        raise SpecError(f"kvmem's connector: the KV cache lies in {len(storages)} allocations; it knows one")
    (tensor,) = storages.values()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
