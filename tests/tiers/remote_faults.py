"""What every remote tier must do when its store is slow, gone, or lies. A test file derives a class for each store."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from remote_proxy import Mode, Proxy, cut, delay, flip, garbage, plain, swallow
from tier_suite import LARGEST, get, key_of, payload_of, put

from kvmem.errors import TierError
from kvmem.tiers import Result, Status, Tier
from kvmem.tiers.record import header_of
from kvmem.tiers.remote import Limits, RemoteTier

SECONDS, MARGIN = 0.3, 5.0  # the tier's bound, and what a loaded machine may add to it
PATIENT = 30.0
LIMITS = Limits(batch_seconds=PATIENT, batch_bytes=16 << 10, faults=3, pause_seconds=0.2, calls=8)


def hurry(tier: RemoteTier, seconds: float = SECONDS) -> None:
    """Set the bound of a tier that was heard already: what must work has time, on a machine with other things to do."""
    tier._seconds = seconds


def comes_back(tier: RemoteTier, key: bytes = key_of(9), data: bytes = b"back") -> None:
    """Within some pauses the tier is used again. Mooncake's client takes seconds to find a master again."""
    until = time.monotonic() + PATIENT
    while not (put(tier, {key: data})[0].ok and get(tier, key) == data):
        assert time.monotonic() < until, put(tier, {key: data})
        time.sleep(LIMITS.pause_seconds / 2)


def lies(key: bytes, data: bytes, rng: random.Random) -> dict[str, bytes]:
    """What a store may hold in place of the record of a key."""
    record = header_of(key, memoryview(data)) + data
    at = rng.randrange(1, len(record))
    return {
        "flipped": record[:at] + bytes([record[at] ^ 1 << rng.randrange(8)]) + record[at + 1 :],
        "cut off": record[:at],
        "longer": record + b"x",
        "another key": header_of(key_of(1), memoryview(data)) + data,
        "no record": bytes(3096),
        "empty": b"",
        "another version": record[:8] + b"\x02" + record[9:],
    }


def assert_fork_is_refused(tier: Tier) -> None:
    put(tier, {key_of(0): b"x"})
    child = os.fork()
    if child == 0:
        status = 1
        try:
            tier.contains([key_of(0)])
        except TierError as e:
            tier.close()
            status = 0 if "fork" in str(e) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert get(tier, key_of(0)) == b"x"  # over the parent's own connection


