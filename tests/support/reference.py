"""The allocator as one would explain it on a blackboard: Python lists, no page recycling, no device, no batching.

It knows four things that the real one must agree with at every moment: how long each sequence is, who wrote each of its
tokens, which pieces of memory (pages or blocks) it shares with others, and so how many bytes are in use and whether one
more fits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import kvmem


def up(a: int, b: int) -> int:
    return -(-a // b)


class Piece:
    """A page (virtual) or one arena's part of a block (paged), and the handles of the sequences that hold it.
    ``content``: what else may read it, a published node (reference_prefix.py)."""

    __slots__ = ("content", "holders")

    def __init__(self, holders: Iterable[int] = (), content: Any = None) -> None:
        self.holders, self.content = set(holders), content


@dataclass
class GroupRules:
    """What the model knows of a group: from the spec and the words of the design, not from the allocator's geometry."""

    growth: str
    block_tokens: int
    unit_tokens: int  # whole blocks, of which a window lets go at once, and which sequences share or copy at once
    window_tokens: int
    max_tokens: int
    token_bytes: list[int]  # by arena
    piece_bytes: list[int]
    guard_tokens: int  # held in whole pieces behind the length
    window_guard_tokens: int  # and before a window
    moved_tokens: int = 1  # tokens that are copied at once: those of a block, where they do not lie one after the other


@dataclass
class Tokens:
    """One group of one sequence."""

    tokens: int = 0
    committed: int = 0
    first: int = 0
    writers: list[int] = field(default_factory=list)  # by position; 0 is not written yet
    pieces: list[dict[int, Piece]] = field(default_factory=list)  # by arena: ordinal -> piece


def arena_bytes(group: kvmem.Group, interleave: int | str) -> list[int]:
    """Bytes of a token in each run of ``interleave`` layers, or of each component of each ("none"); every component
    starts at a multiple of 16 bytes."""
    size = {
        (c.name, layer): up(group.row_bytes(c.name, layer), 16) * 16 for c in group.components for layer in group.layers
    }
    own = [c.name for c in group.components if c.scope == "layer"]
    shared = [size[c.name, group.layers[0]] for c in group.components if c.scope == "shared"]
    if interleave == "none":
        return shared + [size[name, layer] for layer in group.layers for name in own]
    total = []
    for start in range(0, len(group.layers), int(interleave)):
        layers = group.layers[start : start + int(interleave)]
        total.append(sum(size[name, layer] for name in own for layer in layers))
    total[0] += sum(shared)
    return [size for size in total if size]


def unit_of(spec: kvmem.CacheSpec) -> int:
    """How many tokens are shared at once; 0 where nothing is."""
    sizes = {g.block_size for g in spec.groups if g.growth == "token"}
    unit = 0 if any(g.growth == "prefill" for g in spec.groups) else math.lcm(*sizes)
    return unit if len(sizes) == 1 or unit <= 4096 else 0


