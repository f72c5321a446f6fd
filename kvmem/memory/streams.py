"""The streams on which kernels use a pool's memory: torch's current one, or the one that was named."""

from __future__ import annotations

import os
import threading
from typing import Any, Protocol

from kvmem.errors import DeviceError
from kvmem.memory.device import Device

__all__ = ["Streams"]


class _Pool(Protocol):
    def set_stream(self, stream: int, only: bool = ...) -> None: ...


class Streams:
    """Tells the pool on which streams its memory is used, since fences must be recorded there.

    By default it follows torch: ``follow()``, called whenever memory is handed to kernels, looks up the calling
    thread's current stream. The new one is ordered behind the old one on the device, and fences cover all that were
    seen. ``pin()`` names the one stream instead.
    """

    def __init__(self, pool: _Pool, device: Device) -> None:
        self._pool, self._device = pool, device
        self._current = current = device.current_stream if device.info.has_streams else None
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
                if error.code != 0 and error.code == self._device.info.captured_code:  # nothing runs on it meanwhile
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
            is_handle = isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0
            handle = stream if is_handle else self._device.stream_handle(stream)
            self._pool.set_stream(handle)
            self._ask, self._pinned, self._last = None, stream, handle
