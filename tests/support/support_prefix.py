"""What the tests of prefix sharing share: texts, worlds, and sequences grown from them."""

from __future__ import annotations

from collections.abc import Callable

from lockstep_prefix import NO_ROOT, PrefixLockstep
from reference_prefix import Root

import kvmem
from kvmem.allocator.ops import Op

Make = Callable[..., kvmem.Allocator]


def text(n: int, seed: int = 1) -> list[int]:
    """``n`` token ids that differ from place to place and from seed to seed."""
    return [(i * 7919 + seed * 104729) % 50_000 for i in range(n)]


def world(make: Make, *, plentiful: bool = True, **options: object) -> PrefixLockstep:
    options = {"max_tokens": 1500, "max_sequences": 24, "record_ops": True} | options
    alloc = make(**options)
    partial = bool(options.get("partial_reuse", True))
    return PrefixLockstep(alloc, contents=alloc.device.type != "meta", plentiful=plentiful, partial_reuse=partial)


def grow(pair: PrefixLockstep, tokens: list[int], root: Root = NO_ROOT) -> int:
    """A sequence of these tokens, with a snapshot after the last whole block where the layout has a fixed state."""
    handle = pair.open(tokens, root)
    go_on(pair, handle, tokens)
    return handle


def go_on(pair: PrefixLockstep, handle: int, tokens: list[int]) -> None:
    size = pair.model.block_tokens
    for end in (len(tokens) // size * size, len(tokens)):
        done = pair.model.sequences[handle][pair.model.main].committed
        if end > done:
            assert pair.append(handle, tokens[done:end])
        if pair.model.can_snapshot(handle):
            pair.snapshot(handle)


def agree(pair: PrefixLockstep) -> None:
    pair.agree()
    if pair.contents:
        pair.contents_agree()


def cached(pair: PrefixLockstep, handle: int) -> int:
    return pair.seqs[handle].num_cached_tokens


def take(pair: PrefixLockstep) -> list[Op]:
    """The ops since the last look; the second pair of books follows them."""
    ops = pair.alloc.take_ops()
    if pair.pages is not None:
        pair.pages.follow_ops(ops)
    return ops
