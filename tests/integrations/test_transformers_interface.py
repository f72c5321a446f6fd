"""What code written for DynamicCache asks of a cache beside update(): iteration, attributes, copies, autocast, configs."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from support_families import config_of
from support_transformers import (
    assert_same,
    dynamic_cache,
    generate,
    make_llama,
    model_of,
    one_thread,
    open_cache,
    prompts,
)
from transformers import DynamicCache, LlamaConfig

import kvmem
from kvmem.integrations.transformers import KVMemCache, KVMemEncoderDecoderCache

__all__ = ["one_thread"]  # a fixture of every test here


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_iteration_gives_keys_values_and_window(name: str, backend: str) -> None:
    model, inputs = model_of(name), prompts(rows=2)
    ours, theirs = open_cache(model, backend), dynamic_cache(model)
    assert not ours.is_initialized
    assert [(k, v) for k, v, _ in ours] == [(None, None)] * model.config.num_hidden_layers
    for cache in (ours, theirs):
        generate(model, inputs, cache)
    assert ours.is_initialized
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine[1], other[1], rtol=1e-4, atol=1e-5)
        assert mine[2] == other[2]
    again = DynamicCache(ours)  # what torch's data parallelism does with a cache
    assert again.is_sliding == ours.is_sliding
    assert torch.equal(again.layers[0].keys, ours.layers[0].keys)
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        assert (layer.device, layer.dtype) == (other.device, other.dtype)
        assert layer.sliding_window == getattr(other, "sliding_window", None)
        for call in ("batch_repeat_interleave", "batch_select_indices", "reorder_cache", "crop", "reset"):
            with pytest.raises(NotImplementedError, match="method of the cache"):
                getattr(layer, call)(1)


def test_iteration_over_self_and_cross_attention(backend: str) -> None:
    model = model_of("t5")
    cache = open_cache(model, backend)
    assert not cache.is_initialized
    generate(model, prompts(rows=2), cache)
    assert cache.is_initialized
    for own_k, own_v, _, cross_k, cross_v, window in cache:
        assert own_k.shape == own_v.shape and cross_k.shape == cross_v.shape
        assert cross_k.shape[2] == 17 and window is None
    held = cache.cross_attention_cache
    with pytest.raises(kvmem.SpecError, match="cross_attention_cache"):
        cache.cross_attention_cache = DynamicCache()
    assert cache.cross_attention_cache is held


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate_has_nothing_to_warn_of(name: str, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(name)
    logger = logging.getLogger("transformers")  # it does not pass on what it logs
    logger.addHandler(caplog.handler)
    try:
        generate(model, prompts(rows=2), open_cache(model, backend))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_copy_is_cropped_and_goes_on_alone(backend: str) -> None:
    config = LlamaConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    cache = KVMemCache(config, backend=backend, max_batch=2, max_tokens=64, dtype=torch.float32, memory="4MiB")
    states = torch.randn(2, 1, 2, 5, 12)
    for layer in range(2):
        cache.update(states[0], states[1], layer)
    again = copy.deepcopy(cache)
    again.crop(-1)
    assert (again.get_seq_length(), cache.get_seq_length()) == (4, 5)
    for layer in range(2):
        keys, values = again.update(states[0, :, :, :1], states[1, :, :, :1], layer)
        assert torch.equal(keys, torch.cat([states[0, :, :, :4], states[0, :, :, :1]], 2))
        assert torch.equal(values, torch.cat([states[1, :, :, :4], states[1, :, :, :1]], 2))
        assert torch.equal(cache.layers[layer].keys, states[0])


REARRANGED: dict[str, Any] = {
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices((1, 0, 1)),
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("how", REARRANGED)
def test_what_is_recorded_survives(how: str, backend: str) -> None:
    """Far past the window, and across blocks: all that came since recording began can be taken back."""
    model, ids = model_of("gemma3"), prompts(rows=2, length=60)["input_ids"]
    cache, other = open_cache(model, backend), DynamicCache()
    with torch.no_grad():
        for held in (cache, other):
            held.activate_past_recording()
            for step in ids.split([40, 19, 1], dim=1):
                model(step, past_key_values=held)
        found = REARRANGED[how](cache) or cache
        expected = REARRANGED[how](other) or other
        for held in (found, expected):
            held.crop(-30)
        assert found.get_seq_length() == 30
        more = prompts(rows=expected.layers[0].keys.shape[0], length=9)["input_ids"]
        got, want = (model(more, past_key_values=held).logits for held in (found, expected))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert cache.allocator.check() == []


def test_recording_copies_nothing_where_nothing_is_dropped(backend: str) -> None:
    model = model_of("llama")
    cache = open_cache(model, backend, record_ops=True)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompts(rows=1, length=64)["input_ids"], past_key_values=cache)
    cache.batch_repeat_interleave(4)
    stats = cache.allocator.stats()
    assert stats.used_bytes < 2 * 64 * cache.allocator.spec.bytes_per_token


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bart"])
def test_autocast(name: str, dtype: torch.dtype, backend: str) -> None:
    """A rotated K is float32 and V bfloat16 there; a cache of either dtype gives DynamicCache's tokens."""
    model, inputs = model_of(name), prompts(rows=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = generate(model, inputs, dynamic_cache(model)).sequences.tolist()
        cache = open_cache(model, backend, dtype=dtype)
        assert generate(model, inputs, cache).sequences.tolist() == expected


def test_autocast_returns_what_it_was_given_and_refuses_what_would_lose_bits() -> None:
    model = model_of("llama")
    cache = open_cache(model, "virtual", dtype=torch.float32)
    k, v = torch.randn(1, 2, 3, 12), torch.randn(1, 2, 3, 12).bfloat16()
    with pytest.raises(kvmem.SpecError, match=r"'v' of 2 heads of 12, torch.bfloat16"):
        cache.update(k, v, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cache.update(k, v, 0)
        assert torch.equal(found[0], k) and torch.equal(found[1], v) and found[1].dtype == torch.bfloat16
        assert cache.layers[0].values.dtype == torch.bfloat16
        half = open_cache(model, "virtual", dtype=torch.float16)
        with pytest.raises(kvmem.SpecError, match=r"torch.float16"):
            half.update(k, v, 0)
        assert half.get_seq_length() == 0


def test_an_unknown_model_type_is_refused_unless_told() -> None:
    config = make_llama().config
    named = {**config.to_dict(), "model_type": "llama_of_ours", "dtype": "float32"}
    with pytest.raises(kvmem.SpecError, match=r"^model_type: got 'llama_of_ours'.*assume='llama'"):
        kvmem.CacheSpec.from_config(named)
    spec = kvmem.CacheSpec.from_config(named, assume="llama")
    assert spec == kvmem.CacheSpec.from_config(config, dtype="float32")
    for wrong in ("llama_of_ours", "", 7):
        with pytest.raises(kvmem.SpecError, match="^assume: got"):
            kvmem.CacheSpec.from_config(named, assume=wrong)
    with pytest.raises(kvmem.SpecError, match="^model_type: got 'longcat_flash'"):
        kvmem.CacheSpec.from_config({**named, "model_type": "longcat_flash"}, assume="llama")
    gemma = model_of("gemma3").config
    assert kvmem.CacheSpec.from_config(gemma, dtype="float32", assume="llama") == kvmem.CacheSpec.from_config(
        gemma, dtype="float32"
    ), "a known family keeps its own rules"


def test_a_model_of_an_unknown_type(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make_llama(), prompts(rows=2)
    monkeypatch.setattr(type(model.config), "model_type", "llama_of_ours")
    sizes: dict[str, Any] = {"memory": "4MiB", "max_batch": 2, "max_tokens": 96, "backend": backend}
    for kind in (KVMemCache, KVMemEncoderDecoderCache):
        with pytest.raises(kvmem.SpecError, match="model_type"):
            kind(model, **sizes)
    cache = KVMemCache(model, assume="llama", **sizes)
    assert_same(generate(model, inputs, cache), generate(model, inputs, dynamic_cache(model)))
    with pytest.raises(kvmem.SpecError, match="assume: an allocator"):
        KVMemCache(cache.allocator, assume="llama")


def test_cross_attention_in_place_of_self_attention_is_refused_by_both() -> None:
    config = config_of("mllama_text_model", cross_attention_layers=[1])
    for kind in (KVMemCache, KVMemEncoderDecoderCache):
        with pytest.raises(kvmem.SpecError, match=r"layers \[1\] have cross attention in place"):
            kind(config, max_batch=1, max_tokens=64, memory="1MiB", dtype=torch.float32)
