"""SGLang's ``HiCacheStorage`` over kvmem's tiers: the level below SGLang's own host memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolHitPolicy, PoolName, PoolTransferResult
from sglang.srt.mem_cache.pool_host import HostKVCache

from kvmem.errors import SpecError
from kvmem.integrations.sglang.config import Options, open_store, page_keys
from kvmem.integrations.sglang.keys import Rank
from kvmem.integrations.sglang.names import STORAGE, check_names
from kvmem.integrations.sglang.store import ends_of_runs
from kvmem.tiers.fault_log import FaultLog

__all__ = ["KVMemStorage"]

_FORM = ("dtype", "layout", "page_size", "start_layer", "end_layer", "layer_num", "head_num", "head_dim", "v_head_dim")


class KVMemStorage(HiCacheStorage):  # type: ignore[misc]  # SGLang is not read by mypy
    """Pages of SGLang's host pools in tiers. A page that is read is verified before the host pool sees it.

    storage_config: of SGLang; its ``extra_config["kvmem"]`` holds ``Options``. The tiers open when SGLang has
    registered its host pools; until then everything is a miss. ``SpecError`` and ``TierError`` as for the linker.
    """

    def __init__(self, storage_config: Any, kwargs: object = None) -> None:
        check_names(STORAGE, type(self), HiCacheStorage)
        self._options = Options.of((storage_config.extra_config or {}).get("kvmem"))
        one = storage_config
        if one.dcp_size != 1:
            raise SpecError(
                f"kvmem's storage does not serve decode context parallelism, here over {one.dcp_size} ranks"
            )
        self._rank = Rank(one.tp_rank, one.tp_size, one.pp_rank, one.pp_size, one.attn_cp_rank, one.attn_cp_size)
        self._alike = bool(one.is_mla_model)
        if self._alike and one.tp_size > 1 and all(tier["type"] in ("host", "disk") for tier in self._options.tiers):
            raise SpecError("tiers: SGLang stores latent KV on rank 0 only; with more ranks one tier must be remote")
        self._name = storage_config.model_name
        self._pools: dict[str, Any] = {}
        self._keys: Any = None
        self._store: Any = None
        self._log = FaultLog("kvmem's storage")

    # --- the host pools ---

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        super().register_mem_pool_host(mem_pool_host)
        self._pools[PoolName.KV] = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name != PoolName.KV or isinstance(host_pool, HostKVCache):
            self._pools[host_pool_name] = host_pool
        if self._store is not None:  # registered later: it may hold larger pages than the tiers were opened for
            self._keys = self._keys_of_pools()

    def on_host_pools_registered(self) -> None:
        """Open the tiers. SGLang gives up the backend if this raises."""
        if self._store is None:
            self._keys = self._keys_of_pools()
            largest = max(pool.get_dummy_flat_data_page().nbytes for pool in self._pools.values())
            self._store = open_store(self._options, self._rank, largest, self._forms())

    def _forms(self) -> list[object]:
        def form(pool: Any) -> list[str]:
            shape = [str(getattr(pool, name, None)) for name in (*_FORM, "storage_format_tag")]
            return [type(pool).__name__, *shape, str(pool.get_dummy_flat_data_page().nbytes)]

        return [[str(name), form(pool)] for name, pool in self._pools.items()]

    def _keys_of_pools(self) -> Any:
        alike = {name: self._alike and name != PoolName.MAMBA for name in self._pools}
        ranks = {name: self._rank.shared() if alike[name] else self._rank for name in self._pools}
        return page_keys(self._options, ranks, [self._name, self._forms()])

    # --- pages as flat tensors ---

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Return how many of the first pages of the main pool are stored, without a gap."""
        return self._store.leading(self._keys.of(PoolName.KV, keys)) if self._store else 0

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """Return the longest prefix that every pool can restore, by its hit policy, and all such lengths."""
        pages = self.batch_exists(keys)
        hits, restorable = {PoolName.KV: pages} if pages else {}, set(range(1, pages + 1))
        for one in pool_transfers or []:
            if not restorable:
                break
            there = self._store.present(self._keys.of(one.name, keys[:pages]))
            window = max(1, len(one.keys or ())) if one.hit_policy == PoolHitPolicy.TRAILING_PAGES else pages
            found = ends_of_runs(there, window)
            hits[one.name] = max(found, default=0)
            restorable &= found
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> torch.Tensor | None:
        page: torch.Tensor | None = self.batch_get([key], None if target_location is None else [target_location])[0]
        return page

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """Return the pages of the main pool, None for each that is missing, damaged or late."""
        return self._get(PoolName.KV, keys, target_locations)

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return all(self._put(PoolName.KV, keys, values))

    def _get(self, pool: str, keys: Sequence[str], targets: Sequence[torch.Tensor] | None = None) -> list[Any]:
        if self._store is None:
            return [None] * len(keys)
        # Pages of its own: a tier that answers late writes on, when SGLang may have given its memory to another page.
        pages = [self._pools[pool].get_dummy_flat_data_page() for _ in keys]
        results = self._store.get(self._keys.of(pool, keys), [_bytes_of(page) for page in pages])
        if targets is not None:
            copied = zip(targets, pages, results, strict=True)
            pages = [target.copy_(page.view_as(target)) if result.ok else page for target, page, result in copied]
        return [page if result.ok else None for page, result in zip(pages, results, strict=True)]

    def _put(self, pool: str, keys: Sequence[str], pages: Sequence[torch.Tensor]) -> list[bool]:
        if self._store is None:
            return [False] * len(keys)
        # Copies: a tier that answers late reads on, when SGLang may have given the host memory to another page.
        results = self._store.put(self._keys.of(pool, keys), [_bytes_of(page.flatten().clone()) for page in pages])
        return [bool(result.ok) for result in results]

    # --- pages of the host pools ---

    def batch_get_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._move(PoolName.KV, keys, host_indices, self._load)

    def batch_set_v1(self, keys: list[str], host_indices: torch.Tensor, extra_info: Any = None) -> list[bool]:
        return self._move(PoolName.KV, keys, host_indices, self._save)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {one.name: self._move(one.name, one.keys or [], one.host_indices, self._load) for one in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        return {one.name: self._move(one.name, one.keys or [], one.host_indices, self._save) for one in transfers}

    def _move(self, pool: str, keys: list[str], indices: torch.Tensor | None, work: Any) -> list[bool]:
        rows = getattr(self._pools.get(pool), "page_size", 1) or 1
        if pool not in self._pools or indices is None or len(indices) != len(keys) * rows:
            self._log.warn("indices", f"{pool}: {len(keys)} pages do not fit their indices, and are misses")
            return [False] * len(keys)
        found: list[bool] = work(pool, keys, indices[::rows].tolist())
        return found

    def _load(self, pool: str, keys: list[str], rows: list[int]) -> list[bool]:
        pages = self._get(pool, keys)
        for row, page in zip(rows, pages, strict=True):
            if page is not None:
                self._pools[pool].set_from_flat_data_page(row, page)
        return [page is not None for page in pages]

    def _save(self, pool: str, keys: list[str], rows: list[int]) -> list[bool]:
        return self._put(pool, keys, [self._pools[pool].get_data_page(row) for row in rows])

    # --- the end ---

    def clear(self) -> None:
        """Do nothing but say so: tiers may be shared, and none of them lists its pages."""
        self._log.warn("clear", "kvmem's tiers are not emptied from here; remove the folder, or flush the store")

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


def _bytes_of(page: torch.Tensor) -> memoryview:
    return page.view(-1).view(torch.uint8).numpy().data
