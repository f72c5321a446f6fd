"""What torch knows of a CUDA device: its streams, and the memory of its caching allocator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kvmem.errors import DeviceError, SpecError

__all__ = ["allocator_bytes", "ask_for_stream", "current_device", "stream_handle"]


def current_device() -> int:
    """Return the index of torch's device "cuda"."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def ask_for_stream(index: int) -> Callable[[], int] | None:
    """Return a function that returns the calling thread's current stream; None if torch has no CUDA."""
    if not torch.cuda.is_available():
        return None
    # torch's inner call, because the public one makes a stream object first.
    return partial(getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream), index)


def stream_handle(device: torch.device, stream: Any) -> int:
    """Return the driver's handle of a ``torch.cuda.Stream``, or of an object with ``__cuda_stream__`` (cuda.core).

    ``DeviceError`` for a torch stream of another device; for other objects the driver checks the device.
    """
    if isinstance(handle := getattr(stream, "cuda_stream", None), int):
        owner = getattr(stream, "device", device)
        if owner != device:
            raise DeviceError(
                f"stream: got one of {owner}; must be one of {device}, as the pool is", "torch.cuda.Stream.device"
            )
        return handle
    if callable(protocol := getattr(stream, "__cuda_stream__", None)):
        version, handle = protocol()
        if version != 0:
            raise SpecError(f"stream: got __cuda_stream__ of version {version}; must be version 0")
        return int(handle)
    raise SpecError(
        f"stream: got {type(stream).__name__}; must be a torch.cuda.Stream, an object with __cuda_stream__, or the "
        f"driver's handle as an int"
    )


def allocator_bytes(device: torch.device) -> tuple[int, int]:
    """Return the bytes that torch's caching allocator has given to tensors, and the bytes that it has reserved."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)  # empty before torch's first use of CUDA
    allocated, reserved = (stats.get(f"{kind}_bytes", {}) for kind in ("allocated", "reserved"))
    return allocated.get("all", {}).get("current", 0), reserved.get("all", {}).get("current", 0)
