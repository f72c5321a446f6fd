"""kvmem, driven as the peers are: in a process of its own, under the same loop and timer.

One argument: the manager, by the name that `benchmarks.workload.open_manager` takes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import kvmem
from benchmarks.peers.harness import serve
from benchmarks.workload import Manager, Workload, open_manager


def _make(workload: dict[str, Any]) -> Manager:
    return open_manager(sys.argv[1], Workload(**workload))


if __name__ == "__main__":
    serve(_make, kvmem.__version__, np.asarray)
