"""The values of ``model_type`` whose configs are supported. Each was compared with what its model caches.

``tests/integrations/test_transformers_families.py`` builds a tiny model of each, except of those in ``UNTRIED``. A
family is added here once it passes that test.
"""

from __future__ import annotations

from typing import Final

__all__ = ["KNOWN", "UNTRIED"]

#: These are not in transformers, so there is no model to compare with; only their published configs were read.
UNTRIED: Final = frozenset({"chatglm", "internlm2", "phi3small"})

_DECODERS: Final = """
    afmoe apertus arcee aria_text axk1 beam bert bert-generation big_bird biogpt bitnet bloom camembert codegen cohere
    cohere2 cohere2_moe cpmant ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 diffllama doge dots1 electra ernie
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint gemma gemma2 gemma3_text gemma3n_text git glm glm4
    glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa
    granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
    internlm3 iquestcoder jais2 jetmoe kolibri1 llama megatron-bert mellum minicpm3 minimax_m2 ministral ministral3
    mistral mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2
    qwen2_moe qwen3 qwen3_moe rembert roberta roberta-prelayernorm roc_bert roformer seed_oss smollm3 solar_open
    stablelm starcoder2 trocr vaultgemma xglm xlm-roberta xlm-roberta-xl xmod youtu
"""
# The names that multimodal configs give to their decoder.
_TEXTS: Final = """
    blip_text_model cosmos3_edge_text csm_depth_decoder_model deepseek_ocr2_text emu3_text_model ernie4_5_vl_moe_text
    glm4v_moe_text glm4v_text glm_ocr_text granite4_vision_text granite_docling_text hunyuan_vl_text mllama_text_model
    molmo2_text muse_glimmer_text paddleocr_vl_text qwen2_5_omni_text qwen2_5_vl_text qwen2_vl_text qwen3_omni_moe_text
    qwen3_vl_moe_text qwen3_vl_text
"""
_ENCODER_DECODERS: Final = """
    bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart moonshine mt5 mvp nllb-moe
    pegasus pegasus_x plbart prophetnet seamless_m4t seamless_m4t_v2 speech_to_text switch_transformers t5
    t5_gemma_module umt5 whisper
"""
# Models with other inputs than text whose configs have the decoder's fields at the top level, or that no auto class
# builds.
_MULTIMODAL: Final = "chameleon csm evolla idefics mistral4 musicgen_decoder phi4_multimodal pop2piano"

KNOWN: Final = UNTRIED | frozenset(f"{_DECODERS} {_TEXTS} {_ENCODER_DECODERS} {_MULTIMODAL}".split())
