"""Tiny random models of every family whose config kvmem reads, made from configs alone."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
import transformers
from support_transformers import VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

WINDOW = 11  # shorter than the prompts
# Whichever of these a family has. No family has one under a meaning of its own that would break it.
SMALL: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "n_embed", "embedding_size", "encoder_hidden_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"], 3),
    **dict.fromkeys(["decoder_layers", "decoder_num_hidden_layers"], 3),
    **dict.fromkeys(["encoder_layers", "encoder_num_hidden_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "decoder_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "kv_channels", "v_head_dim", "dim_head"], 12),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "dim_ff"], 64),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 256),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"], 1),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(["initializer_range", "init_std"], 0.3),
    "kv_lora_rank": 16, "q_lora_rank": 24, "sliding_window": WINDOW, "is_decoder": True, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 2, "eos_token_id": None, "forced_eos_token_id": None,
}  # fmt: skip

_LATENT = {"num_key_value_heads": 4}
_LATENT_ROTARY = {"num_key_value_heads": 4, "head_dim": 8}  # there head_dim is what is rotated
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
_HALF_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5,
    }
}  # fmt: skip
# What a family needs beyond that.
EXTRA: dict[str, dict[str, Any]] = {
    "axk1": _LATENT_ROTARY, "deepseek_v2": _LATENT, "deepseek_v3": _LATENT_ROTARY, "glm4_moe_lite": _LATENT,
    "minicpm3": _LATENT, "youtu": _LATENT_ROTARY,
    "cosmos3_edge_text": _SECTIONS, "glm4v_text": _SECTIONS, "glm_ocr_text": _SECTIONS, "qwen2_vl_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS, "qwen2_5_omni_text": _SECTIONS, "qwen3_vl_text": _SECTIONS,
    "qwen3_vl_moe_text": _SECTIONS, "qwen3_omni_moe_text": _SECTIONS, "glm4v_moe_text": _HALF_SECTIONS,
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], **_SECTIONS},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] * 3},
    "hunyuan_vl_text": {
        "rope_parameters": {
            "rope_type": "xdrope", "rope_theta": 1e4, "xdrope_section": [2, 2, 2], "alpha": 1.0, "factor": 1.0,
        }
    },
    "mllama_text_model": {"cross_attention_layers": []},
    "paddleocr_vl_text": _SECTIONS,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_hidden_layers": 10, "num_kv_shared_layers": 5, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 10,
        "intermediate_size": [64] * 10, "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 2,
    },
    "git": {
        "vision_config": {
            "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
            "image_size": 16, "patch_size": 8,
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 7},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97, "concat_input": False},
    "stablelm": {"partial_rotary_factor": 0.5},
    "xmod": {"default_language": "en_XX"},
    "fsmt": {"langs": ["a", "b"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "num_beams": 1},
    "t5": {"decoder_start_token_id": 0},
    "prophetnet": {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "whisper": {"num_mel_bins": 8, "max_source_positions": 10},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64},
}  # fmt: skip


def fields_of(family: str) -> dict[str, Any]:
    """The small sizes that its config has a field for; where a field is a list, its own default stays."""
    given = CONFIG_MAPPING[family]().to_dict()
    kept = {k: v for k, v in SMALL.items() if k in given and not isinstance(given[k], (list, dict))}
    if family.endswith("_text") and given.get("sliding_window") is None:
        kept.pop("sliding_window", None)  # a field that their attention does not read
    return kept | EXTRA.get(family, {})


def config_of(family: str, **changes: Any) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**(fields_of(family) | changes))


def made(make: Any, config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return make(config, dtype=torch.float32).eval()


def make_decoder(family: str) -> PreTrainedModel:
    return made(AutoModelForCausalLM.from_config, config_of(family))


def make_encoder_decoder(family: str) -> PreTrainedModel:
    classes = {
        "whisper": "WhisperForConditionalGeneration", "moonshine": "MoonshineForConditionalGeneration",
        "speech_to_text": "Speech2TextForConditionalGeneration", "t5_gemma_module": "T5GemmaForConditionalGeneration",
    }  # fmt: skip
    if family == "t5_gemma_module":
        named = transformers.T5GemmaModuleConfig().to_dict()
        part = {k: v for k, v in SMALL.items() if k in named}
        config = transformers.T5GemmaConfig(
            encoder=part, decoder=part, **{k: SMALL[k] for k in ("vocab_size", "pad_token_id", "bos_token_id")},
            eos_token_id=None,
        )  # fmt: skip
    else:
        config = config_of(family, is_decoder=False)
    if family in classes:
        return made(getattr(transformers, classes[family])._from_config, config)
    return made(AutoModelForSeq2SeqLM.from_config, config)


def make_two_berts() -> PreTrainedModel:
    parts = [config_of("bert", is_decoder=False) for _ in range(2)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return transformers.EncoderDecoderModel(config).eval()


def make_text(family: str) -> PreTrainedModel:
    """The decoder inside a multimodal model, without a head; no auto class names it."""
    config = config_of(family)
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    named = {type(config), type(config).__name__}
    found = [
        cls for name, cls in inspect.getmembers(module, inspect.isclass)
        if name.endswith("Model") and "Pre" not in name and issubclass(cls, PreTrainedModel)
        and (cls.config_class is type(config) or inspect.get_annotations(cls).get("config") in named)
    ]  # fmt: skip
    return made(min(found, key=lambda cls: len(cls.__name__))._from_config, config)


def encoder_inputs(family: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    if family == "moonshine":
        return {"input_values": torch.randn(2, 4000)}
    if family == "whisper":
        return {"input_features": torch.randn(2, 8, 20)}
    if family == "speech_to_text":
        return {"input_features": torch.randn(2, 40, 8)}
    ids = torch.randint(3, VOCABULARY, (2, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
