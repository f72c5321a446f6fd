"""A vLLM engine in a process of its own, which prints what its requests generated: ``engine_child.py JSON``.

The words of the JSON: model (folder), engine (arguments of ``EngineArgs``), requests ([[name, ids, max_tokens], ...]),
rounds (how often all of them are sent, with other names), abort ([[name, step], ...]), every (steps between two
arrivals). The scheduler stays in this process, so that its block manager can be looked at."""

from __future__ import annotations

import json
import sys
from typing import Any


def run(asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import EngineArgs, LLMEngine, SamplingParams

    engine = LLMEngine.from_engine_args(EngineArgs(model=asked["model"], **asked["engine"]))
    scheduler = engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    tokens: dict[str, list[int]] = {}
    preemptions = hits = step = 0
    for turn in range(asked["rounds"]):
        waiting = [(f"{name} {turn}", ids, count) for name, ids, count in asked["requests"]]
        aborts = {f"{name} {turn}": at for name, at in asked["abort"]}
        begun: dict[str, int] = {}
        while waiting or engine.has_unfinished_requests():
            if waiting and step % asked["every"] == 0:
                name, ids, count = waiting.pop(0)
                sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
                engine.add_request(name, {"prompt_token_ids": ids}, sampling)
                begun[name] = step
            for name in [n for n, at in aborts.items() if n in begun and step - begun[n] >= at]:
                engine.abort_request([name])
                del aborts[name]
            for output in engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
                hits += (output.num_cached_tokens or 0) if output.finished else 0
            preemptions += sum(request.num_preemptions > 0 for request in scheduler.running)
            step += 1
    manager = scheduler.kv_cache_manager
    found = {"tokens": tokens, "hits": hits, "preempted": preemptions, "steps": step, "usage": manager.usage}
    found["manager"], found["reset"] = type(manager).__name__, scheduler.reset_prefix_cache()
    found["check"] = manager.allocator.check() if hasattr(manager, "allocator") else []
    return found


if __name__ == "__main__":
    print("\nRESULT " + json.dumps(run(json.loads(sys.argv[1]))), flush=True)
