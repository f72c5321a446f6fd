"""One kernel, in a process of its own: each thing tried is announced before and judged after, one JSON line each, so
that a process that dies has said on what.

    PYTHONPATH=.:tests/kernels:tests/support python tests/gpu/gpu_worker.py NAME [--device cpu] [--seed N]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import case_of, configs, poisoned_case, tail_case
from gpu_graphs import REPLAYED, replay
from gpu_kernels import BY_NAME, Trial
from gpu_libraries import Result, Unavailable, open_library, relative_error
from kernel_cases import FP8, TOLERANCE, Case

TAIL_LAYERS = (3, 4)  # so many bytes a token that the page ends within a block, and at the end of one
LOST = 70  # exit status: the device's context is gone, and nothing more can be tried in this process


def say(what: str, status: str, **more: object) -> None:
    print(json.dumps({"what": what, "status": status, **more}), flush=True)


def judge(kernel: Trial, case: Case, result: Result) -> tuple[float, float]:
    """(error, what is allowed)."""
    out, lse = result
    expected, expected_lse = kernel.expected(case)
    allowed = TOLERANCE[torch.float64 if case.device.type == "cpu" and case.q.dtype != FP8 else case.q.dtype]
    if case.device.type == "cpu":  # by hand: as exact as float64, but what torch itself rounds
        allowed = max(
            allowed,
            TOLERANCE[case.q.dtype]
            if kernel.kernel.package in ("torch", "kvmem.kernels.reference", "kvmem.kernels.write")
            else 1e-9,
        )
    error = relative_error(out, expected)
    if lse is not None:
        error = max(error, relative_error(lse, expected_lse))
    return error, allowed


def attempt(what: str, make: Callable[[], Case], kernel: Trial, library: Any) -> None:
    say(what, "begin")
    begin = time.perf_counter()
    try:
        case = make()
        error, allowed = judge(kernel, case, kernel.run(case, library))
    except Unavailable as reason:
        say(what, "skipped", why=str(reason))
        return
    except Exception as problem:  # noqa: BLE001  whatever it is, it goes into the table, and the rest goes on
        trace = traceback.format_exc(limit=-3)
        say(what, "failed", why=f"{type(problem).__name__}: {problem}"[:600], trace=trace[-1500:])
        check_context()
        return
    status = "ok" if error <= allowed else "failed"
    why = {} if status == "ok" else {"why": f"off by {error:.3g} of the largest; {allowed:.3g} is allowed"}
    say(what, status, error=error, allowed=allowed, seconds=round(time.perf_counter() - begin, 2), **why)


def attempt_replay(kernel: Trial, backend: str, library: Any, device: str, seed: int) -> None:
    what = f"graph replayed while rows grow, {backend}"
    say(what, "begin")
    begin = time.perf_counter()
    try:
        found = replay(kernel, backend, library, device, seed)
    except Exception as problem:  # noqa: BLE001  whatever it is, it goes into the table, and the rest goes on
        say(
            what,
            "failed",
            why=f"{type(problem).__name__}: {problem}"[:600],
            trace=traceback.format_exc(limit=-3)[-1500:],
        )
        check_context()
        return
    wrong = {} if not found.why else {"why": found.why}
    seconds = round(time.perf_counter() - begin, 2)
    say(what, "failed" if wrong else "ok", error=found.error, allowed=found.allowed, seconds=seconds, **wrong)


def check_context() -> None:
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the context is lost: {error}", file=sys.stderr, flush=True)
        os._exit(LOST)  # as in a crash: nothing that would free device memory on the way out may run


def work(kernel: Trial, device: str, seed: int) -> None:
    if kernel.left_out and device != "cpu":
        say(kernel.name, "skipped", why=kernel.left_out)
        return
    try:
        library = open_library(kernel.kernel, device)
    except Unavailable as reason:
        say(kernel.name, "skipped", why=str(reason))
        return
    for config in configs(kernel):
        attempt(str(config), lambda config=config: case_of(kernel, config, device, seed), kernel, library)
    for backend in kernel.backends if kernel.name in REPLAYED else ():
        attempt_replay(kernel, backend, library, device, seed)
    tails(kernel, device, library)


def tails(kernel: Trial, device: str, library: Any) -> None:
    """What past the end of a sequence is touched. The last one may end the process: it says so first."""
    model, guard = kernel.models[0], kernel.kernel.guard_tokens
    many = [s for s in kernel.steps if s in ("prefill", "mixed", "drafts")]
    news = [1] * ("decode" in kernel.steps or "long decode" in kernel.steps) + [64] * bool(many)
    if kernel.kind == "shared":
        news = [1]
    for new in news:
        attempt(f"tail poisoned, {new} new", lambda new=new: poisoned_case(kernel, model, device, new), kernel, library)
    for kept in dict.fromkeys((guard, 0)):
        for new in news:
            for layers in TAIL_LAYERS:
                what = f"tail {'guarded' if kept == guard else 'bare'}, {new} new, {layers} layers"
                make = lambda kept=kept, new=new, layers=layers: tail_case(  # noqa: E731
                    kernel, model, device, guard_tokens=kept, num_layers=layers, new=new
                )
                attempt(what, make, kernel, library)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel", choices=sorted(BY_NAME))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    work(BY_NAME[given.kernel], given.device, given.seed)
