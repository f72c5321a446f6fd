"""The transport of NVIDIA's NIXL, which Dynamo and vLLM's NixlConnector use: UCX over InfiniBand, NVLink or TCP."""

from __future__ import annotations

import mmap
import secrets
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvmem.arguments import check_size
from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer
from kvmem.transport.base import Remote, ScratchRemote, Transport, address_of, fields_of

__all__ = ["NixlTransport"]


class NixlTransport(Transport):
    """Reads by NIXL, from and to host memory.

    backend: of NIXL. scratch_bytes: registered memory of each ``Remote``; longer reads take several rounds. Which
    network UCX uses is said by its environment variables; over TCP on one machine ``UCX_TLS=tcp UCX_NET_DEVICES=lo``.
    ``SpecError`` without the package ``nixl``. Tested: NIXL 1.5.1, UCX over TCP.
    """

    name = "nixl"

    def __init__(self, *, backend: str = "UCX", scratch_bytes: int = 16 << 20) -> None:
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as e:
            raise SpecError(f"NixlTransport needs the package nixl: pip install 'kvmem[nixl]' ({e})") from e
        self._bytes = check_size("scratch_bytes", scratch_bytes, 4096)
        self._lock = threading.Lock()  # an agent is not thread-safe
        self._agent: Any = nixl_agent(f"kvmem-{secrets.token_hex(8)}", nixl_agent_config(backends=[backend]))
        if backend not in self._agent.backends:
            raise SpecError(f"backend: got {backend!r}; NIXL has {self._agent.plugin_list}")
        self._registered: dict[int, tuple[Any, Buffer]] = {}  # by address

    def expose(self, memory: Buffer) -> bytes:
        where = self._register(memory)
        with self._lock:
            agent = self._agent.get_agent_metadata()
        return address_of(self.name, agent=agent.hex(), at=where, bytes=len(memory))

    def connect(self, address: bytes) -> Remote:
        found = fields_of(address, self.name, agent=str, at=int, bytes=int)
        scratch = memoryview(mmap.mmap(-1, self._bytes)).cast("B")
        where = self._register(scratch)
        try:
            with self._lock:
                peer = self._agent.add_remote_agent(bytes.fromhex(found["agent"]))
        except Exception as error:  # NIXL's errors have no common base
            raise SpecError(
                f"address: refused by NIXL ({error}); the address is damaged, or of this process"
            ) from error
        name = peer.decode() if isinstance(peer, bytes) else peer
        return _NixlRemote(self, name, found["at"], found["bytes"], scratch, where)

    def close(self) -> None:
        with self._lock:
            agent, self._agent = self._agent, None
            while self._registered:
                agent.deregister_memory(self._registered.popitem()[1][0])

    def _register(self, memory: Buffer) -> int:
        where = np.frombuffer(memory, np.uint8).ctypes.data
        with self._lock:
            if self._agent is None:
                raise TierError("the transport is closed")
            self._registered[where] = self._agent.register_memory([(where, len(memory), 0, "")], "DRAM"), memory
        return where

    def forget(self, where: int) -> None:
        """Deregister memory, unless the transport has been closed."""
        with self._lock:
            if where in self._registered:
                self._agent.deregister_memory(self._registered.pop(where)[0])

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the agent. ``TierError`` for whatever it raises."""
        with self._lock:
            if self._agent is None:
                raise TierError("the transport is closed")
            try:
                return getattr(self._agent, name)(*args)
            except Exception as error:  # NIXL's errors have no common base
                raise TierError(f"NIXL: {type(error).__name__}: {error}") from error


class _NixlRemote(ScratchRemote[Any]):
    def __init__(
        self, transport: NixlTransport, peer: str, at: int, num_bytes: int, scratch: Buffer, scratch_at: int
    ) -> None:
        super().__init__(f"NIXL's agent {peer}", num_bytes, scratch)
        self._transport, self._call = transport, transport.call
        self._peer, self._at, self._scratch_at = peer, at, scratch_at

    def _begin(self, offsets: Sequence[int], at: Sequence[int], lengths: Sequence[int]) -> Any:
        here, there = (
            self._call("get_xfer_descs", [(base + i, n, 0) for i, n in zip(places, lengths, strict=True)], "DRAM")
            for base, places in ((self._scratch_at, at), (self._at, offsets))
        )
        transfer = self._call("initialize_xfer", "READ", here, there, self._peer)
        if self._call("transfer", transfer) == "ERR":
            raise TierError(f"{self.where}: NIXL could not start the transfer")
        return transfer

    def _ended(self, transfer: Any) -> bool:
        state = self._call("check_xfer_state", transfer)
        if state == "PROC":
            return False
        if state != "DONE":
            raise TierError(f"{self.where}: the transfer failed")
        self._call("release_xfer_handle", transfer)
        return True

    def _release(self) -> None:
        if self._left is None:  # else it may still be written to
            self._transport.forget(self._scratch_at)

    def _cancel(self, transfer: Any) -> bool:
        try:
            self._call("release_xfer_handle", transfer)
        except TierError:
            return False
        return True
