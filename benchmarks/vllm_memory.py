"""Physical memory under vLLM's KV cache while requests come and go: whole engines of vLLM's CPU build with SmolLM2-135M
and the same requests, one engine after the other.

Needs vLLM: run it with the interpreter that `make test-vllm` has set up.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import click
import numpy as np
from rich.console import Console

from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON, QUIET
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.language_models import load_language_model
from kvmem.bench.render import Row, Table, cell, console, show
from kvmem.bench.text import progress

_MEMORY = {"kv_connector": "KvmemConnector", "kv_role": "kv_both",
           "kv_connector_module_path": "kvmem.integrations.vllm.connector"}  # fmt: skip
#: Block manager and memory.
ENGINES: dict[str, dict[str, Any]] = {
    "stock": {},
    "stock, memory of kvmem": {"kv_transfer_config": _MEMORY},
    "kvmem": {"kv_transfer_config": _MEMORY, "scheduler_cls": "kvmem.integrations.vllm.scheduler.KvmemScheduler"},
}
#: Without vLLM's prefix cache, in which blocks without a request stay in use.
_ENGINE = {
    "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 512, "max_num_seqs": 8,
    "max_num_batched_tokens": 256, "enable_prefix_caching": False, "skip_tokenizer_init": True,
}  # fmt: skip
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}  # fmt: skip
_TEXT = Path(__file__).parents[1] / "docs" / "architecture.md"
_ARRIVAL_STEPS, _IDLE_STEPS, _MOMENTS = 3, 6, 16
_SHARE = 1.1  # of the bytes in use, and a block: what may be resident

#: The ids of a prompt, and how many tokens are generated.
Request = tuple[list[int], int]


@dataclass(frozen=True)
class MemoryRow:
    """An engine over all requests, after each step. A block is a page of each layer; a group has all layers here.

    ``samples``: by step, ``requests`` of the step, also those that end with it, ``tokens`` whose KV they have,
    ``in_use_bytes`` of the blocks that hold these, ``resident_bytes`` of the KV cache as the system counts them after
    the step. ``over_bytes``: the most that is resident beside what is in use. ``follows``: that is at most a block and
    a tenth, in each step. ``same_tokens``: as the first engine.
    """

    engine: str
    kv_bytes: int
    block_bytes: int
    same_tokens: bool
    peak_in_use_bytes: int
    mean_in_use_bytes: float
    start_bytes: int
    peak_bytes: int
    mean_bytes: float
    end_bytes: int
    over_bytes: int
    follows: bool
    samples: Mapping[str, Sequence[int]]


def memory(requests: Sequence[Request], model: Path, done: Any) -> list[MemoryRow]:
    """A row for each of ``ENGINES``. model: a folder of SmolLM2's files."""
    rows: list[MemoryRow] = []
    expected = None
    for number, (name, options) in enumerate(ENGINES.items(), 1):
        # A process for each engine: its end gives everything back.
        with patch.dict(os.environ, _ENVIRONMENT), ProcessPoolExecutor(1, get_context("spawn")) as process:
            found = process.submit(_drive, _ENGINE | options | {"model": str(model)}, requests).result()
        tokens = found.pop("tokens_out")
        expected = expected or tokens
        rows.append(_row(name, found, tokens == expected))
        done(number)
    return rows


def _row(name: str, found: dict[str, Any], same: bool) -> MemoryRow:
    samples, block = found["samples"], found["block_bytes"]
    in_use, resident = (np.array(samples[key]) for key in ("in_use_bytes", "resident_bytes"))
    return MemoryRow(
        name, found["kv_bytes"], block, same, int(in_use.max()), float(in_use.mean()), found["start_bytes"],
        int(resident.max()), float(resident.mean()), int(resident[-1]), int((resident - in_use).max()),
        bool((resident <= _SHARE * in_use + block).all()), samples,
    )  # fmt: skip


