"""What KVMemCache holds and gives back, and what it does when there is no memory for a step."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys

import pytest
import torch
from support_transformers import (
    CLOSE,
    NEW_TOKENS,
    assert_freed,
    assert_same,
    dynamic_cache,
    generate,
    model_of,
    one_thread,
    open_cache,
    prompts,
)

import kvmem
from kvmem.integrations.transformers import KVMemCache, KVMemEncoderDecoderCache

__all__ = ["one_thread"]  # a fixture of every test here


def test_beams_use_less_memory_than_rows_of_their_own(backend: str) -> None:
    model, inputs = model_of("llama"), prompts(rows=1, length=64)
    cache = open_cache(model, backend)
    generate(model, inputs, cache, num_beams=4)
    stats, tokens = cache.allocator.stats(), 4 * (64 + NEW_TOKENS - 1)
    alone = tokens * cache.allocator.spec.bytes_per_token
    assert stats.used_bytes < 0.8 * alone, f"{stats.used_bytes} bytes for what takes {alone} unshared"


def test_a_window_gives_back_what_it_has_passed(backend: str) -> None:
    model = model_of("gemma3")
    cache = open_cache(model, backend, max_tokens=512, max_batch=1)
    spec = cache.allocator.spec
    sliding = next(g for g in spec.groups if g.window_tokens)
    generate(model, prompts(rows=1, length=400), cache)
    tokens = cache.get_seq_length()
    full = sum(g.bytes_per_token for g in spec.groups if not g.window_tokens) * tokens
    window = sliding.bytes_per_token * (sliding.window_tokens + 2 * sliding.block_size)
    assert full < cache.allocator.stats().used_bytes <= full + window


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_out_of_memory_leaves_the_cache_usable(name: str, backend: str) -> None:
    model, inputs = model_of(name), prompts(rows=2, length=30)
    expected = generate(model, inputs, dynamic_cache(model))
    fits, budget, said = False, 1, ""
    while not fits:  # one page more each time, so that it fails at every place where it can
        budget += 1
        cache = open_cache(model, backend, memory=budget * 4096)
        try:
            assert_same(generate(model, inputs, cache), expected)
            fits = True
        except kvmem.OutOfMemory as error:
            said = str(error)
        assert fits or "set_memory" in said
        assert cache.allocator.check() == []
        cache.reset()
        assert_freed(cache.allocator)
        if not fits and budget % 4 == 0:
            cache.allocator.set_memory("1MiB")
            assert_same(generate(model, inputs, cache), expected)
    assert budget > 8


def test_out_of_memory_in_a_step_keeps_the_tokens_before_it() -> None:
    """Free something and go on: the step that failed runs again."""
    model, inputs = model_of("llama"), prompts(rows=1, length=80)
    full, small = dynamic_cache(model), open_cache(model, "virtual", memory=6 * 4096)
    with torch.no_grad():
        for cache in (full, small):
            model(inputs["input_ids"][:, :40], past_key_values=cache)
        with pytest.raises(kvmem.OutOfMemory):
            model(inputs["input_ids"][:, 40:], past_key_values=small)
        assert small.get_seq_length() == 40
        small.allocator.set_memory("1MiB")
        outputs = [model(inputs["input_ids"][:, 40:], past_key_values=cache).logits for cache in (full, small)]
    torch.testing.assert_close(outputs[1], outputs[0], **CLOSE)


def test_fork_without_memory_changes_nothing() -> None:
    model, inputs = model_of("llama"), prompts(rows=1, length=40)
    cache = open_cache(model, "virtual", memory=7 * 4096)
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)
        keys = cache.layers[0].keys.clone()
        with pytest.raises(kvmem.OutOfMemory, match="fork"):
            cache.batch_repeat_interleave(12)
    assert cache.allocator.stats().num_sequences == 1
    assert torch.equal(cache.layers[0].keys, keys)
    assert cache.allocator.check() == []


def test_refusals_say_what_would_fit() -> None:
    model, inputs = model_of("llama"), prompts(rows=2)
    with pytest.raises(kvmem.SpecError, match=r"batch of 8, beams .* made for 4"):
        generate(model, inputs, open_cache(model, "virtual", max_batch=4), num_beams=4)
    cache = open_cache(model, "virtual", max_tokens=30)
    with pytest.raises(kvmem.SpecError, match=r"it can hold 30 \(max_tokens\), so at most 0 more"):
        generate(model, inputs, cache)
    with pytest.raises(kvmem.SpecError, match=r"torch.float32 on cpu; .* torch.bfloat16"):
        generate(model, inputs, open_cache(model, "virtual", dtype=torch.bfloat16))
    with pytest.raises(kvmem.SpecError, match="carries no gradients"):
        model(**inputs, past_key_values=open_cache(model, "virtual"))
    with pytest.raises(kvmem.SpecError, match="KVMemEncoderDecoderCache"):
        KVMemCache(model_of("t5"), memory="1MiB", max_batch=1, max_tokens=16)
    with pytest.raises(kvmem.SpecError, match="use KVMemCache"):
        KVMemEncoderDecoderCache(model, memory="1MiB", max_batch=1, max_tokens=16)
    with pytest.raises(kvmem.SpecError, match="max_tokens: got 1 and None"):
        KVMemCache(model, memory="1MiB", max_batch=1)
    latent = kvmem.Component("ckv", width=32, dtype=torch.float32)
    alloc = kvmem.Allocator(
        kvmem.CacheSpec(components=[latent], num_layers=2), memory="1MiB", max_sequences=2, max_tokens=16
    )
    with pytest.raises(kvmem.SpecError, match="stores ckv; the attention of transformers stores k and v"):
        KVMemCache(alloc)
    with pytest.raises(kvmem.SpecError, match="max_batch: an allocator has its own"):
        KVMemCache(alloc, max_batch=3)


def test_crop() -> None:
    model, inputs = model_of("gemma3"), prompts(rows=1, length=30)
    cache = open_cache(model, "paged")
    with torch.no_grad():
        model(inputs["input_ids"], past_key_values=cache)
        with pytest.raises(ValueError, match="give -3 to remove 3"):
            cache.crop(3)
        cache.crop(-2)
        assert cache.get_seq_length() == 28
        model(inputs["input_ids"][:, :1], past_key_values=cache)
        with pytest.raises(kvmem.SpecError, match="sliding window of 11 has dropped"):
            cache.crop(-25)
        assert cache.get_seq_length() == 29
    assert cache.allocator.check() == []


def test_a_step_that_stops_half_way_is_noticed_and_undone() -> None:
    model, inputs = model_of("llama"), prompts(rows=1)
    cache, other = open_cache(model, "virtual"), dynamic_cache(model)
    k = torch.randn(1, 2, 1, 12)
    with torch.no_grad():
        for c in (cache, other):
            model(inputs["input_ids"], past_key_values=c)
        cache.update(k, k, 0)  # and layers 1 and 2 never follow
        with pytest.raises(kvmem.SpecError, match="stopped half-way"):
            model(inputs["input_ids"][:, :2], past_key_values=cache)
        cache.crop(-(cache.get_seq_length() - 17))
        logits = [model(inputs["input_ids"][:, :2], past_key_values=c).logits for c in (cache, other)]
    torch.testing.assert_close(logits[0], logits[1], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_computed_once_is_continued_twice(name: str, backend: str) -> None:
    """deepcopy is how transformers users reuse a prefix; here it shares the memory."""
    model = model_of(name)
    system, alloc = prompts(rows=1, length=33)["input_ids"], None
    cache = open_cache(model, backend)
    with torch.no_grad():
        model(system, past_key_values=cache)
    alloc = cache.allocator
    alone = alloc.stats().used_bytes
    for length in (4, 7):
        turn = torch.cat([system, prompts(rows=1, length=length)["input_ids"]], dim=1)
        inputs = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        branch = copy.deepcopy(cache)
        assert alloc.stats().used_bytes < 1.5 * alone
        assert_same(generate(model, inputs, branch), generate(model, inputs, dynamic_cache(model)))
        branch.reset()
    assert cache.get_seq_length() == 33
    assert alloc.stats().used_bytes <= alone  # less where the fork let a window move on
    assert alloc.check() == []


def test_rows_are_freed_with_the_cache() -> None:
    model, inputs = model_of("llama"), prompts(rows=2)
    spec = kvmem.CacheSpec.from_config(model.config, dtype=torch.float32)
    alloc = kvmem.Allocator(spec, memory="4MiB", max_sequences=4, max_tokens=96)
    other = alloc.sequence()
    other.extend(20)
    cache = KVMemCache(alloc)
    generate(model, inputs, cache)
    assert alloc.stats().num_sequences == 3
    del cache
    gc.collect()
    assert alloc.stats().num_sequences == 1
    with KVMemCache(alloc) as cache:
        generate(model, inputs, cache)
        assert alloc.stats().num_sequences == 3
    assert alloc.stats().parked_bytes == 0
    other.free()
    assert_freed(alloc)


def test_it_is_imported_only_when_asked_for() -> None:
    code = "import sys, kvmem; assert 'transformers' not in sys.modules; from kvmem.integrations.transformers.cache import KVMemCache"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
