"""Shows two processes that share a prompt's KV through a redis-server, which is started on this machine and stopped.

The second process computes the last tokens only, and the others are byte for byte what the first has computed. Where no
redis-server is installed, a folder takes its place, through the package obstore.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress

import torch

import kvmem
from kvmem.tiers import Identity, Tiers
from kvmem.tiers.object_store import ObjectStoreTier
from kvmem.tiers.redis import RedisTier

BLOCK, PROMPT = 16, list(range(1000, 1100))
IDS = torch.tensor(PROMPT, dtype=torch.float32)


def one_process(url):
    """One request; returns how many tokens were cached. Here, to compute a token is to write its id into the cache."""
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=1, head_dim=16, dtype=torch.float32, block_size=BLOCK)
    sizes = {"memory": "1MiB", "max_sequences": 2, "max_tokens": 256}
    with RedisTier(url) if url.startswith("redis") else ObjectStoreTier(url) as shared:
        tiers = Tiers(host="1MiB", lower=[shared], identity=Identity("example, version 1"))
        with kvmem.Allocator(spec, backend="paged", device="cpu", tiers=tiers, **sizes) as alloc:
            sequence = alloc.sequence(PROMPT, load="all")
            assert sequence.wait(30)
            cached = sequence.num_cached_tokens
            sequence.extend(len(PROMPT) - cached)
            batch = alloc.batch([sequence]).group(0)
            for layer in range(2):
                for name in "kv":
                    tensor = alloc.tensor(layer, name)  # blocks, tokens of a block, heads, width
                    loaded = tensor[batch.block_table[0, : cached // BLOCK].long()].flatten(0, 1)
                    assert (loaded == IDS[:cached, None, None]).all(), "the store gave other bytes"
                    slots = batch.slot_mapping.long()
                    tensor[slots // BLOCK, slots % BLOCK] = IDS[cached:, None, None].expand(-1, 1, 16)
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
        if program is None:
            print("no redis-server is installed, so a folder takes its place")
        else:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            words = [program, *f"--bind 127.0.0.1 --port {port} --appendonly no --dir {folder} --save".split(), ""]
            url, server = f"redis://127.0.0.1:{port}", subprocess.Popen(words, stdout=subprocess.DEVNULL)
            while server.poll() is None:  # until it listens
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
        try:
            first, second = (subprocess.run([sys.executable, __file__, url]).returncode for _ in "12")
        finally:
            if server is not None:
                server.kill()
                server.wait()
    print(f"through {url.split(':')[0]}: of {len(PROMPT)} tokens, the first process found {first}, the second {second}")
    assert (first, second) == (0, 96), "the second process has not found the prompt"


main()
