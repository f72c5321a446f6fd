"""The connector's half beside vLLM's scheduler: what of a prompt can be loaded, and what each step saves and releases.

It knows what host memory holds from the workers' reports, and asks shared tiers (disk, remote) in the background. A
wrong answer costs a failed load, never a wrong token: the workers verify what they load.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from kvmem.errors import KVMemError
from kvmem.integrations.background import Background
from kvmem.integrations.vllm.blocks import Block, Chain, Group, Load, Name, Report, Step, chain_of, tier_key, unit_of
from kvmem.tiers.base import Tier
from kvmem.tiers.fault_log import FaultLog
from kvmem.tiers.keys import BlockKeys

__all__ = ["Planner"]

_MOST_NAMES: Final = 1 << 20  # remembered as saved or as failed; a block that is forgotten is saved again
_SWEEP: Final = 256  # blocks that a step looks at, to find those whose memory can be released
_STEPS: Final = 64  # between two questions to a manager that tells which blocks are free
_Run = Callable[[int, int, int], int]


class _Names(OrderedDict[Name, int]):
    """Names that forget the oldest, each with a number: 0, when it is added."""

    def add(self, name: Name) -> None:
        self[name] = 0
        if len(self) > _MOST_NAMES:
            self.popitem(last=False)

    def remove(self, names: Iterable[Name]) -> None:
        for name in names:
            self.pop(name, None)


class _Request:
    """done: by group, how many blocks were looked at for saving. look: what shared tiers answer from the token
    ``looked`` on, until ``late``.
    """

    def __init__(self, request: Any, chain: Chain, groups: int) -> None:
        self.request, self.chain, self.done = request, chain, [0] * groups
        self.asked = 0  # tokens that vLLM had by itself when it asked
        self.memo: tuple[tuple[int, int, int], int] | None = None  # what decided an answer, and the answer
        self.look: Future[int] | None = None
        self.looked = 0
        self.late = 0.0
        self.failed = False  # a load failed: what is left is computed


class Planner:
    """Not thread-safe but for what the background reads.

    keys: of blocks of ``unit`` tokens; see ``Chain``. ranks: the fingerprint of each. shared: opens the tiers that
    other processes fill too, by rank; called in the background, and again if it raises. asynchronous: loads come
    between steps. deadline_seconds: the longest that a request waits for the answer of shared tiers.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        keys: BlockKeys,
        ranks: Sequence[bytes],
        *,
        shared: Callable[[int], Sequence[Tier]] | None = None,
        asynchronous: bool = True,
        deadline_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups, self._keys, self._ranks, self._unit = tuple(groups), keys, tuple(ranks), unit_of(groups)
        self._open, self._asynchronous, self._deadline, self._clock = shared, asynchronous, deadline_seconds, clock
        self._shared: list[Sequence[Tier]] | None = None
        self._opening = threading.Lock()
        self._background = Background(2, "kvmem-lookup") if shared else None
        self._requests: dict[str, _Request] = {}
        self._held: Counter[Name] = Counter()  # on how many ranks host memory has a block
        self._saved = _Names()
        self._failed = _Names()  # and how many ranks have saved the block again
        self._learned = 0  # reports
        self._step = Step()
        self._log = FaultLog("kvmem's connector")
        self._blocks: Any = None  # of vLLM's pool
        self._take_freed: Callable[[], Iterable[int]] | None = None
        self._used: deque[int] = deque()  # blocks that may hold memory
        self._used_set: set[int] = set()
        self._to_sweep, self._ended, self._steps = 0, False, 0

    # --- requests ---

    def begin(self, request: Any) -> None:
        """Learn of a new request of vLLM."""
        chain = chain_of(request, self._keys)
        if chain is not None:
            self._requests[request.request_id] = _Request(request, chain, len(self._groups))

    def end(self, request_id: str) -> None:
        """The request has finished, or was aborted."""
        self._requests.pop(request_id, None)
        self._to_sweep, self._ended = len(self._used), True

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """Return how many tokens behind ``computed`` can be loaded, and whether between steps; None: ask again.

        Changes nothing that the scheduler could see.
        """
        state = self._requests.get(request.request_id)
        limit = (request.num_tokens - 1) // self._unit * self._unit  # one token is left to compute
        if state is None or state.failed or limit <= computed:
            return 0, False
        state.chain.extend(request.all_token_ids, limit)
        state.asked = computed
        if self._background is None or self._background.is_stuck:  # vLLM asks again at each step that finds no room
            question = computed, limit, self._learned
            if state.memo is None or state.memo[0] != question:
                state.memo = question, self._longest(computed, limit, self._run_of(state.chain, ()))
            end = state.memo[1]
        else:
            if state.look is None or computed < state.looked or self._clock() > state.late + self._deadline:
                state.late, state.looked = self._clock() + self._deadline, computed
                state.look = self._background.submit(lambda: self._ask(state.chain, computed, limit))
            if not state.look.done() and self._clock() < state.late:
                self._step.waits = True
                return None, False
            end = self._answer(state, computed, limit)
        found = max(0, end - computed)
        return found, found > 0 and self._asynchronous

    def _answer(self, state: _Request, computed: int, limit: int) -> int:
        assert state.look is not None and self._background is not None
        why: object = f"no answer within {self._deadline:g} s"
        if state.look.cancelled() or not state.look.done():
            self._background.leave(state.look)
        elif (why := state.look.exception()) is None:
            return min(limit, state.look.result())
        self._log.warn("lookup", f"what the tiers hold is not known: {why}")
        return self._longest(computed, limit, self._run_of(state.chain, ()))

    def _ask(self, chain: Chain, computed: int, limit: int) -> int:
        """Runs in the background."""
        with self._opening:
            if self._shared is None:
                assert self._open is not None
                self._shared = [self._open(rank) for rank in range(len(self._ranks))]
        return self._longest(computed, limit, self._run_of(chain, self._shared))

    def _run_of(self, chain: Chain, shared: Sequence[Sequence[Tier]]) -> _Run:
        """Return a function that finds the end of the run of a group's blocks that begins at a block."""

        def run(g: int, at: int, stop: int) -> int:
            size = self._groups[g].block_size
            names = [chain.name(g, size, block) for block in range(at, stop)]
            names = names[: next((i for i, name in enumerate(names) if name in self._failed), len(names))]
            here, step = 0, 1
            while step and here < len(names):
                step = next(
                    (i for i, n in enumerate(names[here:]) if self._held[n] < len(self._ranks)), len(names) - here
                )
                if not step and shared:
                    step = min(self._most(r, tiers, names[here:]) for r, tiers in enumerate(shared))
                here += step
            return at + here

        return run

    def _most(self, rank: int, tiers: Sequence[Tier], names: Sequence[Name]) -> int:
        keys = [tier_key(self._ranks[rank], name) for name in names]
        most = 0
        for tier in tiers:
            try:
                most = max(most, min(len(keys), tier.contains(keys)))
            except Exception as error:  # noqa: BLE001  whatever a tier raises, the others may have the blocks
                self._log.warn("lookup", f"{tier.name}: {type(error).__name__}: {error}")
        return most

    def _longest(self, computed: int, limit: int, run: _Run) -> int:
        """Return the longest prefix, in tokens, of which each group has what attention behind it reads."""
        end = limit
        while end > computed:
            before = end
            for g, group in enumerate(self._groups):
                first = max(computed // group.block_size, group.first_needed(end))
                end = min(end, run(g, first, end // group.block_size) * group.block_size)
                end = end // self._unit * self._unit
            if end == before:
                break
        return end

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], tokens: int) -> None:
        """vLLM has made room for the request, and takes so many tokens of ``matched``: load them."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        state.look = None  # if it is preempted, tiers have more by then
        if tokens == 0:
            return
        end, blocks = state.asked + tokens, []
        for g, group in enumerate(self._groups):
            size = group.block_size
            for block in range(max(state.asked // size, group.first_needed(end)), end // size):
                name = state.chain.name(g, size, block)
                blocks.append((block * size, Block(name, block_ids[g][block])))
                self._saved.add(name)
        self._use(block.block_id for _, block in blocks)
        ordered = [block for _, block in sorted(blocks, key=lambda one: one[0]) if block.block_id]
        self._step.loads.append(Load(request.request_id, ordered))

    # --- steps ---

    def step(
        self,
        scheduled: Mapping[str, int],
        block_ids: Callable[[str], Sequence[Sequence[int]] | None],
        used: Iterable[int],
    ) -> Step:
        """Return what the workers do in this step, and begin the next.

        scheduled: new tokens by request. block_ids: returns a request's blocks by group. used: blocks that were
        given to requests since the last step.
        """
        self._use(used)
        for request_id, count in scheduled.items():
            state = self._requests.get(request_id)
            if state is not None:
                self._save(state, count, block_ids)
        if scheduled:
            self._to_sweep = len(self._used)
        self._release()
        step, self._step = self._step, Step()
        return step

    def _save(self, state: _Request, count: int, block_ids: Callable[[str], Sequence[Sequence[int]] | None]) -> None:
        # Draft tokens may be rejected, and tokens that are still in flight are not known: their block comes later.
        request = state.request
        tokens = min(request.num_computed_tokens + count, request.num_tokens)
        full = [tokens // group.block_size for group in self._groups]
        if all(done >= new for done, new in zip(state.done, full, strict=True)):
            return
        ids = block_ids(request.request_id)
        if ids is None:
            return
        state.chain.extend(request.all_token_ids, tokens)
        for g, group in enumerate(self._groups):
            for block in range(state.done[g], full[g]):
                name = state.chain.name(g, group.block_size, block)
                if ids[g][block] and name not in self._saved:  # block 0 stands for one out of window
                    self._saved.add(name)
                    self._step.saves.append(Block(name, ids[g][block]))
            state.done[g] = max(state.done[g], full[g])

    def learn(self, report: Report) -> None:
        """Take in what the workers of all ranks report."""
        self._learned += 1
        self._held.update(report.held)
        for name in [n for n in report.held if self._held[n] > len(self._ranks)]:
            self._held[name] = len(self._ranks)  # it was put again
        again = [name for name in report.saved if name in self._failed]
        for name in again:  # ranks do not end their saves at the same time
            self._failed[name] += report.saved[name]
        self._failed.remove(name for name in again if self._failed[name] >= len(self._ranks))
        for name in report.gone | report.failed:
            self._held.pop(name, None)
        for name in report.failed:
            self._failed.add(name)
        self._saved.remove(report.gone | report.failed | report.dropped)
        for state in [self._requests[name] for name in report.requests if name in self._requests]:
            state.failed, state.done = True, [0] * len(self._groups)  # what it computes now is saved

    # --- memory ---

    def bind(self, manager: Any) -> None:
        """Say who knows which blocks are free: vLLM's KV cache manager, or one with ``take_freed_blocks()``, which
        returns the ids that have become free, with no cached content, since its last call.
        """
        self._take_freed = getattr(manager, "take_freed_blocks", None)
        self._blocks = None if self._take_freed is not None else manager.block_pool.blocks
        if self._take_freed is not None:
            self._take_freed()  # it counts from here on

    @property
    def has_memory_to_release(self) -> bool:
        return self._ended if self._take_freed is not None else self._to_sweep > 0

    def _use(self, ids: Iterable[int]) -> None:
        if self._blocks is not None:
            new = set(ids) - self._used_set
            self._used_set |= new
            self._used.extend(new)

    def _release(self) -> None:
        if self._take_freed is not None:
            self._steps += 1
            if self._ended or self._steps % _STEPS == 0:  # it costs a look at the whole pool
                self._ended, self._step.released = False, list(self._take_freed())
            return
        for _ in range(min(_SWEEP, self._to_sweep, len(self._used))):
            block_id = self._used.popleft()
            if self._is_free(block_id):
                self._used_set.discard(block_id)
                # A system page between two blocks goes with the one that is freed last.
                self._step.released += [i for i in (block_id - 1, block_id, block_id + 1) if self._is_free(i)]
            else:
                self._used.append(block_id)
            self._to_sweep -= 1

    def _is_free(self, block_id: int) -> bool:
        if not 0 < block_id < len(self._blocks):
            return False
        block = self._blocks[block_id]
        return block.ref_cnt == 0 and block.block_hash is None

    def reset(self) -> None:
        """Find nothing any more of what was saved so far, in no tier: the weights may have changed.

        Names begin anew from random bytes, so what is saved from here on is found by this engine alone. A request that
        has blocks from before is left alone: they must not be saved under new names.
        """
        self._keys = BlockKeys(os.urandom(32), self._keys.block_size)
        self._held.clear()
        self._to_sweep, self._ended = len(self._used), True  # vLLM's own cache may have been emptied too
        requests, self._requests = [state.request for state in self._requests.values()], {}
        for request in requests:
            if request.num_computed_tokens == 0:
                self.begin(request)

    def close(self) -> None:
        """Close the shared tiers, once nobody asks them any more."""
        if self._background is not None:
            self._background.close(1.0)
        for tiers in self._shared or ():
            for tier in tiers:
                try:
                    tier.close()
                except KVMemError as error:
                    self._log.warn("close", str(error))
