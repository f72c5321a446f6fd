"""A handle for one request's tokens."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvmem.arrays import check_count
from kvmem.errors import OutOfMemory, SpecError

if TYPE_CHECKING:
    from kvmem.allocator import Allocator

__all__ = ["Sequence", "count_tokens"]


def count_tokens(tokens: int | Tokens[int] | np.ndarray | torch.Tensor) -> int:
    """How many tokens: an int counts them, anything else lists their ids, which must be integers from 0 on."""
    if isinstance(tokens, (int, np.integer)) and not isinstance(tokens, bool):
        if tokens < 0:
            raise SpecError(f"tokens: got {tokens}; a count is 0 or more")
        return int(tokens)
    try:
        ids = np.asarray(tokens)
    except (TypeError, ValueError) as error:
        raise SpecError(f"tokens: got {type(tokens).__name__}; must be a count or a flat list of token ids") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise SpecError(
            f"tokens: got shape {ids.shape} of {ids.dtype}; must be a count or a flat list of integer token ids"
        )
    if ids.size and ids.min() < 0:
        raise SpecError(f"tokens: got the id {ids.min()}; token ids are 0 or more")
    return int(ids.size)


class Sequence:
    """One request's tokens in an allocator. Made by ``Allocator.sequence()`` and ``fork()``; a context manager that
    frees it.

    A token is first *reserved* by ``extend``, which makes room and nothing else; the model then writes its KV;
    ``commit`` says that it is valid. ``num_committed_tokens <= num_tokens``.
    """

    __slots__ = ("_alloc", "_id", "num_cached_tokens")

    def __init__(self, alloc: Allocator, handle: int, num_cached_tokens: int = 0) -> None:
        self._alloc = alloc
        self._id = handle
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
    def num_tokens(self) -> int:
        """Tokens reserved, committed ones included."""
        return self._alloc.core.tokens(self._id)

    @property
    def num_committed_tokens(self) -> int:
        """Tokens whose KV is valid."""
        return self._alloc.core.committed(self._id)

    def extend(self, n: int, *, group: int | None = None) -> None:
        """Makes room for ``n`` more tokens. ``OutOfMemory``, and nothing changed, when there is none.

        Costs no driver call while the row or the blocks at hand suffice. ``group`` names a group that is fixed after
        prefill (cross attention), which grows by its own count, once.
        """
        self._alloc.core.extend(self._id, check_count("n", n), -1 if group is None else check_count("group", group))

    def try_extend(self, n: int, *, group: int | None = None) -> bool:
        """As ``extend``, but False instead of ``OutOfMemory``."""
        try:
            self.extend(n, group=group)
        except OutOfMemory:
            return False
        return True

    def commit(self, tokens: int | Tokens[int] | np.ndarray | torch.Tensor, *, group: int | None = None) -> None:
        """The KV of the next ``tokens`` (their ids, or how many) is written. Sliding windows move on."""
        index = -1 if group is None else check_count("group", group)
        self._alloc.core.commit(self._id, check_count("tokens", count_tokens(tokens)), index)

    def truncate(self, num_tokens: int) -> None:
        """Keeps the first ``num_tokens`` tokens, as when draft tokens are rejected. Never needs memory."""
        self._alloc.core.truncate(self._id, check_count("num_tokens", num_tokens))

    def fork(self) -> Sequence:
        """A second sequence with the same committed tokens: whole pages or blocks are shared, the cut one is copied.

        ``OutOfMemory``, and nothing changed, when there is no room for the copy. What is reserved but not committed
        stays with the parent.
        """
        return Sequence(self._alloc, self._alloc.core.fork(self._id))

    def free(self) -> None:
        """Gives everything back; a row stays mapped (parked) for the next sequence. Twice is a ``StaleHandle``."""
        self._alloc.core.free(self._id)

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the tokens held, ``[num_tokens, heads, width]``; see ``Allocator.sequence_tensor``."""
        return self._alloc.sequence_tensor(self, layer, "k"), self._alloc.sequence_tensor(self, layer, "v")

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def __repr__(self) -> str:
        return f"Sequence(id={self._id})"
