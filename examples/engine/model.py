"""A model of transformers over the flat tokens of a step: prompts, chunks of prompts and single tokens side by side.

transformers computes everything but attention, for which it calls ``_attend``. That writes K and V where the batch says,
and attends over the cache as it lies (``csrc/attend``). Padding does not exist.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer

import kvmem

from kvmem.bench.language_models import load_language_model
from kvmem.kernels import cpu
from kvmem.kernels.write import write_kv

__all__ = ["Runner", "byte_tokenizer", "cache_spec", "load"]

_ATTENTION = "kvmem_flat"


def load(name: str) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer. name: ``"smollm2"``, ``"tiny"`` (random), or a folder that transformers reads."""
    if name in ("smollm2", "tiny"):
        found = load_language_model(name)
        return found.model, found.tokenizer or byte_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(name, local_files_only=True)


def byte_tokenizer() -> Any:
    """For models that know no text: each byte is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.BPE({text: n for n, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=found, chat_template=template)


def cache_spec(model: Any, block_size: int = 16) -> kvmem.CacheSpec:
    """``SpecError`` for a model that this engine cannot run: sliding windows, states, unlike layers."""
    spec = kvmem.CacheSpec.from_config(model.config, dtype=model.dtype, block_size=block_size)
    if len(spec.groups) > 1 or spec.groups[0].window_tokens is not None:
        raise kvmem.SpecError(f"{model.config.model_type}: this engine runs models with full attention in all layers")
    return spec


class Runner:
    """One forward pass. model: a causal language model of transformers, on the CPU; its attention is replaced."""

    def __init__(self, model: Any, allocator: kvmem.Allocator, *, max_rows: int, max_tokens: int) -> None:
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
        model.set_attn_implementation(_ATTENTION)
        self.model, self._allocator = model, allocator
        self._batch = allocator.make_batch(max_sequences=max_rows, max_new_tokens=max_tokens)
        self._run: Any = None

    @torch.inference_mode()
    def __call__(self, handles: npt.NDArray[np.int32], tokens: list[int], rows: list[int]) -> torch.Tensor:
        """Logits ``[len(rows), vocab]`` behind the last token of each of ``rows``.

        handles: the sequences, which have room for the tokens; K and V of these are in the cache afterwards. tokens:
        of one sequence after the other.
        """
        self._allocator.fill(handles, self._batch)
        self._run = None
        last = self._batch.cu_seqlens_q[1:].long()[rows] - 1
        ids, positions = torch.tensor([tokens]), self._batch.positions.long()[None]
        found = self.model(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=last, runner=self
        )  # fmt: skip
        logits: torch.Tensor = found.logits[0]
        return logits

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        """q, and the result: ``[T, heads, width]``. The work is divided once, for all layers."""
        cache = self._allocator.kv(layer)
        write_kv(cache, self._batch, k, v)
        if self._run is None:
            self._run = cpu.plan(
                self._batch, num_query_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2], dtype=q.dtype,
                value_dim=v.shape[2], scale=scale, return_lse=False,
            )  # fmt: skip
        out: torch.Tensor = self._run(q, cache)[0]
        return out


def _attend(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: None, *, runner: Runner,
    scaling: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As transformers calls it: ``[1, heads, T, width]`` in, ``[1, T, heads, width]`` out."""
    flat = (x[0].transpose(0, 1) for x in (q, k, v))
    return runner.attend(module.layer_idx, *flat, scaling)[None], None
