"""vLLM's scheduler over kvmem's block manager: ``--scheduler-cls kvmem.integrations.vllm.scheduler.KvmemScheduler``.

The class derives from vLLM's own scheduler, which decides as before what runs; only ``self.kv_cache_manager`` is
another. vLLM names this extension point in its configuration (``SchedulerConfig.scheduler_cls``), and says that it is
no stable interface: the names are checked when this module is imported (names.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvmem.errors import SpecError
from kvmem.integrations.vllm import names
from kvmem.integrations.vllm.manager import BlockManager, Foreign

names.check_names("KvmemScheduler", names.SCHEDULER)  # first: an import that fails says less

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager  # noqa: E402
from vllm.v1.core.kv_cache_utils import KVCacheBlock  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec  # noqa: E402
from vllm.v1.metrics.stats import PrefixCacheStats  # noqa: E402

__all__ = ["KvmemScheduler"]

#: Keys of ``additional_config={"kvmem": {...}}``.
_OPTIONS = {"policy"}


class KvmemScheduler(Scheduler):  # type: ignore[misc]  # Any for mypy, which reads no vLLM
    """vLLM's scheduler with kvmem's block manager. Takes what vLLM's takes.

    Options, in the engine's ``additional_config={"kvmem": {...}}``: ``policy``, what is evicted first
    (docs/eviction.md; default ``"density"``; ``"lru"`` is vLLM's own order).

    ``SpecError``, when the engine starts, for what the manager does not serve: several groups of layers (hybrid
    models), state layers, encoder-decoders, EAGLE, context parallelism, KV cache events, async scheduling.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        options = _options(vllm_config)
        _refuse(vllm_config, kv_cache_config)
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        self._refuse_more()
        group = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        fifo = str(getattr(self.policy, "value", self.policy)) == "fcfs"
        self.kv_cache_manager = BlockManager(
            Foreign(KVCacheBlocks, [KVCacheBlock(i) for i in range(kv_cache_config.num_blocks)], PrefixCacheStats),
            num_blocks=kv_cache_config.num_blocks,
            block_size=group.block_size,
            max_model_len=self.max_model_len,
            # Loads from a connector and blocks whose free is deferred hold sequences beside the running ones.
            max_requests=2 * self.max_num_active_reqs + 64,
            window_tokens=group.sliding_window if isinstance(group, SlidingWindowSpec) else None,
            prefix_cache=bool(self.cache_config.enable_prefix_caching),
            log_stats=self.log_stats,
            watermark=self.scheduler_config.watermark,
            # Another policy preempts requests that this step has scheduled, and a load may fail: then what was
            # published ahead would never be computed.
            ahead=self.connector is None and fifo,
            group_spec=group,
            **options,
        )
        if self.connector is not None:
            self.connector.bind_kv_cache_manager(self.kv_cache_manager)

    def _refuse_more(self) -> None:
        """Refuse what only the stock scheduler has worked out."""
        for refused, what in (
            (self.use_eagle_block_drop, "speculative decoding that drops the last hit block (EAGLE)"),
            (self.is_encoder_decoder, "encoder-decoder models"),
            (self.prefix_replay_tokens, "layers that replay their window"),
            (self.has_mamba_layers or self.needs_kv_cache_zeroing, "state layers (Mamba)"),
            (self.enable_kv_cache_events, "KV cache events (kv_events_config.enable_kv_cache_events)"),
        ):
            if refused:
                raise SpecError(f"KvmemScheduler does not serve {what}; use vLLM's own scheduler")


def _options(vllm_config: Any) -> dict[str, Any]:
    given = vllm_config.additional_config
    options = given.get("kvmem", {}) if isinstance(given, Mapping) else {}
    if not isinstance(options, Mapping) or not set(options) <= _OPTIONS:
        raise SpecError(f'additional_config["kvmem"]: got {options!r}; may have {", ".join(sorted(_OPTIONS))}')
    return dict(options)


def _refuse(vllm_config: Any, kv_cache_config: Any) -> None:
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1:
        raise SpecError(
            f"KvmemScheduler serves models with one group of layers, and this one has {len(groups)} "
            f"({', '.join(kinds)}), whose blocks share one pool; use vLLM's own scheduler, or "
            "disable_hybrid_kv_cache_manager=True"
        )
    if not isinstance(groups[0].kv_cache_spec, (FullAttentionSpec, SlidingWindowSpec)):
        raise SpecError(
            f"KvmemScheduler serves full and sliding-window attention, not {kinds[0]}; use vLLM's own scheduler"
        )
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size > 1:
        raise SpecError("KvmemScheduler does not serve context parallelism; use vLLM's own scheduler")
    if vllm_config.scheduler_config.async_scheduling:
        raise SpecError("KvmemScheduler schedules one step at a time: start the engine with async_scheduling=False")


def _check_scheduler() -> None:
    """Raise ``SpecError`` if vLLM's scheduler calls its block manager by names or arguments that kvmem's lacks."""
    lacking = {name for name in names.called_on(Scheduler, "kv_cache_manager") if not names.offers(BlockManager, name)}
    for method in ("allocate_slots", "get_computed_blocks", "free", "cache_blocks", "remove_skipped_blocks"):
        arguments = names.missing_arguments(getattr(KVCacheManager, method), getattr(BlockManager, method))
        lacking |= {f"{method}({argument}=)" for argument in arguments}
    names.check_names("KvmemScheduler", names.SCHEDULER, unknown=lacking)


_check_scheduler()
