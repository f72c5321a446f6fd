"""What ``KVMemLinker`` serves: which pages are found under which keys, pools of several kinds, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support_sglang import (
    LAYERS,
    PAGE,
    DictTier,
    cache_params,
    completed,
    context,  # noqa: F401  a fixture
    device_pool,
    import_sglang,
    open_linker,
    options,
    run_load,
    tier,  # noqa: F401
    transfer,
)

import_sglang()

from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName  # noqa: E402
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import DevicePoolEntry, DevicePoolGroup  # noqa: E402
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType  # noqa: E402

from kvmem.errors import SpecError  # noqa: E402
from kvmem.integrations.sglang import linker as linker_module  # noqa: E402
from kvmem.integrations.sglang.linker import KVMemLinker  # noqa: E402


@pytest.fixture
def pool() -> Any:
    return device_pool(16)


def test_what_keys_cover(pool: Any, tier: DictTier, context: Any) -> None:  # noqa: F811
    """Another model, weights, rank or layout finds nothing. Salt, extra key and adapter are in SGLang's page hash."""
    linker = open_linker(pool)
    linker.offload([transfer("a", [1])])
    completed(linker, 1)

    def found(**more: Any) -> list[int]:
        other = open_linker(more.pop("pool", pool), **more)
        try:
            return other.lookup("r", [transfer("a")])
        finally:
            other.close()

    tier.closed = False
    assert found() == [1]
    assert found(model="other") == []
    assert found(params=dict(pp_rank=1, pp_size=2)) == []
    assert found(params=dict(attn_cp_rank=1, attn_cp_size=2)) == []
    for said, name, value in [
        (context.model, "model_path", "org/other"),
        (context.model, "revision", "2"),
        (context.model, "json_model_override_args", '{"rope_theta": 1}'),
        (context.model, "load_format", "dummy"),
        (context.serving, "weight_version", "2"),
        (context.lora, "lora_paths", [SimpleNamespace(lora_path="org/adapter")]),
    ]:
        before = getattr(said, name)
        setattr(said, name, value)
        assert found() == [], name
        setattr(said, name, before)
    halves = device_pool(16)
    halves.k_buffer = [buffer.half() for buffer in halves.k_buffer]
    halves.v_buffer = [buffer.half() for buffer in halves.v_buffer]
    assert found(pool=halves) == []
    linker.close()


def test_what_is_refused(pool: Any, tier: DictTier, context: Any) -> None:  # noqa: F811
    with pytest.raises(SpecError, match="tiers"):
        KVMemLinker(None, cache_params(pool), components={ComponentType.FULL}, extra_config={})
    with pytest.raises(SpecError, match="speculative"):
        open_linker(pool, params=dict(mtp_draft_device_pools=(pool,)))
    with pytest.raises(SpecError, match="cannot serve this model"):
        KVMemLinker(
            None, cache_params(pool), components={ComponentType.FULL, ComponentType.SWA}, extra_config=options()
        )
    pool.k_scale_buffer = [torch.ones(1)]
    with pytest.raises(SpecError, match="unscaled"):
        open_linker(pool)


def test_pools_with_trailing_windows(pool: Any, tier: DictTier, context: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A second pool whose pages exist at some boundaries only, as of sliding windows: each length that both can restore."""
    window = torch.randn(16 * PAGE, 3)
    entries = [
        DevicePoolEntry(
            name=name,
            indices_from_pool=PoolName.KV if name == PoolName.INDEXER else name,
            device_pool=None,
            components=[buffers],
            layer_mapping=mapping,
            page_size=PAGE,
            rows_are_pages=False,
        )
        for name, buffers, mapping in [
            (PoolName.KV, pool.k_buffer, {layer: layer for layer in range(LAYERS)}),
            (PoolName.SWA, [window], {2: 0}),
            (PoolName.INDEXER, [torch.randn(16 * PAGE, 2)], {0: 0}),
        ]
    ]
    group = DevicePoolGroup(entries, LAYERS, PAGE)
    monkeypatch.setattr(linker_module, "resolve_hybrid_device_pool_group", lambda **_: group)
    both = {ComponentType.FULL, ComponentType.SWA}
    linker = KVMemLinker(None, cache_params(pool), components=both, extra_config=options())
    trailing: dict[str, Any] = dict(name=PoolName.SWA, hit_policy=PoolHitPolicy.TRAILING_PAGES)
    kept, kept_window = pool.k_buffer[2].clone(), window.clone()
    linker.offload([transfer("abcdef", range(6)), transfer("bcf", [1, 2, 5], **trailing)])
    assert completed(linker, 1) == [True]
    assert linker.lookup("r", [transfer("abcdef"), transfer("f", **trailing)]) == [2, 3, 6]
    assert linker.lookup("r", [transfer("abcdef"), transfer("ef", **trailing)]) == [3]
    (gone,) = linker._keys.of(PoolName.INDEXER, ["d"])
    lost = tier.held.pop(gone)
    assert linker.lookup("r", [transfer("abcdef"), transfer("f", **trailing)]) == [2, 3], "of every page, both pools"
    tier.held[gone] = lost
    window.zero_()
    assert linker.load("r", [transfer("abc", [8, 9, 10]), transfer("bc", [3, 4], **trailing)])
    assert run_load(linker)
    assert torch.equal(window[3 * PAGE : 5 * PAGE], kept_window[PAGE : 3 * PAGE])
    assert torch.equal(pool.k_buffer[2][8 * PAGE : 11 * PAGE], kept[: 3 * PAGE])
    linker.close()