class RemoteFaults:
    """The subclass has the fixtures ``port``, of a running store that is empty; ``connect(port, **options)``, which
    returns a tier and closes it at the end; and ``store(key, record)``, which puts raw bytes under a key.
    """

    keeps_connections = True  # moto ends each after its answer
    #: Operations of the random walks; KVMEM_STORE_STEPS sets more, for a campaign.
    walk_steps = int(os.environ.get("KVMEM_STORE_STEPS", 200))

    @pytest.fixture
    def proxy(self, port: int) -> Iterator[Proxy]:
        proxy = Proxy(port)
        yield proxy
        proxy.close()

    @pytest.fixture
    def tier(self, proxy: Proxy, connect: Callable[..., RemoteTier]) -> RemoteTier:
        return connect(proxy.port, timeout_seconds=PATIENT, limits=LIMITS)

    @pytest.mark.parametrize("fault", ["swallow", "cut", "garbage", "slow", "drip", "refused"])
    def test_a_fault_is_a_bounded_wait_a_reason_and_one_line(
        self, fault: str, tier: RemoteTier, proxy: Proxy, caplog: pytest.LogCaptureFixture
    ) -> None:
        key, data = key_of(0), payload_of(key_of(0), 1, 3000)
        assert put(tier, {key: data})[0].ok and get(tier, key) == data
        hurry(tier)
        modes: dict[str, Mode] = {"swallow": swallow, "cut": cut, "garbage": garbage, "slow": delay(30), "drip": plain, "refused": plain}  # fmt: skip
        proxy.mode, proxy.drip = modes[fault], 0.02 if fault == "drip" else 0
        if fault == "refused":
            proxy.close()
        for _ in range(LIMITS.faults):
            began = time.monotonic()
            result = get(tier, key)
            assert time.monotonic() - began < SECONDS + MARGIN
            assert isinstance(result, Result) and result.status is Status.FAILED and result.reason, result
        # The circuit is open: no call reaches the store.
        proxy_saw, began = proxy.connections, time.monotonic()
        assert tier.contains([key]) == 0
        for results in (put(tier, {key: data}), tier.delete([key])):
            assert results[0].status is Status.FAILED and "again" in results[0].reason
        if time.monotonic() - began < LIMITS.pause_seconds:
            assert proxy.connections == proxy_saw
        assert [r.levelno for r in caplog.records if r.name == "kvmem"] == [logging.WARNING]
        if fault != "refused":
            proxy.mode, proxy.drip = plain, 0
            hurry(tier, PATIENT)
            comes_back(tier)
            assert get(tier, key) == data

    def test_a_batch_ends_with_its_first_part_without_answer(self, tier: RemoteTier, proxy: Proxy) -> None:
        keys = [key_of(n) for n in range(40)]  # 13 parts of 16 KiB
        assert all(r.ok for r in put(tier, {key: payload_of(key, 1, LARGEST) for key in keys}))
        hurry(tier)
        proxy.mode = swallow
        began = time.monotonic()
        results = tier.get(keys, [memoryview(bytearray(LARGEST)) for _ in keys])
        assert time.monotonic() - began < SECONDS + MARGIN
        assert {r.status for r in results} == {Status.FAILED}

    def test_a_batch_of_slow_parts_is_bounded_as_a_whole(
        self, proxy: Proxy, connect: Callable[..., RemoteTier], tier: RemoteTier
    ) -> None:
        keys = [key_of(n) for n in range(60)]
        assert all(r.ok for r in put(tier, {key: payload_of(key, 1, LARGEST) for key in keys}))
        proxy.mode = delay(0.1)  # for each of 20 parts
        impatient = connect(proxy.port, timeout_seconds=1.2, limits=replace(LIMITS, batch_seconds=1.2))
        began = time.monotonic()
        results = impatient.get(keys, [memoryview(bytearray(LARGEST)) for _ in keys])
        assert time.monotonic() - began < 1.2 + MARGIN
        assert results[0].ok and results[-1].status is Status.FAILED  # what came in time is kept

    @pytest.mark.parametrize(
        "lie", ["flipped", "cut off", "longer", "another key", "no record", "empty", "another version"]
    )
    def test_what_is_not_the_block_is_no_answer(
        self, lie: str, tier: RemoteTier, store: Callable[[bytes, bytes], None], rng: random.Random, caplog: pytest.LogCaptureFixture
    ) -> None:  # fmt: skip
        key, data = key_of(0), payload_of(key_of(0), 1, 3000)
        stored = lies(key, data, rng)[lie]
        for _ in range(2):
            store(key, stored)
            result = get(tier, key)
            assert isinstance(result, Result) and result.reason, (lie, result)
            assert result.status is Status.CORRUPT or lie == "empty", result
        assert len([r for r in caplog.records if r.name == "kvmem"]) <= 1
        assert lie == "empty" or tier.contains([key]) == 0, "what is not believed is deleted"
        assert put(tier, {key: data})[0].ok and get(tier, key) == data

    @pytest.mark.parametrize("requests", [False, True])
    def test_random_walk_on_a_wire_that_flips_bits(
        self, requests: bool, proxy: Proxy, connect: Callable[..., RemoteTier], rng: random.Random
    ) -> None:
        """Never a wrong byte: a payload that is found is one that was put under its key, whole."""
        tier = connect(proxy.port, timeout_seconds=PATIENT, limits=replace(LIMITS, pause_seconds=0.01))
        comes_back(tier)
        hurry(tier, 0.1)
        found = wrong = 0
        for step in range(20 * self.walk_steps):
            if step >= self.walk_steps and found and wrong:
                break
            if step % 10 == 0:
                proxy.mode = flip(rng, rng.choice((0, 0.1, 0.5)), requests)
            keys = [key_of(n) for n in rng.sample(range(6), 2)]
            if (kind := rng.random()) < 0.4:
                put(tier, {key: payload_of(key, step, rng.randint(8, LARGEST)) for key in keys})
            elif kind < 0.9:
                for key in keys:
                    data = get(tier, key)
                    if isinstance(data, Result):
                        wrong += data.status in (Status.CORRUPT, Status.FAILED)
                    else:
                        assert data == payload_of(key, int.from_bytes(data[:8], "little"), len(data))
                        found += 1
            else:
                tier.delete(keys)
        assert found and wrong, "the walk met nothing"
        proxy.mode = plain
        hurry(tier, PATIENT)
        comes_back(tier)

    def test_random_faults_against_a_model(
        self, proxy: Proxy, connect: Callable[..., RemoteTier], rng: random.Random
    ) -> None:
        """A put that is OK is found; one that FAILED is found whole, or not at all, or what was there before is."""
        limits = replace(LIMITS, faults=2, pause_seconds=0.02)
        tier, model, stored = connect(proxy.port, timeout_seconds=PATIENT, limits=limits), dict[bytes, set[bytes]](), 0
        for step in range(self.walk_steps // 5):
            proxy.mode = rng.choice((plain, plain, cut, garbage, swallow))
            if proxy.mode is plain:
                comes_back(tier)
            else:
                hurry(tier, 0.1)
            keys = [key_of(n) for n in rng.sample(range(8), 3)]
            contents = {key: payload_of(key, step, rng.randint(8, LARGEST)) for key in keys}
            for (key, data), result in zip(contents.items(), put(tier, contents), strict=True):
                assert result.status is (Status.OK if proxy.mode is plain else Status.FAILED)
                model[key] = {data} if result.ok else model.get(key, {b"none"}) | {data}
                stored += result.ok
            for key in rng.sample(sorted(model), 2):
                got = get(tier, key)
                assert got in model[key] or (
                    isinstance(got, Result) and (proxy.mode is not plain or len(model[key]) > 1)
                )
            hurry(tier, PATIENT)
        assert stored

    def test_eight_threads_share_the_connections(self, tier: RemoteTier, proxy: Proxy, rng: random.Random) -> None:
        errors, seed = list[BaseException](), rng.random()

        def work(name: int) -> None:
            mine = random.Random(f"{seed} {name}")
            try:
                for step in range(15):
                    key = key_of(mine.randrange(4))
                    put(tier, {key: payload_of(key, step, mine.randint(8, LARGEST))})
                    data = get(tier, key)
                    assert isinstance(data, Result) or data == payload_of(
                        key, int.from_bytes(data[:8], "little"), len(data)
                    )
            except BaseException as e:  # noqa: BLE001  shown by the test's own thread
                errors.append(e)

        threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert not self.keeps_connections or proxy.connections <= LIMITS.calls

    def test_close_ends_the_connections(self, tier: RemoteTier, proxy: Proxy) -> None:
        put(tier, {key_of(0): b"x"})
        assert proxy.connections
        tier.close()
        for _ in range(200):
            if not proxy.open_connections():
                return
            time.sleep(0.02)
        raise AssertionError(f"{proxy.open_connections()} connections are open")

    def test_a_forked_process_is_told_to_open_its_own(self, tier: RemoteTier, proxy: Proxy) -> None:
        assert_fork_is_refused(tier)

    def test_opening_with_check(self, proxy: Proxy, connect: Callable[..., RemoteTier]) -> None:
        connect(proxy.port, timeout_seconds=PATIENT, check=True)
        for mode in (garbage, cut, swallow):
            proxy.mode = mode
            with pytest.raises(TierError, match="check"):
                connect(proxy.port, timeout_seconds=SECONDS, check=True)
        proxy.close()
        with pytest.raises(TierError, match="check"):
            connect(proxy.port, timeout_seconds=SECONDS, check=True)
