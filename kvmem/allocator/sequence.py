"""A sequence: one request's tokens; and the entries of a list of live sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from kvmem import _core
from kvmem.allocator.prefix import Pin, Tokens, committed_count
from kvmem.arguments import INT32_MAX, check_count, check_group, check_seconds, check_size
from kvmem.errors import KVMemError, OutOfMemory, SpecError

if TYPE_CHECKING:
    from kvmem.allocator.allocator import Allocator

__all__ = ["LiveSequence", "Sequence"]

#: The handle of no sequence.
NO_HANDLE = -1


@dataclass(frozen=True)
class LiveSequence:
    """A live sequence, as ``Allocator.sequences()`` lists it.

    id: the int32 handle. num_tokens: tokens reserved. num_committed_tokens: tokens whose KV is valid.
    age: seconds since it was opened, to some milliseconds.
    label: as given to ``Allocator.sequence(label=)``; otherwise None.
    """

    id: int
    num_tokens: int
    num_committed_tokens: int
    age: float
    label: str | None


class Sequence:
    """One request's tokens in an allocator. Made by ``Allocator.sequence()`` and ``fork()``; a context manager that
    frees it, unless its body has freed it.

    A token is first *reserved* by ``extend``, which makes room and nothing else; the model then writes its KV;
    ``commit`` declares it valid. ``num_committed_tokens <= num_tokens``.

    num_cached_tokens: how many tokens the sequence started with because they were cached; committed from the start.

    A ``Sequence`` that is collected as garbage while it is live warns (``ResourceWarning``), and its memory stays in
    use: free it, or ``detach()`` it if only its ``id`` is needed.
    """

    __slots__ = ("_alloc", "_core", "_id", "_lent", "num_cached_tokens")

    def __init__(self, alloc: Allocator, handle: int, num_cached_tokens: int = 0) -> None:
        self._alloc = alloc
        self._core = alloc.core
        self._id = handle
        if handle != NO_HANDLE:  # owned elsewhere, and freed there
            self._lent = True
        self.num_cached_tokens = num_cached_tokens

    @property
    def id(self) -> int:
        """The int32 handle, for the batched calls. Never used twice."""
        return self._id

    @property
    def allocator(self) -> Allocator:
        """The allocator that owns the sequence."""
        return self._alloc

    @property
    def label(self) -> str | None:
        """The text given to ``Allocator.sequence(label=)``, or None."""
        return self._alloc._labels.get(self._id)

    @property
    def pending(self) -> bool:
        """True while blocks of the prompt are being loaded from a tier (``load="all"``); no call but ``free()`` may use
        the sequence then.
        """
        return self._id in self._alloc._pending

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the sequence is not pending any more, ``timeout`` seconds at most; return whether it is not."""
        waiting = self._alloc._pending.get(self._id)
        return waiting is None or (waiting.load.wait(timeout) and self._alloc._finish(self._id))

    @property
    def num_tokens(self) -> int:
        """Number of tokens that there is room for, committed ones included."""
        return self._core.tokens(self._id)

    @property
    def num_committed_tokens(self) -> int:
        """Number of tokens whose KV is valid."""
        return self._core.committed(self._id)

    def extend(self, n: int, *, group: int | None = None) -> None:
        """Make room for ``n`` more tokens. ``OutOfMemory``, and nothing has changed, if there is no memory for them.

        group: the index of a group that is fixed after prefill (cross attention) and is extended once, by a count of
            its own; default all groups that grow with the tokens.

        Costs no driver call while the row's mapped pages or free blocks suffice.
        """
        self._core.extend(self._id, n, -1 if group is None else self._group(group))

    def try_extend(self, n: int, *, group: int | None = None) -> bool:
        """Return True after ``extend``, and False where it raises ``OutOfMemory``."""
        try:
            self.extend(n, group=group)
        except OutOfMemory:
            return False
        return True

    def commit(self, tokens: Tokens | None = None, *, count: int | None = None, group: int | None = None) -> None:
        """Declare the KV of the next tokens as written. Sliding windows move on.

        tokens: their ids; the blocks that they complete are shared from now on. count: how many tokens, if their ids
            are unknown; then neither these nor any later tokens of this sequence are shared. group: as for ``extend``.
        ``SpecError`` for more tokens than are reserved.
        """
        if count is None and group is None:
            self._core.commit(self._id, None, -1, tokens)
        else:
            index = -1 if group is None else self._group(group)
            self._core.commit(self._id, committed_count("commit", tokens, count), index)

    def _group(self, group: int) -> int:
        return check_group("group", group, len(self._alloc.spec.groups))

    def step(self, n: int = 1, tokens: Tokens | None = None) -> None:
        """Do a decode step of one sequence in one call: commit all reserved tokens, then make room for ``n`` more.

        tokens: the ids of all tokens that are committed, a list or an array; without them they cannot be shared. Same
        effect as ``commit`` and ``extend``, except that an error changes nothing. ``Allocator.step`` does this for a
        whole batch.
        """
        self._core.step(self._id, n, tokens)

    def truncate(self, num_tokens: int) -> None:
        """Keep the first ``num_tokens`` tokens, as when draft tokens are rejected. Never needs memory.

        What is cut off counts as wrong: its blocks are evicted if no other sequence uses them. ``SpecError`` if some of
        them are pinned. To keep them cached, ``fork()`` first. A recurrent state is not restored.
        """
        self._core.truncate(self._id, check_count("num_tokens", num_tokens))

    def pin(self, num_tokens: int | None = None) -> Pin:
        """Return a pin of the whole blocks of the first ``num_tokens`` tokens (default: of all whose ids are known).

        They stay cached until ``unpin()``, whatever becomes of this sequence, and a prompt that begins with them finds
        all of them. ``SpecError`` if their ids are not known, if they fill no block, or if they could not be found even
        now: blocks that a sliding window needs are evicted, or a recurrent state has no snapshot there.
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
        """Override the eviction policy for blocks that lie whole in tokens ``[start, end)``, later blocks included.

        end: default the end of the sequence, however long it becomes.
        priority: 0 to 100. Blocks below 50 are evicted before all others, blocks above 50 after all others; 50 leaves
            the order to the policy.
        ttl: seconds from the block's release, after which the policy decides again; default never.
        After TensorRT-LLM's retention config.
        """
        first = check_size("start", start, 0)
        last = INT32_MAX if end is None else check_size("end", end, 0)
        seconds = math.inf if ttl is None else check_seconds("ttl", ttl)
        self._core.retain(self._id, first, last, check_count("priority", priority), seconds)

    def snapshot(self) -> None:
        """Copy the recurrent state, so that a sequence that begins with the same tokens can start from here.

        REQUIRES: all tokens are committed by their ids, at a multiple of the block size, and the spec has a component
        of fixed size; else ``SpecError``. The same if the state may be ahead of the tokens, as after ``truncate()``,
        and in a fork of a sequence that had reserved tokens: restore the state and go on; the next ``commit()``
        declares it right. ``OutOfMemory``, and nothing has changed, if there is no memory for the copy.
        """
        self._core.snapshot(self._id)

    def fork(self) -> Sequence:
        """Return a second sequence with the same committed tokens: it shares whole pages or blocks and copies the rest.

        ``OutOfMemory``, and nothing has changed, if there is no memory for the copy. Tokens that are reserved but not
        committed stay with the parent; a recurrent state is copied as it is, so it may include those tokens.
        """
        child = Sequence(self._alloc, NO_HANDLE)
        try:
            self._core.fork(self._id, child)
            return child
        except BaseException:
            child._discard()
            raise

    def free(self) -> None:
        """End the sequence. Published blocks stay cached, others become free; a row stays mapped (parked) for the next
        sequence. ``StaleHandle`` the second time.
        """
        self._core.free(self._id)

    def detach(self) -> int:
        """Return the handle, which the caller owns and frees from now on (``Allocator.free_batch``), as a socket's
        ``detach()``. This object gives no warning any more when it is collected as garbage.
        """
        self._lent = True
        return self._id

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of the tokens, each ``[num_tokens, heads, width]``; see ``Allocator.sequence_tensor``."""
        return self._alloc.sequence_tensor(self, layer, "k"), self._alloc.sequence_tensor(self, layer, "v")

    def _discard(self) -> None:
        """Free what a failed call has opened, unless it was freed before or never opened."""
        if self._id != NO_HANDLE and self._core.is_live(self._id):
            self._core.free(self._id)

    # Leaving the body frees the sequence unless the body has done so; the body's own exception is the one raised. Each
    # is a single call to C: a signal handler may raise inside a Python function, and a finaliser runs at any point.
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
        except KVMemError:  # in a forked child, or freed by another thread in between
            return f"Sequence({named})"
