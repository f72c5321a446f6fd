"""vLLM as the connector's halves see it, in one process: a scheduler, a block pool, and a worker whose KV cache holds a
pattern that follows from the tokens. What attention would read is compared before each step, so a wrong block shows.

The order of calls, and what happens to a request whose load fails, are those of vLLM 0.32.0.
"""

from __future__ import annotations

import random
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvmem.integrations.vllm.blocks import Group
from kvmem.integrations.vllm.memory import Placement
from kvmem.integrations.vllm.planner import Planner
from kvmem.integrations.vllm.transfers import Transfers
from kvmem.tiers import Tier
from kvmem.tiers.host import HostTier
from kvmem.tiers.keys import BlockKeys

SIZE, TOKEN, LAYERS = 4, 8, 2  # tokens of a block, bytes of a token in a layer, layers of a group
PAGE = SIZE * TOKEN
RANK = b"r" * 32


class Request:
    """What the planner reads of vLLM's request, and what the world's scheduler keeps."""

    prompt_embeds = prompt_is_token_ids = lora_request = cache_salt = None
    resumable = False
    mm_features: tuple[Any, ...] = ()

    def __init__(self, name: str, prompt: list[int], outputs: int, salt: str | None = None) -> None:
        self.request_id, self.all_token_ids, self.num_prompt, self.outputs = name, list(prompt), len(prompt), outputs
        self.cache_salt = salt
        self.num_computed_tokens = 0
        self.blocks: list[list[int]] = []
        self.loading = self.running = False

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def is_done(self) -> bool:
        return self.num_tokens >= self.num_prompt + self.outputs


def hashes(tokens: list[int]) -> list[int]:
    found, value = [], 1
    for token in tokens:
        value = zlib.crc32(token.to_bytes(4, "little"), value)
        found.append(value)
    return found


def next_token(tokens: list[int]) -> int:
    return hashes(tokens)[-1] % 50


def pattern(value: int, layer: int) -> np.ndarray:
    return np.frombuffer((value * 2654435761 + layer).to_bytes(TOKEN, "little"), np.uint8)


