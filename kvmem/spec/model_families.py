"""How model families differ in what they cache, as data: field names, defaults, rotation, unsupported features.

``kvmem.spec.from_config`` reads it, and ``kvmem.layouts.rope`` the families without rotation. A family that uses the
usual field names needs no entry.
"""

from __future__ import annotations

from typing import Any, Final

# The names that families give to one number. Errors name the first.
HIDDEN: Final = ("hidden_size", "n_embd", "d_model", "n_embed")
LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KV_HEADS: Final = (
    "num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads", "num_query_groups", "multi_query_group_num",
)  # fmt: skip
HEAD_DIM: Final = ("head_dim", "d_kv", "kv_channels", "dim_head")
# Encoder-decoder families use the usual names for the encoder (Whisper: num_hidden_layers), even in a config of the
# decoder alone. So the decoder's names are looked up first.
DECODER_LAYERS: Final = ("num_decoder_layers", "decoder_layers", "decoder_num_hidden_layers")
DECODER_HEADS: Final = (
    "num_decoder_attention_heads", "decoder_attention_heads", "decoder_num_attention_heads",
)  # fmt: skip
DECODER_KV_HEADS: Final = ("decoder_num_key_value_heads",)
# The parts of multimodal configs that describe the decoder; and those of encoder-decoders composed of two models.
TEXT: Final = ("text_config", "llm_config", "language_config", "thinker_config")
DECODER: Final = ("decoder", "decoder_config")

# Encoders cache nothing between steps, unless a config turns one into a decoder.
ENCODERS: Final = frozenset(
    {
        "bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "electra",
        "rembert", "ernie", "megatron-bert", "xmod", "roc_bert", "roformer", "data2vec-text", "bert-generation",
        "big_bird", "albert", "distilbert", "deberta", "deberta-v2", "modernbert", "mpnet", "nomic_bert",
    }
)  # fmt: skip
# These families store keys as projected (learned, relative or ALiBi positions). All others store rotated keys.
NO_ROPE: Final = frozenset(
    {
        "gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "ctrl", "opt", "bloom", "mpt", "biogpt", "xglm", "git",
        "t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "pegasus", "marian",
        "blenderbot", "blenderbot-small", "whisper", "speech_to_text", "m2m_100", "nllb-moe", "plbart", "mvp",
        "prophetnet", "bigbird_pegasus", "cpmant", "musicgen_decoder", "pop2piano",
    }
) | (ENCODERS - {"roformer", "modernbert", "nomic_bert"})  # fmt: skip
UNROTATED: Final = ("absolute", "relative_key", "relative_key_query", "alibi", "nope")  # position_embedding_type
ROPE_ON_SLIDING_ONLY: Final = frozenset({"cohere2", "exaone4"})  # their full layers have no position encoding
# Families in which sliding_window, with nothing else stated, applies to all layers; "" is a config without a family.
ALL_SLIDE: Final = frozenset(
    {"", "doge", "ministral3", "mistral", "mixtral", "phi3", "phi3small", "phi4_multimodal", "phimoe", "starcoder2"}
)
SLIDE_FROM_LAYER: Final = frozenset(
    {"qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3", "dots1"}
)

# The defaults of each family's config class, for fields that its files may leave out.
DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "deepseek_v2": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "deepseek_v3": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
    "falcon": {"multi_query": True},
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3_text": {"head_dim": 256, "num_key_value_heads": 4, "sliding_window": 4096, "sliding_window_pattern": 6},
    "gemma3n_text": {
        "head_dim": 256, "num_key_value_heads": 2, "sliding_window": 512, "sliding_window_pattern": 5,
        "num_kv_shared_layers": 15,
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128, "sliding_window_pattern": 2},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 28},
    "qwen3": {"head_dim": 128, "use_sliding_window": False, "max_window_layers": 28},
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False},
    "starcoder2": {"num_key_value_heads": 2},
    "t5": {"d_kv": 64},
    "mt5": {"d_kv": 64},
    "umt5": {"d_kv": 64},
}  # fmt: skip
# The same for a text_config only, where files leave out all fields that equal the class default (LLaVA-1.5: all sizes).
NESTED_DEFAULTS: Final[dict[str, dict[str, int]]] = {
    "llama": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32},
    "mistral": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32},
    "gemma": {"num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 16},
    "gemma2": {"num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8},
    "gemma3_text": {"num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8},
    "gemma3n_text": {"num_hidden_layers": 35, "hidden_size": 2048, "num_attention_heads": 8},
    "qwen2": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32},
    "qwen3": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32},
}

_STATE: Final = "its recurrent layers keep a state whose size and dtype the kernels decide"
_INDEX: Final = "its sparse attention caches index keys beside the KV, whose dtype the kernels decide"
_UNEQUAL: Final = "its sliding layers differ in shape from the full ones in fields that only this family has"
# Fields that, when set, mean that the usual fields do not describe the cache. A trailing * matches any ending.
REFUSED_FIELDS: Final[tuple[tuple[str, str], ...]] = (
    ("mamba_*", _STATE), ("ssm_*", _STATE), ("state_size", _STATE), ("linear_*", _STATE), ("conv_L_cache", _STATE),
    ("short_conv*", _STATE), ("block_types", _STATE), ("layers_block_type", _STATE),
    ("hybrid_override_pattern", _STATE), ("attn_layer_*", _STATE), ("rescale_every", _STATE),
    ("chunkwise_kernel", _STATE),
    ("index_*", _INDEX), ("indexer_*", _INDEX), ("compress_*", _INDEX),
    ("swa_*", _UNEQUAL), ("global_head_dim", _UNEQUAL), ("num_global_key_value_heads", _UNEQUAL),
    ("attention_k_eq_v", _UNEQUAL),
    ("per_layer_config", "it overrides shapes layer by layer"),
    ("block_configs", "it overrides shapes layer by layer"),
    ("num_attention_heads_per_layer", "it has its own number of heads in each layer"),
    ("attention_chunk_size", "chunked attention drops all tokens at the end of a chunk, unlike a sliding window"),
    ("use_cla", "it shares KV between layers by a rule of its own"),
    ("cla_share_factor", "it shares KV between layers by a rule of its own"),
    ("attn_layers", "hashed attention caches buckets, not KV"),
    ("mem_len", "it caches hidden states of segments, not KV"),
)  # fmt: skip
REFUSED_FAMILIES: Final[dict[str, str]] = {
    "mimo_v2_flash": "its sliding layers have more KV heads than its full ones, which its config does not state",
    "longcat_flash": "each of its layers holds two attentions, which its config does not state",
}
BY_HAND: Final = "build the CacheSpec by hand from Components (growth='fixed' for a state)"
