"""ObjectStoreTier over S3 (moto's server), a folder and memory: the suite of tiers, faults, bad input."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("obstore", reason="needs the extra kvmem[s3]")
pytest.importorskip("xxhash", reason="needs the extra kvmem[tiers]")

import obstore
from obstore.store import from_url
from remote_faults import RemoteFaults, hurry
from remote_servers import Server, moto
from tier_suite import TierSuite, get, key_of, payload_of, put

from kvmem.errors import SpecError, TierError
from kvmem.tiers import Result, Status, Tier
from kvmem.tiers.object_store import ObjectStoreTier
from kvmem.tiers.remote import Limits

PATIENT = Limits(batch_seconds=60)


def request(server: Server, method: str, path: str) -> None:
    url = f"http://127.0.0.1:{server.port}/{path}"
    with urllib.request.urlopen(urllib.request.Request(url, b"", method=method), timeout=20) as answer:
        answer.read()


def place(port: int) -> dict[str, str]:
    keys = {"access_key_id": "test", "secret_access_key": "test"}
    return {"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1", **keys}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with moto() as server:
        yield server


@pytest.fixture
def port(server: Server) -> int:
    request(server, "POST", "moto-api/reset")
    request(server, "PUT", "bucket")
    return server.port


@pytest.fixture
def connect() -> Iterator[Callable[..., ObjectStoreTier]]:
    opened: list[ObjectStoreTier] = []

    def connect(port: int, **options: Any) -> ObjectStoreTier:
        opened.append(ObjectStoreTier("s3://bucket/path", options=place(port), **options))
        return opened[-1]

    yield connect
    for tier in opened:
        hurry(tier)  # the test may have left a call behind
        tier.close()


class TestS3(TierSuite):
    bounded, steps = False, 40

    @pytest.fixture
    def make(self, port: int, connect: Callable[..., Tier]) -> Callable[..., Tier]:
        return lambda num_blocks=64: connect(port, timeout_seconds=30, limits=PATIENT)


class TestS3Faults(RemoteFaults):
    keeps_connections, walk_steps = False, RemoteFaults.walk_steps // 2

    @pytest.fixture
    def store(self, port: int) -> Callable[[bytes, bytes], object]:
        bucket = from_url("s3://bucket/path", **place(port), client_options={"allow_http": True})
        return lambda key, record: obstore.put(bucket, f"kvmem/1/{key.hex()}", record)

    def test_no_bucket(self, tier: Tier, server: Server, connect: Callable[..., Tier]) -> None:
        request(server, "DELETE", "bucket")
        assert put(tier, {key_of(0): b"x"})[0].status is Status.FAILED
        assert isinstance(get(tier, key_of(0)), Result)
        with pytest.raises(TierError, match="check"):
            connect(server.port, check=True)


class TestFolder(TierSuite):
    bounded, steps = False, 200

    @pytest.fixture
    def make(self, tmp_path: Path) -> Iterator[Callable[..., Tier]]:
        with ObjectStoreTier(tmp_path.as_uri(), timeout_seconds=30, limits=PATIENT) as tier:
            yield lambda num_blocks=64: tier

    def test_another_process_finds_it(self, make: Callable[..., Tier], tmp_path: Path) -> None:
        put(make(), {key_of(0): b"shared"})
        with ObjectStoreTier(tmp_path.as_uri()) as other:
            assert get(other, key_of(0)) == b"shared"

    def test_a_folder_that_is_full_or_gone(self, make: Callable[..., Tier], tmp_path: Path) -> None:
        tier = make()
        put(tier, {key_of(0): b"x"})
        (tmp_path / "kvmem" / "1" / key_of(0).hex()).unlink()
        assert tier.contains([key_of(0)]) == 0
        (tmp_path / "kvmem" / "1").rename(tmp_path / "elsewhere")
        (tmp_path / "kvmem" / "1").write_bytes(b"a file where the folder was")
        assert put(tier, {key_of(0): b"x"})[0].status is Status.FAILED
        assert isinstance(get(tier, key_of(0)), Result)


class TestMemory(TierSuite):
    bounded, steps = False, 200

    @pytest.fixture
    def make(self) -> Iterator[Callable[..., Tier]]:
        with ObjectStoreTier("memory:///", timeout_seconds=30, limits=PATIENT) as tier:
            yield lambda num_blocks=64: tier


def test_paths_keep_caches_apart(tmp_path: Path) -> None:
    with (
        ObjectStoreTier(tmp_path.as_uri(), namespace="one") as one,
        ObjectStoreTier(tmp_path.as_uri(), namespace="other") as other,
        ObjectStoreTier((tmp_path / "deeper").as_uri(), namespace="one", options={"mkdir": True}) as deeper,
    ):
        data = payload_of(key_of(0), 1, 100)
        assert put(one, {key_of(0): data})[0].ok and get(one, key_of(0)) == data
        assert other.contains([key_of(0)]) == deeper.contains([key_of(0)]) == 0
        assert other.capacity().num_blocks == 0


@pytest.mark.parametrize(
    ("url", "options", "words"),
    [
        ("http://127.0.0.1/", {}, "url: got 'http"),
        ("bucket/path", {}, "url: got 'bucket"),
        (None, {}, "url: got None"),
        ("s3:///", {}, "refused by obstore"),
        ("s3://bucket", {"options": {"colour": "red"}}, "refused by obstore: .*colour"),
        ("az://container", {}, "refused by obstore: .*Account"),
        ("s3://bucket", {"options": {"endpoint": "127.0.0.1:9000"}}, "endpoint '127.0.0.1:9000'; must be a URL"),
        ("s3://bucket", {"options": {"retry_config": {}}}, "options: has retry_config"),
        ("memory:///", {"options": {"x": 1}}, "refused by obstore"),
        ("memory:///", {"timeout_seconds": 0}, "timeout_seconds: got 0"),
        ("memory:///", {"namespace": "a/b"}, "namespace: got 'a/b'"),
        ("memory:///", {"limits": None}, "limits: got None"),
    ],
)
def test_refused_at_opening(url: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ObjectStoreTier(url, **options)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(TierError, match="is no folder"):
            ObjectStoreTier(path.as_uri())
