"""RedisTier over redis-server and over Valkey: the suite of tiers, faults, a full server, a password, bad input."""

from __future__ import annotations

import builtins
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("redis", reason="needs the extra kvmem[redis]")
pytest.importorskip("xxhash", reason="needs the extra kvmem[tiers]")

import redis
from remote_faults import LIMITS, PATIENT, SECONDS, RemoteFaults, comes_back, hurry
from remote_servers import Server, free_port, redis_command, running
from tier_suite import TierSuite, get, key_of, put

from kvmem.errors import SpecError, TierError
from kvmem.tiers import Result, Status, Tier
from kvmem.tiers.redis import RedisTier
from kvmem.tiers.remote import Limits


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    port = free_port()
    with running(redis_command(request.param, port), port) as server:
        yield server


@pytest.fixture
def admin(server: Server) -> Iterator[Any]:
    with redis.Redis(port=server.port, protocol=2) as client:
        client.flushall()
        yield client


@pytest.fixture
def port(server: Server, admin: Any) -> int:
    return server.port


@pytest.fixture
def connect() -> Iterator[Callable[..., RedisTier]]:
    opened: list[RedisTier] = []

    def connect(port: int, **options: Any) -> RedisTier:
        opened.append(RedisTier(f"redis://127.0.0.1:{port}/0", **options))
        return opened[-1]

    yield connect
    for tier in opened:
        hurry(tier)  # the test may have left a call behind
        tier.close()


class TestRedisTier(TierSuite):
    bounded = False
    overhead_bytes = 1 << 20  # the server counts the buffers of its clients

    @pytest.fixture
    def make(self, port: int, connect: Callable[..., RedisTier]) -> Callable[..., Tier]:
        return lambda num_blocks=64: connect(port, timeout_seconds=20, limits=Limits(batch_seconds=30))


