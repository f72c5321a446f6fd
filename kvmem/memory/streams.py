"""The streams on which kernels use a pool's memory: torch's current one, or the one that was named."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch

from kvmem.errors import DeviceError, SpecError

__all__ = ["Streams", "stream_handle"]

_CAPTURED = 900  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED


class _Pool(Protocol):
    def set_stream(self, stream: int, only: bool = ...) -> None: ...


def stream_handle(stream: Any, device: torch.device) -> int:
    """The driver's handle of a ``torch.cuda.Stream``, of anything with ``__cuda_stream__`` (cuda.core), or an int.

    ``DeviceError`` when a torch stream is of another device; of others the driver knows.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream >= 0:
            return stream
    elif isinstance(handle := getattr(stream, "cuda_stream", None), int):
        owner = getattr(stream, "device", device)
        if owner != device:
            raise DeviceError(
                f"the stream is of {owner}, the pool of {device}: give a stream of {device}", "torch.cuda.Stream.device"
            )
        return handle
    elif callable(protocol := getattr(stream, "__cuda_stream__", None)):
        version, handle = protocol()
        if version != 0:
            raise SpecError(f"stream: __cuda_stream__ of version {version}; only 0 is known")
        return int(handle)
    raise SpecError(
        f"stream: got {type(stream).__name__}; must be a torch.cuda.Stream, an object with __cuda_stream__, or the "
        f"driver's handle as an int"
    )


class Streams:
    """Tells the pool on which streams its memory is used, since fences must be recorded there.

    By default it follows torch: ``follow()``, called whenever memory is handed to kernels, looks up the calling
    thread's current stream. The new one is ordered behind the old one on the device, and fences cover all that were
    seen. ``pin()`` names the one stream instead.
    """

    def __init__(self, pool: _Pool, device: torch.device, current: Callable[[], int] | None) -> None:
        self._pool, self._device, self._current = pool, device, current
        self._ask = current
        self._last = 0  # as the native side begins: the default stream
        self._pinned: Any = None  # keeps the stream of the caller alive
        self._lock = threading.RLock()  # a signal handler may come back here
        self._process = os.getpid()
        if current is not None and (handle := current()) != 0:
            pool.set_stream(handle)
            self._last = handle

    @property
    def handle(self) -> int:
        """The stream that was used last."""
        return self._last

    def follow(self) -> None:
        """Costs a look-up in torch while the stream stays the same, and nothing but a call where none is followed."""
        if self._ask is not None and (handle := self._ask()) != self._last:
            self._switch(handle)

    def _check_process(self) -> None:
        if os.getpid() != self._process:  # the lock may be closed for ever, by a thread that is not here
            raise DeviceError(
                "the pool was made before fork() and belongs to the parent process; make a new one here", "fork"
            )

    def _switch(self, handle: int) -> None:
        self._check_process()
        with self._lock:
            if handle == self._last or self._ask is None:
                return
            try:
                self._pool.set_stream(handle, only=False)
            except DeviceError as error:
                if error.code == _CAPTURED:  # nothing runs on a stream while it is captured
                    return
                raise
            self._last = handle

    def pin(self, stream: Any) -> None:
        """Only ``stream`` from now on; None follows torch again. An error changes nothing."""
        self._check_process()
        with self._lock:
            if stream is None:  # the one named before is kept: fences still mind it
                self._ask = self._current
                return
            handle = stream_handle(stream, self._device)
            self._pool.set_stream(handle)
            self._ask, self._pinned, self._last = None, stream, handle