class World:
    """windows: of each group, 0 for full attention. host, shared: tiers. later: for the planner and the transfers."""

    def __init__(
        self,
        rng: random.Random,
        *,
        windows: tuple[int, ...] = (0,),
        blocks: int = 40,
        in_step: bool = False,
        host: HostTier | None = None,
        shared: list[Tier] | None = None,
        budget: int = 10,
        staging_bytes: int = 1 << 20,
        **later: Any,
    ) -> None:
        self.rng, self.windows, self.in_step, self.budget = rng, windows, in_step, budget
        layers = [f"{g}.{i}" for g in range(len(windows)) for i in range(LAYERS)]
        places = {name: Placement(i * blocks * PAGE, PAGE, PAGE) for i, name in enumerate(layers)}
        self.groups = [
            Group(SIZE, w, {n: places[n] for n in layers if n.startswith(f"{g}.")}) for g, w in enumerate(windows)
        ]
        self.kv = torch.zeros(len(layers) * blocks * PAGE, dtype=torch.int8)
        views = {n: self.kv[p.offset : p.offset + blocks * PAGE].view(blocks, PAGE) for n, p in places.items()}
        self.pages = {name: view.view(torch.uint8).numpy() for name, view in views.items()}
        tiers = [*([host] if host else []), *(shared or [])]
        self.planner = Planner(
            self.groups, BlockKeys(b"world", SIZE), [RANK], shared=(lambda rank: shared) if shared else None,
            asynchronous=not in_step, **later,
        )  # fmt: skip
        self.transfers = Transfers(self.groups, RANK, tiers, staging_bytes=staging_bytes, **later)
        self.transfers.register(views, blocks)
        self.pool = [SimpleNamespace(ref_cnt=0, block_hash=None, id=i) for i in range(blocks)]
        self.pool[0].ref_cnt = 1  # stands for a block that is out of window
        self.requests: list[Request] = []
        self.loaded_tokens, self.failed_loads, self.reported = 0, 0, list[int]()
        self.arrived: set[str] = set()
        self.zombies: dict[str, Request] = {}

    # --- the scheduler ---

    def add(self, request: Request) -> Request:
        self.requests.append(request)
        self.planner.begin(request)
        return request

    def abort(self, request: Request) -> None:
        self.planner.end(request.request_id)
        self.requests.remove(request)
        if request.loading and request.request_id not in self.arrived:  # its blocks stay until the load has ended
            self.zombies[request.request_id] = request
        else:
            self.free(request)

    def preempt(self, request: Request) -> None:
        self.free(request)
        request.num_computed_tokens, request.running = 0, False

    def free(self, request: Request) -> None:
        for ids in request.blocks:
            for block in ids:
                if block:
                    self.pool[block].ref_cnt -= 1
        request.blocks = []

    def grow(self, request: Request, tokens: int, computed: int) -> bool:
        """Room for so many tokens. Blocks that no query sees any more are block 0, as a window's manager has them."""
        blocks = request.blocks or [[] for _ in self.groups]
        free = [b.id for b in self.pool if b.ref_cnt == 0]
        need = sum(-(-tokens // SIZE) - len(ids) for ids in blocks)
        if need > len(free):
            return False
        request.blocks = blocks
        for group, ids in zip(self.groups, blocks, strict=True):
            while len(ids) < -(-tokens // SIZE):
                block = 0 if len(ids) < group.first_needed(computed) else free.pop()
                ids.append(block)
                if block:
                    self.pool[block].ref_cnt = 1
            for i in range(min(group.first_needed(computed), len(ids))):
                if ids[i]:
                    self.pool[ids[i]].ref_cnt, ids[i] = 0, 0
        return True

    def schedule(self) -> tuple[dict[str, int], list[int], bool]:
        scheduled: dict[str, int] = {}
        before, left, loads_now = {b.id for b in self.pool if b.ref_cnt}, self.budget, False
        for request in [r for r in self.requests if r.running]:
            count = min(left, request.num_tokens - request.num_computed_tokens)
            if count and self.grow(request, request.num_computed_tokens + count, request.num_computed_tokens):
                scheduled[request.request_id], left = count, left - count
        for request in [r for r in self.requests if not r.running]:
            if request.loading and request.request_id not in self.arrived:
                continue
            extra, later = 0, False
            if request.loading:
                request.loading = False
                self.arrived.discard(request.request_id)
                if request.num_computed_tokens == 0:
                    self.free(request)  # the load failed from its first block on
            if request.num_computed_tokens == 0:
                found, later = self.planner.matched(request, 0)
                assert self.planner.matched(request, 0)[1] is later or found is None
                if found is None:
                    continue
                extra = found
            computed = request.num_computed_tokens + extra
            assert computed < request.num_tokens and computed % SIZE == 0
            count = 0 if later else min(left, request.num_tokens - computed)
            if not (count or later) or not self.grow(request, computed + count, computed):
                continue
            self.loaded_tokens += extra
            if extra:
                self.planner.allocated(request, request.blocks, extra)
            request.num_computed_tokens, request.loading, request.running = computed, later, not later
            if count:
                scheduled[request.request_id], left, loads_now = count, left - count, loads_now or extra > 0
        return scheduled, [b.id for b in self.pool if b.ref_cnt and b.id not in before], loads_now

    # --- a step ---

    def step(self) -> None:
        scheduled, used, loads_now = self.schedule()
        by_name = {r.request_id: r for r in self.requests}
        step = self.planner.step(scheduled, lambda name: by_name[name].blocks, used)
        for block in step.released:
            assert self.pool[block].ref_cnt == 0
        if loads_now:
            self.transfers.begin(step, in_step=self.in_step)
        wrong = self.forward([(by_name[name], count) for name, count in scheduled.items()], step)
        if not loads_now:
            self.transfers.begin(step, in_step=self.in_step)
        self.transfers.end(step, idle=not scheduled)
        done, requests = self.transfers.take_finished(), set(self.transfers.failed_requests)
        failed, report = self.transfers.take_failed_blocks(), self.transfers.take_report()
        self.reported += sorted(failed)
        self.failed_loads += len(requests)
        computed = {name: by_name[name].num_computed_tokens for name in scheduled}
        for name, count in scheduled.items():
            by_name[name].num_computed_tokens += count
        affected = self.recover(failed, requests, computed) if failed else set()
        assert wrong <= affected, f"{wrong - affected} read wrong bytes"
        self.planner.learn(report)
        for name in done:
            if name in self.zombies:
                self.free(self.zombies.pop(name))
            else:
                self.arrived.add(name)
        for name in set(scheduled) - affected:
            request = by_name[name]
            if request.num_computed_tokens == request.num_tokens:
                request.all_token_ids.append(next_token(request.all_token_ids))
        for request in [r for r in self.requests if r.is_done]:
            self.abort(request)

    def recover(self, failed: set[int], requests: set[str], computed: dict[str, int]) -> set[str]:
        """Requests with blocks that failed go back to the last token before them."""
        affected = set()
        for request in self.requests:
            if len(self.groups) > 1:
                if request.request_id in requests and request.loading:
                    request.num_computed_tokens = 0
                continue
            if not (request.loading or request.request_id in computed):
                continue
            blocks = request.blocks[0][: -(-computed.get(request.request_id, request.num_computed_tokens) // SIZE)]
            bad = [i for i, block in enumerate(blocks) if block in failed]
            if bad:
                request.num_computed_tokens = bad[0] * SIZE
                affected.add(request.request_id)
        return affected

    def forward(self, work: list[tuple[Request, int]], step: Any) -> set[str]:
        """Compute the tokens, and return the requests that read other bytes than their tokens have; they write such too."""
        wrong = set()
        for name in self.pages:
            self.transfers.wait_for_layer(name)
            for request, count in work:
                start, values = request.num_computed_tokens, hashes(request.all_token_ids)
                for t in range(start + count):
                    block = request.blocks[int(name[0])][t // SIZE]
                    place = self.pages[name][block, t % SIZE * TOKEN : (t % SIZE + 1) * TOKEN]
                    if t >= start:
                        place[:] = pattern(values[t], self.layer(name)) ^ (255 * (request.request_id in wrong))
                    elif block and (place != pattern(values[t], self.layer(name))).any():
                        wrong.add(request.request_id)
            self.transfers.save_layer(name, step)
        return wrong

    @staticmethod
    def layer(name: str) -> int:
        return int(name[0]) * 100 + int(name[2])

    def run(self, most: int = 3000) -> None:
        """Step until every request has finished, ``most`` steps with work at most."""
        while self.requests:
            self.step()
            most -= 1
            assert most, [(r.request_id, r.num_computed_tokens, r.num_tokens, r.loading) for r in self.requests]

    def settle(self) -> None:
        """Wait until everything that was saved is told."""
        while self.transfers._saving:
            self.transfers._saving[0][1].exception(10)
            self.planner.learn(self.transfers.take_report())

    def close(self) -> None:
        self.planner.close()
        self.transfers.close()
