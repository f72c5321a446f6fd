"""Shared prefixes read once: attention over the levels against plain attention."""

from __future__ import annotations

import inspect
import random

import kernel_oracle_flashinfer as stand_ins
import kernel_oracle_flashinfer_mla as mla_stand_ins
import pytest
import torch
from cascade_world import (
    EVERYTHING,
    SCENES,
    TOKENS_PER_BLOCK,
    Seqs,
    World,
    kv_spec,
    lists,
    make_world,
    mla_spec,
    nested,
    random_scene,
    step,
)  # fmt: skip
from kernel_cases import BACKENDS, assert_close, every_backend, one_thread
from support import encoder_decoder, windows

import kvmem
from kvmem.allocator.cascade import Cascade
from kvmem.kernels import flashinfer as args
from kvmem.kernels import flashinfer_mla as mla_args
from kvmem.kernels.merge import merge_levels
from kvmem.kernels.reference import cascade_attention

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(cascade: Cascade, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], **how: object) -> torch.Tensor:
    wrapper = stand_ins.MultiLevelCascadeAttentionWrapper(len(cascade.levels))
    heads = {"num_query_heads": q.shape[1], "num_kv_heads": cache[0].shape[2], "head_dim": q.shape[2]}
    wrapper.plan(**args.cascade_plan(cascade, **heads, dtype=q.dtype, kv_dtype=cache[0].dtype, **how))
    return wrapper.run(q, args.cache_of(*cache))


def check(world: World, seqs: Seqs, news: list[int], cascade: Cascade, batch: kvmem.Batch, heads: int = 4) -> None:
    """Every layer, both ways, against the numbers kept aside; the new tokens stay uncommitted."""
    for layer in range(world.alloc.spec.num_layers):
        cache = world.alloc.kv(layer)
        q = world.queries(batch, heads, cache[0].shape[3], torch.float64)
        out, lse = world.expected(q, seqs, news, layer)
        mine, my_lse = cascade_attention(q, cache, cascade, dtype=torch.float64)
        assert_close(mine, out, torch.float64)
        assert_close(my_lse, lse, torch.float64)
        assert_close(by_hand(cascade, q, cache), out, torch.float64)


