"""Shared prefixes: token ids, salts and keys of a prompt, and the calls that find, pin and evict what is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, cast

import numpy as np
import torch

from kvmem import _core
from kvmem.allocator.opening import OpenedCore
from kvmem.allocator.tiers.search import count_below
from kvmem.arguments import check_choice, check_count, check_size, has_bool
from kvmem.errors import KVMemError, SpecError, StaleHandle
from kvmem.events import Event
from kvmem.events.digests import ExtraKey, encode_key, key_marks

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "ContentCalls",
    "Pin",
    "PrefixMatch",
    "Reason",
    "Salt",
    "Tokens",
    "committed_count",
    "committed_ids",
    "encode_keys",
    "token_ids",
]

#: Token ids, one-dimensional: 0 to 2**31 - 1.
Tokens: TypeAlias = Sequence[int] | np.ndarray | torch.Tensor
#: The name of a tenant; None is a salt of its own.
Salt: TypeAlias = str | bytes | None

#: Why a match is not longer, in the order of ``MatchEnd`` in csrc/allocator/match.h.
Reason: TypeAlias = Literal[
    "complete", "shorter than a block", "other salt", "evicted", "no snapshot", "window passed", "never seen", "off",
    "block sizes",
]  # fmt: skip


_NO_KEYS = encode_key(None), encode_key(None)


@dataclass(frozen=True)
class PrefixMatch:
    """How much of a prompt is cached.

    num_tokens: how many tokens ``Allocator.sequence()`` would find cached now; at least one is always left to compute.
    reason: why it is not more.
    by_tier: with ``tiers=``, how many of them are found on the device and in host memory, ``{"device": n, "host": m}``;
        with ``match(load="all")`` also by the name of each lower tier. A block counts for the farthest place of its
        groups. With sliding windows the sequence may find a part of one more block.
    missing: with ``match(load="all")``, what no tier has, in words; ``""`` if nothing is missing.

    =======================  ========================================================================================
    "complete"               no more tokens could be found
    "shorter than a block"   fewer tokens than a block are left
    "other salt"             more is cached under another salt or extra key
    "evicted"                more was cached and has been evicted (known for the last thousands of blocks)
    "no snapshot"            the spec has a state of fixed size, and there is no snapshot further on
    "window passed"          a sliding window needs blocks that are gone
    "never seen"             these tokens were not cached before
    "off"                    the allocator was made with ``prefix_cache=False``
    "block sizes"            the spec's groups have no common multiple of block sizes of at most 4,096 tokens
    =======================  ========================================================================================
    """

    num_tokens: int
    reason: Reason
    by_tier: Mapping[str, int] = field(default_factory=dict)
    missing: str = ""


def token_ids(tokens: Tokens) -> npt.NDArray[np.int32]:
    """Return token ids as a contiguous int32 [n], without a copy if they are that already; ``SpecError`` otherwise."""
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
    """Return the ids that ``verb`` was given.

    An int is refused: read as a count it would turn sharing off, although the id of a single token may be meant.
    """
    if tokens is None:
        raise SpecError(f"tokens: missing; {verb} takes token ids, or {verb}(count=n) if they are unknown")
    if isinstance(tokens, (int, np.integer)) and not isinstance(tokens, bool):
        raise SpecError(
            f"tokens: got {tokens}; {verb} takes ids, [{tokens}] for one; a count is {verb}(count={tokens})"
        )
    return token_ids(tokens)


def committed_count(verb: str, tokens: Tokens | None, count: int | None) -> int:
    """Return how many tokens ``verb`` was given, by their ids or by a count. ``SpecError`` unless by one of the two."""
    if count is None:
        return len(committed_ids(verb, tokens))
    if tokens is not None:
        raise SpecError(f"tokens and count={count!r}: {verb} takes one of them; the ids say how many they are")
    return check_count("count", check_size("count", count, 0))


def encode_keys(salt: Salt, extra_key: ExtraKey, adapter: str | None = None) -> tuple[bytes, bytes]:
    """Return two byte strings for the core, which compares bytes: the salt; and the adapter, then the extra keys with
    their positions (``csrc/index/block_tags.h``). None, the default, is a value of its own for each of them.
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

    num_tokens: how many tokens from the start are pinned, a multiple of the block size (``CacheSpec.block_size`` says
        which multiple if the groups' block sizes differ).
    """

    __slots__ = ("_core", "_id", "num_tokens")

    def __init__(self, core: _core.Allocator, pin: int, num_tokens: int) -> None:
        self._core = core
        self._id = pin
        self.num_tokens = num_tokens

    def unpin(self) -> None:
        """End the pin: its blocks may be evicted like any other. ``StaleHandle`` the second time."""
        self._core.unpin(self._id)

    def _discard(self) -> None:
        """Unpin what a failed call has pinned, since its caller gets an exception instead of this object."""
        if self._id:
            self._core.unpin(self._id)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.unpin()
        except StaleHandle:  # the body has unpinned it
            pass
        except KVMemError:
            if kind is None:
                raise

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SpecError(f"{self!r}: a pin keeps memory of this process, and is not pickled or copied; pin again")

    def __repr__(self) -> str:
        return f"Pin({self.num_tokens} tokens)"


class ContentCalls(OpenedCore):
    """The calls of an allocator about cached blocks."""

    def match(
        self,
        tokens: Tokens,
        *,
        salt: Salt = None,
        extra_key: ExtraKey = None,
        adapter: str | None = None,
        load: Literal["host", "all"] = "host",
    ) -> PrefixMatch:
        """Return how much of ``tokens`` is cached, and why not more. Changes nothing, not even what is evicted next.

        load: ``"all"`` also asks lower tiers, and waits for their answers as long as each tier's own limits allow; a
            tier that gives none has nothing. No other call that decides waits for a tier, nor does ``"host"``.
        """
        check_choice("load", load, ("host", "all"))
        salted, keyed = encode_keys(salt, extra_key, adapter)
        found, reason = self.core.match(tokens, salted, keyed)
        if self._tiering is None:
            return PrefixMatch(found, cast(Reason, reason))
        ids = token_ids(tokens)
        prompt = self._tiering.prompt(ids, (salted, keyed), salt, extra_key, adapter, 1)
        both = self._tiering.reach(prompt.num_blocks, self._tiering.locate(prompt).has) * self._tiering.block_size
        total = max(found, both)
        if total > found and prompt.num_blocks * self._tiering.block_size == total:
            reason = "complete" if total == len(ids) - 1 else "shorter than a block"
        near = PrefixMatch(total, cast(Reason, reason), {"device": found, "host": total - found})
        if load == "host":
            return near
        more, missing = count_below(self._tiering, prompt, total)
        total += sum(more.values())
        by_tier = {place: count + near.by_tier.get(place, 0) for place, count in more.items()}
        if missing == "":
            reason = "complete" if total == len(ids) - 1 else "shorter than a block"
        return PrefixMatch(total, cast(Reason, reason), by_tier, missing)

    def pin(self, tokens: Tokens, *, salt: Salt = None, extra_key: ExtraKey = None, adapter: str | None = None) -> Pin:
        """Return a pin of the whole blocks of ``tokens`` (a system prompt): they stay cached until ``unpin()``, and a
        prompt that begins with them always finds them. ``SpecError`` if one of them is not cached now, or if the tokens
        fill no block.
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
        """Return the active pins in the order in which they were made, also those whose ``Pin`` object is lost."""
        return [Pin(self.core, pin, num_tokens) for pin, num_tokens in self.core.pins()]

    def clear_cache(self) -> int:
        """Evict all cached content that no sequence or pin uses; return how many blocks. Their memory stays parked.

        Blocks of live sequences that are out of window are evicted too. With ``tiers=``, host memory is cleared as
        well; lower tiers keep what they have.

        Other threads' calls may run after each 1,024 blocks, as in ``trim()`` and ``set_memory()``; what they cache
        meanwhile is evicted as well. An error leaves evicted what was evicted before it.
        """
        evicted = self.core.clear_cache()
        if self._tiering is not None:
            self._tiering.clear()
        return evicted

    def events(self, max_events: int | None = None, *, restart: bool = False) -> list[Event]:
        """Return what was cached and evicted since the last call (``docs/events.md``), at most ``max_events`` events.

        restart: begin again with all that is cached now, for a subscriber that begins late. Empty unless the allocator
        was made with ``events=``.
        """
        self.core.check_usable()
        if self._events is None or self._tiering is None:  # each in one expression: a signal then loses no event
            return [] if self._events is None else self._events.poll(max_events, restart=restart)
        found = self._events.poll(max_events, restart=restart)
        if max_events is not None and len(found) == max_events:
            return found
        return found + self._tiering.take_events(restart=restart)
