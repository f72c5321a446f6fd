"""vLLM's KV connector over kvmem's tiers, loaded by module path. ``docs/engines/vllm.md`` shows how.

The scheduler's process and each worker have an instance; what they do is in ``planner`` and ``transfers``, which know
nothing of vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import gcd
from typing import Any

import torch

from kvmem import SpecError
from kvmem.arguments import parse_bytes
from kvmem.integrations.vllm import names
from kvmem.integrations.vllm.blocks import Report, Step, groups_of, names_images, ranks_of
from kvmem.integrations.vllm.config import Options
from kvmem.integrations.vllm.memory import lazy_memory
from kvmem.integrations.vllm.planner import Planner
from kvmem.integrations.vllm.transfers import Transfers
from kvmem.tiers.keys import BlockKeys

_BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
_METHODS = (
    "get_mem_pool_context register_kv_caches start_load_kv wait_for_layer_load save_kv_layer wait_for_save "
    "get_transfer_results get_block_ids_with_load_errors build_connector_worker_meta bind_kv_cache_manager "
    "on_new_request get_num_new_matched_tokens update_state_after_alloc build_connector_meta update_connector_output "
    "has_pending_push_work reset_cache shutdown requires_kv_delivery get_required_kvcache_layout"
)
NAMES = (
    *(f"{_BASE}:KVConnectorBase_V1.{method}" for method in _METHODS.split()),
    f"{_BASE}:SupportsHMA.request_finished_all_groups",
    f"{_BASE}:KVConnectorWorkerMetadata.aggregate",
    f"{_BASE}:KVConnectorTransferResults",
    "vllm.v1.core.sched.output:KVConnectorBlockState.get_block_ids",
    "vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids",
    "vllm.v1.core.block_pool:BlockPool",
    "vllm.v1.attention.backends.cpu_attn:_get_attn_isa",
)
names.check_names("KvmemConnector", NAMES)  # before the imports below, which would say less

from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # noqa: E402
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

__all__ = ["KvmemConnector"]


@dataclass
class _Meta(KVConnectorMetadata):  # type: ignore[misc]
    """idle: the step computes nothing. in_step: its loads are for this step."""

    step: Step
    idle: bool
    in_step: bool


@dataclass
class _WorkerMeta(KVConnectorWorkerMetadata):  # type: ignore[misc]
    report: Report = field(default_factory=Report)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        self.report.add(other.report)
        return self


class KvmemConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Saves full blocks to kvmem's tiers and loads them again; memory under the KV cache on a CPU.

    Options: ``kv_connector_extra_config``, see :class:`~kvmem.integrations.vllm.config.Options`. Needs
    ``kv_load_failure_policy="recompute"``, or a load that fails ends its request. ``SpecError`` for what it cannot
    serve.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._options = Options.of(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._groups = groups_of(kv_cache_config)
        self._device = torch.device(vllm_config.device_config.device_type)
        self._num_blocks = kv_cache_config.num_blocks
        self._in_step = self._options.layerwise
        self._names_images = names_images(vllm_config)
        self._check(vllm_config)
        isa = _isa(vllm_config, kv_cache_config)
        engine = vllm_config.parallel_config.data_parallel_index  # each has folders of its own: they have one writer
        self._folder = f"engine-{engine}-rank-" if engine else "rank-"
        self._ranks = ranks_of(vllm_config, kv_cache_config, names.vllm_version(), isa, self._options.model)
        self._block_bytes = max(group.payload_bytes for group in self._groups)
        lazy = self._options.memory == "lazy" or (not self._options.memory and self._device.type == "cpu")
        self._memory = lazy_memory(self._device) if lazy else None
        self._planner: Any = self._make_planner() if role == KVConnectorRole.SCHEDULER else None
        self._transfers: Any = self._make_transfers(vllm_config) if role == KVConnectorRole.WORKER else None

    def _check(self, vllm_config: Any) -> None:
        if not self._in_step:
            return
        if len(self._groups) > 1 or vllm_config.cache_config.enable_prefix_caching:
            # Of a synchronous load that failed, vLLM keeps the blocks in its prefix cache, for others to find, until
            # the request has computed them again; and with several groups it knows no such failure at all.
            raise SpecError("layerwise: needs one KV cache group and enable_prefix_caching=False; leave it out")
        if vllm_config.scheduler_config.async_scheduling:
            raise SpecError("layerwise: needs async_scheduling=False; leave it out")

    def _make_planner(self) -> Planner:
        keys = BlockKeys(b"kvmem vllm", gcd(*(group.block_size for group in self._groups)))

        def shared(rank: int) -> Sequence[Any]:
            return self._options.open_tiers(f"{self._folder}{rank}", self._block_bytes, read_only=True)

        return Planner(
            self._groups,
            keys,
            self._ranks,
            shared=shared if self._options.has_shared else None,
            asynchronous=not self._in_step,
            deadline_seconds=self._options.deadline_seconds,
        )

    def _make_transfers(self, vllm_config: Any) -> Transfers:
        rank = vllm_config.parallel_config.rank % len(self._ranks)
        return Transfers(
            self._groups,
            self._ranks[rank],
            self._options.open_tiers(f"{self._folder}{rank}", self._block_bytes),
            staging_bytes=parse_bytes("staging", self._options.staging),
            deadline_seconds=self._options.deadline_seconds,
            memory=self._memory,
        )

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a save that is left out is a miss later

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        return "LBHNC"  # a layer's block is one range

    # --- workers ---

    def get_mem_pool_context(self) -> AbstractContextManager[Any] | None:
        return self._memory

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._transfers.register(kv_caches, self._num_blocks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        meta = self._get_connector_metadata()
        self._transfers.begin(meta.step, in_step=meta.in_step)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self._transfers.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self._transfers.save_layer(layer_name, self._get_connector_metadata().step)

    def wait_for_save(self) -> None:
        meta = self._get_connector_metadata()
        self._transfers.end(meta.step, meta.idle)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults(finished_recving=self._transfers.take_finished())
        if len(self._groups) > 1:  # vLLM finds no request by a block then
            results.failed_recving = self._transfers.failed_requests & results.finished_recving
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed: set[int] = self._transfers.take_failed_blocks()
        return failed if len(self._groups) == 1 else set()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self._transfers.take_report()
        return _WorkerMeta(report) if report else None

    # --- scheduler ---

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        if self._memory is not None:
            self._planner.bind(kv_cache_manager)

    def on_new_request(self, request: Any) -> None:
        if self._names_images or not request.mm_features:
            self._planner.begin(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found: tuple[int | None, bool] = self._planner.matched(request, num_computed_tokens)
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._planner.allocated(request, blocks.get_block_ids() if num_external_tokens else (), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        used = [new.block_ids for new in scheduler_output.scheduled_new_reqs]
        used += [ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids is not None]
        step = self._planner.step(
            scheduler_output.num_scheduled_tokens,
            scheduler_output.kv_connector_block_state.get_block_ids,
            (block for groups in used for group in groups for block in group),
        )
        return _Meta(step, not scheduler_output.total_num_scheduled_tokens, self._in_step)

    def update_connector_output(self, connector_output: Any) -> None:
        if connector_output.kv_connector_worker_meta is not None:
            self._planner.learn(connector_output.kv_connector_worker_meta.report)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._planner.end(request.request_id)
        return False, None  # what is saved was copied in its step

    def has_pending_push_work(self) -> bool:
        return bool(self._planner.has_memory_to_release)

    def reset_cache(self) -> bool | None:
        self._planner.reset()
        return True

    def shutdown(self) -> None:
        for half in (self._planner, self._transfers):
            if half is not None:
                half.close()


def _isa(vllm_config: Any, kv_cache_config: Any) -> list[str]:
    """Return what the order of bytes in a block depends on beside its spec."""
    device = vllm_config.device_config.device_type
    if device != "cpu":
        from vllm.platforms import current_platform  # it asks without a CUDA context, which a scheduler must not have

        return [device, current_platform.get_device_name(), str(vllm_config.attention_config.backend)]
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    spec = next(iter(getattr(spec, "kv_cache_specs", {}).values()), spec)
    dtype = vllm_config.model_config.dtype
    isa = _get_attn_isa(dtype, spec.block_size, spec.head_size, vllm_config.cache_config.cache_dtype)
    return [device, isa, torch.backends.cpu.get_cpu_capability()]
