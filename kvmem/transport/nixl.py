"""The transport of NVIDIA's NIXL, which Dynamo and vLLM's NixlConnector use: UCX over InfiniBand, NVLink or TCP."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer
from kvmem.transport.base import RegisteredTransport, Remote, ScratchRemote, address_of, fields_of

__all__ = ["NixlTransport"]


class NixlTransport(RegisteredTransport[Any]):
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
        super().__init__(scratch_bytes)
        self._agent: Any = nixl_agent(f"kvmem-{secrets.token_hex(8)}", nixl_agent_config(backends=[backend]))
        if backend not in self._agent.backends:
            raise SpecError(f"backend: got {backend!r}; NIXL has {self._agent.plugin_list}")

    def expose(self, memory: Buffer) -> bytes:
        where = self.register(memory)
        return address_of(self.name, agent=self.call("get_agent_metadata").hex(), at=where, bytes=len(memory))

    def connect(self, address: bytes) -> Remote:
        found = fields_of(address, self.name, agent=str, at=int, bytes=int)
        try:
            peer = self.call("add_remote_agent", bytes.fromhex(found["agent"]))
        except (TierError, ValueError) as error:
            raise SpecError(f"address: refused ({error}); the address is damaged, or of this transport") from error
        return _NixlRemote(self, peer.decode() if isinstance(peer, bytes) else peer, found["at"], found["bytes"])

    def _enter(self, where: int, num_bytes: int) -> Any:
        return self._agent.register_memory([(where, num_bytes, 0, "")], "DRAM")

    def _leave(self, where: int, registration: Any) -> None:
        self._agent.deregister_memory(registration)

    def _end(self) -> None:
        self._agent = None

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the agent, which is not thread-safe. ``TierError`` for whatever it raises."""
        with self._lock:
            if self._closed:
                raise TierError("the transport is closed")
            try:
                return getattr(self._agent, name)(*args)
            except Exception as error:  # NIXL's errors have no common base
                raise TierError(f"NIXL: {type(error).__name__}: {error}") from error


class _NixlRemote(ScratchRemote[Any]):
    def __init__(self, transport: NixlTransport, peer: str, at: int, num_bytes: int) -> None:
        super().__init__(transport, f"NIXL's agent {peer}", num_bytes)
        self._call, self._peer, self._at = transport.call, peer, at

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
        self._call("release_xfer_handle", transfer)
        if state != "DONE":
            raise TierError(f"{self.where}: the transfer failed")
        return True

    def _cancel(self, transfer: Any) -> bool:
        try:
            self._call("release_xfer_handle", transfer)
        except TierError:
            return False
        return True
