"""The virtual clock: exact times, in the order of the calls."""

from __future__ import annotations

import random
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from kvmem import SpecError
from kvmem.plan.clock import Clock, Link, Work


def test_a_resource_works_in_order_and_waits_for_what_it_needs() -> None:
    clock = Clock()
    load = clock.run("link", 3, name="load")
    first = clock.run("gpu", Fraction(1, 3))
    second = clock.run("gpu", 2, after=[load], name="needs the load")
    assert load == Work("load", "link", Fraction(0), Fraction(3))
    assert (first.start, first.end) == (0, Fraction(1, 3))
    assert (second.start, second.end) == (3, 5)
    assert clock.now == 5
    assert (clock.busy("gpu"), clock.stall("gpu"), clock.idle("gpu")) == (
        Fraction(7, 3),
        Fraction(8, 3),
        Fraction(8, 3),
    )
    assert (clock.busy("link"), clock.stall("link"), clock.idle("link")) == (3, 0, 2)
    assert (clock.busy("disk"), clock.stall("disk"), clock.idle("disk")) == (0, 0, 5)
    assert clock.critical_path() == [load, second]
    assert clock.work == [load, first, second]


def test_an_empty_clock() -> None:
    clock = Clock()
    assert (clock.now, clock.critical_path(), clock.work) == (0, [], [])


@pytest.mark.parametrize("load", [0, 1, Fraction(7, 2), 4, Fraction(9, 2), 100])
def test_what_a_prefetch_leaves_of_a_load(load: Fraction) -> None:
    """PRESERVE's formula: the stall is what the load takes beyond the window."""
    clock = Clock()
    clock.run("gpu", 4, name="collective")
    clock.run("gpu", 1, after=[clock.run("link", load)])
    assert clock.stall("gpu") == max(0, load - 4)
    assert clock.now == max(4, load) + 1


def test_a_float_counts_as_the_fraction_that_it_is() -> None:
    clock = Clock()
    for _ in range(10):
        clock.run("gpu", 0.1)
    assert clock.now == 10 * Fraction(0.1) != 1
    assert clock.run("gpu", np.float32(0.5)).seconds == Fraction(1, 2)
    assert clock.run("gpu", np.int64(2)).seconds == 2


def test_times_are_those_of_the_longest_path(seed: int) -> None:
    """Against an evaluation that knows nothing of the clock: the longest path to each work, through all that it needs
    and through its predecessor on the resource."""
    draw = random.Random(seed)
    clock, needs = Clock(), list[list[int]]()
    for i in range(200):
        resource = draw.choice("abc")
        after = draw.sample(range(i), min(i, draw.randrange(4)))
        seconds = Fraction(draw.randrange(5), draw.randrange(1, 7))
        before = [j for j in range(i) if clock.work[j].resource == resource][-1:]
        clock.run(resource, seconds, after=[clock.work[j] for j in after], name=str(seconds))
        needs.append(after + before)
    ends: list[Fraction] = []
    for work, mine in zip(clock.work, needs, strict=True):
        ends.append(Fraction(work.name) + max((ends[j] for j in mine), default=Fraction(0)))
    assert [work.end for work in clock.work] == ends
    path = clock.critical_path()
    assert path[0].start == 0
    assert path[-1].end == clock.now == sum(work.seconds for work in path)
    assert all(a.end == b.start for a, b in pairwise(path))
    for resource in "abc":
        mine = [work for work in clock.work if work.resource == resource]
        assert clock.busy(resource) + clock.stall(resource) == mine[-1].end


@pytest.mark.parametrize("seconds", [-1, -0.5, float("nan"), float("inf"), "1", None, True])
def test_a_time_that_is_none_changes_nothing(seconds: float) -> None:
    clock = Clock()
    kept = clock.run("gpu", 1)
    with pytest.raises(SpecError, match="seconds"):
        clock.run("gpu", seconds)
    assert (clock.work, clock.now) == ([kept], 1)


def test_work_of_another_clock_is_refused() -> None:
    clock, other = Clock(), Clock()
    for wrong in (other.run("gpu", 1), Work("", "gpu", Fraction(0), Fraction(1)), None):
        with pytest.raises(SpecError, match="of this clock"):
            clock.run("gpu", 1, after=[wrong])  # type: ignore[list-item]
    with pytest.raises(SpecError, match="resource"):
        clock.run("", 1)
    assert clock.work == []


def test_links() -> None:
    link = Link("pcie", 25e9, latency_seconds=Fraction(1, 100_000))
    assert link.seconds(50_000_000_000) == 2 + Fraction(1, 100_000)
    assert link.seconds(0, transfers=0) == 0
    assert link.seconds(0, transfers=3) == Fraction(3, 100_000)
    for rate in (0, -1, 0.0, float("nan"), float("inf"), "fast", None, True):
        with pytest.raises(SpecError, match="pcie: bytes_per_second"):
            Link("pcie", rate)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="latency"):
        Link("pcie", 1, latency_seconds=-1)
    with pytest.raises(SpecError, match="bytes"):
        link.seconds(-1)
