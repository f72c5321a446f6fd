"""The stream on which kernels use a pool's memory: torch's current stream, or a named one."""

from __future__ import annotations

import os
import threading
from typing import Any

from kvmem import _core
from kvmem.errors import DeviceError
from kvmem.memory.device import Device

__all__ = ["Streams"]


class Streams:
    """Tells the pool on which streams its memory is used, so that fences are recorded there.

    By default it follows torch: ``follow()``, called whenever memory is handed to kernels, looks up the calling
    thread's current stream. Work on a new stream is ordered behind the one before, and fences cover all streams seen.
    ``pin()`` names the only stream instead.
    """

    def __init__(self, pool: _core.PagePool, device: Device) -> None:
        self._pool, self._device = pool, device
        self._current = current = device.current_stream if device.info.has_streams else None
        self._ask = current
        self._last = 0  # the default stream, as in the core
        self._pinned: Any = None  # keeps the stream of the caller alive
        self._beside: dict[int, Any] = {}  # by handle: streams of include(), kept alive
        self._lock = threading.RLock()  # a signal handler may enter it again
        self._process = os.getpid()
        if current is not None and (handle := current()) != 0:
            pool.set_stream(handle)
            self._last = handle

    @property
    def handle(self) -> int:
        """The driver's handle of the stream used last."""
        return self._last

    def follow(self) -> None:
        """Use torch's current stream from now on, unless one is named. Costs a look-up in torch if it is unchanged."""
        if self._ask is not None and (handle := self._ask()) != self._last:
            self._switch(handle)

    def _check_process(self) -> None:
        if os.getpid() != self._process:  # a thread of the parent may hold the lock
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
                # A stream that is being captured runs nothing.
                if error.code != 0 and error.code == self._device.info.captured_code:
                    return
                raise
            self._last = handle

    def include(self, stream: Any) -> None:
        """Let fences cover the work of a further stream, from now on. It is ordered with the stream in use at the first
        call only, so that what is put there later runs beside it. An error changes nothing.
        """
        self._check_process()
        handle = self._device.stream_handle(stream)
        with self._lock:
            if handle == self._last or handle in self._beside:
                return
            self._pool.set_stream(handle, only=False)
            self._pool.set_stream(self._last, only=False)
            self._beside[handle] = stream

    def pin(self, stream: Any) -> None:
        """Use only ``stream`` from now on; None follows torch again. An error changes nothing."""
        self._check_process()
        with self._lock:
            if stream is None:  # the stream named before stays alive, since fences still cover it
                self._ask = self._current
                return
            is_handle = isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0
            handle = stream if is_handle else self._device.stream_handle(stream)
            self._pool.set_stream(handle)
            self._ask, self._pinned, self._last = None, stream, handle
            self._beside = {}
