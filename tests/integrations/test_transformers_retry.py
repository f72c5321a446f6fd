"""A forward that fails in a layer and is tried again, against a cache in which nothing ever failed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support_transformers import dynamic_cache, model_of, one_thread, open_cache
from torch import nn

import kvmem
from kvmem.integrations.transformers import KVMemCache, KVMemEncoderDecoderCache

__all__ = ["one_thread"]  # a fixture of every test here

Cache = KVMemCache | KVMemEncoderDecoderCache
# Chunks of other lengths add in other orders.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    inner = getattr(model, "decoder", None) or model.model
    inner = getattr(inner, "decoder", inner)
    return inner.block if hasattr(inner, "block") else inner.layers


@contextmanager
def failing(model: nn.Module, number: int, *, late: bool) -> Iterator[None]:
    """Layer ``number`` raises once, before or after all that it does."""
    layer = layers_of(model)[number]

    def fail(*_: object) -> None:
        raise MemoryError("no memory for activations")

    hook = layer.register_forward_hook(fail) if late else layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def lengths(cache: Cache) -> list[int]:
    inner = cache.self_attention_cache if isinstance(cache, KVMemEncoderDecoderCache) else cache
    return [layer.get_seq_length() for layer in inner.layers]


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "bart"])
def test_a_failed_forward_is_tried_again(name: str, backend: str, rng: random.Random) -> None:
    """In chunks of 1 to 12 tokens past the sliding window; each may fail once or twice, in any layer."""
    model = model_of(name)
    for _ in range(4):
        rows, total = rng.randint(1, 3), 40
        ids = torch.randint(3, 97, (rows, total), generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        encoder = {"input_ids": ids[:, :9]} if model.config.is_encoder_decoder else {}
        field = "decoder_input_ids" if encoder else "input_ids"
        cache, other = open_cache(model, backend), dynamic_cache(model)
        done = 0
        with torch.no_grad():
            while done < total:
                end = min(total, done + rng.choice([1, 1, 2, 5, 12]))
                step = {field: ids[:, done:end], "past_key_values": cache} | encoder
                for _ in range(rng.choice([0, 0, 1, 1, 2])):
                    fail_in_a_layer(model, cache, step, done, rng)
                assert lengths(cache) == [done] * len(lengths(cache))
                got, want = model(**step).logits, model(**step | {"past_key_values": other}).logits
                torch.testing.assert_close(got, want, **CLOSE)
                done = end
        assert cache.allocator.check() == []


def fail_in_a_layer(model: nn.Module, cache: Cache, step: dict[str, object], done: int, rng: random.Random) -> None:
    """Fails, sees that a retry is refused before it touches anything, and takes the half step back as the error says."""
    count = len(lengths(cache))
    number, late = rng.randrange(count), rng.random() < 0.5
    with failing(model, number, late=late), pytest.raises(MemoryError):
        model(**step)
    written = number + late
    before = lengths(cache)
    assert before[written:] == [done] * (count - written) and len(set(before[:written])) <= 1
    if 0 < written < count:
        for _ in range(rng.randint(0, 2)):
            with pytest.raises(kvmem.SpecError, match=r"stopped half-way.*crop\(-"):
                model(**step)
            assert lengths(cache) == before
    cache.crop(done - cache.get_seq_length())


def test_a_step_without_memory_leaves_the_step_before_it_to_be_taken_back(backend: str) -> None:
    """Room comes first: were the window moved on before it, the last step could not be cropped after the refusal."""
    model, ids = model_of("gemma3"), torch.randint(3, 97, (1, 60))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        cache = open_cache(model, backend, max_tokens=48)
        model(input_ids=ids[:, :30], past_key_values=cache)
        model(input_ids=ids[:, 30:36], past_key_values=cache)
        with pytest.raises(kvmem.SpecError, match="max_tokens"):
            model(input_ids=ids[:, 36:], past_key_values=cache)
        cache.crop(-6)
        got = model(input_ids=ids[:, 30:40], past_key_values=cache).logits
    torch.testing.assert_close(got, want[:, 30:40], **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_cache_filled_layer_by_layer(name: str, backend: str) -> None:
    """From outside: all tokens of a layer at once, or chunk by chunk; a layer that runs ahead is refused."""
    model = model_of(name)
    config = model.config
    count, heads, width = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    k, v = torch.randn(2, count, 2, heads, 30, width)
    cache = open_cache(model, backend)
    for layer in reversed(range(count)):
        cache.update(k[layer, :, :, :12], v[layer, :, :, :12], layer)
    for layer in range(count):
        cache.update(k[layer, :, :, 12:20], v[layer, :, :, 12:20], layer)
        if layer < count - 1:
            with pytest.raises(kvmem.SpecError, match="every layer before the next tokens"):
                cache.update(k[layer, :, :, 20:], v[layer, :, :, 20:], layer)
    cache.crop(-6)
    cache.crop(0)
    for layer in range(count):
        first = 0 if not cache.is_sliding[layer] else 14 - config.sliding_window + 1
        assert torch.equal(cache.layers[layer].keys, k[layer, :, :, first:14])
        assert torch.equal(cache.layers[layer].values, v[layer, :, :, first:14])


def test_cross_attention_is_filled_again_after_a_failure(backend: str) -> None:
    """The second layer's cross attention fails: the first one's stays, and the retry fills the others."""
    model, ids = model_of("t5"), torch.randint(3, 97, (2, 14))
    cache = open_cache(model, backend)
    with torch.no_grad():
        want = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
        with failing(model, 1, late=True), pytest.raises(MemoryError):
            model(input_ids=ids, decoder_input_ids=ids[:, :5], past_key_values=cache)
        assert [cache.is_updated[layer] for layer in range(3)] == [True, True, False]
        with pytest.raises(kvmem.SpecError, match="cross attention"):
            cache.cross_attention_cache.crop(-1)
        cache.crop(-5)
        got = model(input_ids=ids, decoder_input_ids=ids[:, :5], past_key_values=cache).logits
    torch.testing.assert_close(got, want, **CLOSE)
    assert dict(cache.is_updated) == dict.fromkeys(range(3), True)
