"""kvmem as the cache of Hugging Face transformers: ``model.generate(..., past_key_values=KVMemCache(model, ...))``.

    cache = KVMemCache(model, memory="2GiB", max_batch=8, max_tokens=4096)
    model.generate(**inputs, past_key_values=cache, num_beams=4)

Attention stays the model's own. On the virtual backend it reads a view of the cache (beam search gathers); on the paged
backend each layer's tokens are gathered first, which suits tests more than speed. Beams share what they have in common.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, EncoderDecoderCache

from kvmem.allocator import Allocator
from kvmem.errors import SpecError
from kvmem.lockstep import EVERY, LockstepRows
from kvmem.spec import CacheSpec

__all__ = ["KVMemCache", "KVMemEncoderDecoderCache", "KVMemLayer"]


# transformers is optional, so its classes are Any to mypy, which objects to deriving from that.
class KVMemLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's view of the rows that all layers of a cache share. Made by the caches."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, rows: LockstepRows, layer: int, names: tuple[str, str]) -> None:
        # Not the base class's: it sets keys and values, which are views here.
        spec = rows.alloc.spec
        self._rows, self._layer, self._names = rows, layer, names
        self._group = spec.group_of(layer, names[0])
        if spec.group_of(layer, names[1]) != self._group:
            raise SpecError(f"layer {layer}: {names[0]!r} and {names[1]!r} are in different groups; put them in one")
        group = spec.groups[self._group]
        self._growth = EVERY if group.growth == "token" else self._group
        self._window = group.window_tokens
        self._component = {name: group.component(name) for name in names}
        self._memory: dict[str, torch.Tensor] = {}
        self.num_tokens = 0
        self.is_sliding = self._window is not None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores K and V of n new tokens, ``[B, heads, n, width]``; returns those of all tokens that their queries see.

        The first layer of a step makes room for all layers: ``OutOfMemory`` comes from there, and nothing has changed.
        ``SpecError`` if batch, dtype, device or shape is not what the cache was made for.
        """
        self._check(self._names[0], key_states)
        self._check(self._names[1], value_states)
        num_rows, _, count, _ = key_states.shape
        held = self._rows.num_tokens(self._growth)
        if self.num_tokens == held:
            self._rows.extend(self._growth, num_rows, count)
        elif self.num_tokens + count != held or num_rows != self._rows.num_rows:
            raise SpecError(
                f"layer {self._layer} holds {self.num_tokens} tokens and got {count} more in a batch of {num_rows}; "
                f"other layers have {held} in a batch of {self._rows.num_rows}: a step stopped half-way, so crop() "
                "what it added, or reset()"
            )
        first = self._first_token()
        self.is_initialized = True
        self.num_tokens += count
        with torch.no_grad():
            self._write(self._names[0], key_states)
            self._write(self._names[1], value_states)
        return self._read(self._names[0], first), self._read(self._names[1], first)

    def _check(self, name: str, states: torch.Tensor) -> None:
        alloc = self._rows.alloc
        group = alloc.spec.groups[self._group]
        heads, width = group.heads(name, self._layer), group.widths(name, self._layer)[0]
        dtype = self._component[name].dtype
        if (states.dtype, states.device, states.shape[1], states.shape[3]) != (dtype, alloc.device, heads, width):
            raise SpecError(
                f"layer {self._layer}: got {name!r} of {states.shape[1]} heads of {states.shape[3]}, {states.dtype} on "
                f"{states.device}; the cache was made for {heads} heads of {width}, {dtype} on {alloc.device}: make it "
                "from the model itself, or pass the dtype and device that the model runs in"
            )
        if states.requires_grad and torch.is_grad_enabled():
            raise SpecError("the cache carries no gradients; run the model under torch.no_grad() or inference_mode()")

    def _first_token(self) -> int:
        """The first token that the query after ``num_tokens`` tokens sees."""
        return 0 if self._window is None else max(0, self.num_tokens - self._window + 1)

    def _write(self, name: str, states: torch.Tensor) -> None:
        slots = self._rows.place(self._group).slots[:, -states.shape[2] :]
        memory = self._tensor(name)
        # view, never reshape: a copy would read all of it, mapped or not.
        memory.view(-1, *memory.shape[2:])[slots] = states.transpose(1, 2)

    def _read(self, name: str, first: int) -> torch.Tensor:
        place = self._rows.place(self._group)
        return place.read(self._tensor(name), first, self.num_tokens).transpose(1, 2)

    def _tensor(self, name: str) -> torch.Tensor:
        """Rows or blocks of one component, as ``place`` reads them. Kept: making the view costs as much as a copy."""
        alloc, num_blocks = self._rows.alloc, self._rows.place(self._group).num_blocks
        memory = self._memory.get(name)
        if memory is None or memory.shape[0] < num_blocks:
            virtual = alloc.backend == "virtual"
            memory = alloc.rows(self._layer, name) if virtual else alloc.tensor(self._layer, name)
            self._memory[name] = memory
        return memory

    @property
    def keys(self) -> torch.Tensor | None:
        """K of the tokens held, ``[B, heads, tokens, width]``, or None. Cross attention reads it at every step."""
        return self._read(self._names[0], self._first_token()) if self.num_tokens else None

    @property
    def values(self) -> torch.Tensor | None:
        """V, as ``keys``."""
        return self._read(self._names[1], self._first_token()) if self.num_tokens else None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_token()
        return self.num_tokens - first + query_length, first

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return self._rows.alloc.max_tokens

    @property
    def record_past(self) -> bool:
        """Whether a sliding window waits for ``crop`` before it drops tokens (assisted decoding)."""
        return self._rows.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._rows.recording = value

    def activate_past_recording(self) -> None:
        self.record_past = True

    def _refuse(self, *args: object) -> NoReturn:
        raise NotImplementedError("the layers of a KVMemCache share their rows: call the method of the cache")

    offload = prefetch = reset = reorder_cache = crop = _refuse


