"""Random traffic for an eviction policy: chains that share prefixes, several in use at once, evicted on demand. Every
answer of the policy is checked against the rules of csrc/eviction/policy.h."""

from __future__ import annotations

import random
from collections import OrderedDict

IN_USE, RELEASED = "in use", "released"


class World:
    """Drives ``policy`` with ``ids`` blocks of room. Content is a chain of words; its key is a hash of the chain."""

    def __init__(self, policy, rng: random.Random, *, ids: int, live: int = 4, leaves_first: bool = False) -> None:
        self.policy, self.rng, self.ids, self.live = policy, rng, ids, live
        self.leaves_first = leaves_first
        policy.reserve(ids)
        self.free = list(range(ids))
        self.state: dict[int, str] = {}
        self.users: dict[int, int] = {}
        self.content: dict[tuple[int, ...], int] = {}  # chain -> id
        self.chain: dict[int, tuple[int, ...]] = {}
        self.open: list[list[int]] = []
        self.released: OrderedDict[int, None] = OrderedDict()  # the LRU order, by the book
        self.hits = self.evictions = 0

    def children(self, block: int) -> int:
        chain = self.chain[block]
        return sum(other[:-1] == chain for other in self.content)

    def victim(self) -> int:
        named = self.policy.victim()
        assert named == self.policy.victim(), "the answer changed without a call in between"
        if not self.released:
            assert named == -1
        else:
            assert self.state.get(named) == RELEASED
            if self.leaves_first and self.children(named):
                assert all(self.children(block) for block in self.released), "a released leaf was passed over"
        return named

    def evict(self, block: int) -> None:
        self.policy.evict(block)
        del self.state[block], self.released[block], self.content[self.chain.pop(block)]
        self.free.append(block)
        self.evictions += 1

    def request(self, chain: tuple[int, ...]) -> None:
        """One more sequence; the oldest ends when there are ``live`` already."""
        if len(self.open) == self.live:
            self.end(0)
        blocks: list[int] = []
        for length in range(1, len(chain) + 1):
            block = self.content.get(chain[:length])
            if block is None:
                break
            if self.state[block] == RELEASED:
                self.policy.use(block)
                del self.released[block]
            self.policy.hit(block)
            self.state[block] = IN_USE
            self.users[block] += 1
            self.hits += 1
            blocks.append(block)
        for length in range(len(blocks) + 1, len(chain) + 1):
            if not self.free:
                if (named := self.victim()) < 0:
                    break
                self.evict(named)
            block = self.free.pop()
            self.policy.insert(block, hash(chain[:length]) % 2**64, blocks[-1] if blocks else -1)
            self.state[block], self.users[block] = IN_USE, 1
            self.content[chain[:length]], self.chain[block] = block, chain[:length]
            blocks.append(block)
        self.open.append(blocks)

    def end(self, index: int) -> None:
        for block in reversed(self.open.pop(index)):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.policy.release(block)
                self.state[block] = RELEASED
                self.released[block] = None

    def take_back(self, count: int) -> None:
        """Evicts up to ``count`` blocks and takes that back: the same ones must be named again, in the same order."""
        named: list[int] = []
        while len(named) < count and (block := self.policy.victim()) >= 0:
            named.append(block)
            self.policy.evict(block)
        for block in reversed(named):
            self.policy.restore(block)
            assert self.policy.victim() == block
        for block in named:
            assert self.policy.victim() == block
            self.policy.evict(block)
        for block in reversed(named):
            self.policy.restore(block)

    def random_chain(self) -> tuple[int, ...]:
        """Few first words, many last ones: prefixes are shared, and a third of all chains never come again."""
        length = self.rng.randint(1, 6)
        chain = tuple(int(self.rng.paretovariate(0.7)) % (4 * depth + 3) for depth in range(length))
        return chain if self.rng.random() < 0.66 else (*chain, self.rng.randrange(2**40))

    def step(self) -> None:
        action = self.rng.random()
        if action < 0.75:
            self.request(self.random_chain())
        elif action < 0.9 and self.open:
            self.end(self.rng.randrange(len(self.open)))
        else:
            self.take_back(self.rng.randint(1, 5))

    def drain(self) -> list[int]:
        """Ends everything and evicts it: every block must be named, once. Returns the order."""
        while self.open:
            self.end(0)
        order: list[int] = []
        while (named := self.victim()) >= 0:
            self.evict(named)
            order.append(named)
        assert not self.content
        return order


class Looker:
    """Puts a policy's released blocks in use and takes that back, as a call does that looks for what to evict and
    passes some over, and one that fails. Blocks stand as chains of ``(parent, children)``; no time goes by, unless it
    ``inserts``."""

    def __init__(self, policy, rng: random.Random, *, chains: int, length: int, inserts: bool = False) -> None:
        self.policy, self.rng, self.inserts = policy, rng, inserts
        policy.reserve(chains * length + 100)  # as many may come and go in a look
        blocks = [(chain * length + i, i) for chain in range(chains) for i in range(length)]
        for block, i in blocks:
            policy.insert(block, 1000 + block, block - 1 if i else -1)
        for first in rng.sample(range(chains), chains):
            for i in reversed(range(length)):
                policy.release(first * length + i)
        self.released = {block for block, _ in blocks}

    def order(self) -> list[int]:
        """In which blocks would go. All are evicted for that, and come back."""
        gone: list[int] = []
        while (block := self.policy.victim()) >= 0:
            self.policy.evict(block)
            gone.append(block)
        for block in reversed(gone):
            self.policy.restore(block)
        assert set(gone) == self.released
        return gone

    def look(self, count: int) -> None:
        """Inserts some, uses some of the next victims, or any blocks, and releases some of those; evicts others, and takes
        it all back, last first."""
        undo, released = [], set()
        for new in range(len(self.released), len(self.released) + count):
            if self.inserts and self.rng.random() < 0.2:
                self.policy.insert(new, self.rng.getrandbits(40), self.rng.choice([-1, *self.released]))
                undo.append((self.policy.undo_insert, new))
                if self.rng.random() < 0.5:
                    self.policy.release(new)
                    released.add(new)
                    undo.append((self.policy.undo_release, new))
            block = self.policy.victim()
            if block < 0 or block in released:
                break
            used = self.rng.random() < 0.6
            if used and self.rng.random() < 0.5:
                block = self.rng.choice(sorted(self.released - {b for _, b in undo}))
            (self.policy.use if used else self.policy.evict)(block)
            undo.append((self.policy.undo_use if used else self.policy.restore, block))
            if used and self.rng.random() < 0.3:
                self.policy.release(block)
                released.add(block)
                undo.append((self.policy.undo_release, block))
        for take_back, block in reversed(undo):
            take_back(block)
