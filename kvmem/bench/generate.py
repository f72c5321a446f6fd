"""A real model generating over kvmem's memory, token for token what transformers' own cache generates."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GenerateResult"]


@dataclass(frozen=True)
class GenerateResult:
    """Greedy decoding of ``tokens`` new tokens with one kind of cache; ``same_tokens`` as with transformers'
    `DynamicCache`.
    """

    model: str
    cache: str
    tokens: int
    tokens_per_second: float
    same_tokens: bool
