"""Drives vLLM's ``KVCacheManager`` and its worker's ``BlockTable`` as its scheduler and model runner do for decoding.

A step appends the last tokens to the requests (which hashes the blocks that they fill), calls ``allocate_slots`` for
every request, writes the new block ids into the table, and takes the events. Slots are left out, because in vLLM the
GPU computes them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from harness import drive  # type: ignore[import-not-found]

_ABSENT = ("aiohttp", "cbor2", "cloudpickle", "cpuinfo", "fastapi", "msgspec", "openai", "openai_harmony",
           "partial_json_parser", "prometheus_client", "pybase64", "starlette", "uvloop", "xgrammar",
           "zmq")  # fmt: skip
_NO_PART_OF_IT = ("vllm.v1.structured_output",)
_MODULES = ("torch", "vllm.sampling_params", "vllm.utils.hashing", "vllm.v1.core.kv_cache_manager", "vllm.v1.request",
            "vllm.v1.worker.block_table")  # fmt: skip


class VllmManager:
    def __init__(self, workload: dict[str, Any]) -> None:
        import torch

        hashing = import_module("vllm.utils.hashing")
        names = ("core.kv_cache_utils", "kv_cache_interface", "core.kv_cache_manager", "worker.block_table", "request")
        utils, interface, manager, tables, requests = (import_module(f"vllm.v1.{name}") for name in names)
        self.request_type = requests.Request
        structured = import_module("vllm.v1.structured_output.request")  # a stand-in: these requests have none
        structured.StructuredOutputRequest.from_sampling_params = staticmethod(lambda _: None)
        self.parameters = import_module("vllm.sampling_params").SamplingParams(max_tokens=workload["steps"])
        block, longest = workload["block"], workload["prompt"] + workload["steps"]
        self.cache, self.metadata = workload["cache"], workload["metadata"]
        spec = interface.FullAttentionSpec(block_size=block, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
        config = interface.KVCacheConfig(
            num_blocks=workload["pool"] + 1,  # block 0 is vLLM's null block
            kv_cache_tensors=[],
            kv_cache_groups=[interface.KVCacheGroupSpec(["layer"], spec)],
        )
        self.manager = manager.KVCacheManager(
            config, max_model_len=longest, scheduler_block_size=block, hash_block_size=block, enable_caching=self.cache
        )
        utils.init_none_hash(hashing.sha256)
        self.hasher = utils.get_request_block_hasher(block, hashing.sha256) if self.cache else None
        self.table = tables.BlockTable(
            block, workload["sequences"], -(-longest // block), workload["sequences"], False, torch.device("cpu"), 1
        )
        self.requests: list[Any] = [None] * workload["sequences"]
        self.number = 0

    def admit(self, i: int, prompt: list[int]) -> None:
        self.number += 1
        request = self.request_type(str(self.number), prompt, self.parameters, None, block_hasher=self.hasher)
        found, tokens, _ = self.manager.get_computed_blocks(request)
        blocks = self.manager.allocate_slots(request, len(prompt) - tokens, tokens, found)
        assert blocks is not None, "the pool is too small"
        request.num_computed_tokens = len(prompt)
        self.table.add_row(self.manager.get_block_ids(request.request_id)[0], i)
        self.requests[i] = request

    def step(self, last: list[int] | None) -> None:
        allocate, requests = self.manager.allocate_slots, self.requests
        for i, request in enumerate(requests):
            if last is not None:
                request.append_output_token_ids(last[i])
            blocks = allocate(request, 1)
            assert blocks is not None, "the pool is too small"
            new = blocks.get_block_ids(allow_none=True)
            if new is not None:
                self.table.append_row(new[0], i)
            request.num_computed_tokens += 1
        self.manager.take_events()
        if self.metadata:
            table = self.table.block_table  # as commit_block_table() does, which asks for an accelerator's stream
            table.gpu[: len(requests)].copy_(table.cpu[: len(requests)])

    def release(self, i: int) -> None:
        self.manager.free(self.requests[i])
        self.table.clear_row(i)

    def clear(self) -> None:
        self.manager.reset_prefix_cache()


if __name__ == "__main__":
    drive(VllmManager, "vllm", _MODULES, _ABSENT, _NO_PART_OF_IT)
