"""Kernels by name. Each is made ready for one memory and one batch, and is then called with queries and a layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch

from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.memory import Memory
from kvmem.bench.gpu.sizes import ModelShape
from kvmem.bench.text import BenchError
from kvmem.kernels import flash_attention, flashinfer, reference, torch_ops
from kvmem.kernels.checks import flat_tokens

__all__ = ["KERNELS", "Kernel", "Phase", "Run", "Unavailable", "kernels_of", "package_of", "plan_arguments",
           "workspace"]  # fmt: skip

Phase = Literal["decode", "prefill"]
Run = Callable[[torch.Tensor, int], torch.Tensor]
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


class Unavailable(BenchError):
    """A kernel that this machine does not have, or that cannot read this memory."""


@dataclass(frozen=True)
class Kernel:
    """prepare: takes a memory and the model, gives ``run(q, layer) -> [T, Hq, D]``. Raises `Unavailable` where the
    package is missing, `SpecError` where the kernel cannot read that memory.
    """

    name: str
    phase: Phase
    kind: str  # of device: "cuda" or "cpu"
    prepare: Callable[[Memory, ModelShape], Run]


def workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES if device.type == "cuda" else 16, dtype=torch.uint8, device=device)


def package_of(name: str = "flashinfer") -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed ({error})") from error


def plan_arguments(model: ModelShape) -> dict[str, Any]:
    return {
        "num_query_heads": model.query_heads, "num_kv_heads": model.kv_heads, "head_dim": model.head_dim,
        "dtype": model.dtype,
    }  # fmt: skip


def _flashinfer_decode(memory: Memory, model: ModelShape, tensor_cores: bool) -> Run:
    device, package = memory.caches[0][0].device, package_of()
    wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace(device), "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(**flashinfer.decode_plan(memory.batch, **plan_arguments(model)))
    return lambda q, layer: wrapper.run(q, flashinfer.cache_of(*memory.cache(layer)))


def _flashinfer_prefill(memory: Memory, model: ModelShape, version: Literal["fa2", "fa3"]) -> Run:
    device, package = memory.caches[0][0].device, package_of()
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace(device), "NHD", backend=version)
    with _prebuilt_only() if version == "fa3" else nullcontext():
        wrapper.plan(**flashinfer.prefill_plan(memory.batch, **plan_arguments(model)))
    return lambda q, layer: wrapper.run(q, flashinfer.cache_of(*memory.cache(layer)))


@contextmanager
def _prebuilt_only() -> Iterator[None]:
    """FlashInfer's fa3 takes minutes to compile, which this benchmark does not have: a prebuilt one, or none."""
    before = os.environ.get("FLASHINFER_DISABLE_JIT")
    os.environ["FLASHINFER_DISABLE_JIT"] = "1"
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "MissingJITCacheError":
            raise
        raise Unavailable("FlashInfer's fa3 module is not prebuilt, and compiling it takes minutes") from error
    finally:
        if before is None:
            del os.environ["FLASHINFER_DISABLE_JIT"]
        else:
            os.environ["FLASHINFER_DISABLE_JIT"] = before


def _torch_flash(memory: Memory, model: ModelShape) -> Run:
    """Rows through the operator itself: `torch_ops.attention` would also work on the lse, in every layer."""
    if memory.rows is None:
        return lambda q, layer: torch_ops.attention(q, memory.cache(layer), memory.batch)[0]
    args = torch_ops.flash_op_args(memory.batch)
    operator = torch.ops.aten._flash_attention_forward

    def run(q: torch.Tensor, layer: int) -> torch.Tensor:
        k, v = map(flat_tokens, memory.cache(layer))
        return operator(q, k, v, **args)[0]  # type: ignore[no-any-return]

    return run


def _fa3_fwd(memory: Memory, model: ModelShape) -> Run:
    package = package_of("fa3_fwd_interface")
    rows = memory.rows
    if rows is None:
        raise Unavailable("fa3-fwd was built without the paging that decode needs; it reads contiguous rows")
    args = flash_attention.fa3_fwd_args(memory.batch, dtype=model.dtype)

    def run(q: torch.Tensor, layer: int) -> torch.Tensor:
        out = package.flash_attn_with_kvcache(q, *rows[layer % len(rows)], **args)
        return out[0] if isinstance(out, (tuple, list)) else out  # type: ignore[no-any-return]

    return run


def _sdpa(memory: Memory, model: ModelShape) -> Run:
    return lambda q, layer: reference.sdpa(q, memory.cache(layer), memory.batch)


KERNELS = (
    Kernel("FlashInfer decode, CUDA cores", "decode", "cuda", partial(_flashinfer_decode, tensor_cores=False)),
    Kernel("FlashInfer decode, tensor cores", "decode", "cuda", partial(_flashinfer_decode, tensor_cores=True)),
    Kernel("torch flash", "decode", "cuda", _torch_flash),
    Kernel("fa3-fwd", "decode", "cuda", _fa3_fwd),
    Kernel("torch SDPA", "decode", "cpu", _sdpa),
    Kernel("FlashInfer prefill, fa2", "prefill", "cuda", partial(_flashinfer_prefill, version="fa2")),
    Kernel("FlashInfer prefill, fa3", "prefill", "cuda", partial(_flashinfer_prefill, version="fa3")),
    Kernel("torch flash", "prefill", "cuda", _torch_flash),
    Kernel("fa3-fwd", "prefill", "cuda", _fa3_fwd),
    Kernel("torch SDPA", "prefill", "cpu", _sdpa),
)


def kernels_of(device: BenchDevice, phase: Phase) -> list[Kernel]:
    return [kernel for kernel in KERNELS if (kernel.phase, kernel.kind) == (phase, device.kind)]
