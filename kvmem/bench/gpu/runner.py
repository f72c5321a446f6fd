"""The parts, the most valuable first: one of them in this process, or all, each in a process of its own.

After an illegal access a CUDA context answers every call with the same error, and a crash ends the process; so each
part has its own. It writes its document after every figure, and `run_all` notes how the process ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from time import monotonic
from typing import Any

from kvmem.bench.document import PartReport, part_path, without_paths, write_json
from kvmem.bench.gpu.admit import admit
from kvmem.bench.gpu.attention import attention, layout, queries
from kvmem.bench.gpu.decode import decode
from kvmem.bench.gpu.device import BenchDevice, open_bench_device
from kvmem.bench.gpu.elastic import elastic
from kvmem.bench.gpu.kernels import KERNELS, Kernel
from kvmem.bench.gpu.measure import FAILURES, Part
from kvmem.bench.gpu.memory import Managed
from kvmem.bench.gpu.prefetch import prefetched
from kvmem.bench.gpu.sizes import FULL, TINY, ModelShape, Sizes
from kvmem.bench.gpu.vmm import vmm
from kvmem.bench.text import BenchError
from kvmem.bench.timing import one_thread

MODULE = "kvmem.bench.gpu.runner"
WARM_UP = "warm-up"
#: They cover every module that the parts load; FlashInfer compiles each once, into a folder that the parts share.
_COMPILED = ("FlashInfer decode, CUDA cores", "FlashInfer prefill, fa2")
_GRACE_SECONDS = 10.0  # for a part that is in the middle of a case when its time is up


def _compile_kernels(part: Part) -> None:
    """Compiles what FlashInfer has not compiled yet, so that no part spends its time on it."""
    device = part.device

    def prepare(kernel: Kernel) -> None:
        model = ModelShape(layers=1)
        memory = Managed(model, device, "paged", 2, 32)
        memory.ask(1)
        try:
            kernel.prepare(memory, model)(queries(model, memory), 0)
        except FAILURES as error:
            part.report.skip(kernel.name, error)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(prepare, (k for k in KERNELS if k.kind == device.kind and k.name in _COMPILED)))


#: What each runs, and its share of the time for all.
PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    WARM_UP: (_compile_kernels, 0.20),
    "vmm": (vmm, 0.07),
    "admit": (admit, 0.09),
    "decode": (decode, 0.19),
    "attention": (attention, 0.23),
    "layout": (layout, 0.13),
    "elastic": (elastic, 0.09),
    "prefetch": (prefetched, 0.04),
}


def run_part(
    name: str, device: BenchDevice, sizes: Sizes, seconds: float, folder: Path | None, command: list[str]
) -> dict[str, Any]:
    """One part in this process; its document, which is in ``folder`` too. Errors propagate."""
    part = Part(name, device, sizes, seconds, folder if name != WARM_UP else None, command)
    with one_thread() if device.torch_device.type == "cpu" else nullcontext():
        PARTS[name][0](part)
    part.report.close(part.spent, None)
    return part.report.document


def parse_parts(text: str | None) -> list[str]:
    """``"vmm,decode"`` as a list in the parts' own order; None is all of them."""
    known = [name for name in PARTS if name != WARM_UP]
    if text is None:
        return known
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if not asked or set(asked) - set(known):
        raise BenchError(f"--part: got {text!r}; parts are {', '.join(known)}")
    return [name for name in known if name in asked]


def run_all(
    parts: Sequence[str], folder: Path, *, device: str, tiny: bool, seconds: float, command: list[str],
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """The documents by part. ``seconds``: for all of it; the time that a part does not use goes to the later ones."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--out: cannot make {folder}: {error.strerror}") from error
    opened = open_bench_device(device)
    end = monotonic() + seconds
    queue = [*([WARM_UP] if opened.kind == "cuda" else []), *parts]
    documents = {}
    for index, name in enumerate(queue):
        left = end - monotonic()
        wanted = left * PARTS[name][1] / sum(PARTS[other][1] for other in queue[index:])
        path = part_path(folder, name, opened.name)
        path.unlink(missing_ok=True)  # of an earlier run
        why = _run(name, folder, device, tiny, wanted, min(left, wanted + _GRACE_SECONDS), command)
        took = f"{monotonic() + left - end:.0f} s"
        if name == WARM_UP:
            say(f"{name}: {why or 'done'}, {took}")
            continue
        documents[name] = _finish(name, path, opened, why, command)
        rows = sum(len(rows) for rows in documents[name]["results"].values())
        say(f"{name}: {why or 'done'}, {rows} rows, {len(documents[name]['skipped'])} skipped, {took}")
    return documents


def _run(
    name: str, folder: Path, device: str, tiny: bool, seconds: float, limit: float, command: list[str]
) -> str | None:
    """The reason why the part's process did not complete; None when it did."""
    options = {"device": device, "tiny": tiny, "seconds": seconds, "folder": str(folder), "command": command}
    words = [sys.executable, "-m", MODULE, name, json.dumps(options)]
    if limit <= 0:
        return "no time was left for it"
    try:
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True, errors="replace", timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s, its time and {_GRACE_SECONDS:.0f} s more"
    if done.returncode == 0:
        return None
    last = " | ".join(line.strip() for line in done.stderr.splitlines() if line.strip())[-1500:]
    return f"exit code {done.returncode}: {without_paths(last)}"


def _finish(name: str, path: Path, device: BenchDevice, error: str | None, command: list[str]) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it ended before its first figure
        document = PartReport(name, device.facts(), command, None).document
    if error is not None or not document["complete"]:
        document.update(error=error or "the part did not say that it was complete", complete=False)
        write_json(document, path)
    return document


def main(name: str, options: dict[str, Any]) -> None:
    """One part in this process, which `run_all` starts. Users call ``python -m kvmem.bench gpu``."""
    device, sizes = open_bench_device(options["device"]), TINY if options["tiny"] else FULL
    run_part(name, device, sizes, options["seconds"], Path(options["folder"]), options["command"])


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
