"""Processes that are the ranks of a group over gloo on 127.0.0.1, and what each of them found."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist
from processes import PROCESSES, kill, start

import kvmem

PAGE = 65_536


def make(backend: str, leads: bool, **options: Any) -> kvmem.Allocator:
    """An allocator of a rank: two layers in pages of their own."""
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=1, head_dim=16, dtype="float32", block_size=16)
    sizes = {"memory": 64 * PAGE, "page_bytes": PAGE, "interleave": 1, "max_sequences": 6, "max_tokens": 1024}
    return kvmem.Allocator(spec, backend=backend, device="cpu", record_ops=leads, **{**sizes, **options})


def _main(port: int, rank: int, ranks: int, work: Callable[..., Any], args: tuple[Any, ...], out: Connection) -> None:
    try:
        where = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
        out.send(("done", work(rank, *args)))
    except kvmem.errors.KVMemError as error:
        out.send((type(error).__name__, str(error)))
    except BaseException:  # noqa: BLE001  the test shows it
        out.send(("broken", traceback.format_exc()))
    out.recv()  # stays alive, with its connections, until all have answered: none is noticed because it ended
    os._exit(0)


def run(ranks: int, work: Callable[..., Any], *args: Any, wait: float = 60.0, dead: int = -1) -> list[tuple[str, Any]]:
    """Return what ``work(rank, *args)`` returned on each rank, as ("done", value) or (name of the error, message).

    dead: a rank that kills or stops itself. The others must answer within ``wait`` seconds.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes = [PROCESSES.Pipe() for _ in range(ranks)]
    processes = [start(_main, port, rank, ranks, work, args, theirs) for rank, (_, theirs) in enumerate(pipes)]
    try:
        for _, theirs in pipes:
            theirs.close()
        found: dict[int, tuple[str, Any]] = {dead: ("dead", None)}
        waiting, end = {pipe: rank for rank, (pipe, _) in enumerate(pipes) if rank != dead}, time.monotonic() + wait
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            assert ready, f"ranks {[*waiting.values()]} still wait after {wait:g} s; the others found {found}"
            for pipe in ready:
                found[waiting.pop(pipe)] = pipe.recv()  # type: ignore[call-overload]
        return [found[rank] for rank in range(ranks)]
    finally:
        for process in processes:
            kill(process)
