"""Shared prefixes read once: the levels of a batch by hand, and attention over them against plain attention."""

from __future__ import annotations

import inspect
import random

import kernel_oracle_flashinfer as stand_ins
import numpy as np
import pytest
import torch
from cascade_world import TOKENS_PER_BLOCK, World, kv_spec, make_world, mla_spec
from kernel_cases import BACKENDS, assert_close, on_gpu, one_thread
from support import encoder_decoder, recurrent, windows

import kvmem
from kvmem.cascade import Cascade, Rows, make_cascade
from kvmem.kernels import flashinfer as args
from kvmem.kernels import flashinfer_mla as mla_args
from kvmem.kernels.merge import merge_levels
from kvmem.kernels.reference import cascade_attention, oracle

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize("backend", BACKENDS)

Seqs = list[kvmem.Sequence]
EVERYTHING = {"max_levels": 99, "min_tokens": 1}


def lone(world: World) -> Seqs:
    return [world.open(37)]


def nothing_shared(world: World) -> Seqs:
    return [world.open(n) for n in (37, 0, 64, 1)]


def all_equal(world: World) -> Seqs:
    root = world.open(80)
    return [root, *(world.fork(root) for _ in range(4))]


def depths(world: World) -> Seqs:
    """Forks of one trunk at several depths: each group within the one before."""
    trunk = world.open(20)
    seqs = [world.fork(trunk, 3)]
    for _ in range(3):
        world.grow(trunk, 30)
        seqs.append(world.fork(trunk, 9))
    return [*seqs, trunk]


def nested(world: World) -> Seqs:
    """A system prompt, two documents after it, questions after each; and strangers around."""
    seqs = [world.open(50)]
    system = world.open(70)
    for length in (40, 100):
        document = world.fork(system, length)
        seqs += [world.fork(document, n) for n in (0, 5, 33)]
    return [*seqs, world.fork(system, 1), world.open(16)]


SCENES = [lone, nothing_shared, all_equal, depths, nested]


def step(world: World, seqs: Seqs, news: list[int], pad_to: int | None = None) -> kvmem.Batch:
    for seq, new in zip(seqs, news, strict=True):
        world.reserve(seq, new)
    return world.alloc.batch(seqs, pad_to=pad_to)


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


def lists(level: kvmem.cascade.CascadeLevel) -> tuple[list[int], list[int], list[int]]:
    pages = level.kv_indptr.diff()
    last = level.kv_last_page_len
    assert torch.equal(level.kv_lens, (pages - 1).clamp(min=0) * TOKENS_PER_BLOCK + last)
    assert level.kv_indices.shape == (level.kv_indptr[-1],)
    return level.qo_indptr.tolist(), pages.tolist(), last.tolist()


