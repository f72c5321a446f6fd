"""What a kernel may load behind a sequence's tokens, and mask only afterwards, is finite: 0 * NaN is NaN.

Everybody writes NaN into all that is theirs, then goes, is cut off, shares it or loses it to others. What lies behind
the tokens of whoever comes next must not be seen to have been theirs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from contents import places
from support import LAYOUTS, LONG, SIZES, make_allocator, plain

import kvmem

ZEROS = ("never", "fresh", "always")
FLOATS = sorted(set(LAYOUTS) - {"kv bytes"})
POISON = 100  # token ids from here on have NaN for keys and values


@dataclass
class Held:
    seq: kvmem.Sequence
    ids: list[int] = field(default_factory=list)
    cut: int = 0  # it has written so far, and cut it off since it last grew


class World:
    """An allocator whose tokens' content follows from their ids. Without ``sharing`` a batch zeroes what was cut off."""

    def __init__(self, alloc: kvmem.Allocator, sharing: bool) -> None:
        self.alloc, self.sharing, self.held = alloc, sharing, list[Held]()
        self.groups = [g for g, group in enumerate(alloc.spec.groups) if group.growth == "token"]

    def slots(self, held: Held, group: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks and places in them of tokens that the table names."""
        size, tokens = self.alloc.spec.groups[group].block_size, torch.arange(first, end)
        table = self.alloc.batch([held.seq]).group(group).block_table[0].long()
        return table[tokens // size], tokens % size

    def write(self, held: Held, first: int) -> None:
        values = torch.tensor([float("nan") if i >= POISON else float(i) for i in held.ids[first:]])
        for group in self.groups:
            block, place = self.slots(held, group, first, len(held.ids))
            for layer, name in places(self.alloc.spec, group):
                tensor = self.alloc.tensor(layer, name)
                tensor[block, place] = values.to(tensor.dtype)[:, None, None].expand(-1, *tensor.shape[2:])

    def grow(self, held: Held, ids: list[int]) -> bool:
        first = len(held.ids)
        if not held.seq.try_extend(len(ids)):
            return False
        held.ids += ids
        # Of what it was given now it may have written some before.
        self.check_behind(held, min(max(first, held.cut), len(held.ids)))
        held.cut = 0 if held.ids else held.cut
        self.write(held, first)
        return True

    def check(self, held: Held) -> None:
        """Live tokens hold what was written; what lies behind them is finite."""
        expected = torch.tensor([float("nan") if i >= POISON else float(i) for i in held.ids])
        for group in self.groups:
            first = self.alloc.core.first_token(held.seq.id, group)
            block, place = self.slots(held, group, first, len(held.ids))
            for layer, name in places(self.alloc.spec, group):
                found = self.alloc.tensor(layer, name)[block, place].flatten(1).float()
                assert torch.equal(found.nan_to_num(-1), expected[first:, None].expand_as(found).nan_to_num(-1))
        # A batch zeroes what was cut off, unless others may read it.
        self.check_behind(held, max(len(held.ids), held.cut if self.sharing else 0))

    def check_behind(self, held: Held, first: int) -> None:
        tokens, guard = len(held.ids), self.alloc.tail_guard_tokens
        if guard == 0:
            return
        for group in self.groups:
            if self.alloc.core.first_token(held.seq.id, group) == tokens:
                continue  # it needs no memory of the group
            size = self.alloc.spec.groups[group].block_size
            end = tokens + guard if self.alloc.backend == "virtual" else -(-tokens // size) * size
            if first >= end:
                continue
            rows = self.alloc.batch([held.seq]).group(group).rows if self.alloc.backend == "virtual" else None
            for layer, name in places(self.alloc.spec, group):
                if rows is not None:
                    behind = self.alloc.rows(layer, name)[int(rows[0]), first:end]
                else:
                    behind = self.alloc.tensor(layer, name)[self.slots(held, group, first, end)]
                assert behind.isfinite().all(), f"{self.alloc.backend}: NaN behind {tokens} tokens, group {group}"


def draw_ids(walk: random.Random, n: int) -> list[int]:
    """Mostly NaN; of few kinds, so that prompts begin alike."""
    return [walk.choice([1, POISON, POISON, POISON + 1]) for _ in range(n)]


def act(world: World, walk: random.Random, prompts: list[list[int]]) -> None:
    action = walk.choice(["open"] * 3 + ["grow"] * 6 + ["commit", "cut", "cut", "fork", "free", "free", "memory"])
    held = walk.choice(world.held) if world.held else None
    if action == "open" and len(world.held) < world.alloc.max_sequences:
        prompt = walk.choice(prompts)[: walk.randrange(1, 120)] + draw_ids(walk, walk.randrange(1, 9))
        seq = world.alloc.sequence(prompt) if world.sharing else world.alloc.sequence()
        world.held.append(Held(seq, prompt[: seq.num_cached_tokens]))
        world.grow(world.held[-1], prompt[seq.num_cached_tokens :])
    elif held is None:
        return
    elif action == "grow":
        n = walk.choice([0, 1, 1, 1, 2, 5, 17, 60])
        if not world.grow(held, draw_ids(walk, min(n, world.alloc.max_tokens - len(held.ids)))):
            world.held.remove(held)
            held.seq.free()
    elif action == "commit":
        done = held.seq.num_committed_tokens
        n = walk.randrange(len(held.ids) - done + 1)
        held.seq.commit(held.ids[done : done + n]) if world.sharing else held.seq.commit(count=n)
    elif action == "cut":
        keep = walk.randrange(max(0, len(held.ids) - 40), len(held.ids) + 1)
        try:
            held.seq.truncate(keep)
        except kvmem.SpecError:  # a window has dropped what it would need
            return
        held.cut, held.ids = max(held.cut, len(held.ids)), held.ids[:keep]
    elif action == "fork" and world.sharing and len(world.held) < world.alloc.max_sequences:
        try:
            child = held.seq.fork()
        except kvmem.OutOfMemory:
            return
        world.held.append(Held(child, held.ids[: child.num_tokens]))
    elif action == "free":
        world.held.remove(held)
        held.seq.free()
    elif action == "memory":
        walk.choice([world.alloc.clear_cache, world.alloc.trim, world.alloc.compact])()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", FLOATS)
def test_random_programs_never_show_another_nan(layout: str, backend: str, rng: random.Random) -> None:
    for _ in range(40 if LONG else 1):
        sizes, sharing = SIZES[rng.choice(sorted(SIZES))], rng.random() < 0.6
        alloc = make_allocator(
            LAYOUTS[layout].spec(sizes["block_size"]), backend, interleave=LAYOUTS[layout].interleave,
            page_bytes=sizes["page_bytes"], memory=rng.choice([40, 90, 200]) * sizes["page_bytes"],
            tail_guard_tokens=rng.choice([0, 1, 16, 40]), zero=rng.choice(ZEROS), prefix_cache=sharing,
            map_ahead_tokens=rng.choice([0, 0, 32]), max_sequences=5,
        )  # fmt: skip
        world = World(alloc, sharing)
        prompts = [draw_ids(rng, 120) for _ in range(3)]
        for _ in range(120):
            act(world, rng, prompts)
            if rng.random() < 0.5:
                for held in world.held:
                    world.check(held)


@pytest.mark.parametrize("zero", ZEROS)
def test_rejected_drafts_are_not_behind_the_next_step(backend: str, zero: str) -> None:
    """Five tokens are tried, four of them rejected, again and again; then only one comes."""
    alloc = make_allocator(plain(16), backend, tail_guard_tokens=16, zero=zero)
    world = World(alloc, sharing=False)
    held = Held(alloc.sequence())
    world.grow(held, [1])
    for _ in range(40):
        world.grow(held, [POISON] * 5)
        held.seq.truncate(len(held.ids) - 4)
        held.ids = held.ids[:-4]
        world.check_behind(held, len(held.ids))
    world.grow(held, [1])
    world.check(held)


def test_steady_growth_zeroes_seldom_and_never_without_a_guard(backend: str) -> None:
    """A step costs a call for zeroing once a guard's length (virtual) or once a block (paged), not each time."""
    calls = []
    for guard in (0, 32):
        driver = kvmem._core.CheckedDriver(kvmem._core.host_driver())
        alloc = make_allocator(plain(16), backend, driver=driver, tail_guard_tokens=guard, debug=False, memory="256KiB")
        with alloc.sequence() as first:
            first.extend(400)
        alloc.clear_cache()
        seq, before = alloc.sequence(), driver.counters().zero
        for _ in range(320):
            seq.step(1)
        calls.append(driver.counters().zero - before)
    assert calls[0] == 0
    assert 1 <= calls[1] <= 320 // 16 + 1


def test_a_replica_zeroes_what_its_leader_does(backend: str) -> None:
    options = {"tail_guard_tokens": 16, "prefix_cache": False, "page_bytes": 4096}
    leader = make_allocator(plain(16), backend, record_ops=True, **options)
    replica = make_allocator(plain(16), backend, **options)
    for n in (40, 3):
        seq = leader.sequence()
        seq.extend(n)
        replica.apply(leader.take_ops())
        world = World(replica, sharing=False)
        held = Held(kvmem.Sequence(replica, seq.id), [POISON] * n)
        world.write(held, 0)
        for keep in (n - 2, n - 1):
            seq.truncate(keep)
            seq.extend(1)
            replica.apply(leader.take_ops())
            held.ids = [POISON] * (keep + 1)
            world.check_behind(held, len(held.ids))
        seq.free()
        replica.apply(leader.take_ops())


def test_no_guard_lies_behind_a_state() -> None:
    """A kernel loads a state by itself. It would else cost as many states as the guard has tokens."""
    spec = LAYOUTS["recurrent"].spec(16)
    mapped = []
    for guard in (0, 256):
        alloc = make_allocator(spec, "virtual", tail_guard_tokens=guard, page_bytes=4096, interleave=1, max_tokens=16)
        sequence = alloc.sequence()
        sequence.extend(1)
        mapped.append(alloc.stats().mapped_bytes)
    attention = 256 * 2 * alloc.spec.groups[0].row_bytes("k", 1)  # as much for V
    assert mapped[1] - mapped[0] <= attention + 4096
