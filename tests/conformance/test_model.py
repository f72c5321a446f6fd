"""The allocator against the reference model: state machines that shrink what they find, and a million random
operations.

``KVMEM_LONG=1`` runs longer versions; ``--seed`` repeats a random one.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from conformance import step
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lockstep import Lockstep
from support import BACKENDS, LAYOUTS, LONG, SIZES, i32, make_allocator, plain

import kvmem

# ---- State machines ------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Small memory, so that every call meets its limits. Sequences are chosen by number, modulo how many there are."""

    backend = "virtual"

    @initialize(
        layout=st.sampled_from(sorted(LAYOUTS)), size=st.sampled_from(sorted(SIZES)), pages=st.integers(12, 80),
        guard=st.sampled_from([0, 0, 40]), zero=st.sampled_from(["fresh", "always", "never"]),
    )  # fmt: skip
    def start(self, layout: str, size: str, pages: int, guard: int, zero: str) -> None:
        sizes = SIZES[size]
        self.pair = Lockstep(
            make_allocator(
                LAYOUTS[layout].spec(sizes["block_size"]), self.backend, interleave=LAYOUTS[layout].interleave,
                zero=zero,
                page_bytes=sizes["page_bytes"], memory=pages * sizes["page_bytes"], tail_guard_tokens=guard,
                max_sequences=4,
            )
        )  # fmt: skip

    def pick(self, number: int) -> int | None:
        return self.pair.handles[number % len(self.pair.handles)] if self.pair.handles else None

    @rule()
    def open(self) -> None:
        self.pair.open()

    @rule(number=st.integers(0, 3), n=st.sampled_from([0, 1, 5, 16, 40, 130, 400, 401]), write=st.booleans())
    def extend(self, number: int, n: int, write: bool) -> None:
        if (handle := self.pick(number)) is not None and self.pair.extend({handle: n}) and write:
            self.pair.write([handle])

    @rule(counts=st.lists(st.integers(0, 60), min_size=4, max_size=4))
    def extend_all(self, counts: list[int]) -> None:
        if self.pair.handles:
            self.pair.extend(dict(zip(self.pair.handles, counts, strict=False)))

    @rule(number=st.integers(0, 3), part=st.floats(0, 1))
    def commit(self, number: int, part: float) -> None:
        if (handle := self.pick(number)) is not None:
            held = self.pair.model.sequences[handle][self.pair.model.main]
            self.pair.write([handle])
            self.pair.commit({handle: int((held.tokens - held.committed) * part)})

    @rule(number=st.integers(0, 3), n=st.integers(0, 51))
    def prefill(self, number: int, n: int) -> None:
        for g, rules in enumerate(self.pair.model.groups):
            if (
                rules.growth == "prefill"
                and (handle := self.pick(number)) is not None
                and self.pair.prefill(handle, n, g)
            ):
                self.pair.write([handle])
                held = self.pair.model.sequences[handle][g]
                self.pair.commit({handle: held.tokens - held.committed}, g)

    @rule(number=st.integers(0, 3), part=st.floats(0, 1.01))
    def truncate(self, number: int, part: float) -> None:
        if (handle := self.pick(number)) is not None:
            self.pair.truncate(handle, int(self.pair.model.sequences[handle][self.pair.model.main].tokens * part))

    @rule(number=st.integers(0, 3))
    def fork(self, number: int) -> None:
        if (handle := self.pick(number)) is not None:
            self.pair.fork(handle)

    @rule(number=st.integers(0, 3))
    def free(self, number: int) -> None:
        if (handle := self.pick(number)) is not None:
            self.pair.free([handle])

    @rule()
    def trim(self) -> None:
        self.pair.trim()

    @rule(size=st.sampled_from([None, 1, 20_000]))
    def compact(self, size: int | None) -> None:
        self.pair.compact(size)

    @rule(pages=st.integers(1, 120))
    def set_memory(self, pages: int) -> None:
        self.pair.set_memory(pages)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pair"):
            self.pair.agree()
            self.pair.contents_agree()


class PagedMachine(Machine):
    backend = "paged"


