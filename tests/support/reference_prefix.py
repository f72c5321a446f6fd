"""The reference model of prefix sharing: every token spelled out, every prefix compared from its first token on.

What may be found is a tree of full blocks. It is an upper bound: under pressure the allocator gives up what nobody
uses, and tells nobody. While memory is plentiful it is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from zlib import crc32

from reference import Model, Piece, Tokens

import kvmem

#: Salt and adapter; callers of the pair of both may add the extra keys of a prompt: pairs of position and key, or one.
Root = tuple[Any, ...]
#: How the virtual backend's model is told which page a new row shows: (group, arena, ordinal) -> that page's piece.
Look = Callable[[int, int, int], Piece | None]
NEWEST = 8  # continuations of a block that are looked at for a partial hit
_MASK = (1 << 61) - 1


def digest(before: int, token: int) -> int:
    """Names a token and all before it; what the pattern of its bytes is made from. Never 0: that is "not written"."""
    return ((before ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x1234567) & _MASK or 1


class Node:
    """One full block of tokens after those of its parent. ``parts``: the groups that have it, with the pieces of each
    arena (paged), or nothing but the fact (virtual). ``doubtful``: those of them that may have lost it (virtual): the row
    of a sequence that turned back within the block may have been the only one to show it, where windows have passed it
    in all others. ``state``: the writer of a snapshot, 0 for none."""

    __slots__ = ("children", "digests", "doubtful", "parent", "parts", "pins", "state", "tokens", "users")

    def __init__(self, parent: Node | None, tokens: tuple[int, ...], before: int) -> None:
        self.parent, self.tokens = parent, tokens
        self.children: dict[tuple[int, ...], Node] = {}  # oldest first
        self.parts: dict[int, list[Piece]] = {}
        self.doubtful: set[int] = set()
        self.users = self.pins = self.state = 0
        self.digests: list[int] = []
        for token in tokens:
            before = digest(before, token)
            self.digests.append(before)
        if not tokens:
            self.digests.append(before)

    def is_cached(self) -> bool:
        """Whether it can still be found."""
        if self.parent is None:
            return True
        return self.parent.children.get(self.tokens) is self and self.parent.is_cached()


@dataclass
class Content:
    """What is known of one sequence: its first tokens, and the nodes of the whole blocks among them."""

    root: Node
    tokens: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    chain: list[Node] = field(default_factory=list)
    state_ahead: bool = False  # it may have seen tokens that the sequence does not have, and has not gone on since

    @property
    def last_digest(self) -> int:
        return self.digests[-1] if self.digests else self.root.digests[-1]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class MemoryOnly(Model):
    """What is asked what would fit: as below, but for what is published."""

    def _is_read_by_others(self, piece: Piece) -> bool:
        """A block that is cached is read by whoever finds it, though its writer has turned back and nobody else is
        left."""
        return super()._is_read_by_others(piece) or (piece.content is not None and piece.content.is_cached())


class PrefixModel(MemoryOnly):
    """A model that also knows which prefixes may be found."""

    def __init__(self, spec: kvmem.CacheSpec, *, partial_reuse: bool = True, **sizes: int | bool) -> None:
        super().__init__(spec, **sizes)  # type: ignore[arg-type]
        self.block_tokens = self.groups[self.main].unit_tokens  # of a node
        self.shares = self.unit > 0
        self.fixed = [i for i, g in enumerate(self.groups) if g.growth == "fixed"]
        self.windows = [i for i, g in enumerate(self.groups) if g.window_tokens]
        self.partial_reuse = partial_reuse and not self.fixed
        self.roots: dict[Root, Node] = {}
        self.contents: dict[int, Content] = {}
        self.pinned: list[list[Node]] = []
        # Else what is evicted is what windows hold of a node, each by itself.
        self.whole = len(self.windows) < len(self.groups)

    def stop_sharing(self) -> None:
        """As with ``prefix_cache=False``."""
        self.shares = False
        for rules in self.groups:
            rules.unit_tokens = rules.block_tokens

    # --- finding ---

    def root(self, key: Root) -> Node:
        if key not in self.roots:
            self.roots[key] = Node(None, (), crc32(repr(key).encode()))
        return self.roots[key]

    def front(self, g: int, n: int) -> int:
        """The first token that a window group holds of a sequence of ``n`` committed tokens."""
        rules = self.groups[g]
        if not rules.window_tokens or not n:
            return 0
        first = n - rules.window_tokens + 1 - rules.window_guard_tokens
        return max(0, first // rules.unit_tokens * rules.unit_tokens)

    def _usable(self, chain: list[Node], n: int, *, surely: bool = False) -> bool:
        """Whether all groups have what a sequence of these ``n`` tokens holds, the last block perhaps in part."""
        if self.fixed and n and not (n % self.block_tokens == 0 and chain[n // self.block_tokens - 1].state):
            return False
        return all(
            g in chain[i].parts and not (surely and g in chain[i].doubtful)
            for g in self.windows
            for i in range(self.front(g, n) // self.block_tokens, -(-n // self.block_tokens))
        )

    def is_needed(self, node: Node, g: int) -> bool:
        """Whether a sequence or a pin needs what window group ``g`` has of a node."""
        size = self.block_tokens
        for handle, content in self.contents.items():
            if any(x is node and i * size >= self.sequences[handle][g].first for i, x in enumerate(content.chain)):
                return True
        return any(x is node for chain in self.pinned for x in chain[self.front(g, len(chain) * size) // size :])

    def cached_blocks(self, *, surely: bool = False) -> int:
        """How many blocks nobody uses: nodes, or what the first window has of some. Paged: not the block of a node that a
        sequence was cut within, which is the sequence's last one until it grows."""
        if self.whole:
            return sum(not (node.users or node.pins) for node in self.nodes())
        return sum(
            0 in node.parts
            and not (surely and 0 in node.doubtful)
            and not (self.is_needed(node, 0) or any(piece.holders for piece in node.parts[0]))
            for node in self.nodes()
        )

    def walk(self, key: Root, tokens: list[int]) -> list[Node]:
        """The nodes of the whole blocks of ``tokens`` that are known, from the start on."""
        node, chain, size = self.root(key), list[Node](), self.block_tokens
        for start in range(0, len(tokens) - size + 1, size):
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            chain.append(child)
            node = child
        return chain

    def match(
        self, key: Root, tokens: list[int], *, partial: bool = True, newest: int | None = None, surely: bool = False
    ) -> int:
        """How many of ``tokens`` a sequence could take over, not the last of them: with ``partial`` blocks, of which it looks
        at the ``newest`` ones, or at whole ones only. ``surely``: of what is doubtful, nothing."""
        most, size = max(0, len(tokens) - 1), self.block_tokens
        if not self.shares:
            return 0
        chain = self.walk(key, tokens[:most])
        for end in range(len(chain) * size, -1, -size):
            if partial and (more := self._part_behind(key, chain[: end // size], tokens[end:most], newest)):
                return end + more
            if self._usable(chain, end, surely=surely):
                return end
        return 0

    def _part_behind(self, key: Root, chain: list[Node], rest: list[int], newest: int | None) -> int:
        """How many of the ``rest`` some block behind ``chain`` begins with, of those that can be used."""
        size, last = self.block_tokens, chain[-1] if chain else self.root(key)
        children = list(last.children.values())[::-1][:newest] if self.partial_reuse else []
        parts = [(min(common(rest, child.tokens), size - 1), child) for child in children]
        usable = [n for n, child in parts if n and self._usable([*chain, child], len(chain) * size + n)]
        return max(usable, default=0)

    def finds_all(self, key: Root, tokens: list[int]) -> bool:
        """Whether every whole block of ``tokens`` is sure to be there to be taken over."""
        chain, blocks = self.walk(key, tokens), len(tokens) // self.block_tokens
        return self.shares and len(chain) == blocks and self._usable(chain, blocks * self.block_tokens, surely=True)

    def certain(self, key: Root, tokens: list[int]) -> int:
        """What no pressure can take away: whole blocks that a live sequence or a pin holds. Full attention only."""
        if not self.shares or self.fixed or self.windows:
            return 0
        chain = self.walk(key, tokens[: max(0, len(tokens) - 1)])
        return sum(self.block_tokens for node in chain if node.users or node.pins)

    # --- calls ---

    def open(self, handle: int) -> None:
        super().open(handle)
        self.contents[handle] = Content(self.root((None, None)))

    def begin(self, handle: int, key: Root, tokens: list[int], cached: int, look: Look | None = None) -> None:
        """A sequence that found ``cached`` of ``tokens``, which is what ``find()`` says or, under pressure, less."""
        self.open(handle)
        content = self.contents[handle] = Content(self.root(key))
        if not cached:
            return
        chain = self.walk(key, tokens)[: cached // self.block_tokens]
        assert len(chain) == cached // self.block_tokens, "tokens were found that were never published, or forgotten"
        for node in chain:
            node.users += 1
            content.digests += node.digests
        content.chain = chain
        content.tokens = tokens[:cached]
        for token in tokens[len(content.digests) : cached]:
            content.digests.append(digest(content.last_digest, token))
        for g, rules in enumerate(self.groups):
            held = self.sequences[handle][g]
            if rules.growth == "fixed":
                assert chain[-1].state, "a fixed state was found where no snapshot was taken"
                held.tokens, held.committed, held.writers = 1, 1, [chain[-1].state]
            else:
                held.tokens = held.committed = cached
                held.first, held.writers = self.front(g, cached), content.digests[:]
            if rules.window_tokens and rules.window_tokens <= cached:
                self.trash.add(g)
            if look is None:
                self._hold_chain(handle, g, held, chain)
            elif rules.growth != "fixed":
                self._hold_seen(handle, g, held, look)
            self._settle(handle, g)

    def _hold_chain(self, handle: int, g: int, held: Tokens, chain: list[Node]) -> None:
        """Paged: the very blocks of the chain, as far as the window needs them."""
        if self.groups[g].growth == "fixed":
            return
        for ordinal in range(held.first // self.block_tokens, len(chain)):
            for (here, block), piece in zip(self._blocks_of(held, g, ordinal), chain[ordinal].parts[g], strict=True):
                self._hold(handle, here, block, piece)

    def _blocks_of(self, held: Tokens, g: int, ordinal: int) -> list[tuple[dict[int, Piece], int]]:
        """Where the blocks of node ``ordinal`` stand, in each arena."""
        each = self.block_tokens // self.groups[g].block_tokens
        return [(here, block) for here in held.pieces for block in range(ordinal * each, (ordinal + 1) * each)]

    def _hold_seen(self, handle: int, g: int, held: Tokens, look: Look) -> None:
        for arena, here in enumerate(held.pieces):
            for ordinal in range(*self._span(g, arena, held.first, held.tokens)):
                if (piece := look(g, arena, ordinal)) is not None:
                    self._hold(handle, here, ordinal, piece)

    def is_known(self, handle: int) -> bool:
        return len(self.contents[handle].tokens) == self.sequences[handle][self.main].committed

    def digests_of(self, handle: int, ids: list[int]) -> list[int]:
        """The writers of these tokens, should they be committed next."""
        before, found = self.contents[handle].last_digest, []
        for token in ids:
            before = digest(before, token)
            found.append(before)
        return found

    def commit_ids(self, handle: int, ids: list[int]) -> None:
        """Known tokens: every block they fill is published, before the windows move on."""
        content = self.contents[handle]
        content.state_ahead = content.state_ahead and not ids
        if self.is_known(handle):
            content.digests += self.digests_of(handle, ids)
            content.tokens += ids
            self._publish(handle, content)
        self.commit(handle, len(ids))

    def _publish(self, handle: int, content: Content) -> None:
        size = self.block_tokens
        while self.shares and (len(content.chain) + 1) * size <= len(content.tokens):
            i = len(content.chain)
            last = content.chain[-1] if i else content.root
            tokens = tuple(content.tokens[i * size : (i + 1) * size])
            node = last.children.get(tokens)
            if node is None:
                node = last.children[tokens] = Node(last, tokens, last.digests[-1])
            node.users += 1
            content.chain.append(node)
            self._add_parts(handle, node, i)

    def _add_parts(self, handle: int, node: Node, ordinal: int) -> None:
        for g, rules in enumerate(self.groups):
            held = self.sequences[handle][g]
            if rules.growth != "token" or ordinal * self.block_tokens < held.first:
                continue  # or: the window dropped it before the block was full
            if self.virtual:
                node.parts.setdefault(g, [])
                node.doubtful.discard(g)
                continue
            places = self._blocks_of(held, g, ordinal)
            theirs = node.parts.setdefault(g, [here[block] for here, block in places])
            for piece in theirs:
                piece.content = node
            for (here, block), new in zip(places, theirs, strict=True):
                if here[block] is not new:
                    self._drop(handle, here, block)
                    self._hold(handle, here, block, new)

    def truncate_is_pinned(self, handle: int, tokens: int) -> bool:
        return any(node.pins for node in self.contents[handle].chain[tokens // self.block_tokens :])

    def truncate(self, handle: int, tokens: int) -> None:
        content, keep = self.contents[handle], tokens // self.block_tokens
        content.state_ahead = content.state_ahead or tokens < self.sequences[handle][self.main].tokens
        for node in reversed(content.chain[keep:]):
            node.users -= 1
            if not node.users and node.parent is not None:
                node.parent.children.pop(node.tokens, None)  # and with it all that continues it
        left = content.chain[keep:] if self.virtual else []
        del content.chain[keep:], content.tokens[tokens:], content.digests[tokens:]
        for node in left:
            node.doubtful |= {g for g in self.windows if g in node.parts and not self.is_needed(node, g)}
        super().truncate(handle, tokens)

    def fork(self, parent: int, child: int) -> None:
        super().fork(parent, child)
        old = self.contents[parent]
        held = self.sequences[parent][self.main]
        ahead = old.state_ahead or held.tokens > held.committed
        self.contents[child] = Content(old.root, old.tokens[:], old.digests[:], old.chain[:], ahead)
        for node in old.chain:
            node.users += 1

    def free(self, handle: int) -> None:
        for node in self.contents.pop(handle).chain:
            node.users -= 1
        super().free(handle)

    def snapshot(self, handle: int) -> None:
        self.contents[handle].chain[-1].state = self.sequences[handle][self.fixed[0]].writers[0]

    def can_snapshot(self, handle: int) -> bool:
        known = len(self.contents[handle].tokens)
        reserved = self.sequences[handle][self.main].tokens
        whole = known == reserved > 0 and known % self.block_tokens == 0
        return bool(self.fixed and self.shares and whole and not self.contents[handle].state_ahead)

    def clear_cache(self) -> int:
        """Forgets what nobody uses or pins, also what windows have passed, or hold for the end of a sequence that was cut
        there; returns how many blocks nobody used."""
        before = self.cached_blocks()
        for node in list(self.nodes()):
            for g in self.windows:
                if g in node.parts and not self.is_needed(node, g):
                    for piece in node.parts.pop(g):
                        piece.content = None
            if node.parent is not None and not (node.users or node.pins):
                node.parent.children.pop(node.tokens, None)
        return before

    def copy(self) -> Model:
        """For questions about memory alone: what is published stays behind."""
        twin = super().copy()
        twin.__class__ = MemoryOnly
        return twin

    def nodes(self) -> Iterator[Node]:
        for root in self.roots.values():
            for child in root.children.values():
                yield from every(child)


def every(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children.values():
        yield from every(child)
