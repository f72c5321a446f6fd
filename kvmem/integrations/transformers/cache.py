"""kvmem as the cache of Hugging Face transformers: ``model.generate(..., past_key_values=KVMemCache(model, ...))``.

    cache = KVMemCache(model, memory="2GiB", max_batch=8, max_tokens=4096)
    model.generate(**inputs, past_key_values=cache, num_beams=4)

Attention stays the model's own. On the virtual backend it reads a view of the cache (with beam search, a copy); on the
paged backend each layer's tokens are gathered first, which suits tests more than speed. Beams share common memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from kvmem.allocator import Allocator
from kvmem.arguments import check_choice
from kvmem.errors import SpecError
from kvmem.integrations.dense_batch import EVERY, DenseBatch
from kvmem.integrations.transformers.layer import KVMemLayer
from kvmem.integrations.transformers.opening import (
    CROSS,
    SELF,
    has_cross_attention,
    make_layers,
    open_rows,
    read_prompt,
)

__all__ = ["KVMemCache", "KVMemEncoderDecoderCache", "KVMemLayer"]

_Self = TypeVar("_Self")


class _OverRows:
    """What both kinds of cache have in common: they hold their tokens in the rows of a ``DenseBatch``."""

    _rows: DenseBatch

    def __init__(
        self,
        source: PreTrainedModel | PreTrainedConfig | Allocator,
        *,
        max_batch: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        assume: str | None = None,
        **options: Any,
    ) -> None:
        self._open(open_rows(source, max_batch, max_tokens, dtype, device, assume, options))

    def _open(self, rows: DenseBatch) -> None:
        """Check that the spec fits this kind of cache, and make its layers over the rows."""
        raise NotImplementedError

    @property
    def allocator(self) -> Allocator:
        """The allocator that holds the memory, for ``stats()`` and ``check()``."""
        return self._rows.alloc

    def close(self) -> None:
        """``reset()``, then return parked memory to the system. The cache may be used again."""
        self.reset()  # type: ignore[attr-defined]  # of the other base
        self._rows.trim()

    def __deepcopy__(self, memo: dict[int, object]) -> Any:
        return self.fork()  # type: ignore[attr-defined]

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# transformers is optional, so its classes are Any to mypy, which objects to deriving from that.
class KVMemCache(_OverRows, Cache):  # type: ignore[misc]
    """The cache of a decoder, in kvmem's memory.

    source: the model, its config, or an ``Allocator`` whose spec has K and V for each layer. With an allocator, which
        may serve other caches too, omit all other arguments; beam search needs up to twice the batch in its
        ``max_sequences``.
    max_batch: the most rows, beams and returned sequences included. max_tokens: prompt plus new tokens.
    dtype, device: of the cache; default the model's, or the config's dtype and the CPU. Under ``torch.autocast`` the
        dtype may also be autocast's: attention gets the dtype that it has passed in.
    assume: for a ``model_type`` that kvmem does not know, the one by whose rules to read its config (``"llama"``).
    options: ``memory="2GiB"``, ``backend="paged"`` and all other arguments of ``Allocator``.

    ``generate()`` leaves the tokens in the cache, so that a next turn can continue. ``reset()`` frees them and keeps
    the memory ready; ``close()``, or leaving a with-statement, also returns the memory. A cache that is collected as
    garbage frees its rows.

    ``OutOfMemory`` in a step leaves the cache as it was before that step. If a forward pass fails between two layers,
    the next one is refused until ``crop()`` has removed what the first layers stored; after the last layer the step
    counts as complete. Not for training: the cache carries no gradients.
    """

    def _open(self, rows: DenseBatch) -> None:
        if has_cross_attention(rows):
            raise SpecError("the model has cross attention; use KVMemEncoderDecoderCache, which holds both caches")
        self._init(rows, SELF)

    @classmethod
    def _over(cls, rows: DenseBatch, pairs: tuple[tuple[str, str], ...]) -> KVMemCache:
        cache = cls.__new__(cls)
        cache._init(rows, pairs)
        return cache

    def _init(self, rows: DenseBatch, pairs: tuple[tuple[str, str], ...]) -> None:
        self._rows, self._pairs = rows, pairs
        Cache.__init__(self, layers=make_layers(rows, pairs))

    @property
    def is_initialized(self) -> bool:
        """True if every layer holds tokens, as in ``DynamicCache``."""
        held = [layer for layer in self.layers if isinstance(layer, KVMemLayer)]
        return bool(held) and all(layer.is_initialized for layer in held)

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
        """Yield keys, values and the window (None if it is not sliding) of each layer, as ``DynamicCache`` does."""
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    def begin(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        salt: str | bytes | None = None,
        load: Literal["host", "all"] = "host",
        **others: Any,
    ) -> int:
        """Return how many tokens each row starts with, from the cached prefixes of earlier prompts; ``generate()``
        computes the tokens after them.

        REQUIRES: the cache is empty, and the next tokens that it stores are these, ``[B, tokens]``, since it sees no
        ids itself. All rows start with the same number of tokens, at least one is left to compute, and padding is on
        the left; padded rows share with rows of equal padding. For beams and returned sequences, repeat the rows of
        both arguments first. A later ``begin()`` finds blocks of this prompt, but none of what is generated.

        salt: only calls with the same salt share. Name in it what else the KV depends on, such as an active LoRA.
        load: ``"all"`` also waits for what the lower tiers of an allocator with ``tiers=`` have of the prompts, such as
            a disk. To have a prompt there that was computed: ``allocator.store(ids)``, with the ids of one row.

        ``SpecError`` or ``OutOfMemory``, and the cache is unchanged. ``SpecError`` also for images and other inputs:
        their placeholders have the same ids whatever they show, and ``generate()`` must compute all of them.
        """
        check_choice("load", load, ("host", "all"))
        if given := [name for name, value in others.items() if value is not None]:
            raise SpecError(f"{', '.join(given)}: begin() finds prompts by their ids alone; call generate() without it")
        if self._rows.more_than_ids:
            raise SpecError(
                "begin: in this model the KV of every token depends on pictures or proteins, not on the ids alone; "
                "call generate() without begin()"
            )
        ids, padding = read_prompt(input_ids, attention_mask)
        for name, placeholder in self._rows.placeholders.items():
            if (ids == placeholder).any():
                raise SpecError(
                    f"input_ids: have {placeholder}, the {name}, whose KV depends on more than the ids; call "
                    "generate() without begin()"
                )
        return self._rows.begin(ids, padding, salt, load)

    def reset(self) -> None:
        """Free the tokens; the memory stays mapped for the next ones."""
        self._rows.free()

    def reorder_cache(self, beam_idx: torch.Tensor | List[int]) -> None:
        """Make row i continue from what row ``beam_idx[i]`` is now, in shared memory. ``OutOfMemory`` changes nothing.

        As in the next two methods: with no rows the cache becomes empty, and an empty cache stays as it is.
        ``SpecError`` if a step is half done.
        """
        self._rearrange("beam_idx", beam_idx)

    def batch_repeat_interleave(self, repeats: int | torch.Tensor) -> None:
        """Make each row ``repeats`` rows that share their tokens; a tensor has one number for each row."""
        numbers = torch.arange(self._rows.num_rows)
        try:
            rows = numbers.repeat_interleave(repeats.cpu() if isinstance(repeats, torch.Tensor) else int(repeats))
        except (RuntimeError, TypeError, ValueError) as error:
            raise SpecError(
                f"repeats: got {repeats!r}; must be 0 or more, or one such number for each of {len(numbers)} rows"
            ) from error
        self._rows.rearrange(rows.tolist())

    def batch_select_indices(self, indices: torch.Tensor | List[int]) -> None:
        """Keep the rows ``indices``, as indexing does: numbers, which may be negative, or a mask."""
        self._rearrange("indices", indices)

    def _rearrange(self, name: str, indices: torch.Tensor | List[int]) -> None:
        count = self._rows.num_rows
        if count == 0:
            return  # as DynamicCache does
        try:
            given = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices)
        except ValueError:  # rows of unequal length
            given = np.empty((0, 0))
        if given.ndim != 1 or (given.size and given.dtype.kind not in "bi"):
            raise SpecError(
                f"{name}: got {indices!r}; must be one dimension of row numbers, or a mask of {count} bools"
            )
        try:
            rows = np.arange(count)[given if given.size else given.astype(np.int64)]
        except IndexError as error:
            raise SpecError(
                f"{name}: got {indices!r}; must be numbers of the cache's {count} rows, or a mask of {count}"
            ) from error
        self._rows.rearrange(rows.tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; 0 only lets sliding windows drop tokens out of window.

        A positive number is refused, as in transformers. With a sliding window, the last step can be removed, also one
        that stopped half-way; after ``activate_past_recording()``, all steps since the last ``crop``. ``SpecError``
        for more.
        """
        if tokens_to_remove > 0:
            raise SpecError(
                f"tokens_to_remove: got {tokens_to_remove}; give -{tokens_to_remove} to remove {tokens_to_remove}"
            )
        if any(isinstance(layer, KVMemLayer) and layer.growth != EVERY for layer in self.layers):
            raise SpecError("crop: cross attention is fixed after it is filled; crop the cache of the self attention")
        self._rows.truncate(max(0, self._rows.num_tokens() + tokens_to_remove))

    def fork(self) -> KVMemCache:
        """Return a second cache with the same tokens in shared memory, to continue one prompt in several ways.

        Needs as many free sequences as there are rows. Sliding windows drop tokens out of window, unless
        ``activate_past_recording()`` was called: then those are copied. ``SpecError`` if a step is half done.
        ``copy.deepcopy`` does the same.
        """
        return KVMemCache._over(self._rows.fork(), self._pairs)

    def __repr__(self) -> str:
        rows = self._rows
        return f"KVMemCache(backend={rows.alloc.backend!r}, num_rows={rows.num_rows}, num_tokens={rows.num_tokens()})"


