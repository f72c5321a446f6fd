"""kvmem's ``SchedulerCache`` behind the names that vLLM's scheduler calls on its ``KVCacheManager``.

The manager decides only: which block of the pool holds which tokens of which request. The tensors are the worker's, and
what it knows of a decision is the block ids that the scheduler sends. It appends them to tables of its own and never
reads an earlier entry again, so the allocator is append-only. Nothing here imports vLLM: the scheduler passes what is
needed of it (``Foreign``).

A request takes whole blocks, so most decode steps have room and return at once. Tokens are published, which is what
makes them hits for others, once the scheduler says that they are computed; a chunk of a prompt already when it is
scheduled, as the stock manager does it, so that requests of the same step share it. That is right as long as a worker
writes K and V in the order of the steps and nothing takes the chunk back (``ahead``).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvmem import Allocator, CacheSpec, Component, Group, SchedulerCache, SpecError, TableChanges
from kvmem.allocator.prefix import Tokens

__all__ = ["BlockManager", "Foreign", "Held", "Request"]

#: What the pages of a device without memory are a multiple of.
_PAGE_BYTES = 2 << 20
#: Block 0 is the null block, which vLLM's tables name where a window has dropped a block; block 1 is kvmem's padding
#: block. Neither is ever handed out.
RESERVED_BLOCKS = 2


class Request(Protocol):
    """What the manager reads of a ``vllm.v1.request.Request``."""

    request_id: str
    num_computed_tokens: int
    num_in_flight_tokens: int
    num_preemptions: int
    skip_reading_prefix_cache: bool
    cache_salt: str | None
    lora_request: Any
    mm_features: Sequence[Any]
    prompt_embeds: Any
    all_token_ids: Sequence[int]

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True)
class Foreign:
    """What the manager makes of vLLM: ``KVCacheBlocks`` round a tuple of lists, the block objects by id, statistics."""

    wrap: Callable[[tuple[Sequence[Any], ...]], Any]
    blocks: Sequence[Any]
    stats: Callable[[], Any]


class Held:
    """The blocks of one request, and the key of its sequence: a request that was preempted may begin again before the
    blocks of its first life are given back.
    """

    __slots__ = ("blocks", "committed", "prompt", "room")

    def __init__(self, prompt: _Prompt, room: int, committed: int) -> None:
        self.prompt = prompt
        self.blocks: list[int] = []  # as the worker has them; 0 where a window has dropped one
        self.room = room  # tokens, whole blocks
        self.committed = committed  # tokens


class _Prompt:
    """The tokens of a request when it was last looked at, and what its KV depends on beside them."""

    __slots__ = ("ids", "keys")

    def __init__(self, request: Request) -> None:
        #: None for a request whose prompt is embeddings: it shares nothing.
        self.ids = array("i", request.all_token_ids[:]) if request.prompt_embeds is None else None
        self.keys = _keys(request)


@dataclass(frozen=True)
class _Group:
    """Stands for vLLM's single-type manager, of which other parts of the engine read the block size."""

    block_size: int
    kv_cache_spec: Any
    kv_cache_group_id: int = 0


