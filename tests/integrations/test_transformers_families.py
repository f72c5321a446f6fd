"""KVMemCache against DynamicCache on a tiny model of every family whose config is read: tokens and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support_families import (
    SMALL,
    config_of,
    encoder_inputs,
    make_decoder,
    make_encoder_decoder,
    make_text,
    make_two_berts,
)
from support_multimodal import make_multimodal, multimodal_inputs
from support_transformers import BACKENDS, CLOSE, VOCABULARY, assert_same, one_thread
from transformers import AutoModelForCausalLM, DynamicCache, EncoderDecoderCache, PreTrainedModel

from kvmem.integrations.transformers import KVMemCache, KVMemEncoderDecoderCache
from kvmem.spec import model_names

__all__ = ["one_thread"]  # a fixture of every test here

DECODERS = sorted(model_names._DECODERS.split())
TEXTS = sorted(model_names._TEXTS.split())
ENCODER_DECODERS = sorted(model_names._ENCODER_DECODERS.split())
MULTIMODAL = sorted(model_names._MULTIMODAL.split())
# Families of encoder-decoders whose decoder is a model of its own, too.
DECODERS_ALONE = ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus",
                  "plbart", "whisper"]  # fmt: skip
NEW_TOKENS = 6
SIZES: dict[str, Any] = {"memory": "8MiB", "max_batch": 2, "max_tokens": 96, "page_bytes": 4096}


def generated(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any) -> Any:
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, use_cache=True,
        pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip


def same_on_both_backends(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any, kind: Any) -> None:
    expected = generated(model, inputs, cache)
    assert len(expected.scores) == NEW_TOKENS
    for backend in BACKENDS:
        ours = kind(model, backend=backend, **SIZES)
        assert_same(generated(model, inputs, ours), expected)
        assert ours.get_seq_length() == cache.get_seq_length() >= NEW_TOKENS - 1
        assert ours.allocator.check() == []


def prompt() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (2, 20))  # longer than the sliding windows
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", DECODERS)
def test_decoders(family: str) -> None:
    model = make_decoder(family)
    # A config of an encoder-decoder family has the encoder's number of layers under the usual name.
    cache = DynamicCache() if hasattr(model.config, "decoder_layers") else DynamicCache(config=model.config)
    same_on_both_backends(model, prompt(), cache, KVMemCache)


@pytest.mark.parametrize("family", DECODERS_ALONE)
def test_decoders_of_encoder_decoder_families(family: str) -> None:
    config = config_of(family, is_decoder=True, is_encoder_decoder=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    same_on_both_backends(model, prompt(), DynamicCache(), KVMemCache)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders(family: str) -> None:
    """DynamicCache without a config holds all tokens; the attention mask says what a window hides."""
    model = make_encoder_decoder(family)
    cache = EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache()) if (
        family == "t5_gemma_module") else EncoderDecoderCache(DynamicCache(), DynamicCache())  # fmt: skip
    same_on_both_backends(model, encoder_inputs(family), cache, KVMemEncoderDecoderCache)


def test_an_encoder_decoder_of_two_berts() -> None:
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    same_on_both_backends(make_two_berts(), encoder_inputs("bert"), cache, KVMemEncoderDecoderCache)


def test_falcons_new_architecture_caches_every_query_head() -> None:
    """K and V are broadcast before they are cached, so the cache holds more than the config's KV heads."""
    config = config_of("falcon", new_decoder_architecture=True, num_kv_heads=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    same_on_both_backends(model, prompt(), DynamicCache(config=config), KVMemCache)


@pytest.mark.parametrize("family", TEXTS)
def test_decoders_of_multimodal_models(family: str) -> None:
    """A prompt, then three tokens more: the hidden states."""
    model, ids = make_text(family), prompt()["input_ids"]
    expected = DynamicCache(config=model.config)
    caches = [expected] + [KVMemCache(model, backend=backend, **SIZES) for backend in BACKENDS]
    with torch.no_grad():
        for step in (ids, ids[:, :3]):
            want, *found = [model(input_ids=step, past_key_values=cache, use_cache=True)[0] for cache in caches]
            for got in found:
                torch.testing.assert_close(got, want, **CLOSE)
    assert [cache.get_seq_length() for cache in caches] == [23] * 3


@pytest.mark.parametrize("family", [*MULTIMODAL, "musicgen"])  # its config has the decoder as a part
def test_multimodal_models(family: str) -> None:
    """With what they look at beside the text: pictures, sound, proteins, and Csm's second decoder."""
    model = make_multimodal(family)
    if model.config.is_encoder_decoder:
        cache, kind = EncoderDecoderCache(DynamicCache(), DynamicCache()), KVMemEncoderDecoderCache
    else:
        cache, kind = DynamicCache(config=model.config), KVMemCache
    same_on_both_backends(model, multimodal_inputs(family), cache, kind)


def test_every_known_family_is_tried() -> None:
    tried = {*DECODERS, *TEXTS, *ENCODER_DECODERS, *MULTIMODAL}
    assert tried | model_names.UNTRIED == model_names.KNOWN
    assert not tried & model_names.UNTRIED
    assert SMALL["sliding_window"] < prompt()["input_ids"].shape[1]
