"""Two ranks over gloo read their KV from disk while all-reduces run: PRESERVE's windows, for real.

A plan says which blocks each window brings. Asserts that every block arrived, once, with the bytes that were written,
behind the all-reduces and after them, on both ranks; prints the wall times of both ways.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import kvmem
from kvmem.plan import prefetch
from kvmem.tiers import Identity, Tiers, largest_block_bytes
from kvmem.tiers.disk import DiskTier

WINDOWS, BLOCKS, MEMORY = 12, 48, "64MiB"
SPEC = kvmem.CacheSpec.kv(num_layers=8, num_kv_heads=4, head_dim=64, dtype="float16", block_size=64)
PROMPT = list(range(BLOCKS * 64 + 1))


@contextmanager
def allocator(folder: Path, rank: int, **disk: str | bool) -> Iterator[kvmem.Allocator]:
    me, size = Identity("toy", rank=rank, ranks=2), largest_block_bytes(SPEC)
    with DiskTier(folder / str(rank), block_bytes=size, fingerprint=me.fingerprint(SPEC), **disk) as tier:
        tiers, sizes = Tiers(host=MEMORY, lower=[tier], identity=me), dict(max_sequences=2, max_tokens=4096)
        with kvmem.Allocator(SPEC, device="cpu", memory=MEMORY, tiers=tiers, **sizes) as alloc:
            yield alloc


def write(folder: Path, rank: int) -> torch.Tensor:
    """Put random KV on disk, and return the V of the last layer."""
    with allocator(folder, rank, capacity=MEMORY) as alloc, alloc.sequence() as seq:
        seq.extend(BLOCKS * 64)
        for cache in (one for layer in range(SPEC.num_layers) for one in seq.kv(layer)):
            cache.copy_(torch.randn(cache.shape))
        seq.commit(PROMPT[:-1])
        assert alloc.store(PROMPT) == BLOCKS and alloc.flush(60)
        return seq.kv(SPEC.num_layers - 1)[1].clone()


def rank_main(rank: int, port: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    written, times, partial = write(folder, rank), ([], []), torch.zeros(1 << 21)
    for behind in (False, True) * 3:
        with allocator(folder, rank, read_only=True) as alloc:
            blocks = alloc.block_set(PROMPT, to="host")
            rate = blocks.num_bytes * 100 // WINDOWS  # a twelfth of them in the 10 ms of an all-reduce
            plan = prefetch([blocks] * WINDOWS, window_seconds=0.0101, bytes_per_second=rate, budget_bytes=MEMORY)
            assert [window.num_bytes for window in plan] == [blocks.num_bytes // WINDOWS] * WINDOWS
            dist.barrier()
            start = time.perf_counter()
            for window in plan:
                reading = alloc.prefetch(window) if behind else None
                dist.all_reduce(partial)
                assert (reading or alloc.prefetch(window)).wait(60)
            times[behind].append(time.perf_counter() - start)
            assert alloc.tiering.counters["disk: read"] == BLOCKS and alloc.tiering.host_blocks() == [BLOCKS]
            with alloc.sequence(PROMPT) as seq:
                assert torch.equal(seq.kv(SPEC.num_layers - 1)[1], written)
    after, hidden = (1e3 * min(some) for some in times)
    print(f"rank {rank}: {after:.1f} ms with reads after the all-reduces, {hidden:.1f} ms behind them")
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (port, Path(folder)), nprocs=2)
