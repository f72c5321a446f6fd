"""A worker that computes hashes instead of attention, for vLLM's scheduler and for a stub of it.

It appends the block ids that it is told to tables of its own, writes for each token a hash of all tokens up to it where
its table says, and draws the next token from what it reads there: a block that is swapped, shared or reused wrongly
changes the tokens of a request."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

VOCABULARY = 500


class Worker:
    """Tables by request, and memory by (block, offset)."""

    def __init__(self, block_size: int, window: int | None = None) -> None:
        self.size, self.window = block_size, window
        self.tables: dict[str, list[int]] = {}
        self.memory: dict[tuple[int, int], int] = {}

    def start(self, name: str, blocks: list[int]) -> None:
        self.tables[name] = list(blocks)

    def append(self, name: str, blocks: list[int]) -> None:
        self.tables[name] += blocks

    def write(self, name: str, tokens: list[int], first: int, end: int) -> None:
        """Compute tokens [first, end). All requests of a step write before one reads, as in an attention layer."""
        table, value = self.tables[name], 0
        for at in range(end):
            value = hash((value, tokens[at]))
            if at >= first:
                assert table[at // self.size] != 0, "the null block is not written"
                self.memory[table[at // self.size], at % self.size] = value

    def read(self, name: str, end: int) -> int:
        """The token after the first ``end``."""
        table, seen = self.tables[name], 0
        for at in range(0 if self.window is None else max(0, end - self.window), end):
            seen = hash((seen, self.memory[table[at // self.size], at % self.size]))
        return seen % VOCABULARY


def expected(prompt: list[int], count: int, window: int | None = None) -> list[int]:
    """What a worker of its own generates."""
    tokens = list(prompt)
    worker = Worker(1, window)
    worker.start("alone", list(range(1, len(prompt) + count + 1)))
    for done in range(len(prompt), len(prompt) + count):
        worker.write("alone", tokens, 0, done)
        tokens.append(worker.read("alone", done))
    return tokens[len(prompt) :]


def run_step(worker: Worker, output: Any, requests: Any) -> dict[str, int]:
    """Execute a ``SchedulerOutput``. Return a token for each request whose tokens are all computed."""
    for new in output.scheduled_new_reqs:
        worker.start(new.req_id, new.block_ids[0])
    cached = output.scheduled_cached_reqs
    for i, name in enumerate(cached.req_ids):
        blocks = cached.new_block_ids[i]
        if name in cached.resumed_req_ids:
            worker.start(name, blocks[0])
        elif blocks is not None:
            worker.append(name, blocks[0])
    for name, count in output.num_scheduled_tokens.items():
        done = requests[name].num_computed_tokens  # counts this step's tokens already
        worker.write(name, list(requests[name].all_token_ids), done - count, done)
    ready = [n for n in output.num_scheduled_tokens if requests[n].num_computed_tokens >= requests[n].num_tokens]
    return {name: worker.read(name, requests[name].num_computed_tokens) for name in ready}


@dataclass
class StubRequest:
    """What the manager reads of a request of vLLM's."""

    request_id: str
    all_token_ids: list[int]
    max_tokens: int
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_preemptions: int = 0
    lora_request: Any = None
    prompt_embeds: Any = None
    resumable: bool = False
    mm_features: list[Any] = field(default_factory=list)
    prompt: int = 0

    def __post_init__(self) -> None:
        self.prompt = len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def output(self) -> list[int]:
        return self.all_token_ids[self.prompt :]


