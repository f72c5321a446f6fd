"""Random calls on one allocator without memory behind it: what is decided, and nothing that is written or read."""

from __future__ import annotations

import random

import kvmem

VERBS = (
    "open",
    "open",
    "extend",
    "extend",
    "commit",
    "commit",
    "fork",
    "truncate",
    "free",
    "trim",
    "compact",
    "snapshot",
)


class Calls:
    """Random calls on one allocator. Two of them with equal generators make equal calls, as long as they get equal answers."""

    def __init__(self, alloc: kvmem.Allocator, rng: random.Random) -> None:
        self.alloc, self.rng = alloc, rng
        self.has_state = any(group.growth == "fixed" for group in alloc.spec.groups)
        self.ids: dict[int, list[int]] = {}  # of each live sequence, reserved tokens included
        self.sequences: dict[int, kvmem.Sequence] = {}
        self.verb = ""  # of the latest call

    def step(self) -> int:
        """One call; returns how many ops it made."""
        verb = self.verb = self.rng.choice(VERBS)
        try:
            if verb in ("open", "trim", "compact"):
                getattr(self, verb)()
            elif self.sequences:
                getattr(self, verb)(self.sequences[self.rng.choice(sorted(self.sequences))])
        except kvmem.OutOfMemory:
            if self.sequences:
                self.free(self.sequences[min(self.sequences)])
        return len(self.alloc.take_ops()) if self.alloc._recording else 0

    def open(self) -> None:
        prompt = [self.rng.randrange(3)] * self.rng.randrange(2, 60) + [self.rng.randrange(300, 303)]
        sequence = self.alloc.sequence(prompt)
        self.sequences[sequence.id], self.ids[sequence.id] = sequence, prompt[: sequence.num_cached_tokens]
        sequence.extend(len(prompt) - sequence.num_cached_tokens)
        self.ids[sequence.id] = prompt

    def extend(self, sequence: kvmem.Sequence) -> None:
        more = [self.rng.randrange(300, 310) for _ in range(self.rng.choice([1, 1, 3, 15]))]
        if len(self.ids[sequence.id]) < 80:
            sequence.extend(len(more))
            self.ids[sequence.id] = self.ids[sequence.id] + more

    def commit(self, sequence: kvmem.Sequence) -> None:
        first, end = sequence.num_committed_tokens, sequence.num_tokens
        sequence.commit(self.ids[sequence.id][first : self.rng.choice([end, end, self.rng.randint(first, end)])])

    def fork(self, sequence: kvmem.Sequence) -> None:
        if len(self.sequences) < self.alloc.max_sequences:
            child = sequence.fork()
            self.sequences[child.id], self.ids[child.id] = child, self.ids[sequence.id][: child.num_tokens]

    def truncate(self, sequence: kvmem.Sequence) -> None:
        least = self.alloc.core.first_token(sequence.id, 1) + 9 if self.has_state else 0
        if sequence.num_tokens > least:
            keep = self.rng.randint(max(least, sequence.num_tokens - self.rng.choice([1, 5, 30])), sequence.num_tokens)
            sequence.truncate(keep)
            self.ids[sequence.id] = self.ids[sequence.id][:keep]

    def free(self, sequence: kvmem.Sequence) -> None:
        del self.sequences[sequence.id], self.ids[sequence.id]
        sequence.free()

    def trim(self) -> None:
        self.alloc.trim(self.rng.randrange(8) * self.alloc.pool.page_bytes)

    def compact(self) -> None:
        self.alloc.compact()

    def snapshot(self, sequence: kvmem.Sequence) -> None:
        if self.has_state:
            try:
                sequence.snapshot()
            except kvmem.SpecError:  # not at the end of a block, or the state is ahead of its tokens
                return
