"""The transport of Mooncake (FAST 2025): its transfer engine, over RDMA or TCP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer
from kvmem.transport.base import RegisteredTransport, Remote, ScratchRemote, address_of, fields_of

__all__ = ["MooncakeTransport"]

_UNDER_WAY: Final = 64  # parts at once; the engine refuses some more of them


class MooncakeTransport(RegisteredTransport[None]):
    """Reads by Mooncake's transfer engine, from and to host memory, without a metadata server.

    host: this machine, as others reach it. protocol, devices: Mooncake's. scratch_bytes: registered memory of each
    ``Remote``; longer reads take several rounds. The engine cannot take a transfer back, and writes a log to the
    standard error. ``SpecError`` without the package ``mooncake``. Tested: 0.3.13 over TCP.
    """

    name = "mooncake"

    def __init__(
        self, host: str = "127.0.0.1", *, protocol: str = "tcp", devices: str = "", scratch_bytes: int = 16 << 20
    ) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as e:  # also without a library that it is linked to
            raise SpecError(
                f"MooncakeTransport needs the package mooncake-transfer-engine: pip install 'kvmem[mooncake]', and "
                f"Debian's libibverbs1 ({e})"
            ) from e
        super().__init__(scratch_bytes)
        self._engine: Any = TransferEngine()
        if code := self._engine.initialize(host, "P2PHANDSHAKE", protocol, devices):
            raise TierError(f"Mooncake's transfer engine refused to start at {host} with code {code}; its log says why")
        self._segment = f"{host}:{self._engine.get_rpc_port()}"

    def expose(self, memory: Buffer) -> bytes:
        return address_of(self.name, segment=self._segment, at=self.register(memory), bytes=len(memory))

    def connect(self, address: bytes) -> Remote:
        found = fields_of(address, self.name, segment=str, at=int, bytes=int)
        return _MooncakeRemote(self, found["segment"], found["at"], found["bytes"])

    def engine(self) -> Any:
        """Return Mooncake's engine. ``TierError`` if the transport is closed."""
        if self._closed:
            raise TierError("the transport is closed")
        return self._engine

    def _enter(self, where: int, num_bytes: int) -> None:
        if code := self._engine.register_memory(where, num_bytes):
            raise TierError(f"Mooncake did not register {num_bytes} bytes: code {code}; its log says why")

    def _leave(self, where: int, registration: None) -> None:
        self._engine.unregister_memory(where)

    def _end(self) -> None:
        self._engine = None


class _Parts:
    """The parts of one read. Each is a batch of the engine: of a batch of several, its Python interface tells only
    whether the first has ended.
    """

    def __init__(self, parts: Sequence[tuple[int, int, int]]) -> None:
        self.waiting = list(parts)  # offset here, offset there, length
        self.under_way: list[int] = []
        self.failed = False


class _MooncakeRemote(ScratchRemote[_Parts]):
    def __init__(self, transport: MooncakeTransport, segment: str, at: int, num_bytes: int) -> None:
        super().__init__(transport, f"Mooncake's segment {segment}", num_bytes)
        self._engine, self._segment, self._at = transport.engine, segment, at

    def _begin(self, offsets: Sequence[int], at: Sequence[int], lengths: Sequence[int]) -> _Parts:
        return _Parts(list(zip(at, offsets, lengths, strict=True)))

    def _ended(self, transfer: _Parts) -> bool:
        engine = self._engine()
        for batch in transfer.under_way[:]:
            if (state := engine.transfer_check_status(batch)) != 0:
                transfer.under_way.remove(batch)  # the engine has forgotten it
                transfer.failed |= state < 0
        while transfer.waiting and not transfer.failed and len(transfer.under_way) < _UNDER_WAY:
            here, there, length = transfer.waiting.pop()
            here, there = self._scratch_at + here, self._at + there
            batch = engine.batch_transfer_async_read(self._segment, [here], [there], [length])
            if batch > 0:
                transfer.under_way.append(batch)
            else:
                transfer.failed = True
        if transfer.failed and not transfer.under_way:
            raise TierError(f"{self.where}: the transfer failed; Mooncake's log says why")
        return not transfer.under_way

    def _cancel(self, transfer: _Parts) -> bool:
        transfer.waiting.clear()
        return not transfer.under_way
