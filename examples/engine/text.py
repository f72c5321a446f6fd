"""The text of an answer as its tokens come, until a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Detokenizer"]


class Detokenizer:
    """``stopped``: a stop string has come, and the text has ended before it."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops, self.stopped = decode, stops, False
        self._tokens: list[int] = []
        self._first = self._read = 0  # tokens between them are decoded again: text may depend on its neighbours
        self._held = ""  # may be the beginning of a stop string

    def push(self, token: int, *, last: bool) -> str:
        """Return the text that is certain now. last: no token follows."""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._first : self._read])
        after = self._decode(self._tokens[self._first :])
        # A character has four bytes at most: after more tokens, these are none.
        if last or not after.endswith("\ufffd") or len(self._tokens) - self._read >= 4:
            self._held += after[len(before) :]
            self._first, self._read = self._read, len(self._tokens)
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped = True
            return self._held[:found]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        cut = len(self._held) - (0 if last else max(begun, default=0))
        text, self._held = self._held[:cut], self._held[cut:]
        return text
