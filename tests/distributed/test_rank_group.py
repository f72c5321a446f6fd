"""RankGroup over gloo: ranks stay equal; one that fails, dies or hangs stops all of them with one typed error."""

from __future__ import annotations

import os
import random
import signal
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ops_rank import digest
from rank_processes import make, run
from support_world import checked

import kvmem
from kvmem.distributed import RankGroup, rank_group

LONG = 300.0  # seconds, longer than the tests wait: what ends sooner was noticed, and did not time out


def lead(group: RankGroup, alloc: kvmem.Allocator, seed: int, steps: int) -> list[str]:
    """Requests that share prefixes, grow, are cut and end; returns the digest after each step, and sends it along."""
    rng, live, found = random.Random(seed), [], []
    stems = [[rng.randrange(500) for _ in range(200)] for _ in range(3)]
    for _ in range(steps):
        while len(live) < 4:
            prompt = rng.choice(stems)[: rng.randint(1, 200)] + [rng.randrange(500) for _ in range(rng.randint(1, 40))]
            live.append(seq := alloc.sequence(prompt))
            new = prompt[seq.num_cached_tokens :]
            seq.extend(len(new))
            seq.commit(new)
        for seq in live:
            if rng.random() < 0.8 and seq.num_tokens < 900:
                seq.extend(1)
                seq.commit([rng.randrange(500)])
        if rng.random() < 0.4:
            live.pop(rng.randrange(len(live))).free()
        if rng.random() < 0.2:
            live[0].truncate(rng.randint(1, live[0].num_tokens))
        found.append(digest(alloc))
        group.lead(found[-1].encode() * rng.choice([1, 100]))  # at most 64 and 6,400 bytes: one broadcast, or two
    return found


def equal_ranks(rank: int, backend: str, seed: int) -> Any:
    with make(backend, rank == 0) as alloc, RankGroup(alloc, timeout_seconds=60) as group:
        if rank == 0:
            return lead(group, alloc, seed, 12)
        found = []
        while (message := group.follow()) is not None:
            found.append(digest(alloc))
            assert message[:64].decode() == found[-1] and alloc.check() == []
        return found


def test_all_ranks_hold_the_same_after_each_step(backend: str, seed: int) -> None:
    found = run(3, equal_ranks, backend, seed)
    assert [status for status, _ in found] == ["done"] * 3, found
    assert len(found[0][1]) == 12 and found[1] == found[2] == found[0]


def until_it_stops(group: RankGroup, alloc: kvmem.Allocator, steps: int = 8) -> str:
    """The error with which the group stops, after which each call gives the same one."""
    with pytest.raises(kvmem.DeviceError) as caught:
        if group.leads:
            seq = alloc.sequence()
            for _ in range(steps):
                seq.extend(100)
                group.lead()
        else:
            while group.follow() is not None:
                pass
    with pytest.raises(kvmem.DeviceError) as again:
        group.lead() if group.leads else group.follow()
    assert str(again.value) == str(caught.value)
    group.close()
    assert alloc.check() == []
    return f"{group.step}: {caught.value}"


def a_driver_fails(rank: int, backend: str, place: int) -> str:
    options: dict[str, Any] = {}
    if rank == place:
        options["driver"] = driver = checked()
    with make(backend, rank == 0, **options) as alloc:
        group = RankGroup(alloc, timeout_seconds=LONG)
        if rank == place:
            driver.fail("map", 3, 719)
        return until_it_stops(group, alloc)


def test_a_rank_whose_driver_fails_stops_all_with_one_error(backend: str) -> None:
    found = run(3, a_driver_fails, backend, 1)
    assert [status for status, _ in found] == ["done"] * 3, found
    assert len({text for _, text in found}) == 1  # the same step, the same words
    assert "rank 1: DeviceError" in found[0][1] and "not applied everywhere" in found[0][1]


