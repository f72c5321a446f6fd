"""One part in this process: what `kvmem.bench.gpu.runner` starts. Users call ``python -m kvmem.bench gpu``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvmem.bench.gpu.device import open_bench_device
from kvmem.bench.gpu.parts import PARTS, run_part
from kvmem.bench.gpu.sizes import FULL, TINY

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvmem.bench.gpu")
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--command", type=json.loads, default=[])
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    sizes = TINY if given.tiny else FULL
    run_part(given.part, open_bench_device(given.device), sizes, given.seconds, given.out, given.command)


if __name__ == "__main__":
    main()
