"""Every kernel that kvmem's caches are read and written with, unchanged: one entry each. Tests and benchmarks read it.

A new kernel is one adapter file and one entry here.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import torch

from kvmem.allocator import Allocator
from kvmem.errors import SpecError
from kvmem.kernels import (
    flash_attention,
    flash_attention_4,
    flashinfer,
    flashinfer_mla,
    openvino,
    reference,
    torch_ops,
    vllm_cpu,
    write,
)
from kvmem.kernels.base import HALVES, Kernel, Run, Step

__all__ = ["KERNELS", "Kernel", "Run", "Step", "check_guard", "find"]

_BF16_OR_8_BITS = (torch.bfloat16, torch.float8_e4m3fn)

#: Guards: FlashAttention 2 (torch's copy too) and FlashInfer's paged kernels, fa2 and fa3 alike, fetch each token under
#: a predicate of the real length. FlashAttention 3 and 4 and FlashInfer's ragged fa3 load tiles of 64 to 224 tokens
#: through the TMA unit, whose descriptor knows the tensor but not the length, and compute 0 * V there: NaN if V is not
#: finite (Dao-AILab/flash-attention #1745, #2374).
KERNELS: Final[tuple[Kernel, ...]] = (
    Kernel("flashinfer prefill fa3", "flashinfer", "flashinfer", partial(flashinfer.prepare_prefill, backend="fa3")),
    Kernel("flashinfer ragged fa3", "flashinfer", "flashinfer", partial(flashinfer.prepare_ragged, backend="fa3"),
           guard_tokens=256, contiguous=True, pads=False),
    Kernel("flashinfer prefill fa2", "flashinfer", "flashinfer", flashinfer.prepare_prefill),
    Kernel("flashinfer ragged fa2", "flashinfer", "flashinfer", flashinfer.prepare_ragged, contiguous=True, pads=False),
    Kernel("flashinfer BatchAttention", "flashinfer", "flashinfer", flashinfer.prepare_batch_attention, windows=False),
    Kernel("flashinfer MLA", "flashinfer_mla", "flashinfer.mla", flashinfer_mla.prepare_mla, kind="mla", windows=False),
    Kernel("flashinfer decode", "flashinfer", "flashinfer", flashinfer.prepare_decode, queries="one"),
    Kernel("flashinfer decode, tensor cores", "flashinfer", "flashinfer",
           partial(flashinfer.prepare_decode, tensor_cores=True), queries="one"),
    Kernel("flashinfer cascade", "flashinfer", "flashinfer", flashinfer.prepare_cascade, kind="shared", windows=False),
    Kernel("flashinfer append", "flashinfer", "flashinfer", flashinfer.prepare_append, kind="write"),
    Kernel("torch flash, rows", "torch_ops", "torch", torch_ops.prepare_attention, contiguous=True),
    Kernel("torch flash, blocks", "torch_ops", "torch", torch_ops.prepare_attention, block_multiple=256),
    Kernel("fa3-fwd, rows", "flash_attention", "fa3_fwd_interface",
           partial(flash_attention.prepare_fa3, form="rows", built_without=True), guard_tokens=256, reads="rows",
           contiguous=True, dtypes=_BF16_OR_8_BITS, windows=False),
    Kernel("fa3-fwd, varlen", "flash_attention", "fa3_fwd_interface", flash_attention.prepare_fa3_varlen,
           guard_tokens=256, contiguous=True, dtypes=_BF16_OR_8_BITS, windows=False),
    Kernel("FlashAttention 3, blocks", "flash_attention", "flash_attn_interface", flash_attention.prepare_fa3,
           guard_tokens=256),
    Kernel("FlashAttention 3, varlen", "flash_attention", "flash_attn_interface", flash_attention.prepare_fa3_varlen,
           guard_tokens=256, contiguous=True),
    Kernel("FlashAttention 4, rows", "flash_attention_4", "flash_attn.cute",
           partial(flash_attention_4.prepare_fa4, form="rows"), guard_tokens=256, contiguous=True),
    Kernel("FlashAttention 4, blocks", "flash_attention_4", "flash_attn.cute", flash_attention_4.prepare_fa4,
           guard_tokens=256),
    Kernel("FlashAttention 2, rows", "flash_attention", "flash_attn", partial(flash_attention.prepare_fa2, form="rows"),
           reads="rows", contiguous=True, queries="equal", pads=False),
    Kernel("FlashAttention 2, blocks", "flash_attention", "flash_attn", flash_attention.prepare_fa2,
           block_multiple=256, queries="equal", pads=False),
    Kernel("FlashAttention 2, varlen", "flash_attention", "flash_attn", flash_attention.prepare_fa2_varlen,
           block_multiple=256),
    Kernel("kvmem sdpa", "reference", "kvmem.kernels.reference", reference.prepare_sdpa, dtypes=()),
    Kernel("vLLM CPU", "vllm_cpu", "vllm", vllm_cpu.prepare_attention, reads="heads", block_multiple=16,
           dtypes=(torch.float32, *HALVES)),
    Kernel("vLLM CPU write", "vllm_cpu", "vllm", vllm_cpu.prepare_write, kind="write", reads="heads", block_multiple=16,
           dtypes=(torch.float32, *HALVES)),
    Kernel("OpenVINO", "openvino", "openvino", openvino.prepare_attention, reads="heads", block_multiple=32,
           dtypes=(torch.float32,), pads=False),
    Kernel("kvmem write_kv", "write", "kvmem.kernels.write", write.prepare_write, kind="write", dtypes=()),
)  # fmt: skip


def find(name: str) -> Kernel:
    """The kernel of that name; ``SpecError``, with the names that there are, for any other."""
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise SpecError(f"kernel: got {name!r}; must be one of {', '.join(kernel.name for kernel in KERNELS)}")


def check_guard(alloc: Allocator, kernel: str) -> None:
    """``SpecError`` unless what ``kernel`` may touch past a sequence's end is mapped and finite.

    kernel: a name of ``KERNELS``. Call it once, at start. On the CPU nothing depends on it.
    """
    guard = find(kernel).guard_tokens
    if alloc.tail_guard_tokens < guard:
        raise SpecError(
            f"{kernel} loads whole tiles and masks afterwards, up to {guard} tokens past a sequence's end; the "
            f"allocator keeps {alloc.tail_guard_tokens}: make it with tail_guard_tokens={guard}"
        )
