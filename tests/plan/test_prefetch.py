"""Plans of prefetches: what fits a window, in which order, and what that saves on the virtual clock."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from prefetch_world import bytes_in_order, grow, make

from kvmem import SpecError
from kvmem.allocator.prefetch import Ranges
from kvmem.plan import play, prefetch
from kvmem.plan.clock import Clock


def memory(size: int, address: int = 1 << 20) -> Ranges:
    return Ranges(np.array([[address, size, 1, size]], np.int64)[: size > 0])


@pytest.mark.parametrize("collective", [0, Fraction(1, 50_000), Fraction(3, 100_000)])
@pytest.mark.parametrize("cache", [0, 8_000_000, 104_000_000])
@pytest.mark.parametrize("wanted", [0, 1, 5_000_000, 70_000_000])
def test_the_gain_is_that_of_the_model(wanted: int, cache: int, collective: Fraction) -> None:
    """PRESERVE's model: min(w, C2, t_c * H) bytes are hidden. Exact, so within its 1 %."""
    rate, layers = 1_600_000_000_000, 3
    args: dict[str, Any] = dict(window_seconds=collective, bytes_per_second=rate, budget_bytes=cache)
    windows = prefetch([memory(wanted)] * layers, **args)
    hidden = min(wanted, cache, int(collective * rate))
    assert [w.num_bytes for w in windows] == [hidden] * layers
    on, off = Clock(), Clock()
    stalls = play(on, windows, bytes_per_second=rate, compute_seconds=Fraction(1, 1000))
    play(off, windows, bytes_per_second=rate, compute_seconds=Fraction(1, 1000), prefetches=False)
    assert off.now == layers * (collective + Fraction(wanted, rate) + Fraction(1, 1000))
    assert on.now == layers * (collective + Fraction(wanted - hidden, rate) + Fraction(1, 1000))
    assert stalls == [Fraction(wanted - hidden, rate)] * layers
    if cache == 0:
        assert on.now == off.now and all(not w.parts for w in windows)


def test_a_stall_is_what_the_window_does_not_hide(backend: str, rng: random.Random) -> None:
    """Layers of real read sets, brought one ahead from a tier: max(0, load - window) each."""
    alloc = make(backend)
    sequences = [alloc.sequence() for _ in range(3)]
    for sequence in sequences:
        grow(sequence, rng.randrange(20, 90), rng)
    rate = 1_000_000
    reads = [alloc.read_set(layer, sequences) for layer in (0, 1, 0, 1)]
    loads = [Fraction(r.num_bytes, rate) for r in reads]
    times = [f * load for f, load in zip((Fraction(1, 2), 1, 2, 0), loads, strict=True)]
    clock = Clock()
    windows = prefetch(reads, window_seconds=times, bytes_per_second=rate, budget_bytes="1GiB")
    assert play(clock, windows, bytes_per_second=rate) == [max(0, a - b) for a, b in zip(loads, times, strict=True)]
    assert play(Clock(), windows, bytes_per_second=rate, prefetches=False) == loads


def test_windows_hold_the_first_bytes_in_order_and_none_twice(rng: random.Random) -> None:
    """Against a list of addresses, with ranges that overlap each other in every way."""
    for _ in range(40):
        wanted = [
            [
                Ranges(np.array([(rng.randrange(150), rng.randrange(1, 7), rng.randrange(1, 6), 8)], np.int64))
                for _ in range(rng.randrange(4))
            ]
            for _ in range(3)
        ]
        extra = [[memory(rng.randrange(1, 30), rng.randrange(200))], None, []]
        seconds = [Fraction(rng.randrange(100), 10) for _ in range(3)]
        budget = rng.randrange(80)
        windows = prefetch(wanted, extra=extra, window_seconds=seconds, bytes_per_second=10, budget_bytes=budget)
        for window, reads, before, time in zip(windows, wanted, extra, seconds, strict=True):
            order = list(dict.fromkeys(itertools.chain(*map(bytes_in_order, [*(before or []), *reads]))))
            found = list(itertools.chain(*map(bytes_in_order, window.parts)))
            assert found == order[: min(budget, int(10 * time))]
            assert window.wanted_bytes == len(order) and window.num_bytes == len(found)


def test_weights_and_read_sets(backend: str, rng: random.Random) -> None:
    """A tied weight counts once; what is read first is brought first; a layer's own bytes are cut within a token."""
    alloc = make(backend)
    sequence = alloc.sequence()
    grow(sequence, 50, rng)
    weight, reads = torch.zeros(100, dtype=torch.uint8), alloc.read_set(1, [sequence])
    args: dict[str, Any] = dict(window_seconds=1, bytes_per_second=1 << 30)
    (window,) = prefetch([[reads, weight, reads]], extra=[[weight, weight.view(10, 10)]], budget_bytes=777, **args)
    assert window.wanted_bytes == 100 + reads.num_bytes
    found = list(itertools.chain(*map(bytes_in_order, window.parts)))
    assert found == [*range(weight.data_ptr(), weight.data_ptr() + 100), *bytes_in_order(reads)[:677]]
    (whole,) = prefetch([reads], budget_bytes=reads.num_bytes, **args)
    assert bytes_in_order(whole.parts[0]) == bytes_in_order(reads)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bytes_per_second=0), "bytes_per_second: got 0; a rate is"),
        (dict(bytes_per_second=-1), "bytes_per_second"),
        (dict(bytes_per_second=float("nan")), "bytes_per_second"),
        (dict(window_seconds=-1), "window_seconds: got -1"),
        (dict(window_seconds=[1, 1, 1]), "window_seconds: got 3; there are 2 windows"),
        (dict(window_seconds=float("inf")), "window_seconds"),
        (dict(budget_bytes=-5), "budget_bytes"),
        (dict(budget_bytes="much"), "budget_bytes"),
        (dict(extra=[None]), "extra: got 1; there are 2"),
        (dict(extra=[None, 3]), "extra"),
        (dict(read_sets=["text", None]), "read_sets: got"),
        (dict(read_sets=[torch.zeros(4, 4)[:, :2], None]), "dense"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = dict(read_sets=[None, memory(5)], window_seconds=1, bytes_per_second=1, budget_bytes=8)
    assert [w.num_bytes for w in prefetch(**args)] == [0, 1]
    with pytest.raises(SpecError, match=message):
        prefetch(**args | change)
    assert prefetch([], window_seconds=1, bytes_per_second=1, budget_bytes=0) == []
