"""Run SGLang as a program of its own: ``engine_run.py MODEL TIER FILE`` writes what it generated to a JSON file.

The same prompts with the stock engine, and with kvmem's linker over a tier: cold, after each of two flushes, and under
another salt.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def prompts(vocabulary: int) -> list[list[int]]:
    """Return prompts of 401 tokens and of few, two of which begin alike."""
    long = [3 + (i * 7919 + 3) % (vocabulary - 3) for i in range(401)]
    return [long, [*long[:200], 5, 6, 7], [9, 8, 7, 6]]


def engine(model: str, **more: Any) -> Any:
    import sglang

    return sglang.Engine(
        model_path=model,
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        max_total_tokens=2048,
        dtype="float32",
        skip_tokenizer_init=True,
        log_level="warning",
        **more,
    )


def run(one: Any, vocabulary: int, **more: Any) -> list[dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    found = []
    for prompt in prompts(vocabulary):
        answer = one.generate(input_ids=prompt, sampling_params=sampling, **more)
        meta = answer["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        found.append({"tokens": answer["output_ids"], "cached": meta["cached_tokens"], "host": details.get("host", 0)})
    return found


def flush(one: Any) -> None:
    """Empty SGLang's cache. It refuses while an answer that was given is not yet cleared away."""
    until = time.monotonic() + 30
    while not one.flush_cache().success:
        assert time.monotonic() < until, "SGLang refuses to flush its cache"
        time.sleep(0.1)


def main(model: str, tier: str, file: str) -> None:
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    one = engine(model)
    told = {"stock": run(one, vocabulary)}
    one.shutdown()
    one = engine(
        model,
        enable_unified_cache_external_linker=True,
        unified_cache_external_linker_backend="dynamic",
        unified_cache_external_linker_config={
            "linker": "KVMemLinker",
            "linker_module_path": "kvmem.integrations.sglang.linker",
            "linker_extra_config": {"tiers": [json.loads(tier)]},
        },
    )
    told["cold"] = run(one, vocabulary)
    for name in ("warm", "warm again"):
        flush(one)
        told[name] = run(one, vocabulary)
    flush(one)
    told["salted"] = run(one, vocabulary, cache_salt="another tenant")
    one.shutdown()
    Path(file).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
