"""How much is measured. `FULL` is for a GPU of 78 GiB or more and eight minutes, `TINY` for the tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from kvmem.spec import CacheSpec

_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """A decoder's cache. Default: Llama 3 8B, 128 KiB a token."""

    layers: int = 32
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16

    @property
    def layer_bytes(self) -> int:
        """Of one token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        return self.layers * self.layer_bytes

    @property
    def spec(self) -> CacheSpec:
        return CacheSpec.kv(
            num_layers=self.layers, num_kv_heads=self.kv_heads, head_dim=self.head_dim, dtype=self.dtype,
            block_size=self.block_size, num_query_heads=self.query_heads,
        )  # fmt: skip

    def with_layers(self, layers: int) -> ModelShape:
        return replace(self, layers=layers)


@dataclass(frozen=True)
class Sizes:
    """Cases are (sequences, tokens of each). ``page_bytes`` None is the device's default.

    memory_share: of the device's free memory, what the contenders of one case may take together.
    cold_bytes: static layers, which are read round and round, take at least so much: far more than an L2 cache holds.
    """

    model: ModelShape = field(default_factory=ModelShape)
    page_bytes: int | None = None
    memory_share: float = 0.88
    cold_bytes: int = 4 * _GIB
    copy_bytes: int = 2 * _GIB
    repetitions: int = 20
    vmm_pages: tuple[int, ...] = (2 * _MIB, 4 * _MIB, 8 * _MIB, 16 * _MIB, 32 * _MIB, 64 * _MIB)
    vmm_runs: tuple[int, ...] = (1, 4, 16, 64, 256)
    layout_cases: tuple[tuple[int, int], ...] = ((1, 131072), (64, 2048), (4, 32768))
    layout_interleaves: tuple[int, ...] = (1, 4)  # and all layers
    attention_cases: tuple[tuple[int, int], ...] = (
        (1, 131072), (64, 2048), (4, 32768), (256, 1024), (1, 8192), (16, 8192), (1, 1024), (16, 32768), (4, 131072),
    )  # fmt: skip
    prefill_tokens: int = 512
    prefill_layers: int = 4
    decode_sequences: int = 256
    decode_prompt: int = 1024
    decode_steps: int = 512
    decode_turn: int = 32
    map_ahead_tokens: int = 64  # the default on CUDA
    admit_prompts: tuple[int, ...] = (8192, 32768)
    admit_pages: tuple[int | None, ...] = (None, 16 * _MIB)
    admit_bytes: int = 40 * _GIB
    elastic_bytes: int = 24 * _GIB
    elastic_sequences: int = 64
    elastic_prompt: int = 1024
    elastic_chunk: int = 4096
    elastic_steps: int = 100
    prefetch_case: tuple[int, int] = (16, 1024)  # 64 MiB in a layer
    prefetch_budgets: tuple[int, ...] = (4 * _MIB, 8 * _MIB, 16 * _MIB, 24 * _MIB, 32 * _MIB, 48 * _MIB, 64 * _MIB)


FULL = Sizes()

TINY = Sizes(
    model=ModelShape(4, 4, 2, 16, torch.float32, 16), page_bytes=4 * 1024, cold_bytes=1 << 16, copy_bytes=1 << 22,
    repetitions=2, vmm_pages=(64 * 1024, 128 * 1024), vmm_runs=(1, 4), layout_cases=((2, 64),),
    layout_interleaves=(1, 2), attention_cases=((1, 100), (3, 40)), prefill_tokens=16, prefill_layers=2,
    decode_sequences=4, decode_prompt=40, decode_steps=12, decode_turn=4, map_ahead_tokens=4, admit_prompts=(256,),
    admit_pages=(64 * 1024,), admit_bytes=4 * _MIB, elastic_bytes=4 * _MIB, elastic_sequences=2, elastic_prompt=64,
    elastic_chunk=256, elastic_steps=4, prefetch_case=(3, 40), prefetch_budgets=(1000, 1 << 20),
)  # fmt: skip
