"""An allocator and the reference model side by side: each call goes to both, and their answers must agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pytest
import torch
from agreement import Agreement, model_of
from contents import by_sequence, by_table, expected, write_slots
from reference import Model
from support import i32

import kvmem


class Lockstep(Agreement):
    """``contents``: tokens carry patterns, which needs a device with memory. Handles are ints throughout."""

    def __init__(self, alloc: kvmem.Allocator, *, contents: bool = True, model: Model | None = None) -> None:
        super().__init__(alloc, model or model_of(alloc))
        self.contents, self.memory = contents, alloc  # where tokens are written: a replica in follow_world.py
        self.refusals = 0
        self._writer = 0
        self._freed: list[int] = []

    # --- calls that need memory: agreed with the model before they are believed ---

    def _asks(self, change: Callable[[Model], object], call: Callable[[], object]) -> bool:
        """Makes a call that may run out of memory; ``change`` does the same to a model."""
        try:
            call()
        except kvmem.OutOfMemory:
            self.refusals += 1
            after = self.model.copy()
            change(after)
            if not self._must_fit(after):
                return False
            # A page that only memory which is needed by no sequence shares may have been copied, and so have needed one
            # page more (docs/decisions.md). Without such memory there is room.
            assert self.virtual, "refused, though the reference model has room"
            self.clear_cache()
            self.trim()
            call()
        change(self.model)
        if self.virtual:
            assert self.model.needed_pages() <= self._budget(), "granted, though the pages it needs are over the budget"
        return True

    def _budget(self) -> int:
        return self.alloc.pool.budget_bytes // self.alloc.pool.page_bytes

    def prepare_padding(self) -> None:
        """Backs the trash blocks of every group."""
        self.alloc.batch([], pad_to=1)
        self.model.trash = set(range(len(self.model.groups)))

    def _must_fit(self, after: Model) -> bool:
        """Whether there is room beyond doubt. Exact for the virtual backend; for the paged one, whose blocks need not
        fill the pages they keep mapped, whether the new blocks fit in pages that no block is using."""
        if self.virtual:
            return after.needed_pages() <= self._budget()
        stats, page = self.alloc.stats(), self.alloc.pool.page_bytes
        free_pages = self._budget() - (stats.mapped_bytes - stats.parked_bytes) // page
        need = 0
        for g, rules in enumerate(self.model.groups):
            blocks = max(0, self._blocks(after, g) - self._blocks(self.model, g))
            # A run of blocks may start and end within a page, in each arena, and pages in use may cut it anywhere.
            need += blocks * sum(-(-piece // page) + 1 for piece in rules.piece_bytes)
        trash = sum(-(-2 * piece // page) for rules in self.model.groups for piece in rules.piece_bytes)
        return need + trash <= free_pages

    @staticmethod
    def _blocks(model: Model, g: int) -> int:
        return len({id(piece) for groups in model.sequences.values() for piece in groups[g].pieces[0].values()})

    def open(self) -> int:
        if len(self.model.sequences) == self.alloc.max_sequences:
            with pytest.raises(kvmem.OutOfMemory):
                self.alloc.sequence()
            return -1
        handle = int(self.alloc.open_batch(1)[0])
        self.model.open(handle)
        return handle

    def extend(self, counts: dict[int, int]) -> bool:
        """One batched call (a single one for one sequence). Counts beyond ``max_tokens`` are refused by both."""
        ids, amounts = i32(*counts), i32(*counts.values())
        if any(n > self.model.room_tokens(h) for h, n in counts.items()):
            with pytest.raises(kvmem.SpecError):
                self.alloc.extend_batch(ids, amounts)
            return False

        def change(model: Model) -> None:
            for handle, n in counts.items():
                model.extend(handle, n)

        if len(counts) == 1:
            return self._asks(change, lambda: self.alloc.core.extend(int(ids[0]), int(amounts[0])))
        return self._asks(change, lambda: self.alloc.extend_batch(ids, amounts))

    def prefill(self, handle: int, n: int, group: int) -> bool:
        if n > self.model.room_tokens(handle, group):
            with pytest.raises(kvmem.SpecError):
                self.alloc.core.extend(handle, n, group)
            return False
        return self._asks(lambda m: m.extend(handle, n, group), lambda: self.alloc.core.extend(handle, n, group))

    def fork(self, parent: int) -> int:
        if len(self.model.sequences) == self.alloc.max_sequences:
            with pytest.raises(kvmem.OutOfMemory):
                self.alloc.core.fork(parent)
            return -1
        child = -1

        def call() -> None:
            nonlocal child
            child = self.alloc.core.fork(parent)

        self._asks(lambda model: model.fork(parent, child), call)
        return child

    # --- calls that never need memory ---

    def hand_over(self) -> None:
        """Before memory is written or read; a replica follows then."""

    def put(self, g: int, slots: torch.Tensor, writers: np.ndarray, positions: np.ndarray) -> None:
        write_slots(self.memory, g, slots, writers, positions)

    def write(self, handles: list[int]) -> None:
        """Writes every reserved token that is not committed, and fixed states anew, through a batch as a kernel
        would."""
        if not handles:
            return
        self.hand_over()
        batch = self.memory.batch(i32(*handles))
        for g, rules in enumerate(self.model.groups):
            fields = batch.group(g)
            slots, positions, of = fields.slot_mapping, fields.positions.cpu(), fields.batch_indices.cpu()
            if rules.growth == "fixed":
                has = [i for i, h in enumerate(handles) if self.model.sequences[h][g].tokens]
                slots, positions, of = fields.block_table[has, 0].long(), torch.zeros(len(has)), torch.tensor(has)
            assert slots is not None and positions is not None and of is not None
            self._writer += 1
            writers = self._writer * 1_000_003 + np.array(handles, np.int64)[of.long().numpy()]
            if self.contents and len(slots):
                self.put(g, slots, writers, positions.numpy().astype(np.int64))
            rows, places = of.long().numpy(), positions.long().numpy()
            for row in np.unique(rows).tolist():  # new tokens of one sequence are neighbours
                mine = places[rows == row]
                self.model.write(handles[row], g, int(mine[0]), len(mine), self._writer * 1_000_003 + handles[row])

    def commit(self, counts: dict[int, int], group: int | None = None) -> None:
        g = self.model.main if group is None else group
        excess = [n > (held := self.model.sequences[h][g]).tokens - held.committed for h, n in counts.items()]
        ids, amounts = i32(*counts), i32(*counts.values())
        call = self.alloc.core.commit_batch
        if any(excess):
            with pytest.raises(kvmem.SpecError):
                call(ids, amounts, -1 if group is None else group)
            return
        call(ids, amounts, -1 if group is None else group)
        for handle, n in counts.items():
            self.model.commit(handle, n, group)

    def truncate(self, handle: int, tokens: int) -> None:
        if not self.model.least_tokens(handle) <= tokens <= self.model.sequences[handle][self.model.main].tokens:
            with pytest.raises(kvmem.SpecError):
                self.alloc.core.truncate(handle, tokens)
            return
        self.alloc.core.truncate(handle, tokens)
        self.model.truncate(handle, tokens)

    def free(self, handles: list[int]) -> None:
        self.alloc.free_batch(i32(*handles))
        for handle in handles:
            self.model.free(handle)
        self._freed = (self._freed + handles)[-20:]

    def set_memory(self, pages: int) -> None:
        stats, page = self.alloc.stats(), self.alloc.pool.page_bytes
        needed = (stats.mapped_bytes - stats.parked_bytes) // page
        try:
            self.alloc.set_memory(pages * page)
        except kvmem.OutOfMemory:
            assert pages < needed, "live sequences would have fitted"
            assert self.alloc.stats().budget_bytes == stats.budget_bytes
        else:
            assert pages >= needed
            assert self.alloc.stats().budget_bytes == pages * page

    def compact(self, size: int | None = None) -> int:
        """Blocks move: what is mapped, used, shared and cached stays, and no page that could be had before is lost."""
        before = self.alloc.stats()
        given = self.alloc.compact(size)
        after = self.alloc.stats()
        assert given >= 0 and (given == 0 or not self.virtual)
        assert after.parked_bytes >= before.parked_bytes
        moved = {"parked_bytes", "wasted_bytes", "cached_beside_bytes", "driver_calls", "physical_bytes"}
        for name in {field.name for field in fields(after)} - moved:
            assert getattr(after, name) == getattr(before, name), name
        self._check_given(given, after.parked_bytes - before.parked_bytes)
        return given

    def _check_given(self, given: int, parked: int) -> None:
        assert given == parked

    def clear_cache(self) -> None:
        self.alloc.clear_cache()

    def trim(self) -> None:
        before = self.alloc.stats()
        given = self.alloc.trim()
        after = self.alloc.stats()
        assert given == before.parked_bytes + before.free_bytes
        assert after.parked_bytes == after.free_bytes == 0 and after.created_bytes == after.mapped_bytes

    # --- agreement ---

    def agree(self) -> None:
        """Lengths, memory, and (invariant 8) that what was freed stays unknown."""
        self.lengths_agree()
        self.memory_agrees()
        assert self.alloc.check() == []
        for handle in self._freed:
            if handle not in self.model.sequences:
                with pytest.raises(kvmem.StaleHandle):
                    self.alloc.core.tokens(handle)

    def contents_agree(self) -> None:
        """Every written token of every sequence, in every layer and component, read two ways."""
        self.hand_over()
        for g in range(len(self.model.groups)):
            held = {handle: groups[g] for handle, groups in self.model.sequences.items() if groups[g].tokens}
            if not held:
                continue
            owners = np.repeat(list(held), [h.tokens - h.first for h in held.values()])
            writers = np.array([writer for h in held.values() for writer in h.writers[h.first :]], np.int64)
            positions = np.concatenate([np.arange(h.first, h.tokens) for h in held.values()])
            tokens, written = np.stack([owners, positions], 1)[writers != 0], torch.from_numpy(writers != 0)
            wanted = [right[written] for right in expected(self.alloc.spec, g, writers, positions)]
            for read in (by_sequence, by_table):
                for found, right in zip(read(self.memory, list(held), g), wanted, strict=True):
                    equal = torch.equal(found[written], right)
                    assert equal, (read.__name__, g, tokens[(found[written] != right).any(1).numpy()].tolist())
