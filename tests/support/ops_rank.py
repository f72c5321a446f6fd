"""A rank for tests/transactions/test_ops.py: a CPU allocator in a process of its own, fed with lists of ops over pipes, and nothing else.

Frames are a length (8 bytes, little endian) and msgpack. A frame ``["ops", list]`` is applied; ``["digest"]`` is answered with a
digest of all that kernels and schedulers can see, ``["tags", handle, first, values]`` writes tokens, ``["read", handle]`` reads.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any, BinaryIO

import msgpack
import numpy as np
from support_world import PAGE, SPECS

import kvmem


def send(pipe: BinaryIO, value: Any) -> None:
    data = msgpack.packb(value)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def receive(pipe: BinaryIO) -> Any:
    head = pipe.read(8)
    return msgpack.unpackb(pipe.read(int.from_bytes(head, "little"))) if len(head) == 8 else None


def make(name: str, backend: str, device: str, memory_pages: int, **options: Any) -> kvmem.Allocator:
    return kvmem.Allocator(
        SPECS[name](), backend=backend, device=device, memory=memory_pages * PAGE, page_bytes=PAGE, interleave=1,
        max_sequences=6, max_tokens=400, **options,
    )  # fmt: skip


def digest(alloc: kvmem.Allocator) -> str:
    """Of every handle, length, block table, slot, row and start that a batch shows, and of what is mapped and in use."""
    found = hashlib.sha256()
    handles = sorted(alloc.core.handles())
    stats = alloc.stats()
    found.update(repr((handles, stats.mapped_bytes, stats.num_sequences, stats.created_bytes)).encode())
    for g in range(len(alloc.spec.groups)):
        for h in handles:
            seen = alloc.core.tokens(h, g), alloc.core.committed(h, g), alloc.core.first_token(h, g)
            found.update(repr(seen).encode())
    if handles:
        batch = alloc.make_batch(max_new_tokens=alloc.max_sequences * alloc.max_tokens)
        alloc.fill(np.array(handles, np.int32), batch)
        for part in batch.groups:
            names = [
                "block_table",
                "seq_lens",
                "first_tokens",
                "slot_mapping",
                "kv_indptr",
                "kv_indices",
                "kv_last_page_len",
            ]
            for name in names + (["rows", "row_starts"] if alloc.backend == "virtual" else []):
                found.update(np.ascontiguousarray(getattr(part, name + "_cpu").numpy()).tobytes())
    return found.hexdigest()


def main() -> None:
    name, backend, pages = sys.argv[1], sys.argv[2], int(sys.argv[3])
    alloc = make(name, backend, "cpu", pages)
    while (frame := receive(sys.stdin.buffer)) is not None:
        if frame[0] == "ops":
            alloc.apply(frame[1])
        elif frame[0] == "digest":
            send(sys.stdout.buffer, [digest(alloc), alloc.check()])
        elif frame[0] == "write":
            batch, size = alloc.batch([frame[1]]), alloc.spec.block_size
            block = batch.block_table[0, frame[2] // size]
            alloc.tensor(0, "k")[block, frame[2] % size] = float(frame[3])
        elif frame[0] == "read":
            send(sys.stdout.buffer, alloc.sequence_tensor(frame[1], 0, "k")[:, 0, 0].tolist())


if __name__ == "__main__":
    main()
