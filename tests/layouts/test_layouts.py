"""Every layout on both backends: written and read as sequences grow, share, fork, are cut and evicted, and on replicas.

A layout adds its cases (``NAME_cases.py``) here; everything else is the same for all.
"""

from __future__ import annotations

from itertools import chain, pairwise

import aligned_cases
import goldfinch_cases
import palu_cases
import plain_cases
import pytest
import quantised_cases
import slim_cases
import torch
from layout_case import Case
from layout_world import World
from support import LONG

from kvmem import Allocator, Batch, CacheSpec, Component, Group, SpecError
from kvmem.geometry import GroupLayout
from kvmem.layouts import LayoutCache, PlainKV, read_set

CASES = list(
    chain.from_iterable(
        module.cases()
        for module in (plain_cases, slim_cases, palu_cases, goldfinch_cases, aligned_cases, quantised_cases)
    )
)
every_layout = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
both_backends = pytest.mark.parametrize("backend", ["virtual", "paged"])


def has_state(case: Case) -> bool:
    return any(group.growth == "fixed" for group in case.layout.spec.groups)


@every_layout
@both_backends
def test_prompts_and_decoding(case: Case, backend: str, seed: int) -> None:
    """Lengths around the ends of blocks and tiles, in chunks and token by token."""
    world = World(case, backend, seed)
    size = world.block
    sequences = [world.alloc.sequence() for _ in range(4)]
    for seq in sequences:
        world.ids[seq] = []
    world.grow(sequences, [world.some(n) for n in (1, size - 1, size, 3 * size + 1)])
    world.grow(sequences[:2], [world.some(n) for n in (size, 2)])
    for _ in range(3):
        world.grow(sequences, [world.some(1) for _ in sequences])
    assert world.alloc.check() == []


@every_layout
@both_backends
def test_derive(case: Case, backend: str, seed: int) -> None:
    """What other kernels are given: attention over it is attention over the layout; one scratch serves every layer."""
    world = World(case, backend, seed)
    sequences = [world.open(world.some(n)) for n in (5, 2 * world.block + 3, 300)]
    batch = world.alloc.batch(sequences, new_tokens=[0, 0, 0])
    held = []
    for layer in world.layers:
        try:
            found = world.cache.derive(layer, batch)
        except SpecError as error:  # a layout that has no K and V says so
            assert "derive" in str(error)
            return
        ends = found.cu_seqlens_k.tolist()
        for seq, begin, end in zip(sequences, ends, ends[1:], strict=False):
            k, v = case.plain(layer, torch.tensor(world.ids[seq]), torch.arange(len(world.ids[seq])))
            for part, wanted in ((found.k, k), (found.v, v)):
                error = (part[begin:end].double() - wanted[begin - end :]).abs().max() / wanted.abs().max()
                assert error <= case.extra.get("derive_tolerance", case.tolerance)
        held.append(world.alloc.ledger.held["scratch", "device"])
    assert held[-1] == max(held) > 0 and all(a <= b for a, b in pairwise(held))  # the largest layer's, not their sum
    world.cache.release_scratch()
    assert ("scratch", "device") not in world.alloc.ledger.held


