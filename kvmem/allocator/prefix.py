"""What callers say and learn about shared prefixes: token ids, salts, matches, pins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

import numpy as np
import torch

from kvmem import _core
from kvmem.arguments import check_count, check_size, has_bool
from kvmem.errors import KVMemError, SpecError, StaleHandle
from kvmem.events.digests import ExtraKey, encode_key, key_marks

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "Pin",
    "PrefixMatch",
    "Reason",
    "Tokens",
    "committed_count",
    "committed_ids",
    "encode_keys",
    "token_ids",
]

Tokens: TypeAlias = Sequence[int] | np.ndarray | torch.Tensor

#: Why a match is not longer, in the order of ``MatchEnd`` in csrc/allocator/match.h.
Reason: TypeAlias = Literal[
    "complete", "shorter than a block", "other salt", "evicted", "no snapshot", "window passed", "never seen", "off",
    "block sizes",
]  # fmt: skip


_NO_KEYS = encode_key(None), encode_key(None)


@dataclass(frozen=True)
class PrefixMatch:
    """How much of a prompt is cached.

    num_tokens: what ``Allocator.sequence()`` would start with now; at least one token is always left to compute.
    reason: why it is not more. ``"complete"``: nothing else could be; ``"shorter than a block"``: fewer tokens than a
        block are left; ``"other salt"``: another salt or extra key has more; ``"evicted"``: it was cached and given up
        (remembered for the last thousands of blocks); ``"no snapshot"``: the model has a state of fixed size, and none
        was kept further on; ``"window passed"``: a sliding window needs blocks that are gone; ``"never seen"``;
        ``"off"``: this allocator shares nothing; ``"block sizes"``: nor does this one, since the block sizes of the
        spec's groups have no common multiple of at most 4,096 tokens.
    """

    num_tokens: int
    reason: Reason


def token_ids(tokens: Tokens) -> npt.NDArray[np.int32]:
    """Token ids as int32 [n], contiguous, without a copy where they are that already. ``SpecError`` otherwise."""
    if isinstance(tokens, np.ndarray) and tokens.dtype == np.int32 and tokens.ndim == 1:
        return np.ascontiguousarray(tokens)
    if isinstance(tokens, (str, bytes)):
        raise SpecError(f"tokens: got {type(tokens).__name__}; must be a flat list of integer token ids")
    if isinstance(tokens, torch.Tensor) and tokens.device.type == "meta":
        raise SpecError('tokens: got a tensor on device "meta", which holds no ids; give those of the prompt')
    try:
        ids = tokens.detach().cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"tokens: got {type(tokens).__name__}; must be a flat list of integer token ids") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu") or has_bool(tokens):
        raise SpecError(f"tokens: got {ids.dtype} of shape {ids.shape}; must be a flat list of integer token ids")
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise SpecError(f"tokens: got ids from {ids.min()} to {ids.max()}; they must be 0 or more and fit an int32")
    return np.ascontiguousarray(ids, np.int32)


def committed_ids(verb: str, tokens: Tokens | None) -> npt.NDArray[np.int32]:
    """The ids that ``verb`` was given. A bare count is refused: taken for one it would turn sharing off, where the id
    of a single token was meant.
    """
    if tokens is None:
        raise SpecError(f"tokens: missing; {verb} takes token ids, or {verb}(count=n) where nobody knows them")
    if isinstance(tokens, (int, np.integer)) and not isinstance(tokens, bool):
        raise SpecError(
            f"tokens: got {tokens}; {verb} takes ids, [{tokens}] for one; a count is {verb}(count={tokens})"
        )
    return token_ids(tokens)


def committed_count(verb: str, tokens: Tokens | None, count: int | None) -> int:
    """How many tokens ``verb`` was given, by their ids or by a count. ``SpecError`` unless by one of them."""
    if count is None:
        return len(committed_ids(verb, tokens))
    if tokens is not None:
        raise SpecError(f"tokens and count={count!r}: {verb} takes one of them; the ids say how many they are")
    return check_count("count", check_size("count", count, 0))


def encode_keys(salt: str | bytes | None, extra_key: ExtraKey, adapter: str | None = None) -> tuple[bytes, bytes]:
    """For the core, which compares bytes. ``None`` is the salt, the adapter and the extra key of all who give none.

    The second is the adapter, which a chain belongs to as to its salt, and behind it the extra keys with their
    positions (``csrc/index/block_tags.h``).
    """
    if salt is None and extra_key is None and adapter is None:
        return _NO_KEYS
    if not isinstance(salt, (str, bytes, NoneType)):
        raise SpecError(f"salt: got {type(salt).__name__}; must be str, bytes or None")
    if not isinstance(adapter, (str, NoneType)):
        raise SpecError(f"adapter: got {type(adapter).__name__}; must be str or None")
    try:
        marks = key_marks(extra_key)
    except SpecError as error:
        raise SpecError(f"extra_key: {error}") from error
    return encode_key(salt), encode_key(adapter) + b"".join(
        at.to_bytes(8, "little", signed=True) + key for at, key in marks
    )


class Pin:
    """Keeps blocks cached until ``unpin()``; a context manager. Made by ``pin()`` of an allocator or a sequence.

    num_tokens: how many tokens from the start are kept, a multiple of the block size (``CacheSpec.block_size`` says of
        which, where groups have several).
    """

    __slots__ = ("_core", "_id", "num_tokens")

    def __init__(self, core: _core.Allocator, pin: int, num_tokens: int) -> None:
        self._core = core
        self._id = pin
        self.num_tokens = num_tokens

    def unpin(self) -> None:
        """The blocks are cached like any other again. Twice is a ``StaleHandle``."""
        self._core.unpin(self._id)

    def _discard(self) -> None:
        """Unpins what a call has pinned for a caller that gets an exception instead."""
        if self._id:
            self._core.unpin(self._id)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.unpin()
        except StaleHandle:  # its body did
            pass
        except KVMemError:
            if kind is None:
                raise

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SpecError(f"{self!r}: a pin keeps memory of this process, and is not pickled or copied; pin again")

    def __repr__(self) -> str:
        return f"Pin({self.num_tokens} tokens)"
