"""The connector's half beside a worker: blocks between vLLM's KV cache and kvmem's tiers.

Two rules keep wrong bytes out. Threads touch staging memory only: what they have read and verified is copied to the KV
cache by the worker itself, so a tier that answers late writes nowhere. And a load that fails in part fails from there
on, is reported once, and nothing of that step is saved.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from typing import Final, NamedTuple

import torch

from kvmem.arguments import format_bytes
from kvmem.errors import KVMemError, SpecError
from kvmem.integrations.background import Background
from kvmem.integrations.vllm.blocks import Block, Group, Load, Name, Report, Step, storage_of, tier_key
from kvmem.integrations.vllm.memory import LazyMemory
from kvmem.tiers.base import Result, Status, Tier
from kvmem.tiers.fault_log import FaultLog
from kvmem.tiers.host import HostTier

__all__ = ["Transfers"]

_PART_BYTES: Final = 16 << 20  # of a load: what one task reads
_IDLE_SECONDS: Final = 0.005  # that a step without work waits, so that the engine leaves the cores to what it waits for


class _Part(NamedTuple):
    """Some blocks of a load, under way."""

    blocks: list[Block]
    staging: list[torch.Tensor]
    future: Future[list[Result]]


class _Loading:
    """A load: what has not begun, what is under way, and which blocks are not in the KV cache yet. It fails if nothing
    comes ``until`` then.
    """

    def __init__(self, load: Load, until: float) -> None:
        self.request_id, self.waiting, self.until = load.request_id, deque(load.blocks), until
        self.missing = dict.fromkeys(load.blocks)
        self.parts: list[_Part] = []


class Transfers:
    """Called by one thread, the worker's.

    fingerprint: the rank's. tiers: the fastest first; a block is read from the first that has it, and written to all.
    staging: bytes of memory on the way to tiers at most, and as many on the way from them; a save that finds none is
    left out, a load waits. deadline_seconds: the longest that a load waits for its next part. memory: what is under the
    KV cache, if it is kvmem's.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        fingerprint: bytes,
        tiers: Sequence[Tier],
        *,
        staging_bytes: int = 256 << 20,
        deadline_seconds: float = 10.0,
        memory: LazyMemory | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._groups, self._fingerprint, self._tiers = tuple(groups), fingerprint, tuple(tiers)
        self._most, self._deadline, self._memory, self._clock = staging_bytes, deadline_seconds, memory, clock
        self._part = min(_PART_BYTES, staging_bytes)
        self._host = next((tier for tier in tiers if isinstance(tier, HostTier)), None)
        self._held: dict[bytes, Name] = {}  # what host memory has, by key; only the thread that saves uses it
        self._group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
        self._layers: dict[str, torch.Tensor] = {}  # uint8 [blocks, page_bytes] of each layer
        self._loaders = Background(2, "kvmem-load")
        self._savers = Background(1, "kvmem-save")  # apart, because nobody waits for it
        self._loads: list[_Loading] = []
        self._now: list[_Loading] = []  # loads that this step waits for
        self._saves: list[tuple[Block, torch.Tensor]] = []
        self._copied: set[str] = set()  # layers of this step that are in the staging memory of its saves
        self._saving: list[tuple[int, Future[Report]]] = []
        self._staged = self._fetching = 0  # bytes on the way to tiers, and from them
        self._spoilt = False  # a load that this step waited for has failed
        self._report, self._failed_blocks, self._done = Report(), set[int](), set[str]()
        self._log = FaultLog("kvmem's connector")

    def register(self, kv_caches: dict[str, torch.Tensor], num_blocks: int) -> None:
        """Learn where the KV cache is. ``SpecError`` if it is not laid out as its config says."""
        storage = storage_of(kv_caches)
        for group in self._groups:
            for layer, place in group.layers.items():
                tensor = kv_caches.get(layer)
                if tensor is None or tensor.storage_offset() * tensor.element_size() != place.offset:
                    raise SpecError(f"kvmem's connector: layer {layer} does not lie where vLLM's config has it")
                last = place.offset + (num_blocks - 1) * place.stride + place.page_bytes
                if last > storage.numel():
                    raise SpecError(f"kvmem's connector: layer {layer} ends at {last} of {storage.numel()} bytes")
                self._layers[layer] = storage.as_strided(
                    (num_blocks, place.page_bytes), (place.stride, 1), place.offset
                )
        if self._memory is not None:
            self._memory.place((place for g in self._groups for place in g.layers.values()), num_blocks)

    # --- a step ---

    def begin(self, step: Step, *, in_step: bool) -> None:
        """Start what a step asks for. in_step: its loads are for this step, and ``wait_for_layer`` waits for them."""
        if self._memory is not None:
            self._memory.release_blocks(step.released)
        started = [_Loading(load, self._clock() + self._deadline) for load in step.loads]
        self._loads += started
        self._now = started if in_step else []
        self._advance()

    def wait_for_layer(self, layer: str) -> None:
        """Return when this step's loads are in the KV cache, or have failed.

        A tier answers for whole blocks, so the first layer waits for all of them.
        """
        while any(loading in self._loads for loading in self._now):
            self._wait(self._now, 0.05)
            self._advance()
        self._now = []

    def save_layer(self, layer: str, step: Step) -> None:
        """Copy a layer of the blocks that this step saves, after its attention wrote them."""
        if layer in self._group_of and layer not in self._copied:
            if not self._copied:
                self._saves = self._staging_of(step.saves)
            self._copied.add(layer)
            g = self._group_of[layer]
            pages = list(self._groups[g].layers)
            at = sum(self._groups[g].layers[other].page_bytes for other in pages[: pages.index(layer)])
            for block, staging in self._saves:
                if block.name[0] == g:
                    page = self._layers[layer][block.block_id]
                    staging[at : at + page.numel()].copy_(page)

    def end(self, step: Step, idle: bool) -> None:
        """Finish a step: what it saves is copied, and goes on to the tiers in the background.

        idle: it computed nothing; then this waits a moment for loads.
        """
        self.wait_for_layer("")
        if step.saves:
            for layer in self._group_of:
                self.save_layer(layer, step)
        if self._spoilt:  # something may have been computed from what was not loaded
            self._staged -= _bytes_of(staging for _, staging in self._saves)
            self._report.dropped.update(block.name for block, _ in self._saves)
        elif self._saves:
            self._start_saving([(block.name, staging) for block, staging in self._saves])
        self._saves, self._copied, self._spoilt = [], set(), False
        if idle and self._loads:
            self._wait(self._loads, _IDLE_SECONDS)
        elif idle and step.waits:
            time.sleep(_IDLE_SECONDS / 5)
        self._advance()

    def _staging_of(self, blocks: Iterable[Block]) -> list[tuple[Block, torch.Tensor]]:
        found = []
        for block in blocks:
            size = self._groups[block.name[0]].payload_bytes
            if self._staged + size > self._most:
                self._report.dropped.add(block.name)
                self._log.warn("staging", f"blocks are not saved: tiers are behind by {format_bytes(self._staged)}")
                continue
            self._staged += size
            found.append((block, torch.empty(size, dtype=torch.uint8)))
        return found

    def _start_saving(self, saves: list[tuple[Name, torch.Tensor]]) -> None:
        future = self._savers.submit(partial(self._put, saves))
        self._saving.append((_bytes_of(staging for _, staging in saves), future))

    # --- what has ended ---

    def take_finished(self) -> set[str]:
        """Return the requests whose loads have ended, well or not, since the last call."""
        done, self._done = self._done, set()
        return done

    @property
    def failed_requests(self) -> set[str]:
        """Requests whose loads failed since the last report."""
        return self._report.requests

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks that were to be loaded and were not, once."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> Report:
        """Return what the scheduler's half has to learn, once."""
        while self._saving and self._saving[0][1].done():  # one thread ends them in order
            size, future = self._saving.pop(0)
            self._staged -= size
            self._report.add(future.result())  # it catches what tiers raise
        report, self._report = self._report, Report()
        return report

    def _advance(self) -> None:
        """Start and end parts of loads."""
        for loading in list(self._loads):
            for part in [part for part in loading.parts if part.future.done()]:
                loading.parts.remove(part)
                self._fetching -= _bytes_of(part.staging)
                loading.until = self._clock() + self._deadline
                if reason := self._take_in(loading, part):
                    self._fail(loading, reason)
                    break
            if loading.missing and self._clock() >= loading.until:
                self._report.failed.update(block.name for part in loading.parts for block in part.blocks)
                self._fail(loading, f"no answer within {self._deadline:g} s")
            elif loading.waiting and self._loaders.is_stuck:
                self._fail(loading, "the tiers still owe earlier answers")
            while loading.waiting and (not self._fetching or self._fetching + self._part <= self._most):
                loading.parts.append(self._begin_part(loading))
            if not loading.parts and not loading.waiting:
                self._loads.remove(loading)
                if loading not in self._now:  # vLLM waits for the others by itself
                    self._done.add(loading.request_id)

    def _begin_part(self, loading: _Loading) -> _Part:
        blocks: list[Block] = []
        staging: list[torch.Tensor] = []
        left = self._part
        while loading.waiting:
            size = self._groups[loading.waiting[0].name[0]].payload_bytes
            if blocks and size > left:
                break
            blocks.append(loading.waiting.popleft())
            staging.append(torch.empty(size, dtype=torch.uint8))
            left -= size
        self._fetching += _bytes_of(staging)
        return _Part(blocks, staging, self._loaders.submit(partial(self._get, [b.name for b in blocks], staging)))

    def _take_in(self, loading: _Loading, part: _Part) -> str:
        """Copy what a part has read to the KV cache. Return why some of it was not read, or nothing."""
        reason = ""
        found: list[tuple[Name, torch.Tensor]] = []
        results = part.future.result()  # it catches what tiers raise
        for block, staging, result in zip(part.blocks, part.staging, results, strict=True):
            if not result.ok:
                self._report.failed.add(block.name)
                reason = result.reason or "a tier gives no reason"
                continue
            at = 0
            for layer, place in self._groups[block.name[0]].layers.items():
                self._layers[layer][block.block_id].copy_(staging[at : at + place.page_bytes])
                at += place.page_bytes
            del loading.missing[block]
            if self._host is not None and not self._host.contains([tier_key(self._fingerprint, block.name)]):
                found.append((block.name, staging))  # from a lower tier: host memory takes it too
        if found and self._staged + _bytes_of(staging for _, staging in found) <= self._most:
            self._staged += _bytes_of(staging for _, staging in found)
            self._start_saving(found)
        return reason

    def _fail(self, loading: _Loading, reason: str) -> None:
        """Give a load up: blocks behind a gap are of no use."""
        self._log.warn("load", f"blocks were not loaded, and are computed: {reason}")
        for part in loading.parts:
            self._loaders.leave(part.future)
            self._fetching -= _bytes_of(part.staging)
        self._spoilt |= loading in self._now
        loading.parts, loading.waiting = [], deque()
        self._failed_blocks.update(block.block_id for block in loading.missing)
        self._report.requests.add(loading.request_id)

    def _wait(self, loads: Iterable[_Loading], seconds: float) -> None:
        wait([part.future for loading in loads for part in loading.parts], seconds, FIRST_COMPLETED)

    # --- in the background ---

    def _get(self, names: Sequence[Name], staging: Sequence[torch.Tensor]) -> list[Result]:
        keys = [tier_key(self._fingerprint, name) for name in names]
        views = [one.numpy().data for one in staging]
        results = [Result(Status.MISS, 0, "no tier has it")] * len(keys)
        for tier in self._tiers:
            left = [i for i, result in enumerate(results) if not result.ok]
            if not left:
                break
            try:
                answers = tier.get([keys[i] for i in left], [views[i] for i in left])
                found = [_whole(answer, len(views[i])) for i, answer in zip(left, answers, strict=True)]
            except Exception as error:  # noqa: BLE001  whatever a tier raises, the blocks are computed
                found = [Result(Status.FAILED, 0, f"{type(error).__name__}: {error}")] * len(left)
            for i, result in zip(left, found, strict=True):
                if result.status is not Status.MISS:
                    results[i] = result
        return results

    def _put(self, saves: Sequence[tuple[Name, torch.Tensor]]) -> Report:
        """Return what has become of the blocks, and what has left host memory for them."""
        keys = [tier_key(self._fingerprint, name) for name, _ in saves]
        views = [staging.numpy().data for _, staging in saves]
        saved: set[int] = set()
        for tier in self._tiers:
            try:
                # Another process may have put them.
                have = 0 if tier is self._host else max(0, min(len(keys), tier.contains(keys)))
                results = tier.put(keys[have:], views[have:])
                saved |= {*range(have), *(have + i for i, result in enumerate(results) if result.ok)}
            except Exception as error:  # noqa: BLE001  whatever a tier raises, the blocks are not saved
                self._log.warn("save", f"{tier.name}: {type(error).__name__}: {error}")
        report = Report()
        report.saved.update(saves[i][0] for i in saved)
        report.dropped.update(name for i, (name, _) in enumerate(saves) if i not in saved)
        if self._host is not None:
            held = {key: name for key, (name, _) in zip(keys, saves, strict=True) if self._host.contains([key])}
            self._held |= held
            report.held.update(held.values())
            gone = {key for key in self._host.take_evicted() if key in self._held and not self._host.contains([key])}
            report.gone.update(self._held.pop(key) for key in gone)
        return report

    def close(self) -> None:
        """Finish what is under way, as long as the deadline allows, and close the tiers."""
        for background in (self._loaders, self._savers):
            background.close(self._deadline)
        for tier in self._tiers:
            try:
                tier.close()
            except KVMemError as error:
                self._log.warn("close", str(error))


def _bytes_of(staging: Iterable[torch.Tensor]) -> int:
    return sum(one.numel() for one in staging)


def _whole(answer: Result, size: int) -> Result:
    """Return a tier's answer, which is no success unless it has all bytes."""
    if answer.ok and answer.num_bytes != size:
        return Result(Status.CORRUPT, 0, f"the payload has {answer.num_bytes} of {size} bytes")
    return answer
