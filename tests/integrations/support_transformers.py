"""Tiny random models of four families, and KVMemCache and DynamicCache over them.

Weights, prompts and sampling have fixed seeds, here and in the modules beside: which drafts are rejected, which beams
end and which windows are passed follows from them, and tests assert that each of it occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kvmem

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")

from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kvmem.integrations.transformers import KVMemCache, KVMemEncoderDecoderCache

BACKENDS = ["virtual", "paged"]
VOCABULARY = 97
NEW_TOKENS = 24  # with 17 of prompt: several blocks, several pages, and far past the sliding window
# No model may stop early, so every mode compares the same number of tokens, and none may repeat one token for ever, as
# random models with tied embeddings do.
IDS = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# Scores may differ in the last bits, as attention reads memory with other strides.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are tiny: several threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_llama(dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, max_position_embeddings=512, **IDS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def make_gemma() -> Gemma3ForCausalLM:
    """Three sliding layers, then a full one; the window is shorter than the prompt."""
    torch.manual_seed(1)
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=1,
        head_dim=16, sliding_window=11, layer_types=kinds, initializer_range=0.2, max_position_embeddings=512, **IDS,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def make_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(2)
    config = T5Config(
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=3,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=3.0,
        **IDS,
    )
    return T5ForConditionalGeneration(config).eval()


def make_bart() -> BartForConditionalGeneration:
    torch.manual_seed(3)
    config = BartConfig(
        d_model=48, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256, decoder_start_token_id=2,
        forced_eos_token_id=None, init_std=0.3, **IDS,
    )  # fmt: skip
    return BartForConditionalGeneration(config).eval()


MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": make_llama,
    "gemma3": make_gemma,
    "t5": make_t5,
    "bart": make_bart,
}
_models: dict[str, PreTrainedModel] = {}


def model_of(name: str) -> PreTrainedModel:
    if name not in _models:
        _models[name] = MAKERS[name]()
    return _models[name]


def prompts(rows: int = 3, length: int = 17, pad: int = 0) -> dict[str, torch.Tensor]:
    """A batch of random prompts; row i is padded on the left by ``i * pad`` tokens."""
    torch.manual_seed(rows + length)
    ids = torch.randint(3, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        ids[row, : row * pad] = 0
        mask[row, : row * pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def open_cache(model: PreTrainedModel, backend: str, **options: Any) -> KVMemCache | KVMemEncoderDecoderCache:
    """Pages and blocks far smaller than a prompt, and ``check()`` after every call."""
    kind = KVMemEncoderDecoderCache if model.config.is_encoder_decoder else KVMemCache
    sizes = {"memory": "16MiB", "max_batch": 12, "max_tokens": 96, "page_bytes": 4096, "debug": True}
    return kind(model, backend=backend, **(sizes | options))


def dynamic_cache(model: PreTrainedModel) -> DynamicCache | EncoderDecoderCache:
    if model.config.is_encoder_decoder:
        # Not from the config: for T5 that counts the encoder's layers.
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=model.config)


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any, **mode: Any) -> Any:
    torch.manual_seed(11)  # for sampling: both caches draw the same numbers
    return model.generate(
        **inputs, past_key_values=cache, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_scores=True,
        **mode,
    )  # fmt: skip


def assert_same(got: Any, expected: Any) -> None:
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert len(got.scores) == len(expected.scores)
    for step, (a, b) in enumerate(zip(got.scores, expected.scores, strict=True)):
        torch.testing.assert_close(a, b, msg=lambda m, step=step: f"step {step}: {m}", **CLOSE)


def assert_freed(alloc: kvmem.Allocator) -> None:
    stats = alloc.stats()
    assert alloc.check() == []
    assert (stats.used_bytes, stats.shared_bytes, stats.num_sequences) == (0, 0, 0)
