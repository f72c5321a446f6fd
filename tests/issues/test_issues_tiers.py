"""Issues that users of other systems reported about KV that leaves the device and comes back, each as a test of kvmem.
``docs/peers_issues.md`` lists them. Every byte that a sequence has is compared with what its tokens say, to the end."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from issue_world import LOWER, PATIENT, PLACES, Stop, case, key_of, words
from support_world import checked

import kvmem
from kvmem.plan import Clock
from kvmem.tiers import Status

TEXT, OTHER = words(98), words(98, 2)
WHOLE = 96  # tokens of its whole blocks of 4
BIG: dict[str, Any] = {"memory": 400 * 4096, "max_tokens": 1300}


@pytest.mark.parametrize("place", LOWER)
def test_a_copy_that_failed_is_never_a_hit(place: str, backend: str, tmp_path: Path) -> None:
    """dynamo#15079: a disk-to-device copy that failed counted as loaded, and another request's KV was served with
    status 200. Here each call of a tier may fail: the tokens that are cached are right, the others are computed."""
    with case("full", backend, place, tmp_path, **BIG) as here:
        for what in ("raises", "full", "failed"):
            here.tier.arm("put", what, 0)
            here.put_down(TEXT)
            here.tier.arm("", "")
            assert here.tier.happened and here.run(TEXT, load="all") == 0
        here.put_down(TEXT)
        calls = [
            "contains raises",
            "contains lies",
            *(f"get {how}" for how in ["raises", "failed", "corrupt", "miss", "short"]),
        ]
        for stage, what in map(str.split, calls):
            here.put_down(OTHER)  # memory on the way has held its bytes last
            here.tier.happened = 0
            here.tier.arm(stage, what)
            cached = here.run(TEXT, load="all")
            assert here.tier.happened == 1, (stage, what)
            assert cached < WHOLE or what == "lies", (stage, what)
            here.put_down(TEXT)
            assert here.run(TEXT, load="all") == WHOLE, (stage, what)


@pytest.mark.core
@pytest.mark.parametrize("verb", ["store", "load"])
@pytest.mark.parametrize("place", PLACES)
def test_a_copy_of_the_device_that_failed_is_never_a_hit(place: str, verb: str, backend: str, tmp_path: Path) -> None:
    """dynamo#15079, the copies between device and host slots: a typed error that changes nothing, then right bytes."""
    driver, failed, text = checked(), 0, TEXT[:22]
    with case("full", backend, place, tmp_path, driver=driver, **BIG) as here:
        here.run(text)
        if verb == "load":
            here.put_down(text)
        for nth in range(1, 100):
            driver.fail(verb, nth, 719)
            try:
                if verb == "store":
                    here.alloc.store(text)
                else:
                    here.run(text, load="all")
            except kvmem.DeviceError:
                failed += 1
                assert here.alloc.check() == []
            left = driver.pending_failures()
            driver.clear_failures()
            if left:
                break
            here.alloc.free_batch([live.id for live in here.alloc.sequences()])
            here.run(text, load="all")  # what is left of it
            here.put_down(text) if verb == "load" else here.alloc.tiering.clear()
        assert failed > 0
        here.put_down(text)
        assert here.run(text, load="all") == 20


@pytest.mark.parametrize("place", PLACES)
def test_matches_of_any_number_of_chunks_are_right_to_the_end(
    place: str, backend: str, rng: random.Random, tmp_path: Path
) -> None:
    """LMCache#5151: a full hit was reported, with wrong KV beyond 114 to 128 chunks. Here matches of 1 to 300 blocks,
    loaded and on the device, hold the bytes of their tokens."""
    text = words(4 * 300 + 1)
    with case("full", backend, place, tmp_path, host_blocks=310, **BIG) as here:
        here.put_down(text)
        for n in (rng.randrange(1, 114), rng.randrange(114, 129), rng.randrange(129, 300), 300):
            here.leave_below()
            with here.alloc.sequence(text[: 4 * n + 1], load="all") as seq:
                assert seq.wait(PATIENT) and seq.num_cached_tokens == 4 * n
                here.check(seq, text)
            here.alloc.store(text)  # a slot gives its block to the device
        for n in range(1, 301) if place == "slots" else ():
            with here.alloc.sequence(text[: 4 * n + 1]) as seq:
                assert seq.num_cached_tokens == 4 * n
                if n % 30 == 0 or n == 114:
                    here.check(seq, text)