def the_leader_fails(rank: int, backend: str) -> Any:
    """Ranks 2 and 1 of three are a group, in which rank 2 leads."""
    own = torch.distributed.new_group([1, 2], timedelta(seconds=LONG), backend="gloo")
    if rank == 0:
        return None
    options: dict[str, Any] = {}
    if rank == 2:
        options["driver"] = driver = checked()
    with make(backend, rank == 2, **options) as alloc, RankGroup(alloc, group=own, leader=1) as group:
        if rank == 1:
            while group.follow() is not None:
                pass
            return digest(alloc)
        seq = alloc.sequence()
        seq.extend(300)
        group.lead()
        driver.fail("map", 1, 719)
        with pytest.raises(kvmem.DeviceError):
            seq.extend(600)
        with pytest.raises(kvmem.OutOfMemory):
            for _ in range(10):
                alloc.sequence().extend(1024)
        group.lead()  # what did succeed
        with pytest.raises(kvmem.SpecError, match="the other ranks follow"):
            group.follow()
        with pytest.raises(kvmem.SpecError, match="must be bytes"):
            group.lead(3)  # type: ignore[arg-type]
        return digest(alloc)


def test_what_fails_on_the_leader_changes_nothing_anywhere(backend: str) -> None:
    found = run(3, the_leader_fails, backend)
    assert [status for status, _ in found] == ["done"] * 3 and found[1] == found[2], found


def one_dies(rank: int, place: int, how: int, seconds: float) -> str:
    with make("paged", rank == 0) as alloc:
        group = RankGroup(alloc, timeout_seconds=seconds)
        if rank == place:

            def end(*_: object) -> None:
                if group.step >= 2 + (place > 0):
                    os.kill(os.getpid(), how)

            name = "take_ops" if place == 0 else "apply"  # in the middle of the third step
            inner = getattr(alloc, name)
            setattr(alloc, name, lambda *a: (end(), inner(*a))[1])
        return until_it_stops(group, alloc)


@pytest.mark.parametrize("place", [0, 1])
def test_a_rank_that_is_killed_in_the_middle_of_a_step_stops_the_others(place: int) -> None:
    found = run(3, one_dies, place, int(signal.SIGKILL), LONG, dead=place)
    for rank, (status, text) in enumerate(found):
        if rank != place:
            assert status == "done" and "is gone" in text, found
            assert int(text.split(":")[0]) in (2, 3)  # it never went past the step that was not agreed on


def test_a_rank_that_hangs_stops_the_others_after_the_timeout() -> None:
    found = run(3, one_dies, 1, int(signal.SIGSTOP), 1.0, dead=1)
    assert [status for status, _ in found] == ["done", "dead", "done"], found
    assert all("did not answer in time" in found[rank][1] for rank in (0, 2))


