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


def _prepare(name: str) -> Callable[[Memory, ModelShape], Run]:
    kernel = registry.find(name)

    def prepare(memory: Memory, model: ModelShape) -> Run:
        package = package_of(kernel.package)
        if kernel.contiguous and memory.rows is None:
            raise Unavailable(f"{name} reads contiguous rows only")
        step = registry.Step(
            memory.batch, model.query_heads, model.kv_heads, model.head_dim, model.dtype, model.dtype, return_lse=False
        )
        with _prebuilt_only() if name.endswith("fa3") else nullcontext():
            run = kernel.prepare(package, step)
        caches = memory.rows if kernel.reads == "rows" and memory.rows is not None else memory.caches
        return lambda q, layer: run(q, caches[layer % len(caches)])[0]

    return prepare


#: Name in the reports, phase, kind of device, and name in the registry.
_MEASURED: tuple[tuple[str, Phase, str, str], ...] = (
    ("FlashInfer decode, CUDA cores", "decode", "cuda", "flashinfer decode"),
    ("FlashInfer decode, tensor cores", "decode", "cuda", "flashinfer decode, tensor cores"),
    ("torch flash", "decode", "cuda", "torch flash, blocks"),
    ("fa3-fwd", "decode", "cuda", "fa3-fwd, rows"),
    ("torch SDPA", "decode", "cpu", "kvmem sdpa"),
    ("FlashInfer prefill, fa2", "prefill", "cuda", "flashinfer prefill fa2"),
    ("FlashInfer prefill, fa3", "prefill", "cuda", "flashinfer prefill fa3"),
    ("torch flash", "prefill", "cuda", "torch flash, blocks"),
    ("fa3-fwd", "prefill", "cuda", "fa3-fwd, rows"),
    ("torch SDPA", "prefill", "cpu", "kvmem sdpa"),
)
KERNELS = tuple(Kernel(label, phase, kind, _prepare(name)) for label, phase, kind, name in _MEASURED)


def kernels_of(device: BenchDevice, phase: Phase) -> list[Kernel]:
    return [kernel for kernel in KERNELS if (kernel.phase, kernel.kind) == (phase, device.kind)]
