"""A handle for one request's tokens, and what a list of the live ones says of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from kvmem import _core
from kvmem.allocator.prefix import Pin, Tokens, committed_count
from kvmem.arguments import check_count, check_group, check_seconds, check_size
from kvmem.errors import KVMemError, OutOfMemory, SpecError

if TYPE_CHECKING:
    from kvmem.allocator.allocator import Allocator

__all__ = ["LiveSequence", "Sequence"]


#: No sequence's handle.
NO_HANDLE = -1


@dataclass(frozen=True)
class LiveSequence:
    """A live sequence, as ``Allocator.sequences()`` lists it.

    age: seconds since it was opened, to some milliseconds.
    label: what ``Allocator.sequence(label=)`` was given; None for all others.
    """

    id: int
    num_tokens: int
    num_committed_tokens: int
    age: float
    label: str | None


class Sequence:
    """One request's tokens in an allocator. Made by ``Allocator.sequence()`` and ``fork()``; a context manager that
    frees it, unless its body did. One that is garbage while it is live gives a ``ResourceWarning``, and its memory
    stays taken: free it, or ``detach()`` it where only its ``id`` goes on.

    ``num_cached_tokens``: how many tokens it started with because they were cached; committed from the start.
    A token is first *reserved* by ``extend``, which makes room and nothing else; the model then writes its KV;
    ``commit`` says that it is valid. ``num_committed_tokens <= num_tokens``.
    """

    __slots__ = ("_alloc", "_core", "_id", "_lent", "num_cached_tokens")

    def __init__(self, alloc: Allocator, handle: int, num_cached_tokens: int = 0) -> None:
        self._alloc = alloc
        self._core = alloc.core
        self._id = handle
        if handle != NO_HANDLE:  # somebody else's, who frees it
            self._lent = True
        self.num_cached_tokens = num_cached_tokens

    @property
    def id(self) -> int:
        """The int32 handle, for the batched calls."""
        return self._id

    @property
    def allocator(self) -> Allocator:
        """Whose sequence it is."""
        return self._alloc

    @property
    def label(self) -> str | None:
        """What ``Allocator.sequence(label=)`` was given."""
        return self._alloc._labels.get(self._id)

    @property
    def num_tokens(self) -> int:
        """Tokens reserved, committed ones included."""
        return self._core.tokens(self._id)

    @property
    def num_committed_tokens(self) -> int:
        """Tokens whose KV is valid."""
        return self._core.committed(self._id)

    def extend(self, n: int, *, group: int | None = None) -> None:
        """Makes room for ``n`` more tokens. ``OutOfMemory``, and nothing changed, when there is none.

        Costs no driver call while the row or the blocks at hand suffice. ``group`` names a group that is fixed after
        prefill (cross attention), which grows by its own count, once.
        """
        self._core.extend(self._id, n, -1 if group is None else self._group(group))

    def try_extend(self, n: int, *, group: int | None = None) -> bool:
        """As ``extend``, but False instead of ``OutOfMemory``."""
        try:
            self.extend(n, group=group)
        except OutOfMemory:
            return False
        return True

    def commit(self, tokens: Tokens | None = None, *, count: int | None = None, group: int | None = None) -> None:
        """The KV of the next ``tokens`` is written. Sliding windows move on.

        tokens: their ids; the blocks that they complete are shared from now on. count: instead of ids that nobody
            knows, how many; neither these nor any that follow are shared then. group: as for ``extend``.
        """
        if count is None and group is None:
            self._core.commit(self._id, None, -1, tokens)
        else:
            index = -1 if group is None else self._group(group)
            self._core.commit(self._id, committed_count("commit", tokens, count), index)

    def _group(self, group: int) -> int:
        return check_group("group", group, len(self._alloc.spec.groups))

    def step(self, n: int = 1, tokens: Tokens | None = None) -> None:
        """A decode step of one sequence in one call: what is reserved is committed, then there is room for ``n`` more.

        tokens: the ids of all that is committed, a list or an array; without them it cannot be shared. As ``commit``
        and ``extend``, but nothing has changed after an error. ``Allocator.step`` does this for a whole batch.
        """
        self._core.step(self._id, n, tokens)

    def truncate(self, num_tokens: int) -> None:
        """Keeps the first ``num_tokens`` tokens, as when draft tokens are rejected. Never needs memory.

        What is cut off counts as wrong: blocks of it that no other sequence uses are forgotten. ``SpecError`` when some
        are pinned. To keep them cached, ``fork()`` first. A recurrent state does not go back by itself.
        """
        self._core.truncate(self._id, check_count("num_tokens", num_tokens))

    def pin(self, num_tokens: int | None = None) -> Pin:
        """Keeps the whole blocks of the first ``num_tokens`` tokens (default: of all whose ids are known) cached
        until ``unpin()``, whatever becomes of this sequence: a prompt that begins with them finds them all.

        ``SpecError`` when their ids are not known, when they fill no block, or when they could not be found even now: a
        sliding window has passed what it would need and it was given up, or a recurrent state has no snapshot there.
        """
        count = -1 if num_tokens is None else check_size("num_tokens", num_tokens, 0)
        pin = Pin(self._core, 0, 0)
        try:
            self._core.pin(self._id, count, pin)
            return pin
        except BaseException:
            pin._discard()
            raise

    def retain(self, start: int = 0, end: int | None = None, *, priority: int, ttl: float | None = None) -> None:
        """Overrides the eviction policy for blocks that lie whole in tokens ``[start, end)``, those to come included.

        priority: 0 to 100. Lower than 50 goes before all else, higher after all else, 50 is as the policy decides.
        ttl: seconds from the block's release on, after which the policy decides again; default for ever.
        After TensorRT-LLM's retention config.
        """
        first = check_size("start", start, 0)
        last = 2**31 - 1 if end is None else check_size("end", end, 0)
        seconds = math.inf if ttl is None else check_seconds("ttl", ttl)
        self._core.retain(self._id, first, last, check_count("priority", priority), seconds)

    def snapshot(self) -> None:
        """Keeps a copy of the recurrent state, so that a sequence that begins with the same tokens can go on from here.

        All tokens must be committed by their ids, at a multiple of the block size, and the spec must have a component
        of fixed size; else ``SpecError``. So it is when the state may be ahead of the tokens, as after ``truncate()``,
        and in a fork of a sequence that had reserved tokens: put the state back and go on, the next ``commit()``
        answers for it. ``OutOfMemory``, and nothing changed, when there is no room for the copy.
        """
        self._core.snapshot(self._id)

    def fork(self) -> Sequence:
        """A second sequence with the same committed tokens: whole pages or blocks are shared, the cut one is copied.

        ``OutOfMemory``, and nothing changed, when there is no room for the copy. What is reserved but not committed
        stays with the parent; a recurrent state is copied as it is, so it may have seen those tokens.
        """
        child = Sequence(self._alloc, NO_HANDLE)
        try:
            self._core.fork(self._id, child)
            return child
        except BaseException:
            child._discard()
            raise

    def free(self) -> None:
        """Gives everything back; a row stays mapped (parked) for the next sequence. Twice is a ``StaleHandle``."""
        self._core.free(self._id)

    def detach(self) -> int:
        """The handle, which the caller keeps and frees from now on (``Allocator.free_batch``). Of this object nothing
        is expected any more: no warning comes when it is garbage. As ``detach()`` of a socket.
        """
        self._lent = True
        return self._id

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the tokens held, ``[num_tokens, heads, width]``; see ``Allocator.sequence_tensor``."""
        return self._alloc.sequence_tensor(self, layer, "k"), self._alloc.sequence_tensor(self, layer, "v")

    def _discard(self) -> None:
        """Frees it unless it was freed before, or never began. For the end of a call that failed."""
        if self._id != NO_HANDLE and self._core.is_live(self._id):
            self._core.free(self._id)

    # Leaving the body frees it, unless the body did; the body's own exception is what is raised. One call to C each: in
    # the middle of a function of Python's a signal handler may raise, and Python's end of an object runs anywhere.
    if TYPE_CHECKING:

        def __enter__(self) -> Sequence: ...

        def __exit__(self, *_: object) -> None: ...
    else:
        __enter__ = _core.Scope.__enter__
        __exit__ = _core.Scope.__exit__
        __del__ = _core._end_of_object

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SpecError(
            f"{self!r}: a sequence is memory of this process, and is not pickled or copied; fork() makes a second one "
            "that shares its tokens, and `id` names it in this process"
        )

    def __repr__(self) -> str:
        named = f"id={self._id}" if self.label is None else f"id={self._id}, label={self.label!r}"
        try:
            if not self._core.is_live(self._id):
                return f"Sequence({named}, freed)"
            return f"Sequence({named}, num_tokens={self.num_tokens}, committed={self.num_committed_tokens})"
        except KVMemError:  # a forked child's, or freed by another thread just now
            return f"Sequence({named})"
