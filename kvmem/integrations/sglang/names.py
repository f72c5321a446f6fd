"""Every name of SGLang that this integration uses, and the check that the installed version has them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from kvmem.errors import SpecError
from kvmem.integrations.names import missing_arguments, missing_names

__all__ = ["LINKER", "STORAGE", "VERSION", "check_names"]

VERSION: Final = "0.5.23"  # that the tests run


def _names(table: str) -> tuple[str, ...]:
    """Return module:class.attribute for each line of a module below ``sglang.srt``, a class, and its attributes."""
    found = []
    for module, owner, *attributes in (line.split() for line in table.splitlines() if line):
        found += [f"sglang.srt.{module}:{owner}" + (f".{one}" if one else "") for one in attributes or [""]]
    return tuple(found)


_BOTH: Final = """
runtime_context get_lora
runtime_context get_model
runtime_context get_parallel
runtime_context get_serving
mem_cache.hicache_storage PoolName KV MAMBA
mem_cache.hicache_storage PoolHitPolicy ALL_PAGES TRAILING_PAGES
mem_cache.hicache_storage PoolTransfer name keys host_indices device_indices hit_policy
"""
LINKER: Final = _names(f"""{_BOTH}
mem_cache.cache_init_params CacheInitParams page_size token_to_kv_pool_allocator req_to_token_pool pp_rank pp_size
mem_cache.cache_init_params CacheInitParams tp_cache_group attn_tp_cache_group attn_cp_cache_group attn_cp_rank
mem_cache.cache_init_params CacheInitParams attn_cp_size mtp_draft_device_pools sidecar_draft_device_pools
mem_cache.hybrid_cache.linker_pool_assembler DevicePoolEntry prepare_locations
mem_cache.hybrid_cache.linker_pool_assembler DevicePoolGroup resolve_transfers
mem_cache.hybrid_cache.linker_pool_assembler resolve_hybrid_device_pool_group
mem_cache.memory_pool MHATokenToKVPool register_layer_transfer_counter
mem_cache.memory_pool MLATokenToKVPool register_layer_transfer_counter
mem_cache.unified_cache.component_type ComponentType FULL
mem_cache.unified_cache.unified_cache_linker LayerWiseLoadCounter update_producer complete fail finish reset
mem_cache.unified_cache.unified_cache_linker LayerWiseLoadCounter set_consumer wait_until
mem_cache.unified_cache.unified_cache_linker UnifiedCacheLinker record_offload_ready
""")
STORAGE: Final = _names(f"""{_BOTH}
mem_cache.hicache_storage HiCacheStorage register_mem_pool_host register_mem_host_pool_v2 on_host_pools_registered
mem_cache.hicache_storage HiCacheStorage batch_exists_v2 batch_get_v1 batch_set_v1 batch_get_v2 batch_set_v2 clear
mem_cache.hicache_storage HiCacheStorageConfig tp_rank tp_size pp_rank pp_size attn_cp_rank attn_cp_size dcp_size
mem_cache.hicache_storage HiCacheStorageConfig is_mla_model model_name extra_config
mem_cache.hicache_storage PoolTransferResult kv_hit_pages extra_pool_hit_pages restorable_prefix_pages
mem_cache.pool_host HostKVCache get_data_page get_dummy_flat_data_page set_from_flat_data_page
""")


def check_names(names: tuple[str, ...], ours: type[Any], theirs: type[Any]) -> None:
    """Raise ``SpecError``, in one sentence, if the installed SGLang has not all ``names``, or if ``theirs``, the class
    that ``ours`` implements, asks for what ``ours`` does not have."""
    wrong = [f"it has no `{name}`" for name in missing_names(names)]
    for name in sorted(getattr(theirs, "__abstractmethods__", ())):
        mine = getattr(ours, name)
        if getattr(mine, "__isabstractmethod__", False):
            wrong.append(f"it calls `{theirs.__name__}.{name}`, which kvmem does not have")
        elif lacking := missing_arguments(getattr(theirs, name), mine):
            wrong.append(f"it calls `{theirs.__name__}.{name}` with {', '.join(lacking)}, which kvmem does not take")
    if wrong:
        try:
            found = version("sglang")
        except PackageNotFoundError:
            found = "a version that does not say which it is"
        raise SpecError(
            f"kvmem.integrations.sglang was made for SGLang {VERSION} and cannot run in {found}: {'; '.join(wrong)}; "
            f"`pip install sglang=={VERSION}`"
        )
