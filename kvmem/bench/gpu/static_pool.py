"""A static pool, as an engine without an allocator has it: every sequence owns its longest length from the start.

Block tables never change; a step adds one to the lengths and uploads what the kernel's plan and the write need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvmem.bench.gpu.sizes import ModelShape

__all__ = ["StaticPool", "StaticTables"]

Int32s = npt.NDArray[np.int32]


class StaticTables:
    """The fields of `GroupBatch` that kernels read in decode, one new token a sequence. Addresses never change."""

    rows = row_starts = row_starts_cpu = None
    drops_tokens = False
    max_seqlen_q = 1

    def __init__(self, model: ModelShape, device: torch.device, sequences: int, tokens: int) -> None:
        self.block_size, self.num_rows, self.num_new_tokens = model.block_size, sequences, sequences
        self._width = -(-tokens // model.block_size)
        pin = device.type == "cuda"
        self._host = {
            "seq_lens": torch.zeros(sequences, dtype=torch.int32, pin_memory=pin),
            "kv_indptr": torch.zeros(sequences + 1, dtype=torch.int32, pin_memory=pin),
            "kv_last_page_len": torch.ones(sequences, dtype=torch.int32, pin_memory=pin),
            "kv_indices": torch.zeros(sequences * self._width, dtype=torch.int32, pin_memory=pin),
            "slot_mapping": torch.zeros(sequences, dtype=torch.int64, pin_memory=pin),
        }
        self._device = {name: host.to(device) for name, host in self._host.items()}
        self._on_gpu = device.type == "cuda"
        self._uploaded = torch.cuda.Event() if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._first_block = np.arange(sequences, dtype=np.int64) * self._width
        self._table = (self._first_block[:, None] + np.arange(self._width)).astype(np.int32)
        self._column = np.arange(self._width)
        self.block_table = torch.from_numpy(self._table).to(device)
        self.cu_seqlens_q_cpu = torch.arange(sequences + 1, dtype=torch.int32)
        self.first_tokens_cpu = torch.zeros(sequences, dtype=torch.int32)
        self._indices = 0

    @property
    def max_blocks(self) -> int:
        return len(self._table) * self._width

    def check_current(self) -> None:
        """Nothing: a static pool never hands a sequence's blocks on."""

    def fill(self, lengths: Int32s) -> None:
        """``lengths``: of each sequence, this step's token included."""
        if self._uploaded is not None:
            self._uploaded.synchronize()
        host = {name: tensor.numpy() for name, tensor in self._host.items()}
        blocks = -(-lengths // self.block_size)
        host["seq_lens"][:] = lengths
        np.cumsum(blocks, out=host["kv_indptr"][1:])
        host["kv_last_page_len"][:] = lengths - (blocks - 1) * self.block_size
        host["slot_mapping"][:] = self._first_block * self.block_size + lengths - 1
        self._indices = int(host["kv_indptr"][-1])
        host["kv_indices"][: self._indices] = self._table[self._column < blocks[:, None]]
        if self._uploaded is not None:
            for name, tensor in self._host.items():
                used = self._indices if name == "kv_indices" else len(tensor)
                self._device[name][:used].copy_(tensor[:used], non_blocking=True)
            self._uploaded.record()

    def __getattr__(self, name: str) -> Any:
        field, cpu = (name[:-4], True) if name.endswith("_cpu") else (name, False)
        if field not in self.__dict__.get("_host", {}):
            raise AttributeError(name)
        tensor = self._host[field] if cpu or not self._on_gpu else self._device[field]
        return tensor[: self._indices] if field == "kv_indices" else tensor


@dataclass
class StaticPool:
    """``caches``: K and V ``[blocks, block_size, heads, width]`` of each layer."""

    tables: StaticTables
    caches: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def of(cls, model: ModelShape, device: torch.device, sequences: int, tokens: int) -> StaticPool:
        tables = StaticTables(model, device, sequences, tokens)
        shape = (2, tables.max_blocks, model.block_size, model.kv_heads, model.head_dim)
        caches = []
        for _ in range(model.layers):
            k, v = torch.zeros(shape, dtype=model.dtype, device=device)
            caches.append((k, v))
        return cls(tables, caches)
