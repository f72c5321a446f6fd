"""Digests that name a block of tokens and all blocks before it, equal in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import lcm
from typing import Final, TypeAlias, cast

import numpy as np

from kvmem.errors import SpecError
from kvmem.spec import CacheSpec

__all__ = [
    "DIGEST_BYTES",
    "ChainDigest",
    "ExtraKey",
    "Key",
    "block_digests",
    "decode_key",
    "encode_key",
    "key_marks",
    "keys_in",
    "tag_of_block",
]

DIGEST_BYTES: Final = 32

Key: TypeAlias = str | bytes | int | tuple["Key", ...] | None
"""The types of a salt or an extra key, as far as digests go."""

ExtraKey: TypeAlias = Key | Sequence[tuple[int, Key]]
"""A key, or pairs of a position and the key that applies from there on."""

AT_PLACEHOLDERS: Final = -1  # kAtPlaceholders in csrc/index/block_tags.h


class ChainDigest:
    """BLAKE2b with 256 bits: ``root(salt, adapter)`` first, then ``block(digest before, tokens, tag)`` for each block.

    The alternative in the standard library is SHA-256. BLAKE2b hashes a block of 16 tokens in two thirds of the time
    from a copied state, and has parameters for a secret key and for a domain.

    fingerprint: of the spec. key: a secret of up to 64 bytes; ``SpecError`` for a longer one.
    """

    def __init__(self, fingerprint: str, key: bytes = b"") -> None:
        if not isinstance(key, bytes) or len(key) > hashlib.blake2b.MAX_KEY_SIZE:
            raise SpecError(f"key: got {type(key).__name__}; must be bytes, {hashlib.blake2b.MAX_KEY_SIZE} at most")
        self._root = hashlib.blake2b(encode_key(fingerprint), digest_size=DIGEST_BYTES, key=key, person=b"kvmem root")
        self._block = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, person=b"kvmem block")

    def root(self, salt: Key, adapter: Key) -> bytes:
        """Return the digest from which all chains of this salt and adapter start."""
        state = self._root.copy()
        state.update(encode_key(salt) + encode_key(adapter))
        return state.digest()

    def block(self, before: bytes, tokens: bytes | memoryview, tag: bytes = b"") -> bytes:
        """Return the digest of a block.

        before: the digest of the block before it, or the root's. tokens: all ids of the block as little-endian int32.
        tag: the keys that begin in the block, as ``tag_of_block`` returns them.
        """
        state = self._block.copy()
        state.update(before)
        state.update(tokens)
        state.update(tag)
        return state.digest()


_DEEPEST, _MOST_BITS = 32, 8192


def encode_key(value: Key, depth: int = 0) -> bytes:
    """Return an encoding of type, length and content. Different values have different encodings, and none is a prefix
    of another.

    ``SpecError`` for other types, for ints of more than 8,192 bits and for tuples nested more than 32 deep, because
    these could not be decoded everywhere.
    """
    if isinstance(value, tuple):
        if depth == _DEEPEST:
            raise SpecError(f"got tuples nested more than {_DEEPEST} deep")
        kind, content = b"t", b"".join(encode_key(part, depth + 1) for part in value)
    elif isinstance(value, str):
        kind, content = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        kind, content = b"b", value
    elif value is None:
        kind, content = b"n", b""
    elif isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > _MOST_BITS:
            raise SpecError(f"got an int of {value.bit_length()} bits; the most is {_MOST_BITS}")
        kind, content = b"i", str(value).encode()
    else:
        raise SpecError(f"got {value!r}; a salt or an extra key is a str, bytes, an int, None or a tuple of these")
    return kind + len(content).to_bytes(8, "little") + content


def decode_key(encoded: bytes) -> Key:
    """Return the value that ``encode_key`` encoded."""
    value, rest = _decode(encoded)
    assert not rest
    return value


def _decode(data: bytes) -> tuple[Key, bytes]:
    end = 9 + int.from_bytes(data[1:9], "little")
    kind, content, rest = data[:1], data[9:end], data[end:]
    if kind == b"t":
        parts: list[Key] = []
        while content:
            part, content = _decode(content)
            parts.append(part)
        return tuple(parts), rest
    if kind == b"s":
        return content.decode("utf-8", "surrogatepass"), rest
    if kind == b"i":
        return int(content), rest
    return (None if kind in (b"n", b"") else content), rest  # empty: a sequence that was opened without keys


def key_marks(extra_key: ExtraKey) -> list[tuple[int, bytes]]:
    """Return the keys, encoded, with the positions at which they begin.

    A key without a position begins at the placeholders: its position is ``AT_PLACEHOLDERS``. ``SpecError`` for
    positions that are negative, descend or do not fit an int32.
    """
    if extra_key is None:
        return []
    if not _is_placed(extra_key):
        return [(AT_PLACEHOLDERS, encode_key(cast(Key, extra_key)))]
    marks = [(position, encode_key(key)) for position, key in cast("Sequence[tuple[int, Key]]", extra_key)]
    positions = [position for position, _ in marks]
    if positions != sorted(positions) or positions[0] < 0:
        raise SpecError(f"got positions {positions}; must be 0 or more, in ascending order")
    if positions[-1] >= 2**31:
        raise SpecError(f"got position {positions[-1]}; must be below 2147483648")
    return marks


def _is_placed(key: object) -> bool:
    return isinstance(key, (list, tuple)) and len(key) > 0 and all(
        isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int for pair in key
    )  # fmt: skip


def placed(marks: list[tuple[int, bytes]], ids: np.ndarray) -> list[tuple[int, bytes]]:
    """Return the marks of a prompt, with positions for those that begin at the placeholders.

    Placeholders begin where an id first occurs twice in a row; if no id does, at 0.
    """
    if not marks or marks[0][0] != AT_PLACEHOLDERS:
        return marks
    repeats = np.flatnonzero(ids[1:] == ids[:-1])
    return [(int(repeats[0]) if len(repeats) else 0, key) for _, key in marks]


def tag_of_block(marks: list[tuple[int, bytes]], first: int, size: int) -> bytes:
    """Return each key that begins in tokens [first, first + size), after its offset as 4 little-endian bytes."""
    return b"".join((at - first).to_bytes(4, "little") + key for at, key in marks if first <= at < first + size)


def keys_in(tag: bytes) -> tuple[Key, ...]:
    """Return the keys of a tag."""
    found = []
    while tag:
        key, tag = _decode(tag[4:])
        found.append(key)
    return tuple(found)


def block_digests(
    spec: CacheSpec,
    tokens: Sequence[int],
    *,
    salt: Key = None,
    extra_key: ExtraKey = None,
    adapter: str | None = None,
    key: bytes = b"",
    block_size: int | None = None,
) -> list[bytes]:
    """Return the digests of the full blocks of ``tokens``, 32 bytes each, as events name them.

    A router looks a prompt up by them. No allocator is needed.

    salt, extra_key, adapter: as in ``Allocator.sequence``. key: the secret of the stream (``event_key``).
    block_size: tokens of the events' blocks; by default that of an allocator of the spec, which is the least common
        multiple of the block sizes of its groups that grow by token.
    """
    digest = ChainDigest(spec.fingerprint, key)
    size = lcm(*(g.block_size for g in spec.groups if g.growth == "token")) if block_size is None else block_size
    ids = np.asarray(tokens, "<i4")
    marks = placed(key_marks(extra_key), ids)
    before, found = digest.root(salt, adapter), []
    for end in range(size, len(ids) + 1, size):
        tag = tag_of_block(marks, end - size, size) if marks else b""
        before = digest.block(before, ids[end - size : end].tobytes(), tag)
        found.append(before)
    return found
