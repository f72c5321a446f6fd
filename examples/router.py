"""Three engines and a router: requests go round-robin, or where cache events say that most of the prompt is.

Each way with caches of their own, and with a store that all engines share: a redis-server, started here and stopped, or
a folder where none is installed. Prints which part of all prompts was cached, and the largest share of the work.
"""

import random
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial

import torch

import kvmem
from kvmem.chunks import FolderTier
from kvmem.events import BlockStored, block_digests
from kvmem.tiers import Identity, Tiers

ENGINES, BLOCK, CHATS, TURNS, STEM, TURN = 3, 16, 24, 7, 160, 48
SPEC = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=16, dtype=torch.float32, block_size=BLOCK)


class Engine:
    """An allocator, a thread, and a model that writes each token's id into the cache and checks what it finds."""

    def __init__(self, shared):
        tiers = Tiers(host="128KiB", lower=[shared] if shared else [], identity=Identity("toy"))
        sizes = {"memory": "384KiB", "max_sequences": 2, "max_tokens": 1024, "events": 8192}
        self.alloc = kvmem.Allocator(SPEC, backend="paged", device="cpu", tiers=tiers, **sizes)
        self.thread, self.places, self.work = ThreadPoolExecutor(1), Counter(), 0  # places of each block, by its hash

    def serve(self, prompt):
        with self.alloc.sequence(prompt, load="all") as seq:
            assert seq.wait(60)
            cached, ids = seq.num_cached_tokens, torch.tensor(prompt, dtype=torch.float32)[:, None, None]
            seq.extend(len(prompt) - cached)
            batch = self.alloc.batch([seq])
            for memory in (self.alloc.tensor(0, name).flatten(0, 1) for name in "kv"):  # a token a slot
                found = memory[batch.block_table[0].long()[:, None] * BLOCK + torch.arange(BLOCK)].flatten(0, 1)
                assert (found[:cached] == ids[:cached]).all(), "KV of other tokens"
                memory[batch.slot_mapping.long()] = ids[cached:].expand(-1, 1, 16)
            seq.commit(prompt[cached:])
        self.alloc.store(prompt)
        return cached

    def learn(self):
        for event in self.alloc.events():
            for digest in event.block_hashes:  # on the device, in host memory, or in both
                self.places[digest] += 1 if isinstance(event, BlockStored) else -1

    def known(self, digests):
        """Return how many tokens from the start of a prompt this engine has, as far as its events say."""
        return next((n for n, digest in enumerate(digests) if self.places[digest] < 1), len(digests)) * BLOCK


def prompts():
    """Chats that begin with one of four system prompts and grow with each turn, in random order."""
    draw = random.Random(1)
    chats = [[1000 * (chat % 4) + i for i in range(STEM)] for chat in range(CHATS)]
    for chat in draw.sample([*range(CHATS)] * TURNS, CHATS * TURNS):
        chats[chat] = chats[chat] + [draw.randrange(5000) for _ in range(TURN)]
        yield chats[chat]


def run(by_events, share):
    """Return which part of all prompts was cached, and which part of the work the busiest engine did."""
    engines, todo, cached = [Engine(share()) for _ in range(ENGINES)], list(prompts()), 0
    for at in range(0, len(todo), ENGINES):  # so many arrive at once
        waiting = []
        for number, prompt in enumerate(todo[at : at + ENGINES]):
            digests, most = block_digests(SPEC, prompt), sum(e.work for e in engines) / ENGINES + 1000
            best = max(engines, key=lambda e: (e.work < most, e.known(digests), -e.work))
            engine = best if by_events else engines[(at + number) % ENGINES]
            engine.work += len(prompt) - engine.known(digests)
            waiting.append(engine.thread.submit(engine.serve, prompt))
        cached += sum(one.result() for one in waiting)
        for engine in engines:
            assert engine.alloc.flush(60)
            engine.learn()
    for engine in engines:
        engine.thread.shutdown()
        engine.alloc.close()
    work = [engine.work for engine in engines]
    return cached / sum(map(len, todo)), max(work) / sum(work)


@contextmanager
def a_store(folder):
    """Yield its name, and what opens it under a name that keeps one run from finding what another has stored."""
    if (program := shutil.which("redis-server")) is None:
        yield "folder", lambda name: FolderTier(f"{folder}/{name}")
        return
    from kvmem.tiers.redis import RedisTier

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [program, *f"--bind 127.0.0.1 --port {port} --appendonly no --dir {folder} --save".split(), ""]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        while server.poll() is None:  # until it listens
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
        yield "redis", lambda name: RedisTier(f"redis://127.0.0.1:{port}", namespace=name)
    finally:
        server.kill()
        server.wait()


def main():
    hits = {}
    with tempfile.TemporaryDirectory() as folder, a_store(folder) as (store, open_store):
        print(f"{'routing':14}{'caches':20}{'cached':>8}{'largest share of work':>24}")
        for shared in (False, True):
            for routing in ("round-robin", "by events"):
                share = partial(open_store, routing.replace(" ", "-")) if shared else lambda: None
                hits[routing, shared], largest = run(routing == "by events", share)
                caches = f"own and {store}" if shared else "own"
                print(f"{routing:14}{caches:20}{hits[routing, shared]:8.1%}{largest:24.1%}")
    assert hits["by events", False] > hits["round-robin", False] + 0.1
    assert hits["round-robin", True] > hits["round-robin", False] + 0.1
    assert hits["by events", True] >= hits["by events", False]


main()
