"""vLLM with its KV cache on disk: a second engine, in another process, finds what the first has computed.

    python examples/vllm_tiers.py MODEL          # a name or a folder

Needs vLLM 0.32.0; docs/engines/vllm.md says how to install it.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from importlib.util import find_spec

PROMPT = "A page table maps the addresses that a program uses to those of the memory. " * 20 + "In short,"


def generate(model: str, folder: str, found: multiprocessing.Queue) -> None:
    from vllm import LLM, SamplingParams

    tiers = [
        {"type": "host", "capacity": "256MiB"},
        {"type": "disk", "path": folder, "capacity": "1GiB"},
    ]
    llm = LLM(
        model=model,
        max_model_len=1024,
        enforce_eager=True,
        kv_transfer_config={
            "kv_connector": "KvmemConnector",
            "kv_connector_module_path": "kvmem.integrations.vllm.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"tiers": tiers},
        },
    )
    start = time.monotonic()
    (done,) = llm.generate([PROMPT], SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)
    took = time.monotonic() - start
    print(f"{done.num_cached_tokens} of {len(done.prompt_token_ids)} tokens from the disk, {took:.2f} s")
    found.put((done.num_cached_tokens, done.outputs[0].token_ids))
    llm.llm_engine.engine_core.shutdown()


def main(model: str) -> None:
    runs, spawn = [], multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            found = spawn.Queue()
            process = spawn.Process(target=generate, args=(model, folder, found))
            process.start()
            runs.append(found.get(timeout=600))
            process.join()
    (none, first), (cached, second) = runs
    assert none == 0 and cached > 0, "the second engine loads the prompt"
    assert first == second, "and generates what the first did"


if __name__ == "__main__":
    if find_spec("vllm") is None or len(sys.argv) < 2:
        print("nothing was run: this needs vLLM 0.32.0 (docs/engines/vllm.md) and the name of a model")
    else:
        main(sys.argv[1])
