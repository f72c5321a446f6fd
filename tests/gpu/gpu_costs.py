"""What the driver's calls cost: probes of gpu_rules.py as those of gpu_probes.py are, and the clock of both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from gpu_door import Door


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def us(times: list[float]) -> str:
    return f"{median(times):.0f} us (at most {max(times):.0f})"


def map_one(door: Door, at: int, page: int) -> None:
    door.map(at, page)
    door.access(at)


def cost_of_each_call(door: Door) -> str:
    count, costs = 64, {}
    base = door.reserve(count * door.page)
    pages: list[int] = []
    costs["create"] = [timed(lambda: pages.append(door.create())) for _ in range(count)]
    places = [(base + i * door.page, page) for i, page in enumerate(pages)]
    costs["map"] = [timed(lambda p=p: door.map(*p)) for p in places]
    costs["set_access"] = [timed(lambda p=p: door.access(p[0])) for p in places]
    costs["unmap"] = [timed(lambda p=p: door.unmap(p[0])) for p in places]
    costs["release"] = [timed(lambda p=p: door.destroy(p[1])) for p in places]
    return f"pages of {door.page >> 10} KiB: " + ", ".join(f"{name} {us(times)}" for name, times in costs.items())


def cost_of_set_access_by_run(door: Door) -> str:
    found, pages = [], [door.create() for _ in range(64)]
    for run in (1, 2, 4, 8, 16, 32, 64):
        times = []
        for _ in range(5):
            base = door.reserve(run * door.page)
            for i in range(run):
                door.map(base + i * door.page, pages[i])
            times.append(timed(lambda base=base, run=run: door.access(base, run * door.page)))
        found.append(f"{run}: {median(times):.0f}")
    return "us by pages in the run: " + ", ".join(found)


def cost_beside_another_process(door: Door) -> str:
    """This process maps and unmaps alone, then beside one that does nothing else."""
    base, page = door.reserve(door.page), door.create()

    def rounds() -> list[float]:
        times, end = [], time.perf_counter() + 0.5
        while time.perf_counter() < end:
            times.append(timed(lambda: map_one(door, base, page)))
            door.unmap(base)
        return times

    alone = rounds()
    if os.environ.get("KVMEM_PROBE_RIVAL"):
        print("ready", flush=True)
        end = time.perf_counter() + 10
        while time.perf_counter() < end:
            rounds()
        return ""
    command = [sys.executable, str(Path(__file__).parent / "gpu_rules.py"), "--probe", "cost_beside_another_process"]
    environment = {**os.environ, "KVMEM_PROBE_RIVAL": "1"}
    rival = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert rival.stdout is not None and rival.stdout.readline() == "ready\n"
        beside = rounds()
    finally:
        rival.kill()
        rival.wait()
    return f"map + set_access {us(alone)} alone, {us(beside)} beside a process that maps without pause"
