"""Attention at a disk: K and V live in a file beside a process of its own, and only queries, new rows, outputs and lse
cross between it and this one.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import finalize

import torch

import kvmem
from kvmem.arguments import brief, check_seconds, check_size, parse_bytes
from kvmem.errors import SpecError, TierError
from kvmem.near.base import DTYPES, Part, Shape
from kvmem.near.near_store import NearStore
from kvmem.near.wire import receive, send, until
from kvmem.spec import CacheSpec
from kvmem.tiers.disk.file_io import PAGE

__all__ = ["DiskAttention"]

_START_SECONDS = 120.0  # for a worker to import torch on a busy machine
_END_SECONDS = 5.0  # for a worker that was killed to be gone


class DiskAttention(NearStore):
    """Sequences on a disk, attended by a worker process beside it (InstInfer, arXiv:2409.04992). Thread-safe.

    folder: on the disk that is meant. The file in it has no name, so nothing is left when the worker ends, however it
        does: KV is transient. spec: one group of full attention with K and V. capacity: bytes of disk, taken at the
        start; an int or a text such as ``"200GiB"``. Reading and writing bypass the page cache where the file system
        can.
    k_channels_per_page: keep K a second time, by channel, so many in a page of 4 KiB; SparF then reads few channels
        without whole rows. One and a half times the bytes, and twice the writes of K. Default: no second copy.
    timeout_seconds: for any answer of the worker. One that is late, or has died, is a ``TierError``: it is ended, and
        what it held is lost, as every later call says. An interrupted call ends it too.

    The worker ends with ``close()``, with this object, or with this process. In a forked child, calls raise
    ``TierError``. Its memory: 16 tokens of each head and layer of each sequence (and a channel page's tokens), and K
    and V of the layer of one sequence that it attends. ``TierError`` if the file or the worker cannot be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str], spec: CacheSpec, *, capacity: int | str,
        k_channels_per_page: int | None = None, timeout_seconds: float = 60.0,
    ) -> None:  # fmt: skip
        super().__init__(shape := _shape_of(spec), layers := spec.groups[0].layers)
        self.spec, timeout = spec, check_seconds("timeout_seconds", timeout_seconds)
        channels = _check_channels(k_channels_per_page, shape)
        if not isinstance(folder, (str, os.PathLike)):
            raise SpecError(f"folder: got {brief(folder)}; must be the name of a folder")
        size, where = parse_bytes("capacity", capacity), os.path.abspath(os.fspath(folder))
        self._lock, self._pid, self._broken, self._timeout = threading.RLock(), os.getpid(), "", _START_SECONDS
        self._link, there = socket.socketpair()
        with there:
            try:
                self._process = _start(there.fileno())
            except OSError as error:
                self._link.close()
                raise TierError(f"the worker cannot be started: {error}") from error
        self._end = finalize(self, _finish, self._process, self._link, self._pid)
        try:
            facts = {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
            self._call("", folder=where, capacity=size, layers=layers, shape=facts, channels_per_page=channels)
            self._timeout = timeout
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def close(self) -> None:
        """End the worker. A call under way in another thread and later ones raise ``TierError``."""
        if os.getpid() == self._pid:
            self._process.kill()  # which ends a call under way
            with self._lock:
                self._broken = self._broken or "it was closed"
                self._end()

    def _call(self, call: str, *tensors: torch.Tensor, **arguments: Any) -> Any:
        """Ask the worker. Raises what its answer says."""
        if os.getpid() != self._pid:
            raise TierError(f"the worker belongs to process {self._pid}; open a place of its own in this one")
        here = [t.detach().to("cpu") for t in tensors]
        with self._lock:
            if self._broken:
                raise TierError(f"the worker is gone: {self._broken}")
            try:
                self._link.settimeout(self._timeout)
                sent = send(self._link, {"call": call, "arguments": arguments}, here)
                answer, found, received = receive(self._link, until(time.monotonic() + self._timeout))
            except BaseException as error:  # what comes next on the socket would belong to this call
                self._broken = str(error) or type(error).__name__
                self._end()
                if isinstance(error, OSError):
                    raise TierError(f"the worker has failed, and what it held is lost: {self._broken}") from error
                raise
            link, lse = sum(t.nbytes for t in (*here, *found[:1])), sum(t.nbytes for t in found[1:])
            self.traffic.update(answer["traffic"], control_bytes=sent + received, link_bytes=link, lse_bytes=lse)
        if "error" in answer:
            raise (SpecError if answer["refused"] else TierError)(answer["error"])
        if found:
            return Part(found[0].to(tensors[0].device), found[1].to(tensors[0].device), answer["result"])
        return answer.get("result")


def _shape_of(spec: object) -> Shape:
    if not isinstance(spec, CacheSpec):
        raise SpecError(f"spec: got {brief(spec)}; must be a CacheSpec, see CacheSpec.from_config()")
    group, parts = spec.groups[0], spec.groups[0].components
    whole = sorted(c.name for c in parts) == ["k", "v"] and not any(c.planes or c.scope == "shared" for c in parts)
    if len(spec.groups) > 1 or group.growth != "token" or group.window_tokens or not whole:
        raise SpecError("spec: needs one group of full attention, with a K and a V in each layer, not in planes")
    kinds = {
        tuple((group.heads(c.name, n), group.widths(c.name, n), c.dtype) for c in map(group.component, "kv"))
        for n in group.layers
    }
    (k_heads, k_widths, dtype), (v_heads, v_widths, v_dtype) = next(iter(kinds))
    if len(kinds) > 1 or len(k_widths) + len(v_widths) > 2 or (k_heads, dtype) != (v_heads, v_dtype):
        raise SpecError("spec: needs one width of K, one of V, one number of heads and one dtype in all layers")
    if dtype not in DTYPES:
        raise SpecError(f"spec: got {dtype}; must be one of {', '.join(map(str, DTYPES))}")
    return Shape(k_heads, k_widths[0], v_widths[0], dtype)


def _check_channels(channels: int | None, shape: Shape) -> int:
    if channels is None:
        return 0
    check_size("k_channels_per_page", channels)
    if shape.k_width % channels or PAGE % (16 * channels * shape.dtype.itemsize):
        raise SpecError(
            f"k_channels_per_page: got {channels}; must divide the width {shape.k_width}, and a page of {PAGE} bytes "
            "into 16 tokens or a multiple: take 1, 2, 4 or 8"
        )
    return channels


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    home = str(Path(kvmem.__file__).resolve().parents[1])
    path = os.pathsep.join([home, *(os.path.abspath(folder) for folder in sys.path if folder)])
    return subprocess.Popen(
        [sys.executable, "-m", "kvmem.near.worker", str(descriptor), str(os.getpid())],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[descriptor], cwd="/",
        env={**os.environ, "PYTHONPATH": path}, start_new_session=True,  # ctrl-C is for the owner
    )  # fmt: skip


def _finish(process: subprocess.Popen[bytes], link: socket.socket, pid: int) -> None:
    """End the worker, which holds nothing that outlives it, and wait for it, so that no zombie is left. In a forked
    child: let go of the socket.
    """
    link.close()
    if os.getpid() == pid:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # the disk does not answer
            process.wait(_END_SECONDS)
