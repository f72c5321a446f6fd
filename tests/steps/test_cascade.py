"""The levels of a batch that shares prefixes, by hand and by trying out every choice; and the order of sequences."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cascade_world import EVERYTHING, TOKENS_PER_BLOCK, depths, kv_spec, lists, make_world, nested, step
from kernel_cases import BACKENDS
from support import recurrent

import kvmem
from kvmem.allocator.cascade import Rows, make_cascade

every_backend = pytest.mark.parametrize("backend", BACKENDS)


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
def test_states_share_nothing(backend: str, seed: int) -> None:
    world = make_world(recurrent(TOKENS_PER_BLOCK), backend, seed)
    root = world.open(64)
    batch = step(world, [root, world.fork(root)], [1, 1])
    assert batch.cascade(**EVERYTHING).saved_tokens > 0
    assert batch.group(1).cascade(queries=batch, **EVERYTHING).saved_tokens == 0


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
    with pytest.raises(kvmem.SpecError, match="^group: got 7; the spec has 1"):
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
