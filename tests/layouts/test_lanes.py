"""Lanes: attention over what each KV head kept against attention over everything with a mask, and memory given back."""

from __future__ import annotations

import itertools
import random
from typing import Any

import kernel_oracle_flashinfer as stand_ins
import pytest
import torch
from kernel_cases import assert_close, every_backend, one_thread

import kvmem
from kvmem.kernels import cpu, reference
from kvmem.kernels import flashinfer as args
from kvmem.kernels.base import Step
from kvmem.kernels.registry import find
from kvmem.layouts.lanes import LaneCache, LaneSequence
from kvmem.layouts.policies import Gate, PolicyInput, apply
from kvmem.layouts.rope import Rope

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, LAYERS, BLOCK = 16, 2, 4096  # bytes of 16 tokens of a head, and the smallest page: so rows can hold lanes too
ROPE = Rope.default(WIDTH)
HEADS = pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
NO_MEMORY, REFUSED = kvmem.OutOfMemory, kvmem.SpecError


def make(heads: int = 2, **options: Any) -> LaneCache:
    sizes = {"num_layers": LAYERS, "head_dim": WIDTH, "max_sequences": 3, "max_tokens": 1024, "page_bytes": BLOCK}
    given = {"dtype": torch.float64, "memory": "16MiB", "device": "cpu", "debug": True}
    return LaneCache(num_kv_heads=heads, **{**sizes, **given, **options})


