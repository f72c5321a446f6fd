"""SGLang's ``UnifiedCacheLinker`` over kvmem's tiers.

A load is read and verified before it is accepted: ``load`` waits for the tiers, ``deadline_seconds`` a pool at most; a
page that is missing, damaged or late makes it refuse, so that SGLang computes the prompt. SGLang would abort the
request if a load failed later. What is accepted is copied to the device layer by layer, while the first layers compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import wait
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import torch
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import (
    DevicePoolEntry,
    DevicePoolGroup,
    resolve_hybrid_device_pool_group,
)
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import LayerWiseLoadCounter, UnifiedCacheLinker

from kvmem.arguments import parse_bytes
from kvmem.errors import SpecError
from kvmem.integrations.background import Background
from kvmem.integrations.sglang.config import Options, open_store, page_keys
from kvmem.integrations.sglang.keys import Rank
from kvmem.integrations.sglang.names import LINKER, check_names
from kvmem.integrations.sglang.pages import PoolPages
from kvmem.integrations.sglang.store import ends_of_runs
from kvmem.tiers.fault_log import FaultLog

__all__ = ["KVMemLinker"]

_CHUNK_BYTES: Final = 64 << 20  # of an offload, gathered and stored at once


class _Part(NamedTuple):
    """Pages of one pool: where they are on the device, and their keys in the tiers."""

    pool: PoolPages
    pages: torch.Tensor
    keys: list[bytes]

    @property
    def num_bytes(self) -> int:
        return len(self.keys) * self.pool.page_bytes


class KVMemLinker(UnifiedCacheLinker):  # type: ignore[misc]  # SGLang is not read by mypy
    """One process's link. SGLang makes it, and calls it from its scheduler's thread.

    extra_config: ``Options``. ``SpecError`` for a model or an SGLang that it cannot serve; ``TierError`` if a tier does
    not open.
    """

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: set[Any],
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        check_names(LINKER, type(self), UnifiedCacheLinker)
        options = Options.of(extra_config)
        self.forward_stream = forward_stream
        self._group = _pool_group(params, components)
        self.pools = self._group.entry_map
        self._pages = {name: _pages_of(entry) for name, entry in self.pools.items()}
        self._groups = [params.attn_cp_cache_group, params.attn_tp_cache_group or params.tp_cache_group]
        rank = _rank(params)
        forms = [[str(name), pool.form] for name, pool in self._pages.items()]
        mine = rank.shared() if self._group.rank_replicated else rank
        self._keys = page_keys(options, {str(name): mine for name in self._pages}, forms)
        self._store = open_store(options, rank, max(pool.page_bytes for pool in self._pages.values()), forms)
        self.layer_done_counter = LayerWiseLoadCounter(self._group.num_layers)
        if PoolName.MAMBA in self.pools:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        self._deadline = options.deadline_seconds
        self._most = parse_bytes("staging", options.staging)
        self._lock = threading.Lock()
        self._staged = self._waiting = 0  # bytes of accepted loads, of queued offloads
        self._round = 0  # offloads of an earlier one were cut off by a reset
        self._queued: dict[str, list[tuple[_Part, torch.Tensor]]] = {}
        self._results: SimpleQueue[bool] = SimpleQueue()
        self._log = FaultLog("kvmem's linker")
        self._loader, self._offloader = Background(1, "kvmem load"), Background(1, "kvmem offload")
        self._closed = False

    # --- loads ---

    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Return the lengths, in pages, that the tiers have and that staging has room for."""
        expanded = self._group.resolve_transfers(transfers)
        kv = next((one for one in expanded if one.name == PoolName.KV), None)
        if kv is None or self._closed:
            return []
        every = [one for one in expanded if one.hit_policy == PoolHitPolicy.ALL_PAGES]
        page_bytes = sum(self._pages[one.name].page_bytes for one in every)
        pages = list(kv.keys)[: max(0, (self._most - self._staged) // page_bytes)]
        for one in every:
            pages = pages[: self._store.leading(self._keys.of(one.name, pages))]
        restorable = set(range(1, len(pages) + 1))
        for one in expanded:
            if one.hit_policy != PoolHitPolicy.ALL_PAGES and restorable:
                there = self._store.present(self._keys.of(one.name, pages))
                restorable &= ends_of_runs(there, max(1, len(one.keys)))
        return sorted(restorable)

    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Read and verify what the transfers name; True if all ranks have all of it, which is then queued."""
        parts = self._parts(transfers, allow_missing_kv=True)
        if not parts:
            return False
        staged = [] if rid in self._queued else self._read(rid, parts)
        if not self._agree(bool(staged)):
            return False
        self._queued[rid] = staged
        self._count(staged=sum(part.num_bytes for part in parts))
        return True

    def _read(self, rid: str, parts: list[_Part]) -> list[tuple[_Part, torch.Tensor]]:
        """Return the parts and their verified payloads; an empty list if a page is missing."""
        size = sum(part.num_bytes for part in parts)
        if self._closed or self._staged + size > self._most:
            self._log.warn("staging", f"request {rid} is computed: {size} bytes are more than staging has room for")
            return []
        staged = []
        for part in parts:
            payloads = part.pool.staging(len(part.keys))
            for key_result in self._store.get(part.keys, [row.numpy().data for row in payloads]):
                if not key_result.ok:
                    self._log.warn("load", f"request {rid} is computed: {key_result.reason}")
                    return []
            staged.append((part, payloads))
        return staged

    def _agree(self, mine: bool) -> bool:
        """Return whether it is so on all ranks, each of which calls this for the same load."""
        verdict = torch.tensor([int(mine)], dtype=torch.int32)
        for group in self._groups:
            if group is not None and torch.distributed.get_world_size(group=group) > 1:
                torch.distributed.all_reduce(verdict, op=torch.distributed.ReduceOp.MIN, group=group)
        return bool(verdict.item())

    def cancel_queued_load(self, rid: str) -> bool:
        staged = self._queued.pop(rid, None)
        if staged is not None:
            self._count(staged=-sum(part.num_bytes for part, _ in staged))
        return staged is not None

    def start_layer_wise_loading(self) -> int:
        if not self._queued:
            return -1
        queued, self._queued = self._queued, {}
        index: int = self.layer_done_counter.update_producer()
        ready = self.record_offload_ready()  # who reads or writes the slots now does so on these streams
        self._loader.submit(lambda: self._copy(index, [pair for staged in queued.values() for pair in staged], ready))
        return index

    def _copy(self, index: int, staged: list[tuple[_Part, torch.Tensor]], ready: list[Any]) -> None:
        try:
            for event in ready:
                event.synchronize()
            for layer in range(self._group.num_layers):
                for part, payloads in staged:
                    part.pool.scatter(layer, part.pages, payloads)
                if staged[0][0].pool.device.type == "cuda":
                    torch.cuda.current_stream(staged[0][0].pool.device).synchronize()
                self.layer_done_counter.complete(index, layer)
        except BaseException as error:  # noqa: BLE001  SGLang waits for each layer: it must learn of any failure
            self._log.warn("copy", f"a load was given up, and SGLang aborts its requests: {error}")
            self.layer_done_counter.fail(index, error)
        finally:
            self._count(staged=-sum(part.num_bytes for part, _ in staged))

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        return bool(self.layer_done_counter.finish(counter_index))

    # --- offloads ---

    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Queue the pages. What staging has no room to wait for is not stored: its completion says so, in its turn."""
        parts = self._parts(transfers)
        if not parts or self._closed:
            return False
        size = sum(part.num_bytes for part in parts)
        room = self._waiting == 0 or self._waiting + size <= self._most
        ready, this = self.record_offload_ready(), self._round
        self._count(waiting=size)

        def work() -> None:
            stored = False
            try:
                stored = room and self._save(parts, ready, lambda: this != self._round)
            except Exception as error:  # noqa: BLE001  SGLang counts completions: each offload must have one
                self._log.warn("offload", f"pages were not stored: {error}")
            finally:
                self._count(waiting=-size)
                self._results.put(stored)

        self._offloader.submit(work)
        return True

    def _save(self, parts: list[_Part], ready: list[Any], cut_off: Callable[[], bool]) -> bool:
        for event in ready:
            event.synchronize()
        for pool, pages, keys in parts:
            step = max(1, _CHUNK_BYTES // pool.page_bytes)
            for at in range(0, len(keys), step):
                if cut_off():
                    return False
                payloads = pool.staging(len(keys[at : at + step]))
                pool.gather(pages[at : at + step], payloads)
                results = self._store.put(keys[at : at + step], [row.numpy().data for row in payloads])
                if not all(result.ok for result in results):
                    return False
        return True

    def num_completed_offloads(self) -> int:
        return self._results.qsize()

    def pop_completed_offload(self) -> bool:
        return self._results.get_nowait()

    # --- the end ---

    def reset(self) -> None:
        """Forget queued loads, and completions. Offloads have ``deadline_seconds`` to end; then what is queued is given
        up. What is stored stays stored: SGLang flushes its cache this way."""
        if self._closed:
            return
        for rid in list(self._queued):
            self.cancel_queued_load(rid)
        ends = [background.submit(lambda: None) for background in (self._loader, self._offloader)]
        if wait(ends, self._deadline).not_done:
            self._round += 1
            wait(ends)
        while self._results.qsize():
            self._results.get_nowait()
        self.layer_done_counter.reset()

    def close(self) -> None:
        """``reset``, and close the tiers. Later calls are misses; closing twice is no error."""
        if self._closed:
            return
        self.reset()
        self._closed = True
        for background in (self._loader, self._offloader):
            background.close(1.0)
        self._store.close()

    # --- details ---

    def _parts(self, transfers: list[Any], allow_missing_kv: bool = False) -> list[_Part]:
        found = []
        for one in self._group.resolve_transfers(transfers, allow_partial=True, allow_missing_kv=allow_missing_kv):
            pool = self._pages[one.name]
            rows = torch.tensor(self.pools[one.name].prepare_locations(one.host_indices), dtype=torch.int64)
            found.append(_Part(pool, rows // pool.page_rows, self._keys.of(one.name, one.keys)))
        return found

    def _count(self, staged: int = 0, waiting: int = 0) -> None:
        with self._lock:
            self._staged += staged
            self._waiting += waiting


def _pool_group(params: Any, components: set[Any]) -> Any:
    """Return SGLang's description of the device pools; ``SpecError`` for a model that cannot be served."""
    pool, page = params.token_to_kv_pool_allocator.get_kvcache(), params.page_size
    if type(pool) not in (MHATokenToKVPool, MLATokenToKVPool) or components != {ComponentType.FULL}:
        try:
            return resolve_hybrid_device_pool_group(kvcache=pool, page_size=page, params=params, components=components)
        except (ValueError, AssertionError, NotImplementedError) as error:  # SGLang has no such pools
            raise SpecError(f"kvmem's linker cannot serve this model: {error}") from error
    if params.mtp_draft_device_pools or params.sidecar_draft_device_pools:
        raise SpecError("kvmem's linker does not serve speculative decoding on this model; start SGLang without")
    layers = len(pool.kv_buffer if type(pool) is MLATokenToKVPool else pool.k_buffer)
    if type(pool) is MLATokenToKVPool:
        scales, buffers, mapping = [pool.kv_scale_buffer], [*pool.kv_buffer], {layer: layer for layer in range(layers)}
    else:
        scales = [pool.k_scale_buffer, getattr(pool, "native_k_scale_buffer", None)]
        buffers = [*pool.k_buffer, *pool.v_buffer]
        mapping = {layer: (layer, layers + layer) for layer in range(layers)}  # type: ignore[misc]
    if any(scale is not None for scale in scales) or getattr(pool, "kv_cache_layout", "nhd") != "nhd":
        raise SpecError("kvmem's linker serves unscaled KV in the layout nhd; choose another --kv-cache-dtype")
    entry = DevicePoolEntry(
        name=PoolName.KV,
        indices_from_pool=PoolName.KV,
        device_pool=pool,
        components=[buffers],
        layer_mapping=mapping,
        page_size=page,
        rows_are_pages=False,
    )
    return DevicePoolGroup([entry], layers, page, rank_replicated=type(pool) is MLATokenToKVPool)


def _pages_of(entry: Any) -> PoolPages:
    """Return the pages of one of SGLang's pools. Its ``buffer_meta`` has each buffer's bytes of a page, last."""
    buffer = entry.components[0][0]
    rows = entry.buffer_meta[0][0][2] // (buffer.nbytes // buffer.shape[0])
    layers = {
        layer: (index,) if isinstance(index, int) else tuple(index) for layer, index in entry.layer_mapping.items()
    }
    return PoolPages(entry.components, layers, rows)


def _rank(params: Any) -> Rank:
    group = params.attn_tp_cache_group or params.tp_cache_group
    tensor, tensors = 0, 1
    if group is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        tensor, tensors = torch.distributed.get_rank(group=group), torch.distributed.get_world_size(group=group)
    return Rank(tensor, tensors, params.pp_rank, params.pp_size, params.attn_cp_rank, params.attn_cp_size)
