"""The linker under SGLang's own prefix cache and allocator, without an engine: stored by an insert, flushed, loaded back."""

from __future__ import annotations

import json
import time
import types
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support_sglang import HEADS, LAYERS, WIDTH, import_sglang

import_sglang()

from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, InsertParams, MatchPrefixParams  # noqa: E402
from sglang.srt.mem_cache.cache_init_params import CacheInitParams  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool  # noqa: E402
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402
from sglang.srt.mem_cache.unified_cache.linker_factory import (  # noqa: E402
    create_unified_cache_linker,
    get_startup_linker_config,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish, reset_context  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

TOKENS = array("q", [3 + (i * 7919 + 3) % 997 for i in range(400)])


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Any]:
    """SGLang's arguments, as its scheduler's process has them."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    linker = {
        "linker": "KVMemLinker",
        "linker_module_path": "kvmem.integrations.sglang.linker",
        "linker_extra_config": {"tiers": [{"type": "host", "capacity": "16MiB"}]},
    }
    given = ServerArgs(
        model_path=str(tmp_path),
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        enable_unified_cache_external_linker=True,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config=linker,
    )
    publish(given, role="scheduler", ranks=SpawnRanks(0))
    yield given
    reset_context()


@pytest.mark.filterwarnings("ignore")  # SGLang's own, of parts that this machine lacks
def test_400_of_400_tokens_come_back(published: Any) -> None:
    pool = MHATokenToKVPool(
        size=1024, page_size=1, dtype=torch.float32, head_num=HEADS, head_dim=WIDTH, layer_num=LAYERS, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip
    buffers = [*pool.k_buffer, *pool.v_buffer]
    for buffer in buffers:
        buffer.copy_(torch.randn(buffer.shape))
    allocator = TokenToKVPoolAllocator(1024, torch.float32, "cpu", pool, False)
    params = CacheInitParams(
        disable=False, req_to_token_pool=ReqToTokenPool(8, 1024, "cpu", False), token_to_kv_pool_allocator=allocator,
        page_size=1, tree_components=(ComponentType.FULL,),
    )  # fmt: skip
    cache = UnifiedRadixCache(params)
    linker = create_unified_cache_linker(
        published, params, backend="dynamic", config=get_startup_linker_config(), components=set(cache.components)
    )
    cache.init_cache_linker(linker)
    pool.register_layer_transfer_counter(linker.layer_done_counter)

    slots = allocator.alloc(len(TOKENS))
    kept = [buffer[slots].clone() for buffer in buffers]
    cache.insert(InsertParams(key=RadixKey(token_ids=TOKENS), value=slots))
    until = time.monotonic() + 20
    while cache.linker.pending_offloads:
        assert time.monotonic() < until
        cache.check_hicache_events()
        time.sleep(0.005)
    cache.reset()
    allocator.clear()
    for buffer in buffers:
        buffer.fill_(777)

    request = types.SimpleNamespace(rid="r", session=None, kv=None, last_node=None, swa_branching_seqlen=None)

    def match(**more: Any) -> Any:
        key = RadixKey(token_ids=TOKENS + array("q", [5]), **more)
        return cache.match_prefix(MatchPrefixParams(key=key, req=request))

    assert match(cache_salt="another tenant").host_hit_length == 0 == match(extra_key="adapter").host_hit_length
    found = match()
    assert (found.device_prefix_len, found.host_hit_length) == (0, 400)
    request.last_node = found.last_device_node
    cache.init_load_back(
        InitLoadBackParams(best_match_node=found.best_match_node, host_hit_length=found.host_hit_length, req=request)
    )
    loaded = cache.linker.private_load_indices["r"]
    linker.layer_done_counter.set_consumer(cache.ready_to_load_host_cache())
    there = [pool.get_key_buffer(layer)[loaded] for layer in range(LAYERS)]  # each waits for its layer
    there += [pool.get_value_buffer(layer)[loaded] for layer in range(LAYERS)]
    assert all(torch.equal(one, other) for one, other in zip(there, kept, strict=True))
    assert cache.finish_external_linker_loads([]) == [] and linker._staged == 0
    cache.release_host_resources()
