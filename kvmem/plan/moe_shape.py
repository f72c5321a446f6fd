"""The sizes of a mixture-of-experts decoder, as module batching counts them. A dense model has one expert."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from kvmem.arguments import brief, check_bool, check_size
from kvmem.errors import SpecError
from kvmem.spec.dtypes import dtype_name, parse_dtype

__all__ = ["ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """A decoder whose layers are attention, a router and ``num_experts`` gated MLPs, of which each token takes
    ``experts_per_token`` (Mixtral).

    hidden: width of the residual stream. expert_hidden: width inside an expert. dtype: of weights and activations.
    tied: the output matrix is the embedding. Norms and biases, which are some thousandths, are not counted.
    """

    num_layers: int
    hidden: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    vocab: int
    dtype: torch.dtype | str = torch.bfloat16
    tied: bool = False

    def __post_init__(self) -> None:
        for field in fields(self)[:9]:
            check_size(field.name, getattr(self, field.name))
        object.__setattr__(self, "dtype", parse_dtype(self.dtype))
        check_bool("tied", self.tied)
        if self.num_query_heads % self.num_kv_heads:
            raise SpecError(
                f"num_query_heads: got {self.num_query_heads}; must be a multiple of the {self.num_kv_heads} KV heads"
            )
        if self.experts_per_token > self.num_experts:
            raise SpecError(f"experts_per_token: got {self.experts_per_token}; there are {self.num_experts} experts")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, dtype: torch.dtype | str = torch.bfloat16) -> ModelShape:
        """The shape of a ``config.json`` of Mixtral's family, as a mapping; ``SpecError`` names what is missing."""
        names = {
            "num_layers": "num_hidden_layers", "hidden": "hidden_size", "num_query_heads": "num_attention_heads",
            "num_kv_heads": "num_key_value_heads", "num_experts": "num_local_experts", "vocab": "vocab_size",
            "experts_per_token": "num_experts_per_tok", "expert_hidden": "intermediate_size",
        }  # fmt: skip
        missing = [name for name in names.values() if not isinstance(config, Mapping) or config.get(name) is None]
        if missing:
            raise SpecError(f"config: {', '.join(missing)} missing from {brief(config)}; give a ModelShape by hand")
        sizes = {field: config[name] for field, name in names.items()}
        heads = check_size("num_attention_heads", sizes["num_query_heads"])
        head_dim = config.get("head_dim") or check_size("hidden_size", sizes["hidden"]) // heads
        return cls(**sizes, head_dim=head_dim, dtype=dtype, tied=bool(config.get("tie_word_embeddings", False)))

    @cached_property
    def element_bytes(self) -> int:
        return parse_dtype(self.dtype).itemsize

    @cached_property
    def dtype_name(self) -> str:
        return dtype_name(parse_dtype(self.dtype))

    @cached_property
    def query_width(self) -> int:
        return self.num_query_heads * self.head_dim

    @cached_property
    def qkv_width(self) -> int:
        return (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim

    @cached_property
    def dense_bytes(self) -> int:
        """What every token of a layer needs: the projections of attention, and the router."""
        return self.element_bytes * self.hidden * (self.qkv_width + self.query_width + self.num_experts)

    @cached_property
    def expert_bytes(self) -> int:
        """One expert of one layer: gate, up and down."""
        return self.element_bytes * 3 * self.hidden * self.expert_hidden

    @cached_property
    def layer_bytes(self) -> int:
        return self.dense_bytes + self.num_experts * self.expert_bytes

    @cached_property
    def vocabulary_bytes(self) -> int:
        """Embedding and output matrix."""
        return self.element_bytes * self.vocab * self.hidden * (1 if self.tied else 2)
