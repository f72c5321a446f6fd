"""Kernels by name. Each is prepared for one memory and one batch, then called with queries and a layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch

from kvmem.bench.gpu.device import BenchDevice
from kvmem.bench.gpu.memory import Memory
from kvmem.bench.gpu.sizes import ModelShape
from kvmem.bench.text import BenchError
from kvmem.kernels import registry

Phase = Literal["decode", "prefill"]
Run = Callable[[torch.Tensor, int], torch.Tensor]
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends


class Unavailable(BenchError):
    """A kernel that this machine does not have, or that cannot read this memory."""


@dataclass(frozen=True)
class Kernel:
    """``name``: in the reports; ``registered``: in `kvmem.kernels.registry`; ``kind``: of device, "cuda" or "cpu"."""

    name: str
    phase: Phase
    kind: str
    registered: str

    def prepare(self, memory: Memory, model: ModelShape) -> Run:
        """``run(q, layer) -> [T, Hq, D]``. Raises `Unavailable` where the package is missing, `SpecError` where the
        kernel cannot read that memory.
        """
        kernel = registry.find(self.registered)
        package = package_of(kernel.package)
        if kernel.contiguous and memory.rows is None:
            raise Unavailable(f"{self.registered} reads contiguous rows only")
        step = registry.Step(
            memory.batch, model.query_heads, model.kv_heads, model.head_dim, model.dtype, model.dtype, return_lse=False
        )
        with _prebuilt_only() if self.registered.endswith("fa3") else nullcontext():
            run = kernel.prepare(package, step)
        caches = memory.rows if kernel.reads == "rows" and memory.rows is not None else memory.caches
        return lambda q, layer: run(q, caches[layer % len(caches)])[0]


def workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(_WORKSPACE_BYTES if device.type == "cuda" else 16, dtype=torch.uint8, device=device)


def package_of(name: str = "flashinfer") -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed ({error})") from error


def plan_arguments(model: ModelShape) -> dict[str, Any]:
    """What FlashInfer's planners ask of a model."""
    return {
        "num_query_heads": model.query_heads, "num_kv_heads": model.kv_heads, "head_dim": model.head_dim,
        "dtype": model.dtype,
    }  # fmt: skip


@contextmanager
def _prebuilt_only() -> Iterator[None]:
    """FlashInfer's fa3 takes minutes to compile, so only a prebuilt one is measured."""
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


KERNELS = (
    Kernel("FlashInfer decode, CUDA cores", "decode", "cuda", "flashinfer decode"),
    Kernel("FlashInfer decode, tensor cores", "decode", "cuda", "flashinfer decode, tensor cores"),
    Kernel("torch flash", "decode", "cuda", "torch flash, blocks"),
    Kernel("fa3-fwd", "decode", "cuda", "fa3-fwd, rows"),
    Kernel("torch SDPA", "decode", "cpu", "kvmem sdpa"),
    Kernel("FlashInfer prefill, fa2", "prefill", "cuda", "flashinfer prefill fa2"),
    Kernel("FlashInfer prefill, fa3", "prefill", "cuda", "flashinfer prefill fa3"),
    Kernel("torch flash", "prefill", "cuda", "torch flash, blocks"),
    Kernel("fa3-fwd", "prefill", "cuda", "fa3-fwd, rows"),
    Kernel("torch SDPA", "prefill", "cpu", "kvmem sdpa"),
)


def kernels_of(device: BenchDevice, phase: Phase) -> list[Kernel]:
    return [kernel for kernel in KERNELS if (kernel.phase, kernel.kind) == (phase, device.kind)]
