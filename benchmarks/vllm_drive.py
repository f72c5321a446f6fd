"""vLLM's scheduler without an engine: the stock one or kvmem's, driven step by step with a model that computes nothing.

Needs vLLM (``make test-vllm`` installs it in a folder of its own). The scheduler is vLLM's, whole; what is left out is
the worker, which gets ``SchedulerOutput`` and returns tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvmem.integrations.vllm.scheduler import KvmemScheduler

__all__ = ["ABORTED", "SCHEDULERS", "Sizes", "make_request", "open_scheduler", "prepare"]

ABORTED = RequestStatus.FINISHED_ABORTED
SCHEDULERS: dict[str, Callable[..., Any]] = {"stock": Scheduler, "kvmem": KvmemScheduler}
_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 1 << 16,
    "max_position_embeddings": 1 << 16, "torch_dtype": "float32",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What a scheduler is opened with. window: of all layers, in tokens; None for full attention."""

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 16384
    prefix_caching: bool = True
    window: int | None = None
    groups: int = 1
    policy: str = "fcfs"
    watermark: float = 0.0


def open_scheduler(kind: str, sizes: Sizes, *, options: dict[str, Any] | None = None, **changed: Any) -> Any:
    """Return a scheduler, ``"stock"`` or ``"kvmem"``. options: kvmem's. changed: fields of the scheduler's config."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL))
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=sizes.max_model_len)
    cache = CacheConfig(block_size=sizes.block_size, enable_prefix_caching=sizes.prefix_caching)
    cache.num_gpu_blocks = sizes.num_blocks
    fields = {
        "max_num_seqs": sizes.max_num_seqs, "max_num_batched_tokens": sizes.max_num_batched_tokens,
        "max_model_len": sizes.max_model_len, "enable_chunked_prefill": True, "is_encoder_decoder": False,
        "async_scheduling": False, "policy": sizes.policy, "watermark": sizes.watermark,
    } | changed  # fmt: skip
    config = VllmConfig(
        model_config=model, cache_config=cache, scheduler_config=SchedulerConfig(**fields),
        device_config=DeviceConfig("cpu"), additional_config={"kvmem": options or {}},
    )  # fmt: skip
    return SCHEDULERS[kind](
        vllm_config=config,
        kv_cache_config=_cache_config(sizes),
        structured_output_manager=StructuredOutputManager(config),
        block_size=sizes.block_size,
        log_stats=True,
    )


def _cache_config(sizes: Sizes) -> Any:
    shape = {"block_size": sizes.block_size, "num_kv_heads": 1, "head_size": 32, "dtype": __import__("torch").float32}
    spec = (
        FullAttentionSpec(**shape) if sizes.window is None else SlidingWindowSpec(**shape, sliding_window=sizes.window)
    )
    groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i in range(sizes.groups)]
    return KVCacheConfig(num_blocks=sizes.num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)


_HASHER: dict[int, Any] = {}


def make_request(name: str, prompt: Sequence[int], max_tokens: int, *, block_size: int = 16, **fields: Any) -> Any:
    """Return a request that ends after ``max_tokens`` tokens. It hashes its blocks, as in an engine."""
    if block_size not in _HASHER:
        function = get_hash_fn_by_name("sha256")
        init_none_hash(function)
        _HASHER[block_size] = get_request_block_hasher(block_size, function)
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(name, list(prompt), sampling, None, block_hasher=_HASHER[block_size], **fields)


def prepare(scheduler: Any, output: Any, sample: Callable[[str, int], int]) -> Callable[[], Any]:
    """Return the call that gives the scheduler the tokens of a step, and returns its statistics.

    The tokens: ``sample(name, computed)`` for each request whose tokens are all computed, which are ``computed`` many.
    """
    names = list(output.num_scheduled_tokens)
    tokens: list[list[int]] = []
    for name in names:
        request = scheduler.requests[name]  # counts this step's tokens already
        done = request.num_computed_tokens
        tokens.append([sample(name, done)] if done >= request.num_tokens else [])
    made = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled_token_ids=tokens)

    def update() -> Any:
        clients = scheduler.update_from_output(output, made)
        return next(client.scheduler_stats for client in clients.values() if client.scheduler_stats is not None)

    return update
