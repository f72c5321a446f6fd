"""An allocator and the reference model of prefix sharing side by side. As lockstep.py, with token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from agreement import model_of
from lockstep import Lockstep
from reference import Piece
from reference_prefix import NEWEST, Node, PrefixModel, Root
from support import LAYOUTS, SIZES, i32, make_allocator

import kvmem
from kvmem.allocator.ops import Op
from kvmem.allocator.prefix import Pin, PrefixMatch

NO_ROOT: Root = (None, None)
Marks = list[tuple[int, str]]
MARK = 100_000  # token ids are below it; those that a key begins at are changed by multiples of it


def marks_of(root: Root, tokens: list[int]) -> Marks:
    """Where the keys of a root begin in a prompt: as they say, or, one without a position, at the first id that stands
    twice in a row; at the start where none does."""
    keys = root[2] if len(root) > 2 else None
    if keys is None:
        return []
    if not isinstance(keys, str):
        return list(keys)
    return [(next((i for i in range(len(tokens) - 1) if tokens[i] == tokens[i + 1]), 0), keys)]


def marked(marks: Marks, tokens: list[int], start: int = 0) -> list[int]:
    """The tokens as the model sees them: where a key begins stands another token, so nothing from there on is equal."""
    found = tokens[:]
    for position, key in marks:
        if start <= position < start + len(tokens):
            found[position - start] += MARK * (1 + ord(key)) * (1 + found[position - start] // MARK)
    return found


def asked(root: Root) -> dict[str, Any]:
    return {"salt": root[0], "adapter": root[1], "extra_key": root[2] if len(root) > 2 else None}


class PageView:
    """Which page each slot shows, from the records alone: a second pair of books for the virtual backend."""

    def __init__(self, alloc: kvmem.Allocator) -> None:
        self.take = alloc.take_ops
        self.page_at: dict[tuple[int, int], int] = {}
        self.shown: dict[int, set[tuple[int, int]]] = {}
        self.first_arena: list[int] = []
        self.row_slots: list[int] = []
        for geometry, layout in zip(alloc._geometry, alloc._layouts, strict=True):
            self.first_arena.append(len(self.row_slots))
            page = alloc.pool.page_bytes
            self.row_slots += [geometry.row_tokens * size // page for size in layout.token_bytes]

    def follow(self) -> None:
        self.follow_ops(self.take())

    def follow_ops(self, ops: list[Op]) -> None:
        for kind, at, a, b, c, _ in ops:
            if kind == "map":
                for i in range(c):
                    self.page_at[at, a + i] = b + i
                    self.shown.setdefault(b + i, set()).add((at, a + i))
            elif kind == "unmap":
                for i in range(c):
                    self.shown[self.page_at.pop((at, a + i))].discard((at, a + i))

    def elsewhere(self, g: int, arena: int, row: int, ordinal: int) -> list[tuple[int, int]]:
        """(row, ordinal) of every other slot that shows the page at this one."""
        at = self.first_arena[g] + arena
        mine = (at, row * self.row_slots[at] + ordinal)
        return [divmod(slot, self.row_slots[a]) for a, slot in self.shown[self.page_at[mine]] - {mine} if a == at]


class PrefixLockstep(Lockstep):
    """``plentiful``: memory and rows never run short, so that what is found must equal what the model finds.

    But for one case: a virtual row shows a window whole or not at all, so that the part of a block that one reader
    wrote, behind a window that only another still has, is not found. The whole blocks before it are."""

    model: PrefixModel

    def __init__(
        self, alloc: kvmem.Allocator, *, contents: bool = True, plentiful: bool = False, partial_reuse: bool = True
    ) -> None:
        partial_reuse = partial_reuse and all(group.block_order == "tokens" for group in alloc.spec.groups)
        super().__init__(alloc, contents=contents, model=model_of(alloc, PrefixModel, partial_reuse=partial_reuse))
        self.plentiful = plentiful
        self.seqs: dict[int, kvmem.Sequence] = {}
        self.marks: dict[int, Marks] = {}
        self.pins: list[tuple[Pin, list[Node]]] = []
        self.pages = PageView(alloc) if self.virtual else None
        self.hit_tokens = self.missed_tokens = self.partial_hits = 0

    # --- opening ---

    def open(self, tokens: list[int] | None = None, root: Root = NO_ROOT) -> int:
        if len(self.model.sequences) == self.alloc.max_sequences:
            with pytest.raises(kvmem.OutOfMemory):
                self.alloc.sequence(tokens, **asked(root))
            return -1
        marks, under = marks_of(root, tokens or []), root[:2]
        seen = marked(marks, tokens or [])
        most = self.model.match(under, seen)
        said = self.alloc.match(tokens or [], **asked(root)).num_tokens
        seq = self.alloc.sequence(tokens, **asked(root))
        cached = seq.num_cached_tokens
        assert cached <= said <= most, "found what was never published, or was forgotten"
        assert self.model.certain(under, seen) <= said, "a block in use was not found"
        assert not self.plentiful or self._is_all(under, seen, cached), f"found {cached} of {most}, with memory enough"
        self.seqs[seq.id], self.marks[seq.id] = seq, marks
        look = self._look(seq.id) if self.virtual and cached else None
        self.model.begin(seq.id, under, seen, cached, look)
        self.hit_tokens += cached
        self.missed_tokens += most - cached
        self.partial_hits += cached % self.model.block_tokens > 0
        return seq.id

    def _is_all(self, root: Root, tokens: list[int], found: int) -> bool:
        if found == self.model.match(root, tokens, newest=NEWEST):
            return True
        least = self.model.match(root, tokens, partial=False, surely=True)
        return self.virtual and bool(self.model.windows) and found >= least

    def _look(self, handle: int):  # type: ignore[no-untyped-def]
        """Which of the live sequences' pieces the new row shows; the pages are the allocator's choice."""
        assert self.pages is not None
        self.pages.follow()
        rows = [{self.alloc.core.row(h, g): h for h in self.model.sequences} for g in range(len(self.model.groups))]
        own = [self.alloc.core.row(handle, g) for g in range(len(self.model.groups))]

        def look(g: int, arena: int, ordinal: int) -> Piece | None:
            assert self.pages is not None
            for row, place in self.pages.elsewhere(g, arena, own[g], ordinal):
                other = rows[g].get(row, handle)
                if other != handle and place in (here := self.model.sequences[other][g].pieces[arena]):
                    return here[place]
            return None

        return look

    def match(self, tokens: list[int], root: Root = NO_ROOT) -> PrefixMatch:
        """What would be found, and that asking changes nothing."""
        before = self.alloc.stats()
        found = self.alloc.match(tokens, **asked(root))
        under, seen = root[:2], marked(marks_of(root, tokens), tokens)
        assert self.model.certain(under, seen) <= found.num_tokens <= self.model.match(under, seen)
        assert not self.plentiful or self._is_all(under, seen, found.num_tokens)
        assert (found.num_tokens == max(0, len(tokens) - 1)) == (found.reason == "complete") or not self.model.shares
        assert self.alloc.stats() == before
        return found

    # --- growing ---

    def commit_ids(self, given: dict[int, list[int]]) -> None:
        """Writes these tokens and commits them with their ids, in one batched call if there are several."""
        seen = {handle: self._seen(handle, ids) for handle, ids in given.items()}
        for handle, ids in seen.items():
            self._write_ids(handle, ids)
        handles, counts = i32(*given), i32(*(len(ids) for ids in given.values()))
        if len(given) == 1:
            for handle, ids in given.items():
                self.seqs[handle].commit(ids)
        else:
            flat = np.array([token for ids in given.values() for token in ids], np.int32)
            self.alloc.commit_batch(handles, counts, tokens=flat)
        for handle, ids in seen.items():
            self.model.commit_ids(handle, ids)

    def _seen(self, handle: int, ids: list[int]) -> list[int]:
        return marked(self.marks.get(handle, []), ids, self.model.sequences[handle][self.model.main].committed)

    def write(self, handles: list[int]) -> None:
        """As a model would: it runs over reserved tokens, and leaves the state of a sequence that has none alone."""
        lengths = {h: self.model.sequences[h][self.model.main] for h in handles}
        super().write([h for h, held in lengths.items() if held.tokens > held.committed])

    def append(self, handle: int, ids: list[int]) -> bool:
        """Extends by these tokens, if there is room, and commits them."""
        done = self.extend({handle: len(ids)})
        if done:
            self.commit_ids({handle: ids})
        return done

    def _write_ids(self, handle: int, ids: list[int]) -> None:
        """A known token's bytes follow from it and all before it; an unknown one's from who wrote it."""
        n, model = len(ids), self.model
        if model.is_known(handle):
            writers = model.digests_of(handle, ids)
        else:
            self._writer += 1
            writers = [self._writer * 1_000_003 + handle] * n
        self.hand_over()
        batch = self.memory.batch(i32(handle), new_tokens=[n]) if self.contents and n else None
        for g, rules in enumerate(model.groups):
            held = model.sequences[handle][g]
            if rules.growth == "token":
                held.writers[held.committed : held.committed + n] = writers
            if batch is None or rules.growth != "token" or not held.tokens:
                continue
            fields = batch.group(g)
            assert fields.slot_mapping is not None and fields.positions is not None
            positions = fields.positions.cpu().numpy().astype(np.int64)
            self.put(g, fields.slot_mapping, np.array(writers, np.int64), positions)
        if n:
            self._write_state(handle, writers[-1])

    def _write_state(self, handle: int, writer: int) -> None:
        for g in self.model.fixed:
            held = self.model.sequences[handle][g]
            if not held.tokens or held.writers[0] == writer:
                continue
            held.writers[0] = writer
            if self.contents:
                table = self.memory.batch(i32(handle), new_tokens=[0]).group(g).block_table
                assert table is not None
                slot = table[:1, 0].long() * self.model.groups[g].block_tokens
                self.put(g, slot, np.array([writer], np.int64), np.zeros(1, np.int64))

    # --- the rest ---

    def truncate(self, handle: int, tokens: int) -> None:
        if self.model.truncate_is_pinned(handle, tokens) and tokens >= 0:
            with pytest.raises(kvmem.SpecError):
                self.alloc.core.truncate(handle, tokens)
            return
        super().truncate(handle, tokens)

    def fork(self, parent: int) -> int:
        child = super().fork(parent)
        if child >= 0:
            self.seqs[child] = kvmem.Sequence(self.alloc, child)
            self.marks[child] = self.marks.get(parent, [])
        return child

    def free(self, handles: list[int]) -> None:
        super().free(handles)
        for handle in handles:
            self.seqs.pop(handle, None)
            self.marks.pop(handle, None)

    def snapshot(self, handle: int) -> bool:
        if not self.model.can_snapshot(handle):
            with pytest.raises(kvmem.SpecError):
                self.seqs[handle].snapshot()
            return False
        content = self.model.contents[handle]
        for g in self.model.fixed:
            assert self.model.sequences[handle][g].writers == [content.last_digest], (
                "a state of other tokens can be kept"
            )
        try:
            self.seqs[handle].snapshot()
        except kvmem.OutOfMemory:
            assert not self.plentiful
            return False
        self.model.snapshot(handle)
        return True

    def pin(self, handle: int, tokens: int | None = None) -> bool:
        content, size = self.model.contents[handle], self.model.block_tokens
        most = len(content.tokens) if tokens is None else min(tokens, len(content.tokens))
        nodes = content.chain[: most // size]
        usable = bool(nodes) and self.model._usable(nodes, len(nodes) * size)
        try:
            pin = self.seqs[handle].pin(tokens)
        except kvmem.SpecError:
            surely = usable and self.model._usable(nodes, len(nodes) * size, surely=True)
            assert not surely or self._was_given_up(handle, nodes), "what is there was not pinned"
            return False
        assert usable, "what cannot be found was pinned"
        assert pin.num_tokens == len(nodes) * size
        self._pinned(pin, nodes)
        return True

    def _was_given_up(self, handle: int, nodes: list[Node]) -> bool:
        """Whether match() does not find the end of these nodes either, where that may be: what windows have passed, and
        snapshots of tokens in use, go when memory is short, but for those at which a pin ends. A snapshot that is gone
        stays so."""
        kept = self.plentiful or not (self.model.windows or self.model.fixed)
        if kept or any(chain[-1] is nodes[-1] for chain in self.model.pinned):
            return False
        content, marks = self.model.contents[handle], self.marks.get(handle, [])
        root = next(key for key, node in self.model.roots.items() if node is content.root)
        tokens = [token % MARK for token in content.tokens[: len(nodes) * self.model.block_tokens]]
        if self.alloc.match([*tokens, 0], **asked((*root, marks or None))).num_tokens == len(tokens):
            return False
        if not self.model.windows:
            nodes[-1].state = 0
        return True

    def pin_tokens(self, tokens: list[int], root: Root = NO_ROOT) -> bool:
        under, seen = root[:2], marked(marks_of(root, tokens), tokens)
        chain = self.model.walk(under, seen)
        try:
            pin = self.alloc.pin(tokens, **asked(root))
        except kvmem.SpecError:
            whole = len(tokens) >= self.model.block_tokens and self.model.finds_all(under, seen)
            assert not (self.plentiful and whole), "what is cached was not pinned"
            return False
        assert pin.num_tokens == len(tokens) // self.model.block_tokens * self.model.block_tokens
        assert len(chain) * self.model.block_tokens == pin.num_tokens, "what was never published was pinned"
        self._pinned(pin, chain)
        return True

    def _pinned(self, pin: Pin, nodes: list[Node]) -> None:
        for node in nodes:
            node.pins += 1
        self.model.pinned.append(nodes)
        self.pins.append((pin, nodes))

    def unpin(self, number: int) -> None:
        pin, nodes = self.pins.pop(number)
        self.model.pinned.pop(number)
        pin.unpin()
        for node in nodes:
            node.pins -= 1
        with pytest.raises(kvmem.StaleHandle):
            pin.unpin()

    def clear_cache(self) -> None:
        least = self.model.cached_blocks(surely=True) if self.plentiful else 0
        most, forgotten = self.model.clear_cache(), self.alloc.clear_cache()
        assert least <= forgotten <= most

    def trim(self) -> None:
        """As without sharing, where nothing that nobody uses is pinned."""
        if not self._idle_pins():
            super().trim()
        else:
            self.alloc.trim()

    def _check_given(self, given: int, parked: int) -> None:
        """Pages of cached blocks are parked before they are emptied, too: what was made free can be given away, and
        nothing is forgotten for it."""
        before = self.alloc.stats()
        if given > 0:
            assert self.alloc.trim(given) == given
        after = self.alloc.stats()
        assert (after.cached_blocks, after.evicted_blocks) == (before.cached_blocks, before.evicted_blocks)

    def set_memory(self, pages: int) -> None:
        if not self._idle_pins():
            super().set_memory(pages)

    def _idle_pins(self) -> bool:
        """Whether pins keep memory that no sequence uses (their snapshots do): the model does not know how much."""
        return any(not node.users or self.model.windows or node.state for _, nodes in self.pins for node in nodes)

    # --- agreement ---

    def memory_agrees(self) -> None:
        stats = self.alloc.stats()
        assert stats.hit_tokens == self.hit_tokens
        assert stats.pinned_blocks == sum(len(nodes) for _, nodes in self.pins)
        idle = self.model.cached_blocks() if self.model.shares else 0
        assert stats.cached_bytes <= stats.mapped_bytes
        assert {p.num_tokens for p in self.alloc.pins()} == {
            len(nodes) * self.model.block_tokens for _, nodes in self.pins
        }
        least = self.model.cached_blocks(surely=True) if self.plentiful and self.model.shares else 0
        assert least <= stats.cached_blocks <= idle
        if not self._idle_pins():
            super().memory_agrees()
            return
        used = stats.used_bytes + stats.cached_beside_bytes
        assert stats.mapped_bytes == used + stats.wasted_bytes + stats.parked_bytes
        assert stats.created_bytes == stats.mapped_bytes + stats.free_bytes <= stats.budget_bytes
        assert (stats.used_bytes, stats.shared_bytes) == (self.model.used_bytes(), self.model.shared_bytes())

    def _must_fit(self, after) -> bool:  # type: ignore[no-untyped-def, override]
        """Pins of what no sequence uses take memory that the model does not count."""
        return not self._idle_pins() and super()._must_fit(after)


def make_pair(
    layout: str, backend: str, size: str = "near", *, plentiful: bool = False, contents: bool = True, **options: object
) -> PrefixLockstep:
    sizes = SIZES[size]
    options = {
        "page_bytes": sizes["page_bytes"], "memory": (2000 if plentiful else 60) * sizes["page_bytes"],
        "max_sequences": 300 if plentiful else 6, "record_ops": True, "interleave": LAYOUTS[layout].interleave,
    } | options  # fmt: skip
    alloc = make_allocator(LAYOUTS[layout].spec(sizes["block_size"]), backend, **options)
    partial = bool(options.get("partial_reuse", True))
    return PrefixLockstep(alloc, contents=contents, plentiful=plentiful, partial_reuse=partial)
