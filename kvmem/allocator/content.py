"""What an allocator has cached: looking, pinning, evicting, and the events that say so."""

from __future__ import annotations

from typing import cast

from kvmem.allocator.opening import OpenedCore
from kvmem.allocator.prefix import Pin, PrefixMatch, Reason, Tokens, encode_keys
from kvmem.events import Event
from kvmem.events.digests import ExtraKey

__all__ = ["ContentCalls"]


class ContentCalls(OpenedCore):
    """The calls that are about cached blocks."""

    def match(
        self,
        tokens: Tokens,
        *,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> PrefixMatch:
        """How much of ``tokens`` is cached, and why not more. Changes nothing, not even what is forgotten next."""
        salted, keyed = encode_keys(salt, extra_key, adapter)
        found, reason = self.core.match(tokens, salted, keyed)
        return PrefixMatch(found, cast(Reason, reason))

    def pin(
        self,
        tokens: Tokens,
        *,
        salt: str | bytes | None = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
    ) -> Pin:
        """Keeps the whole blocks of ``tokens`` (a system prompt) cached until ``unpin()``: whatever happens, a prompt
        that begins with them finds them. ``SpecError`` when one of them is not cached now, or they fill no block.
        """
        salted, keyed = encode_keys(salt, extra_key, adapter)
        pin = Pin(self.core, 0, 0)
        try:
            self.core.pin_tokens(tokens, salted, keyed, pin)
            return pin
        except BaseException:
            pin._discard()
            raise

    def pins(self) -> list[Pin]:
        """The pins that keep something, in the order in which they were made: also those whose ``Pin`` is lost."""
        return [Pin(self.core, pin, num_tokens) for pin, num_tokens in self.core.pins()]

    def clear_cache(self) -> int:
        """Forgets all cached content that nobody uses or pins; returns how many blocks. Their memory stays parked.

        What the sliding windows of live sequences have passed goes too.

        Other threads' calls are let in after each 1,024 blocks, as by ``trim()`` and ``set_memory()``: what they cache
        meanwhile is forgotten too. After an error, what was forgotten before it stays so.
        """
        return self.core.clear_cache()

    def events(self, max_events: int | None = None, *, restart: bool = False) -> list[Event]:
        """What was cached and given up since the last call (``docs/events.md``); empty unless made with ``events=``."""
        self.core.check_usable()
        return [] if self._events is None else self._events.poll(max_events, restart=restart)
