"""The driver's own rules, probed one by one and printed as a table, with what kvmem assumes beside each.

    python tests/gpu/gpu_rules.py                 all of them, each in a process of its own; status 1 where kvmem is wrong
    python tests/gpu/gpu_rules.py --probe NAME    one, in this process: a JSON line

``KVMEM_CUDA_DRIVER`` names another library than libcuda.so.1, the stand-in of the tests among them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import gpu_costs
import gpu_probes
from gpu_door import Door, Missing, Refused

ALLOWED, REFUSED = "allowed", "refused"


@dataclass(frozen=True)
class Rule:
    """assumed: what kvmem relies on, None where it does neither; why: who does, or what it could be used for."""

    name: str
    assumed: str | None
    why: str

    @property
    def probe(self) -> Callable[[Door], str]:
        found: Callable[[Door], str] = getattr(gpu_probes, self.name, None) or getattr(gpu_costs, self.name)
        return found


RULES = [
    Rule("granularity", ALLOWED, "page_bytes defaults to the recommended one (kvmem/memory/device.py)"),
    Rule("reserve_16_tib", ALLOWED, "addresses are reserved for all rows at once (csrc/memory/space.h)"),
    Rule("page_at_several_addresses", ALLOWED, "a shared prefix is one page under several rows"),
    Rule("read_through_an_alias_after_a_write", ALLOWED, "a prefix is written by one kernel and read by a later one"),
    Rule("content_survives_unmap_and_map", ALLOWED, "a parked page keeps its tokens when it moves to another row"),
    Rule("set_access_over_several_mappings", ALLOWED, "one call for each run of pages (csrc/memory/space.h)"),
    Rule("calls_without_a_current_context", ALLOWED, "the mapper's thread has none (csrc/memory/mapper.h)"),
    Rule("map_over_a_mapping", REFUSED, "rule 3 of csrc/driver/driver.h"),
    Rule("set_access_over_a_gap", REFUSED, "rule 3 of csrc/driver/driver.h"),
    Rule("map_while_kernels_run", ALLOWED, "the mapper maps ahead while a step runs"),
    Rule("unmap_while_kernels_run_elsewhere", ALLOWED, "pages that nobody uses are unmapped under load, after events"),
    Rule("map_during_graph_capture", ALLOWED, "the mapper does not know that somebody captures; its calls are relaxed"),
    Rule("map_after_graph_capture", ALLOWED, "graphs stay valid while rows grow: addresses never change"),
    Rule("other_page_after_graph_capture", ALLOWED, "a row changes its pages between two replays"),
    Rule("map_during_graph_capture_unrelaxed", None, "would do without relaxing (csrc/driver/cuda/cuda_device.h)"),
    Rule("map_a_part_of_a_page", None, "would let a prefix be shared below a page"),
    Rule("map_at_an_offset", None, "would do without handles of one size"),
    Rule("unmap_several_mappings_at_once", None, "unmap_run is one call where it is allowed (csrc/driver/cuda/cuda_driver.cpp)"),
    Rule("unmap_a_part_of_a_mapping", None, "csrc/driver/cuda/cuda_driver.cpp refuses it before the driver does"),
    Rule("release_a_page_while_mapped", None, "csrc/driver/cuda/cuda_driver.cpp refuses it"),
    Rule("free_addresses_while_mapped", None, "csrc/driver/cuda/cuda_driver.cpp refuses it"),
    Rule("read_without_access", None, "what a kernel meets between map and set_access"),
    Rule("read_through_a_read_only_alias", None, "would guard shared pages against stray writes"),
    Rule("write_through_a_read_only_alias", None, "the guard itself"),
    Rule("fresh_pages_are_zero", None, "kvmem zeroes them itself: zero=\"fresh\""),
    Rule("cost_of_each_call", None, "docs/decisions.md: recycle, park, map ahead"),
    Rule("cost_of_set_access_by_run", None, "one call for each run of pages"),
    Rule("cost_beside_another_process", None, "several ranks or engines on one device"),
]  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}


@dataclass(frozen=True)
class Finding:
    """outcome: "allowed", "refused with CUDA_ERROR_...", "crashed: ..." or "not in this library: cu..."."""

    rule: Rule
    outcome: str
    detail: str = ""

    @property
    def missing(self) -> bool:
        return self.outcome.startswith("not in")

    @property
    def mismatch(self) -> bool:
        if self.rule.assumed is None or self.missing:
            return False
        return "wrong" in self.outcome or not self.outcome.startswith(self.rule.assumed)


def probe_here(rule: Rule) -> dict[str, str]:
    try:
        return {"outcome": ALLOWED, "detail": rule.probe(Door())}
    except Refused as refused:
        return {"outcome": f"{REFUSED} with {refused.code}", "detail": f"by {refused.call}"}
    except Missing as missing:
        return {"outcome": f"not in this library: {missing}", "detail": ""}
    except gpu_probes.Wrong as wrong:
        return {"outcome": "allowed, but wrong", "detail": str(wrong)}


def probe_apart(rule: Rule, limit_seconds: float = 30) -> Finding:
    """In a process of its own: whatever happens to the context, or to the process, is this probe's alone."""
    command = [sys.executable, __file__, "--probe", rule.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return Finding(rule, "crashed: hangs", f"no end after {limit_seconds:.0f} s")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return Finding(rule, **json.loads(line))
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return Finding(rule, f"crashed: {how}", done.stderr.strip()[-200:].replace("\n", " | "))


def table(findings: list[Finding]) -> list[str]:
    lines = ["The driver's own rules (what kvmem relies on first)", ""]
    width = max(len(f.rule.name) for f in findings)
    for f in findings:
        relies = f"kvmem: {f.rule.assumed}" if f.rule.assumed else "kvmem: neither"
        mark = (
            "WRONG"
            if f.mismatch or "wrong" in f.outcome
            else "  -  "
            if f.missing
            else "  ok "
            if f.rule.assumed
            else "     "
        )
        lines.append(f"{mark} {f.rule.name.ljust(width)}  {f.outcome}; {relies} ({f.rule.why})")
        if f.detail:
            lines.append(" " * (width + 8) + f.detail)
    wrong = [f.rule.name for f in findings if f.mismatch]
    return [
        *lines,
        "",
        f"kvmem is wrong about: {', '.join(wrong)}" if wrong else "kvmem assumes nothing that is not so",
        "",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probe", choices=sorted(BY_NAME))
    given = parser.parse_args()
    if given.probe:
        print(json.dumps(probe_here(BY_NAME[given.probe])), flush=True)
        os._exit(0)  # with a torn context, leaving as usual may hang
    findings: list[Finding] = []
    try:
        for rule in RULES:
            findings.append(probe_apart(rule))
    finally:  # also when somebody's time is up
        print("\n".join(table(findings)) if findings else "nothing was probed", flush=True)
    return int(any(f.mismatch for f in findings))


if __name__ == "__main__":
    sys.exit(main())
