"""Which requests compute which tokens in a step, over a ``kvmem.SchedulerCache``; and the step itself.

A step is one forward pass over a flat batch: each running request has a token in it, and what is left of the batch goes
to chunks of prompts, the oldest first. Where memory is short, the youngest gives its own back and waits again; what is
cached of it when it returns, on the device or in a tier, is not computed twice. (Orca; Sarathi-Serve; vLLM.)
"""

import time
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import kvmem
from examples.engine.model import Runner
from examples.engine.sampling import Sampling, choose
from kvmem.allocator.tiers.loads import Load


@dataclass(eq=False)  # a request is its own id in the cache
class Request:
    """salt: only requests with the same one share. tokens: prompt, then answer; KV of the first ``computed`` is in the
    cache. cached_tokens: how many it found there at first."""

    prompt: list[int]
    sampling: Sampling
    salt: str | None = None
    tokens: list[int] = field(init=False)
    generator: torch.Generator = field(init=False)
    computed: int = 0
    cached_tokens: int = 0
    preempted_at: int | None = None
    load: Load | None = None
    arrived: float = field(default_factory=time.monotonic)
    answered: bool = False  # has the client got a token

    def __post_init__(self) -> None:
        # A generator of its own: what it draws does not depend on who else is in the batch.
        self.tokens, self.generator, seed = list(self.prompt), torch.Generator(), self.sampling.seed
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)


#: A request, its next token, and why it has ended: "stop", "length", "error" (without a token), or None.
Output = tuple[Request, int | None, str | None]


