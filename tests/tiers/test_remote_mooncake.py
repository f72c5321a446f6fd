"""MooncakeTier over Mooncake's own master and a process that gives memory, by TCP on loopback: suite, faults, bad input."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from remote_servers import STORES, Server, free_port, running

sys.path.append(str(STORES))
pytest.importorskip(
    "mooncake.store", exc_type=ImportError, reason="no Mooncake: make store-peers, apt-get install libibverbs1"
)
pytest.importorskip("xxhash", reason="needs the extra kvmem[tiers]")

import mooncake
from mooncake.store import MooncakeDistributedStore
from remote_faults import LIMITS, MARGIN, SECONDS, assert_fork_is_refused, lies
from remote_proxy import Proxy
from tier_suite import TierSuite, get, key_of, payload_of, put

from kvmem.errors import SpecError, TierError
from kvmem.tiers import Result, Status, Tier
from kvmem.tiers.mooncake import MooncakeTier
from kvmem.tiers.remote import Limits

# The process that gives memory to the pool; it listens on the port when it has.
GIVER = """
import socket, sys, threading
sys.path.append(sys.argv[1])
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", 32 << 20, 1 << 20, "tcp", "", sys.argv[2])
if code: sys.exit(code)
listener = socket.create_server(("127.0.0.1", int(sys.argv[3])))
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def master() -> Iterator[tuple[Server, int]]:
    port, metrics = free_port(), free_port()
    program = next(Path(path) / "mooncake_master" for path in mooncake.__path__)
    command = [str(program), f"-rpc_port={port}", "-rpc_address=127.0.0.1", f"-metrics_port={metrics}",
               "-metrics_host=127.0.0.1", "-enable_metric_reporting=false"]  # fmt: skip
    with running(command, port) as server:
        yield server, metrics


@pytest.fixture(scope="module")
def giver(master: tuple[Server, int]) -> Iterator[Server]:
    port = free_port()
    with running([sys.executable, "-c", GIVER, str(STORES), f"127.0.0.1:{master[0].port}", str(port)], port) as server:
        yield server


@pytest.fixture(scope="module")
def admin(master: tuple[Server, int], giver: Server) -> Iterator[Any]:
    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 4 << 20, "tcp", "", f"127.0.0.1:{master[0].port}") == 0
    yield client
    client.close()


@pytest.fixture
def port(master: tuple[Server, int], admin: Any) -> int:
    admin.remove_all(True)
    return master[0].port


@pytest.fixture
def connect(master: tuple[Server, int]) -> Iterator[Callable[..., MooncakeTier]]:
    opened: list[MooncakeTier] = []

    def connect(port: int, **options: Any) -> MooncakeTier:
        opened.append(MooncakeTier(f"127.0.0.1:{port}", metrics_port=master[1], **options))
        return opened[-1]

    yield connect
    for tier in opened:
        tier.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[list[MooncakeTier]]:
    """The last tier that was opened: to close a client of Mooncake takes a second."""
    tiers: list[MooncakeTier] = []
    yield tiers
    for tier in tiers:
        tier.close()


class TestMooncake(TierSuite):
    bounded, steps = False, 100

    @pytest.fixture
    def make(self, master: tuple[Server, int], port: int, shared: list[MooncakeTier]) -> Callable[..., Tier]:
        def make(num_blocks: int = 64) -> Tier:
            limits = Limits(batch_seconds=30, batch_bytes=1 << 20, calls=4)
            try:
                shared[0].capacity()
            except (IndexError, TierError):
                shared[:] = [
                    MooncakeTier(f"127.0.0.1:{port}", metrics_port=master[1], timeout_seconds=20, limits=limits)
                ]
            return shared[0]

        return make


@pytest.fixture
def tier(port: int, connect: Callable[..., MooncakeTier]) -> Tier:
    return connect(port, timeout_seconds=SECONDS, limits=replace(LIMITS, calls=4))


def assert_comes_back(tier: Tier) -> None:
    """The client of Mooncake itself takes some seconds to find a master again."""
    until = time.monotonic() + 30
    while not (put(tier, {key_of(9): b"back"})[0].ok and get(tier, key_of(9)) == b"back"):
        assert time.monotonic() < until, put(tier, {key_of(9): b"back"})
        time.sleep(LIMITS.pause_seconds / 2)