class Mirror:
    """A sequence of lanes, every token that it was given, and a mask of those that each head still holds."""

    def __init__(self, seq: LaneSequence, draw: torch.Generator, heads: tuple[int, int] = (4, 2)) -> None:
        self.seq, self.draw, self.heads = seq, draw, heads
        self.k, self.v, self.held = {}, {}, {}  # by layer [S, KV heads, width], and bool [KV heads, S]
        self.hidden = set()  # layers with hidden rows

    def fork(self) -> Mirror:
        other = Mirror(self.seq.fork(), self.draw, self.heads)
        other.k, other.v, other.held, other.hidden = dict(self.k), dict(self.v), dict(self.held), set(self.hidden)
        return other

    def note(self, layer: int, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor | None = None) -> None:
        keep = torch.ones(k.shape[1], len(k), dtype=torch.bool) if keep is None else keep
        self.k[layer], self.v[layer] = (torch.cat((x.get(layer, y[:0]), y)) for x, y in ((self.k, k), (self.v, v)))
        self.held[layer] = torch.cat((self.held.get(layer, keep[:, :0]), keep), 1)

    def new(self, layer: int, count: int, keep: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of the next tokens, rotated to their true positions."""
        drawn = torch.randn(count, self.heads[0] + 2 * self.heads[1], WIDTH, generator=self.draw).double()
        q, k, v = drawn.split((*self.heads, self.heads[1]), 1)
        at = len(self.k.get(layer, ())) + torch.arange(count)
        q, k = ROPE.apply(q, at), ROPE.apply(k, at)
        self.note(layer, k, v, keep)
        return q, k, v

    def mask(self, layer: int, share: float, *, empty: bool = False) -> torch.Tensor:
        """A random mask over the rows, which is noted. empty: the first head keeps nothing."""
        held = self.held[layer]
        keep = torch.rand(held.shape, generator=self.draw) < share
        keep[0] &= not empty
        rows = torch.zeros(len(held), int(held.sum(1).max()), dtype=torch.bool)
        for head, mine in enumerate(held):
            rows[head, : int(mine.sum())] = keep[head][mine]
        self.held[layer] = held & keep
        return rows

    def expected(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k, v, group = self.k[layer], self.v[layer], q.shape[1] // self.k[layer].shape[1]
        asked = torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
        seen = (torch.arange(len(k)) <= asked) & self.held[layer].repeat_interleave(group, 0).unsqueeze(1)
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
        scores = scores.masked_fill(~seen, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0)  # of a query that sees nothing
        return torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)), scores.logsumexp(-1).T

    def step(self, layer: int, count: int = 1, keep: torch.Tensor | None = None) -> torch.Tensor:
        return step([self], layer, [count], keep)


def step(mirrors: list[Mirror], layer: int, counts: list[int], keep: torch.Tensor | None = None) -> torch.Tensor:
    """New tokens of several sequences in one call; their attention and what is held are compared. Returns the queries."""
    lanes = mirrors[0].seq.cache.lanes([mirror.seq for mirror in mirrors])
    parts = [None] * len(counts) if keep is None else keep.split(counts, 1)
    news = [mirror.new(layer, n, part) for mirror, n, part in zip(mirrors, counts, parts, strict=True)]
    q, k, v = map(torch.cat, zip(*news, strict=True))
    lanes.append(layer, k, v, keep=keep, counts=counts)
    found, wanted = (
        lanes.attend(q, layer),
        [mirror.expected(layer, new[0]) for mirror, new in zip(mirrors, news, strict=True)],
    )
    for mine, right in zip(found, map(torch.cat, zip(*wanted, strict=True)), strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-10)
    for mirror in mirrors:
        held, seq = mirror.held[layer], mirror.seq
        assert seq.lengths(layer).tolist() == held.sum(1).tolist() and seq.num_tokens(layer) == held.shape[1]
        assert all(torch.equal(seq.positions(layer, h), one.nonzero()[:, 0]) for h, one in enumerate(held))
    if keep is None and not any(layer in mirror.hidden for mirror in mirrors):
        heads = (q.shape[1] // lanes.cache.num_kv_heads, 1, WIDTH)  # of each head request
        asked = Step(lanes.head_requests(layer), *heads, dtype=q.dtype, kv_dtype=lanes.cache.dtype)
        flashinfer, split = stand_ins.BatchPrefillWithPagedKVCacheWrapper(), lanes.split_heads(q, layer)
        flashinfer.plan(**args.prefill_plan(asked.batch, **asked.heads))
        outs = (
            find("kvmem sdpa").prepare(reference, asked)(split, lanes.cache.kv)[0],
            flashinfer.run(split, args.cache_of(*lanes.cache.kv)),
        )
        for out in outs:
            assert_close(lanes.join_heads(out, layer), found[0], torch.float64)
    return q


@every_backend
@HEADS
def test_attention_after_eviction_equals_masked_attention(backend: str, heads: tuple[int, int], seed: int) -> None:
    """Layer 0 evicts after the prompt, layer 1 never stores what its gate drops."""
    cache, draw = make(heads[1], backend=backend), torch.Generator().manual_seed(seed)
    mirror = Mirror(cache.sequence(), draw, heads)
    mirror.step(0, 70)
    mirror.seq.evict(0, mirror.mask(0, 0.372, empty=True))
    for count in (67, 1, 2):
        mirror.step(1, count, (torch.rand(heads[1], count, generator=draw) < 0.4) & (torch.arange(count) > 0))
        with pytest.raises(REFUSED, match="layer: 1 has new tokens that were not stored"):
            mirror.seq.head_requests(1)
    assert cache.alloc.ledger.held["k", "device"] == sum(int(one.sum()) for one in mirror.held.values()) * WIDTH * 8
    for turn in range(30):
        for layer in range(LAYERS):
            mirror.step(layer, 1 + turn % 3)
            if turn % 7 == 6:
                mirror.seq.evict(layer, mirror.mask(layer, 0.8))
    assert cache.alloc.check() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("backend", ["paged", "virtual"])
def test_memory_of_evicted_tokens_is_given_back(backend: str, dtype: torch.dtype, seed: int) -> None:
    """62.8 % of 1,000 tokens go. Padded to the fullest head, 87 to 98 % of the pages would stay, by how heads differ;
    without compaction all: a block of 16 has no kept token with a probability of 0.06 %.
    """
    draw, heads, width = torch.Generator().manual_seed(seed), 8, WIDTH * 8 // dtype.itemsize
    cache = make(heads, backend=backend, dtype=dtype, head_dim=width, debug=False)
    seq, stats = cache.sequence(), cache.alloc.stats
    k, v = (x.to(dtype).float() for x in torch.randn(2, 1000, heads, width, generator=draw))
    seq.append(0, k, v), seq.append(1, k, v)
    full = stats().physical_bytes
    for layer in range(LAYERS):
        shares = 0.15 * torch.rand(heads, 1, generator=draw)
        counts = ((0.372 + shares - shares.mean()) * 1000).int()
        keep = torch.rand(heads, 1000, generator=draw).argsort(1) < counts
        cache.trim()
        held = stats().held_bytes
        assert (seq.evict(layer, keep, compact=False), cache.trim(), stats().held_bytes) == (0, 0, held)
        freed = seq.evict(layer, torch.arange(int(counts.max())) < counts)  # hidden rows are moved out now
        assert freed == sum(63 - -(-int(n) // 16) for n in counts) * BLOCK
    cache.trim()
    print(f"{stats().physical_bytes / full:.1%} of the bytes remain")
    assert 0.37 * full <= stats().physical_bytes <= 0.41 * full
    for given, rows in zip((k, v), seq.padded(1), strict=True):
        assert all(torch.equal(rows[h, : int(one.sum())].float(), given[one, h].float()) for h, one in enumerate(keep))
    seq.free()
    cache.trim()
    assert cache.alloc.check() == [] and stats().held_bytes <= 2 * BLOCK


@every_backend
def test_a_fork_shares_and_an_eviction_leaves_the_other_as_it_is(backend: str, seed: int) -> None:
    cache = make(backend=backend)
    parent = Mirror(cache.sequence(), torch.Generator().manual_seed(seed))
    for layer in range(LAYERS):
        parent.step(layer, 100)
    alone = cache.alloc.stats().held_bytes
    child = parent.fork()
    assert cache.alloc.stats().held_bytes == alone + 2 * LAYERS * BLOCK, "the last block of each lane, filled in part"
    for one, other in ((child, parent), (parent, child)):
        one.seq.evict(0, one.mask(0, 0.6))
        for mirror in (one, other):
            mirror.step(0), mirror.step(1)
    parent.fork().seq.free()
    assert parent.seq.evict(0, parent.mask(0, 0.3)) > 0, "in place again, since that fork is gone"
    child.seq.free()
    parent.step(0), parent.step(1)
    with pytest.raises(kvmem.StaleHandle, match="freed"):
        child.seq.free()


def test_random_calls_against_the_mirror(seed: int) -> None:
    choose, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = make(max_sequences=5)
    live = [Mirror(cache.sequence(), draw)]
    for _ in range(150):
        mirror, layer, call = choose.choice(live), choose.randrange(LAYERS), choose.random()
        some = choose.sample(live, choose.randint(1, len(live)))
        if call < 0.5 or any(layer not in one.k for one in (mirror, *some)):
            counts = [choose.choice([1, 1, 7, 40]) for _ in some]
            keep = torch.rand(2, sum(counts), generator=draw) < 0.5 if choose.random() < 0.3 else None
            step(some, layer, counts, keep)
        elif call < 0.8:
            compact, masks = choose.random() < 0.7, [one.mask(layer, choose.choice([0.3, 0.9])) for one in some]
            for one in some:
                one.hidden = one.hidden - {layer} if compact else one.hidden | {layer}
            assert cache.lanes([one.seq for one in some]).evict(layer, masks, compact=compact) == 0 or compact
        elif call < 0.9 and len(live) < 5:
            live.append(mirror.fork())
        elif len(live) > 1:
            live.remove(mirror)
            mirror.seq.free()
    for mirror in live:
        mirror.step(0), mirror.step(1), mirror.seq.free()
    assert cache.alloc.stats().used_bytes == 0 and cache.alloc.check() == []


@pytest.mark.parametrize("chunks", [[60], [25, 1, 34]], ids=str)
def test_a_gate_sees_the_whole_prompt_once(chunks: list[int], seed: int) -> None:
    """A fixed random network stands in for a trained gate: a probability for each token and query head."""
    draw, calls = torch.Generator().manual_seed(seed), []
    network, hidden = torch.randn(8, 4, generator=draw), torch.randn(60, 8, generator=draw)

    def gate(layer: int, given: PolicyInput) -> torch.Tensor:
        calls.append((layer, given.num_tokens))
        seen = torch.einsum("hqk,khd->qhd", given.weights, given.v.repeat_interleave(2, 0).transpose(0, 1))
        torch.testing.assert_close(seen, mirror.expected(layer, q)[0])
        return torch.sigmoid(given.hidden @ network).T

    mirror = Mirror(make().sequence(), draw)
    for layer in range(LAYERS):
        for count in chunks:
            q = mirror.step(layer, count)
        apply(Gate("random", gate), mirror.seq, layer, hidden=hidden, q=q)
        mirror.held[layer] &= torch.sigmoid(hidden @ network).T.view(2, 2, 60).amax(1) > 0.5
        mirror.step(layer)
    assert calls == [(0, 60), (1, 60)]


def unchanged(mirror: Mirror, call: Any, error: type[Exception], match: str) -> None:
    def state() -> list[Any]:
        stats, seq = mirror.seq.cache.alloc.stats(), mirror.seq
        at = [[seq.positions(layer, head).tolist() for head in range(2)] for layer in range(LAYERS)]
        rows = [x.tolist() for layer in range(LAYERS) for x in seq.padded(layer)]
        return [stats.held_bytes, stats.used_bytes, stats.num_sequences, rows, at]

    before = state()
    with pytest.raises(error, match=match):
        call()
    assert state() == before and mirror.seq.cache.alloc.check() == []


def test_bad_input_changes_nothing(seed: int) -> None:
    cache = make()
    mirror = Mirror(cache.sequence(), torch.Generator().manual_seed(seed))
    mirror.step(0, 20)
    seq, q, k = mirror.seq, torch.zeros(3, 4, WIDTH), torch.zeros(3, 2, WIDTH)
    good = torch.ones(2, 20, dtype=torch.bool)
    other, twins = make(dtype=torch.int8, page_bytes=None).sequence(), cache.lanes([seq, cache.sequence()])
    for call, match in [
        (lambda: seq.evict(0, good.float()), r"keep: got \(2, 20\) torch.float32 .*must be torch.bool \[2 KV heads, 20"),
        (lambda: seq.evict(0, good.repeat(2, 1)), r"keep: got \(4, 20\).*any_of_group"),
        (lambda: seq.evict(0, [good, good]), "keep: got 2 masks; must be one for each of 1 sequences"),
        (lambda: seq.evict(2, good), "layer: got 2; the largest that works is 1"),
        (lambda: seq.append(0, k, k, keep=good), r"keep: got \(2, 20\)"),
        (lambda: seq.append(0, k, k[:2]), "v: got 2 tokens"),
        (lambda: seq.append(0, k, k[:, :1]), r"v: got \(3, 1, 16\) .* \[T, 2 heads, 16\] on cpu"),
        (lambda: seq.attend(q, 0), "q: got 3 tokens; 1 sequences have"),
        (lambda: seq.attend(q.int(), 0), r"q: got \(3, 4, 16\) torch.int32 .*must be floats"),
        (lambda: seq.join_heads(q, 0), r"out: got \(3, 4, 16\) .*must be a tensor \[40, g"),
        (lambda: seq.positions(0, 2), "head: got 2; the largest that works is 1"),
        (lambda: seq.positions(0, -1), "head: got -1"),
        (lambda: cache.lanes(seq), "different sequences of this cache"),
        (lambda: seq.attend(q[:, :3], 0), "a multiple of 2 heads"),
        (lambda: twins.append(0, k, k, counts=[4, -1]), "k: got 3 tokens"),
        (lambda: cache.lanes([seq, seq]), "different sequences of this cache"),
        (lambda: cache.lanes([seq, other]), "different sequences of this cache"),
        (lambda: other.append(0, k, k), "k: got torch.float32; the cache holds torch.int8.*quantise first"),
        (lambda: make(backend="virtual", page_bytes=65536), r'"virtual" with pages of 65536.* 256 tokens.*paged.* 4096'),
        (lambda: make(8, num_layers=32, max_sequences=4096), "max_sequences: got 4096, of 264 lanes.* at most 3971 fit"),
        (lambda: make(prefix_cache=True), "prefix_cache: got True"),
        (lambda: make(num_layers=0), "num_layers: got 0"),
        (lambda: make(device=torch.device("meta")), 'device: got "meta"'),
    ]:  # fmt: skip
        unchanged(mirror, call, REFUSED, match)
    assert other.num_tokens(0) == 0


def test_memory_that_is_short_changes_nothing(seed: int) -> None:
    cache = make(memory=32 * BLOCK)
    mirror = Mirror(cache.sequence(), torch.Generator().manual_seed(seed))
    mirror.step(0, 64), mirror.step(1, 64)  # 16 blocks
    child, more = mirror.seq.fork(), torch.zeros(136, 2, WIDTH)
    unchanged(mirror, lambda: mirror.seq.append(0, more, more), NO_MEMORY, "memory")
    child.append(1, more[:112], more[:112])  # 14 blocks: 2 are left
    unchanged(mirror, lambda: mirror.seq.evict(0, torch.arange(64).expand(2, -1) > 0), NO_MEMORY, "memory")
    mirror.step(0)
    unchanged(mirror, mirror.seq.fork, NO_MEMORY, "memory")
    child.free()
    assert mirror.seq.evict(0, torch.arange(65).expand(2, -1) > 0) == 2 * BLOCK, "in place: it needs no memory"
    assert len([cache.sequence(), cache.sequence()]) == 2
    for call in (cache.sequence, mirror.seq.fork):
        unchanged(mirror, call, NO_MEMORY, "all 3 sequences are in use")


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_kernel_reads_lanes_where_they_lie(backend: str, dtype: torch.dtype, seed: int) -> None:
    """Lanes of unequal lengths, one of them with the new token alone."""
    width = BLOCK // (16 * dtype.itemsize)  # rows can hold lanes then
    cache, draw = make(dtype=dtype, backend=backend, head_dim=width), torch.Generator().manual_seed(seed)
    seqs = [cache.sequence() for _ in range(2)]
    for layer, (seq, n) in itertools.product(range(LAYERS), zip(seqs, (70, 5), strict=True)):
        k, v = torch.randn(2, n, 2, width, generator=draw).to(dtype)
        seq.append(layer, k, v)
        seq.evict(layer, (torch.rand(2, n, generator=draw) < 0.5) & (torch.arange(2) > 0).unsqueeze(1))
    lanes = cache.lanes(seqs)
    for layer in range(LAYERS):
        q, k, v = (
            torch.randn(2, 6, width, generator=draw).to(dtype),
            *torch.randn(2, 2, 2, width, generator=draw).to(dtype),
        )
        lanes.append(layer, k, v)
        found = cpu.attention(lanes.split_heads(q, layer), cache.kv, lanes.head_requests(layer))
        for mine, wanted in zip(found, lanes.attend(q, layer), strict=True):
            assert_close(lanes.join_heads(mine, layer), wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, seed: int) -> None:
    cache, draw = make(dtype=dtype, page_bytes=None), torch.Generator().manual_seed(seed)
    seq, q, k = cache.sequence(), *torch.randn(2, 9, 2, WIDTH, generator=draw).to(dtype)

    def step() -> list[torch.Tensor]:
        seq.append(0, k, -k)
        out, lse = seq.attend(q, 0)
        return [out, lse, seq.weights(q, 0), seq.join_heads(seq.split_heads(q, 0), 0), *seq.padded(0)]

    wanted = step()
    seq.free()
    seq = cache.sequence()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, step(), wanted))


def test_a_closed_allocator_has_no_sequences_to_free() -> None:
    cache = make()
    with pytest.raises(ZeroDivisionError), cache.sequence() as seq:
        cache.alloc.close()
        1 / 0  # noqa: B018
    with pytest.raises(kvmem.StaleHandle, match="closed"):
        seq.free()
