"""Model configs read as specs: bytes worked out by hand from published shapes, and by transformers' own caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvmem.errors import SpecError
from kvmem.spec import CacheSpec

CONFIGS = Path(__file__).parent / "configs"


def read(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def llama(**changes: Any) -> dict[str, Any]:
    """Llama-3-8B with fields replaced; a field given as ``...`` is removed."""
    return {k: v for k, v in (read("llama-3-8b") | changes).items() if v is not ...}


# layers x (K and V) x KV heads x width x bytes an element, from the published config files.
@pytest.mark.parametrize(
    ("name", "num_layers", "token_bytes"),
    [
        ("llama-3-8b", 32, 131_072),
        ("llama-3-70b", 80, 327_680),
        ("qwen2-7b", 28, 57_344),
        ("qwen2-0.5b", 24, 12_288),
        ("mistral-7b-v0.1", 32, 131_072),
        ("mixtral-8x7b", 32, 131_072),
        ("gemma-3-1b", 26, 26 * 2 * 1 * 256 * 2),
        ("gemma-3-4b", 34, 34 * 2 * 4 * 256 * 2),
        ("gemma-3-27b", 62, 62 * 2 * 16 * 128 * 2),
        ("gpt-oss-20b", 24, 24 * 2 * 8 * 64 * 2),
        ("deepseek-v2", 60, 69_120),
        ("whisper-large-v3", 32, 32 * 2 * 20 * 64 * 2),
    ],
)
def test_bytes_of_a_token_by_hand(name: str, num_layers: int, token_bytes: int) -> None:
    spec = CacheSpec.from_config(CONFIGS / f"{name}.json")
    assert (spec.num_layers, spec.bytes_per_token, spec.fixed_bytes) == (num_layers, token_bytes, 0)
    assert type(spec.bytes_per_token) is int
    layers = [layer for group in spec.groups if group.growth == "token" for layer in group.layers]
    assert sorted(layers) == list(range(num_layers))


def test_dtype_scales_the_bytes_and_is_needed() -> None:
    assert CacheSpec.from_config(llama(), dtype=torch.float8_e4m3fn).bytes_per_token == 65_536
    assert CacheSpec.from_config(llama(torch_dtype="float32")).bytes_per_token == 262_144
    assert CacheSpec.from_config(llama(torch_dtype=..., dtype="float16")).groups[0].components[0].dtype is torch.float16
    with pytest.raises(SpecError, match=r"^dtype: missing .*'llama'"):
        CacheSpec.from_config(llama(torch_dtype=...))
    with pytest.raises(SpecError, match=r"^dtype: got 'auto'"):
        CacheSpec.from_config(llama(torch_dtype="auto"))


def test_llama_is_one_group_of_rotated_keys() -> None:
    spec = CacheSpec.from_config(llama(), block_size=64)
    (group,) = spec.groups
    assert (group.name, group.window_tokens, group.block_size, spec.num_query_heads) == ("full", None, 64, 32)
    k, v = group.components
    assert (k.name, k.heads, k.width, k.rope) == ("k", 8, 128, "post")
    assert (v.name, v.heads, v.width, v.rope) == ("v", 8, 128, "none")


@pytest.mark.parametrize(
    ("name", "window", "num_full", "full_bytes", "sliding_bytes"),
    [
        # Every sixth layer is full; the 4B file leaves the head counts and the pattern to the class.
        ("gemma-3-1b", 512, 4, 4 * 1024, 22 * 1024),
        ("gemma-3-4b", 1024, 5, 5 * 4096, 29 * 4096),
        ("gemma-3-27b", 1024, 10, 10 * 8192, 52 * 8192),
        ("gpt-oss-20b", 128, 12, 12 * 2048, 12 * 2048),
    ],
)
def test_sliding_and_full_layers_are_two_groups(
    name: str, window: int, num_full: int, full_bytes: int, sliding_bytes: int
) -> None:
    full, sliding = CacheSpec.from_config(CONFIGS / f"{name}.json").groups
    assert (full.name, sliding.name) == ("full", "sliding")
    assert (full.window_tokens, sliding.window_tokens) == (None, window)
    assert len(full.layers) == num_full
    assert (full.bytes_per_token, sliding.bytes_per_token) == (full_bytes, sliding_bytes)


def test_gemma_pattern_and_layer_types_say_the_same() -> None:
    by_pattern = CacheSpec.from_config(read("gemma-3-1b"))
    types = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(26)]
    stated = {k: v for k, v in read("gemma-3-1b").items() if k != "sliding_window_pattern"} | {"layer_types": types}
    assert CacheSpec.from_config(stated) == by_pattern
    assert by_pattern.groups[0].layers == (5, 11, 17, 23)
    other = CacheSpec.from_config(read("gemma-3-1b") | {"sliding_window_pattern": 2})
    assert other.groups[0].layers == tuple(range(1, 26, 2))


def test_mistral_slides_everywhere_or_nowhere() -> None:
    (sliding,) = CacheSpec.from_config(read("mistral-7b-v0.1")).groups
    assert (sliding.name, sliding.window_tokens, len(sliding.layers)) == ("sliding", 4096, 32)
    (full,) = CacheSpec.from_config(read("mistral-7b-v0.1") | {"sliding_window": None}).groups
    assert (full.name, full.window_tokens) == ("full", None)
    left_out = {k: v for k, v in read("mistral-7b-v0.1").items() if k != "sliding_window"}
    assert CacheSpec.from_config(left_out).groups[0].window_tokens == 4096, "the class fills a missing field with 4,096"


def test_qwen2_window_starts_at_max_window_layers_if_used() -> None:
    config = read("qwen2-7b") | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 4096}
    full, sliding = CacheSpec.from_config(config).groups
    assert (full.layers, sliding.layers, sliding.window_tokens) == (tuple(range(20)), tuple(range(20, 28)), 4096)


def test_mla_is_a_latent_and_a_rotary_key() -> None:
    (group,) = CacheSpec.from_config(read("deepseek-v2")).groups
    ckv, kpe = group.components
    assert [(c.name, c.heads, c.width, c.rope) for c in (ckv, kpe)] == [("ckv", 1, 512, "none"), ("kpe", 1, 64, "post")]
    assert group.bytes_per_token == 60 * (512 + 64) * 2


def test_t5_has_cross_attention_fixed_after_prefill() -> None:
    spec = CacheSpec.from_config(read("t5-base"), dtype=torch.float32)
    own, cross = spec.groups
    assert (own.growth, cross.growth, cross.max_tokens) == ("token", "prefill", None)
    assert [c.name for c in cross.components] == ["cross_k", "cross_v"]
    assert {c.rope for group in spec.groups for c in group.components} == {"none"}
    assert spec.bytes_per_token == spec.prefill_bytes_per_token == 12 * 2 * 12 * 64 * 4
    assert [c.name for c in spec.layer_components(0)] == ["k", "v", "cross_k", "cross_v"]
    # T5-11B: heads x d_kv is 16 times d_model, and decoder layers may differ from the encoder's.
    big = CacheSpec.from_config(
        read("t5-base") | {"num_heads": 128, "d_kv": 128, "num_decoder_layers": 6}, dtype="bf16"
    )
    assert (big.num_layers, big.bytes_per_token) == (6, 6 * 2 * 128 * 128 * 2)


def test_whisper_cross_attention_holds_at_most_its_audio_frames() -> None:
    spec = CacheSpec.from_config(
        read("whisper-large-v3") | {"decoder_layers": 4}
    )  # the turbo model: encoder 32, decoder 4
    assert (spec.num_layers, spec.bytes_per_token) == (4, 4 * 2 * 1280 * 2)
    assert (spec.groups[1].max_tokens, spec.prefill_bytes_per_token) == (1500, 4 * 2 * 1280 * 2)


def test_gpt2_names_and_heads() -> None:
    spec = CacheSpec.from_config(read("gpt2"), dtype=torch.float16)
    assert (spec.num_layers, spec.bytes_per_token) == (12, 12 * 2 * 12 * 64 * 2)
    assert spec.groups[0].component("k").rope == "none", "learned positions: nothing is rotated"


@pytest.mark.parametrize(
    ("config", "kv_heads", "width"),
    [
        (
            {
                "model_type": "falcon",
                "hidden_size": 4544,
                "num_hidden_layers": 2,
                "num_attention_heads": 71,
                "multi_query": True,
            },
            1,
            64,
        ),
        (
            {
                "model_type": "falcon",
                "hidden_size": 8192,
                "num_hidden_layers": 2,
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "multi_query": True,
                "new_decoder_architecture": True,
            },
            8,
            64,
        ),
        ({"model_type": "gpt_bigcode", "n_embd": 6144, "n_layer": 2, "n_head": 48}, 1, 128),
        (
            {"model_type": "dbrx", "d_model": 6144, "n_layers": 2, "n_heads": 48, "attn_config": {"kv_n_heads": 8}},
            8,
            128,
        ),
        (
            {
                "model_type": "qwen3",
                "hidden_size": 1024,
                "num_hidden_layers": 2,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
            },
            8,
            128,
        ),
        (
            {
                "model_type": "phi3",
                "hidden_size": 3072,
                "num_hidden_layers": 2,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
            },
            32,
            96,
        ),
        ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}, 1, 16),
        ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": None}, 4, 16),
    ],
)
def test_heads_of_other_families(config: dict[str, Any], kv_heads: int, width: int) -> None:
    spec = CacheSpec.from_config(config, dtype="bfloat16")
    assert spec.bytes_per_token == 2 * 2 * kv_heads * width * 2
    assert (spec.groups[0].heads("k", 0), spec.groups[0].widths("v", 1)) == (kv_heads, (width,))


def test_values_narrower_than_keys() -> None:
    spec = CacheSpec.from_config(llama(head_dim=192, v_head_dim=128))
    assert spec.bytes_per_token == 32 * 8 * (192 + 128) * 2


def test_layers_that_read_one_copy() -> None:
    """Gemma-3n: the last layers keep no KV, and read that of the last earlier layer of their kind."""
    text = {"model_type": "gemma3n_text", "num_hidden_layers": 30, "num_kv_shared_layers": 10, "hidden_size": 2048}
    spec = CacheSpec.from_config({"model_type": "gemma3n", "text_config": text}, dtype="bf16")
    found = {group.name: group.layers for group in spec.groups}
    assert found["full"] == (4, 9, 14) and found["full_shared"] == (19, 24, 29)
    assert found["sliding_shared"] == (18, 20, 21, 22, 23, 25, 26, 27, 28)
    assert spec.bytes_per_token == 20 * 2 * 2 * 256 * 2, "twenty layers own a copy"
    assert {c.scope for c in spec.layer_components(29)} == {"shared"}


def test_cross_attention_layers_inside_a_decoder() -> None:
    text = read("llama-3-8b") | {
        "model_type": "mllama_text_model",
        "num_hidden_layers": 40,
        "cross_attention_layers": [3, 8, 13],
    }
    spec = CacheSpec.from_config({"model_type": "mllama", "text_config": text})
    assert spec.bytes_per_token == 37 * 2 * 8 * 128 * 2
    assert spec.prefill_bytes_per_token == 3 * 2 * 8 * 128 * 2
    assert [c.name for c in spec.layer_components(8)] == ["cross_k", "cross_v"]


def test_layers_without_rotation_are_told_apart() -> None:
    smollm3 = llama(model_type="smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    group = CacheSpec.from_config(smollm3).groups[0]
    assert [group.rope("k", layer) for layer in range(4)] == ["post", "post", "post", "none"]
    assert CacheSpec.from_config(llama(model_type="smollm3", num_hidden_layers=4)).groups[0] == group, (
        "the class's every fourth"
    )
    full, sliding = CacheSpec.from_config(llama(model_type="cohere2", num_hidden_layers=8, sliding_window=64)).groups
    assert (full.component("k").rope, sliding.component("k").rope) == ("none", "post")


def test_sources_are_equal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama()))
    want = CacheSpec.from_config(llama())
    assert CacheSpec.from_config(tmp_path) == CacheSpec.from_config(str(tmp_path / "config.json")) == want

    class Config:
        def to_dict(self) -> dict[str, Any]:
            return llama(torch_dtype=torch.bfloat16)

    assert CacheSpec.from_config(Config()) == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": ...}, r"^num_hidden_layers: missing .*n_layer.* \(model_type 'llama'\)"),
        ({"num_attention_heads": ...}, r"^num_attention_heads: missing"),
        ({"hidden_size": ...}, r"^hidden_size: missing"),
        ({"num_hidden_layers": -1}, r"^num_hidden_layers: got -1; must be an integer of at least 1"),
        ({"num_hidden_layers": 0}, r"^num_hidden_layers: got 0"),
        ({"num_hidden_layers": 10**9}, r"^num_hidden_layers: got 1000000000.*at most 65536"),
        ({"num_key_value_heads": True}, r"^num_key_value_heads: got True"),
        ({"num_key_value_heads": 8.0}, r"^num_key_value_heads: got 8\.0"),
        ({"num_key_value_heads": 5}, r"^num_key_value_heads: got 5.*does not divide num_attention_heads 32"),
        ({"num_attention_heads": "32"}, r"^num_attention_heads: got '32'"),
        ({"num_attention_heads": [32, 32]}, r"^num_attention_heads: got \[32, 32\]"),
        ({"hidden_size": 4095}, r"^hidden_size: got 4095.*num_attention_heads 32 does not divide it"),
        ({"head_dim": 0}, r"^head_dim: got 0"),
        ({"torch_dtype": "float12"}, r"^dtype: got 'float12'; a cache holds one of .*bfloat16"),
        ({"sliding_window": -5, "model_type": "mistral"}, r"^sliding_window: got -5"),
        (
            {"sliding_window": 4096},
            r"^sliding_window: got 4096 \(model_type 'llama'\); which layers slide is not stated",
        ),
        ({"layer_types": ["full_attention"]}, r"^layer_types: got \['full_attention'\].*each of 32 layers"),
        ({"layer_types": "full"}, r"^layer_types: got 'full'"),
        ({"layer_types": ["sliding_attention"] * 32}, r"^sliding_window: missing"),
        (
            {"layer_types": ["sliding_attention"] * 32, "sliding_window": 8, "use_sliding_window": False},
            r"^use_sliding_window: got False",
        ),
        (
            {"layer_types": ["full_attention", "linear_attention"] * 16},
            r"^layer_types: got 'linear_attention'.*keep states.*by hand",
        ),
        ({"layer_types": ["chunked_attention"] * 32}, r"^layer_types: got 'chunked_attention'"),
        ({"layer_types": [None] * 32}, r"^layer_types: got None"),
        ({"model_type": 7}, r"^model_type: got 7"),
        ({"kv_lora_rank": 512}, r"^qk_rope_head_dim: missing"),
        ({"kv_lora_rank": 0}, r"^kv_lora_rank: got 0"),
        ({"num_kv_shared_layers": 32}, r"^num_kv_shared_layers: got 32.*no full layer before them"),
        ({"cross_attention_layers": [40]}, r"^cross_attention_layers: got 40; needs layer numbers under 32"),
        ({"no_rope_layers": [1]}, r"^no_rope_layers: got 1 entries"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": -1},
            r"^max_window_layers: got -1",
        ),
        ({"model_type": "dbrx", "attn_config": {"kv_n_heads": 0}}, r"^attn_config\.kv_n_heads: got 0"),
        ({"mamba_d_state": 16}, r"^mamba_d_state: got 16.*recurrent layers keep a state.*by hand"),
        ({"linear_num_key_heads": 16}, r"^linear_num_key_heads: got 16.*recurrent"),
        ({"index_topk": 2048}, r"^index_topk: got 2048.*index keys"),
        ({"model_type": "bert"}, r"^model_type: got 'bert'.*an encoder keeps no KV"),
        ({"model_type": "longcat_flash"}, r"^model_type: got 'longcat_flash'.*two attentions"),
        ({"attention_chunk_size": 8192}, r"^attention_chunk_size: got 8192.*chunk"),
        ({"global_head_dim": 512}, r"^global_head_dim: got 512.*differ in shape"),
        ({"use_bidirectional_attention": True}, r"^use_bidirectional_attention: got True.*encoder"),
    ],
)
def test_bad_configs_are_refused_by_field_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CacheSpec.from_config(llama(**changes))


@pytest.mark.parametrize("size", [0, -16, True, 16.0, "16"])
def test_bad_block_size(size: Any) -> None:
    with pytest.raises(SpecError, match=r"^block_size: got"):
        CacheSpec.from_config(llama(), block_size=size)


def test_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^config: cannot read .*absent.json"):
        CacheSpec.from_config(tmp_path / "absent.json")
    with pytest.raises(SpecError, match=r"^config: cannot read .*config.json"):
        CacheSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(SpecError, match=r"^config: .* is not JSON"):
        CacheSpec.from_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match=r"^config: .* is not JSON"):
        CacheSpec.from_config(tmp_path)
    for bad in (7, None, [1]):
        with pytest.raises(SpecError, match=r"^config: got"):
            CacheSpec.from_config(bad)
