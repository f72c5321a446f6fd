"""Tiny random models that take more than text, or that no auto class makes, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from support_families import fields_of, made
from support_transformers import VOCABULARY
from transformers import PreTrainedModel

_CLASSES = {
    "chameleon": "ChameleonForConditionalGeneration", "csm": "CsmForConditionalGeneration",
    "evolla": "EvollaForProteinText2Text", "idefics": "IdeficsForVisionText2Text", "mistral4": "Mistral4ForCausalLM",
    "musicgen": "MusicgenForConditionalGeneration", "musicgen_decoder": "MusicgenForCausalLM",
    "phi4_multimodal": "Phi4MultimodalForCausalLM", "pop2piano": "Pop2PianoForConditionalGeneration",
}  # fmt: skip
_PLACEHOLDER = 9
_VISION = {
    "hidden_size": 48, "embed_dim": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
# What makes sound of codes.
_CODEC = {"codebook_size": 128, "hidden_size": 16, "num_filters": 4, "num_residual_layers": 1, "upsampling_ratios": [2]}
_NUM_CODEBOOKS = 4
_MUSICGEN_DECODER = {"num_codebooks": _NUM_CODEBOOKS}
# What a family needs beyond the small sizes.
_EXTRA: dict[str, dict[str, Any]] = {
    "chameleon": {
        "vocabulary_map": {"<image>": _PLACEHOLDER, "IMGIMGAZ": 10, "IMGIMGBZ": 11, "IMGIMGCZ": 12, "IMGIMGDZ": 13},
        "vq_config": {
            "embed_dim": 8, "num_embeddings": 4, "latent_channels": 8, "base_channels": 32, "resolution": 16,
            "channel_multiplier": [1, 1], "num_res_blocks": 1,
        },
    },
    "csm": {
        "num_codebooks": _NUM_CODEBOOKS, "text_vocab_size": VOCABULARY, "tie_codebooks_embeddings": False,
        "codebook_pad_token_id": 0, "codebook_eos_token_id": 1, "audio_token_id": 2, "audio_eos_token_id": 3,
        "codec_config": {
            **_CODEC, "model_type": "mimi", "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "head_dim": 8, "intermediate_size": 16, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8,
            "upsample_groups": 16,
        },
    },
    "evolla": {
        "protein_encoder_config": {**_VISION, "vocab_size": 40}, "aligner_num_add_layers": 3, "resampler_depth": 1,
        "resampler_dim_head": 8, "resampler_heads": 2, "resampler_num_latents": 5,
    },
    "idefics": {"vision_config": _VISION, "alpha_initializer": "ones"},  # with zeros no picture is looked at
    "mistral4": {
        "num_key_value_heads": 4, "head_dim": 8,  # here head_dim is what is rotated
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
    "musicgen_decoder": _MUSICGEN_DECODER,
    "phi4_multimodal": {
        "vision_config": {**_VISION, "crop_size": 16},
        "audio_config": {
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "input_size": 8,
            "nemo_conv_channels": 16, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16,
        },
    },
    "pop2piano": {"composer_vocab_size": 1, "decoder_start_token_id": 0, "initializer_factor": 3.0},
}  # fmt: skip


def make_multimodal(family: str) -> PreTrainedModel:
    kind = getattr(transformers, _CLASSES[family])
    model = made(kind._from_config, kind.config_class(**_fields(family)))
    if family == "pop2piano":
        model.generation_config.composer_to_feature_token = {"composer1": 0}
    if family.startswith("musicgen"):  # what their own generate() takes from there without a look whether it is set
        model.generation_config.update(decoder_start_token_id=0, num_return_sequences=1)
    return model


def _fields(family: str) -> dict[str, Any]:
    if family == "musicgen":
        # 50 frames a second of 10 bits a code: 4 codes a frame.
        rates = {"sampling_rate": 100, "target_bandwidths": [2.0], "codebook_dim": 16, "num_lstm_layers": 1}
        return {
            "text_encoder": {**fields_of("t5"), "model_type": "t5", "is_decoder": False},
            "audio_encoder": {**_CODEC, **rates, "model_type": "encodec"},
            "decoder": fields_of("musicgen_decoder") | _MUSICGEN_DECODER,
        }
    fields = fields_of(family) | _EXTRA[family]
    if family == "csm":
        second = {"num_codebooks": _NUM_CODEBOOKS, "backbone_hidden_size": fields["hidden_size"]}
        fields["depth_decoder_config"] = fields_of("csm_depth_decoder_model") | second
    return fields


def multimodal_inputs(family: str) -> dict[str, torch.Tensor]:
    """Two prompts, longer than sliding windows, and what the model looks at beside them."""
    torch.manual_seed(6)
    ids = torch.randint(20, VOCABULARY, (2, 20))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    match family:
        case "chameleon":
            ids[:, 2:6] = _PLACEHOLDER  # a picture is four codes
            return {**text, "pixel_values": torch.randn(2, 3, 4, 4)}
        case "evolla":
            protein = torch.randint(5, 40, (2, 7))
            return {**text, "protein_input_ids": protein, "protein_attention_mask": torch.ones_like(protein)}
        case "idefics":
            seen = torch.ones(2, 20, 1, dtype=torch.long)
            return {**text, "pixel_values": torch.randn(2, 1, 3, 16, 16), "image_attention_mask": seen}
        case "musicgen_decoder":
            return {"input_ids": ids.repeat(_NUM_CODEBOOKS, 1)}
        case "pop2piano":
            return {"input_features": torch.randn(2, 12, 48)}
    return text
