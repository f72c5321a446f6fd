"""A vLLM engine in a process of its own, which does some things one after the other: ``connector_child.py JSON``.

The words of the JSON: engine (arguments of ``LLM``), steps ([["generate", prompts, max_tokens], ["reset"],
["abort", prompts, after steps], ["memory"]]). Each step adds one answer to "answers"."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def resident_kib(pid: int) -> int:
    return next(
        int(line.split()[1]) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmRSS" in line
    )


def memory() -> dict[str, int]:
    """KiB of the process with the model, which is the largest: resident in all, and of kvmem's memory."""
    largest = max([os.getpid(), *descendants(os.getpid())], key=resident_kib)
    kvmem, inside = 0, False
    for line in Path(f"/proc/{largest}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:  # the head of a mapping
            inside = "memfd:kvmem" in line
        elif inside and line.startswith("Rss:"):
            kvmem += int(line.split()[1])
    return {"resident": resident_kib(largest), "kvmem": kvmem}


def generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    done = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    while core is not None and core.scheduler.has_requests():  # an engine in another process goes on by itself
        llm.llm_engine.step()
    return {
        "tokens": [list(one.outputs[0].token_ids) for one in done],
        "cached": [one.num_cached_tokens for one in done],
    }


def abort(llm: Any, prompts: list[list[int]], steps: int) -> bool:
    from vllm import SamplingParams

    names = [f"aborted {i}" for i in range(len(prompts))]
    for name, ids in zip(names, prompts, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(temperature=0.0, max_tokens=200))
    for _ in range(steps):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(names)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return True


def run(asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    from kvmem.integrations.vllm import register

    register()  # as vLLM does by the entry point, where kvmem is installed
    llm = LLM(**asked["engine"])
    calls = {"generate": lambda *given: generate(llm, *given), "reset": llm.reset_prefix_cache,
             "abort": lambda *given: abort(llm, *given), "memory": memory}  # fmt: skip
    found: dict[str, Any] = {"answers": [calls[kind](*given) for kind, *given in asked["steps"]]}
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is not None:  # in this process
        found["blocks free"] = core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    llm.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    print("\nRESULT " + json.dumps(run(json.loads(sys.argv[1]))), flush=True)
