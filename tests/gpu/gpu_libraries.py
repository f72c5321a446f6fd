"""The kernels' packages as they are installed, or by hand, and how far a result is off."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from kernel_by_hand import library_by_hand

from kvmem.kernels import torch_ops
from kvmem.kernels.base import Kernel, Result

__all__ = ["Real", "Result", "Unavailable", "open_library", "relative_error"]


class Unavailable(Exception):
    """A package, or a part of it, that is not there; the text is the reason for the skip."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest number; infinite where NaN, or infinities, do not agree."""
    actual, expected = actual.detach().double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    infinite = expected.isinf()
    if actual.isnan().any() or not torch.equal(actual[infinite], expected[infinite]):
        return float("inf")
    finite = expected[~infinite]
    if not finite.numel():
        return 0.0
    return float((actual[~infinite] - finite).abs().max() / finite.abs().max().clamp(min=1e-6))


class Real:
    """What is installed, under its own names. ``Unavailable`` where it is not.

    workspace: for FlashInfer's wrappers, which run one after the other.
    """

    def __init__(self, package: str) -> None:
        try:
            self.module = importlib.import_module(package)
        except (ImportError, OSError) as error:  # OSError: a library that it loads is not there
            raise Unavailable(f"{package} is not installed: {error}") from error
        if package.startswith("flashinfer"):
            self.workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def MultiLevelCascadeAttentionWrapper(self, *given: Any) -> Any:
        wrapper = self.module.MultiLevelCascadeAttentionWrapper(*given)
        if not os.environ.get("KVMEM_GPU_FA3"):  # it has no argument for the choice, and takes fa3 on Hopper
            for level in wrapper._batch_prefill_wrappers:
                level._backend = "fa2"
        return wrapper


def open_library(kernel: Kernel, device: str) -> Any:
    """The kernel's package, or on a CPU the one by hand."""
    if device == "cpu":
        return library_by_hand(kernel.package)
    if kernel.name == "torch flash, blocks" and not torch_ops.supports("block_table"):
        raise Unavailable(f"torch {torch.__version__} cannot follow block tables")
    return Real(kernel.package)