def never_comes(rank: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with make("paged", rank == 0) as alloc, pytest.raises(kvmem.DeviceError) as caught:
        RankGroup(alloc, timeout_seconds=2.0)
    return str(caught.value)


def test_a_rank_that_dies_before_the_group_is_made_stops_the_others() -> None:
    found = run(3, never_comes, dead=1)
    assert all(status == "done" and "a rank is gone" in text for status, text in (found[0], found[2])), found


def breaks_off(rank: int, place: int, name: str, error: type[BaseException]) -> str:
    """``error`` comes out of a part of the second step on one rank, where its ops may be lost already."""
    with make("paged", rank == 0) as alloc:
        group, inner = RankGroup(alloc, timeout_seconds=LONG), getattr(rank_group, name)

        def fail(*args: Any) -> Any:
            if group.step >= 1:
                raise error("breaks off")
            return inner(*args)

        if rank == place:
            setattr(rank_group, name, fail)
        with pytest.raises((kvmem.DeviceError, KeyboardInterrupt)) as caught:
            for _ in range(9):
                if group.leads:
                    alloc.sequence().extend(3)
                    group.lead()
                else:
                    group.follow()
        with pytest.raises((kvmem.DeviceError, kvmem.SpecError)):  # it does not go on without what was lost
            group.lead() if group.leads else group.follow()
        return type(caught.value).__name__


@pytest.mark.parametrize(("place", "name"), [(0, "pack"), (1, "unpack")])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_step_that_breaks_off_stops_all(place: int, name: str, error: type[BaseException]) -> None:
    found = run(2, breaks_off, place, name, error)
    own = "KeyboardInterrupt" if error is KeyboardInterrupt else "DeviceError"
    assert found[place] == ("done", own) and found[1 - place] == ("done", "DeviceError"), found


def reads_a_damaged_head(rank: int) -> str:
    with make("paged", rank == 0) as alloc:
        group = RankGroup(alloc, timeout_seconds=LONG)
        if group.leads:
            pack = rank_group._HEAD.pack
            rank_group._HEAD = SimpleNamespace(  # type: ignore[misc,assignment]
                pack=lambda step, kind, check, ops, message: pack(step, kind, check, ops, 2**62), size=32
            )
        return until_it_stops(group, alloc)


def test_a_damaged_length_stops_all() -> None:
    found = run(2, reads_a_damaged_head)
    assert [status for status, _ in found] == ["done"] * 2 and "broke off" in found[1][1], found


def code_around_it_fails(rank: int, place: int) -> str:
    """Ends one group by an error of the caller's own on one rank; a new one of new allocators works."""
    found = ""
    with make("paged", rank == 0) as alloc:
        try:
            with RankGroup(alloc, timeout_seconds=LONG) as group:
                for step in range(4):
                    if group.leads:
                        alloc.sequence().extend(3)
                        group.lead()
                    else:
                        assert group.follow() == b""
                    if rank == place and step == 1:
                        raise ZeroDivisionError("not our concern")
        except (kvmem.DeviceError, ZeroDivisionError) as error:
            found = type(error).__name__ + str(error)
    with make("virtual", rank == 0) as alloc, RankGroup(alloc, timeout_seconds=LONG) as group:
        if group.leads:
            alloc.sequence().extend(100)
            group.lead(b"message")
        else:
            assert group.follow() == b"message" and group.follow() is None
        assert [sequence.num_tokens for sequence in alloc.sequences()] == [100]
    return found


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_of_the_caller_ends_the_group_and_a_new_one_works(place: int) -> None:
    found = run(3, code_around_it_fails, place)
    assert [status for status, _ in found] == ["done"] * 3, found
    for rank, (_, text) in enumerate(found):
        assert text.startswith("ZeroDivisionError" if rank == place else "DeviceError"), text
        assert place or rank == 0 or "rank 0 has stopped: ZeroDivisionError: not our concern" in text


def others(rank: int) -> list[str]:
    found = []
    for leads, options in ((rank == 0, {"max_tokens": 512}), (False, {}), (True, {"open": True})):
        opened = options.pop("open", False)
        with make("paged", leads, **(options if rank else {})) as alloc:
            if opened and rank:
                alloc.sequence()
            with pytest.raises(kvmem.SpecError) as caught:
                RankGroup(alloc, timeout_seconds=60)
            found.append(str(caught.value))
    return found


def test_ranks_that_cannot_share_a_cache_are_told_so() -> None:
    found = run(2, others)
    assert [status for status, _ in found] == ["done"] * 2 and found[0] == found[1], found
    sizes, recorded, opened = found[0][1]
    assert sizes.endswith("one cache: rank 1 differs from rank 0 in max_tokens")
    assert recorded.endswith("rank 0: the leader's allocator was made without record_ops=True")
    assert opened.endswith("rank 1: a follower has sequences of its own")


def test_arguments_are_checked() -> None:
    assert not torch.distributed.is_initialized()
    with make("paged", True) as alloc, pytest.raises(kvmem.SpecError, match="init_process_group"):
        RankGroup(alloc)


def wrong_arguments(rank: int) -> None:
    with make("paged", True) as alloc:
        for options, words in [
            ({"leader": 1}, "leader"), ({"timeout_seconds": 0}, "timeout_seconds"), ({"group": 3}, "gloo group"),
            ({"timeout_seconds": float("nan")}, "timeout_seconds"), ({"timeout_seconds": "1"}, "timeout_seconds"),
        ]:  # fmt: skip
            with pytest.raises(kvmem.SpecError, match=words):
                RankGroup(alloc, **options)
        with pytest.raises(kvmem.SpecError, match="must be an Allocator"):
            RankGroup(alloc.spec)  # type: ignore[arg-type]
        with RankGroup(alloc) as group:  # of one rank
            alloc.sequence().extend(5)
            group.lead(bytes(20_000))
            assert group.step == 1 and group.step_bytes > 20_000
        with pytest.raises(kvmem.SpecError, match="closed"):
            group.lead()


def test_a_group_of_one_and_wrong_arguments() -> None:
    assert run(1, wrong_arguments) == [("done", None)]
