"""What every transport does: bytes equal, ranges checked, a peer that dies or hangs is an error in time, never wrong bytes."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from transport_peers import KINDS, exposed, need, open_transport, pattern

from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer
from kvmem.transport import Remote, Transport
from kvmem.transport.base import RegisteredTransport, ScratchRemote
from kvmem.transport.sockets import SocketTransport

BYTES = 3 << 20  # more than the scratch of a remote
SOON = 60.0  # seconds; what a dead peer costs is bounded by the seconds of the read


@pytest.fixture(scope="module", params=KINDS)
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    need(request.param)
    found = open_transport(request.param)
    yield found
    found.close()
    found.close()


def test_every_part_arrives(transport: Transport, rng: random.Random, seed: int) -> None:
    content = pattern(BYTES, seed)
    with exposed(transport.name, BYTES, seed) as (_, address):
        remote = transport.connect(address)
        assert remote.num_bytes == BYTES and remote.where
        assert remote.read([], SOON) == [] and remote.read([(0, 0), (BYTES, 0)], SOON) == [b"", b""]
        assert remote.read([(0, BYTES)], SOON) == [content]  # in several rounds
        for most in (1, 100, 300_000):
            parts = [(rng.randrange(BYTES), rng.randrange(most + 1)) for _ in range(rng.choice([1, 3, 40]))]
            parts = [(at, min(n, BYTES - at)) for at, n in parts]
            assert remote.read(parts, SOON) == [content[at : at + n] for at, n in parts]
        small = [(rng.randrange(BYTES - 8), 8) for _ in range(5000)]  # more than one request
        assert remote.read(small, SOON) == [content[at : at + 8] for at, _ in small]
        for bad in [(-1, 2), (0, -1), (0, BYTES + 1), (BYTES, 1), (1 << 70, 1)]:
            with pytest.raises(SpecError, match="it has"):
                remote.read([(0, 8), bad], SOON)


def test_readers_at_once(transport: Transport, seed: int) -> None:
    content, wrong = pattern(BYTES, seed), []
    with exposed(transport.name, BYTES, seed) as (_, address):
        remotes = [transport.connect(address) for _ in range(2)]

        def read(n: int) -> None:
            for at in range(0, 400_000, 40_000):
                if remotes[n % 2].read([(at, 30_000), (at + n, 10)], SOON) != [
                    content[at : at + 30_000], content[at + n : at + n + 10]
                ]:  # fmt: skip
                    wrong.append((n, at))

        threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_peer_that_is_killed_in_the_middle_of_reads(transport: Transport, seed: int) -> None:
    """All reads before it give the right bytes; from then on each is an error, and none waits."""
    content = pattern(BYTES, seed)
    with exposed(transport.name, BYTES, seed) as (process, address):
        remote = transport.connect(address)
        assert remote.read([(0, 8)], SOON) == [content[:8]]
        killer = threading.Timer(0.02, process.kill)
        killer.start()
        with pytest.raises(TierError) as caught:
            while True:
                assert remote.read([(0, BYTES)], SOON) == [content]
        killer.join()
        assert remote.where.split()[-1] in str(caught.value) or "NIXL" in str(caught.value)
        process.join()
        with pytest.raises(TierError):
            remote.read([(0, 8)], SOON)


def test_a_peer_that_hangs_and_comes_back(transport: Transport, seed: int) -> None:
    content = pattern(BYTES, seed)
    with exposed(transport.name, BYTES, seed) as (process, address):
        remote = transport.connect(address)
        assert remote.read([(0, 8)], SOON) == [content[:8]]
        os.kill(process.pid, signal.SIGSTOP)
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            pass
        for _ in range(2):
            with pytest.raises(TierError):
                remote.read([(0, BYTES)], 0.2)
        os.kill(process.pid, signal.SIGCONT)
        assert remote.read([(5, BYTES - 5)], SOON) == [content[5:]]


class Slow(ScratchRemote[list[int]]):
    """A transfer of one byte, the offset itself, that ends when it is told to, and cannot be cancelled."""

    def __init__(self) -> None:
        super().__init__(SlowTransport(4096), "a slow one", 256)
        self.begun: list[tuple[int, int]] = []
        self.over = True

    def _begin(self, offsets: Sequence[int], at: Sequence[int], lengths: Sequence[int]) -> list[int]:
        self.begun += zip(at, offsets, strict=True)
        return [0]

    def _ended(self, transfer: list[int]) -> bool:
        if self.over:
            self.arrive()
        return self.over

    def _cancel(self, transfer: list[int]) -> bool:
        return False

    def arrive(self) -> None:
        for place, byte in self.begun:
            self._scratch[place] = byte
        self.begun.clear()


class SlowTransport(RegisteredTransport[None]):
    name = "slow"

    def expose(self, memory: Buffer) -> bytes:
        return b""

    def connect(self, address: bytes) -> Remote:
        return Slow()

    def _enter(self, where: int, num_bytes: int) -> None: ...
    def _leave(self, where: int, registration: None) -> None: ...
    def _end(self) -> None: ...


def test_what_arrives_after_a_read_was_given_up_is_not_taken_for_another() -> None:
    remote = Slow()
    assert remote.read([(7, 1)], SOON) == [b"\x07"]
    remote.over = False
    with pytest.raises(TierError, match="no answer in time"):
        remote.read([(8, 1)], 0.01)
    with pytest.raises(TierError, match="an earlier read has not ended"):
        remote.read([(9, 1)], 0.01)
    assert [byte for _, byte in remote.begun] == [8]  # the second has not begun: its bytes would meet the first one's
    remote.over = True
    assert remote.read([(10, 1), (11, 1)], SOON) == [b"\x0a", b"\x0b"]
    remote.close()
    remote.close()
    with pytest.raises(TierError, match="closed"):
        remote.read([(7, 1)], SOON)


def test_what_a_signal_leaves_behind_is_awaited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Slow()
    remote.over = False
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kvmem.transport.base.time.sleep", lambda _: signal.raise_signal(signal.SIGINT))
        remote.read([(8, 1)], SOON)
    with pytest.raises(TierError, match="an earlier read has not ended"):
        remote.read([(9, 1)], 0.01)
    remote.over = True
    assert remote.read([(10, 1)], SOON) == [b"\x0a"]


def test_what_is_no_address(transport: Transport) -> None:
    memory = memoryview(mmap.mmap(-1, 4096)).cast("B")
    good = transport.expose(memory)
    assert good.isascii()
    bad = [b"", b"{}", b"\xff", b"[1]", good[:-1], good.replace(transport.name.encode(), b"other"), None]
    wrong = (b'"bytes":-1', b'"bytes":"x"', b'"size":4096', b'"bytes":%d' % 2**63)
    bad += [b"[" * 100_000, *(good.replace(b'"bytes":4096', value) for value in wrong)]
    for address in bad:
        with pytest.raises(SpecError, match="address"):
            transport.connect(address)  # type: ignore[arg-type]


def test_nothing_is_read_from_a_closed_transport(seed: int) -> None:
    server, reader = SocketTransport(), SocketTransport()
    memory = memoryview(mmap.mmap(-1, 4096)).cast("B")
    remote = reader.connect(server.expose(memory))
    assert remote.read([(0, 4096)], SOON) == [bytes(4096)]
    server.close()
    with pytest.raises(TierError):
        remote.read([(0, 1)], SOON)
    with pytest.raises(TierError, match="closed"):
        server.expose(memory)
    with SocketTransport() as one:
        fields = json.loads(one.expose(memory))
        for changed in ({"port": 66_000}, {"host": "a" * 300}, {"host": "é.."}, {"host": "a\0"}):
            with pytest.raises(TierError):
                one.connect(json.dumps(fields | changed).encode()).read([(0, 1)], SOON)
        with pytest.raises(SpecError, match="address"):
            one.connect(json.dumps(fields | {"memory": 2**32}).encode())


def test_closing_a_transport_ends_its_readers(transport: Transport, seed: int) -> None:
    reader = open_transport(transport.name)
    with exposed(transport.name, BYTES, seed) as (_, address):
        remote = reader.connect(address)
        assert remote.read([(0, 8)], SOON) == [pattern(8, seed)]
        reader.close()
        with pytest.raises(TierError, match="closed"):
            remote.read([(0, 8)], SOON)
        with pytest.raises((SpecError, TierError), match="closed"):
            reader.connect(address)


def test_closing_a_transport_wakes_a_read() -> None:
    """Of a process that accepts, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent, SocketTransport() as reader, SocketTransport() as server:
        fields = json.loads(server.expose(memoryview(bytearray(8))))
        remote = reader.connect(json.dumps(fields | {"port": silent.getsockname()[1]}).encode())
        caught: list[BaseException] = []

        def read() -> None:
            with pytest.raises(TierError) as error:
                remote.read([(0, 8)], 1e6)
            caught.append(error.value)

        thread = threading.Thread(target=read)
        thread.start()
        with silent.accept()[0] as asked:
            asked.recv(1)
            reader.close()
            thread.join(SOON)
        assert caught


def test_a_server_without_file_descriptors_serves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fails, accept = [True] * 2, socket.socket.accept

    def accept_later(listener: socket.socket) -> Any:
        if fails and fails.pop():
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", accept_later)
    with SocketTransport() as server, SocketTransport() as reader:
        assert reader.connect(server.expose(memoryview(bytearray(8)))).read([(0, 8)], SOON) == [bytes(8)]


def test_a_reader_without_the_token_gets_nothing() -> None:
    with SocketTransport() as server, SocketTransport() as reader:
        memory = memoryview(mmap.mmap(-1, 4096)).cast("B")
        fields = json.loads(server.expose(memory))
        for changed in ({"token": "00" * 16}, {"memory": 7}, {"bytes": 8192}):
            remote = reader.connect(json.dumps(fields | changed).encode())
            with pytest.raises(TierError, match="closed|reset"):
                remote.read([(0, 1), (remote.num_bytes - 1, 1)], SOON)