class Scheduler:
    """Not thread-safe. model: of transformers. allocator: on the CPU, of the model's ``cache_spec``.

    max_running, batch_tokens: the most requests, and the most tokens, of a step. keep: copy what a request leaves to
    the allocator's tiers when it ends, so that a restart finds it on disk.
    """

    def __init__(
        self, model: Any, allocator: kvmem.Allocator, *, max_running: int, batch_tokens: int, keep: bool = False
    ) -> None:
        if not 0 < max_running <= min(batch_tokens, allocator.max_sequences):
            raise kvmem.SpecError(f"max_running: got {max_running}; must be 1 to batch_tokens and max_sequences")
        self.allocator, self.cache = allocator, kvmem.SchedulerCache(allocator)
        self.max_running, self.batch_tokens, self.keep = max_running, batch_tokens, keep
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.counters: Counter[str] = Counter()
        self._run = Runner(model, allocator, max_rows=max_running, max_tokens=batch_tokens)
        self._eos = np.atleast_1d(model.generation_config.eos_token_id).tolist()  # [None]: there is none
        self.vocab_size = int(model.config.vocab_size)
        longest = range(1, 1 + min(allocator.max_tokens, model.config.max_position_embeddings))
        #: The most tokens, prompt and answer, of a request that is alone.
        self.max_tokens = bisect_left(longest, True, key=lambda n: not allocator.can_fit(n))

    def add(self, request: Request) -> None:
        """Queue a request. ``SpecError`` for one that memory could never hold."""
        tokens = len(request.prompt) + request.sampling.max_tokens
        if not request.prompt or tokens > self.max_tokens:
            raise kvmem.SpecError(f"got {tokens} tokens; a request has a prompt, and {self.max_tokens} tokens at most")
        self.waiting.append(request)
        self.counters.update(requests=1, prompt_tokens=len(request.prompt))

    def abort(self, request: Request) -> None:
        """End a request without an answer. No error if it has ended."""
        if request in self.running:
            self._end(request)
        elif request in self.waiting:
            self._leave_queue(request)
        else:
            return
        self.counters["aborted"] += 1

    def step(self) -> list[Output]:
        """Compute a batch; return the next token of each request all of whose tokens are computed now. Empty if nothing
        can run: nothing waits, or it waits for a tier.
        """
        outputs: list[Output] = []
        plan = self._plan(outputs)
        if not plan:
            return outputs
        handles = self.cache.handles(request for request, _ in plan)
        counts = np.array([count for _, count in plan], np.int32)
        tokens = [token for request, count in plan for token in request.tokens[request.computed :][:count]]
        for request, count in plan:
            request.computed += count
        complete = [row for row, (request, _) in enumerate(plan) if request.computed == len(request.tokens)]
        logits = self._run(handles, tokens, complete)
        self.cache.publish_step(handles, counts, tokens)  # from now on, other prompts find them
        self.counters.update(steps=1, computed_tokens=len(tokens))
        return outputs + [self._advance(plan[row][0], scores) for row, scores in zip(complete, logits, strict=True)]

    def _plan(self, outputs: list[Output]) -> list[tuple[Request, int]]:
        """Requests, and how many tokens each computes in this step; room for these is made."""
        plan, spare, before, loading = [], self.batch_tokens - len(self.running), self.counters["preemptions"], 0
        for request in list(self.running):
            if request in self.running and (count := self._grow(request, 1 + spare, outputs)):
                plan.append((request, count))
                spare -= count - 1
        for request in list(self.waiting) if self.counters["preemptions"] == before else []:
            if spare < 1 or len(self.running) + loading >= self.max_running:
                break
            # What the tiers below host memory have of it is brought once, while others run.
            request.load = request.load or self.cache.load(request.tokens, salt=request.salt)
            if request.load is not None and not request.load.done():
                loading += 1
                continue
            # If one finds no room nobody overtakes it, or long prompts would wait for ever.
            if not self._begin(request) or not (count := self._grow(request, spare, outputs)):
                break
            plan.append((request, count))
            spare -= count
        return plan

    def _grow(self, request: Request, most: int, outputs: list[Output]) -> int:
        """Make room for the request's next tokens. Return for how many; 0 if it had to give up its own memory."""
        count = min(len(request.tokens) - request.computed, most)
        while self.cache.allocate(request, count) is None:
            if len(self.running) == 1:  # it did fit when it came: somebody else has taken the memory
                self._end(request)
                outputs.append((request, None, "error"))
                return 0
            youngest = self.running.pop()
            self.cache.free(youngest)  # what it has published stays cached; under pressure, it goes down to the tiers
            youngest.preempted_at, youngest.computed = youngest.computed, 0
            self.waiting.appendleft(youngest)
            self.counters["preemptions"] += 1
            if youngest is request:
                return 0
        return count

    def _begin(self, request: Request) -> bool:
        """Let a waiting request run; False, and nothing has changed, without room for what is not cached of it."""
        if self.cache.allocate(request, 0, tokens=request.tokens, salt=request.salt) is None:
            return False
        found = self.cache.num_cached_tokens(request)
        # A block for each that runs: or the next step would have to preempt.
        needed = len(request.tokens) - found + len(self.running) * self.allocator.spec.block_size
        if self.running and self.allocator.free_tokens() < needed:
            self.cache.free(request)
            return False
        self._leave_queue(request)
        self.running.append(request)
        request.computed = found
        if request.preempted_at is None:
            request.cached_tokens = found
            self.counters["cached_tokens"] += found
        else:
            self.counters["recomputed_tokens"] += max(0, request.preempted_at - found)
        return True

    def _advance(self, request: Request, logits: torch.Tensor) -> Output:
        token = choose(logits, request.sampling, request.generator)
        request.tokens.append(token)
        self.counters["generated_tokens"] += 1
        full = len(request.tokens) - len(request.prompt) == request.sampling.max_tokens
        stops = token in self._eos and not request.sampling.ignore_eos
        reason = "stop" if stops else "length" if full else None
        if reason is not None:
            self._end(request)
        return request, token, reason

    def _end(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.free(request)
        if self.keep:
            self.allocator.store(request.tokens, salt=request.salt)

    def _leave_queue(self, request: Request) -> None:
        self.waiting.remove(request)
        if request.load is not None:
            request.load.cancel()
            request.load = None