@pytest.mark.parametrize("who", ["master", "giver"])
def test_who_stops_is_a_bounded_wait_and_one_line(
    who: str, master: tuple[Server, int], giver: Server, tier: Tier, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = master[0] if who == "master" else giver
    assert put(tier, {key_of(0): b"x" * 3000})[0].ok
    stopped.freeze()
    try:
        for _ in range(LIMITS.faults):
            began = time.monotonic()
            result = get(tier, key_of(0))
            assert isinstance(result, Result) and result.status is Status.FAILED and "no answer within" in result.reason
            assert time.monotonic() - began < SECONDS + MARGIN
        assert put(tier, {key_of(0): b"y"})[0].status is Status.FAILED and tier.contains([key_of(0)]) == 0
        assert [r.levelno for r in caplog.records if r.name == "kvmem.tiers"] == [logging.WARNING]
    finally:
        stopped.thaw()
    assert_comes_back(tier)


def test_a_pool_that_is_full(port: int, connect: Callable[..., MooncakeTier]) -> None:
    """The master drops nothing that was written just now."""
    tier = connect(port, timeout_seconds=20, limits=Limits(batch_seconds=30, batch_bytes=5 << 20, calls=1))
    data, found = payload_of(key_of(0), 1, 4 << 20), list[Result]()
    for n in range(12):  # 48 of 32 MiB
        found += tier.put([key_of(n)], [memoryview(data)])
    assert {r.status for r in found} == {Status.OK, Status.FULL}, found
    assert found[0].ok and all(r.num_bytes == (len(data) if r.ok else 0) for r in found)
    (result,) = tier.put([key_of(20)], [memoryview(bytes(6 << 20))])
    assert result.status is Status.FULL and "limits.batch_bytes is 5242880" in result.reason
    tier.delete([key_of(n) for n in range(12)])
    assert_comes_back(tier)


def test_what_is_not_the_block_is_no_answer(tier: Tier, admin: Any, rng: random.Random) -> None:
    key, data = key_of(0), payload_of(key_of(0), 1, 3000)
    for lie, stored in lies(key, data, rng).items():
        if not stored:
            continue  # Mooncake has no empty objects
        assert admin.upsert(f"kvmem/1/{key.hex()}", stored) == 0
        result = get(tier, key)
        assert isinstance(result, Result) and result.status is Status.CORRUPT and result.reason, (lie, result)
        assert tier.contains([key]) == 0, "what is not believed is deleted"
        assert put(tier, {key: data})[0].ok and get(tier, key) == data


def test_a_forked_process_is_told_to_open_its_own(tier: Tier) -> None:
    assert_fork_is_refused(tier)


def test_a_master_that_starts_anew(
    master: tuple[Server, int], tier: Tier, connect: Callable[..., MooncakeTier]
) -> None:
    """It knows no blocks any more. Those who give memory come back to it by themselves."""
    assert put(tier, {key_of(0): b"x"})[0].ok
    master[0].kill()
    result = get(tier, key_of(0))
    assert isinstance(result, Result) and result.status is Status.FAILED
    with pytest.raises(TierError, match="no master answers"):
        connect(master[0].port)
    master[0].start()
    assert_comes_back(tier)
    assert isinstance(get(tier, key_of(0)), Result)


def test_a_master_that_does_not_answer_at_opening(master: tuple[Server, int], connect: Callable[..., Any]) -> None:
    """Mooncake's client would try for minutes."""
    master[0].freeze()
    began = time.monotonic()
    try:
        with pytest.raises(TierError, match="no master answers"):
            connect(master[0].port, timeout_seconds=SECONDS)
    finally:
        master[0].thaw()
    assert time.monotonic() - began < SECONDS + MARGIN


def test_another_protocol(master: tuple[Server, int], connect: Callable[..., Any]) -> None:
    proxy = Proxy(master[0].port)
    proxy.greeting = b"SSH-2.0-OpenSSH_9.2\r\n"
    try:
        with pytest.raises(TierError, match="another protocol"):
            connect(proxy.port)
    finally:
        proxy.close()


def test_memory_that_goes_takes_its_blocks_with_it(master: tuple[Server, int], giver: Server, tier: Tier) -> None:
    assert put(tier, {key_of(0): b"x"})[0].ok
    giver.kill()
    result = get(tier, key_of(0))
    assert isinstance(result, Result) and result.status in (Status.FAILED, Status.MISS)
    giver.start()
    assert_comes_back(tier)


@pytest.mark.parametrize(
    ("master", "options", "words"),
    [
        ("127.0.0.1", {}, "master: got '127.0.0.1'"),
        ("http://127.0.0.1:50051", {}, "master: got"),
        ("127.0.0.1:0", {}, "master: got"),
        ("127.0.0.1:70000", {}, "master: got"),
        (None, {}, "master: got None"),
        ("127.0.0.1:50051", {"segment_bytes": -1}, "segment_bytes: got -1"),
        ("127.0.0.1:50051", {"metrics_port": 0}, "metrics_port: got 0"),
        ("127.0.0.1:50051", {"timeout_seconds": -1}, "timeout_seconds: got -1"),
        ("127.0.0.1:50051", {"namespace": "/"}, "namespace: got '/'"),
    ],
)
def test_refused_at_opening(master: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        MooncakeTier(master, **options)