class BlockManager:
    """kvmem in the place of ``vllm.v1.core.kv_cache_manager.KVCacheManager``, for one group of layers.

    num_blocks: blocks of the engine's pool; ids stay below it. block_size: tokens of a block. window_tokens: a sliding
    window, or None. max_requests: requests that can hold blocks at one time. prefix_cache: whether requests share equal
    prefixes. watermark: the part of the pool that admissions leave free. policy: what is evicted first
    (docs/eviction.md). ahead: publish a chunk of a prompt when it is scheduled; never with a window, whose blocks are
    dropped as tokens are published. ``SpecError`` for a pool without a block to hand out.
    """

    num_kv_cache_groups = 1
    mamba_shared_prefix_checkpoint = False
    empty_kv_cache_blocks: Any
    block_pool: BlockPool
    coordinator: Coordinator

    def __init__(
        self,
        foreign: Foreign,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        max_requests: int,
        window_tokens: int | None = None,
        prefix_cache: bool = True,
        log_stats: bool = False,
        watermark: float = 0.0,
        policy: str = "density",
        ahead: bool = True,
        group_spec: Any = None,
    ) -> None:
        if num_blocks <= RESERVED_BLOCKS:
            raise SpecError(
                f"the engine's pool has {num_blocks} blocks, of which kvmem reserves {RESERVED_BLOCKS}: give it more "
                "memory for the KV cache"
            )
        self.block_size, self.max_model_len, self.enable_caching = block_size, max_model_len, prefix_cache
        self.log_stats = log_stats
        self.watermark_blocks = int(watermark * num_blocks)
        self._foreign, self._window = foreign, window_tokens
        self._ahead = ahead and window_tokens is None
        self._publishes = prefix_cache or window_tokens is not None
        self._pool_blocks = num_blocks - RESERVED_BLOCKS
        self._backed = RESERVED_BLOCKS if window_tokens is not None else 0  # tables without a window never name them
        self._block_bytes = _page_bytes(block_size)
        allocator = Allocator(
            _spec_of_pages(block_size, self._block_bytes, window_tokens),
            backend="paged",
            device="meta",
            memory=(self._pool_blocks + self._backed) * self._block_bytes,
            page_bytes=self._block_bytes,
            max_sequences=max_requests,
            max_tokens=_round_up(max_model_len, block_size),
            prefix_cache=prefix_cache,
            append_only=True,
            policy=policy,
        )
        self._tells_freed = False
        self.allocator, self._cache = allocator, SchedulerCache(allocator)
        self._back_pool()
        self._held: dict[str, Held] = {}
        self._waiting: dict[str, _Prompt] = {}  # by request that was looked at and holds no blocks yet
        self.empty_kv_cache_blocks = foreign.wrap(((),))
        self.prefix_cache_stats = foreign.stats() if log_stats else None
        self.block_pool = BlockPool(self)
        self.coordinator = Coordinator(self, (_Group(block_size, group_spec),))

    def _back_pool(self) -> None:
        """Take every block once, so that no later step pays for backing it."""
        most, left, all_blocks = self.allocator.max_tokens // self.block_size, self._pool_blocks, []
        while left > 0 and len(all_blocks) < self.allocator.max_sequences:
            all_blocks.append(self.allocator.sequence())
            all_blocks[-1].extend(min(most, left) * self.block_size)
            left -= most
        self.allocator.free_batch(np.array([sequence.id for sequence in all_blocks], np.int32))

    # --- prefixes ---

    def get_computed_blocks(self, request: Request) -> tuple[Any, int, int]:
        """Return no blocks, how many tokens of the request are cached (whole blocks), and 0.

        Only asks: ``allocate_slots`` takes the blocks.
        """
        if not self.enable_caching or request.skip_reading_prefix_cache:
            return self.empty_kv_cache_blocks, 0, 0
        prompt = self._prompt_of(request)
        hits = 0 if prompt.ids is None else self._cache.matched_tokens(prompt.ids, **prompt.keys)
        return self.empty_kv_cache_blocks, hits, 0

    def _prompt_of(self, request: Request) -> _Prompt:
        prompt = self._waiting.get(request.request_id)
        if prompt is None or (prompt.ids is not None and len(prompt.ids) != request.num_tokens):
            prompt = self._waiting[request.request_id] = _Prompt(request)
        return prompt

    def get_computed_blocks_for_connector(self, request: Request) -> tuple[Any, int, int, bool]:
        return *self.get_computed_blocks(request), False

    def truncate_computed_blocks(self, blocks: Any, num_computed_tokens: int) -> Any:
        """Return ``blocks``: what ``get_computed_blocks`` returns names none, and ends at a block."""
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish the request's first ``num_computed_tokens`` tokens."""
        held = self._held.get(request.request_id)
        if held is not None:
            self._publish(held, request, num_computed_tokens)

    def estimate_cached_tokens(self, request: Request) -> int:
        """Return how many of the request's tokens others would find."""
        held = self._held.get(request.request_id)
        if held is None or not self.enable_caching or held.prompt.ids is None:
            return 0
        return held.committed // self.block_size * self.block_size

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Nothing to do: blocks that a connector failed to load were never published (``cache_blocks``)."""

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content. Return False, and change nothing, while requests hold blocks."""
        if len(self._cache) > 0:
            return False
        self._cache.clear_cache()
        if self.prefix_cache_stats is not None:
            self.prefix_cache_stats.reset = True
        return True

    # --- blocks of requests ---

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: Any = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
        num_encoder_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
        skip_zeroing_group_ids: tuple[int, ...] = (),
    ) -> Any:
        """Make room for the request's next tokens. Return the new blocks (without hits), or None if memory is short.

        The arguments are those of vLLM's method, which documents them.
        """
        held = self._held.get(request.request_id)
        tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        if held is not None:
            added = self.empty_kv_cache_blocks if tokens <= held.room else self._grow(held, request, tokens)
            if num_new_tokens > 1 and self._ahead and added is not None:
                self._publish(held, request, request.num_computed_tokens + num_new_tokens)
            return added
        hits = num_new_computed_tokens
        tokens += hits + num_external_computed_tokens
        headroom = reserved_blocks + (self.watermark_blocks if has_scheduled_reqs else 0)
        least = request.num_tokens if full_sequence_must_fit and self._window is None else 0
        held = self._begin(request, hits, tokens, least, headroom)
        if held is None:
            return None
        if self._ahead and num_external_computed_tokens == 0 and not delay_cache_blocks:
            self._publish(held, request, hits + num_new_tokens)
        return self._blocks(held.blocks[hits // self.block_size :])

    def _begin(self, request: Request, hits: int, tokens: int, least: int, headroom: int) -> Held | None:
        """Begin a request with ``hits`` cached tokens and room for ``tokens``; None if there is not room for ``least``
        tokens now, and ``headroom`` blocks besides.
        """
        size, cache = self.block_size, self._cache
        end = _round_up(min(tokens, self.max_model_len), size)
        most = max(end, _round_up(min(least, self.max_model_len), size))
        prompt = self._prompt_of(request)
        held = Held(prompt, end, hits)
        tokens_of_hits = None if prompt.ids is None else prompt.ids[: hits + 1]
        changes = cache.allocate(held, most - hits, tokens=tokens_of_hits, **prompt.keys)
        if changes is None:
            return None
        if cache.num_cached_tokens(held) != hits or (headroom > 0 and headroom > self.free_blocks):
            cache.free(held)  # what was told to be cached is gone, or too little is left: asked again in the next step
            return None
        if most > end:  # it would have fitted: what it does not need yet goes back
            cache.truncate(held, end)
        held.blocks = changes.blocks[: end // size].tolist()
        self._held[request.request_id] = held
        del self._waiting[request.request_id]
        return held

    def _grow(self, held: Held, request: Request, tokens: int) -> Any:
        """Publish what the request has computed, and give it room for ``tokens``."""
        cache, room, size = self._cache, held.room, self.block_size
        end = _round_up(min(tokens, self.max_model_len), size)
        if end <= room:
            return self.empty_kv_cache_blocks
        valid = request.num_computed_tokens - request.num_in_flight_tokens
        full = self._publishes and valid >= room
        if full:
            changes = cache.step(held, end - room, _ids(held, request, room))
        else:
            self._publish(held, request, valid)
            changes = cache.allocate(held, end - room)
        if changes is None:
            return None
        if full:
            held.committed = room
        held.room = end
        added = changes.blocks.tolist() if self._window is None else self._note_dropped(held, changes)
        held.blocks += added
        return self._blocks(added)

    def _publish(self, held: Held, request: Request, tokens: int) -> None:
        """Publish the request's first ``tokens`` tokens, drafts excepted, in whole blocks."""
        tokens = min(tokens, request.num_tokens, held.room)
        tokens -= tokens % self.block_size
        if tokens <= held.committed or not self._publishes:
            return
        ids = _ids(held, request, tokens)
        changes = self._cache.publish(held, ids, count=tokens - held.committed if ids is None else None)
        held.committed = tokens
        if len(changes) > 0:
            self._note_dropped(held, changes)

    @staticmethod
    def _note_dropped(held: Held, changes: TableChanges) -> list[int]:
        """Note which entries a window has dropped; return the entries that are new."""
        known, added = len(held.blocks), []
        for column, block in zip(changes.columns.tolist(), changes.blocks.tolist(), strict=True):
            if column >= known:
                added.append(block)
            else:
                held.blocks[column] = block
        return added

    def free(self, request: Request) -> None:
        """End the request, or preempt it; what it has computed stays cached. Nothing if it holds no blocks."""
        held = self._end(request)
        if held is not None:
            self._cache.free(held)

    def pop_blocks_for_free(self, request: Request) -> list[Held]:
        """End the request, whose blocks stay in use until ``block_pool.free_blocks`` gets what this returns."""
        held = self._end(request)
        return [] if held is None else [held]

    def _end(self, request: Request) -> Held | None:
        self._waiting.pop(request.request_id, None)
        held = self._held.pop(request.request_id, None)
        if held is not None:
            self._publish(held, request, request.num_computed_tokens - request.num_in_flight_tokens)
        return held

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Nothing to do: a window drops its blocks when tokens are published."""

    def take_freed_blocks(self) -> list[int]:
        """Return the blocks, ascending, that neither a request nor cached content has used since the last call, and that
        one had used before: their memory can be given back to the system.

        The first call returns none and begins to count, which makes later steps slower: a block is taken from the pool
        of pages again each time. Cost: linear in the pool.
        """
        core, freed = self.allocator.core, set[int]()
        stats = core.stats()
        self.allocator.trim(stats.parked_bytes - stats.cached_bytes)  # a block is a page: those without content
        if not self._tells_freed:
            self._tells_freed = True
            core.record()
            return []
        for kind, _, slot, _, count, _ in core.take_ops():
            if kind == "unmap":
                freed.update(range(slot, slot + count))
            elif kind == "map":
                freed.difference_update(range(slot, slot + count))
        return sorted(freed)

    # --- what the scheduler asks ---

    def get_blocks(self, request_id: str) -> Any:
        return self._blocks(self.get_block_ids(request_id)[0])

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        held = self._held.get(request_id)
        return ([] if held is None else list(held.blocks),)

    def get_block_ids_for_computed_tokens(self, request_id: str, num_computed_tokens: int) -> tuple[list[int], ...]:
        return (self.get_block_ids(request_id)[0][: math.ceil(num_computed_tokens / self.block_size)],)

    def create_kv_cache_blocks(self, blocks: tuple[Sequence[Any], ...]) -> Any:
        return self._foreign.wrap(blocks) if any(blocks) else self.empty_kv_cache_blocks

    def get_num_common_prefix_blocks(self, running_request_id: str) -> list[int]:
        return [0]

    @property
    def free_blocks(self) -> int:
        """Blocks that no request uses, cached ones included. Cost: linear in the requests."""
        held = self.allocator.core.stats().held_bytes // self._block_bytes
        return self._pool_blocks + self._backed - held

    @property
    def usage(self) -> float:
        """The part of the pool that requests hold, 0 to 1."""
        return (self._pool_blocks - self.free_blocks) / self._pool_blocks

    def make_prefix_cache_stats(self) -> Any:
        if not self.log_stats:
            return None
        stats, self.prefix_cache_stats = self.prefix_cache_stats, self._foreign.stats()
        return stats

    def prefix_cache_lookup_enabled(self, request: Request) -> bool:
        return self.enable_caching and not request.skip_reading_prefix_cache

    def record_prefix_cache_stats(self, request: Request, num_hits: int) -> None:
        if self.prefix_cache_stats is not None and self.prefix_cache_lookup_enabled(request):
            self.prefix_cache_stats.record(
                num_tokens=request.num_tokens, num_hits=num_hits, preempted=request.num_preemptions > 0
            )

    # --- once a step; kvmem copies no block and has no state layers here ---

    def new_step_starts(self) -> None:
        """Nothing to do."""

    def take_new_block_ids(self) -> list[int]:
        return []

    def record_blocks_for_zeroing(self, request_id: str, start_token: int) -> None:
        """Nothing to do: models whose blocks must be zeroed are refused."""

    def take_kv_cache_block_copies(self) -> tuple[list[Any], list[Any]]:
        return [], []

    def take_boundary_state_offloads(self) -> dict[str, list[tuple[int, int, int]]]:
        return {}

    def finalize_partial_tail_offloads(self, request: Request) -> list[tuple[int, int, int]]:
        return []

    def take_events(self) -> list[Any]:
        return []

    def _blocks(self, ids: Sequence[int]) -> Any:
        if not ids:
            return self.empty_kv_cache_blocks
        blocks = self._foreign.blocks
        return self._foreign.wrap(([blocks[block] for block in ids],))


class BlockPool:
    """The part of vLLM's ``BlockPool`` that its scheduler uses."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager

    def free_blocks(self, ordered_blocks: Iterable[Held]) -> None:
        """Free what ``pop_blocks_for_free`` returned."""
        self._manager._cache.free_all(ordered_blocks)

    def get_num_free_blocks(self) -> int:
        return self._manager.free_blocks

    def get_usage(self) -> float:
        return self._manager.usage


class Coordinator:
    """The part of vLLM's coordinator that its scheduler and its engine use."""

    enable_partial_hash_hits = False
    single_type_managers: tuple[_Group, ...]

    def __init__(self, manager: BlockManager, groups: tuple[_Group, ...]) -> None:
        self._manager, self.single_type_managers = manager, groups

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *_: Any, **__: Any) -> int:
        """Return how many blocks the request lacks for ``num_tokens`` tokens."""
        have = len(self._manager.get_block_ids(request_id)[0])
        return max(0, math.ceil(num_tokens / self._manager.block_size) - have)


def _round_up(tokens: int, size: int) -> int:
    return -(-tokens // size) * size


def _page_bytes(block_size: int) -> int:
    """Return bytes of a page, a multiple of the block size, so that a block of ``_spec_of_pages`` is one page."""
    return math.lcm(_PAGE_BYTES, block_size)


def _spec_of_pages(block_size: int, block_bytes: int, window_tokens: int | None) -> CacheSpec:
    """Return a spec whose block is one page: what a token stores does not matter to whom decides only, and the pages of
    the pool are then the engine's blocks, one for one.
    """
    token = Component("block", heads=1, width=block_bytes // block_size, dtype="uint8")
    return CacheSpec((Group("layers", (token,), (0,), window_tokens=window_tokens),), block_size=block_size)


def _ids(held: Held, request: Request, end: int) -> Tokens | None:
    """Return the ids of the tokens that the request has not published yet, up to ``end``."""
    if held.prompt.ids is None:
        return None
    ids = held.prompt.ids if end <= len(held.prompt.ids) else request.all_token_ids
    return ids[held.committed : end]  # type: ignore[return-value]  # a list of what vLLM calls a ConstantList


def _keys(request: Request) -> dict[str, Any]:
    """Return what the KV of the request depends on beside its tokens: tenant, adapter, images from their place on."""
    lora = request.lora_request
    images = [(feature.mm_position.offset, feature.identifier) for feature in request.mm_features]
    return {
        "salt": request.cache_salt,
        "adapter": None if lora is None else lora.lora_name,
        "extra_key": images or None,
    }
