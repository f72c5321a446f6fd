"""The allocator against the reference model: state machines that shrink what they find, and a million random
operations.

``KVMEM_LONG=1`` runs longer versions; ``--seed`` repeats a random one."""

from __future__ import annotations

import random

import pytest
from conformance import step
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from lockstep import Lockstep
from machines import Load, Machine, runs
from support import BACKENDS, LAYOUTS, LONG, SIZES, make_allocator, plain

import kvmem


class Plain(Machine):
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


TestVirtual, TestPaged = runs(Plain, "virtual"), runs(Plain, "paged")


@pytest.mark.timeout(3600)
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


class Serving(Load):
    def one_call(self, handles: list[int]) -> None:
        pair, kind = self.pair, self.walk.random()
        if kind < 0.4 or not handles:
            if len(handles) < pair.alloc.max_sequences and (handle := pair.open()) >= 0:
                pair.extend({handle: self.walk.randint(1, 300)})
                self.operations += 2
        elif kind < 0.6:
            pair.free([self.walk.choice(handles)])
        elif kind < 0.75:
            pair.fork(self.walk.choice(handles))
        elif kind < 0.95:
            handle = self.walk.choice(handles)
            pair.truncate(handle, self.walk.randint(0, pair.model.sequences[handle][0].tokens))
        elif kind < 0.965:
            pair.trim()
        elif kind < 0.98:
            pair.compact(self.walk.choice([None, 3 * 4096]))
        else:
            pair.set_memory(self.walk.choice([300, 400, 600]))


@pytest.mark.timeout(3600)
def test_a_million_operations(backend: str, rng: random.Random) -> None:
    """For each backend. KVMEM_LONG=1 runs five million."""
    alloc = make_allocator(
        plain(16), backend, device="meta", memory=400 * 4096, page_bytes=4096, max_sequences=48, max_tokens=600,
        debug=False,
    )  # fmt: skip
    Serving(Lockstep(alloc, contents=False), rng).run(5_000_000 if LONG else 1_000_000)


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
