"""Stand-ins for what SGLang imports and a machine without a GPU does not have."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

_KEPT: list[Any] = []


def install() -> None:
    """Make SGLang importable in this process, if it has not its own kernels."""
    if torch.cuda.is_available() or "sgl_kernel" in sys.modules or importlib.util.find_spec("sgl_kernel"):
        return
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # SGLang's switch for a machine without an accelerator
    kernels = types.ModuleType("sgl_kernel")
    kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    kernels.__getattr__ = _kernel  # type: ignore[method-assign]
    sys.modules["sgl_kernel"] = kernels
    # torchvision's published build wants a CUDA build of torch: with its operators declared, it can be imported.
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


def _kernel(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: this machine has no kernels of SGLang")

    return absent


def for_children(folder: Path) -> str:
    """Return a ``PYTHONPATH`` under which each Python process has the stand-ins, also those that SGLang starts."""
    (folder / "sitecustomize.py").write_text("import standins\n\nstandins.install()\n")
    return os.pathsep.join([str(folder), str(Path(__file__).parent), *filter(None, sys.path)])
