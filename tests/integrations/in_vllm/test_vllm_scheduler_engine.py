"""A whole vLLM engine that generates with SmolLM2 over kvmem's block manager: the tokens of the stock engine.

Each engine is a child process, one at a time. Prompts are texts, so their outputs vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support_vllm_engine import MARKS, run_engine, save_model

pytestmark = MARKS

OURS = "kvmem.integrations.vllm.scheduler.KvmemScheduler"
TEXT = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text(encoding="utf-8")
ENDINGS = (
    " Once upon a time",
    " The capital of France is",
    " def main():\n",
    " 1, 2, 3,",
    " In conclusion,",
    " She said:",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """The folder of the model, and requests: three begin alike for 100 tokens, three are short."""
    folder = tmp_path_factory.mktemp("smollm2")
    tokenizer = save_model(folder)
    text = tokenizer(TEXT)["input_ids"][:100]
    ends = [tokenizer(end)["input_ids"] for end in ENDINGS]
    requests = [[f"request {i}", (text if i % 2 == 0 else []) + end, 10 + 2 * i] for i, end in enumerate(ends)]
    return str(folder), requests


def engine(**changed: Any) -> dict[str, Any]:
    return {
        "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 512, "max_num_seqs": 4,
        "max_num_batched_tokens": 512, "enable_chunked_prefill": True,
    } | changed  # fmt: skip


CASES: dict[str, dict[str, Any]] = {
    # Hits in the second round; chunks of 48 tokens; one request is aborted, after which its blocks serve others.
    "hits, chunks and aborts": {
        "engine": engine(max_num_batched_tokens=48), "rounds": 2, "abort": [["request 2", 6]], "every": 3,
    },
    # 7 blocks: what is admitted fits, and not what it grows to by 40 tokens more.
    "preemption in a small pool": {
        "engine": engine(num_gpu_blocks_override=7, max_model_len=160, scheduler_reserve_full_isl=False), "rounds": 1, "abort": [], "every": 1, "more": 40,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_of_the_stock_engine(case: str, model: tuple[str, list[Any]]) -> None:
    folder, requests = model
    more = CASES[case].get("more", 0)
    asked = {"model": folder, **CASES[case], "requests": [[name, ids, most + more] for name, ids, most in requests]}
    stock = run_engine(asked)
    kvmem = run_engine(asked | {"engine": asked["engine"] | {"scheduler_cls": OURS}})
    print({key: (stock[key], kvmem[key]) for key in ("hits", "preempted", "steps", "manager")})
    assert (stock["manager"], kvmem["manager"]) == ("KVCacheManager", "BlockManager")
    aborted = {f"{name} {turn}" for name, _ in asked["abort"] for turn in range(asked["rounds"])}
    whole = {name: tokens for name, tokens in stock["tokens"].items() if name not in aborted}
    assert {name: kvmem["tokens"][name] for name in whole} == whole and len(whole) >= len(requests)
    assert all(len(set(tokens)) > 4 for tokens in whole.values()), "an output that repeats itself proves little"
    assert kvmem["check"] == [] and kvmem["usage"] == 0 and kvmem["reset"]
    if asked["rounds"] > 1:
        assert kvmem["hits"] >= stock["hits"] > 0
    else:
        assert kvmem["preempted"] > 0
