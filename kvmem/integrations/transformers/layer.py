"""One layer of a transformers cache over the rows of a ``DenseBatch``."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from kvmem.errors import SpecError
from kvmem.geometry.views import plain
from kvmem.integrations.dense_batch import EVERY, DenseBatch, memory_of
from kvmem.integrations.transformers.attention import NAME, DecodeStep, StoredTokens
from kvmem.kernels import cpu

__all__ = ["KVMemLayer"]


# transformers is optional, so its classes are Any to mypy, which objects to deriving from that.
class KVMemLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's view of the rows that all layers of a cache share. Made by the caches."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, rows: DenseBatch, layer: int, names: tuple[str, str]) -> None:
        # super().__init__() would set keys and values, which are properties here.
        spec = rows.alloc.spec
        self._rows, self._layer, self._names = rows, layer, names
        self._group = spec.group_of(layer, names[0])
        if spec.group_of(layer, names[1]) != self._group:
            raise SpecError(f"layer {layer}: {names[0]!r} and {names[1]!r} are in different groups; put them in one")
        group = spec.groups[self._group]
        self.growth = EVERY if group.growth == "token" else self._group
        self._window = group.window_tokens
        self._component = {name: group.component(name) for name in names}
        self._given = {name: group.component(name).dtype for name in names}  # the dtypes that attention passed in last
        self._sizes = {name: (group.heads(name, layer), group.widths(name, layer)[0]) for name in names}
        # The dtypes with which kernels.cpu reads the cache; None if it cannot.
        readable = rows.alloc.device.type == "cpu" and set(self._given.values()) <= set(cpu.DTYPES[:3])
        self._kernel_dtypes = dict(self._given) if readable else None
        self._memory: dict[str, torch.Tensor] = {}
        self._blocks: tuple[torch.Tensor, torch.Tensor] | None = None  # as `_memory`, but blocks on both backends
        self._begins = 0  # the first token that the queries of the last update see
        self._key = layer, names[0]
        rows.add_layer(self.growth, self._key)
        self.is_sliding = self._window is not None

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are written in this layer."""
        return self._rows.written[self._key]

    @property
    def is_initialized(self) -> bool:
        """True if the layer holds tokens."""
        return self.num_tokens > 0

    @property
    def device(self) -> torch.device:
        """The device of the memory."""
        return self._rows.alloc.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which keys are stored."""
        return self._component[self._names[0]].dtype

    @property
    def sliding_window(self) -> int | None:
        """Number of tokens that a query sees, itself included; None if it sees all."""
        return self._window

    @property
    def _sliding_window_tensor(self) -> torch.Tensor | None:
        return None if self._window is None else torch.tensor(self._window)  # as DynamicCache names it

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the first ``update`` opens the rows."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store K and V of n new tokens, ``[B, heads, n, width]``; return K and V of all tokens that their queries see.

        The results are valid until the next ``update``. The first layer of a step makes room for all layers:
        ``OutOfMemory`` is raised there, and nothing has changed. ``SpecError`` if batch, dtype, device or shape is not
        what the cache was made for, or if the step before stopped half-way. Any error leaves the cache as it was.

        Under autocast, K and V may have other dtypes than the cache and than each other: they are stored in the cache's
        dtype and returned in their own, which copies what is read.
        """
        self._check(self._names[0], key_states)
        self._check(self._names[1], value_states)
        num_rows, _, count, _ = key_states.shape
        if value_states.shape[::2] != key_states.shape[::2]:
            raise SpecError(
                f"layer {self._layer}: got K of {num_rows} rows of {count} tokens, and V of {value_states.shape[0]} of "
                f"{value_states.shape[2]}; both are of the same tokens"
            )
        before, self._given = self._given, dict(zip(self._names, (key_states.dtype, value_states.dtype), strict=True))
        try:
            return self._update(key_states, value_states, num_rows, count)
        except BaseException:
            self._given = before
            raise

    def _update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, num_rows: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held, end = self._rows.num_tokens(self.growth), self.num_tokens + count
        begins = self.num_tokens == held
        if not begins and (end != held or num_rows != self._rows.num_rows):
            raise SpecError(
                f"layer {self._layer} holds {self.num_tokens} tokens and got {count} more in a batch of {num_rows}; "
                f"other layers have {held} in a batch of {self._rows.num_rows}: a step stopped half-way, so crop() "
                "what it added, or reset()"
            )
        if begins:
            self._rows.check_complete(self.growth)
        if count == 0 and num_rows == self._rows.num_rows:
            return self.read()
        try:
            if begins:
                self._rows.extend(self.growth, num_rows, count)
            with torch.no_grad():
                self._write(self._names[0], key_states)
                self._write(self._names[1], value_states)
            first = self._first_token()
            found: tuple[torch.Tensor, torch.Tensor]
            if self._reads_in_place():
                found = self._stored(self._names[0], end - first), self._stored(self._names[1], end - first)
            else:
                found = self._read(self._names[0], end, first), self._read(self._names[1], end, first)
        except BaseException:  # also an interrupt, or no memory for the gathered copy
            if begins:
                self._rows.take_back(self.growth, held)
            raise
        self._rows.written[self._key] = end
        self._begins = first
        return found

    def _reads_in_place(self) -> bool:
        """Return whether attention reads the cache itself (``transformers.attention``)."""
        return (
            self._kernel_dtypes is not None
            and self._given == self._kernel_dtypes
            and getattr(self._rows.config, "_attn_implementation", None) == NAME
        )

    def _stored(self, name: str, tokens: int) -> StoredTokens:
        heads, width = self._sizes[name]
        return StoredTokens.of(self, (self._rows.num_rows, heads, tokens, width), self._given[name])

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of the tokens that the queries of the last ``update`` see, ``[B, heads, tokens, width]``."""
        k, v = (self._read(name, self.num_tokens, self._begins) for name in self._names)
        return k, v

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]) -> torch.Tensor | None:
        """Return attention of one new token a row, ``[B, 1, Hq, width of V]``; None if ``DecodeStep`` cannot tell.

        query: ``[B, Hq, 1, D]``. mask: over the tokens that ``read()`` returns. options: of ``kernels.cpu.plan``.
        """
        place = self._rows.place(self._group)
        if place.step is None:
            place.step = DecodeStep(place.batch)
        if self._blocks is None or self._blocks[0].shape[0] < place.step.num_blocks:
            k, v = (plain(self._rows.alloc.tensor(self._layer, name)) for name in self._names)
            self._blocks = k, v
        step: DecodeStep = place.step
        return step.attention(query, self._blocks, mask, self._begins, options)

    def _check(self, name: str, states: torch.Tensor) -> None:
        alloc, (heads, width) = self._rows.alloc, self._sizes[name]
        dtype = self._component[name].dtype
        if states.ndim != 4:
            raise SpecError(
                f"layer {self._layer}: got {name!r} of shape {tuple(states.shape)}; must be [B, heads, n, width]"
            )
        fits = (states.device, states.shape[1], states.shape[3]) == (alloc.device, heads, width)
        if not fits or not (states.dtype == dtype or _cast_by_autocast(states, dtype)):
            raise SpecError(
                f"layer {self._layer}: got {name!r} of {states.shape[1]} heads of {states.shape[3]}, {states.dtype} on "
                f"{states.device}; the cache was made for {heads} heads of {width}, {dtype} on {alloc.device}: make it "
                "from the model itself, or pass the dtype and device that the model runs in"
            )
        if states.requires_grad and torch.is_grad_enabled():
            raise SpecError("the cache carries no gradients; run the model under torch.no_grad() or inference_mode()")

    def _first_token(self) -> int:
        """Return the first token that the query after ``num_tokens`` tokens sees."""
        return 0 if self._window is None else max(0, self.num_tokens - self._window + 1)

    def _write(self, name: str, states: torch.Tensor) -> None:
        slots = self._rows.place(self._group).slots[:, -states.shape[2] :]
        memory = self._tensor(name)
        # reshape() might copy, and so read unmapped memory.
        memory.view(-1, *memory.shape[2:])[slots] = states.transpose(1, 2).to(memory.dtype)

    def _read(self, name: str, end: int, first: int | None = None) -> torch.Tensor:
        place = self._rows.place(self._group)
        first = self._first_token() if first is None else first
        found = place.read(self._tensor(name), first, end).transpose(1, 2).to(self._given[name])
        return found.contiguous() if self._rows.dense else found

    def _tensor(self, name: str) -> torch.Tensor:
        """Return ``memory_of`` this layer, cached, because making the view costs as much as copying the tokens."""
        alloc, num_blocks = self._rows.alloc, self._rows.place(self._group).num_blocks
        memory = self._memory.get(name)
        if memory is None or memory.shape[0] < num_blocks:
            memory = self._memory[name] = memory_of(alloc, self._layer, name)
        return memory

    @property
    def keys(self) -> torch.Tensor | None:
        """K of the tokens, ``[B, heads, tokens, width]``, valid until the next ``update``; None if there are none."""
        return self._read(self._names[0], self.num_tokens) if self.num_tokens else None

    @property
    def values(self) -> torch.Tensor | None:
        """V of the tokens, as ``keys``."""
        return self._read(self._names[1], self.num_tokens) if self.num_tokens else None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens the queries' mask covers, and the first of them."""
        first = self._first_token()
        return self.num_tokens - first + query_length, first

    def get_seq_length(self) -> int:
        """Return ``num_tokens``."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """Return the most tokens of a row."""
        return self._rows.alloc.max_tokens

    @property
    def record_past(self) -> bool:
        """True if sliding windows keep tokens out of window until ``crop`` (assisted decoding)."""
        return self._rows.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._rows.recording = value

    def activate_past_recording(self) -> None:
        """Set ``record_past``."""
        self.record_past = True

    def _refuse(self, *args: object) -> NoReturn:
        """Refuse a method that would move rows of one layer only."""
        raise NotImplementedError("the layers of a KVMemCache share their rows: call the method of the cache")

    offload = prefetch = reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse


def _cast_by_autocast(states: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether ``states`` and ``dtype``, the cache's, are float32 or autocast's dtype: it casts between those."""
    kind = states.device.type
    if not torch.is_autocast_enabled(kind):
        return False
    lower = torch.get_autocast_dtype(kind)
    return {states.dtype, dtype} <= {lower, torch.float32}