class Model:
    """See the module. ``budget_pages`` is what live sequences may need; parked memory never counts against them."""

    def __init__(
        self, spec: kvmem.CacheSpec, *, virtual: bool, page_bytes: int, interleave: int | str, max_sequences: int,
        max_tokens: int,
        guard_tokens: int,
    ) -> None:  # fmt: skip
        self.virtual, self.page_bytes, self.max_sequences = virtual, page_bytes, max_sequences
        self.groups: list[GroupRules] = []
        self.unit = unit_of(spec)
        for group in spec.groups:
            sizes = arena_bytes(group, interleave)
            longest = {"token": max_tokens, "prefill": group.max_tokens or max_tokens, "fixed": 1}[group.growth]
            pieces = [page_bytes if virtual else group.block_size * size for size in sizes]
            self.groups.append(
                GroupRules(
                    group.growth, group.block_size, (self.unit if group.growth == "token" else 0) or group.block_size,
                    group.window_tokens or 0, longest, sizes, pieces,
                    guard_tokens if virtual and group.growth != "fixed" else 0, guard_tokens,
                    1 if group.block_order == "tokens" else group.block_size,
                )
            )  # fmt: skip
        self.main = next((i for i, g in enumerate(self.groups) if g.growth == "token"), 0)
        self.sequences: dict[int, list[Tokens]] = {}
        self.live_pieces = 0  # held by someone
        self.trash: set[int] = set()  # groups whose two trash blocks exist: for padding, and for what windows drop

    # --- pieces ---

    def _hold(self, handle: int, here: dict[int, Piece], ordinal: int, piece: Piece) -> None:
        self.live_pieces += not piece.holders
        piece.holders.add(handle)
        here[ordinal] = piece

    def _drop(self, handle: int, here: dict[int, Piece], ordinal: int) -> None:
        piece = here.pop(ordinal)
        piece.holders.discard(handle)
        self.live_pieces -= not piece.holders

    def _is_read_by_others(self, piece: Piece) -> bool:
        """Asked of a piece that one of its holders is about to write."""
        return len(piece.holders) > 1

    def _span(self, g: int, arena: int, first: int, tokens: int) -> tuple[int, int]:
        """The pieces that tokens [first, tokens) lie in, with the guard behind them."""
        rules = self.groups[g]
        size, piece = rules.token_bytes[arena], rules.piece_bytes[arena]
        moved = up(tokens + rules.guard_tokens, rules.moved_tokens) * rules.moved_tokens
        return first * size // piece, up(moved * size, piece) if tokens else 0

    def _settle(self, handle: int, g: int, write_from: int | None = None) -> None:
        """Holds exactly the pieces that the group's tokens need; those from ``write_from`` on are not shared with
        anyone."""
        held = self.sequences[handle][g]
        for arena, here in enumerate(held.pieces):
            low, high = self._span(g, arena, held.first, held.tokens)
            for ordinal in [o for o in here if not low <= o < high]:
                self._drop(handle, here, ordinal)
            if write_from is not None:
                start = self._span(g, arena, self._unshared(g, write_from), held.tokens)[0]
                for ordinal in [o for o in here if o >= start and self._is_read_by_others(here[o])]:
                    self._drop(handle, here, ordinal)
            for ordinal in range(low, high):
                if ordinal not in here:
                    self._hold(handle, here, ordinal, Piece())

    def _unshared(self, g: int, tokens: int) -> int:
        """The first of ``tokens`` tokens that a sequence which goes on from them has for itself. Pages are shared as they are;
        blocks in units, since what is published later is published in these."""
        unit = self.groups[g].moved_tokens if self.virtual else self.groups[g].unit_tokens
        return tokens // unit * unit

    # --- calls ---

    def copy(self) -> Model:
        """An independent copy, in which the same pieces are shared by the same sequences."""
        twin, clones = copy.copy(self), dict[int, Piece]()
        twin.trash = set(self.trash)

        def clone(piece: Piece) -> Piece:
            if id(piece) not in clones:
                clones[id(piece)] = Piece(piece.holders, piece.content)
            return clones[id(piece)]

        twin.sequences = {
            handle: [
                replace(
                    held,
                    writers=held.writers[:],
                    pieces=[{o: clone(p) for o, p in here.items()} for here in held.pieces],
                )
                for held in groups
            ]
            for handle, groups in self.sequences.items()
        }
        return twin

    def open(self, handle: int) -> None:
        assert handle not in self.sequences and len(self.sequences) < self.max_sequences
        self.sequences[handle] = [Tokens(pieces=[{} for _ in g.token_bytes]) for g in self.groups]

    def _grown_by(self, group: int | None) -> list[int]:
        return [i for i, g in enumerate(self.groups) if g.growth == "token"] if group is None else [group]

    def room_tokens(self, handle: int, group: int | None = None) -> int:
        """How many more tokens the sequence may be asked to hold, memory apart."""
        if group is not None and self.groups[group].growth == "prefill" and self.sequences[handle][group].tokens:
            return 0
        g = self._grown_by(group)[0]
        return self.groups[g].max_tokens - self.sequences[handle][g].tokens

    def extend(self, handle: int, n: int, group: int | None = None) -> None:
        for g in self._grown_by(group):
            held = self.sequences[handle][g]
            old, held.tokens = held.tokens, held.tokens + n
            held.writers += [0] * n
            self._settle(handle, g, write_from=old)
            if 0 < self.groups[g].window_tokens <= held.tokens:  # soon there is something to drop
                self.trash.add(g)
        for g, rules in enumerate(self.groups):
            held = self.sequences[handle][g]
            if group is None and rules.growth == "fixed" and not held.tokens:
                held.tokens, held.committed, held.writers = 1, 1, [0]
                self._settle(handle, g)

    def write(self, handle: int, g: int, start: int, count: int, writer: int) -> None:
        self.sequences[handle][g].writers[start : start + count] = [writer] * count

    def commit(self, handle: int, n: int, group: int | None = None) -> None:
        for g in self._grown_by(group):
            held, rules = self.sequences[handle][g], self.groups[g]
            held.committed += n
            if n and rules.window_tokens:
                first = held.committed - rules.window_tokens + 1 - rules.window_guard_tokens
                held.first = max(held.first, first // rules.unit_tokens * rules.unit_tokens)
                self._settle(handle, g)

    def least_tokens(self, handle: int) -> int:
        """The shortest length that ``truncate`` accepts: a window that has moved on cannot come back."""
        found = [0]
        for held, rules in zip(self.sequences[handle], self.groups, strict=True):
            if held.first:
                found.append(held.first + rules.window_tokens - 1)
        return max(found)

    def truncate(self, handle: int, tokens: int) -> None:
        for g in self._grown_by(None):
            held = self.sequences[handle][g]
            held.tokens, held.committed = tokens, min(tokens, held.committed)
            del held.writers[tokens:]
            self._settle(handle, g)

    def fork(self, parent: int, child: int) -> None:
        self.open(child)
        for g, rules in enumerate(self.groups):
            old, new = self.sequences[parent][g], self.sequences[child][g]
            new.tokens = new.committed = old.committed
            new.first, new.writers = old.first if new.tokens else 0, old.writers[: old.committed]
            for arena, here in enumerate(new.pieces if rules.growth != "fixed" else []):
                low = self._span(g, arena, new.first, new.tokens)[0]
                whole = self._unshared(g, new.tokens) * rules.token_bytes[arena] // rules.piece_bytes[arena]
                for ordinal in range(low, whole):
                    self._hold(child, here, ordinal, old.pieces[arena][ordinal])
            self._settle(child, g)

    def free(self, handle: int) -> None:
        for held in self.sequences.pop(handle):
            for here in held.pieces:
                for ordinal in list(here):
                    self._drop(handle, here, ordinal)

    # --- answers ---

    def used_bytes(self) -> int:
        """Bytes of live tokens, each physical byte once: of a shared piece, what any of its holders has in it."""
        return sum(high - low for spans in self._intervals().values() for low, high in _union(spans))

    def needed_pages(self) -> int:
        """Virtual backend: pages that cannot be taken away now."""
        trash = [
            up((2 * rules.block_tokens + rules.guard_tokens) * size, self.page_bytes)
            for g, rules in enumerate(self.groups)
            for size in rules.token_bytes
            if g in self.trash
        ]
        return self.live_pieces + sum(trash)

    def shared_bytes(self) -> int:
        """The whole of every piece in which more than one sequence has tokens."""
        sizes: dict[int, int] = {}
        for held in (held for groups in self.sequences.values() for held in zip(groups, self.groups, strict=True)):
            for arena, here in enumerate(held[0].pieces):
                sizes.update({id(piece): held[1].piece_bytes[arena] for piece in here.values()})
        return sum(sizes[key] for key, spans in self._intervals().items() if len(spans) > 1)

    def _intervals(self) -> dict[int, list[tuple[int, int]]]:
        found: dict[int, list[tuple[int, int]]] = {}
        for groups in self.sequences.values():
            for held, rules in zip(groups, self.groups, strict=True):
                for size, length, here in zip(rules.token_bytes, rules.piece_bytes, held.pieces, strict=True):
                    for ordinal, piece in here.items():
                        low = max(held.first * size, ordinal * length)
                        high = min(held.tokens * size, (ordinal + 1) * length)
                        if low < high:
                            found.setdefault(id(piece), []).append((low, high))
        return found


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