class KVMemEncoderDecoderCache(_OverRows, EncoderDecoderCache):  # type: ignore[misc]
    """The caches of self and cross attention of an encoder-decoder model, in one allocator.

    Arguments and lifetime as for ``KVMemCache``. A row's two caches are one sequence, whose cross-attention group is
    filled once; beams share it.
    """

    def _open(self, rows: DenseBatch) -> None:
        if not has_cross_attention(rows):
            raise SpecError("the model has no cross attention; use KVMemCache")
        self._init(rows)

    def _init(self, rows: DenseBatch) -> None:
        self._rows, self._cross = rows, _CrossAttention._over(rows, CROSS)
        EncoderDecoderCache.__init__(self, KVMemCache._over(rows, SELF), self._cross)

    @property
    def cross_attention_cache(self) -> KVMemCache:
        """The cache of the cross attention. It cannot be replaced."""
        return self._cross

    @cross_attention_cache.setter
    def cross_attention_cache(self, value: object) -> None:
        if value is not self._cross and not (isinstance(value, _CrossAttention) and value.is_stand_in):
            raise SpecError("cross_attention_cache: shares its rows with the self attention; make a new cache instead")

    @property
    def is_updated(self) -> dict[int, bool]:
        """By layer, True if its cross attention is filled. A copy, since a filled layer may be emptied later."""
        return {i: bool(layer.get_seq_length() > 0) for i, layer in enumerate(self._cross.layers)}

    @is_updated.setter
    def is_updated(self, value: object) -> None:
        pass

    @property
    def is_initialized(self) -> bool:
        """True if every layer of the decoder holds tokens."""
        return bool(self.self_attention_cache.is_initialized)

    def fork(self) -> KVMemEncoderDecoderCache:
        """As ``KVMemCache.fork``."""
        copy = KVMemEncoderDecoderCache.__new__(KVMemEncoderDecoderCache)
        copy._init(self._rows.fork())
        return copy

    # The two caches share their rows, so rows are moved once.
    def reorder_cache(self, beam_idx: torch.Tensor | List[int]) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int | torch.Tensor) -> None:
        self.self_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor | List[int]) -> None:
        self.self_attention_cache.batch_select_indices(indices)

    def crop(self, tokens_to_remove: int) -> None:
        self.self_attention_cache.crop(tokens_to_remove)


class _CrossAttention(KVMemCache):
    """The cross attention of a ``KVMemEncoderDecoderCache``.

    T5Gemma replaces an empty cache by a new one of the same class, to be rid of windows, which this class never has.
    So an object that is made from outside is a stand-in that stores nothing.
    """

    is_stand_in = False

    def __init__(self, config: PreTrainedConfig | None = None, offloading: bool = False) -> None:
        self.is_stand_in = True
