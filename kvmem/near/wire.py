"""Messages between a worker and its owner: a header in JSON, then the bytes of tensors. Nothing is executed."""

from __future__ import annotations

import json
import math
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["Closed", "receive", "send"]

_LENGTH = struct.Struct("<I")


class Closed(OSError):
    """The other side has gone."""


def send(to: socket.socket, header: dict[str, Any], tensors: Sequence[torch.Tensor] = ()) -> int:
    """Send a message; return the bytes of its header. ``OSError`` if the other side is gone, or too slow for the
    socket's timeout.
    """
    kinds = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
    text = json.dumps({**header, "tensors": kinds}).encode()
    to.sendall(_LENGTH.pack(len(text)) + text)
    for t in tensors:
        if t.numel():
            to.sendall(t.contiguous().view(-1).view(torch.uint8).numpy().data)
    return _LENGTH.size + len(text)


def receive(source: socket.socket, wait: Callable[[], None]) -> tuple[dict[str, Any], list[torch.Tensor], int]:
    """Return the header and the tensors of a message, and the bytes of the header. ``Closed`` if the other side has
    gone. wait: called whenever the socket's timeout has passed; raises to give up.
    """
    (size,) = _LENGTH.unpack(_exactly(source, bytearray(_LENGTH.size), wait))
    header = json.loads(bytes(_exactly(source, bytearray(size), wait)))
    tensors = []
    for name, shape in header.pop("tensors"):
        dtype = getattr(torch, name)
        memory = _exactly(source, bytearray(math.prod(shape) * dtype.itemsize), wait)
        tensors.append(torch.frombuffer(memory, dtype=dtype).view(shape) if memory else torch.empty(shape, dtype=dtype))
    return header, tensors, _LENGTH.size + size


def _exactly(source: socket.socket, memory: bytearray, wait: Callable[[], None]) -> bytearray:
    view = memoryview(memory)
    while view:
        try:
            count = source.recv_into(view)
        except TimeoutError:
            wait()
            continue
        if not count:
            raise Closed("the other side has closed the connection")
        view = view[count:]
    return memory


def until(end: float) -> Callable[[], None]:
    """A ``wait`` that gives up at a time of ``time.monotonic()``."""

    def wait() -> None:
        if time.monotonic() >= end:
            raise TimeoutError("no answer in time")

    return wait
