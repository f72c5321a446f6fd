"""What the tests of SGLang's integration share: its import, device pools as SGLang makes them, and tiers that fail."""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
import time
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import standins
import torch

from kvmem.integrations.sglang.names import VERSION
from kvmem.integrations.sglang.store import TierStore
from kvmem.tiers.base import Buffer, Capacity, Result, Status, Tier, check_batch
from kvmem.tiers.checksum import checksum

PAGE, LAYERS, HEADS, WIDTH = 4, 3, 2, 8


def need_sglang() -> None:
    """Skip the calling module unless SGLang is installed."""
    try:
        importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        reason = f"SGLang {VERSION} is not installed; `make test-sglang` installs it in a folder and runs these"
        pytest.skip(reason, allow_module_level=True)
    standins.install()


def import_sglang() -> None:
    """Import what a machine without a GPU can; skip the calling module unless SGLang is installed."""
    need_sglang()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("sglang.srt.mem_cache.unified_cache.unified_cache_linker")
        importlib.import_module("sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler")
        importlib.import_module("sglang.srt.mem_cache.pool_host")


class DictTier(Tier):
    """A dict, with checksums. ``fault(call, keys)`` may raise, wait, or return a Result for all keys."""

    name = "dict"

    def __init__(self) -> None:
        self.held: dict[bytes, tuple[bytes, bytes]] = {}
        self.fault: Callable[[str, Sequence[bytes]], Result | None] = lambda call, keys: None
        self.calls: list[str] = []
        self.closed = False
        self._lock = threading.Lock()

    def _begin(self, call: str, keys: Sequence[bytes]) -> Result | None:
        check_batch(keys)
        self.calls.append(call)
        return self.fault(call, keys)

    def contains(self, keys: Sequence[bytes]) -> int:
        if self._begin("contains", keys):
            return 0
        return next((i for i, key in enumerate(keys) if key not in self.held), len(keys))

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers, writable=True)
        if failed := self._begin("get", keys):
            return [failed] * len(keys)
        return [self._get(key, buffer) for key, buffer in zip(keys, buffers, strict=True)]

    def _get(self, key: bytes, buffer: Buffer) -> Result:
        with self._lock:
            if key not in self.held:
                return Result(Status.MISS, 0, "absent")
            data, digest = self.held[key]
        buffer[: len(data)] = data
        return Result(Status.OK, len(data)) if checksum(data) == digest else Result(Status.CORRUPT, 0, "damaged")

    def put(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        check_batch(keys, buffers)
        if failed := self._begin("put", keys):
            return [failed] * len(keys)
        with self._lock:
            self.held.update((k, (bytes(b), checksum(bytes(b)))) for k, b in zip(keys, buffers, strict=True))
        return [Result(Status.OK, len(buffer)) for buffer in buffers]

    def delete(self, keys: Sequence[bytes]) -> list[Result]:
        return [Result(Status.OK if self.held.pop(key, None) else Status.MISS) for key in keys]

    def capacity(self) -> Capacity:
        return Capacity(None, 0, len(self.held))

    def close(self) -> None:
        self.closed = True

    def damage(self, key: bytes) -> None:
        data, digest = self.held[key]
        self.held[key] = bytes([data[0] ^ 1]) + data[1:], digest


class EachSecondLoadFails(DictTier):
    """For an engine's process: the second ``get``, the fourth and so on fail."""

    def __init__(self) -> None:
        super().__init__()
        self.fault = self._each_second

    def _each_second(self, call: str, keys: Sequence[bytes]) -> Result | None:
        failing = call == "get" and self.calls.count("get") % 2 == 0
        return Result(Status.FAILED, 0, "the test wants it") if failing else None


def device_pool(pages: int) -> Any:
    """Return SGLang's pool of plain K and V on the CPU, filled with distinct bytes."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool(
        size=pages * PAGE,
        page_size=PAGE,
        dtype=torch.float32,
        head_num=HEADS,
        head_dim=WIDTH,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    for buffer in [*pool.k_buffer, *pool.v_buffer]:
        buffer.copy_(torch.randn(buffer.shape))
    return pool


def cache_params(pool: Any, **changed: Any) -> Any:
    """Return SGLang's parameters of a cache over ``pool``, on one rank."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    allocator = types.SimpleNamespace(get_kvcache=lambda: pool)
    given = dict(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=allocator, page_size=PAGE)
    return CacheInitParams(**given | changed)


def transfer(keys: Sequence[str], pages: Sequence[int] | None = None, **more: Any) -> Any:
    """Return a transfer of the main pool. pages: of the device; None for a lookup."""
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    indices = None if pages is None else rows_of(pages)
    return PoolTransfer(name=more.pop("name", PoolName.KV), keys=list(keys), device_indices=indices, **more)


def rows_of(pages: Sequence[int]) -> torch.Tensor:
    return (torch.tensor(list(pages))[:, None] * PAGE + torch.arange(PAGE)).flatten()


def rows(pool: Any, pages: Sequence[int]) -> torch.Tensor:
    """Return a copy of what the pages hold, [buffers, rows, heads, width]."""
    at = rows_of(pages)
    return torch.stack([buffer[at] for buffer in [*pool.k_buffer, *pool.v_buffer]]).clone()


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What SGLang says of model and process, for ``kvmem.integrations.sglang.config``."""
    from kvmem.integrations.sglang import config

    said = types.SimpleNamespace(
        model=types.SimpleNamespace(
            model_path="org/model",
            revision="1",
            quantization=None,
            dtype="auto",
            json_model_override_args="{}",
            load_format="auto",
        ),
        lora=types.SimpleNamespace(enable_lora=True, lora_paths=None),
        parallel=types.SimpleNamespace(dp_rank=None, attn_dp_rank=0),
        serving=types.SimpleNamespace(weight_version="default"),
    )
    monkeypatch.setattr(config, "get_model", lambda: said.model)
    monkeypatch.setattr(config, "get_lora", lambda: said.lora)
    monkeypatch.setattr(config, "get_parallel", lambda: said.parallel)
    monkeypatch.setattr(config, "get_serving", lambda: said.serving)
    return said


TIERS: dict[str, DictTier] = {}


def shared_tier(name: str) -> DictTier:
    """Return a tier of this process by name: what ``{"type": "support_sglang:shared_tier", "name": ...}`` opens."""
    return TIERS.setdefault(name, DictTier())


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Any:
    """A tier that linkers and storages of a test open by ``options()``."""
    yield shared_tier("one")
    TIERS.clear()


def options(**more: Any) -> dict[str, Any]:
    return {"tiers": [{"type": "support_sglang:shared_tier", "name": "one"}], "deadline_seconds": 0.3, **more}


def open_store(*tiers: Tier, seconds: float = 0.3) -> TierStore:
    return TierStore(tiers, seconds)


def open_linker(pool: Any, *, params: dict[str, Any] | None = None, **more: Any) -> Any:
    """As SGLang opens it: through its own factory."""
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
    from sglang.srt.mem_cache.unified_cache.linker_factory import create_unified_cache_linker

    config = {
        "linker": "KVMemLinker",
        "linker_module_path": "kvmem.integrations.sglang.linker",
        "linker_extra_config": options(**more),
    }
    return create_unified_cache_linker(
        None, cache_params(pool, **params or {}), backend="dynamic", config=config, components={ComponentType.FULL}
    )


def completed(linker: Any, count: int) -> list[bool]:
    """Return the results of offloads, which come in their order."""
    until = time.monotonic() + 20
    while linker.num_completed_offloads() < count:
        assert time.monotonic() < until, "an offload has no completion"
        time.sleep(0.002)
    assert linker.num_completed_offloads() == count
    return [linker.pop_completed_offload() for _ in range(count)]


def run_load(linker: Any) -> bool:
    """Start what is queued and wait for each layer as a forward pass does."""
    index = linker.start_layer_wise_loading()
    linker.layer_done_counter.set_consumer(index)
    for layer in range(LAYERS):
        linker.layer_done_counter.wait_until(layer)
    return bool(linker.finish_layer_wise_loading(index))