@pytest.mark.parametrize("server", ["redis"], indirect=True, scope="module")
class TestRedisFaults(RemoteFaults):
    @pytest.fixture
    def store(self, admin: Any) -> Callable[[bytes, bytes], None]:
        return lambda key, record: admin.set(f"kvmem/1/{key.hex()}", record)

    def test_a_full_server(self, tier: RedisTier, admin: Any, caplog: pytest.LogCaptureFixture) -> None:
        assert put(tier, {key_of(0): b"old"})[0].ok
        admin.config_set("maxmemory", 1)
        try:
            for _ in range(5):
                (result,) = put(tier, {key_of(0): b"new"})
                assert result.status is Status.FULL and result.num_bytes == 0 and "full" in result.reason
            assert get(tier, key_of(0)) == b"old"  # reading goes on, so the circuit is closed
            assert tier.capacity().total_bytes == 1
        finally:
            admin.config_set("maxmemory", 64 << 20)
        assert put(tier, {key_of(0): b"new"})[0].ok and get(tier, key_of(0)) == b"new"
        assert len([r for r in caplog.records if r.name == "kvmem"]) == 1

    def test_a_value_of_another_type(self, tier: RedisTier, admin: Any) -> None:
        admin.rpush(f"kvmem/1/{key_of(0).hex()}", "x")
        result = get(tier, key_of(0))
        assert isinstance(result, Result) and result.status is Status.CORRUPT
        assert put(tier, {key_of(0): b"x"})[0].ok and get(tier, key_of(0)) == b"x"

    def test_a_value_that_is_longer_than_the_buffer(self, tier: RedisTier, store: Callable[..., None]) -> None:
        """Of what somebody put there, no more is read than the buffer could hold."""
        store(key_of(0), bytes(20 << 20))
        tracemalloc.start()
        result = get(tier, key_of(0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20
        assert isinstance(result, Result) and result.status is Status.CORRUPT

    def test_namespaces_do_not_meet(self, port: int, connect: Callable[..., RedisTier]) -> None:
        one, other = (connect(port, namespace=name, timeout_seconds=PATIENT) for name in ("one", "other"))
        put(one, {key_of(0): b"one"})
        assert other.contains([key_of(0)]) == 0 and not isinstance(get(one, key_of(0)), Result)

    def test_a_server_that_stops_and_comes_back(self, server: Server, tier: RedisTier) -> None:
        put(tier, {key_of(0): b"x"})
        hurry(tier)
        server.freeze()
        result = get(tier, key_of(0))
        server.thaw()
        assert isinstance(result, Result) and result.status is Status.FAILED
        hurry(tier, PATIENT)
        comes_back(tier)
        server.kill()
        assert isinstance(get(tier, key_of(0)), Result)
        server.start()
        comes_back(tier)
        assert isinstance(get(tier, key_of(0)), Result)  # it had saved nothing

    def test_a_password(self, port: int, admin: Any) -> None:
        admin.config_set("requirepass", "secret")
        try:
            with pytest.raises(TierError, match="(?i)auth") as refused:
                RedisTier(f"redis://:wrong@127.0.0.1:{port}/0", check=True)
            assert "wrong" not in str(refused.value)
            with RedisTier(f"redis://:wrong@127.0.0.1:{port}/0") as tier:
                assert put(tier, {key_of(0): b"x"})[0].status is Status.FAILED
            with RedisTier(f"redis://:secret@127.0.0.1:{port}/0", check=True) as tier:
                assert put(tier, {key_of(0): b"x"})[0].ok
        finally:
            admin.config_set("requirepass", "")

    def test_a_batch_of_more_keys_than_one_part(self, port: int, connect: Callable[..., RedisTier]) -> None:
        tier = connect(port, timeout_seconds=20, limits=Limits(batch_seconds=30, batch_bytes=1000))
        keys = [key_of(n) for n in range(1100)]
        assert all(r.ok for r in tier.put(keys, [memoryview(key) for key in keys]))
        assert tier.contains([*keys, key_of(2000)]) == 1100
        tier.delete([keys[1030]])
        assert tier.contains(keys) == 1030


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("http://127.0.0.1:6379", {}, "scheme 'http'"),
        ("127.0.0.1:6379", {}, "scheme"),
        (b"redis://127.0.0.1", {}, "url: got b'redis"),
        ("redis://", {}, "names no server"),
        ("unix://", {}, "names no server"),
        ("redis://127.0.0.1:0", {}, "names no server"),
        ("redis://127.0.0.1:70000", {}, "url: Port out of range"),
        ("redis://127.0.0.1:port", {}, "url: Port could not"),
        ("redis://127.0.0.1:6379/first", {}, "database '/first'"),
        ("redis://127.0.0.1:6379?socket_timeout=99", {}, "sets socket_timeout"),
        ("redis://127.0.0.1:6379?colour=red", {}, "refused by redis-py"),
        ("redis://127.0.0.1", {"timeout_seconds": -1}, "timeout_seconds: got -1"),
        ("redis://127.0.0.1", {"timeout_seconds": float("nan")}, "timeout_seconds: got nan"),
        ("redis://127.0.0.1", {"timeout_seconds": "1"}, "timeout_seconds: got '1'"),
        ("redis://127.0.0.1", {"timeout_seconds": True}, "timeout_seconds: got True"),
        ("redis://127.0.0.1", {"namespace": ""}, "namespace: got ''"),
        ("redis://127.0.0.1", {"namespace": "a b"}, "namespace: got 'a b'"),
        ("redis://127.0.0.1", {"limits": {"faults": 3}}, "limits: got"),
    ],
)
def test_refused_at_opening(url: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        RedisTier(url, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_seconds": 0}, "limits.batch_seconds: got 0"),
        ({"pause_seconds": float("inf")}, "limits.pause_seconds: got inf"),
        ({"batch_bytes": 0}, "limits.batch_bytes: got 0"),
        ({"faults": 0}, "limits.faults: got 0"),
        ({"calls": 1.5}, "limits.calls: got 1.5"),
    ],
)
def test_limits_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Limits(**options)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "redis":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SpecError, match=r"pip install 'kvmem\[redis\]'"):
        RedisTier("redis://127.0.0.1")


def test_opening_needs_no_server() -> None:
    with RedisTier(f"redis://127.0.0.1:{free_port()}", timeout_seconds=SECONDS, limits=LIMITS) as tier:
        assert put(tier, {key_of(0): b"x"})[0].status is Status.FAILED
        assert tier.contains([key_of(0)]) == 0 and tier.capacity().num_blocks == 0
