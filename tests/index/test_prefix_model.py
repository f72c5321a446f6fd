"""Prefix sharing against the reference model: random programs with contents, a state machine, a million operations for
each backend, both backends side by side, and all of it again with hashes that collide.

``KVMEM_LONG=1`` runs longer versions; ``--seed`` repeats a random one."""

from __future__ import annotations

import random

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from lockstep_prefix import PrefixLockstep, make_pair
from machines import Load, Machine, runs
from prefix_walk import ROOTS, Author, author, step
from support import BACKENDS, LAYOUTS, LONG, SIZES, make_allocator, plain


def walk_for(pair: PrefixLockstep, walk: random.Random, steps: int, every: int = 10) -> None:
    writer = author(pair, walk)
    for number in range(steps):
        step(pair, walk, writer)
        pair.agree()
        if number % every == 0:
            pair.contents_agree()
    pair.contents_agree()


# ---- Random programs with contents -----------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_programs_with_memory_enough(backend: str, layout: str, rng: random.Random) -> None:
    """What is found is exactly what the model finds, and reads as it was written."""
    for size in SIZES if LONG else [rng.choice(sorted(SIZES))]:
        pair = make_pair(layout, backend, size, plentiful=True)
        for _ in range(10):  # a short walk may find nothing by chance
            walk_for(pair, rng, 2000 if LONG else 120)  # every opening asserts it
            if pair.hit_tokens > 0 or not pair.model.shares or pair.model.fixed:
                break
        else:
            pytest.fail("nothing was found in ten walks")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_programs_under_pressure(backend: str, layout: str, rng: random.Random) -> None:
    """Little memory: what is found may be less than the model's, never other, never more."""
    for size in SIZES if LONG else [rng.choice(sorted(SIZES))]:
        guard = rng.choice([0, 30])
        pair = make_pair(layout, backend, size, tail_guard_tokens=guard, zero=rng.choice(["fresh", "always"]))
        walk_for(pair, rng, 3000 if LONG else 150)


