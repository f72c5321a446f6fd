"""transformers' continuous batching over its own cache and over kvmem's, like for like.

The same model, prompts, scheduler, block size, bytes and tokens a step; attention is gather and SDPA in both, so that
the difference is management only, and once more by kvmem's kernel where K and V lie. Tokens are compared first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import process_time_ns, thread_time_ns
from typing import Any, Literal

import click

from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.language_models import LANGUAGE_MODELS, LanguageModel, load_language_model
from kvmem.bench.render import Row, Table, cell, console, show
from kvmem.bench.timing import Ratio, Spread, one_thread

STOCK = "transformers"
KINDS: dict[str, Literal["transformers", "kvmem"]] = {"kvmem": "transformers", "kvmem, its kernel": "kvmem"}
BLOCK_TOKENS, BATCH_TOKENS, GROUPS = 16, 128, 4


@dataclass(frozen=True)
class BatchingRow:
    """``requests`` prompts in ``GROUPS`` groups that begin alike, ``new_tokens`` each, over ``num_blocks`` blocks.

    us: CPU time of a session, since other processes share the machine. managing_us: of a step, what is not the model:
    scheduling, indices, tables, results. The ratios are over transformers' cache, by repetition. steps,
    computed_tokens: of a session; prefix hits lower the second, and what was preempted and computed again raises it.
    cache_bytes: allocated, or mapped at the end. same_tokens: as over transformers' cache, in every repetition.
    """

    model: str
    cache: str
    sharing: bool
    num_blocks: int
    requests: int
    new_tokens: int
    us: Spread
    ratio: Ratio
    managing_us: Spread
    managing_ratio: Ratio
    steps: int
    computed_tokens: int
    cache_bytes: int
    same_tokens: bool


class _Session:
    """A manager of either cache, and what its sessions do."""

    def __init__(self, model: Any, cache: str, sharing: bool, num_blocks: int, stack: ExitStack) -> None:
        from transformers import ContinuousBatchingConfig

        from kvmem.integrations.transformers import continuous_batching

        options = {"page_size": BLOCK_TOKENS, "max_batch_tokens": BATCH_TOKENS, "allow_block_sharing": sharing}
        self.model, self.managing_ns, self.steps, self.computed = model, 0, 0, 0
        if cache == STOCK:
            config = ContinuousBatchingConfig(num_blocks=num_blocks, **options)
            self.manager = model.init_continuous_batching(continuous_batching_config=config)
            self.manager.warmup()  # makes the cache
        else:
            stored = model.config
            width = getattr(stored, "head_dim", None) or stored.hidden_size // stored.num_attention_heads
            row = BLOCK_TOKENS * stored.num_key_value_heads * width * model.dtype.itemsize  # K of a block and layer
            memory = (num_blocks + 2) * 2 * stored.num_hidden_layers * row  # both have two blocks beside, for padding
            manager = continuous_batching(
                model, memory=memory, page_bytes=max(4096, row), attention=KINDS[cache],
                config=ContinuousBatchingConfig(**options),
            )  # fmt: skip
            self.manager = stack.enter_context(manager)
            vars(model).pop("_cached_continuous_batching_manager")  # sessions of several caches take turns
            self.manager.stop()
            self.manager.warmup()
        self.processor = self.manager.batch_processor
        for name in ("prepare_next_batch", "update_batch"):
            setattr(self.processor, name, self._timed(getattr(self.processor, name)))
        if cache != STOCK:  # where transformers makes indices before the model runs, kvmem does at its first layer
            self.processor.cache.begin_step = self._timed(self.processor.cache.begin_step)

    def _timed(self, call: Any) -> Any:
        def timed() -> Any:
            begin = thread_time_ns()
            found = call()
            self.managing_ns += thread_time_ns() - begin
            if found is True:  # a batch was prepared
                self.steps += 1
                self.computed += self.processor.inputs_and_outputs.num_q_tokens
            return found

        return timed

    @property
    def cache_bytes(self) -> int:
        cache = self.processor.cache
        return int(
            cache.cache_tensor.nbytes if hasattr(cache, "cache_tensor") else cache.allocator.stats().mapped_bytes
        )

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[int, list[list[int]]]:
        """One session from an empty cache: nanoseconds of CPU time, and the tokens of each prompt."""
        self.processor.cache.reset()
        self.managing_ns = self.steps = self.computed = 0
        self.manager.switch_to_cb_friendly_attn(self.model, False)
        self.manager.batch_processor = self.processor
        self.manager.start()
        begin = process_time_ns()
        for number, prompt in enumerate(prompts):
            self.manager.add_request(prompt, str(number), new_tokens, eos_token_id=-1)
        found = [self.manager.get_result(timeout=300) for _ in prompts]
        spent = process_time_ns() - begin
        self.manager.stop()
        return spent, [r.generated_tokens for r in sorted(found, key=lambda r: int(r.request_id))]


def _prompts(language_model: LanguageModel, requests: int, shared: int, own: int) -> list[list[int]]:
    """Prompts that begin as a quarter of the others do; from a fixed seed, so that runs can be compared."""
    random = Random(5)
    ids = language_model.inputs["input_ids"]
    known = sorted(set(ids.flatten().tolist()))
    begins = [random.choices(known, k=shared) for _ in range(GROUPS)]
    return [begins[n % GROUPS] + random.choices(known, k=own) for n in range(requests)]


def batching(
    language_model: LanguageModel, *, num_blocks: int, sharing: bool, requests: int, lengths: tuple[int, int, int],
    repetitions: int,
) -> list[BatchingRow]:  # fmt: skip
    """Sessions over every cache in turn, after one each to warm up. lengths: shared, own and new tokens a request."""
    prompts = _prompts(language_model, requests, *lengths[:2])
    with ExitStack() as stack, one_thread():
        caches = (STOCK, *KINDS)
        sessions = {name: _Session(language_model.model, name, sharing, num_blocks, stack) for name in caches}
        ns: dict[str, list[int]] = {name: [] for name in caches}
        managing: dict[str, list[float]] = {name: [] for name in caches}
        same, expected = dict.fromkeys(caches, True), None
        for repetition in range(1 + repetitions):
            for name, session in sessions.items():
                spent, tokens = session.run(prompts, lengths[2])
                expected = expected or tokens
                same[name] &= tokens == expected
                if repetition:
                    ns[name].append(spent)
                    managing[name].append(session.managing_ns / session.steps)
        return [
            BatchingRow(
                language_model.name, name, sharing, num_blocks, requests, lengths[2],
                Spread.of_ns(ns[name]), Ratio.of(ns[name], ns[STOCK]), Spread.of_ns(managing[name]),
                Ratio.of(managing[name], managing[STOCK]), session.steps, session.computed, session.cache_bytes,
                same[name],
            )
            for name, session in sessions.items()
        ]  # fmt: skip


def batching_tables(rows: Sequence[Row]) -> Iterator[Table]:
    title = (
        "Continuous batching of transformers with {model} in float32 on one thread, {requests} requests, {new_tokens} "
        "new tokens each, CPU time of {us[count]} sessions in turn; attention of the first two is gather and SDPA, so "
        "that they differ in management only"
    )
    spec = """blocks of={cache}; prefixes shared={sharing:yes}; blocks={num_blocks}; same tokens={same_tokens:yes};
    steps={steps}; tokens computed={computed_tokens:,}; cache={cache_bytes:bytes};
    tokens a CPU second={speed:.1f};
    CPU time over transformers' (p10 to p90)={ratio[median]:.2f} ({ratio[p10]:.2f} to {ratio[p90]:.2f});
    CPU us a step not in the model={managing_us[median]:,.0f};
    over transformers'={managing_ratio[median]:.2f} ({managing_ratio[p10]:.2f} to {managing_ratio[p90]:.2f})"""
    shown = [{**row, "speed": row["requests"] * row["new_tokens"] * 1e6 / row["us"]["median"]} for row in rows]
    yield Table.of(cell(title, rows[0]), spec, shown)


