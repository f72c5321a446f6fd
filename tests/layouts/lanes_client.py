"""A transformers model whose attention runs over lanes, as a client would have it: K and V are in kvmem only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")

from test_transformers_smollm2 import weights_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvmem.layouts.lanes import LaneCache

__all__ = ["LaneModel", "greedy", "lane_cache", "smollm2"]


@cache
def smollm2() -> PreTrainedModel:
    file = weights_file()
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True).eval()


def lane_cache(model: PreTrainedModel) -> LaneCache:
    sizes = {"num_layers": model.config.num_hidden_layers, "num_kv_heads": model.config.num_key_value_heads}
    sizes |= {"head_dim": model.config.head_dim, "max_sequences": 1, "max_tokens": 1100}
    return LaneCache(**sizes, dtype=model.dtype, device="cpu", memory="64MiB")


class LaneModel:
    """``model`` with ``attend(layer, q, k, v)``, each ``[T, heads, width]`` and rotated, as the attention."""

    def __init__(self, model: PreTrainedModel, attend: Callable[..., torch.Tensor]) -> None:
        self.model, self.attend, self.done = model, attend, 0

    def _attention(self, module: Any, q: Any, k: Any, v: Any, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        return self.attend(module.layer_idx, *(x[0].transpose(0, 1) for x in (q, k, v))).unsqueeze(0), None

    def __call__(self, ids: list[int]) -> torch.Tensor:
        """Return the logits ``[T, vocabulary]``."""
        before, ALL_ATTENTION_FUNCTIONS["lanes"] = self.model.config._attn_implementation, self._attention
        at = torch.arange(self.done, self.done + len(ids)).unsqueeze(0)
        self.done += len(ids)
        try:
            self.model.config._attn_implementation = "lanes"
            with torch.no_grad():
                return self.model(torch.tensor([ids]), position_ids=at, use_cache=False).logits[0]
        finally:
            self.model.config._attn_implementation = before


def greedy(model: Callable[[list[int]], torch.Tensor], logits: torch.Tensor, steps: int) -> list[int]:
    """Return the tokens that follow, the first from ``logits``."""
    tokens = [int(logits[-1].argmax())]
    for _ in range(steps - 1):
        tokens.append(int(model(tokens[-1:])[-1].argmax()))
    return tokens