class KVMemCache(Cache):  # type: ignore[misc]
    """The cache of a decoder, with kvmem's memory behind it.

    source: the model, its config, or an ``Allocator`` whose spec has K and V for each layer. With an allocator, which
        may serve others too, leave out what follows; beam search needs up to twice the batch in its ``max_sequences``.
    max_batch: rows at once, beams and returned sequences included. max_tokens: prompt plus new tokens.
    dtype, device: of the cache; default the model's, or what the config says and the CPU.
    options: ``memory="2GiB"``, ``backend="paged"`` and all else that ``Allocator`` takes.

    ``generate()`` leaves the tokens in the cache, so that a next turn can go on. ``reset()`` frees them and keeps the
    memory ready; ``close()``, or leaving a with-statement, gives that back too; a cache that is garbage frees its rows.
    ``OutOfMemory`` in a step leaves the cache as it was before that step. Not for training: it carries no gradients.
    """

    def __init__(
        self,
        source: PreTrainedModel | PreTrainedConfig | Allocator,
        *,
        max_batch: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        rows = _open_rows(source, max_batch, max_tokens, dtype, device, options)
        if any(g.growth == "prefill" for g in rows.alloc.spec.groups):
            raise SpecError("the model has cross attention; use KVMemEncoderDecoderCache, which holds both caches")
        self._init(rows, ("k", "v"))

    @classmethod
    def _over(cls, rows: LockstepRows, names: tuple[str, str]) -> KVMemCache:
        cache = cls.__new__(cls)
        cache._init(rows, names)
        return cache

    def _init(self, rows: LockstepRows, names: tuple[str, str]) -> None:
        self._rows, self._names = rows, names
        super().__init__(layers=_layers(rows, names))

    @property
    def allocator(self) -> Allocator:
        """Where the memory is, for ``stats()`` and ``check()``."""
        return self._rows.alloc

    def reset(self) -> None:
        """Frees the tokens; the memory stays mapped for the next ones."""
        self._rows.free()
        self._set_length(0)

    def close(self) -> None:
        """``reset()``, and parked memory goes back to the system. The cache may be used again."""
        self.reset()
        self._rows.alloc.trim()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i goes on from what row ``beam_idx[i]`` is now, in shared memory. ``OutOfMemory`` changes nothing."""
        self._rows.rearrange(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` rows that share their past."""
        self._rows.rearrange([row for row in range(self._rows.num_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows ``indices``, as indexing does: numbers or a mask."""
        self._rows.rearrange(torch.arange(self._rows.num_rows)[indices.cpu()].tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens; 0 only lets sliding windows drop what they have passed.

        Refuses a positive number, as transformers does. A sliding window can be taken back by the last step, or, once
        ``activate_past_recording()`` was called, by all that came since the last ``crop``; ``SpecError`` beyond that.
        """
        if tokens_to_remove > 0:
            raise SpecError(
                f"tokens_to_remove: got {tokens_to_remove}; give -{tokens_to_remove} to remove {tokens_to_remove}"
            )
        length = max(0, self._rows.num_tokens() + tokens_to_remove)
        self._rows.truncate(length)
        self._set_length(length)

    def _set_length(self, limit: int) -> None:
        for layer in self.layers:
            if isinstance(layer, KVMemLayer):
                layer.num_tokens = min(layer.num_tokens, limit)

    def fork(self) -> KVMemCache:
        """A second cache with the same tokens in shared memory: a prompt computed once, continued in several ways.

        Needs as many free sequences as there are rows. ``copy.deepcopy`` does this too.
        """
        copy = KVMemCache._over(self._rows.fork(), self._names)
        copy._set_all(self._rows.num_tokens())
        return copy

    def _set_all(self, length: int) -> None:
        for layer in self.layers:
            if isinstance(layer, KVMemLayer):
                layer.num_tokens, layer.is_initialized = length, length > 0

    def __deepcopy__(self, memo: dict[int, object]) -> KVMemCache:
        return self.fork()

    def __enter__(self) -> KVMemCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        rows = self._rows
        return f"KVMemCache(backend={rows.alloc.backend!r}, num_rows={rows.num_rows}, num_tokens={rows.num_tokens()})"


class KVMemEncoderDecoderCache(EncoderDecoderCache):  # type: ignore[misc]
    """Self and cross attention of an encoder-decoder model, in one allocator; arguments and life as for ``KVMemCache``.

    A row's two caches are one sequence, whose cross-attention group is filled once; beams share it.
    """

    def __init__(
        self,
        source: PreTrainedModel | PreTrainedConfig | Allocator,
        *,
        max_batch: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        self._rows = _open_rows(source, max_batch, max_tokens, dtype, device, options)
        if not any(g.growth == "prefill" for g in self._rows.alloc.spec.groups):
            raise SpecError("the model has no cross attention; use KVMemCache")
        super().__init__(KVMemCache._over(self._rows, ("k", "v")), KVMemCache._over(self._rows, ("cross_k", "cross_v")))

    @property
    def allocator(self) -> Allocator:
        """Where the memory is, for ``stats()`` and ``check()``."""
        return self._rows.alloc

    def close(self) -> None:
        """``reset()``, and parked memory goes back to the system. The cache may be used again."""
        self.reset()
        self._rows.alloc.trim()

    # The two caches have their rows in common, so what moves rows is done once.
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.self_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.self_attention_cache.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        self.self_attention_cache.crop(tokens_to_remove)

    def __enter__(self) -> KVMemEncoderDecoderCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_rows(
    source: PreTrainedModel | PreTrainedConfig | Allocator,
    max_batch: int | None,
    max_tokens: int | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    options: dict[str, Any],
) -> LockstepRows:
    if isinstance(source, Allocator):
        given = {"max_batch": max_batch, "max_tokens": max_tokens, "dtype": dtype, "device": device, **options}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise SpecError(f"{', '.join(wrong)}: an allocator brings its own; leave out what comes after it")
        return LockstepRows(source)
    if max_batch is None or max_tokens is None:
        raise SpecError(
            f"max_batch, max_tokens: got {max_batch} and {max_tokens}; a cache needs both, and they cost only addresses"
        )
    config = source
    if isinstance(source, PreTrainedModel):
        config, dtype = source.config, dtype or source.dtype
        if options.get("pool") is None:  # a pool has a device of its own
            device = device or source.device
    spec = CacheSpec.from_config(config, dtype=dtype)
    # Twice the rows, because beams are forked before the ones they replace are freed.
    alloc = Allocator(spec, max_sequences=2 * max_batch, max_tokens=max_tokens, device=device, **options)
    return LockstepRows(alloc, max_batch)


def _layers(rows: LockstepRows, names: tuple[str, str]) -> list[KVMemLayer | DummyLayer]:
    """A layer object per model layer; dummies where a layer caches nothing, or reads what an earlier one has stored."""
    spec = rows.alloc.spec
    layers: list[KVMemLayer | DummyLayer] = []
    for number in range(spec.num_layers):
        components = {c.name: c for c in spec.layer_components(number)}
        if components and not components.keys() >= set(names):
            raise SpecError(
                f"layer {number} stores {', '.join(components)}; the attention of transformers stores "
                f"{' and '.join(names)} of each head, which this spec does not describe"
            )
        group = spec.groups[spec.group_of(number, names[0])] if components else None
        reads_another = group is not None and components[names[0]].scope == "shared" and number != group.layers[0]
        layers.append(DummyLayer() if group is None or reads_another else KVMemLayer(rows, number, names))
    return layers