@click.command()
@click.option("--model", type=click.Choice(LANGUAGE_MODELS), default="auto", show_default=True)
@click.option("--requests", type=click.IntRange(min=GROUPS), default=12, show_default=True)
@click.option("--lengths", type=(int, int, int), default=(48, 16, 8), show_default=True,
              help="Tokens of a prompt that others have too, its own, and new ones.")  # fmt: skip
@click.option("--num-blocks", type=int, multiple=True, default=(256,), show_default=True, help="Of 16 tokens.")
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@JSON
@click.pass_context
def command(
    context: click.Context, model: str, requests: int, lengths: tuple[int, int, int], num_blocks: tuple[int, ...],
    repetitions: int, json_path: Path | None,
) -> None:  # fmt: skip
    """Continuous batching of transformers over its own cache and kvmem's; exit code 1 if any token differs."""
    check_writable(json_path)
    language_model = load_language_model(model)
    language_model.model.generation_config.do_sample = False
    options: dict[str, Any] = {"requests": requests, "lengths": lengths, "repetitions": repetitions}
    rows = [
        asdict(row)
        for blocks in num_blocks
        for sharing in (True, False)
        for row in batching(language_model, num_blocks=blocks, sharing=sharing, **options)
    ]
    show(console(), batching_tables(rows))
    write_json(
        document(["batching", *sys.argv[1:]], setup={"requests": requests}, results={"batching": rows}), json_path
    )
    context.exit(0 if all(row["same_tokens"] for row in rows) else 1)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.batching"))
