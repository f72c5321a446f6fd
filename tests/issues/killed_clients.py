"""Clients of a shared store, one of which is killed in the middle of a store, while the other goes on.

``python killed_clients.py FOLDER PORT KILLS SEED`` forks before it has any thread. PORT is of a redis-server, or 0. It
prints for each store and backend what was found, as JSON, or the traceback.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from disk_processes import KillingFiles, outcome
from disk_support import capacity_of
from issue_world import PATIENT, FaultyTier, key_of, words
from tier_world import PAGE, SPECS, World, make

from kvmem.tiers import Identity, Tier, largest_block_bytes
from kvmem.tiers.disk import DiskTier
from kvmem.tiers.redis import RedisTier

TEXTS = [words(41, n) for n in range(3)]  # ten blocks each
BLOCKS = 30
SIZE, FINGERPRINT = largest_block_bytes(SPECS["full"]()), Identity("toy").fingerprint(SPECS["full"]())
OPTIONS: dict[str, Any] = {"memory": 64 * PAGE, "host_blocks": 40, "max_tokens": 128, "debug": False}


def disk(path: str, **options: Any) -> Tier:
    """With room for the blocks of TEXTS and no more."""
    if not options.get("read_only"):
        options["capacity"] = capacity_of(BLOCKS, SIZE)
    return DiskTier(path, block_bytes=SIZE, fingerprint=FINGERPRINT, io="threads", threads=1, **options)


def redis(port: int, name: str) -> Tier:
    return RedisTier(f"redis://127.0.0.1:{port}/0", namespace=name, timeout_seconds=PATIENT)


def kill_in_send(step: int, rng: random.Random) -> None:
    """The ``step``-th message that stores something ends within, and with it this process."""
    left, whole = step, socket.socket.sendall

    def sendall(sock: socket.socket, data: Any, *flags: int) -> None:
        nonlocal left
        left -= b"SET\r\n" in bytes(data)
        if left == 0:
            whole(sock, memoryview(data)[: rng.randrange(len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(sock, data, *flags)

    socket.socket.sendall = sendall  # type: ignore[method-assign, assignment]


def die(backend: str, dying: Callable[[], Tier], rng: random.Random) -> None:
    """Store until killed."""
    world = World(make("full", backend, lower=[dying()], **OPTIONS))
    for number in range(10_000):
        text = TEXTS[number] if number < 3 else words(41, rng.randrange(100, 10**6))
        world.run(text, load="all")
        world.alloc.store(text)
        world.alloc.flush(PATIENT)


def go_on(backend: str, reading: Callable[[], Tier], writing: Callable[[], Tier], ready: int, killed: int) -> None:
    """Read beside the other until it is gone. Then all that it had can be used: each text is stored, and found whole."""
    reader = reading()
    world = World(make("full", backend, lower=[reader], **OPTIONS))
    os.write(ready, b"r")
    os.set_blocking(killed, False)
    gone = False
    while not gone:
        with suppress(BlockingIOError):
            gone = os.read(killed, 1) == b""
        for text in TEXTS:
            world.run(text, load="all")
            world.alloc.clear_cache()
    world.alloc.close()
    reader.close()
    tier = writing()
    world = World(make("full", backend, lower=[tier], **OPTIONS))
    if isinstance(tier, DiskTier):  # which is full: new blocks could take the place of what these texts have there
        tier.delete([key_of(world.alloc, text, block) for text in TEXTS for block in range(10)])
    for text in TEXTS:
        world.run(text, load="all")
        world.alloc.store(text)
    assert world.alloc.flush(PATIENT)
    world.alloc.clear_cache()
    assert world.alloc.flush(PATIENT)
    found = [world.run(text, load="all") for text in TEXTS]
    assert found == [40] * 3, f"some of the store is lost: {found}"
    world.alloc.close()
    tier.close()


def fork(work: Callable[[], None], without: int) -> int:
    """A child that does the work. without: a file that is not its own."""
    child = os.fork()
    if child == 0:
        code = 2
        try:
            os.close(without)
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - the parent sees the exit code, and the test the text
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def rounds(
    backend: str, seed: int, kills: int, reading: Callable[[str], Tier], writing: Callable[[str], Tier],
    dying: Callable[[str, random.Random], Tier],
) -> int:  # fmt: skip
    for n in range(kills):
        name, rng = f"{backend}-{n}", random.Random(f"{seed} {backend} {n}")
        (wait, ready), (killed, alive) = os.pipe(), os.pipe()
        read, write_to = partial(reading, name), partial(writing, name)
        other = fork(partial(go_on, backend, read, write_to, ready, killed), alive)
        assert os.read(wait, 1) == b"r"
        dies = fork(partial(die, backend, partial(dying, name, rng), rng), killed)
        os.close(alive)
        _, status = os.waitpid(dies, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0, "the other client did not go on"
        for file in (wait, ready, killed):
            os.close(file)
    return kills


def of_disk(folder: str, kills: int, seed: int, backend: str) -> int:
    def path(name: str) -> str:
        return f"{folder}/{name}"

    def reading(name: str) -> Tier:
        disk(path(name)).close()  # so that there is a folder
        return disk(path(name), read_only=True)

    def dying(name: str, rng: random.Random) -> Tier:
        return disk(path(name), files=KillingFiles(rng.randint(20, 90), rng))

    return rounds(backend, seed, kills, reading, lambda name: disk(path(name)), dying)


def of_redis(port: int, kills: int, seed: int, backend: str) -> int:
    def dying(name: str, rng: random.Random) -> Tier:
        kill_in_send(rng.randint(1, 4), rng)
        return redis(port, name)

    def reading(name: str) -> Tier:
        tier = FaultyTier(redis(port, name))
        tier.arm("put", "full", 0)  # what the texts have there is of the one that dies
        return tier

    return rounds(backend, seed, kills, reading, lambda name: redis(port, name), dying)


if __name__ == "__main__":
    logging.disable()
    place, port, count, first = sys.argv[1], *map(int, sys.argv[2:5])
    found = {}
    for name in ("virtual", "paged"):
        found[f"disk {name}"] = outcome(of_disk, place, count, first, name)
        if port:
            found[f"redis {name}"] = outcome(of_redis, port, count, first, name)
    print(json.dumps(found))