@every_backend
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("news", [1, 5, (0, 1, 19)], ids=["decode", "drafts", "chunks"])
@pytest.mark.parametrize("max_levels", [1, 2, 99])
def test_attention_equals_plain_attention(backend, scene, news, max_levels, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    seqs = scene(world)
    counts = [news if isinstance(news, int) else news[i % len(news)] for i in range(len(seqs))]
    batch = step(world, seqs, counts, pad_to=len(seqs) + 2)
    cascade = batch.cascade(max_levels=max_levels, min_tokens=1)
    assert len(cascade.levels) <= max_levels
    check(world, seqs, counts, cascade, batch)


@every_backend
@pytest.mark.parametrize("heads", [(6, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize("interleave", [1, 2])
def test_heads_and_layouts(backend: str, heads: tuple[int, int], interleave: int, seed: int) -> None:
    world = make_world(kv_spec(num_layers=3, num_kv_heads=heads[1]), backend, seed, interleave=interleave)
    seqs = nested(world)
    batch = step(world, seqs, [2] * len(seqs))
    cascade = batch.cascade(**EVERYTHING)
    assert cascade.saved_tokens > 0
    check(world, seqs, [2] * len(seqs), cascade, batch, heads=heads[0])


@every_backend
def test_truncation_ends_the_sharing(backend: str, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    one = world.open(100)
    other = world.fork(one, 20)
    world.truncate(other, 50)
    world.grow(other, 60)
    batch = step(world, [one, other], [1, 1])
    cascade = batch.cascade(**EVERYTHING)
    assert cascade.saved_tokens == 48
    check(world, [one, other], [1, 1], cascade, batch)


@pytest.mark.parametrize("case", range(12))
def test_random(case: int, seed: int) -> None:
    made = {}
    for backend in BACKENDS:
        rng = random.Random(f"{seed} {case}")
        world = make_world(kv_spec(), backend, seed + case)
        seqs = random_scene(world, rng)
        order = world.alloc.cascade_order(seqs)
        assert sorted(order) == list(range(len(seqs)))
        if case % 2:
            seqs = [seqs[i] for i in order]
        news = [rng.choice([0, 1, 1, 2, 18]) for _ in seqs]
        batch = step(world, seqs, news, pad_to=len(seqs) + rng.randrange(3))
        cascade = batch.cascade(max_levels=rng.choice([1, 2, 3, 99]), min_tokens=rng.choice([1, 1, 20, 50]))
        check(world, seqs, news, cascade, batch)
        every = batch.cascade(**EVERYTHING)
        check(world, seqs, news, every, batch)
        made[backend] = [[lists(level) for level in c.levels] for c in (cascade, every)], list(order)
        asked = [i for i, n in enumerate(news) if n]
        read = sum(int(level.kv_lens_cpu.sum()) for level in every.levels[:-1])
        read += sum(int(every.levels[-1].kv_lens_cpu[i]) for i in [*asked, *range(len(seqs), batch.num_rows)])
        assert every.read_tokens == read and cascade.saved_tokens <= every.saved_tokens
        assert every.read_tokens + every.saved_tokens == sum(
            int(batch.seq_lens_cpu[i]) for i in [*asked, *range(len(seqs), batch.num_rows)]
        )
        if backend == "paged" and case % 2:  # in order, no block is read twice; forks copy what is cut
            ids = [i for level in every.levels for i in level.kv_indices.tolist() if i > 1]
            queried = {seqs[i].id for i in asked}
            idle = [i for i, s in enumerate(seqs) if s.id not in queried]
            own = every.levels[-1]
            for i in idle:
                for block in own.kv_indices[own.kv_indptr[i] : own.kv_indptr[i + 1]].tolist():
                    ids.remove(block)
            assert len(ids) == len(set(ids))
    assert made["virtual"] == made["paged"], "pages divide blocks here: both backends share the same"


@every_backend
def test_pages_larger_than_blocks(backend: str, rng: random.Random, seed: int) -> None:
    """Virtual: whole pages are shared, so fewer blocks, and with several arenas the least that all share."""
    unequal = [
        kvmem.Component("k", heads=2, width=8, dtype=torch.float64),
        kvmem.Component("v", heads=2, width=8, dtype=torch.float64),
    ]
    spec = kvmem.CacheSpec(components=unequal, num_layers=3, block_size=5)
    world = make_world(spec, backend, seed, page_bytes=12288, interleave=2, memory="64MiB")
    root = world.open(220)
    seqs = [root, world.fork(root, 3), world.fork(root)]
    batch = step(world, seqs, [1, 2, 3])
    cascade = batch.cascade(**EVERYTHING)
    # Arenas of 2 layers and of 1: 512 and 256 bytes a token, so 24 and 48 tokens a page: 216 and 192 are whole.
    assert cascade.levels[0].kv_lens.tolist() == [190 if backend == "virtual" else 220]
    check(world, seqs, [1, 2, 3], cascade, batch)


@every_backend
def test_a_group_with_a_window_shares_nothing(backend: str, seed: int) -> None:
    world = make_world(windows(TOKENS_PER_BLOCK), backend, seed)
    root = world.open(100)
    seqs = [root, world.fork(root, 20), world.fork(root, 1)]
    batch = step(world, seqs, [1, 2, 1])
    assert batch.cascade(**EVERYTHING).saved_tokens == 2 * 96
    local = batch.group(1).cascade(**EVERYTHING)
    assert (len(local.levels), local.saved_tokens) == (1, 0)
    layer = 1
    cache = world.alloc.kv(layer)
    q = world.queries(batch, 4, 8, torch.float64)
    out, _ = world.expected(q, seqs, [1, 2, 1], layer, group=1, left=39)
    assert local.drops_tokens
    assert_close(by_hand(local, q, cache, window_tokens=40), out, torch.float64)
    with pytest.raises(kvmem.SpecError, match="window_tokens: got None"):
        by_hand(local, q, cache)
    with pytest.raises(kvmem.SpecError, match="max_levels=1"):
        by_hand(batch.cascade(**EVERYTHING), q, world.alloc.kv(0), window_tokens=40)
    with pytest.raises(kvmem.SpecError, match="use sdpa"):
        cascade_attention(q, cache, local)


@every_backend
def test_cross_attention(backend: str, seed: int) -> None:
    """The encoder's tokens are shared whole by the beams of one input."""
    world = make_world(encoder_decoder(TOKENS_PER_BLOCK), backend, seed, page_bytes=4096)
    root = world.open()
    world.reserve(root, 48, group=1)
    root.commit(count=48, group=1)
    world.grow(root, 5)
    seqs = [root, world.fork(root, 3), world.fork(root)]
    batch = step(world, seqs, [1, 2, 1])
    cascade = batch.group(1).cascade(queries=batch, **EVERYTHING)
    # 128 bytes a token of both layers: 32 tokens a page on the virtual backend.
    assert [level.kv_lens.tolist() for level in cascade.levels] == (
        [[32], [16] * 3] if backend == "virtual" else [[48], [0] * 3]
    )
    q = world.queries(batch, 4, 8, torch.float64)
    cache = world.alloc.tensor(0, "cross_k"), world.alloc.tensor(0, "cross_v")
    want = world.expected(q, seqs, [1, 2, 1], 0, group=1, names=("cross_k", "cross_v"), causal=False)
    got = cascade_attention(q, cache, cascade, causal=False, dtype=torch.float64)
    assert_close(got[0], want[0], torch.float64)
    assert_close(got[1], want[1], torch.float64)
    assert_close(by_hand(cascade, q, cache, causal=False), want[0], torch.float64)


def mla(world: World, batch: kvmem.Batch, width: int, kpe: int) -> tuple[torch.Tensor, dict[str, object]]:
    dtype = world.alloc.tensor(0, "ckv").dtype
    q = world.queries(batch, 3, width + kpe, dtype)
    how = {"num_heads": 3, "head_dim_ckv": width, "head_dim_kpe": kpe, "scale": 0.11, "dtype": dtype}
    return q, how


OLD, NEW = mla_stand_ins.BatchMLAPagedAttentionWrapper, mla_stand_ins.NewBatchMLAPagedAttentionWrapper


@every_backend
@pytest.mark.parametrize(("made", "told"), [(OLD, False), (OLD, True), (NEW, True)], ids=["oldest", "old", "new"])
def test_mla(backend: str, made: type, told: bool, seed: int) -> None:
    world = make_world(mla_spec(), backend, seed)
    seqs = nested(world)
    news = [1 + i % 3 for i in range(len(seqs))]
    batch = step(world, seqs, news, pad_to=len(seqs) + 1)
    cascade = batch.cascade(**EVERYTHING)
    assert len(cascade.levels) == 3
    for layer in range(2):
        q, how = mla(world, batch, 48, 16)
        nope, pe = q.split([48, 16], -1)
        out, lse = world.expected(q, seqs, news, layer, names=("ckv", "ckv"), scale=0.11)
        cache = mla_args.mla_cache_of(world.alloc.tensor(layer, "ckv"), world.alloc.tensor(layer, "kpe"))
        wrapper = made()
        version = {"wrapper": wrapper} if told else {}
        one = mla_args.mla_plan(batch, **how, **version, return_lse=True)
        for plans in [one], mla_args.mla_cascade_plans(cascade, **how, **version):
            parts = []
            for plan in plans:
                wrapper.plan(**plan)
                part, base_2 = wrapper.run(**mla_args.mla_run(nope, pe, cache, **version, return_lse=True))
                parts.append((part, args.natural_lse(base_2)))
            got, got_lse = merge_levels(parts)
            assert_close(got, out, torch.float64)
            assert_close(got_lse, lse, torch.float64)


def test_mla_without_lse(seed: int) -> None:
    """The class tells the version as well as the wrapper does, also one that inherits."""
    world = make_world(mla_spec(), "paged", seed)
    seqs = [world.open(20)]
    batch = step(world, seqs, [2])
    q, how = mla(world, batch, 48, 16)
    cache = mla_args.mla_cache_of(world.alloc.tensor(0, "ckv"), world.alloc.tensor(0, "kpe"))
    mine = type("Mine", (NEW,), {"__module__": __name__})
    want, _ = world.expected(q, seqs, [2], 0, names=("ckv", "ckv"), scale=0.11)
    for made in (OLD, NEW, mine):
        wrapper = made()
        wrapper.plan(**mla_args.mla_plan(batch, **how, wrapper=made))
        out = wrapper.run(**mla_args.mla_run(*q.split([48, 16], -1), cache, wrapper=made))
        assert_close(out, want, torch.float64)


def test_mla_refusals(seed: int) -> None:
    world = make_world(mla_spec(), "paged", seed)
    seq = world.open(20)
    ckv = world.alloc.tensor(0, "ckv")
    with pytest.raises(kvmem.SpecError, match="equal blocks"):
        mla_args.mla_cache_of(ckv, ckv[:, :-1])
    ends = mla_args.mla_cache_of(ckv, ckv[:-1])  # each in a range of its own, one has a page more
    assert [len(blocks) for blocks in ends] == 2 * [len(ckv) - 1]
    with pytest.raises(kvmem.SpecError, match="dense"):
        mla_args.mla_cache_of(ckv[..., ::2], ckv)
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", window_tokens=8)
    windowed = make_world(spec, "paged", seed)
    batch = step(windowed, [windowed.open(40)], [1])
    _, how = mla(world, step(world, [seq], [1]), 48, 16)
    with pytest.raises(kvmem.SpecError, match="no sliding window"):
        mla_args.mla_plan(batch, **how)
    with pytest.raises(kvmem.SpecError, match="no sliding window"):
        mla_args.mla_cascade_plans(batch.cascade(), **how)
    batch = step(world, [seq], [1])
    with pytest.raises(kvmem.SpecError, match=r"wrapper: got 5, which has no plan\(\)"):
        mla_args.mla_plan(batch, **how, wrapper=5)
    with pytest.raises(kvmem.SpecError, match=r"wrapper: got 5, which has no run\(\)"):
        mla_args.mla_run(ckv, ckv, (ckv, ckv), wrapper=5)
    bare = type("Bare", (), {"plan": NEW.plan, "__module__": __name__})
    with pytest.raises(kvmem.SpecError, match="Bare, whose plan.* no MLAPlanMetadata"):
        mla_args.mla_plan(batch, **how, wrapper=bare)


@pytest.mark.parametrize(("version", "takes"), [(None, True), ((0, 2, 8), False), ((0, 2, 9), True)])
def test_a_cascade_of_another_dtype(version: tuple[int, ...] | None, takes: bool, monkeypatch, seed: int) -> None:
    """``kv_data_type`` is said only where it says something, and refused where the wrapper has no word for it."""
    monkeypatch.setattr(args, "installed", lambda package: version)
    world = make_world(kv_spec(), "paged", seed)
    cascade = step(world, [world.open(3)], [1]).cascade()
    how = {"num_query_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.bfloat16}
    assert "kv_data_type" not in args.cascade_plan(cascade, **how)
    assert "kv_data_type" not in args.cascade_plan(cascade, **how, kv_dtype=torch.bfloat16)
    if takes:
        assert args.cascade_plan(cascade, **how, kv_dtype=torch.float16)["kv_data_type"] == torch.float16
        return
    with pytest.raises(kvmem.SpecError, match=r"kv_dtype: got torch.float16 .*install 0\.2\.9"):
        args.cascade_plan(cascade, **how, kv_dtype=torch.float16)


def test_names_are_those_of_the_installed_flashinfer(seed: int) -> None:
    """Needs the package, but no GPU."""
    flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed: its signatures cannot be read")
    world = make_world(mla_spec(), "paged", seed)
    batch = step(world, [world.open(3)], [1])
    plan = args.cascade_plan(batch.cascade(), num_query_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float16)
    inspect.signature(flashinfer.MultiLevelCascadeAttentionWrapper.plan).bind(None, **plan)
    _, how = mla(world, batch, 48, 16)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper
    inspect.signature(wrapper.plan).bind(None, **mla_args.mla_plan(batch, **how, wrapper=wrapper))
    inspect.signature(wrapper.run).bind(None, **mla_args.mla_run(None, None, (None, None), wrapper=wrapper))
