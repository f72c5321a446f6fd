"""What the random programs of conformance/test_model.py and index/test_prefix_model.py share: the rules of a state machine that
shrinks what it finds, and a serving load on a device without memory. Sequences are chosen by number, modulo how many there are.
"""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from lockstep import Lockstep
from support import LONG, i32

NUMBER = st.integers(0, 3)
RUNS = settings(
    max_examples=400 if LONG else 25, stateful_step_count=60 if LONG else 30, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


class Machine(RuleBasedStateMachine):
    """Small memory, so that every call meets its limits. Who inherits makes ``pair`` in an ``@initialize``."""

    backend = "virtual"
    pair: Lockstep

    def pick(self, number: int) -> int | None:
        return self.pair.handles[number % len(self.pair.handles)] if self.pair.handles else None

    @rule(number=NUMBER, part=st.floats(0, 1.01))
    def truncate(self, number: int, part: float) -> None:
        if (handle := self.pick(number)) is not None:
            self.pair.truncate(handle, int(self.pair.model.sequences[handle][self.pair.model.main].tokens * part))

    @rule(number=NUMBER)
    def fork(self, number: int) -> None:
        if (handle := self.pick(number)) is not None:
            self.pair.fork(handle)

    @rule(number=NUMBER)
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


def runs(machine: type[Machine], kind: str) -> type:
    """The test of a machine on a backend."""
    case = pytest.mark.timeout(3600)(type(machine.__name__, (machine,), {"backend": kind}).TestCase)
    case.settings = RUNS
    return case  # type: ignore[no-any-return]


class Load:
    """Many sequences decode in batches, some start, fork, shrink and end in between. A batched call counts as one operation
    for each sequence in it. Lengths are compared with the model after every round, memory and invariants every ``often``.
    """

    def __init__(self, pair: Lockstep, walk: random.Random, often: int = 10) -> None:
        self.pair, self.walk, self.often, self.operations = pair, walk, often, 0
        pair.prepare_padding()
        self.out = pair.alloc.make_batch(max_new_tokens=48 * 600, max_tokens=600)

    def one_call(self, handles: list[int]) -> None:
        """Of one sequence."""
        raise NotImplementedError

    def commit(self, new: dict[int, int]) -> None:
        self.pair.commit(new)

    def run(self, total: int) -> None:
        start, number = time.monotonic(), 0
        while self.operations < total:
            self.decode()
            for _ in range(4):
                self.one_call(self.pair.handles)
                self.operations += 1
            self.pair.lengths_agree()
            if number % self.often == 0:
                self.pair.memory_agrees()
                assert self.pair.alloc.check() == []
            number += 1
        self.pair.agree()
        assert self.pair.refusals > 0, "the load never met the limit of memory"
        print(f"{self.operations} operations, {time.monotonic() - start:.0f} s, {self.pair.refusals} refused")

    def decode(self) -> None:
        """Some steps of all sequences: extend, fill, commit; out of memory, a third of them end."""
        pair, model = self.pair, self.pair.model
        for handle in [h for h in pair.handles if model.room_tokens(h) < 16]:
            pair.free([handle])
            self.operations += 1
        ids = i32(*pair.handles)
        for _ in range(5):
            counts = {h: self.walk.choice([1, 1, 1, 3]) for h in pair.handles}
            if not counts:
                return
            if not pair.extend(counts):
                for handle in self.walk.sample(pair.handles, len(pair.handles) // 3):
                    pair.free([handle])
                    self.operations += 1
                return
            pair.alloc.fill(ids, self.out)
            assert np.array_equal(self.out.seq_lens_cpu.numpy(), [model.sequences[h][0].tokens for h in counts])
            fresh = {h: (held := model.sequences[h][0]).tokens - held.committed for h in counts}
            assert self.out.num_new_tokens == sum(fresh.values())
            self.commit(fresh)
            self.operations += 3 * len(counts)