@pytest.mark.parametrize("layout", ["kv interleaved", "full and window", "recurrent"])
def test_collisions_change_no_answer(
    backend: str, layout: str, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    """Invariant 7: with hashes of one bit every block collides with half of all others, and nothing else is different."""
    monkeypatch.setenv("KVMEM_HASH_BITS", "1")
    walk_for(make_pair(layout, backend, plentiful=True), rng, 2000 if LONG else 150)
    walk_for(make_pair(layout, backend), rng, 2000 if LONG else 150)


# ---- A state machine -------------------------------------------------------------------------------


class Sharing(Machine):
    """Prompts are made of whole and half blocks of three kinds, so that a failing program shrinks well."""

    pair: PrefixLockstep

    @initialize(
        layout=st.sampled_from(sorted(LAYOUTS)), size=st.sampled_from(sorted(SIZES)), pages=st.integers(12, 80),
        guard=st.sampled_from([0, 0, 40]),
    )  # fmt: skip
    def start(self, layout: str, size: str, pages: int, guard: int) -> None:
        memory = pages * SIZES[size]["page_bytes"]
        self.pair = make_pair(layout, self.backend, size, memory=memory, tail_guard_tokens=guard, max_sequences=4)

    def text(self, halves: list[int]) -> list[int]:
        half = -(-self.pair.model.block_tokens // 2)
        return [kind for kind in halves for _ in range(half)][: self.pair.alloc.max_tokens]

    @rule(halves=st.lists(st.integers(0, 2), max_size=6), root=st.sampled_from(ROOTS), compute=st.booleans())
    def open(self, halves: list[int], root: tuple[str | None, str | None], compute: bool) -> None:
        tokens = self.text(halves)
        handle = self.pair.open(tokens, root)
        if handle >= 0 and compute:
            self.pair.append(handle, tokens[self.pair.seqs[handle].num_cached_tokens :])

    @rule(number=st.integers(0, 3), halves=st.lists(st.integers(0, 2), max_size=3))
    def append(self, number: int, halves: list[int]) -> None:
        if (handle := self.pick(number)) is not None:
            self.pair.append(handle, self.text(halves)[: self.pair.model.room_tokens(handle)])

    @rule(number=st.integers(0, 3), n=st.integers(0, 20))
    def append_unknown(self, number: int, n: int) -> None:
        if (handle := self.pick(number)) is not None and self.pair.extend({handle: n}):
            self.pair.write([handle])
            self.pair.commit({handle: n})

    @rule(number=st.integers(0, 3))
    def pin(self, number: int) -> None:
        if (handle := self.pick(number)) is not None and self.pair.model.contents[handle].chain:
            self.pair.pin(handle)

    @rule(number=st.integers(0, 9))
    def unpin(self, number: int) -> None:
        if self.pair.pins:
            self.pair.unpin(number % len(self.pair.pins))

    @rule(number=st.integers(0, 3))
    def snapshot(self, number: int) -> None:
        if (handle := self.pick(number)) is not None:
            self.pair.snapshot(handle)

    @rule()
    def clear_cache(self) -> None:
        self.pair.clear_cache()


TestVirtual, TestPaged = runs(Sharing, "virtual"), runs(Sharing, "paged")


# ---- A million -------------------------------------------------------------------------------------


class Chats(Load):
    """Sequences begin with what others said, decode in batches, fork, go back and end."""

    pair: PrefixLockstep

    def __init__(self, pair: PrefixLockstep, walk: random.Random) -> None:
        super().__init__(pair, walk)
        self.writer = Author(walk, 16, 400)

    def one_call(self, handles: list[int]) -> None:
        pair, walk, kind = self.pair, self.walk, self.walk.random()
        if kind < 0.5 or not handles:
            self.begin()
        elif kind < 0.7:
            pair.free([walk.choice(handles)])
        elif kind < 0.78:
            pair.fork(walk.choice(handles))
        elif kind < 0.9:
            handle = walk.choice(handles)
            tokens = pair.model.sequences[handle][0].tokens
            pair.truncate(handle, walk.randint(tokens // 2, tokens))
        elif kind < 0.93:
            self.pin()
        elif kind < 0.97:
            pair.match(self.writer.prompt())
        elif kind < 0.972:
            pair.clear_cache()
        elif kind < 0.98:
            pair.trim()
        else:
            pair.set_memory(walk.choice([300, 400, 600]))

    def begin(self) -> None:
        pair = self.pair
        if len(pair.handles) == pair.alloc.max_sequences:
            return
        prompt = self.writer.prompt()
        handle = pair.open(prompt, self.walk.choice(ROOTS))
        rest = prompt[pair.seqs[handle].num_cached_tokens :]
        if not pair.append(handle, rest):
            pair.free([handle])
        self.operations += 3

    def pin(self) -> None:
        pair = self.pair
        handle = self.walk.choice(pair.handles)
        if len(pair.pins) > 3:
            pair.unpin(self.walk.randrange(len(pair.pins)))
        elif pair.model.contents[handle].chain:
            pair.pin(handle)

    def commit(self, new: dict[int, int]) -> None:
        sequences = self.pair.model.sequences
        self.pair.commit_ids({h: self.writer.tokens(sequences[h][0].committed, n) for h, n in new.items()})
        self.pair.pages.follow() if self.pair.pages else self.pair.alloc.take_ops()


@pytest.mark.timeout(3600)
def test_many_operations(backend: str, rng: random.Random) -> None:
    """200,000 for each backend. KVMEM_LONG=1 runs five million."""
    alloc = make_allocator(
        plain(16), backend, device="meta", memory=400 * 4096, page_bytes=4096, max_sequences=48, max_tokens=600,
        debug=False, record_ops=True,
    )  # fmt: skip
    pair = PrefixLockstep(alloc, contents=False)
    Chats(pair, rng).run(5_000_000 if LONG else 200_000)
    assert pair.hit_tokens > 0 and pair.partial_hits > 0, "nothing was shared"
    assert pair.missed_tokens > 0 and pair.alloc.stats().evicted_blocks > 0, "nothing was given up"


# ---- Both backends ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_invariant_10_both_backends_find_the_same(layout: str, seed: int) -> None:
    """One program, two backends with memory enough: equal hits, matches, reasons, lengths and contents."""
    pairs = []
    for backend in BACKENDS:
        walk = random.Random(seed)
        partial = "window" not in layout  # see PrefixLockstep: there the two differ
        pair = make_pair(layout, backend, walk.choice(sorted(SIZES)), plentiful=True, partial_reuse=partial)
        writer, answers = author(pair, walk), []
        for _ in range(1000 if LONG else 100):
            name = step(pair, walk, writer)
            found = pair.alloc.match(writer.prompts[-1], salt=walk.choice([None, "salt"]))
            lengths = [[(t.tokens, t.committed, t.first) for t in groups] for groups in pair.model.sequences.values()]
            cached = [seq.num_cached_tokens for seq in pair.seqs.values()]
            answers.append((name, found.num_tokens, found.reason, lengths, cached))
        pair.agree()
        pair.contents_agree()
        pairs.append((pair, answers))
    (one, first), (two, second) = pairs
    assert first == second
    for a, b in zip(one.handles, two.handles, strict=True):
        for g, held in enumerate(one.model.sequences[a]):
            known = len(one.model.contents[a].tokens)
            assert held.writers[:known] == two.model.sequences[b][g].writers[:known]  # contents_agree() has read both
