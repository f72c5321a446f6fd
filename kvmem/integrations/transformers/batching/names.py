"""Every name of transformers that its continuous batching over kvmem relies on, and the check that a version has them.

A manager takes another batch processor by a public attribute, but what a cache must offer is no promise of
transformers'. So the names are listed here and looked up before anything is made: a version that differs ends with one
sentence, not with wrong tokens.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from kvmem.errors import SpecError

__all__ = ["CACHE", "NAMES", "VERSIONS", "check_names", "differences"]

#: The versions that the tests have run with.
VERSIONS = "5.23 and 5.24"
_PACKAGE = "transformers.generation.continuous_batching"

#: What is called or replaced, by module and name, with the arguments that are passed or received.
NAMES: dict[str, str] = {
    "cache:group_layers_by_attn_type": "config",
    "continuous_api:ContinuousBatchProcessor": "cache config generation_config continuous_batching_config "
    "logit_processor input_queue cancel_queue output_router background_thread_status model_device model_dtype "
    "scheduler distributed_helper",
    "continuous_api:ContinuousBatchProcessor.reset": "self",
    "continuous_api:ContinuousBatchingManager": "model generation_config continuous_batching_config workload_hints",
    "continuous_api:ContinuousBatchingManager.add_request": "self input_ids request_id max_new_tokens",
    "continuous_api:ContinuousBatchingManager.stop": "self block hard_stop",
    "continuous_api:ContinuousBatchingManager.switch_to_cb_friendly_attn": "self model auto_switch_to_flash",
    "continuous_api:ContinuousBatchingManager._create_batch_processor": "self",
    "initialization:update_cb_config_after_cache_creation": "cb_config num_blocks max_batch_tokens",
    "scheduler:SCHEDULER_MAPPING": "",
    "scheduler:Scheduler": "cache safety_margin max_requests_per_batch",
}
#: The methods of ``PagedAttentionCache`` and their arguments. Ours replaces all but those that are not called on a CPU.
CACHE: dict[str, str] = {
    "can_store_request_tokens": "self state request_len dry_run",
    "compute_free_capacity": "self relative",
    "count_new_complete_blocks": "self state request_len",
    "count_storable_requests": "self list_blocks_needed",
    "evict_cached_blocks": "self",
    "extend_read_and_write_indices": "self request_id past_length query_length read_index write_index",
    "free_all_requests": "self clear_ledgers",
    "free_blocks": "self request_id no_cache",
    "mark_complete_blocks": "self state complete_blocks",
    "perform_cache_copy": "self copy_src_and_dst",
    "prepare_fork_request": "self src_state dst_req_ids copy_src_and_dst",
    "reset": "self",
    "search_prefix_match": "self request_id prompt_ids",
    "update": "self key_states value_states layer_idx kwargs",
}
NOT_CALLED = frozenset(["fill_block_table", "get_block_table_key", "get_cache_for_block_table"])


def differences() -> list[str]:
    """Return how the installed transformers differs from what is listed here, a phrase each; empty if it does not."""
    found = []
    for name, wanted in NAMES.items():
        module, _, path = name.partition(":")
        found += _differs(f"{_PACKAGE}.{module}", path, wanted.split())
    for method, wanted in CACHE.items():
        found += _differs(f"{_PACKAGE}.cache", f"PagedAttentionCache.{method}", wanted.split())
    if not found:
        cache = importlib.import_module(f"{_PACKAGE}.cache").PagedAttentionCache
        methods = {name for name in vars(cache) if not name.startswith("_") and callable(getattr(cache, name))}
        found += [f"`PagedAttentionCache.{name}` is new" for name in sorted(methods - CACHE.keys() - NOT_CALLED)]
    return found


def _differs(module: str, path: str, arguments: list[str]) -> list[str]:
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return [f"`{module}.{path}` is gone"]
    have = inspect.signature(found).parameters if arguments else {}
    lacking = [name for name in arguments if name not in have]
    return [f"`{module}.{path}` takes no {', '.join(lacking)}"] if lacking else []


def check_names() -> None:
    """Raise ``SpecError``, in one sentence, if transformers is missing or differs from what is listed here."""
    try:
        version = importlib.import_module("transformers").__version__
    except ImportError as error:
        raise SpecError("continuous_batching needs transformers: pip install 'kvmem[transformers]'") from error
    if differ := differences():
        raise SpecError(
            f"continuous_batching was made for transformers {VERSIONS} and cannot run in {version}, where "
            f"{'; '.join(differ)}: install transformers 5.24"
        )
