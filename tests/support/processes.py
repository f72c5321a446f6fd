"""Processes of tests, from a server that has imported torch and the tests once."""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from typing import Any
from unittest.mock import patch

PROCESSES = mp.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed", "kvmem.transport", "kvmem.distributed", "ops_rank"])


def start(target: Callable[..., Any], *args: Any) -> ForkServerProcess:
    """Start ``target(*args)``; it ends with this process at the latest."""
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where the server finds what it imports
        forkserver.ensure_running()
    process = PROCESSES.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def kill(process: ForkServerProcess) -> None:
    process.kill()
    process.join()
