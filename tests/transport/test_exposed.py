"""ExposedTier and PeerTier: the suite of tiers over each transport, a writer at the same time, a peer that dies."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from tier_suite import LARGEST, TierSuite, get, key_of, payload_of, put
from transport_peers import KINDS, capacity_of, exposed_tier, need, open_transport

from kvmem.errors import SpecError
from kvmem.tiers import Result, Status, Tier
from kvmem.tiers.base import Buffer
from kvmem.tiers.remote import Limits
from kvmem.transport import ExposedTier, PeerTier, Transport
from kvmem.transport.directory import ENTRIES
from kvmem.transport.sockets import SocketTransport

pytest.importorskip("xxhash", reason="needs the extra kvmem[tiers]")
SOON = 60.0


class BothEnds(ExposedTier):
    """What is put here is looked for and read through the transport."""

    def __init__(self, server: Transport, reader: Transport, **sizes: Any) -> None:
        super().__init__(server, **sizes)
        self._peer = PeerTier(reader, self.address, timeout_seconds=SOON, limits=Limits(batch_seconds=SOON))

    def contains(self, keys: Sequence[bytes]) -> int:
        self._check(keys)
        return self._peer.contains(keys)

    def get(self, keys: Sequence[bytes], buffers: Sequence[Buffer]) -> list[Result]:
        self._check(keys, buffers, writable=True)
        return self._peer.get(keys, buffers)


class TestExposed(TierSuite):
    @pytest.fixture
    def make(self) -> Iterator[Callable[..., Tier]]:
        transport = SocketTransport()
        yield lambda num_blocks=64: ExposedTier(transport, capacity=capacity_of(num_blocks), block_bytes=LARGEST)
        transport.close()


@pytest.fixture(scope="module", params=KINDS)
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Transport, Transport]]:
    """One that exposes, and one that reads."""
    need(request.param)
    server, reader = open_transport(request.param), open_transport(request.param)
    yield server, reader
    reader.close()
    server.close()


class TestPeer(TierSuite):
    steps = 100

    @pytest.fixture
    def make(self, ends: tuple[Transport, Transport]) -> Callable[..., Tier]:
        return lambda num_blocks=64: BothEnds(*ends, capacity=capacity_of(num_blocks), block_bytes=LARGEST)


def all_of(tier: Tier, count: int) -> list[bytes | Result]:
    """What one call gives for the keys 0 to count - 1."""
    buffers = [bytearray(LARGEST) for _ in range(count)]
    results = tier.get([key_of(n) for n in range(count)], [memoryview(b) for b in buffers])
    return [bytes(b[: r.num_bytes]) if r.ok else r for b, r in zip(buffers, results, strict=True)]


def assert_right(found: list[bytes | Result]) -> int:
    """Each is a miss with a reason, or bytes that were put under its key; return how many."""
    for n, data in enumerate(found):
        if isinstance(data, Result):
            assert data.status in (Status.MISS, Status.CORRUPT, Status.FAILED) and data.reason, data
        else:
            assert data == payload_of(key_of(n), int.from_bytes(data[:8], "little"), LARGEST)
    return sum(isinstance(data, bytes) for data in found)


def test_a_writer_at_the_same_time_gives_right_bytes_or_misses(ends: tuple[Transport, Transport]) -> None:
    with exposed_tier(ends[1].name, 32, True) as (_, address), PeerTier(ends[1], address, timeout_seconds=5) as peer:
        right = 0
        for _ in range(2000):
            right += assert_right(all_of(peer, 64))
            if right > 300:
                break
        assert right > 300


def test_a_peer_that_is_killed_in_the_middle_of_a_transfer_is_a_miss(ends: tuple[Transport, Transport]) -> None:
    limits = Limits(batch_seconds=SOON, faults=2, pause_seconds=SOON)
    with exposed_tier(ends[1].name, 200) as (process, address):
        peer = PeerTier(ends[1], address, timeout_seconds=30, limits=limits)
        assert assert_right(all_of(peer, 200)) == 200 and peer.contains([key_of(n) for n in range(250)]) == 200
        killer = threading.Timer(0.02, process.kill)
        killer.start()
        while (right := assert_right(found := all_of(peer, 200))) == 200:
            pass
        killer.join()
        assert all(r.status is Status.FAILED for r in found if isinstance(r, Result)), found[right]
        for _ in range(2):
            assert {r.status for r in all_of(peer, 2) if isinstance(r, Result)} == {Status.FAILED}
        (left_alone,) = all_of(peer, 1)
        assert isinstance(left_alone, Result) and "tried again after" in left_alone.reason
        assert peer.contains([key_of(0)]) == 0
        peer.close()


def test_nothing_is_written_to_a_peer() -> None:
    with SocketTransport() as transport:
        tier = ExposedTier(transport, capacity=capacity_of(8), block_bytes=LARGEST)
        with PeerTier(transport, tier.address) as peer:
            (result,) = put(peer, {key_of(0): b"x"})
            assert result.status is Status.FULL and "only read" in result.reason
            assert peer.delete([key_of(0)])[0].status is Status.FULL and peer.capacity().total_bytes
            put(tier, {key_of(0): b"x"})
            assert get(peer, key_of(0)) == b"x"
            tier.close()  # nothing is found in it, and nothing waits
            assert isinstance(get(peer, key_of(0)), Result) and peer.contains([key_of(0)]) == 0


def test_a_full_bucket_gives_up_its_oldest_block() -> None:
    """Keys that all hash to one bucket, of a tier that has room for more."""
    keys = [bytes(8) + key_of(n)[8:] for n in range(ENTRIES + 3)]
    with SocketTransport() as transport:
        tier = ExposedTier(transport, capacity=capacity_of(200), block_bytes=LARGEST)
        put(tier, dict.fromkeys(keys[:ENTRIES], b"x"))
        assert get(tier, keys[0]) == b"x"  # the second is the oldest now
        put(tier, dict.fromkeys(keys[ENTRIES:], b"x"))
        with PeerTier(transport, tier.address) as peer:
            for end in (tier, peer):
                there = [end.contains([key]) for key in keys]
                assert there == [1] + 3 * [0] + (ENTRIES - 1) * [1], there
        assert tier.capacity().num_blocks == ENTRIES


@pytest.mark.parametrize("change", [b"", b"{}", b'"slots":8', b'"slot_bytes":5120', b"sockets", b"kvmem 1"])
def test_what_is_no_address_of_a_tier(change: bytes, rng: random.Random) -> None:
    with SocketTransport() as transport:
        good = ExposedTier(transport, capacity=capacity_of(8), block_bytes=LARGEST).address
        bad = good.replace(change, change[: change.find(b":") + 1] + b"77777777777") if len(change) > 2 else change
        assert bad != good
        with pytest.raises(SpecError, match="address"):
            PeerTier(transport, bad)


def test_a_peer_that_is_not_opened_keeps_nothing() -> None:
    with SocketTransport() as transport:
        good = ExposedTier(transport, capacity=capacity_of(8), block_bytes=LARGEST).address
        for address, timeout in ((good.replace(b'"slots":8', b'"slots":9'), 1.0), (good, -1.0)):
            with pytest.raises(SpecError):
                PeerTier(transport, address, timeout_seconds=timeout)
        assert not transport._remotes


def test_arguments_are_checked() -> None:
    with SocketTransport() as transport:
        for wrong in ({"capacity": 100}, {"capacity": -1}, {"block_bytes": 0}, {"capacity": "many"}):
            with pytest.raises(SpecError):
                ExposedTier(transport, **{"capacity": 1 << 20, "block_bytes": 100, **wrong})  # type: ignore[arg-type]
        for call in (lambda: ExposedTier(None, capacity=1, block_bytes=1), lambda: PeerTier(None, b"")):  # type: ignore[arg-type]
            with pytest.raises(SpecError, match="transport"):
                call()
