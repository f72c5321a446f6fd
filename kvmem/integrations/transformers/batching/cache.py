"""The cache that transformers' continuous batching calls, over an ``Allocator``.

transformers' scheduler decides which requests run; this decides where their tokens lie. A request is a ``Sequence``: it
is extended when the scheduler asks whether its next tokens fit, and they are committed by their ids after the step. The
allocator is append-only, so that no entry of a block table changes while a request lives.

transformers builds lists of the indices of every token that a step reads. Ours stay empty: a step notes its sequences,
and at its first layer the core fills the block tables of all of them in one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState

from kvmem.allocator import Allocator, Sequence
from kvmem.allocator.batch import GroupBatch
from kvmem.errors import OutOfMemory, SpecError
from kvmem.kernels import cpu
from kvmem.kernels.base import Run
from kvmem.kernels.checks import all_tokens

__all__ = ["IN_PLACE", "PagedCache", "attention"]

#: ``attn_implementation`` of models whose attention reads the cache where it lies.
IN_PLACE = "kvmem_paged"


@dataclass(frozen=True)
class LayerKind:
    """What transformers reads of its ``CacheAllocator``, one for each kind of attention."""

    cache: PagedCache
    index: int
    layer_type: str
    tokens_per_page: int
    window_tokens: int | None
    #: Where padding tokens would read and write: the null block and the padding block.
    read_trash_index = 0
    write_trash_index = 1
    #: Read of requests that move to transformers' own host memory, which ``open_manager`` refuses.
    block_table: ClassVar[Mapping[str, list[int]]] = MappingProxyType({})

    def get_seqlen_k(self, past_length: int, query_length: int) -> int:
        """Return how many tokens the new ones attend to, themselves included."""
        return query_length + (past_length if self.window_tokens is None else min(past_length, self.window_tokens - 1))

    def needs_new_blocks(self, request_id: str, past_length: int, query_length: int) -> tuple[str, int]:
        """Return what ``count_storable_requests`` is to try: only allocating tells what fits beside cached content."""
        return request_id, self.cache.missing_tokens(request_id, past_length + query_length)


class PagedCache(PagedAttentionCache):  # type: ignore[misc]
    """kvmem in the place of ``PagedAttentionCache``.

    kinds: the window of each kind of attention, by transformers' name for it. max_requests, max_batch_tokens: of a
    step. most_tokens: of a request. in_place: attention is ``attention()``, else the caller's, over K and V that are
    gathered for it.
    """

    max_blocks_per_request = 0  # block tables are for FlashAttention on a GPU
    max_decode_fast_path_length = 0
    bytes_per_sector = 1  # of transformers' own host memory, which has no sector

    def __init__(
        self, allocator: Allocator, kinds: Mapping[str, int | None], *, max_requests: int, max_batch_tokens: int,
        most_tokens: int, share: bool, in_place: bool,
    ) -> None:  # fmt: skip
        # Not the constructor of transformers', which would allocate its memory.
        spec, self.allocator = allocator.spec, allocator
        self.device, self.dtype = allocator.device, spec.groups[0].components[0].dtype
        self.max_batch_tokens, self.most_tokens, self.in_place = max_batch_tokens, most_tokens, in_place
        self.use_prefix_sharing = self.allow_block_sharing = share
        size = spec.groups[0].block_size
        self.cache_allocators = {
            kind: LayerKind(self, index, kind, size, window) for index, (kind, window) in enumerate(kinds.items())
        }
        # Groups of layers share the memory as they need it, so there are no sectors to give back.
        self.pool = SimpleNamespace(try_to_free_sectors=lambda: None)
        limit = allocator.core.stats().limit_bytes
        self.num_blocks = limit // (spec.bytes_per_token * size)
        self.max_tokens_read = max(limit // group.bytes_per_token for group in spec.groups)
        # Where all layers have a window, a step reads no more than that of a request.
        windows = [window for window in kinds.values() if window is not None]
        self.read_cache_limit = max(windows) if len(windows) == len(kinds) else None
        self._sequences: dict[str, Sequence] = {}
        self._batch = allocator.make_batch(
            max_sequences=max_requests, max_new_tokens=max_batch_tokens, max_tokens=most_tokens
        )
        self._rows: list[tuple[int, int, int]] = []  # of the next step: handle, past tokens, new tokens
        self._step: Step | None = None
        self._memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    # --- room for tokens ---

    def missing_tokens(self, request_id: str, num_tokens: int) -> int:
        """Return how many more tokens the request needs room for, to have ``num_tokens``."""
        sequence = self._sequences.get(request_id)
        return max(0, num_tokens - (0 if sequence is None else sequence.num_tokens))

    def can_store_request_tokens(self, state: RequestState, request_len: int, dry_run: bool = False) -> bool:
        """Return True after making room for ``request_len`` more tokens; False, and nothing has changed, if there is
        none. dry_run: only for graphs, of which there are none.
        """
        return self._extend(state.request_id, self.missing_tokens(state.request_id, state.current_len() + request_len))

    def _extend(self, request_id: str, count: int) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            return count == 0 or sequence.try_extend(count)
        try:
            sequence = self.allocator.sequence()
        except OutOfMemory:  # all max_sequences are in use
            return False
        if not sequence.try_extend(count):
            sequence.free()
            return False
        self._sequences[request_id] = sequence
        return True

    def count_storable_requests(self, list_blocks_needed: list[dict[str, tuple[str, int]]]) -> int:
        """Return how many requests, in their order, could have the room that they need, all at a time."""
        taken: list[tuple[str, int]] = []
        for request_id, count in (next(iter(needs.values())) for needs in list_blocks_needed):
            if not self._extend(request_id, count):
                break
            taken.append((request_id, count))
        for request_id, count in taken:
            sequence = self._sequences[request_id]
            sequence.truncate(sequence.num_tokens - count)
        return len(taken)

    def compute_free_capacity(self, relative: bool = True) -> float:
        """Return the part of the memory (or the bytes) that requests do not hold; cached content counts as free."""
        stats = self.allocator.core.stats()
        free = max(0, stats.limit_bytes - stats.held_bytes)
        return free / stats.limit_bytes if relative else free

    def evict_cached_blocks(self) -> bool:
        """Return False: blocks are evicted one by one when their memory is needed, not all at once ahead of it."""
        return False

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """End the request's sequence, if it has one. What it has computed stays cached, also if it was preempted."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            sequence.free()

    def free_all_requests(self, clear_ledgers: bool = False) -> None:
        """End all sequences. clear_ledgers: also evict what is cached."""
        for request_id in list(self._sequences):
            self.free_blocks(request_id)
        self._rows, self._step = [], None
        if clear_ledgers:
            self.allocator.clear_cache()

    def reset(self) -> None:
        """End all sequences and evict what is cached."""
        self.free_all_requests(clear_ledgers=True)

    def close(self) -> None:
        """Free the memory."""
        self.free_all_requests()
        self._memory.clear()
        self.allocator.close()

    # --- prefixes and forks ---

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        """Return how many tokens of the prompt are cached, which the request then holds; at least one is left."""
        if not self.use_prefix_sharing:
            return 0
        try:
            sequence = self.allocator.sequence(prompt_ids)
        except OutOfMemory:
            return 0
        if sequence.num_cached_tokens:
            self._sequences[request_id] = sequence
        else:
            sequence.free()
        return sequence.num_cached_tokens

    def count_new_complete_blocks(self, state: RequestState, request_len: int) -> dict[str, int]:
        """Return nothing: the core knows which blocks are complete."""
        return {}

    def mark_complete_blocks(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        """Commit what the last step computed of the request, by its ids; whole blocks can be found from now on."""
        sequence = self._sequences[state.request_id]
        begin, end = sequence.num_committed_tokens, state.current_len()
        if not self.use_prefix_sharing:
            sequence.commit(count=end - begin)
        else:
            prompt = len(state.initial_tokens)
            ids = state.initial_tokens[begin:end]
            sequence.commit(ids + state.generated_tokens[max(0, begin - prompt) : max(0, end - prompt)])

    def prepare_fork_request(
        self, src_state: RequestState, dst_req_ids: list[str], copy_src_and_dst: dict[str, tuple[list[int], list[int]]]
    ) -> list[str]:
        """Fork the request as often as memory allows; return the ids of those forks. ``fork()`` copies by itself."""
        forked = []
        for request_id in dst_req_ids:
            try:
                self._sequences[request_id] = self._sequences[src_state.request_id].fork()
            except OutOfMemory:
                break
            forked.append(request_id)
        return forked

    def perform_cache_copy(self, copy_src_and_dst: dict[str, tuple[list[int], list[int]]]) -> None:
        """Nothing to do."""

    # --- a step ---

    def extend_read_and_write_indices(
        self, request_id: str, past_length: int, query_length: int, read_index: list[list[int]] | None,
        write_index: list[list[int]],
    ) -> None:  # fmt: skip
        """Note that the next step has the request; the lists stay empty."""
        self._rows.append((self._sequences[request_id].id, past_length, query_length))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write K and V of the new tokens, ``[1, heads, T, width]``, and return those of all tokens that they attend
        to, sequence after sequence. In place: return the new ones, and put the step into ``kwargs`` for ``attention``.
        """
        step = self.begin_step() if self._rows or self._step is None else self._step
        group = self.allocator.spec.group_of(layer_idx, "k")
        memory = self._memory_of(layer_idx)
        states = [x.squeeze(0).transpose(0, 1) for x in (key_states, value_states)]
        for tokens, new in zip(memory, states, strict=True):
            tokens.index_copy_(0, step.writes[group], new)
        if self.in_place:
            kwargs[IN_PLACE] = step, group, memory
        elif (slots := step.reads[group]) is not None:
            states = [tokens.index_select(0, slots) for tokens in memory]
        key, value = (x.transpose(0, 1).unsqueeze(0) for x in states)
        return key, value

    def begin_step(self) -> Step:
        """Return where the tokens of the requests that were noted lie."""
        self._step, self._rows = Step(self.allocator, self._batch, self._rows, gather=not self.in_place), []
        return self._step

    def _memory_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a layer, each ``[tokens, heads, width]``, mapped or not: addresses never change."""
        if layer not in self._memory:
            k, v = (all_tokens(self.allocator.tensor(layer, name)) for name in ("k", "v"))
            self._memory[layer] = k, v
        return self._memory[layer]


class Step:
    """Where the tokens of a step lie, the same for all layers of a group.

    writes: int64 [T], the slot of each new token, by group. reads: the slots of all tokens that they attend to, by
    group; None if those are the new tokens alone, or without ``gather``.
    """

    def __init__(self, allocator: Allocator, batch: Any, rows: list[tuple[int, int, int]], gather: bool) -> None:
        handles, past, new = map(list, zip(*rows, strict=True))
        allocator.fill(handles, batch, new_tokens=new)
        groups = allocator.spec.groups
        self._batches: list[GroupBatch] = [batch.group(index) for index in range(len(groups))]
        self._windows = [group.window_tokens for group in groups]
        self.writes = [of.slot_mapping for of in self._batches]
        self.reads: list[torch.Tensor | None] = [None] * len(groups)
        if gather and any(past):
            for index, window in enumerate(self._windows):
                seen = past if window is None else np.minimum(past, window - 1)
                self.reads[index] = _slots(self._batches[index], np.add(seen, new))
        self._runs: dict[tuple[object, ...], Run] = {}

    def attend(
        self, query: torch.Tensor, group: int, memory: tuple[torch.Tensor, torch.Tensor], options: dict[str, Any]
    ) -> torch.Tensor:
        """Return attention of the new tokens, ``[1, T, Hq, width of V]``. query: ``[1, Hq, T, D]``; memory: of the
        layer; options: of ``kernels.cpu.plan``.
        """
        batch, q = self._batches[group], query[0].transpose(0, 1)
        size = batch.block_size
        k, v = (x[: len(x) // size * size].view(-1, size, *x.shape[1:]) for x in memory)
        key = (group, *q.shape[1:], *k.shape[2:], *v.shape[2:], *options.items())
        if key not in self._runs:
            self._runs[key] = cpu.plan(
                batch, num_query_heads=q.shape[1], num_kv_heads=k.shape[2], head_dim=q.shape[2], value_dim=v.shape[3],
                dtype=q.dtype, kv_dtype=k.dtype, window_tokens=self._windows[group], return_lse=False, **options,
            )  # fmt: skip
        return self._runs[key](q, (k, v))[0].unsqueeze(0)


def _slots(batch: GroupBatch, counts: np.ndarray[Any, Any]) -> torch.Tensor:
    """Return the slots of the last ``counts[i]`` tokens of each row, one row after the other, int64."""
    size, begins, ends = batch.block_size, batch.kv_indptr_cpu.numpy(), batch.seq_lens_cpu.numpy()
    blocks, within = np.diff(begins), np.arange(batch.block_size)
    first = (np.arange(begins[-1]) - np.repeat(begins[:-1], blocks)) * size  # token of each block
    token = first[:, None] + within
    seen = (token >= np.repeat(ends - counts, blocks)[:, None]) & (token < np.repeat(ends, blocks)[:, None])
    slots = batch.kv_indices_cpu.numpy().astype(np.int64)[:, None] * size + within
    return torch.from_numpy(slots[seen])


def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Return ``(out [1, T, Hq, width of V], None)``: attention of a step over a ``PagedCache``, where it lies."""
    cache = options.get("cache")
    if isinstance(cache, PagedCache):  # transformers 5.23 leaves the update to the attention; later ones do it before
        cache.update(key, value, module.layer_idx, options)  # type: ignore[arg-type]
    if IN_PLACE not in options or attention_mask is not None:
        raise SpecError(f'attn_implementation="{IN_PLACE}" is for models inside continuous_batching(): set another one')
    if options.get("dropout") or options.get("position_bias") is not None:
        raise SpecError('attention="kvmem" has no dropout and no position bias: use attention="transformers"')
    how = {"scale": options.get("scaling"), "soft_cap": options.get("softcap"), "sinks": options.get("s_aux")}
    step, group, memory = options[IN_PLACE]
    return step.attend(query, group, memory, how), None
