"""Shows two processes that share a prompt's KV through Redis, with nothing else in common.

The second process computes the last tokens only, and gets byte for byte what the first has computed. It needs a
redis-server: one is started on a free port of this machine, and stopped. Without one, a folder takes its place, through
the package obstore.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time

import torch

import kvmem
from kvmem.tiers import Identity, Tiers

BLOCK, PROMPT = 16, list(range(1000, 1100))


def tier(url):
    if url.startswith("redis"):
        from kvmem.tiers.redis import RedisTier

        return RedisTier(url)
    from kvmem.tiers.object_store import ObjectStoreTier

    return ObjectStoreTier(url)


def kv(alloc, sequence):
    """K of layer 0 of the sequence's tokens, one row a token."""
    batch = alloc.batch([sequence])
    blocks = batch.group(0).block_table[0, : -(-sequence.num_tokens // BLOCK)].long()
    return alloc.tensor(0, "k")[blocks].flatten(0, 1)


def one_process(url):
    """A request for the prompt; "computing" a token is writing its id, and the next one's, into the cache."""
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=1, head_dim=16, dtype=torch.float32, block_size=BLOCK)
    with tier(url) as shared:
        tiers = Tiers(host="1MiB", lower=[shared], identity=Identity("example, version 1"))
        with kvmem.Allocator(
            spec, backend="paged", device="cpu", memory="1MiB", max_sequences=2, max_tokens=256, tiers=tiers
        ) as alloc:
            sequence = alloc.sequence(PROMPT, load="all")
            assert sequence.wait(30)
            cached = sequence.num_cached_tokens
            ids = torch.tensor(PROMPT, dtype=torch.float32)
            assert torch.equal(kv(alloc, sequence)[:cached, 0, 0], ids[:cached]), "the cache has other tokens"
            sequence.extend(len(PROMPT) - cached)
            slots = alloc.batch([sequence]).group(0).slot_mapping.long()
            alloc.tensor(0, "k").flatten(0, 1)[slots] = ids[cached:, None, None]
            sequence.commit(PROMPT[cached:])
            sequence.free()
            alloc.store(PROMPT)
            assert alloc.flush(30)
            return cached


def main():
    if len(sys.argv) == 2:  # one of the two processes
        sys.exit(one_process(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        url, server, program = f"file://{folder}", None, shutil.which("redis-server")
        if program:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            words = f"--bind 127.0.0.1 --port {port} --appendonly no --dir {folder} --save".split()
            url, server = f"redis://127.0.0.1:{port}", subprocess.Popen([program, *words, ""], stdout=subprocess.DEVNULL)
            time.sleep(1)
        try:
            first, second = (subprocess.run([sys.executable, __file__, url]).returncode for _ in "12")
        finally:
            if server:
                server.kill()
    print(f"through {url.split(':')[0]}: of {len(PROMPT)} tokens, the first process found {first}, the second {second}")
    assert (first, second) == (0, 96), "the second process has not found the prompt"


main()
