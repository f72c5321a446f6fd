"""Drives SGLang's paged allocator, request table and unified radix tree (its Rust core where the wheel has one) as its
scheduler does, on the CPU: one prefill batch a request, then decode batches of all requests.

A request is matched and locked, its prompt gets pages, and what it computed is inserted into the tree. A step appends
the last tokens to the requests, gets a slot for each, and gathers the page table anew from the table of tokens, as
SGLang's attention backends do. What a request has generated is inserted into the tree when it ends.
"""

from __future__ import annotations

from array import array
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from harness import drive  # type: ignore[import-not-found]

# Servers, codecs, parsers, other vendors' kernels, Triton (which needs a GPU): modules that all of SGLang shares import
# them at their top, and nothing below calls them.
_ABSENT = ("IPython", "PIL", "aiohttp", "aiter", "cuda", "fastapi", "flash_attn", "flashinfer", "openai", "orjson",
           "partial_json_parser", "psutil", "pybase64", "pydantic", "pynvml", "requests", "safetensors", "sgl_kernel",
           "starlette", "torch_memory_saver", "torchcodec", "torchvision", "triton", "tvm_ffi", "uvloop", "xgrammar",
           "zmq")  # fmt: skip
# Models, layers, grammars, servers, images and the language: they are no part of the manager, and would use the above
# while they are imported. transformers would take a stand-in for the real torchvision; SGLang patches it.
_NO_PART_OF_IT = ("sglang.lang", "sglang.srt.configs", "sglang.srt.constrained", "sglang.srt.entrypoints",
                  "sglang.srt.layers", "sglang.srt.multimodal", "sglang.srt.utils.hf_transformers_patches",
                  "transformers")  # fmt: skip
_CACHE = "sglang.srt.mem_cache."
_MODULES = ("sglang.srt.managers.schedule_batch", _CACHE + "allocation", _CACHE + "allocator.paged",
            _CACHE + "cache_init_params", _CACHE + "common", _CACHE + "memory_pool", _CACHE + "rust_tree_core.adapter",
            _CACHE + "unified_cache.components", _CACHE + "unified_radix_cache")  # fmt: skip


class SglangManager:
    def __init__(self, workload: dict[str, Any]) -> None:
        import torch

        self.torch = torch
        batches, self.allocation, paged, parameters, self.common, pools, _, components, trees = map(
            import_module, _MODULES
        )
        block, sequences = workload["block"], workload["sequences"]
        _publish(block)
        self.metadata, self.block = workload["metadata"], block
        self.request_type, self.finish_type = batches.Req, batches.FINISH_LENGTH
        self.sampling = SimpleNamespace(max_new_tokens=workload["steps"], custom_params=None)
        longest = -(-(workload["prompt"] + workload["steps"]) // block) * block
        self.rows = pools.ReqToTokenPool(sequences, longest, "cpu", enable_memory_saver=False)
        self.pages = paged.PagedTokenToKVPoolAllocator(
            workload["pool"] * block, block, torch.bfloat16, "cpu", kvcache=None, need_sort=False
        )
        settings = parameters.CacheInitParams(
            disable=not workload["cache"], req_to_token_pool=self.rows, token_to_kv_pool_allocator=self.pages,
            page_size=block, tree_components=(components.ComponentType.FULL,),
        )  # fmt: skip
        self.tree = trees.UnifiedRadixCache(settings)
        self.requests: list[Any] = [None] * sequences
        self.decoding = self._batch([])
        self.columns = torch.arange(0, longest, block)  # of the first token of each page
        self.table = torch.zeros(sequences, longest // block, dtype=torch.int32)
        self.number = 0

    def _batch(self, requests: list[Any], **more: Any) -> SimpleNamespace:
        """The fields of a ``ScheduleBatch`` that the allocation reads; a real one belongs to a model that runs."""
        return SimpleNamespace(
            reqs=requests, device="cpu", tree_cache=self.tree, req_to_token_pool=self.rows,
            model_config=SimpleNamespace(is_encoder_decoder=False), hisparse_coordinator=None,
            maybe_evict_swa=_nothing, is_dllm=_nothing, **more,
        )  # fmt: skip

    def admit(self, i: int, prompt: list[int]) -> None:
        self.number += 1
        request = self.request_type(str(self.number), "", array("q", prompt), self.sampling)
        request.init_next_round_input(self.tree)
        request.lock = self.tree.lock(request.last_node)
        request.extend_end = len(prompt)
        lengths = self.torch.tensor([len(prompt)])
        batch = self._batch(
            [request], prefix_lens=[request.prefix_len], extend_lens=[request.extend_len],
            extend_num_tokens=request.extend_len, seq_lens=lengths, seq_lens_cpu=lengths,
        )  # fmt: skip
        self.allocation.alloc_for_extend(batch)
        self.common.checkpoint_kv_cache(request, self.tree)
        self.requests[i] = request

    def step(self, last: list[int] | None) -> None:
        torch, batch = self.torch, self.decoding
        if last is None:
            lengths = torch.tensor([request.kv.kv_committed_len for request in self.requests])
            rows = torch.tensor([request.kv.req_pool_idx for request in self.requests])
            batch = self.decoding = self._batch(
                self.requests, seq_lens=lengths, seq_lens_cpu=lengths.clone(), req_pool_indices=rows,
                req_pool_indices_cpu=rows.clone(),
            )  # fmt: skip
        else:
            for request, token in zip(self.requests, last, strict=True):
                request.output_ids.append(token)
        self.allocation.alloc_for_decode(batch, 1)
        batch.seq_lens = batch.seq_lens + 1
        batch.seq_lens_cpu = batch.seq_lens_cpu + 1
        pages = -(-int(batch.seq_lens_cpu.max()) // self.block)
        slots = self.rows.req_to_token[batch.req_pool_indices[:, None], self.columns[:pages]]
        self.table[:, :pages] = slots // self.block
        if self.metadata:
            self.lengths = batch.seq_lens.to(torch.int32)
            self.starts = torch.nn.functional.pad(torch.cumsum(self.lengths, 0, dtype=torch.int32), (1, 0))

    def release(self, i: int) -> None:
        request = self.requests[i]
        request.finished_len = len(request.output_ids)
        request.finished_reason = self.finish_type(request.finished_len)
        self.common.release_kv_cache(request, self.tree, checkpoint=True)

    def clear(self) -> None:
        self.tree.reset()
        self.rows.clear()
        self.pages.clear()


def _nothing() -> None:
    """For hooks of windows and of diffusion models."""


def _publish(block: int) -> None:
    """The settings of an engine that runs on a CPU, from which the manager reads its own."""
    arguments = import_module("sglang.srt.server_args").ServerArgs
    publish = import_module("sglang.srt.runtime_context").publish
    settings = arguments(model_path="dummy", device="cpu", page_size=block, attention_backend="torch_native")
    publish(settings, role="scheduler")


if __name__ == "__main__":
    import torch

    # Models are not compiled here, because that needs Triton.
    torch.compile = lambda function=None, **_: function or (lambda it: it)  # type: ignore[assignment]
    drive(SglangManager, "sglang", _MODULES, _ABSENT, _NO_PART_OF_IT)
