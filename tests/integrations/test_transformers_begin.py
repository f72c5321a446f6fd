"""Prompts that were computed before are found again by begin(): the same tokens, and fewer of them computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support_multimodal import make_multimodal, multimodal_inputs
from support_transformers import (
    assert_freed,
    assert_same,
    dynamic_cache,
    generate,
    model_of,
    one_thread,
    open_cache,
    prompts,
)
from torch import nn

import kvmem
from kvmem.integrations.dense_batch import DenseBatch
from kvmem.tiers import Identity, Tiers, largest_block_bytes

__all__ = ["one_thread"]  # a fixture of every test here


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """The lengths of what the model embeds, step by step."""
    lengths: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, given, out: lengths.append(given[0].shape[1]))
    try:
        yield lengths
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_second_generate_computes_what_is_new(name: str, backend: str, mode: dict[str, int]) -> None:
    model, inputs = model_of(name), prompts(rows=2, length=45)
    expected = generate(model, inputs, dynamic_cache(model), **mode)
    cache = open_cache(model, backend)
    wide = {key: value.repeat_interleave(mode.get("num_beams", 1), 0) for key, value in inputs.items()}
    for run in range(3):
        found = cache.begin(**wide)
        assert found == cache.get_seq_length()
        with counting(model) as lengths:
            assert_same(generate(model, inputs, cache, **mode), expected)
        assert lengths[0] == 45 - found
        assert found >= 32 if run else found == 0
        assert cache.allocator.check() == []
        cache.reset()
    assert_freed(cache.allocator)


def test_rows_start_with_what_all_have(backend: str) -> None:
    """One row is known to 44 tokens, the other shares its first 20: both start with no more, and nothing is forgotten."""
    model, inputs = model_of("llama"), prompts(rows=2, length=45)
    first = {key: value[:1] for key, value in inputs.items()}
    inputs["input_ids"][1, :20] = inputs["input_ids"][0, :20]
    cache = open_cache(model, backend)
    assert cache.begin(**first) == 0
    generate(model, first, cache)
    cache.reset()
    found = cache.begin(**inputs)
    assert 16 <= found <= 20
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic_cache(model)))
    cache.reset()
    assert cache.begin(**first) >= 32


def test_padding_is_part_of_the_prompt(backend: str) -> None:
    """Rows with other padding hold other KV: the ids alone would be the same where the padding is a token, too."""
    model, inputs = model_of("llama"), prompts(rows=2, length=45, pad=20)
    unseen = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    cache = open_cache(model, backend)
    for given, least in ((inputs, 0), (unseen, 0), (inputs, 32), (unseen, 32)):
        assert (cache.begin(**given) >= least) if least else (cache.begin(**given) == 0)
        assert_same(generate(model, given, cache), generate(model, given, dynamic_cache(model)))
        cache.reset()


def test_salts_and_other_tokens_after_a_crop_are_kept_apart(backend: str) -> None:
    model, inputs = model_of("llama"), prompts(rows=1, length=45)
    ids = inputs["input_ids"]
    other = torch.cat([ids[:, :20], (ids[:, 20:] + 1) % 90 + 3], 1)
    cache = open_cache(model, backend)
    with torch.no_grad():
        cache.begin(ids)
        model(ids, past_key_values=cache)
        cache.crop(-25)
        model(other[:, 20:], past_key_values=cache)  # not the tokens that begin() was told
        cache.reset()
        assert cache.begin(ids) <= 20
        cache.reset()
        assert cache.begin(ids, salt="tenant") == 0
        model(ids, past_key_values=cache)
        cache.crop(0)
        cache.reset()
        assert cache.begin(ids, salt="tenant") >= 32


def test_what_cannot_begin_is_refused_and_changes_nothing() -> None:
    model, inputs = model_of("llama"), prompts(rows=2, length=20)
    cache = open_cache(model, "virtual", max_batch=2)
    ids = inputs["input_ids"]
    for wrong, message in (
        ((ids[0],), r"input_ids: got a tensor of shape \(20,\)"),
        ((ids.float(),), "input_ids: got"),
        ((ids - 97,), "input_ids: got -"),
        ((ids + 2**31,), "input_ids: got 2147"),
        ((ids, torch.ones(2, 3)), r"attention_mask: got a tensor of shape \(2, 3\)"),
        ((ids, torch.arange(20).expand(2, 20) < 10), "attention_mask: hides"),
        ((ids.repeat(2, 1),), "batch of 4"),
        ((ids[:0],), "batch of 0"),
        ((ids[:, :0],), r"input_ids: got a tensor of shape \(2, 0\)"),
    ):
        with pytest.raises(kvmem.SpecError, match=message):
            cache.begin(*wrong)
        assert cache.allocator.stats().num_sequences == 0
    cache.begin(ids)
    with pytest.raises(kvmem.SpecError, match="reset"):
        cache.begin(ids)
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic_cache(model)))


def test_what_ids_do_not_say_is_refused(backend: str) -> None:
    """Images have the same ids, whatever they show."""
    model, inputs = model_of("llama"), prompts(rows=1, length=20)
    cache = open_cache(model, backend)
    with pytest.raises(kvmem.SpecError, match="^pixel_values: begin\\(\\) finds prompts by their ids alone"):
        cache.begin(**inputs, pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(kvmem.SpecError, match="^input_ids: got bools"):
        cache.begin(inputs["input_ids"] > 3)
    model.config.image_token_id = int(inputs["input_ids"][0, 7])
    try:
        with pytest.raises(kvmem.SpecError, match="the image_token_id, whose KV depends on more than the ids"):
            open_cache(model, backend).begin(**inputs)
    finally:
        del model.config.image_token_id
    assert cache.begin(**inputs) == 0


@pytest.mark.parametrize("family", ["idefics", "evolla"])
def test_models_whose_every_token_depends_on_more_than_its_id_begin_with_nothing(family: str) -> None:
    model, inputs = make_multimodal(family), multimodal_inputs(family)
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    cache = open_cache(model, "paged")
    for one in (cache, cache.fork()):
        with pytest.raises(kvmem.SpecError, match="^begin: .* depends on pictures or proteins"):
            one.begin(**ids)


@pytest.mark.parametrize("part", ["vision_config.image_token_id", "audio_config.audio_token_id"])
def test_placeholders_that_a_part_of_the_config_names(part: str) -> None:
    model, inputs = make_multimodal("phi4_multimodal"), multimodal_inputs("phi4_multimodal")
    owner, name = part.split(".")
    inputs["input_ids"][1, 7] = getattr(getattr(model.config, owner), name)
    with pytest.raises(kvmem.SpecError, match=f"the {name}, whose KV depends on more than the ids"):
        open_cache(model, "virtual").begin(**inputs)


def test_a_first_step_without_memory_forgets_no_ids(backend: str) -> None:
    model, inputs = model_of("llama"), prompts(rows=1, length=45)
    cache = open_cache(model, backend)
    assert cache.begin(**inputs) == 0
    budget = cache.allocator.stats().budget_bytes
    cache.allocator.set_memory(cache.allocator.pool.page_bytes * 2)
    with torch.no_grad():
        with pytest.raises(kvmem.OutOfMemory):
            model(**inputs, past_key_values=cache)
        cache.allocator.set_memory(budget)
        model(**inputs, past_key_values=cache)
        model(inputs["input_ids"][:, :1], past_key_values=cache)  # a step commits the one before it
    cache.reset()
    assert cache.begin(**inputs) >= 32


@pytest.mark.parametrize("before", [0, 1])
def test_a_step_that_fails_before_it_is_written_forgets_no_ids(
    backend: str, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room was made and is taken back; what comes again are the same tokens."""
    model, inputs = model_of("llama"), prompts(rows=1, length=45)
    cache = open_cache(model, backend)
    if before:  # a part of the prompt is cached
        generate(model, {key: value[:, :20] for key, value in inputs.items()}, cache)
        cache.reset()
    found = cache.begin(**inputs)

    def fail(*_: object) -> None:
        raise RuntimeError("no place")

    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(DenseBatch, "place", fail)
            with pytest.raises(RuntimeError, match="no place"):
                model(inputs["input_ids"][:, found:], past_key_values=cache)
        model(inputs["input_ids"][:, found:], past_key_values=cache)
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    cache.reset()
    assert cache.begin(**inputs) >= 32


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_another_cache_continues_from_a_disk(name: str, backend: str, tmp_path: Path) -> None:
    """What one cache has stored, one of another process would find: its allocator has only the folder in common."""
    pytest.importorskip("xxhash", reason="the disk tier needs the extra kvmem[tiers]")
    from kvmem.tiers.disk import DiskTier

    model, inputs, identity = model_of(name), prompts(rows=2, length=45), Identity("toy")
    expected = generate(model, inputs, dynamic_cache(model))
    spec = kvmem.CacheSpec.from_config(model.config, dtype=model.dtype)
    facts = {"block_bytes": largest_block_bytes(spec), "fingerprint": identity.fingerprint(spec)}
    for run in range(2):
        with DiskTier(tmp_path, capacity="1MiB", **facts) as tier:
            tiers = Tiers(host="64KiB", lower=[tier], identity=identity)
            cache = open_cache(model, backend, tiers=tiers)
            assert cache.begin(**inputs) == 0
            cache.reset()
            found = cache.begin(**inputs, load="all")
            with counting(model) as lengths:
                assert_same(generate(model, inputs, cache), expected)
            assert lengths[0] == 45 - found
            assert found == (32 if run else 0)
            assert cache.allocator.check() == []
            for row in inputs["input_ids"]:
                cache.allocator.store(row.numpy())
            assert cache.allocator.flush(60)
            cache.allocator.close()


def test_a_load_without_tiers_is_refused(backend: str) -> None:
    model, inputs = model_of("llama"), prompts(rows=2, length=45)
    cache = open_cache(model, backend)
    with pytest.raises(kvmem.SpecError, match="this allocator has no tiers"):
        cache.begin(**inputs, load="all")
    with pytest.raises(kvmem.SpecError, match="load: got 'disk'; must be one of host, all"):
        cache.begin(**inputs, load="disk")  # type: ignore[arg-type]
    assert cache.begin(**inputs) == 0
