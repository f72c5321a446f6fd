"""``KVMemStorage`` against the installed SGLang: its factory, its configuration, and a host pool in ordinary memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support_sglang import (
    HEADS,
    LAYERS,
    PAGE,
    WIDTH,
    DictTier,
    context,  # noqa: F401  a fixture
    import_sglang,
    options,
    rows_of,
    tier,  # noqa: F401
    transfer,
)

import_sglang()

from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolHitPolicy, PoolName  # noqa: E402
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost  # noqa: E402
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory  # noqa: E402
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinker  # noqa: E402

from kvmem.errors import SpecError  # noqa: E402
from kvmem.integrations.names import missing_names  # noqa: E402
from kvmem.integrations.sglang.linker import KVMemLinker  # noqa: E402
from kvmem.integrations.sglang.names import LINKER, STORAGE, check_names  # noqa: E402
from kvmem.integrations.sglang.storage import KVMemStorage  # noqa: E402
from kvmem.tiers.base import Result, Status  # noqa: E402


def host_pool(layout: str = "layer_first", pages: int = 8) -> Any:
    """Return SGLang's own host pool over ordinary memory: its constructor would pin it, which needs a GPU."""
    pool = object.__new__(MHATokenToKVPoolHost)
    shape = (
        (2, LAYERS, pages * PAGE, HEADS, WIDTH) if layout == "layer_first" else (2, pages * PAGE, LAYERS, HEADS, WIDTH)
    )
    pool.__dict__.update(
        layout=layout, page_size=PAGE, layer_num=LAYERS, head_num=HEADS, head_dim=WIDTH, dtype=torch.float32,
        device="cpu", pin_memory=False, start_layer=0, end_layer=LAYERS - 1, kv_buffer=torch.randn(shape),
    )  # fmt: skip
    return pool


def page_of(pool: Any, page: int) -> torch.Tensor:
    return pool.get_data_page(page * PAGE, flat=True).clone()


def open_storage(pool: Any, extra: dict[str, Any] | None = None, **changed: Any) -> KVMemStorage:
    """As SGLang's controller opens it: through its factory, then with its host pools."""
    named = {"backend_name": "kvmem", "module_path": "kvmem.integrations.sglang.storage", "class_name": "KVMemStorage"}
    given = dict(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
        enable_storage_metrics=False, is_page_first_layout=False, model_name="org/model",
        extra_config=named | {"kvmem": options() if extra is None else extra},
    )  # fmt: skip
    storage = StorageBackendFactory.create_backend("dynamic", HiCacheStorageConfig(**given | changed), pool)
    storage.register_mem_pool_host(pool)
    storage.on_host_pools_registered()
    assert isinstance(storage, KVMemStorage)
    return storage


@pytest.fixture(params=["layer_first", "page_first"])
def pool(request: pytest.FixtureRequest) -> Any:
    return host_pool(request.param)


@pytest.fixture
def storage(pool: Any, tier: DictTier, context: Any) -> Iterator[KVMemStorage]:  # noqa: F811
    one = open_storage(pool)
    yield one
    one.close()


def test_canary() -> None:
    """Every name of SGLang that the integration uses is in the installed version."""
    assert missing_names(LINKER + STORAGE) == []
    check_names(LINKER, KVMemLinker, UnifiedCacheLinker)


def test_pages_of_the_host_pool(storage: KVMemStorage, pool: Any) -> None:
    kept = [page_of(pool, page) for page in (1, 4)]
    assert storage.batch_set_v1(["a", "b"], rows_of([1, 4])) == [True, True]
    pool.kv_buffer.fill_(777)
    assert storage.batch_exists(["a", "b", "c"]) == 2 and storage.exists("b") and not storage.exists("c")
    assert storage.batch_get_v1(["b", "c", "a"], rows_of([2, 3, 5])) == [True, False, True]
    assert torch.equal(page_of(pool, 2), kept[1]) and torch.equal(page_of(pool, 5), kept[0])
    assert all((page_of(pool, page) == 777).all() for page in (0, 1, 3, 4, 6, 7))
    assert storage.batch_get_v1(["a"], rows_of([1, 2])) == [False], "indices that do not fit"


def test_pages_as_flat_tensors(storage: KVMemStorage, pool: Any) -> None:
    pages = [page_of(pool, page) for page in (0, 1)]
    assert storage.batch_set(["a", "b"], pages) and storage.set("c", pages[0])
    target = pool.get_dummy_flat_data_page()
    assert storage.get("a", target) is target and torch.equal(target, pages[0])
    found = storage.batch_get(["b", "x"], [pool.get_dummy_flat_data_page() for _ in range(2)])
    assert torch.equal(found[0], pages[1]) and found[1] is None
    own = storage.get("c")
    assert own is not None and torch.equal(own, pages[0])


