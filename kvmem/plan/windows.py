"""What to prefetch while the memory is idle, after PRESERVE (arXiv:2501.08192).

In tensor-parallel decoding, a device's memory does nothing while an all-reduce runs. Each such window can bring what is
read after it into the cache: the weights of the next part of the model, and the KV of its sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import TypeAlias, cast

import torch

from kvmem.allocator.prefetch import BlockSet, Ranges, Window
from kvmem.arguments import brief, parse_bytes
from kvmem.errors import SpecError
from kvmem.plan.clock import Clock, Number, Work, exact_rate, exact_seconds

__all__ = ["play", "prefetch"]

#: What one window can bring: nothing, one thing, or several in the order in which they are read.
Reads: TypeAlias = "Ranges | BlockSet | torch.Tensor | Iterable[Ranges | BlockSet | torch.Tensor] | None"


def prefetch(
    read_sets: Sequence[Reads],
    *,
    extra: Sequence[Reads] = (),
    window_seconds: Number | Sequence[Number],
    bytes_per_second: Number,
    budget_bytes: int | str,
) -> list[Window]:
    """Return what each window prefetches, for ``Allocator.prefetch``: of what is read after it, the first
    ``min(budget_bytes, window_seconds * bytes_per_second)`` bytes, no byte twice.

    read_sets: for each window, what is read after it and before the next one: ``Allocator.read_set``, ``Ranges``,
        ``Allocator.block_set``, tensors, or several of them in order; None for nothing.
    extra: for each window, what is read before that, such as weights: tensors or ``Ranges``.
    window_seconds: of each window, or of all. bytes_per_second: above 0, of the memory that is read: for blocks, of the
        link from the tier. budget_bytes: of the cache in front of it, an int or a text such as ``"24MiB"``. Measure it:
        less than a cache's size is usable, and more evicts what it has just brought. For blocks, room in the place
        that they go to.

    Ranges are cut at any byte, blocks are brought whole and in one window only, since they stay where they were
    brought. ``SpecError`` for times below 0, rates that are not above 0, and lists of different lengths.
    """
    if not isinstance(read_sets, (list, tuple)):
        raise SpecError(f"read_sets: got {brief(read_sets)}; must be a list, with an entry for each window")
    rate, count = exact_rate("bytes_per_second", bytes_per_second), len(read_sets)
    budget = parse_bytes("budget_bytes", budget_bytes) if budget_bytes != 0 else 0
    seconds = _each("window_seconds", window_seconds, count)
    if extra and len(extra) != count:
        raise SpecError(f"extra: got {len(extra)}; there are {count} windows")
    windows, blocks = list[Window](), list[BlockSet]()
    for i, reads in enumerate(read_sets):
        wanted = [*_listed("extra", extra[i] if extra else None), *_listed("read_sets", reads)]
        capacity = min(budget, math.floor(seconds[i] * rate))
        windows.append(_window(wanted, blocks, capacity, seconds[i]))
        blocks += [part for part in windows[-1].parts if isinstance(part, BlockSet)]
    return windows


def _each(field: str, given: Number | Sequence[Number], count: int) -> list[Fraction]:
    """Return a time for each window."""
    times = list(given) if isinstance(given, Sequence) else [given] * count
    if len(times) != count:
        raise SpecError(f"{field}: got {len(times)}; there are {count} windows")
    return [exact_seconds(field, one) for one in times]


def _listed(field: str, reads: Reads) -> list[Ranges | BlockSet]:
    if reads is None:
        return []
    found: list[object] = [*reads] if isinstance(reads, Iterable) and not isinstance(reads, torch.Tensor) else [reads]
    parts = [Ranges.of(one) if isinstance(one, torch.Tensor) else one for one in found]
    for part in parts:
        if not isinstance(part, (Ranges, BlockSet)):
            raise SpecError(f"{field}: got {brief(part)}; must be a read set, block set, Ranges, tensor, or several")
    return cast(list[Ranges | BlockSet], parts)


def _window(wanted: list[Ranges | BlockSet], before: list[BlockSet], capacity: int, seconds: Fraction) -> Window:
    parts, distinct, left, total = list[Ranges | BlockSet](), list[Ranges | BlockSet](), capacity, 0
    for part in wanted:
        new = part.without([*before, *distinct])
        distinct.append(new)
        total += new.num_bytes
        taken = new.cut(left)
        left -= taken.num_bytes
        if taken.num_bytes:
            parts.append(taken)
        if taken.num_bytes < new.num_bytes:  # what comes later is not read before the rest of this
            left = 0
    return Window(tuple(parts), seconds, capacity, total)


def play(
    clock: Clock,
    windows: Sequence[Window],
    *,
    bytes_per_second: Number,
    compute_seconds: Number | Sequence[Number] = 0,
    prefetches: bool = True,
) -> list[Fraction]:
    """Run a plan on ``clock`` and return the stall after each window: how long the reads that were not prefetched hold
    up the computation. Each window runs on the resource "link", its prefetch beside it on "memory", then the rest of
    the reads on "memory", then the computation (``compute_seconds`` for each, or for all) on "compute".

    prefetches: False for the same without them.
    """
    rate = exact_rate("bytes_per_second", bytes_per_second)
    times = _each("compute_seconds", compute_seconds, len(windows))
    last, stalls = list[Work](), list[Fraction]()
    for i, window in enumerate(windows):
        brought = window.num_bytes if prefetches else 0
        collective = clock.run("link", window.seconds, after=last, name=f"window {i}")
        ready = clock.run("memory", brought / rate, after=last, name=f"prefetch {i}")
        rest = clock.run("memory", (window.wanted_bytes - brought) / rate, after=[collective, ready], name=f"read {i}")
        stalls.append(rest.end - collective.end)
        last = [clock.run("compute", times[i], after=[rest], name=f"compute {i}")]
    return stalls