@every_layout
@both_backends
def test_prefixes_are_shared(case: Case, backend: str, seed: int) -> None:
    world = World(case, backend, seed)
    blocks = max(6, 96 // world.block)
    prompt = world.some(blocks * world.block + 5)
    first = world.open(prompt)
    before = world.alloc.stats().used_bytes
    second = world.open(prompt[: (blocks - 1) * world.block + 1] + world.some(7))
    if has_state(case):  # it is shared where there is a snapshot, which the layout's own tests take
        assert second.num_cached_tokens == 0
        return
    assert second.num_cached_tokens >= (blocks - 1) * world.block
    if backend == "paged" or before > 8 * world.alloc.pool.page_bytes:  # the virtual backend shares whole pages
        assert world.alloc.stats().used_bytes < 1.5 * before
    for _ in range(2):
        world.grow([second, first], [world.some(1), world.some(2)])
    first.free()
    third = world.open(prompt)
    assert third.num_cached_tokens > 0
    world.check([second, third])


@every_layout
@both_backends
@pytest.mark.parametrize("new", [1, 12])
def test_queries_of_another_shape_are_refused(case: Case, backend: str, new: int, seed: int) -> None:
    """For few queries and for many, which some layouts compute in different ways."""
    world = World(case, backend, seed)
    seq = world.open(world.some(world.block + 3))
    seq.extend(new)
    batch = world.alloc.batch([seq])
    kv_heads = case.plain(world.layers[0], torch.tensor([0]), torch.tensor([0]))[0].shape[1]
    other = case.query_heads + (kv_heads > 1)  # one KV head takes any number
    for heads, width in ((case.query_heads, case.head_dim + 2), (other, case.head_dim + 2 * (kv_heads == 1))):
        with pytest.raises(SpecError, match="^q: got"):
            world.cache.attend(torch.zeros(new, heads, width), world.layers[0], batch)


@every_layout
@both_backends
def test_fork_and_truncate(case: Case, backend: str, seed: int) -> None:
    """In the middle of a block: both go on with other tokens; draft tokens are taken back and replaced."""
    world = World(case, backend, seed)
    seq = world.open(world.some(3 * world.block + world.number(1, max(1, world.block - 1))))
    twin = seq.fork()
    world.ids[twin] = list(world.ids[seq])
    world.grow([seq, twin], [world.some(3), world.some(world.block)])
    world.check([seq, twin])
    if has_state(case):
        return  # a state is not restored by truncate(): the layout's own tests roll back by snapshots
    for drafts in (2, max(1, world.block - 1), world.block + 2):
        world.grow([twin, seq], [world.some(drafts), world.some(drafts)], keep=world.number(0, drafts - 1))
        world.check([seq, twin])
        world.grow([twin, seq], [world.some(1), world.some(1)])
    assert world.alloc.check() == []


@every_layout
@both_backends
def test_eviction_and_refill(case: Case, backend: str, seed: int) -> None:
    """Memory for a few sequences: cached content goes, what is written later is right."""
    layouts = [GroupLayout(group, case.layout.spec.num_layers) for group in case.layout.spec.groups]
    block = max(g.block_size for g in case.layout.spec.groups)
    page = case.extra.get("sizes", {}).get("page_bytes", 4096)
    pages = sum(2 + -(-6 * block * layout.total_token_bytes // page) for layout in layouts)
    world = World(case, backend, seed, memory=2 * pages * page, max_sequences=4)
    prompts = [world.some(world.number(20, 20 + 3 * world.block)) for _ in range(4)]
    for turn in range(200):
        seq = world.open(prompts[turn % 4] + world.some(world.number(1, 2 * world.block)))
        seq.free()
        if world.alloc.stats().evicted_blocks > 8 and turn >= 8:
            break
    else:
        pytest.fail("nothing was evicted")
    assert world.alloc.check() == []


@every_layout
@both_backends
def test_a_replica_reads_what_it_wrote(case: Case, backend: str, seed: int) -> None:
    """A follower makes the same decisions from the leader's ops; each rank writes and reads its own memory."""
    world = World(case, backend, seed, record_ops=True)
    sizes = {"memory": "8MiB", "max_sequences": 16, "max_tokens": 512, "page_bytes": 4096} | case.extra.get("sizes", {})
    other = Allocator(case.layout.spec, backend=backend, device="cpu", **sizes)  # type: ignore[arg-type]
    cache = LayoutCache(case.layout, other)
    seq = world.alloc.sequence()
    world.ids[seq] = []
    for count in (2 * world.block + 3, 1, 5):
        new = world.some(count)
        seq.extend(count)
        other.apply(world.alloc.take_ops())
        world.write(world.alloc, world.cache, [seq], [new])
        world.write(other, cache, [seq], [new])
        world.ids[seq] += new
        seq.commit(new)
        other.apply(world.alloc.take_ops())
    twin = seq.fork()
    world.ids[twin] = list(world.ids[seq])
    twin.extend(1)
    other.apply(world.alloc.take_ops())
    for alloc, it in ((world.alloc, world.cache), (other, cache)):
        world.write(alloc, it, [twin], [[7]])
    world.ids[twin] += [7]
    twin.commit([7])
    other.apply(world.alloc.take_ops())
    world.check_in(other, cache, [seq, twin])


@every_layout
@both_backends
def test_bytes(case: Case, backend: str) -> None:
    """By the spec and the ledger exactly; by what the memfd holds, up to one page for each address range."""
    spec = case.layout.spec
    tokens = 16 * max(g.block_size for g in spec.groups)
    window = [g for g in spec.groups if g.window_tokens is not None]
    assert spec.bytes_per_token - sum(g.bytes_per_token for g in window) * case.blockwise == pytest.approx(
        case.plain_bytes / case.ratio, rel=0, abs=0
    )
    world = World(case, backend, 0, memory="32MiB", max_tokens=2 * tokens, interleave="all", prefix_cache=False)
    seq = world.alloc.sequence()
    world.ids[seq] = []
    before = world.alloc.stats().physical_bytes
    for _ in range(16):
        world.grow([seq], [world.some(tokens // 16)])
    world.alloc.trim()
    held = world.alloc.ledger.held
    grown, padded = 0, 0
    for group, layout in zip(spec.groups, world.alloc._layouts, strict=True):
        first = world.alloc.core.first_token(seq.id, spec.groups.index(group))
        count = {"token": tokens - first, "fixed": 1, "prefill": 0}[group.growth]
        grown += count * (group.bytes_per_token or group.fixed_bytes)
        padded += count * layout.total_token_bytes
    assert sum(held.values()) == grown
    arenas = sum(len(layout.token_bytes) for layout in world.alloc._layouts)
    reserved = max(g.block_size for g in spec.groups) * 3 * sum(x.total_token_bytes for x in world.alloc._layouts)
    assert (
        0 <= world.alloc.stats().physical_bytes - padded <= before + world.alloc.pool.page_bytes * arenas * 2 + reserved
    )


@every_layout
@both_backends
@pytest.mark.parametrize("round", range(4 if LONG else 1))
def test_random_walks(case: Case, backend: str, round: int, seed: int) -> None:
    """Any interleaving of open, grow, fork, cut and free."""
    world = World(case, backend, seed + round, memory="1MiB")
    prompts = [world.some(world.number(1, 4 * world.block)) for _ in range(3)]
    for _ in range(25):
        live = list(world.ids)
        kind = world.number(0, 4)
        if (kind == 0 or not live) and len(live) < 8:
            world.open(prompts[world.number(0, 2)] + world.some(world.number(1, world.block)))
        elif kind <= 1 and live:
            several = live[: world.number(1, len(live))]
            world.grow(several, [world.some(world.number(1, world.block + 1)) for _ in several])
        elif kind == 2 and len(live) < 8:
            twin = (seq := live[world.number(0, len(live) - 1)]).fork()
            world.ids[twin] = list(world.ids[seq])
        elif kind == 3 and not has_state(case) and live:
            drafts = world.number(1, world.block + 1)
            world.grow([live[0]], [world.some(drafts)], keep=world.number(0, drafts))
        elif live:
            seq = live[world.number(0, len(live) - 1)]
            del world.ids[seq]
            seq.free()
    assert world.alloc.check() == []


@pytest.mark.parametrize("window_first", [False, True])
@both_backends
def test_plain_layers_with_and_without_a_window(window_first: bool, backend: str) -> None:
    """Each layer derives what its own group holds, whichever group comes first."""
    parts = tuple(Component(name, heads=2, width=8, dtype=torch.float32) for name in "kv")
    groups = Group("full", parts, (0,)), Group("window", parts, (1,), window_tokens=1)
    layout = PlainKV(CacheSpec(groups[:: -1 if window_first else 1], block_size=4))
    alloc = Allocator(layout.spec, backend=backend, device="cpu", memory="1MiB", max_sequences=2, max_tokens=128)
    cache, seq, (k, v) = LayoutCache(layout, alloc), alloc.sequence(), torch.randn(2, 100, 2, 8)
    for at in range(0, 100, 10):
        seq.extend(10)
        for layer in range(2):
            cache.write(layer, alloc.batch([seq]), k[at : at + 10], v[at : at + 10])
        seq.commit(count=10)
    batch = alloc.batch([seq], new_tokens=[0])
    for layer, held in enumerate((100, 0)):
        found = cache.derive(layer, batch)
        assert found.cu_seqlens_k.tolist() == [0, held] and found.max_seqlen_k == held
        assert torch.equal(found.k, k[100 - held :]) and torch.equal(found.v, v[100 - held :])
        assert [x.shape for x in cache.attend(k[:0], layer, batch)] == [(0, 2, 8), (0, 2)]
    for wrong in (
        [Group("k", parts[:1], (0,)), Group("v", parts[1:], (0,), window_tokens=8)],
        [Group("k", parts[:1], (0,))],
    ):
        with pytest.raises(SpecError, match="spec: layer 0 has .*; PlainKV stores k and v of every layer in one group"):
            PlainKV(CacheSpec(tuple(wrong)))


@every_layout
@both_backends
def test_a_step_without_new_tokens(case: Case, backend: str, seed: int) -> None:
    """Its output has the width that others have."""
    world = World(case, backend, seed)
    sequences = [world.open(world.some(n)) for n in (9, 1)]
    batch = world.alloc.batch(sequences, new_tokens=[0, 0])
    padding = world.alloc.make_batch(max_sequences=1, max_new_tokens=1)
    world.alloc.fill([], padding, pad_to=1)
    for layer in world.layers:
        one = case.layout.attend(world.queries(1), world.cache.readers(layer, batch)[0])
        for new, each in enumerate((batch, padding)):
            found = world.cache.attend(world.queries(new), layer, each)
            assert [x.shape for x in found] == [(new, *x.shape[1:]) for x in one]
            assert not found[0].any() and (found[1] == -torch.inf).all()
            assert case.finish(layer, found[0]).shape[0] == new


# --- what is refused ---


def prepared(case: Case, backend: str) -> tuple[World, Batch, list[torch.Tensor]]:
    """A step of nine tokens, of which the first layer is written; and what was written."""
    world = World(case, backend, 0)
    (seq := world.alloc.sequence()).extend(9)
    batch, layer = world.alloc.batch([seq]), world.layers[0]
    values = case.values(layer, torch.arange(9), torch.arange(9))
    world.cache.write(layer, batch, *values)
    return world, batch, list(values)


def stored(world: World, batch: Batch) -> list[torch.Tensor]:
    (reader,) = world.cache.readers(layer := world.layers[0], batch)
    components = world.case.layout.spec.layer_components(layer)
    return [reader.rows(c.name, reader.first, 9).clone() for c in components if c.growth == "token"]


@every_layout
@both_backends
def test_a_batch_of_another_allocator_is_refused(case: Case, backend: str) -> None:
    """It would be read at the right addresses of the wrong memory."""
    world, mine, values = prepared(case, backend)
    other, foreign, _ = prepared(case, backend)
    layer, q, before = world.layers[0], world.queries(9), stored(world, mine)
    for batch in (foreign, world.alloc.make_batch(max_sequences=1, max_new_tokens=9), None, list(world.ids)):
        for call in (
            lambda batch: world.cache.write(layer, batch, *values),
            lambda batch: world.cache.attend(q, layer, batch),
            lambda batch: world.cache.derive(layer, batch),
            lambda batch: world.cache.readers(layer, batch),
            lambda batch: read_set(world.alloc, batch, layer, ()),
        ):
            with pytest.raises(SpecError, match="batch: got .*; must be a batch of this allocator"):
                call(batch)
    with pytest.raises(SpecError, match="queries: got .*; must be a batch of this allocator"):
        world.cache.attend(q, layer, mine, queries=foreign)
    assert other.alloc.core is not world.alloc.core
    two = [world.alloc.sequence() for _ in range(2)]
    with pytest.raises(SpecError, match="queries: got .*; must be another group's batch of the same sequences"):
        world.cache.attend(q, layer, mine, queries=world.alloc.batch([seq.id for seq in two], new_tokens=[0, 0]))
    assert all(map(torch.equal, stored(world, mine), before))


@every_layout
@both_backends
def test_arguments_of_a_wrong_kind_change_nothing(case: Case, backend: str) -> None:
    world, batch, values = prepared(case, backend)
    layer, q, before, cache = world.layers[0], world.queries(9), stored(world, batch), world.cache
    for wrong in ([x.numpy() for x in values], [x.to("meta") for x in values], [None for _ in values], [[1.0] * 9999]):
        with pytest.raises(SpecError, match="values: got .{,200}; must be tensors on cpu"):
            cache.write(layer, batch, *wrong)
    if isinstance(case.layout, PlainKV):
        for wrong in ([], [*values, *values]):
            with pytest.raises(SpecError, match="values: got .; PlainKV stores two: k and v"):
                cache.write(layer, batch, *wrong)
    for wrong in (q.numpy(), q.int(), q.to(torch.complex64), q[0], None, q[1:], q.to("meta"), q[..., 1:], q[:, :0]):
        with pytest.raises(SpecError, match="q: got"):
            cache.attend(wrong, layer, batch)  # type: ignore[arg-type]
    for number in (case.layout.spec.num_layers, -1, None, "0", True):
        with pytest.raises(SpecError, match="layer: got"):
            cache.write(number, batch, *values)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="layer: got"):
            cache.attend(q, number, batch)  # type: ignore[arg-type]
    assert all(map(torch.equal, stored(world, batch), before))
    meta = Allocator(case.layout.spec, backend=backend, device="meta", memory="8MiB", max_sequences=1, max_tokens=9)
    for layout, alloc in (
        (None, world.alloc),
        (case.layout, None),
        (type(case.layout), world.alloc),
        (case.layout, meta),
    ):
        with pytest.raises(SpecError, match="layout, alloc: got .*; give Layout and Allocator with memory"):
            LayoutCache(layout, alloc)  # type: ignore[arg-type]