def test_a_late_tier_does_not_write_to_memory_of_sglangs(
    storage: KVMemStorage,
    pool: Any,
    tier: DictTier,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage.batch_set(["a"], [page_of(pool, 0)])
    gate, answered, get = threading.Event(), threading.Event(), tier.get

    def late(keys: Any, buffers: Any) -> Any:
        gate.wait(20)
        found = get(keys, buffers)
        answered.set()
        return found

    monkeypatch.setattr(tier, "get", late)
    target = pool.get_dummy_flat_data_page().fill_(7)
    assert storage.get("a", target) is None
    gate.set()
    assert answered.wait(10) and bool((target == 7).all())


def test_several_pools(pool: Any, tier: DictTier, context: Any) -> None:  # noqa: F811
    storage, side = open_storage(pool), host_pool()
    storage.register_mem_host_pool_v2(side, PoolName.SWA)
    trailing: dict[str, Any] = dict(name=PoolName.SWA, hit_policy=PoolHitPolicy.TRAILING_PAGES)
    both = [transfer("abcd", host_indices=rows_of(range(4))), transfer("bd", host_indices=rows_of([6, 7]), **trailing)]
    assert storage.batch_set_v2(both) == {PoolName.KV: [True] * 4, PoolName.SWA: [True] * 2}
    found = storage.batch_exists_v2([*"abcde"], [transfer("d", **trailing)])
    assert (found.kv_hit_pages, found.restorable_prefix_pages) == (4, [2, 4])
    assert storage.batch_exists_v2([*"abc"], [transfer("c", **trailing)]).kv_hit_pages == 2
    every = [transfer("abc", name=PoolName.SWA)]
    assert storage.batch_exists_v2([*"abc"], every).kv_hit_pages == 0
    kept = page_of(side, 7)
    side.kv_buffer.zero_()
    assert storage.batch_get_v2([transfer("db", host_indices=rows_of([0, 1]), **trailing)])[PoolName.SWA] == [True] * 2
    assert torch.equal(page_of(side, 0), kept)
    assert storage.batch_get_v2([transfer("a", name=PoolName.MAMBA, host_indices=rows_of([0]))]) == {
        PoolName.MAMBA: [False]
    }
    storage.close()


@pytest.mark.parametrize("stage", ["raises", "fails", "damaged", "closed"])
def test_what_fails_is_a_miss(storage: KVMemStorage, pool: Any, tier: DictTier, stage: str) -> None:  # noqa: F811
    storage.batch_set_v1(["a"], rows_of([1]))
    before = pool.kv_buffer.clone()

    def fault(call: str, keys: Any) -> Result | None:
        if stage == "raises":
            raise OSError("gone")
        return Result(Status.FAILED, 0, "no") if stage == "fails" else None

    tier.fault = fault
    if stage == "damaged":
        tier.damage(next(iter(tier.held)))
    if stage == "closed":
        storage.close()
    assert storage.batch_get_v1(["a"], rows_of([2])) == [False]
    assert torch.equal(pool.kv_buffer, before), "no byte of the host pool has changed"
    if stage != "damaged":
        assert storage.batch_set_v1(["b"], rows_of([2])) == [False] and storage.batch_exists(["a"]) == 0


def test_what_keys_cover_and_what_is_refused(tier: DictTier, context: Any) -> None:  # noqa: F811
    pool = host_pool()
    open_storage(pool).batch_set_v1(["a"], rows_of([1]))
    assert open_storage(pool).exists("a")
    for changed in (dict(tp_rank=1, tp_size=2), dict(model_name="other"), dict(pp_rank=1, pp_size=2)):
        assert not open_storage(pool, **changed).exists("a")
    assert not open_storage(host_pool("page_first")).exists("a"), "another layout of the same bytes"
    assert open_storage(pool, is_mla_model=True).exists("a") == open_storage(pool, tp_size=1).exists("a")
    for rank in range(2):  # latent KV is the same on all ranks
        latent = open_storage(pool, is_mla_model=True, tp_rank=rank, tp_size=2)
        assert latent.exists("latent") == bool(rank)
        latent.batch_set_v1(["latent"], rows_of([1]))
    with pytest.raises(SpecError, match="rank 0 only"):
        host = {"tiers": [{"type": "host", "capacity": "1MiB"}]}
        open_storage(pool, host, is_mla_model=True, tp_size=2)
    with pytest.raises(SpecError, match="must be a dict with tiers"):
        open_storage(pool, {"tier": []})


def test_random_worlds(storage: KVMemStorage, pool: Any, tier: DictTier, seed: int) -> None:  # noqa: F811
    """Stores, loads, damage and evictions against a dict."""
    rng, model = random.Random(seed), dict[str, torch.Tensor]()
    for step in range(200):
        names, pages = rng.sample("abcdef", 3), rng.sample(range(8), 3)
        match rng.randrange(4):
            case 0:
                new = [name for name in names if name not in model]  # a name's content never changes, as in SGLang
                assert all(storage.batch_set_v1(new, rows_of(pages[: len(new)])))
                model |= {name: page_of(pool, page) for name, page in zip(new, pages, strict=False)}
            case 1 if tier.held:
                rng.choice([tier.damage, tier.held.pop])(rng.choice(list(tier.held)))
            case _:
                for name, page, ok in zip(names, pages, storage.batch_get_v1(names, rows_of(pages)), strict=True):
                    assert not ok or torch.equal(page_of(pool, page), model[name]), (seed, step)
