"""The calls of an allocator about tiers: blocks that come back from host memory, disk and remote stores."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from kvmem.allocator.opening import OpenedCore
from kvmem.allocator.prefix import Salt, Tokens, encode_keys, token_ids
from kvmem.allocator.sequence import Sequence
from kvmem.allocator.tiers.engine import Tiering
from kvmem.allocator.tiers.held import HeldBlocks
from kvmem.allocator.tiers.loads import Load
from kvmem.allocator.tiers.places import Prompt
from kvmem.arguments import check_choice
from kvmem.errors import NotReady, SpecError, StaleHandle
from kvmem.events.digests import ExtraKey

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["LoadFrom", "TierCalls"]

#: How far a new sequence looks for cached blocks: see ``Allocator.sequence``.
LoadFrom = Literal["device", "host", "all"]


class _Pending:
    """A sequence that waits for a load."""

    def __init__(self, sequence: Sequence, load: Load, ids: npt.NDArray[np.int32], keys: tuple[bytes, bytes]) -> None:
        self.sequence, self.load, self.ids, self.keys = sequence, load, ids, keys
        self.lock = threading.Lock()  # one thread finishes it, and the others wait until it has


class TierCalls(OpenedCore):
    """What an allocator with ``tiers=`` can do; the calls raise ``SpecError`` without."""

    @property
    def tiering(self) -> Tiering:
        """The engine behind these calls. ``SpecError`` if the allocator has no tiers."""
        if self._tiering is None:
            raise SpecError("this allocator has no tiers: make it with tiers=Tiers(host=...)")
        return self._tiering

    def ready(self, sequences: Iterable[Sequence | int] | None = None) -> list[int]:
        """Return the ids of those sequences (default: all that were pending) whose blocks have been loaded.

        Moves what has arrived, so it is called once a step while a sequence is pending. Never waits for a tier.
        Cost: the copies to the device.
        """
        self.core.check_usable()
        wanted = None if sequences is None else [s.id if isinstance(s, Sequence) else s for s in sequences]
        found = [] if wanted is None else [handle for handle in wanted if handle not in self._pending]
        for handle in list(self._pending) if wanted is None else wanted:
            if handle in self._pending and self._finish(handle):
                found.append(handle)
        return found

    def store(
        self, tokens: Tokens, *, salt: Salt = None, extra_key: ExtraKey = None, adapter: str | None = None
    ) -> int:
        """Copy the cached blocks of ``tokens`` to host memory, and on to a lower tier as ``Tiers.write`` says, without
        evicting them. Return how many blocks of all groups were copied: those that no slot has yet.

        For content that should outlive the process or be found elsewhere although the device has room for it: call it
        when a request ends. Cost: the copies.
        """
        return self.tiering.store(self._prompt(token_ids(tokens), salt, extra_key, adapter, leave=0))

    def hold(
        self, tokens: Tokens, *, salt: Salt = None, extra_key: ExtraKey = None, adapter: str | None = None
    ) -> HeldBlocks:
        """Return the first run of whole blocks of ``tokens`` that host memory has and the device has not; it may be
        empty. They stay where they are, to be read there (``kvmem.near``), until the result is released: use ``with``.

        Blocks of full-attention groups only. ``TierError`` if the device does not finish filling them. No copy.
        """
        self.core.check_usable()
        if self.device.type == "meta":
            raise SpecError('hold: device "meta" has no bytes to read')
        return HeldBlocks(self.tiering, self._prompt(token_ids(tokens), salt, extra_key, adapter, leave=0))

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until lower tiers have what is on its way to them, ``timeout`` seconds at most.

        Return whether nothing is on its way any more.
        """
        self.tiering.settle()
        return self.tiering.transfers.flush(timeout)

    def _prompt(
        self, ids: npt.NDArray[np.int32], salt: Salt, extra_key: ExtraKey, adapter: str | None, leave: int = 1
    ) -> Prompt:
        """Return the whole blocks of the ids without the last ``leave`` tokens."""
        keys = encode_keys(salt, extra_key, adapter)
        return self.tiering.prompt(ids, keys, salt, extra_key, adapter, leave)

    def _bring(
        self, tokens: Tokens, salt: Salt, extra_key: ExtraKey, adapter: str | None, load: LoadFrom
    ) -> tuple[npt.NDArray[np.int32], Load | None]:
        """Promote what host slots have of a prompt; return its ids, and the load of the rest if there is one."""
        check_choice("load", load, ("device", "host", "all"))
        ids = token_ids(tokens)
        if load == "device":
            return ids, None
        prompt = self._prompt(ids, salt, extra_key, adapter)
        if self.tiering.promote(prompt) == prompt.num_blocks or load == "host":
            return ids, None
        started = self.tiering.load(prompt, to_device=True)
        return ids, None if started.advance() else started

    def _begin_pending(
        self, sequence: Sequence, load: Load, ids: npt.NDArray[np.int32], keys: tuple[bytes, bytes]
    ) -> None:
        try:
            for handle in [handle for handle in list(self._pending) if self._was_freed(handle)]:
                self._finish(handle)
            sequence._id = self.core.open()
            self.core.set_pending(sequence._id)  # first, because another thread may finish what it finds here
            self._pending[sequence._id] = _Pending(sequence, load, ids, keys)
        except BaseException:  # the caller frees the sequence
            load.cancel()
            self._pending.pop(sequence._id, None)
            raise

    def _was_freed(self, handle: int) -> bool:
        try:
            self.core.age_seconds(handle)
        except NotReady:
            return False
        except StaleHandle:
            return True
        return False

    def _finish(self, handle: int) -> bool:
        """Give a pending sequence its prefix if its load is done. True also if it was freed meanwhile."""
        waiting = self._pending.get(handle)
        if waiting is None or not waiting.load.advance():
            return waiting is None
        with waiting.lock:
            if handle in self._pending:
                with suppress(StaleHandle):  # it was freed: nobody waits
                    salted, keyed = waiting.keys
                    waiting.sequence.num_cached_tokens = self.core.admit_pending(handle, waiting.ids, salted, keyed)
                self._pending.pop(handle, None)
        return True

    def _end_tiers(self) -> None:
        self._pending.clear()
        if self._tiering is not None:
            self._tiering.transfers.close()