@pytest.mark.core
@pytest.mark.parametrize("end", ["close", "free", "cancel", "clear", "evict"])
def test_memory_that_a_load_writes_into_stays_its_own(
    end: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMCache#5263: a buffer was reclaimed by shutdown or expiry while a load still wrote into it. Here the slot is
    the load's until it has written, whatever ends meanwhile, and closing waits for it."""
    stop, closed, written, alone = Stop(), threading.Event(), threading.Event(), list[bool]()
    with case("full", backend, "disk", tmp_path, host_blocks=30) as here:
        here.put_down(TEXT)
        alloc, form, engine = here.alloc, here.alloc.tiering.forms[0], here.alloc.tiering.transfers
        write = form.from_canonical

        def slowly(canonical: Any, slot: Any) -> None:
            if not stop.reached.is_set():
                slot[:] = 0xA5
                stop()
                if end == "close":
                    closed.wait(0.1)  # time to close, if closing did not wait
                alone.append(bool((slot == 0xA5).all()))
            write(canonical, slot)
            written.set()

        monkeypatch.setattr(form, "from_canonical", slowly)
        seq = alloc.sequence(TEXT, load="all")
        load = alloc._pending[seq.id].load
        stop.wait()
        if end == "close":
            monkeypatch.setattr(engine, "release_left", stop.go_on.set)  # as closing cancels the load
            alloc.close()
            closed.set()
            assert alone == [True], "closed before the load had written"
            return
        if end == "free":
            seq.free()
        elif end == "cancel":
            load.cancel()
        elif end == "clear":
            alloc.clear_cache()
        for n in range(3, 11):  # they evict each other, through all other slots
            here.run(words(80, n))
        stop.go_on.set()
        assert written.wait(PATIENT) and alone == [True]
        if end != "free":
            assert seq.wait(PATIENT)
            here.check(seq, TEXT)
            seq.free()
        for n in range(3, 11):
            here.run(words(80, n), load="all")
        here.leave_below()
        assert here.run(TEXT, load="all") == WHOLE


@pytest.mark.parametrize("what", ["raises", "failed", "miss"])
@pytest.mark.parametrize("place", LOWER)
def test_a_key_that_fails_is_asked_once_a_request(place: str, what: str, backend: str, tmp_path: Path) -> None:
    """vllm#49176: after one failed load of a tier a request was tried again for ever, since the lookup went on to
    promise it. Here a request asks once, and begins with what came before the gap."""
    with case("full", backend, place, tmp_path, **BIG) as here:
        here.put_down(TEXT)
        bad = key_of(here.alloc, TEXT, 17)
        here.tier.broken[bad] = what
        for n in (1, 2):
            here.leave_below()
            with here.alloc.sequence(TEXT, load="all") as seq:
                assert seq.wait(PATIENT)
                assert seq.num_cached_tokens == (64 if what == "raises" else 68)  # 16 blocks go by one call
                assert here.tier.asked.count(bad) == n
                assert here.alloc.ready([seq]) == [seq.id]
                here.check(seq, TEXT)
                here.go_on(seq, TEXT)
                here.check(seq, TEXT)
        here.tier.broken.clear()
        here.leave_below()
        assert here.run(TEXT, load="all") == WHOLE


@pytest.mark.parametrize("place", LOWER)
def test_a_damaged_block_is_a_miss_and_is_stored_again(place: str, backend: str, tmp_path: Path) -> None:
    """vllm#49176: the lookup cache was not told of the failure. Here a block that the tier has lost, or that it found
    damaged, is no hit for the next request, and is written again once it was computed."""
    with case("full", backend, place, tmp_path, **BIG) as here:
        here.put_down(TEXT)
        bad = key_of(here.alloc, TEXT, 5)
        if place == "disk":
            payload = bytearray(4096)
            (result,) = here.tier.inner.get([bad], [memoryview(payload)])
            (file,) = (tmp_path / "disk").glob("segment-*")
            content = file.read_bytes()
            at = content.find(bytes(payload[: result.num_bytes]))
            with file.open("r+b") as opened:
                opened.seek(at)
                opened.write(bytes([content[at] ^ 1]))
        else:
            here.tier.delete([bad])
        assert here.run(TEXT, load="all") == 20
        assert here.tier.contains([bad]) == 0
        here.put_down(TEXT)
        assert here.tier.contains([bad]) == 1 and here.run(TEXT, load="all") == WHOLE


@pytest.mark.parametrize("call", ["contains", "get"])
@pytest.mark.parametrize("place", LOWER)
def test_a_pending_answer_has_a_deadline(
    place: str, call: str, backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """vllm#49829: a pending hit had no deadline, and its request stood for 300 s. Here a tier that does not answer
    costs ``Tiers.deadline_seconds`` by the clock; what has come by then is used."""
    clock, stop = Clock(), Stop()
    with case("full", backend, place, tmp_path, deadline_seconds=7, **BIG) as here:
        here.put_down(TEXT)
        here.alloc.tiering.transfers.clock = lambda: float(clock.now)
        first = iter([] if call == "contains" else [None])  # of 24 blocks, 16 go by one call
        here.tier.before[call] = lambda: next(first, 1) and stop()
        seq = here.alloc.sequence(TEXT, load="all")
        stop.wait()
        clock.run("the store", Fraction("6.999"))
        assert here.alloc.ready([seq]) == [] and seq.pending
        clock.run("the store", Fraction("0.001"))
        assert here.alloc.ready([seq]) == [seq.id]
        assert seq.num_cached_tokens == (0 if call == "contains" else 64)
        here.go_on(seq, TEXT)
        here.check(seq, TEXT)
        seq.free()
        assert here.alloc.tiering.counters["given up: late"] == 1 and "no answer within 7 s" in caplog.text
        stop.go_on.set()  # the late answer is for nobody
        here.leave_below()
        assert here.run(TEXT, load="all") == WHOLE


@pytest.mark.parametrize("place", LOWER)
def test_the_head_of_a_prompt_is_stored_again(place: str, backend: str, tmp_path: Path) -> None:
    """sglang#39444, sglang#26886: write-through lost the first pages of a prompt, and every later hit was 0. Here a gap
    at the head is a miss, without an error, and is closed by the next request of the prompt."""
    with case("full", backend, place, tmp_path, **BIG) as here:
        here.put_down(TEXT)
        gone = [key_of(here.alloc, TEXT, block) for block in range(3)]
        assert all(result.ok for result in here.tier.delete(gone))
        assert here.alloc.match(TEXT, load="all").num_tokens == 0
        assert here.run(TEXT, load="all") == 0
        here.put_down(TEXT)
        assert here.tier.contains(gone) == 3 and here.run(TEXT, load="all") == WHOLE


@pytest.mark.parametrize("place", LOWER)
def test_what_is_evicted_between_the_parts_of_a_store(place: str, backend: str, tmp_path: Path) -> None:
    """sglang#39444: pages went while the parts of a store were written. Here the slots of a store are its own until it
    ends, while device and host memory give their other blocks to others."""
    stop = Stop()
    with case("full", backend, place, tmp_path, host_blocks=30) as here:
        here.run(TEXT[:80])
        here.tier.before["put"] = stop
        assert here.alloc.store(TEXT[:80]) == 20  # in parts of 16 blocks
        stop.wait()
        for n in range(3, 11):
            here.run(words(80, n))
        stop.go_on.set()
        here.leave_below()
        for n, text in [(0, TEXT[:81]), *((n, words(80, n)) for n in range(3, 11))]:
            assert here.run(text, load="all") >= 80 * (n == 0)
            here.leave_below()


@pytest.mark.core
@pytest.mark.parametrize("name", ["full", "window", "sizes"])
def test_a_batch_skips_blocks_whose_slots_are_not_theirs_any_more(name: str, backend: str, tmp_path: Path) -> None:
    """Mooncake#4239: a batch read ignored that the lease of an object was over. Here a slot has a generation: what was
    looked up before other blocks got the slots is skipped."""
    with case(name, backend, "slots", tmp_path, host_blocks=12, policy="lru", **BIG) as here:
        here.run(TEXT[:40])
        assert here.alloc.store(TEXT[:40])
        here.alloc.core.clear_cache()
        tiering = here.alloc.tiering
        prompt = here.alloc._prompt(kvmem.allocator.prefix.token_ids(TEXT[:41]), None, None, None)
        located = tiering.locate(prompt)
        old = list(located.names.values())
        assert old and all(tiering.core.has_slots(old))
        for n in range(3, 9):
            here.run(words(60, n))
            here.alloc.store(words(60, n))
        assert not all(tiering.core.has_slots(old))
        with suppress(kvmem.SpecError):  # nothing of it is there any more
            tiering._promote(prompt, prompt.num_blocks, located)
        with here.alloc.sequence(TEXT[:41]) as seq:
            here.check(seq, TEXT)
        for n in range(3, 9):
            here.run(words(60, n))
        here.run(TEXT[:41], load="all")


def test_a_batch_of_the_disk_skips_what_was_replaced_while_it_was_read(tmp_path: Path) -> None:
    """Mooncake#4239, of the disk: a slot that got another block while the batch was read is a miss."""
    from disk_support import open_disk
    from tier_suite import key_of as name
    from tier_suite import payload_of, put

    from kvmem.tiers.disk.files import Files

    class Replacing(Files):
        at, one_by_one = 0, threading.Lock()

        def preadv(self, fd: int, views: Any, offset: int) -> int:
            with self.one_by_one:
                self.at -= 1
                now = self.at == 0
            if now:
                put(tier, {name(100 + n): payload_of(name(100 + n), 1, 5000) for n in range(4)})
            return super().preadv(fd, views, offset)

    files = Replacing()
    for at in range(1, 7):
        with open_disk(tmp_path / str(at), files=files, threads=4) as tier:
            put(tier, {name(n): payload_of(name(n), 1, 5000) for n in range(6)})
            buffers = [bytearray(5000) for _ in range(6)]
            files.at = at
            results = tier.get([name(n) for n in range(6)], [memoryview(b) for b in buffers])
            assert files.at <= 0
            for n, (result, buffer) in enumerate(zip(results, buffers, strict=True)):
                assert not result.ok or bytes(buffer) == payload_of(name(n), 1, 5000)
            assert all(result.status in (Status.OK, Status.MISS) for result in results)
            assert not all(result.ok for result in results) or at > 1  # the first read comes too late


@pytest.mark.parametrize("name", ["window", "state", "sizes"])
@pytest.mark.parametrize("place", LOWER)
def test_side_data_that_is_shorter_than_the_kv_shortens_the_match(
    place: str, name: str, backend: str, tmp_path: Path
) -> None:
    """sglang PR 31108: side data of a prompt was shorter than its KV, and what lay behind its end was garbage. Here a
    match ends where every group has what it needs."""
    with case(name, backend, place, tmp_path, **BIG) as here:
        here.put_down(TEXT)
        last = WHOLE // here.alloc.tiering.block_size - 1
        for what in ("short", "miss", "corrupt"):
            here.tier.broken[key_of(here.alloc, TEXT, last, group=1)] = what
            assert here.run(TEXT, load="all") < WHOLE, what
            here.tier.broken.clear()
            here.leave_below()
            assert here.run(TEXT, load="all") == WHOLE, what
            here.leave_below()
