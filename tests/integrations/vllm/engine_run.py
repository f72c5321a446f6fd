"""One engine of vLLM in a process of its own: what to run comes as JSON on stdin, what came out goes to the last line.

{"engine": arguments of LLM, "steps": [["generate", tokens, {...}], ["reset"], ["abort", ...], ["memory"]]}
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

FOR_ENGINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",  # no warm-up
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
}


def children(pid: int) -> list[int]:
    """The processes that descend from one, itself not."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def shared_kib(pid: int) -> int:
    """Resident bytes of the KV cache if it lies on a memfd, in KiB."""
    total = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and ":" not in line.split(" ")[0]:
            inside = "memfd:kvmem" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def memory() -> dict[str, int]:
    """KiB of the process with the KV cache, which is the largest: resident in all, and of kvmem's memory."""

    def status(pid: int) -> int:
        return next(int(x.split()[1]) for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in x)

    largest = max(children(os.getpid()), key=status)
    return {"resident": status(largest), "kvmem": shared_kib(largest)}


def main() -> None:
    plan = json.load(sys.stdin)
    os.environ.update(FOR_ENGINE | plan.get("env", {}))
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(**plan["engine"])
    out: list[Any] = []
    for kind, *rest in plan["steps"]:
        if kind == "generate":
            prompts = [TokensPrompt(prompt_token_ids=ids, **plan.get("extra", {})) for ids in rest[0]]
            done = llm.generate(prompts, SamplingParams(temperature=0.0, **rest[1]), use_tqdm=False)
            out.append([[list(one.outputs[0].token_ids), one.num_cached_tokens] for one in done])
        elif kind == "reset":
            out.append(llm.reset_prefix_cache())
        elif kind == "sleep":
            out.append(time.sleep(rest[0]))
        elif kind == "abort":
            out.append(abort(llm, rest[0], rest[1]))
        elif kind == "memory":
            out.append(memory())
    print("\n" + json.dumps(out), flush=True)
    threading.Timer(20, lambda: os._exit(0)).start()


def abort(llm: Any, prompts: list[list[int]], steps: int) -> int:
    """Start requests, abort them after some steps of the engine, and return how many have produced nothing."""
    from vllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    names = [f"aborted-{i}" for i in range(len(prompts))]
    for name, ids in zip(names, prompts, strict=True):
        engine.add_request(name, TokensPrompt(prompt_token_ids=ids), SamplingParams(temperature=0.0, max_tokens=200))
    for _ in range(steps):
        engine.step()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return len(names)


if __name__ == "__main__":
    main()
