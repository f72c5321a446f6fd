"""A small allocator of which a page is a block, and prompts made of whole blocks, for the tests of SchedulerCache."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvmem import Allocator, CacheSpec

SIZE = 32  # tokens of a block, and of a page
CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 1}  # fmt: skip


def open_allocator(backend: str, *, blocks: int = 64, **options: Any) -> Allocator:
    """A page is a block; so memory is counted in blocks."""
    spec = CacheSpec.from_config(CONFIG, dtype="bfloat16", block_size=SIZE)
    given = {"device": "meta", "page_bytes": 4096, "max_sequences": 8, "max_tokens": 32 * SIZE} | options
    return Allocator(spec, backend=backend, memory=(blocks + 2) * 4096, **given)  # type: ignore[arg-type]


def prompt(*runs: int) -> np.ndarray:
    """Runs of a block each, by number."""
    return np.concatenate([np.arange(SIZE, dtype=np.int32) + 1000 * run for run in runs])
