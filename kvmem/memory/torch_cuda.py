"""What torch knows of a CUDA device beside the pool: its streams, and the memory of its caching allocator."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from kvmem.errors import DeviceError, SpecError

__all__ = ["allocator_bytes", "ask_for_stream", "current_device", "stream_handle"]


def current_device() -> int:
    """What torch takes "cuda" for."""
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


def ask_for_stream(index: int) -> Callable[[], int] | None:
    """What returns the calling thread's current stream; None from a torch without CUDA, which has no streams."""
    if not torch.cuda.is_available():
        return None
    # torch's own inner call: the public one makes an object of the stream first.
    return partial(getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream), index)


def stream_handle(device: torch.device, stream: Any) -> int:
    """The driver's handle of a ``torch.cuda.Stream``, or of anything with ``__cuda_stream__`` (cuda.core).

    ``DeviceError`` when a torch stream is of another device; of others the driver knows.
    """
    if isinstance(handle := getattr(stream, "cuda_stream", None), int):
        owner = getattr(stream, "device", device)
        if owner != device:
            raise DeviceError(
                f"the stream is of {owner}, the pool of {device}: give a stream of {device}", "torch.cuda.Stream.device"
            )
        return handle
    if callable(protocol := getattr(stream, "__cuda_stream__", None)):
        version, handle = protocol()
        if version != 0:
            raise SpecError(f"stream: __cuda_stream__ of version {version}; only 0 is known")
        return int(handle)
    raise SpecError(
        f"stream: got {type(stream).__name__}; must be a torch.cuda.Stream, an object with __cuda_stream__, or the "
        f"driver's handle as an int"
    )


def allocator_bytes(device: torch.device) -> tuple[int, int]:
    """What torch's caching allocator has given to tensors, and what it has reserved."""
    stats = torch.cuda.memory_stats_as_nested_dict(device)  # empty before torch's first use of CUDA
    allocated, reserved = (stats.get(f"{kind}_bytes", {}) for kind in ("allocated", "reserved"))
    return allocated.get("all", {}).get("current", 0), reserved.get("all", {}).get("current", 0)
