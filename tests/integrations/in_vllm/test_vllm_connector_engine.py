"""A whole vLLM engine over kvmem's connector, memory and offloading: the tokens of the stock engine, in each case.

Each engine is a child process, one at a time. Prompts are texts of SmolLM2, so their outputs vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support_vllm_engine import MARKS, run_engine, save_model

from benchmarks.vllm_memory import ENGINES, draw_requests, memory

pytestmark = MARKS

CHILD = Path(__file__).parent / "connector_child.py"
TEXT = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text(encoding="utf-8")
ENDINGS = (" Once upon a time", " The capital of France is", " def main():\n", " 1, 2, 3,")
NEW = 24
BLOCK_KIB = 32 * 30 * 2 * 3 * 64 * 4 / 1024  # 32 tokens of SmolLM2-135M in float32: K and V of 30 layers, 3 heads of 64


class Engines:
    """Runs engines over one model, and knows what the stock one generates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tokenizer = save_model(folder)
        self.text = text = tokenizer(TEXT)["input_ids"]
        self.prompts = [text[:200] + tokenizer(end)["input_ids"] for end in ENDINGS]
        self.prompts.append(text[300 : 300 + 64])  # exactly two blocks, of which one can be loaded
        stock = self.run(None, [["memory"], ["generate", self.prompts, NEW], ["memory"]])["answers"]
        self.expected: list[list[int]] = stock[1]["tokens"]
        self.stock_kib = [stock[i]["resident"] for i in (0, 2)]
        assert all(len(set(tokens)) > 4 for tokens in self.expected), "an output that repeats itself proves little"

    def run(
        self, transfer: dict[str, Any] | None, steps: list[list[Any]], *, processes: bool = False, **given: Any
    ) -> Any:
        engine: dict[str, Any] = {
            "model": str(self.folder), "dtype": "float32", "enforce_eager": True, "block_size": 32,
            "max_model_len": 512, "max_num_seqs": 8,
        } | given  # fmt: skip
        if processes and transfer is not None:  # which know no name that this process has registered
            transfer = transfer | {"kv_connector_module_path": "kvmem.integrations.vllm.connector"}
        if transfer is not None:
            engine["kv_transfer_config"] = {"kv_role": "kv_both", "kv_load_failure_policy": "recompute"} | transfer
        asked = {"engine": engine, "steps": steps}
        return run_engine(asked, child_file=CHILD, VLLM_ENABLE_V1_MULTIPROCESSING=str(int(processes)))

    def check(self, *generated: dict[str, Any]) -> None:
        for one in generated:
            assert one["tokens"] == [tokens[: len(one["tokens"][0])] for tokens in self.expected]


def kvmem(**options: Any) -> dict[str, Any]:
    return {"kv_connector": "KvmemConnector", "kv_connector_extra_config": options}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("smollm2"))


def test_saved_reset_loaded_and_found_by_another_process(engines: Engines, tmp_path: Path) -> None:
    """In three processes, as vLLM runs in production; the second engine finds the first one's disk."""
    disk = {"type": "disk", "path": str(tmp_path / "kv"), "capacity": "256MiB"}
    generate = ["generate", engines.prompts, NEW]
    options = kvmem(tiers=[{"type": "host", "capacity": "32MiB"}, disk])
    first, _, second = engines.run(options, [generate, ["reset"], generate], processes=True)["answers"]
    engines.check(first, second)
    assert first["cached"][0] == 0 and second["cached"] == [192] * 4 + [32]
    (third,) = engines.run(kvmem(tiers=[disk]), [generate], processes=True)["answers"]
    engines.check(third)
    assert third["cached"] == [192] * 4 + [32]


def test_loads_that_fail_preemption_and_abort(engines: Engines) -> None:
    """A pool of 21 blocks for four prompts of seven, and a tier whose first three answers are errors."""
    generate = ["generate", engines.prompts, 10]
    found = engines.run(
        kvmem(tiers=[{"type": "failing_tier:FailingTier"}]),
        [generate, ["reset"], generate, ["abort", engines.prompts, 4], ["reset"], generate],
        num_gpu_blocks_override=22,
    )
    first, _, second, _, _, third = found["answers"]
    engines.check(first, second, third)
    assert min(second["cached"][:4]) < 192, "a load that failed is computed"
    assert third["cached"] == [192] * 4 + [32], "what was saved anew is loaded"
    assert found["blocks free"] == 21  # all but block 0


def test_loads_within_a_step_and_memory_that_returns(engines: Engines) -> None:
    """Without vLLM's prefix cache. The KV cache has 1 GiB of addresses."""
    generate = ["generate", engines.prompts, NEW]
    options = kvmem(tiers=[{"type": "host", "capacity": "64MiB"}], layerwise=True)
    found = engines.run(options, [["memory"], generate, ["memory"], generate, ["memory"]], enable_prefix_caching=False)
    before, first, between, second, after = found["answers"]
    engines.check(first, second)
    assert second["cached"] == [192] * 4 + [32]
    for state in (before, between, after):  # no request is running
        assert state["kvmem"] <= BLOCK_KIB
    print(f"KiB resident: kvmem {before, between, after}, stock {engines.stock_kib}")
    # vLLM's own KV cache is resident whole. What host memory holds, and what the two processes differ in else, is less.
    assert after["resident"] < engines.stock_kib[1] - 3 / 4 * (1 << 20)


def test_resident_memory_follows_the_tokens_in_use(engines: Engines, seed: int) -> None:
    """After each step: the blocks of the running requests, one more, and 10 %. With vLLM's block manager and kvmem's."""
    requests = draw_requests(8, engines.text, seed)
    rows = memory(requests, engines.folder, lambda _: None)
    assert [row.engine for row in rows] == list(ENGINES) and all(row.same_tokens for row in rows)
    stock, *ours = rows
    assert stock.start_bytes >= stock.kv_bytes and not stock.follows
    longest = max(len(prompt) for prompt, _ in requests)
    for row in ours:
        assert row.follows and row.start_bytes == row.end_bytes == 0, row
        assert longest // 32 * row.block_bytes <= row.peak_bytes < row.kv_bytes / 4


def test_offloading_on_a_cpu_with_kvmems_policy(engines: Engines) -> None:
    generate = ["generate", engines.prompts, NEW]
    options = {"spec_name": "KvmemOffloadingSpec", "cpu_bytes_to_use": "40MiB"}
    transfer = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": options}
    answers = engines.run(
        transfer, [generate, ["reset"], generate, ["abort", engines.prompts, 2], ["reset"], generate]
    )["answers"]
    engines.check(answers[0], answers[2], answers[5])
    assert answers[2]["cached"][:4] == [192] * 4
