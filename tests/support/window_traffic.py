"""Traffic under sliding windows, and how much of its prompts an allocator finds again.

A list of `Step` is all there is of it, so that another manager can be driven by the same: ``open`` a request with a
prompt, all of which is computed; ``grow`` it by tokens that it answers; ``close`` it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import kvmem
from kvmem.spec import Component, Group

BLOCK = 16
PAGE_BYTES = 4096  # one block of one layer


@dataclass(frozen=True)
class Model:
    """Layers with full attention, layers with a window of ``window`` tokens, and memory for ``pages`` blocks of one
    layer. ``longest``: tokens of the longest request."""

    full: int
    sliding: int
    window: int
    pages: int
    longest: int

    def spec(self) -> kvmem.CacheSpec:
        pair = tuple(Component(name, width=32, dtype="float32") for name in "kv")
        groups = []
        if self.full:
            groups.append(Group("full", pair, tuple(range(self.full))))
        if self.sliding:
            layers = tuple(range(self.full, self.full + self.sliding))
            groups.append(Group("window", pair, layers, window_tokens=self.window))
        return kvmem.CacheSpec(tuple(groups), block_size=BLOCK)


class Step(NamedTuple):
    """``verb`` is ``open``, ``grow`` or ``close``."""

    verb: str
    request: int
    tokens: list[int]


def found(model: Model, backend: str, policy: str, steps: Iterable[Step]) -> list[int]:
    """How many tokens of each prompt are found, whole blocks only, in the order in which requests are opened."""
    alloc = kvmem.Allocator(
        model.spec(),
        backend=backend,
        device="meta",
        memory=model.pages * PAGE_BYTES,
        page_bytes=PAGE_BYTES,
        max_sequences=16,
        max_tokens=model.longest,
        policy=policy,
        partial_reuse=False,
    )
    open_now: dict[int, kvmem.Sequence] = {}
    hits = []
    for step in steps:
        if step.verb == "open":
            seq = open_now[step.request] = alloc.sequence(step.tokens)
            hits.append(seq.num_cached_tokens)
            _compute(seq, step.tokens[seq.num_cached_tokens :])
        elif step.verb == "grow":
            for token in step.tokens:
                _compute(open_now[step.request], [token])
        else:
            open_now.pop(step.request).free()
    assert alloc.check() == []
    return hits


def _compute(seq: kvmem.Sequence, tokens: list[int]) -> None:
    seq.extend(len(tokens))
    seq.commit(tokens)


def shared_prompts(requests: int, prompts: int = 3, shared: int = 1024, own: int = 320) -> list[Step]:
    """System prompts in turn, each time with a tail that nobody else has."""
    steps = []
    for i in range(requests):
        tail = 1_000_000 + i * own
        tokens = [i % prompts * 100_000 + j for j in range(shared)] + [tail + j for j in range(own)]
        steps += [Step("open", i, tokens), Step("close", i, [])]
    return steps


def growing_chats(sessions: int, rounds: int, first: int, answer: int, question: int) -> list[Step]:
    """Every round each session sends all that was said so far, and a question more."""
    rng = np.random.default_rng(0)  # fixed: what two managers find of it is held against bounds
    chats = [_draw(rng, first) for _ in range(sessions)]
    steps = []
    for i in range(sessions * rounds):
        chat = chats[i % sessions]
        said = _draw(rng, answer)
        steps += [Step("open", i, list(chat)), Step("grow", i, said), Step("close", i, [])]
        chat += said + _draw(rng, question)
    return steps


def mixed(seed: int, requests: int, longest: int, at_once: int = 4) -> list[Step]:
    """Some requests at once: with one of a few system prompts, going on with a conversation, or forking one at any
    earlier point of it; some popular, most not."""
    rng = np.random.default_rng(seed)
    systems = [_draw(rng, int(rng.integers(32, 400))) for _ in range(6)]
    ended: list[list[int]] = []
    running: dict[int, list[int]] = {}
    steps = []
    for i in range(requests):
        before = _before(rng, systems, ended)
        tokens = (before + _draw(rng, int(rng.integers(1, 200))))[: longest - 80]
        steps.append(Step("open", i, tokens))
        running[i] = list(tokens)
        for request in running:
            answer = _draw(rng, int(rng.integers(0, 20)))
            if len(running[request]) + len(answer) <= longest:
                steps.append(Step("grow", request, answer))
                running[request] += answer
        while len(running) >= at_once or (running and rng.random() < 0.3):
            request = int(rng.choice(list(running)))
            steps.append(Step("close", request, []))
            ended = [*ended[-40:], running.pop(request)]
    return steps


def _before(rng: np.random.Generator, systems: list[list[int]], ended: list[list[int]]) -> list[int]:
    chance = rng.random()
    if not ended or chance < 0.35:
        return list(systems[min(int(rng.exponential(1.5)), len(systems) - 1)])
    conversation = ended[-1 - min(int(rng.exponential(8)), len(ended) - 1)]
    return list(conversation if chance < 0.75 else conversation[: int(rng.integers(1, len(conversation)))])


def _draw(rng: np.random.Generator, count: int) -> list[int]:
    drawn: list[int] = rng.integers(0, 1_000_000_000, count).tolist()
    return drawn


def hit_rate(steps: Iterable[Step], hits: list[int]) -> float:
    """The share of all tokens of all prompts that was found."""
    return sum(hits) / sum(len(step.tokens) for step in steps if step.verb == "open")
