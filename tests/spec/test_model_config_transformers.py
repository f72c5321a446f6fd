"""Specs read from configs against transformers itself: its config classes, and the caches its models fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvmem.spec import CacheSpec, model_families

transformers = pytest.importorskip("transformers", reason="compares with transformers, an optional package")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 24, "sliding_window": 8, "num_hidden_layers": 7},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "opt": {},
    "starcoder2": {"num_key_value_heads": 2},
    "olmo3": {"num_key_value_heads": 2, "sliding_window": 8, "pad_token_id": 0},
    "cohere2": {"num_key_value_heads": 2, "sliding_window": 8},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "falcon": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_cache_that_transformers_fills(family: str) -> None:
    """Not the config alone: a small model runs, and the tensors in its cache are counted, layer by layer."""
    shape = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 32,
    }
    config = transformers.CONFIG_MAPPING[family](**(shape | FAMILIES[family]))
    spec = CacheSpec.from_config(config, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    num_tokens = 5
    with torch.no_grad():
        cache = model(input_ids=torch.arange(num_tokens)[None], use_cache=True).past_key_values
    assert len(cache.layers) == spec.num_layers
    for layer, filled in enumerate(cache.layers):
        for name, tensor in (("k", filled.keys), ("v", filled.values)):
            group = spec.groups[spec.group_of(layer, name)]
            assert tensor.shape[1:] == (group.heads(name, layer), num_tokens, group.widths(name, layer)[0])
            assert tensor.nbytes == num_tokens * group.row_bytes(name, layer)
        window = getattr(filled, "sliding_window", None)
        assert spec.groups[spec.group_of(layer, "k")].window_tokens == window


def test_mla_equals_the_latent_cache_of_transformers() -> None:
    config = transformers.DeepseekV3Config(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, kv_lora_rank=24, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, intermediate_size=16, vocab_size=16, first_k_dense_replace=2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(5)[None], use_cache=True).past_key_values
    spec = CacheSpec.from_config(config, dtype=torch.float32)
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 5 * spec.bytes_per_token
    assert spec.bytes_per_token == 2 * (24 + 8) * 4


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_cross_attention_equals_transformers(family: str) -> None:
    if family == "t5":
        config = transformers.T5Config(
            d_model=32, d_kv=12, num_heads=3, num_layers=2, num_decoder_layers=3, d_ff=32, vocab_size=16
        )
        inputs, num_source = {"input_ids": torch.arange(6)[None]}, 6
    else:
        config = transformers.WhisperConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=4,
            vocab_size=16,
            num_mel_bins=8,
            max_source_positions=10,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        inputs, num_source = {"input_features": torch.zeros(1, 8, 20)}, 10
    spec = CacheSpec.from_config(config, dtype=torch.float32)
    model = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForSpeechSeq2Seq
    with torch.no_grad():
        out = model.from_config(config, dtype=torch.float32).eval()(
            **inputs, decoder_input_ids=torch.ones(1, 4, dtype=torch.long)
        )
    own, cross = out.past_key_values.self_attention_cache, out.past_key_values.cross_attention_cache
    assert sum(x.keys.nbytes + x.values.nbytes for x in own.layers) == 4 * spec.bytes_per_token
    assert sum(x.keys.nbytes + x.values.nbytes for x in cross.layers) == num_source * spec.prefill_bytes_per_token
    assert spec.groups[1].max_tokens == (None if family == "t5" else num_source)


def test_defaults_are_those_of_the_classes() -> None:
    """What a config may leave out is filled as transformers fills it; renamed or moved defaults there show here."""
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers' own config classes; optional package"
    )
    private = {"sliding_window_pattern"}  # lives in layer_types today: compared through the spec below
    for family, defaults in model_families.DEFAULTS.items():
        filled = transformers.CONFIG_MAPPING[family]().to_dict()
        for field, value in (defaults | model_families.NESTED_DEFAULTS.get(family, {})).items():
            if (
                field in filled
                and field not in private
                and not (field == "sliding_window" and "use_sliding_window" in filled)
            ):
                assert filled[field] == value, (family, field)
        if "sliding_window_pattern" in defaults:
            layers = filled["num_hidden_layers"]
            sizes = {
                "num_hidden_layers": layers,
                "hidden_size": filled["hidden_size"],
                "num_attention_heads": filled["num_attention_heads"],
            }
            bare = CacheSpec.from_config({"model_type": family} | sizes, dtype="bf16")
            assert bare == CacheSpec.from_config(filled, dtype="bf16"), family
    for family, sizes in model_families.NESTED_DEFAULTS.items():
        filled = transformers.CONFIG_MAPPING[family]().to_dict()
        assert {field: filled[field] for field in sizes} == sizes, family


def test_a_saved_multimodal_config_reads_as_the_live_one(tmp_path: Path) -> None:
    """transformers drops what equals a class default from text_config when it saves."""
    config = transformers.Gemma3Config(
        text_config={"num_hidden_layers": 34, "hidden_size": 2560, "sliding_window": 1024}
    )
    config.save_pretrained(tmp_path)
    assert CacheSpec.from_config(tmp_path, dtype="bf16") == CacheSpec.from_config(config, dtype="bf16")