RUNS = settings(
    max_examples=400 if LONG else 25, stateful_step_count=60 if LONG else 30, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestVirtual = pytest.mark.timeout(3600)(Machine.TestCase)
TestVirtual.settings = RUNS
TestPaged = pytest.mark.timeout(3600)(PagedMachine.TestCase)
TestPaged.settings = RUNS


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_operations_with_contents(backend: str, rng: random.Random) -> None:
    """Thousands of random calls on real memory, every token verified (tens of thousands with KVMEM_LONG=1)."""
    for name in LAYOUTS:
        sizes = SIZES[rng.choice(sorted(SIZES))]
        alloc = make_allocator(
            LAYOUTS[name].spec(sizes["block_size"]), backend, interleave=LAYOUTS[name].interleave,
            page_bytes=sizes["page_bytes"], memory=50 * sizes["page_bytes"], tail_guard_tokens=rng.choice([0, 30]),
        )  # fmt: skip
        pair = Lockstep(alloc)
        for number in range(3000 if LONG else 150):
            step(pair, rng)
            pair.agree()
            if number % 10 == 0:
                pair.contents_agree()


# ---- A million -----------------------------------------------------------------------------------


class Load:
    """A serving load on ``device="meta"``: many sequences decode in batches, some start, fork, shrink and end in
    between.

    A batched call counts as one operation for each sequence in it. Lengths are compared with the model after every
    round,
    memory and invariants every ``often`` rounds.
    """

    def __init__(self, backend: str, walk: random.Random, often: int) -> None:
        self.walk, self.often, self.operations = walk, often, 0
        alloc = make_allocator(
            plain(16),
            backend,
            device="meta",
            memory=400 * 4096,
            page_bytes=4096,
            max_sequences=48,
            max_tokens=600,
            debug=False,
        )
        self.pair = Lockstep(alloc, contents=False)
        self.pair.prepare_padding()
        self.out = alloc.make_batch(max_new_tokens=48 * 600, max_tokens=600)

    def round(self, number: int) -> None:
        pair, walk = self.pair, self.walk
        self.decode()
        for _ in range(3):
            kind = walk.random()
            handles = pair.handles
            if kind < 0.4 or not handles:
                if len(handles) < pair.alloc.max_sequences and (handle := pair.open()) >= 0:
                    pair.extend({handle: walk.randint(1, 300)})
                    self.operations += 2
            elif kind < 0.6:
                pair.free([walk.choice(handles)])
            elif kind < 0.75:
                pair.fork(walk.choice(handles))
            elif kind < 0.95:
                handle = walk.choice(handles)
                pair.truncate(handle, walk.randint(0, pair.model.sequences[handle][0].tokens))
            elif kind < 0.965:
                pair.trim()
            elif kind < 0.98:
                pair.compact(walk.choice([None, 3 * 4096]))
            else:
                pair.set_memory(walk.choice([300, 400, 600]))
            self.operations += 1
        pair.lengths_agree()
        if number % self.often == 0:
            pair.memory_agrees()
            assert pair.alloc.check() == []

    def decode(self) -> None:
        """Some steps of all sequences: extend, fill, commit."""
        pair, alloc = self.pair, self.pair.alloc
        room = [h for h in pair.handles if pair.model.room_tokens(h) >= 16]
        for handle in (h for h in pair.handles if pair.model.room_tokens(h) < 16):
            pair.free([handle])
            self.operations += 1
        if not room:
            return
        counts = {h: self.walk.choice([1, 1, 1, 3]) for h in room}
        ids, amounts = i32(*room), i32(*counts.values())
        steps = 1
        while steps <= 6 and pair.extend(counts):
            alloc.fill(ids, self.out)
            lengths = [pair.model.sequences[h][0].tokens for h in room]
            assert np.array_equal(self.out.seq_lens_cpu.numpy(), lengths)
            fresh = {h: (held := pair.model.sequences[h][0]).tokens - held.committed for h in room}
            assert self.out.num_new_tokens == sum(fresh.values())
            pair.commit(fresh)
            self.operations += 3 * len(amounts)
            counts = dict.fromkeys(room, 1)
            steps += 1
        else:
            if steps <= 6:  # out of memory: preempt
                for handle in self.walk.sample(pair.handles, len(pair.handles) // 3):
                    pair.free([handle])
                    self.operations += 1


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_million_operations(backend: str, seed: int) -> None:
    """For each backend. KVMEM_LONG=1 runs five million."""
    total = 5_000_000 if LONG else 1_000_000
    load, start, number = Load(backend, random.Random(seed), often=10), time.monotonic(), 0
    while load.operations < total:
        load.round(number)
        number += 1
    pair = load.pair
    pair.agree()
    assert pair.refusals > 0, "the load never met the limit of memory"
    print(f"{backend}: {load.operations} operations, {time.monotonic() - start:.0f} s, {pair.refusals} refused")


# ---- Both backends -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_invariant_10_both_backends_give_the_same_answers(layout: str, seed: int) -> None:
    """One list of calls, two backends with memory enough: equal handles, lengths, errors, batches and contents."""
    pairs = []
    for backend in BACKENDS:
        walk = random.Random(seed)
        alloc = make_allocator(
            LAYOUTS[layout].spec(16), backend, interleave=LAYOUTS[layout].interleave, page_bytes=4096, memory="32MiB"
        )
        pair, answers = Lockstep(alloc), []
        for _ in range(80):
            step(pair, walk)
            if pair.alloc.pool.budget_bytes < 32 << 20:
                pair.set_memory((32 << 20) // 4096)
            answers.append(
                [(h, [(t.tokens, t.committed, t.first) for t in groups]) for h, groups in pair.model.sequences.items()]
            )
        pair.agree()
        pair.contents_agree()
        pairs.append((pair, answers))
    (one, first), (two, second) = pairs
    assert first == second
    names = (
        "seq_lens",
        "first_tokens",
        "positions",
        "batch_indices",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "kv_indptr",
        "kv_last_page_len",
    )
    batches = [pair.alloc.batch(one.handles) for pair in (one, two)]
    for g in range(len(one.model.groups)):
        for name in names:
            assert getattr(batches[0].group(g), name).equal(getattr(batches[1].group(g), name)), name
    for handle in one.handles:
        for g, held in enumerate(one.model.sequences[handle]):
            assert held.writers == two.model.sequences[handle][g].writers  # and contents_agree() has read both
    assert isinstance(one.alloc.stats(), kvmem.Stats)
