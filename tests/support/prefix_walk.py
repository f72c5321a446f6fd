"""Random programs of prefix sharing: one call at a time, valid or not, on small vocabularies, so that hits, partial hits
and branches are frequent."""

from __future__ import annotations

import random

from lockstep_prefix import NO_ROOT, PrefixLockstep
from reference_prefix import Root

ROOTS: list[Root] = [NO_ROOT, NO_ROOT, NO_ROOT, ("salt", None), ("salt", "adapter"), (None, "adapter")]


def root(walk: random.Random, size: int) -> Root:
    """Mostly one of these alone; else with keys of images, from few places, so that prompts agree in some."""
    chosen, places = walk.choice(ROOTS), [0, 1, size - 1, size, size + size // 2, 3 * size]
    kind = walk.random()
    if kind < 0.6:
        return chosen
    if kind < 0.7:
        return (*chosen, walk.choice("AB"))
    count = walk.choice([1, 1, 2])
    return (*chosen, tuple((place, walk.choice("AB")) for place in sorted(walk.sample(sorted(set(places)), count))))


#: How often each call is made.
CALLS = {
    "open": 6, "append": 6, "decode": 4, "count": 1, "extend": 1, "truncate": 3, "fork": 2, "free": 4, "free all": 0.2,
    "match": 2, "pin": 1, "pin tokens": 0.5, "unpin": 1.5, "retain": 0.5, "snapshot": 2, "clear": 0.1, "trim": 0.3,
    "memory": 0.5, "compact": 0.7,
}  # fmt: skip
#: Of these, the ones that take memory away, or could: not while it is to be plentiful.
HARSH = ("trim", "memory")


class Author:
    """Makes up prompts: mostly beginnings of earlier ones with another end. Few places in a block have a choice, so that
    a block has few successors and equal blocks turn up by chance, too."""

    def __init__(self, walk: random.Random, block_tokens: int, longest: int) -> None:
        self.walk, self.size, self.longest = walk, block_tokens, longest
        # Half of them retain for ever: what has a time to live is moved by the clock, and no digest tells of it.
        self.ttls = [None, 0.001, 100] if walk.random() < 0.5 else [None]
        self.prompts: list[list[int]] = [[]]

    def tokens(self, start: int, n: int) -> list[int]:
        choices = (0, self.size * 3 // 4)
        return [self.walk.randrange(3) if i % self.size in choices else 7 for i in range(start, start + n)]

    def prompt(self) -> list[int]:
        walk = self.walk
        base = walk.choice(self.prompts)
        keep = base[: walk.choice([len(base), walk.randint(0, len(base)), len(base) // self.size * self.size])]
        n = walk.choice([0, 1, self.size, walk.randint(0, 3 * self.size)])
        made = (keep + self.tokens(len(keep), n))[: self.longest]
        if len(self.prompts) < 30:
            self.prompts.append(made)
        else:
            self.prompts[walk.randrange(30)] = made
        return made


def author(pair: PrefixLockstep, walk: random.Random) -> Author:
    return Author(walk, pair.model.block_tokens, pair.alloc.max_tokens)


def step(pair: PrefixLockstep, walk: random.Random, writer: Author, without: tuple[str, ...] = ()) -> str:
    """One random call; returns its name."""
    calls = [call for call in CALLS if not (pair.plentiful and call in HARSH) and call not in without]
    (call,) = walk.choices(calls, [CALLS[call] for call in calls])
    handles = pair.handles
    if call == "open" or not handles:
        _open(pair, walk, writer)
        return "open"
    handle = walk.choice(handles)
    held = pair.model.sequences[handle][pair.model.main]
    if call in ("append", "decode"):
        # What is reserved but not committed has no tokens yet; ids are committed for as much as there is.
        n = 1 if call == "decode" else walk.choice([1, writer.size, walk.randint(0, 3 * writer.size)])
        n = min(n, pair.model.room_tokens(handle))
        if pair.extend({handle: n}):
            pair.commit_ids({handle: writer.tokens(held.committed, n)})
    elif call == "count":
        pair.write(handles)
        pair.commit({handle: walk.randint(0, held.tokens - held.committed)})
    elif call == "extend":
        pair.extend({h: walk.choice([0, 1, 5]) for h in walk.sample(handles, walk.randint(1, len(handles)))})
    elif call == "truncate":
        pair.truncate(handle, walk.choice([held.tokens, held.committed, walk.randint(0, held.tokens)]))
    elif call == "fork":
        pair.fork(handle)
    elif call.startswith("free"):
        pair.free(handles if call == "free all" else [handle])
    else:
        _rest(pair, walk, writer, call, handle)
    return call


def _open(pair: PrefixLockstep, walk: random.Random, writer: Author) -> None:
    prompt = writer.prompt()
    handle = pair.open(prompt, root(walk, writer.size))
    if handle >= 0 and walk.random() < 0.8:
        _compute(pair, walk, handle, prompt)


def _compute(pair: PrefixLockstep, walk: random.Random, handle: int, prompt: list[int]) -> None:
    """The rest of a prompt, in one or two pieces; a layout with a fixed state keeps it at the end of a whole block."""
    done = pair.seqs[handle].num_cached_tokens
    cut = walk.choice([len(prompt), len(prompt) // pair.model.block_tokens * pair.model.block_tokens])
    for end in (max(done, cut), len(prompt)):
        done = pair.model.sequences[handle][pair.model.main].committed
        if end > done and not pair.append(handle, prompt[done:end]):
            return
        if pair.model.can_snapshot(handle):
            pair.snapshot(handle)
            if walk.random() < 0.3:
                _run_ahead(pair, walk, handle)


def _run_ahead(pair: PrefixLockstep, walk: random.Random, handle: int) -> None:
    """The model runs over tokens that are not committed, and then somebody asks for a snapshot without them."""
    if not pair.extend({handle: min(walk.randint(1, 3), pair.model.room_tokens(handle))}):
        return
    pair.write([handle])
    child = pair.fork(handle)
    pair.truncate(handle, pair.model.sequences[handle][pair.model.main].committed)
    for stale in (handle, child, child if child < 0 else pair.fork(child)):
        if stale >= 0:
            pair.snapshot(stale)
            if stale != handle:
                pair.free([stale])


def _rest(pair: PrefixLockstep, walk: random.Random, writer: Author, call: str, handle: int) -> None:
    content = pair.model.contents[handle]
    if call == "match":
        pair.match(writer.prompt(), root(walk, writer.size))
    elif call == "pin" and len(pair.pins) < 3 and content.chain:
        pair.pin(handle, walk.choice([None, walk.randint(writer.size, len(content.tokens))]))
    elif call == "pin tokens" and len(pair.pins) < 3:
        prompt = writer.prompt()
        if len(prompt) >= writer.size:
            pair.pin_tokens(prompt, root(walk, writer.size))
    elif call == "unpin" and pair.pins:
        pair.unpin(walk.randrange(len(pair.pins)))
    elif call == "retain":
        pair.seqs[handle].retain(0, None, priority=walk.choice([0, 30, 50, 90]), ttl=walk.choice(writer.ttls))
    elif call == "snapshot":
        pair.snapshot(handle)
    elif call == "clear":
        pair.clear_cache()
    elif call == "trim":
        pair.trim()
    elif call == "memory":
        pair.set_memory(walk.choice([10, 25, 60, 200]))
    elif call == "compact":
        pair.compact(walk.choice([None, 1, 5 * pair.alloc.pool.page_bytes]))