@every_backend
def test_the_levels_of_nested_forks(backend: str, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    seqs = nested(world)  # 70 tokens are 4 whole blocks; 110 are 6, 170 are 10
    seqs.insert(3, world.open(0))  # no queries: it may stand between those that share
    news = [1, 1, 1, 0, 4, 1, 1, 1, 1, 1]
    batch = step(world, seqs, news, pad_to=11)
    cascade = batch.cascade(**EVERYTHING)
    outer, inner, own = cascade.levels
    assert lists(outer) == ([0, 1, 11, 13], [0, 4, 0], [0, 16, 0])
    assert lists(inner) == ([0, 1, 7, 10, 13], [0, 2, 6, 0], [0, 16, 16, 0])
    assert own.qo_indptr.tolist() == batch.cu_seqlens_q.tolist()
    assert own.kv_lens.tolist() == [51, 15, 20, 0, 51, 11, 16, 44, 8, 17, 1]
    held = sum(n for n in batch.seq_lens.tolist() if n)
    assert (cascade.saved_tokens, cascade.read_tokens) == (16 * (6 * 4 + 2 * 2 + 2 * 6), held - 16 * 40)
    for level in cascade.levels:
        for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_len", "kv_lens"):
            there, here = getattr(level, name), getattr(level, name + "_cpu")
            assert there.dtype == here.dtype == torch.int32 and there.is_contiguous() and torch.equal(there.cpu(), here)


@every_backend
def test_fewer_levels_leave_out_what_saves_least(backend: str, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    small = world.open(16)
    big = world.fork(small, 160)  # 11 blocks
    seqs = [world.fork(small, 5), world.fork(big, 1), world.fork(big, 1), world.fork(big, 1)]
    batch = step(world, seqs, [1] * 4)
    assert [lists(level)[1] for level in batch.cascade(**EVERYTHING).levels[:-1]] == [[1], [0, 10]]
    (shared, own) = batch.cascade(max_levels=2, min_tokens=1).levels
    assert lists(shared) == ([0, 1, 4], [0, 11], [0, 16])
    assert own.kv_lens.tolist() == [22, 2, 2, 2]
    crowd = [*seqs, *(world.fork(small, 1) for _ in range(30 - 16))]
    batch = step(world, crowd, [0] * 4 + [1] * 14)  # now many share the small one; those that shared the big one are
    batch = world.alloc.batch(crowd)  # still here
    (shared, _) = batch.cascade(max_levels=2, min_tokens=1).levels
    assert lists(shared)[1] == [0, 11, 0], "20 blocks saved by three, 17 by eighteen"


@every_backend
def test_short_parts_get_no_level(backend: str, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    seqs = depths(world)  # whole blocks shared with the next: 1, 3, 5, 6
    batch = step(world, seqs, [1] * len(seqs))

    def parts(**options: int) -> list[list[int]]:
        return [lists(level)[1] for level in batch.cascade(**options).levels[:-1]]

    assert parts(**EVERYTHING) == [[1], [0, 2], [0, 2], [0, 1]]
    assert parts(max_levels=99, min_tokens=17) == [[0, 3], [0, 2]]
    assert parts(max_levels=99, min_tokens=33) == [[0, 3], [0, 3]]
    assert parts(max_levels=99, min_tokens=6 * 16 + 1) == []
    assert parts() == [], "by default nothing below 256 tokens"


@every_backend
def test_new_tokens_are_never_shared(backend: str, seed: int) -> None:
    """A sequence that stands twice in a batch has all of itself in common, at last the new tokens too."""
    world = make_world(kv_spec(), backend, seed)
    seq = world.reserve(world.open(40), 30)
    batch = world.alloc.batch([seq, seq])
    before = batch.cascade(**EVERYTHING)
    assert [level.kv_lens.tolist() for level in before.levels] == [[32], [38, 38]]
    seq.commit(30)
    after = batch.cascade(**EVERYTHING)
    assert [level.kv_lens.tolist() for level in after.levels] == [[32], [38, 38]]
    assert world.alloc.batch([seq, seq], new_tokens=[0, 0]).cascade(**EVERYTHING).saved_tokens == 0, "no queries"


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


def random_scene(world: World, rng: random.Random) -> Seqs:
    """Opened, grown, forked, truncated, freed at random; multiples of a block now and then."""
    seqs: Seqs = []
    for _ in range(rng.randrange(4, 40)):
        what = rng.choice(["open", "fork", "fork", "fork", "grow", "truncate", "free"])
        length = rng.choice([0, 1, 16, 32, rng.randrange(70)])
        if not seqs or (what == "open" and len(seqs) < 20):
            seqs.append(world.open(length))
        elif what == "fork" and len(seqs) < 20:
            seqs.append(world.fork(rng.choice(seqs), length))
        elif what == "grow":
            seq = rng.choice(seqs)
            world.grow(seq, min(length, 400 - seq.num_tokens))
        elif what == "truncate":
            seq = rng.choice(seqs)
            world.truncate(seq, rng.randrange(seq.num_tokens + 1))
        elif what == "free" and len(seqs) > 1:
            world.free(seqs.pop(rng.randrange(len(seqs))))
    rng.shuffle(seqs)
    return seqs


def runs_of(common: list[int]) -> list[tuple[int, int, int]]:
    """By definition: maximal runs of rows whose least common is more than what they share with those around."""
    found = set()
    for i in range(len(common)):
        begin = end = i
        while begin > 0 and common[begin - 1] >= common[i] > 0:
            begin -= 1
        while end < len(common) and common[end] >= common[i] > 0:
            end += 1
        found.add((begin, end + 1, common[i]))
    return [run for run in found if run[2]]


def most_saved(common: list[int], max_depth: int, least: int) -> int:
    """Every choice of runs tried out."""
    runs, best = runs_of(common), 0
    for chosen in range(2 ** len(runs)):
        kept = [run for i, run in enumerate(runs) if chosen >> i & 1]
        saved, legal = 0, True
        for begin, end, blocks in kept:
            around = [b for x, y, b in kept if x <= begin and end <= y and b < blocks]
            added = blocks - max(around, default=0)
            legal = legal and len(around) < max_depth and added >= least
            saved += (end - begin - 1) * added
        best = max(best, saved if legal else 0)
    return best


def test_the_levels_chosen_save_the_most(rng: random.Random) -> None:
    for _ in range(300):
        n = rng.randrange(1, 9)
        common = [rng.choice([0, 1, 2, 3, 5, 9]) for _ in range(n - 1)]
        max_levels, least = rng.randrange(1, 5), rng.randrange(1, 5)
        counts = np.arange(n + 1, dtype=np.int32)
        ones = np.ones(n, np.int32)
        rows = Rows(
            cu_seqlens_q=counts, kv_indptr=counts * 10, kv_indices=np.arange(10 * n, dtype=np.int32),
            kv_last_page_len=ones, seq_lens=ones * 10, first_tokens=ones * 0, asking=np.arange(n),
            common=np.array(common, np.int64),
        )  # fmt: skip
        cascade = make_cascade(
            rows, block_size=1, max_levels=max_levels, min_blocks=least, device=torch.device("cpu")
        )  # fmt: skip
        assert len(cascade.levels) <= max_levels
        assert cascade.saved_tokens == most_saved(common, max_levels - 1, least), (common, max_levels, least)


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
    root = world.open(200)
    seqs = [root, world.fork(root, 3), world.fork(root)]
    batch = step(world, seqs, [1, 2, 3])
    cascade = batch.cascade(**EVERYTHING)
    # Arenas of 2 layers and of 1: 512 and 256 bytes a token, 24 and 48 tokens a page: 192 tokens are whole in both.
    assert cascade.levels[0].kv_lens.tolist() == [190 if backend == "virtual" else 200]
    check(world, seqs, [1, 2, 3], cascade, batch)


@every_backend
def test_the_order_brings_together_what_shares(backend: str, rng: random.Random, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    a, b = world.open(40), world.open(90)
    a1, a2, b1 = world.fork(a, 30), world.fork(a, 30), world.fork(b, 1)
    a11, b2, c = world.fork(a1, 7), world.fork(b, 50), world.open(3)
    seqs = [b1, a2, c, a1, b, a, a11, b2]
    order = world.alloc.cascade_order(seqs)
    assert [seqs[i] for i in order] == [b1, b, b2, a2, a1, a11, a, c]
    ids = np.array([s.id for s in seqs], np.int32)
    assert world.alloc.cascade_order(ids).tolist() == order.tolist()
    again = world.alloc.cascade_order([seqs[i] for i in order])
    assert again.tolist() == list(range(len(seqs))), "what is in order stays so"
    strangers = [world.open(n) for n in (0, 20, 5)]
    assert world.alloc.cascade_order(strangers).tolist() == [0, 1, 2]
    assert world.alloc.cascade_order([]).tolist() == []


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
def test_states_share_nothing(backend: str, seed: int) -> None:
    world = make_world(recurrent(TOKENS_PER_BLOCK), backend, seed)
    root = world.open(64)
    batch = step(world, [root, world.fork(root)], [1, 1])
    assert batch.cascade(**EVERYTHING).saved_tokens > 0
    assert batch.group(1).cascade(queries=batch, **EVERYTHING).saved_tokens == 0


@every_backend
def test_cross_attention(backend: str, seed: int) -> None:
    """The encoder's tokens are shared whole by the beams of one input."""
    world = make_world(encoder_decoder(TOKENS_PER_BLOCK), backend, seed, page_bytes=4096)
    root = world.open()
    world.reserve(root, 48, group=1)
    root.commit(48, group=1)
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


@every_backend
def test_mla(backend: str, seed: int) -> None:
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
        plans = [mla_args.mla_plan(batch, **how)], mla_args.mla_cascade_plans(cascade, **how)
        for made in plans:
            parts = []
            for plan in made:
                wrapper = stand_ins.BatchMLAPagedAttentionWrapper()
                wrapper.plan(**plan)
                part, base_2 = wrapper.run(nope, pe, *cache, return_lse=True)
                parts.append((part, args.natural_lse(base_2)))
            got, got_lse = merge_levels(parts)
            assert_close(got, out, torch.float64)
            assert_close(got_lse, lse, torch.float64)


def test_mla_refusals(seed: int) -> None:
    world = make_world(mla_spec(), "paged", seed)
    seq = world.open(20)
    ckv = world.alloc.tensor(0, "ckv")
    with pytest.raises(kvmem.SpecError, match="equal blocks"):
        mla_args.mla_cache_of(ckv, ckv[:-1])
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


@every_backend
def test_bad_requests(backend: str, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    one = world.open(40)
    two = world.fork(one)
    batch = step(world, [one, two], [1, 1])
    for wrong in ({"max_levels": 0}, {"max_levels": 1.5}, {"min_tokens": -1}, {"min_tokens": None}):
        with pytest.raises(kvmem.SpecError, match=next(iter(wrong))):
            batch.cascade(**wrong)
    with pytest.raises(kvmem.SpecError, match="never filled"):
        world.alloc.make_batch(max_new_tokens=4).cascade()
    with pytest.raises(kvmem.SpecError, match="group 7 does not exist"):
        world.alloc.cascade_order([one], group=7)
    with pytest.raises(kvmem.SpecError, match="int32"):
        world.alloc.cascade_order(np.array([0.5]))
    two.free()
    with pytest.raises(kvmem.StaleHandle):
        batch.cascade()
    with pytest.raises(kvmem.StaleHandle):
        world.alloc.cascade_order([one, two])
    core = world.alloc.core
    ids = np.array([one.id, one.id, one.id], np.int32)
    with pytest.raises(kvmem.SpecError, match="pair of neighbours"):
        core.common_blocks(ids, 0, np.empty(1, np.int64))
    with pytest.raises(kvmem.SpecError, match="each handle"):
        core.cascade_order(ids, 0, np.empty(2, np.int64))


def test_the_batch_keeps_its_own_handles(seed: int) -> None:
    world = make_world(kv_spec(), "paged", seed)
    one = world.open(40)
    two, other = world.fork(one), world.open(40)
    ids = np.array([one.id, two.id], np.int32)
    world.reserve(one, 1), world.reserve(two, 1)
    batch = world.alloc.batch(ids)
    ids[1] = other.id
    assert batch.cascade(**EVERYTHING).saved_tokens == 32


@every_backend
def test_batches_of_nothing(backend: str, seed: int) -> None:
    world = make_world(kv_spec(), backend, seed)
    for batch in (world.alloc.batch([]), world.alloc.batch([world.open()]), world.alloc.batch([], pad_to=3)):
        cascade = batch.cascade(**EVERYTHING)
        (own,) = cascade.levels
        assert own.qo_indptr.tolist() == batch.cu_seqlens_q.tolist()
        assert (cascade.read_tokens, cascade.saved_tokens) == (batch.num_new_tokens, 0)


def test_names_are_those_of_the_installed_flashinfer(seed: int) -> None:
    """Needs the package, but no GPU."""
    flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed: its signatures cannot be read")
    world = make_world(mla_spec(), "paged", seed)
    batch = step(world, [world.open(3)], [1])
    plan = args.cascade_plan(batch.cascade(), num_query_heads=4, num_kv_heads=2, head_dim=64, dtype=torch.float16)
    inspect.signature(flashinfer.MultiLevelCascadeAttentionWrapper.plan).bind(None, **plan)
    _, how = mla(world, batch, 48, 16)
    inspect.signature(flashinfer.mla.BatchMLAPagedAttentionWrapper.plan).bind(None, **mla_args.mla_plan(batch, **how))


@on_gpu
@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("news", [1, 7])
def test_on_a_gpu(backend: str, dtype: torch.dtype, news: int, seed: int) -> None:
    """The reference there, and FlashInfer's own cascade where it is installed."""
    world = make_world(kv_spec(dtype, head_dim=64), backend, seed, "cuda", memory="512MiB", page_bytes=2 << 20)
    seqs = all_equal(world) if backend == "paged" else long_forks(world)
    counts = [news] * len(seqs)
    batch = step(world, seqs, counts, pad_to=len(seqs) + 2)
    cascade = batch.cascade(**EVERYTHING)
    cache = world.alloc.kv(1)
    q = world.queries(batch, 8, 64, dtype)
    want, want_lse = oracle(q, cache, batch)
    got, lse = cascade_attention(q, cache, cascade)
    assert_close(got, want, dtype)
    assert_close(lse, want_lse, dtype)
    flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed")
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(cascade.levels), workspace, "NHD")
    wrapper.plan(**args.cascade_plan(cascade, num_query_heads=8, num_kv_heads=2, head_dim=64, dtype=dtype))
    assert_close(wrapper.run(q, args.cache_of(*cache)), want, dtype)


def long_forks(world: World) -> Seqs:
    """Pages of 2 MiB are shared whole: it takes more tokens before anything is."""
    root = world.open(480)
    return [root, world.fork(root, 1), world.fork(root, 9)]


@on_gpu
@every_backend
def test_mla_on_a_gpu(backend: str, seed: int) -> None:
    mla_module = pytest.importorskip("flashinfer.mla", reason="FlashInfer is not installed")
    dtype = torch.bfloat16
    world = make_world(mla_spec(dtype, 512, 64), backend, seed, "cuda", memory="512MiB")
    seqs = nested(world)
    batch = step(world, seqs, [1] * len(seqs), pad_to=len(seqs) + 1)
    q, how = mla(world, batch, 512, 64)
    nope, pe = (part.contiguous() for part in q.split([512, 64], -1))
    ckv, kpe = world.alloc.tensor(1, "ckv"), world.alloc.tensor(1, "kpe")
    want, want_lse = oracle(q, (torch.cat([ckv, kpe], -1), ckv), batch, scale=0.11)
    parts = []
    for plan in mla_args.mla_cascade_plans(batch.cascade(**EVERYTHING), **how):
        wrapper = mla_module.BatchMLAPagedAttentionWrapper(torch.zeros(128 << 20, dtype=torch.uint8, device="cuda"))
        wrapper.plan(**plan)
        out, lse = wrapper.run(nope, pe, *mla_args.mla_cache_of(ckv, kpe), return_lse=True)
        parts.append((out, args.natural_lse(lse)))
    got, got_lse = merge_levels(parts)
    assert_close(got, want, dtype)
    assert_close(got_lse, want_lse, dtype)
