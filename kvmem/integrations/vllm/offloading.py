"""vLLM's own offloading with kvmem's eviction policy and memory: a ``CachePolicy``; an ``OffloadingSpec`` for CPUs.

The policy serves vLLM's CPU tier on any device. The spec adds the worker that vLLM lacks where the KV cache itself lies
in host memory; its chunks lie in memory that is taken as it fills.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import Any, Final

import torch

from kvmem import SpecError
from kvmem.arguments import parse_bytes
from kvmem.integrations.background import Background
from kvmem.integrations.vllm import names
from kvmem.integrations.vllm.density import EvictionOrder
from kvmem.integrations.vllm.memory import Reservation

_BASE, _POLICY = "vllm.v1.kv_offload.base", "vllm.v1.kv_offload.cpu.policies.base:CachePolicy"
_CALLED = "on_store_miss on_request_finished evict clear mark_evictable mark_non_evictable"
NAMES = (
    *(f"{_BASE}:OffloadingSpec.{name}" for name in ("get_manager", "get_worker")),
    *(f"{_BASE}:OffloadingWorker.{name}" for name in ("submit_store", "submit_load", "get_finished", "wait")),
    *(f"{_POLICY}.{name}" for name in _CALLED.split()),
    f"{_BASE}:TransferResult",
    "vllm.v1.kv_offload.cpu.spec:CPUOffloadingSpec.build_metric_definitions",
    "vllm.v1.kv_offload.cpu.manager:CPUOffloadingManager",
)
names.check_names("kvmem's offloading", NAMES)  # before the imports below, which would say less

from vllm.v1.kv_offload.base import OffloadingSpec, OffloadingWorker, TransferResult  # noqa: E402
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager  # noqa: E402
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy  # noqa: E402
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec  # noqa: E402

__all__ = ["DensityPolicy", "KvmemOffloadingSpec"]

_ALIGNMENT: Final = 64


class DensityPolicy(EvictionOrder, CachePolicy):  # type: ignore[misc]
    """The chunk with the fewest expected hits goes first (docs/eviction.md). For vLLM's CPU tier, and for the spec
    below: ``eviction_policy="DensityPolicy"``, ``cache_policy_module_path="kvmem.integrations.vllm.offloading"``.
    """

    def __init__(self, cache_capacity: int) -> None:
        CachePolicy.__init__(self, cache_capacity)
        EvictionOrder.__init__(self, cache_capacity, "density")


class KvmemOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """Offloading to host memory where vLLM runs on a CPU: ``spec_name="KvmemOffloadingSpec"``, ``spec_module_path``
    this module's, ``cpu_bytes_to_use`` an int or a text such as ``"4GiB"``, for each worker.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        room = parse_bytes("cpu_bytes_to_use", self.extra_config.get("cpu_bytes_to_use", 0))
        size = config.worker_kv_bytes_per_block * self.blocks_per_chunk
        self._chunk_bytes = -(-size // _ALIGNMENT) * _ALIGNMENT
        self._num_chunks = room // self._chunk_bytes if size else 0
        if self._num_chunks == 0:
            raise SpecError(f"cpu_bytes_to_use: got {room} bytes; one chunk takes {self._chunk_bytes}")
        self._manager: Any = None
        self._worker: Any = None

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        """Return what vLLM's manager counts; a server ends at a number that is not declared."""
        return dict(CPUOffloadingSpec.build_metric_definitions(extra_config))

    def get_manager(self) -> Any:
        if self._manager is None:
            self._manager = CPUOffloadingManager(
                self._num_chunks,
                cache_policy="DensityPolicy",
                cache_policy_module_path=__name__,
                enable_events=self.kv_events_config.enable_kv_cache_events,
                store_threshold=int(self.extra_config.get("store_threshold", 0)),
            )
        return self._manager

    def get_worker(self, kv_caches: Any) -> Any:
        if self._worker is None:
            self._worker = _Worker(kv_caches, self.blocks_per_chunk, self._num_chunks, self._chunk_bytes)
        return self._worker


class _Worker(OffloadingWorker):  # type: ignore[misc]
    """Copies between blocks of the KV cache and chunks, in one thread, in the order of submission."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, num_chunks: int, chunk_bytes: int) -> None:
        if any(one.tensor.device.type != "cpu" for one in kv_caches.tensors):
            raise SpecError(
                "KvmemOffloadingSpec is for KV caches in host memory; on a GPU use vLLM's, with DensityPolicy"
            )
        self._tensors = [one.tensor.view(torch.uint8) for one in kv_caches.tensors]  # [blocks, page bytes]
        self._groups = [[(ref.tensor_idx, ref.page_size_bytes) for ref in refs] for refs in kv_caches.group_data_refs]
        self._per_chunk = blocks_per_chunk
        self._memory = Reservation(num_chunks * chunk_bytes)
        self._chunks = self._memory.tensor.view(torch.uint8).view(num_chunks, chunk_bytes)
        largest = max(sum(size for _, size in refs) for refs in self._groups) * blocks_per_chunk
        if largest > chunk_bytes:
            raise SpecError(f"KvmemOffloadingSpec: a chunk has {largest} bytes, and vLLM's config says {chunk_bytes}")
        self._background = Background(1, "kvmem-offload")
        self._jobs: dict[int, Future[TransferResult]] = {}

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, src_spec, dst_spec, store=True)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._submit(job_id, dst_spec, src_spec, store=False)

    def _submit(self, job_id: int, blocks: Any, chunks: Any, *, store: bool) -> bool:
        self._jobs[job_id] = self._background.submit(lambda: self._copy(job_id, blocks, chunks, store))
        return True

    def _copy(self, job_id: int, blocks: Any, chunks: Any, store: bool) -> TransferResult:
        start, moved = time.monotonic(), 0
        for group, block, chunk, part in self._pairs(blocks, chunks.block_ids.tolist()):
            at = part * sum(size for _, size in self._groups[group])
            for tensor, size in self._groups[group]:
                here, there = self._tensors[tensor][block, :size], self._chunks[chunk, at : at + size]
                there.copy_(here) if store else here.copy_(there)
                at, moved = at + size, moved + size
        return TransferResult(job_id, True, moved, time.monotonic() - start)

    def _pairs(self, blocks: Any, chunks: list[int]) -> Iterable[tuple[int, int, int, int]]:
        """Yield group, block, chunk, and the block's place in the chunk. A group's first block may lie inside one."""
        ids, first_chunk = blocks.block_ids.tolist(), 0
        for group, (count, index) in enumerate(zip(blocks.group_sizes, blocks.block_indices, strict=True)):
            skip = index % self._per_chunk
            for i in range(count):
                yield group, ids[i], chunks[first_chunk + (skip + i) // self._per_chunk], (skip + i) % self._per_chunk
            ids = ids[count:]
            first_chunk += -(-(skip + count) // self._per_chunk) if count else 0

    def get_finished(self) -> list[TransferResult]:
        done = [job for job, future in self._jobs.items() if future.done()]
        return [self._jobs.pop(job).result() for job in done]

    def wait(self, job_ids: set[int]) -> None:
        wait([self._jobs[job] for job in job_ids if job in self._jobs])

    def shutdown(self) -> None:
        self._background.close(10.0)
