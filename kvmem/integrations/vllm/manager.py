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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvmem import TableChanges
from kvmem.integrations.vllm.held import Held, Prompt, Request
from kvmem.integrations.vllm.pool import BlockPool, Coordinator, round_up

__all__ = ["BlockManager", "Foreign"]


@dataclass(frozen=True)
class Foreign:
    """What the manager makes of vLLM: ``KVCacheBlocks`` round a tuple of lists, the block objects by id, statistics."""

    wrap: Callable[[tuple[Sequence[Any], ...]], Any]
    blocks: Sequence[Any]
    stats: Callable[[], Any]


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
        self.block_size, self.max_model_len, self.enable_caching = block_size, max_model_len, prefix_cache
        self.log_stats, self.watermark_blocks = log_stats, int(watermark * num_blocks)
        self._foreign, self._window = foreign, window_tokens
        self._ahead = ahead and window_tokens is None
        self._publishes = prefix_cache or window_tokens is not None
        self.block_pool = BlockPool(
            num_blocks,
            block_size,
            max_tokens=max_model_len,
            max_requests=max_requests,
            window_tokens=window_tokens,
            prefix_cache=prefix_cache,
            policy=policy,
        )
        self.allocator, self._cache = self.block_pool.allocator, self.block_pool.cache
        self._held: dict[str, Held] = {}
        self._waiting: dict[str, Prompt] = {}  # by request that was looked at and holds no blocks yet
        self.coordinator = Coordinator(self._held, block_size, group_spec)
        self.empty_kv_cache_blocks = foreign.wrap(((),))
        self.prefix_cache_stats = foreign.stats() if log_stats else None

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

    def _prompt_of(self, request: Request) -> Prompt:
        prompt = self._waiting.get(request.request_id)
        if prompt is None or (prompt.ids is not None and len(prompt.ids) != request.num_tokens):
            prompt = self._waiting[request.request_id] = Prompt(request)
        return prompt

    def get_computed_blocks_for_connector(self, request: Request) -> tuple[Any, int, int, bool]:
        return *self.get_computed_blocks(request), False

    def truncate_computed_blocks(self, blocks: Any, num_computed_tokens: int) -> Any:
        """Return ``blocks``: what ``get_computed_blocks`` returns names none, and ends at a block."""
        return blocks

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Publish the request's first ``num_computed_tokens`` tokens: a connector has loaded them."""
        held = self._held.get(request.request_id)
        if held is not None:
            held.loading = ""
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
            if num_new_tokens == 1 and tokens <= held.room:  # most steps
                return self.empty_kv_cache_blocks
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
        if num_external_computed_tokens > 0:
            held.loading = "later" if delay_cache_blocks else "now"
        elif self._ahead:
            self._publish(held, request, hits + num_new_tokens)
        return self._blocks(held.blocks[hits // self.block_size :])

    def _begin(self, request: Request, hits: int, tokens: int, least: int, headroom: int) -> Held | None:
        """Begin a request with ``hits`` cached tokens and room for ``tokens``; None if there is not room for ``least``
        tokens now, and ``headroom`` blocks besides.
        """
        size, cache = self.block_size, self._cache
        end = round_up(min(tokens, self.max_model_len), size)
        most = max(end, round_up(min(least, self.max_model_len), size))
        prompt = self._prompt_of(request)
        held = Held(prompt, [], end, hits)
        tokens_of_hits = None if prompt.ids is None else prompt.ids[: hits + 1]
        changes = cache.allocate(held, most - hits, tokens=tokens_of_hits, **prompt.keys)
        if changes is None:
            return None
        if cache.num_cached_tokens(held) != hits or (headroom > 0 and headroom > self.block_pool.get_num_free_blocks()):
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
        end = room + size  # mostly
        if tokens > end or tokens > self.max_model_len:
            end = round_up(min(tokens, self.max_model_len), size)
            if end <= room:
                return self.empty_kv_cache_blocks
        valid = held.valid_tokens(request)
        full = self._publishes and valid >= room
        if full:
            changes = cache.step(held, end - room, held.ids(request, room))
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
        ids = held.ids(request, tokens)
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
            self._publish(held, request, held.valid_tokens(request))
        return held

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Nothing to do: a window drops its blocks when tokens are published."""

    def take_freed_blocks(self) -> list[int]:
        """As ``BlockPool.take_freed_blocks``; the stock manager has no such method."""
        return self.block_pool.take_freed_blocks()

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
    def usage(self) -> float:
        """The part of the pool that requests hold, 0 to 1. Cost: linear in the requests."""
        return self.block_pool.get_usage()

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
