"""MooncakeTier over Mooncake's own master and a process that gives memory, by TCP on loopback: suite, faults, bad input."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from remote_servers import STORES, Server, free_port, running

sys.path.append(str(STORES))
pytest.importorskip(
    "mooncake.store", exc_type=ImportError, reason="no Mooncake: make store-peers, apt-get install libibverbs1"
)
pytest.importorskip("xxhash", reason="needs the extra kvmem[tiers]")

import mooncake
from mooncake.store import MooncakeDistributedStore
from remote_faults import LIMITS, MARGIN, PATIENT, SECONDS, assert_fork_is_refused, comes_back, hurry, lies
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


class Pool(NamedTuple):
    master: Server
    metrics_port: int
    giver: Server


@contextmanager
def a_pool() -> Iterator[Pool]:
    port, metrics_port, giver_port = free_port(), free_port(), free_port()
    program = next(Path(path) / "mooncake_master" for path in mooncake.__path__)
    command = [str(program), f"-rpc_port={port}", "-rpc_address=127.0.0.1", f"-metrics_port={metrics_port}",
               "-metrics_host=127.0.0.1", "-enable_metric_reporting=false"]  # fmt: skip
    give = [sys.executable, "-c", GIVER, str(STORES), f"127.0.0.1:{port}", str(giver_port)]
    with running(command, port) as master, running(give, giver_port) as giver:
        yield Pool(master, metrics_port, giver)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with a_pool() as pool:
        yield pool


@pytest.fixture(scope="module")
def admin(pool: Pool) -> Iterator[Any]:
    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 4 << 20, "tcp", "", f"127.0.0.1:{pool.master.port}") == 0
    yield client
    client.close()


@pytest.fixture
def port(pool: Pool, admin: Any) -> int:
    admin.remove_all(True)
    return pool.master.port


@pytest.fixture
def connect(pool: Pool) -> Iterator[Callable[..., MooncakeTier]]:
    opened: list[MooncakeTier] = []

    def connect(port: int, timeout_seconds: float = PATIENT, **options: Any) -> MooncakeTier:
        options = {"metrics_port": pool.metrics_port, "limits": replace(LIMITS, calls=4), **options}
        opened.append(MooncakeTier(f"127.0.0.1:{port}", timeout_seconds=timeout_seconds, **options))
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
    def make(self, pool: Pool, port: int, shared: list[MooncakeTier]) -> Callable[..., Tier]:
        def make(num_blocks: int = 64) -> Tier:
            limits = Limits(batch_seconds=PATIENT, batch_bytes=1 << 20, calls=4)
            try:
                shared[0].capacity()
            except (IndexError, TierError):
                place = {"metrics_port": pool.metrics_port, "timeout_seconds": PATIENT}
                shared[:] = [MooncakeTier(f"127.0.0.1:{port}", limits=limits, **place)]
            return shared[0]

        return make


@pytest.fixture
def tier(port: int, connect: Callable[..., MooncakeTier]) -> MooncakeTier:
    return connect(port)


@pytest.mark.parametrize("who", ["master", "giver"])
def test_who_stops_is_a_bounded_wait_and_one_line(
    who: str, pool: Pool, tier: MooncakeTier, caplog: pytest.LogCaptureFixture
) -> None:
    stopped: Server = getattr(pool, who)
    assert put(tier, {key_of(0): b"x" * 3000})[0].ok
    hurry(tier)
    stopped.freeze()
    try:
        for _ in range(LIMITS.faults):
            began = time.monotonic()
            result = get(tier, key_of(0))
            assert isinstance(result, Result) and result.status is Status.FAILED and "no answer within" in result.reason
            assert time.monotonic() - began < SECONDS + MARGIN
        assert put(tier, {key_of(0): b"y"})[0].status is Status.FAILED and tier.contains([key_of(0)]) == 0
        assert [r.levelno for r in caplog.records if r.name == "kvmem"] == [logging.WARNING]
    finally:
        stopped.thaw()
    hurry(tier, PATIENT)
    comes_back(tier)


def test_a_pool_that_is_full(port: int, connect: Callable[..., MooncakeTier]) -> None:
    """The master drops nothing that was written just now."""
    tier = connect(port, limits=Limits(batch_seconds=PATIENT, batch_bytes=5 << 20, calls=1))
    data, found = payload_of(key_of(0), 1, 4 << 20), list[Result]()
    for n in range(12):  # 48 of 32 MiB
        found += tier.put([key_of(n)], [memoryview(data)])
    assert {r.status for r in found} == {Status.OK, Status.FULL}, found
    assert found[0].ok and all(r.num_bytes == (len(data) if r.ok else 0) for r in found)
    (result,) = tier.put([key_of(20)], [memoryview(bytes(6 << 20))])
    assert result.status is Status.FULL and "limits.batch_bytes is 5242880" in result.reason
    tier.delete([key_of(n) for n in range(12)])
    comes_back(tier)


def test_what_is_not_the_block_is_no_answer(tier: MooncakeTier, admin: Any, rng: random.Random) -> None:
    key, data = key_of(0), payload_of(key_of(0), 1, 3000)
    for lie, stored in lies(key, data, rng).items():
        if not stored:
            continue  # Mooncake has no empty objects
        assert admin.upsert(f"kvmem/1/{key.hex()}", stored) == 0
        result = get(tier, key)
        assert isinstance(result, Result) and result.status is Status.CORRUPT and result.reason, (lie, result)
        assert tier.contains([key]) == 0, "what is not believed is deleted"
        assert put(tier, {key: data})[0].ok and get(tier, key) == data


def test_a_forked_process_is_told_to_open_its_own(tier: MooncakeTier) -> None:
    assert_fork_is_refused(tier)


def test_memory_that_goes_and_a_master_that_goes(connect: Callable[..., MooncakeTier]) -> None:
    with a_pool() as pool:
        tier = connect(pool.master.port, metrics_port=pool.metrics_port)
        assert put(tier, {key_of(0): b"x"})[0].ok
        pool.giver.kill()
        result = get(tier, key_of(0))
        assert isinstance(result, Result) and result.status in (Status.FAILED, Status.MISS)
        pool.master.kill()
        result = get(tier, key_of(0))
        assert isinstance(result, Result) and result.status is Status.FAILED
        with pytest.raises(TierError, match="no master answers"):
            connect(pool.master.port, timeout_seconds=SECONDS)
        pool.master.start()  # which knows no blocks any more
        pool.giver.start()
        comes_back(tier)
        result = get(tier, key_of(0))
        assert isinstance(result, Result) and result.status is Status.MISS


def test_a_master_that_does_not_answer_at_opening(pool: Pool, connect: Callable[..., Any]) -> None:
    """Mooncake's client would try for minutes."""
    pool.master.freeze()
    began = time.monotonic()
    try:
        with pytest.raises(TierError, match="no master answers"):
            connect(pool.master.port, timeout_seconds=SECONDS)
    finally:
        pool.master.thaw()
    assert time.monotonic() - began < SECONDS + MARGIN


def test_another_protocol(pool: Pool, connect: Callable[..., Any]) -> None:
    proxy = Proxy(pool.master.port)
    proxy.greeting = b"SSH-2.0-OpenSSH_9.2\r\n"
    try:
        with pytest.raises(TierError, match="another protocol"):
            connect(proxy.port)
    finally:
        proxy.close()


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
