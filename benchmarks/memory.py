"""``python -m benchmarks.memory mapping|sdpa``: two rows of ``python -m kvmem.bench`` in many sizes. `mapping` also
runs the same without Python (``native/mapping.cpp``, `make mapping`), together with the host driver's own call.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.programs import PROGRAMS, run_program
from kvmem.bench.__main__ import main
from kvmem.bench.attention import Layouts, SdpaResult, sdpa
from kvmem.bench.cli import JSON
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.host import BARE, MappingResult, mapping
from kvmem.bench.render import console, show, tables
from kvmem.bench.timing import Spread

_LAYOUTS: Layouts = {
    "virtual": ("virtual", "all"),
    "virtual, a layer a range": ("virtual", 1),
    "virtual, K and V apart": ("virtual", "none"),
    "paged": ("paged", "all"),
}
_IN_C = {"bare": f"{BARE}, C++", "driver": "host driver, C++", "extend": "Allocator::extend, C++"}


def sweep_mapping(
    repetitions: int, pages: tuple[int, ...] = (64 << 10, 2 << 20), runs: tuple[int, ...] = (1, 4, 32)
) -> list[MappingResult]:
    rows: list[MappingResult] = []
    for page_bytes, run_pages in product(pages, runs):
        rows += mapping(page_bytes, run_pages, repetitions)
        if (PROGRAMS / "mapping").exists():
            found = run_program(PROGRAMS / "mapping", str(page_bytes), str(run_pages), str(repetitions))
            bare = Spread.of_ns(found["bare_ns"])
            for key, way in _IN_C.items():
                us, count = Spread.of_ns(found[f"{key}_ns"]), len(found[f"{key}_ns"])
                calls = found.get(f"{key}_calls", count) / count
                rows.append(MappingResult(way, page_bytes, run_pages, us, us.median / bare.median, calls))
    return rows


def sweep_sdpa(
    repetitions: int, batches: tuple[int, ...] = (1, 8, 32), contexts: tuple[int, ...] = (1024, 4096, 8192)
) -> list[SdpaResult]:
    return [row for case in product(batches, contexts) for row in sdpa(*case, repetitions, _LAYOUTS)]


@click.command()
@click.argument("what", type=click.Choice(["mapping", "sdpa"]))
@click.option("--repetitions", type=click.IntRange(min=1), default=10, show_default=True)
@JSON
def command(what: str, repetitions: int, json_path: Path | None) -> None:
    """Mapped pages beside a bare mmap; or one SDPA call over a batch, both backends' memory beside a plain contiguous
    tensor, which takes 3 GB.
    """
    check_writable(json_path)
    rows: list[Any] = [*(sweep_mapping if what == "mapping" else sweep_sdpa)(repetitions)]
    results = {what: [asdict(row) for row in rows]}
    show(console(), tables({}, results))
    write_json(document(["memory", *sys.argv[1:]], setup={"repetitions": repetitions}, results=results), json_path)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.memory"))