def _drive(options: dict[str, Any], requests: Sequence[Request]) -> dict[str, Any]:
    """Of the engine's process: half of the requests, a pause, the other half."""
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(EngineArgs(**options))
    core: Any = engine.engine_core.engine_core
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    ranges = {(one.untyped_storage().data_ptr(), one.untyped_storage().nbytes()) for one in caches}
    group = core.scheduler.kv_cache_config.kv_cache_groups[0]
    block_tokens, block_bytes = options["block_size"], group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    samples: dict[str, list[int]] = {key: [] for key in ("requests", "tokens", "in_use_bytes", "resident_bytes")}
    start, out = _resident(ranges), dict[str, list[int]]()
    middle = len(requests) // 2
    for part in (requests[:middle], requests[middle:]):
        waiting, idle = list(part), 0
        while waiting or idle < _IDLE_STEPS:
            if waiting and len(samples["tokens"]) % _ARRIVAL_STEPS == 0:
                prompt, new = waiting.pop(0)
                sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
                engine.add_request(f"{len(out)}", {"prompt_token_ids": prompt}, sampling)
                out[f"{len(out)}"] = []
            step = list(core.scheduler.requests.values())
            if core.scheduler.has_requests():  # or memory to give back
                for output in engine.step():
                    out[output.request_id] = list(output.outputs[0].token_ids)
            running = [one.num_computed_tokens for one in step if one.num_computed_tokens > 0]
            idle = 0 if waiting or running else idle + 1
            in_use = sum(-(-tokens // block_tokens) for tokens in running) * block_bytes
            for key, value in zip(samples, (len(running), sum(running), in_use, _resident(ranges)), strict=True):
                samples[key].append(value)
    found = {"kv_bytes": sum(size for _, size in ranges), "block_bytes": block_bytes, "start_bytes": start}
    engine.engine_core.shutdown()
    return found | {"samples": samples, "tokens_out": out}


def _resident(ranges: set[tuple[int, int]]) -> int:
    """Bytes of physical memory behind ranges (address, size) of this process, in whole pages."""
    page, total = os.sysconf("SC_PAGE_SIZE"), 0
    for address, size in ranges:
        first, end = address // page * page, -(-(address + size) // page) * page
        seen = np.zeros((end - first) // page, np.uint8)
        call = ctypes.CDLL(None, use_errno=True).mincore
        if call(ctypes.c_void_p(first), ctypes.c_size_t(end - first), ctypes.c_void_p(seen.ctypes.data)) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        total += int((seen & 1).sum()) * page
    return total


def draw_requests(count: int, tokens: Sequence[int], seed: int = 0) -> list[Request]:
    """Requests of 40 to 300 prompt tokens, each a piece of a text, and 8 to 40 new ones."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        size = int(draw.integers(40, 300))
        at = int(draw.integers(0, len(tokens) - size))
        found.append((list(tokens[at : at + size]), int(draw.integers(8, 40))))
    return found


def memory_tables(setup: Row, rows: Sequence[Row]) -> Iterator[Table]:
    kv = cell("{kv_bytes:bytes}", rows[0])
    title = (
        "Physical memory under the KV cache ({kv}) of vLLM {vllm} with SmolLM2-135M, {requests} requests in two waves, "
        "no prefix cache; in use are blocks of {block_tokens} tokens, {block}, with tokens of the requests of a step"
    )
    words = {**setup, "kv": kv, "block": cell("{block_bytes:bytes}", rows[0])}
    spec = """block manager={engine}; same tokens={same_tokens:yes}; in use, mean={mean_in_use_bytes:bytes};
    ... most={peak_in_use_bytes:bytes}; resident at first={start_bytes:bytes}; ... mean={mean_bytes:bytes};
    ... most={peak_bytes:bytes}; ... at the end={end_bytes:bytes}; most beside what is in use={over_bytes:bytes};
    within a block and 10 %={follows:yes}"""
    yield Table.of(cell(title, words), spec, rows)
    yield _over_time(rows)


def _over_time(rows: Sequence[Row]) -> Table:
    """A row for each of some moments, evenly spaced. Each engine's own step of that number."""
    first, spec = rows[0]["samples"], "step={step}; requests={requests}; tokens={tokens:,}; in use={in_use_bytes:bytes}"
    for number, row in enumerate(rows):
        spec += f"; resident, {row['engine']}={{resident_{number}:bytes}}"
    moments = []
    for step in np.linspace(0, len(first["tokens"]) - 1, _MOMENTS).round().astype(int).tolist():
        moment: dict[str, Any] = {"step": step} | {key: values[step] for key, values in first.items()}
        for number, row in enumerate(rows):
            resident = row["samples"]["resident_bytes"]
            moment[f"resident_{number}"] = resident[min(step, len(resident) - 1)]
        moments.append(moment)
    return Table.of("The same over time", spec, moments, 0)


@click.command()
@click.option("--requests", type=click.IntRange(min=2), default=24, show_default=True)
@JSON
@QUIET
def command(requests: int, json_path: Path | None, quiet: bool) -> None:
    """Physical memory under the KV cache of vLLM, as it is and over kvmem."""
    from kvmem.integrations.vllm.names import vllm_version

    check_writable(json_path)
    setup = {"vllm": vllm_version(), "requests": requests, "block_tokens": _ENGINE["block_size"]}
    with TemporaryDirectory() as folder, progress(Console(stderr=True), "memory", len(ENGINES), quiet) as done:
        loaded = load_language_model("smollm2")
        loaded.model.save_pretrained(folder)
        text = loaded.tokenizer(_TEXT.read_text(encoding="utf-8"))["input_ids"]
        del loaded
        rows = [asdict(row) for row in memory(draw_requests(requests, text), Path(folder), done)]
    show(console(), memory_tables(setup, rows))
    write_json(document(["vllm_memory", *sys.argv[1:]], setup=setup, results={"vllm_memory": rows}), json_path)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.vllm_memory"))
