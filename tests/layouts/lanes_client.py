"""A transformers model whose attention runs over lanes, as a client would have it: K and V are in kvmem only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")

from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvmem.layouts.lanes import LaneCache, LaneSequence

__all__ = ["LaneModel", "greedy", "lane_cache"]


def lane_cache(model: PreTrainedModel, **options: Any) -> LaneCache:
    config = model.config
    return LaneCache(
        num_layers=config.num_hidden_layers, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        dtype=model.dtype, **{"max_sequences": 1, "device": "cpu", "memory": "64MiB", "max_tokens": 1024, **options},
    )  # fmt: skip


class LaneModel:
    """``model`` over the lanes of ``sequence``. attend: another attention of the same arguments, for references."""

    def __init__(self, model: PreTrainedModel, sequence: LaneSequence, attend: Callable[..., Any] | None = None) -> None:
        self.model, self.sequence, self.done = model, sequence, 0
        self.attend = attend or self._attend

    def _attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.sequence.append(layer, k, v)
        return self.sequence.attend(q, layer)[0]

    def __call__(self, ids: list[int]) -> torch.Tensor:
        """Return the logits ``[T, vocabulary]`` of the next tokens."""

        def attention(module: Any, q: Any, k: Any, v: Any, *_: object, **__: object) -> tuple[torch.Tensor, None]:
            return self.attend(module.layer_idx, *(x[0].transpose(0, 1) for x in (q, k, v))).unsqueeze(0), None

        before = self.model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS["kvmem_lanes"] = attention
        try:
            self.model.config._attn_implementation = "kvmem_lanes"
            at = torch.arange(self.done, self.done + len(ids)).unsqueeze(0)
            with torch.no_grad():
                logits = self.model(torch.tensor([ids]), position_ids=at, use_cache=False).logits[0]
        finally:
            self.model.config._attn_implementation = before
            del ALL_ATTENTION_FUNCTIONS["kvmem_lanes"]
        self.done += len(ids)
        return logits


def greedy(model: Callable[[list[int]], torch.Tensor], logits: torch.Tensor, steps: int) -> list[int]:
    """Return the tokens that follow, the first from ``logits``."""
    tokens = [int(logits[-1].argmax())]
    for _ in range(steps - 1):
        tokens.append(int(model(tokens[-1:])[-1].argmax()))
    return tokens