class StubScheduler:
    """The calls that vLLM's scheduler makes of its block manager, in its order, with chunks, preemption and aborts."""

    def __init__(self, manager: Any, worker: Worker, *, budget: int, must_fit: bool = True, lookahead: int = 0) -> None:
        self.manager, self.worker, self.budget, self.must_fit = manager, worker, budget, must_fit
        self.lookahead = lookahead
        self.waiting: deque[StubRequest] = deque()
        self.running: list[StubRequest] = []
        self.preemptions, self.hits = 0, dict[str, int]()

    def preempt(self, request: StubRequest) -> None:
        self.manager.free(request)
        request.num_computed_tokens, request.num_preemptions = 0, request.num_preemptions + 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def step(self) -> list[StubRequest]:
        """Schedule, compute, and return the requests that have ended."""
        self.manager.new_step_starts()
        self.told: dict[str, tuple[bool, list[int]]] = {}
        scheduled: list[tuple[StubRequest, int]] = []
        left = self._schedule_running(scheduled)
        if left is not None:
            self._admit(scheduled, left)
        assert self.manager.take_kv_cache_block_copies() == ([], [])
        return self._execute(scheduled)

    def _schedule_running(self, scheduled: list[tuple[StubRequest, int]]) -> int | None:
        """What is left of the budget; None if a request was preempted."""
        left, at, preempted = self.budget, 0, False
        while at < len(self.running) and left > 0:
            request = self.running[at]
            count = min(request.num_tokens - request.num_computed_tokens, left)
            blocks = self.manager.allocate_slots(request, count, num_lookahead_tokens=self.lookahead)
            if blocks is None:
                preempted = True
                self.preempt(self.running.pop())
                continue  # the same request again, or the end of the list
            self.told[request.request_id] = False, blocks.ids
            scheduled.append((request, count))
            left, at = left - count, at + 1
        return None if preempted else left

    def _admit(self, scheduled: list[tuple[StubRequest, int]], left: int) -> None:
        while self.waiting and left > 0:
            request = self.waiting[0]
            blocks, hits, _ = self.manager.get_computed_blocks(request)
            count = min(request.num_tokens - hits, left)
            new = self.manager.allocate_slots(
                request, count, hits, blocks, full_sequence_must_fit=self.must_fit, has_scheduled_reqs=bool(self.running),
                num_lookahead_tokens=self.lookahead,
            )  # fmt: skip
            if new is None:
                return
            self.hits[request.request_id] = hits
            whole = self.manager.get_blocks(request.request_id).ids
            assert whole[len(whole) - len(new.ids) :] == new.ids
            self.told[request.request_id] = True, whole
            request.num_computed_tokens = hits
            self.running.append(self.waiting.popleft())
            scheduled.append((request, count))
            left -= count

    def _execute(self, scheduled: list[tuple[StubRequest, int]]) -> list[StubRequest]:
        ended = []
        for request, count in scheduled:
            begins, blocks = self.told[request.request_id]
            (self.worker.start if begins else self.worker.append)(request.request_id, blocks)
            done = request.num_computed_tokens
            self.worker.write(request.request_id, request.all_token_ids, done, done + count)
        for request, count in scheduled:
            request.num_computed_tokens += count
            assert self.worker.tables[request.request_id] == self.told_table(request)
            if request.num_computed_tokens < request.num_tokens:
                continue
            request.all_token_ids.append(self.worker.read(request.request_id, request.num_computed_tokens))
            if len(request.output) == request.max_tokens:
                self.running.remove(request)
                self.manager.free(request)
                ended.append(request)
        return ended

    def told_table(self, request: StubRequest) -> list[int]:
        """The manager's table, with what a window has dropped as the worker still has it."""
        mine, (theirs,) = self.worker.tables[request.request_id], self.manager.get_block_ids(request.request_id)
        return [ours if block == 0 else block for ours, block in zip(mine, theirs, strict=True)]

    def abort(self, draw: random.Random) -> None:
        """End a request in the middle, waiting or running."""
        queue = draw.choice([self.waiting, self.running])
        if queue:
            request = draw.choice(list(queue))
            queue.remove(request)
            self.manager.free(request)


class StubBlocks:
    """``KVCacheBlocks`` of the stub: ids are their own blocks."""

    def __init__(self, blocks: tuple[Any, ...]) -> None:
        self.ids = list(blocks[0])


class StubStats(SimpleNamespace):
    """``PrefixCacheStats`` of the stub."""

    def __init__(self) -> None:
        super().__init__(requests=0, queries=0, hits=0, preempted=0, reset=False)

    def record(self, num_tokens: int, num_hits: int, preempted: bool) -> None:
        self.requests, self.queries, self.hits = self.requests + 1, self.queries + num_tokens, self.hits + num_hits
        self.preempted += preempted
