"""The buffers of a batch's fields, on the host and on the device."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["FIELDS", "PER_ROW", "RowFields"]

# name -> (dtype, shape in terms of B rows, T new tokens, M blocks of a sequence, N blocks in all)
FIELDS: Final = {
    "block_table": (torch.int32, "BM"),
    "seq_lens": (torch.int32, "B"),
    "first_tokens": (torch.int32, "B"),
    "slot_mapping": (torch.int64, "T"),
    "positions": (torch.int32, "T"),
    "batch_indices": (torch.int32, "T"),
    "cu_seqlens_q": (torch.int32, "B+1"),
    "cu_seqlens_k": (torch.int32, "B+1"),
    "kv_indptr": (torch.int32, "B+1"),
    "kv_indices": (torch.int32, "N"),
    "kv_last_page_len": (torch.int32, "B"),
    "rows": (torch.int32, "B"),
    "row_starts": (torch.int32, "B+1"),
}

PER_ROW: Final = ("B", "B+1")
#: Sections of a buffer begin at multiples of 16 int32, since kernels load 16 bytes at once.
_ALIGN = 16


class RowFields:
    """The fields with one entry for each row, in one buffer, so that a step uploads all of them with one copy."""

    def __init__(self, fields: dict[str, tuple[torch.dtype, int]], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        starts, total = {}, 0
        for name, (dtype, length) in fields.items():
            starts[name] = total
            total += -(-length * dtype.itemsize // 4 // _ALIGN) * _ALIGN
        self._host = torch.zeros(total, dtype=torch.int32, pin_memory=on_gpu)
        self._device = self._host.to(device) if on_gpu else self._host

        def sections(buffer: torch.Tensor) -> dict[str, torch.Tensor]:
            return {
                name: buffer[starts[name] : starts[name] + length * dtype.itemsize // 4].view(dtype)
                for name, (dtype, length) in fields.items()
            }

        self.host, self.device = sections(self._host), sections(self._device)

    def upload(self) -> None:
        """Copy the host's buffer to the device, on torch's current stream."""
        self._device.copy_(self._host, non_blocking=True)
