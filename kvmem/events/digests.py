"""Names for blocks of tokens that mean the same in every process: a digest of the block and of all before it."""

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
"""What a salt or an extra key may be, as far as digests go."""

ExtraKey: TypeAlias = Key | Sequence[tuple[int, Key]]
"""A key, or keys with the positions from which on they count."""

AT_PLACEHOLDERS: Final = -1  # kAtPlaceholders in csrc/index/block_tags.h


class ChainDigest:
    """BLAKE2b, 256 bits: ``root(fingerprint, salt, adapter)``, then ``block(digest before, tokens, tag)`` in a chain.

    Of the two in the standard library that would do, SHA-256 and this: a copy of a prepared state hashes a block of 16
    tokens in two thirds of the time, and it has a key and a domain of its own built in.
    """

    def __init__(self, fingerprint: str, key: bytes = b"") -> None:
        if not isinstance(key, bytes) or len(key) > hashlib.blake2b.MAX_KEY_SIZE:
            raise SpecError(f"key: got {type(key).__name__}; must be bytes, {hashlib.blake2b.MAX_KEY_SIZE} at most")
        self._root = hashlib.blake2b(encode_key(fingerprint), digest_size=DIGEST_BYTES, key=key, person=b"kvmem root")
        self._block = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, person=b"kvmem block")

    def root(self, salt: Key, adapter: Key) -> bytes:
        state = self._root.copy()
        state.update(encode_key(salt) + encode_key(adapter))
        return state.digest()

    def block(self, before: bytes, tokens: bytes | memoryview, tag: bytes = b"") -> bytes:
        """tokens: int32, little-endian, of a whole block. tag: the keys that begin in it, ``tag_of_block``."""
        state = self._block.copy()
        state.update(before)
        state.update(tokens)
        state.update(tag)
        return state.digest()


_DEEPEST, _MOST_BITS = 32, 8192


def encode_key(value: Key, depth: int = 0) -> bytes:
    """No two values have the same encoding, nor does one begin with another's: type, length, content. ``SpecError`` for
    other types, ints of more than 8,192 bits and tuples nested more than 32 deep, which could not all be read again.
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
    """What ``encode_key`` was given."""
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
    return (None if kind in (b"n", b"") else content), rest  # nothing at all: opened without keys


def key_marks(extra_key: ExtraKey) -> list[tuple[int, bytes]]:
    """The positions at which keys begin, and the keys, encoded. A key without one begins at the placeholders."""
    if extra_key is None:
        return []
    if not _is_placed(extra_key):
        return [(AT_PLACEHOLDERS, encode_key(cast(Key, extra_key)))]
    marks = [(position, encode_key(key)) for position, key in cast("Sequence[tuple[int, Key]]", extra_key)]
    positions = [position for position, _ in marks]
    if positions != sorted(positions) or positions[0] < 0:
        raise SpecError(f"got positions {positions}; must be 0 or more, and none before the one that comes first")
    if positions[-1] >= 2**31:
        raise SpecError(f"got position {positions[-1]}; must be below 2147483648")
    return marks


def _is_placed(key: object) -> bool:
    return isinstance(key, (list, tuple)) and len(key) > 0 and all(
        isinstance(pair, tuple) and len(pair) == 2 and type(pair[0]) is int for pair in key
    )  # fmt: skip


def placed(marks: list[tuple[int, bytes]], ids: np.ndarray) -> list[tuple[int, bytes]]:
    """The marks of a prompt: those at the placeholders stand where an id first stands twice in a row, or else at 0."""
    if not marks or marks[0][0] != AT_PLACEHOLDERS:
        return marks
    repeats = np.flatnonzero(ids[1:] == ids[:-1])
    return [(int(repeats[0]) if len(repeats) else 0, key) for _, key in marks]


def tag_of_block(marks: list[tuple[int, bytes]], first: int, size: int) -> bytes:
    """The keys that begin in tokens [first, first + size), each after its place there: 4 bytes, little-endian."""
    return b"".join((at - first).to_bytes(4, "little") + key for at, key in marks if first <= at < first + size)


def keys_in(tag: bytes) -> tuple[Key, ...]:
    """The keys of a tag."""
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
    """The digests of the full blocks of ``tokens``, as events name them: what a router looks up for a prompt.

    salt, extra_key, adapter: as ``Allocator.sequence``. block_size: of the events; default that of an allocator of the
        spec, the least common multiple of the block sizes of its groups that grow with the tokens. No allocator is
        needed.
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
