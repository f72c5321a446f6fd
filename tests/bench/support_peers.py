"""A package with the names of SGLang that its driver uses: one token after another, no sharing, and a strict look at
what it is given.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_sglang"]

_FILES = {
    "managers/schedule_batch.py": """
from array import array
from types import SimpleNamespace

class FINISH_LENGTH:
    def __init__(self, length): self.length = length

class Req:
    def __init__(self, rid, text, ids, sampling):
        assert isinstance(ids, array) and ids.typecode == "q"
        self.rid, self.origin_input_ids, self.output_ids = rid, ids, array("q")
        self.kv = SimpleNamespace(req_pool_idx=None, kv_committed_len=0)
        self.lock = self.finished_reason = self.extend_end = None
    @property
    def extend_len(self): return self.extend_end - self.prefix_len
    def init_next_round_input(self, tree): self.prefix_len, self.last_node = 0, "root"
""",
    "mem_cache/memory_pool.py": """
import torch
class ReqToTokenPool:
    def __init__(self, size, max_context_len, device, enable_memory_saver):
        self.req_to_token, self.size = torch.zeros((size + 1, max_context_len), dtype=torch.int32), size
        self.clear()
    def clear(self): self.free_slots = list(range(1, self.size + 1))
""",
    "mem_cache/allocator/paged.py": """
class PagedTokenToKVPoolAllocator:
    def __init__(self, size, page_size, dtype, device, kvcache, need_sort):
        assert size % page_size == 0 and device == "cpu" and not need_sort
        self.page_size, self.count = page_size, size // page_size
        self.clear()
    def clear(self): self.free = list(range(1, self.count + 1))
""",
    "mem_cache/cache_init_params.py": """
from types import SimpleNamespace as CacheInitParams
""",
    "mem_cache/unified_cache/components.py": """
class ComponentType: FULL = "full"
""",
    "mem_cache/rust_tree_core/adapter.py": "",
    "mem_cache/unified_radix_cache.py": """
class UnifiedRadixCache:
    def __init__(self, params):
        assert params.tree_components == ("full",) and params.page_size == 16 and not params.disable
        self.pool, self.pages, self.locked = params.req_to_token_pool, params.token_to_kv_pool_allocator, set()
        self.reset()
    def reset(self): self.checkpoints, self.released = 0, []
    def lock(self, node):
        lock = object()
        self.locked.add(lock)
        return lock
""",
    "mem_cache/common.py": """
def checkpoint_kv_cache(request, tree):
    assert request.lock in tree.locked and request.finished_reason is None and request.kv.kv_committed_len == 20
    tree.checkpoints += 1

def release_kv_cache(request, tree, *, checkpoint):
    assert checkpoint and request.finished_reason.length == request.finished_len == len(request.output_ids)
    tree.released.append(20 + request.finished_len)
    tree.locked.discard(request.lock)
    row, length = request.kv.req_pool_idx, request.kv.kv_committed_len
    tree.pages.free += (tree.pool.req_to_token[row, :length:16] // 16).tolist()
    tree.pages.free.sort()
    tree.pool.free_slots.append(row)
""",
    "mem_cache/allocation.py": """
def _grow(batch, request, count):
    pages, row = batch.tree_cache.pages, batch.req_to_token_pool.req_to_token[request.kv.req_pool_idx]
    for at in range(request.kv.kv_committed_len, request.kv.kv_committed_len + count):
        row[at] = row[at - 1] + 1 if at % 16 else pages.free.pop() * 16
    request.kv.kv_committed_len += count

def alloc_for_extend(batch):
    (request,) = batch.reqs
    assert batch.prefix_lens == [0] and batch.extend_lens == [20] and batch.extend_num_tokens == 20
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == [20] and not batch.is_dllm()
    request.kv.req_pool_idx = batch.req_to_token_pool.free_slots.pop()
    _grow(batch, request, 20)

def alloc_for_decode(batch, token_per_req):
    held = [request.kv.kv_committed_len for request in batch.reqs]
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu.tolist() == held and token_per_req == 1
    assert [len(request.output_ids) for request in batch.reqs] == [length - 20 for length in held]
    assert batch.req_pool_indices.tolist() == [request.kv.req_pool_idx for request in batch.reqs]
    for request in batch.reqs:
        _grow(batch, request, 1)
""",
    "server_args.py": """
class ServerArgs:
    def __init__(self, model_path, device, page_size, attention_backend):
        assert (model_path, device, page_size, attention_backend) == ("dummy", "cpu", 16, "torch_native")
""",
    "runtime_context.py": """
def publish(server_args, *, role): assert role == "scheduler"
""",
}


def write_sglang(folder: Path) -> None:
    """The package ``sglang`` under ``folder``."""
    for name, text in _FILES.items():
        path = folder / "sglang" / "srt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
