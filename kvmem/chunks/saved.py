"""Whole sequences on disk: a session to resume, or a system prompt, in another process and on either backend."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import lcm
from typing import IO, Any

import numpy as np
import torch

from kvmem.allocator import Allocator
from kvmem.allocator.prefix import Salt, Tokens, token_ids
from kvmem.allocator.sequence import Sequence
from kvmem.arguments import check_members
from kvmem.chunks.chunk import Head, commit, digest_before, is_exact, read_sections, write_sections
from kvmem.chunks.format import Reader, atomic_file, open_plain, write_record
from kvmem.errors import SpecError
from kvmem.events.digests import ExtraKey, decode_key, encode_key
from kvmem.spec import CacheSpec
from kvmem.tiers.keys import Identity

__all__ = ["Session", "load", "save"]

_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Session:
    """A sequence and what kvmem does not know of it; without a sequence, a prompt that is cached.

    tokens: the ids of the sequence's tokens, from its start on; further ones, such as a token that was sampled and is
    not computed yet, are kept with them. salt, adapter, extra_key, label: as given to ``Allocator.sequence``.
    """

    tokens: Tokens
    sequence: Sequence | None = None
    salt: Salt = None
    adapter: str | None = None
    extra_key: ExtraKey = None
    label: str | None = None

    def _keys(self) -> str:
        key = tuple(self.extra_key) if isinstance(self.extra_key, list) else self.extra_key
        return encode_key((self.salt, self.adapter, key)).hex()  # type: ignore[arg-type]

    def _open(self, alloc: Allocator, ids: np.ndarray) -> Sequence:
        """Return a sequence that starts with what is cached of the ids: of all, if there is room for a token more."""
        prompt = np.append(ids, np.int32(0)) if len(ids) < alloc.max_tokens else ids
        keys: Any = dict(salt=self.salt, adapter=self.adapter, extra_key=self.extra_key, label=self.label)
        return alloc.sequence(prompt, **keys)


def save(alloc: Allocator, path: str | os.PathLike[str], sessions: Iterable[Session], *, identity: Identity) -> None:
    """Write the committed tokens of sessions to a file: the whole file, or an error and the file is as it was.

    Every spec can be saved: recurrent states, cross attention, and of a sliding window what it holds. The file is
    readable for this user only; it holds the KV, ids, salts and keys in plain. ``SpecError`` for a session whose ids
    are fewer than its committed tokens, and for a prompt of which nothing is cached; ``TierError`` where the file
    system refuses. Cost: one pass over the bytes; one layer of one session is in host memory at a time.
    """
    todo = check_members("sessions", list(sessions), Session)
    with atomic_file(path) as file:
        start = Head(alloc.spec, identity, _NOTHING, 0, digest_before(_NOTHING))
        write_record(file, start, (), kind="cache", extra={"sessions": len(todo)})
        written: list[tuple[np.ndarray, str]] = []
        for session in todo:
            with ExitStack() as opened:
                sequence = session.sequence or opened.enter_context(session._open(alloc, token_ids(session.tokens)))
                _save_one(alloc, file, session, sequence, identity, written)


def _save_one(
    alloc: Allocator, file: IO[bytes], session: Session, sequence: Sequence, identity: Identity,
    written: list[tuple[np.ndarray, str]],
) -> None:  # fmt: skip
    """written: the ids and keys of the sessions before this one, which is added."""
    ids, committed, keys = token_ids(session.tokens), sequence.num_committed_tokens, session._keys()
    if committed > len(ids):
        raise SpecError(f"tokens: got {len(ids)} ids of a session with {committed} committed tokens")
    if session.sequence is None and not committed:
        raise SpecError(f"sessions: nothing is cached of a prompt of {len(ids)} tokens")
    exact = is_exact(alloc, sequence)
    after, skip = _longest(alloc.spec, written, ids[:committed], keys) if exact else (0, 0)
    written.append((ids[:committed] if exact else _NOTHING, keys))
    spans = tuple(_held(alloc, sequence, index, skip) for index in range(len(alloc.spec.groups)))
    head = Head(alloc.spec, identity, ids, 0, digest_before(_NOTHING), exact, spans)
    extra = {"committed": committed, "keys": keys, "label": session.label, "after": after, "skip": skip}
    kind = "prompt" if session.sequence is None else "session"
    write_record(file, head, read_sections(alloc, sequence, head), kind=kind, extra=extra)


def _longest(spec: CacheSpec, written: list[tuple[np.ndarray, str]], ids: np.ndarray, keys: str) -> tuple[int, int]:
    """Return the session in the file that begins most like these ids, and how many whole blocks' tokens both have."""
    best = (0, 0)
    if all(group.growth == "token" and group.window_tokens is None for group in spec.groups):
        unit = lcm(*(group.block_size for group in spec.groups))
        for index, (other, its_keys) in enumerate(written):
            most = min(len(ids), len(other)) if keys == its_keys else 0
            differ = np.flatnonzero(ids[:most] != other[:most])
            same = (int(differ[0]) if len(differ) else most) // unit * unit
            best = (index, same) if same > best[1] else best
    return best


def _held(alloc: Allocator, sequence: Sequence, index: int, skip: int) -> tuple[int, int]:
    """What is saved of a group: a state is one token."""
    if alloc.spec.groups[index].growth == "fixed":
        return 0, 1
    return max(skip, alloc.core.first_token(sequence.id, index)), alloc.core.committed(sequence.id, index)


def load(alloc: Allocator, path: str | os.PathLike[str], *, identity: Identity) -> list[Session]:
    """Return the sessions of a file, each with a new sequence that holds its committed tokens; of a prompt, whose
    tokens are cached from now on, without one.

    A session goes on with ``session.tokens[session.sequence.num_committed_tokens :]``. What is cached already is
    shared, and what is loaded is found by other prompts, with two exceptions: a session whose KV is approximate
    (``compose``), and one of which a sliding window has dropped tokens.

    ``TierError``, with the reason, for a damaged file, another format version, and a file of another model, RoPE, rank
    or spec; ``OutOfMemory``. No sequence is open then. Cost: as ``save``.
    """
    done: list[tuple[Session, Sequence]] = []
    with ExitStack() as undo:
        with open_plain(path) as file:
            reader = Reader(file, os.fstat(file.fileno()).st_size, str(path))
            fields = reader.header()
            if fields["kind"] != "cache":
                raise reader.fail(f"holds a {fields['kind']}, not a cache: kvmem.chunks.read_chunk() reads it")
            reader.head(fields, alloc.spec, identity)
            for _ in range(_int(reader, fields, "sessions")):
                done.append(_load_one(alloc, reader, identity, [sequence for _, sequence in done]))
                undo.enter_context(done[-1][1])
            if not reader.at_end:
                raise reader.fail("goes on after its last session")
        undo.pop_all()
    for session, sequence in done:
        if session.sequence is None:
            sequence.free()
    return [session for session, _ in done]


def _int(reader: Reader, fields: dict[str, Any], name: str, below: int = 2**31) -> int:
    value = fields["extra"].get(name)
    if type(value) is not int or not 0 <= value < below:
        raise reader.fail(f"the header has no {name}")
    return value


def _load_one(
    alloc: Allocator, reader: Reader, identity: Identity, earlier: list[Sequence]
) -> tuple[Session, Sequence]:
    fields = reader.header()
    head, committed = reader.head(fields, alloc.spec, identity), _int(reader, fields, "committed")
    _check_spans(alloc, reader, head, committed)
    session = _session_of(reader, fields, head)
    skip = _int(reader, fields, "skip")
    before = earlier[_int(reader, fields, "after", len(earlier))] if skip else None
    sequence = _opened(alloc, reader, session, head.tokens[:committed], before, skip)
    try:
        _fill(alloc, sequence, head, reader.sections(fields, head), head.tokens[:committed])
    except BaseException:
        sequence.free()
        raise
    return (session if fields["kind"] == "prompt" else replace(session, sequence=sequence)), sequence


def _opened(
    alloc: Allocator, reader: Reader, session: Session, ids: np.ndarray, before: Sequence | None, skip: int
) -> Sequence:
    """Return a sequence that has the first ``skip`` tokens: cached, or else in common with the session before it."""
    try:
        sequence = session._open(alloc, ids)
    except SpecError as error:
        raise reader.fail(f"a session cannot be opened here: {error}") from error
    if before is None or sequence.num_committed_tokens >= skip:
        return sequence
    sequence.free()
    if before.num_committed_tokens < skip:
        raise reader.fail("a session begins with more tokens than the one before it has")
    sequence = before.fork()
    sequence.truncate(skip)
    if session.label is not None:
        alloc._label(sequence.id, session.label)
    return sequence


def _fill(alloc: Allocator, sequence: Sequence, head: Head, sections: Iterator[torch.Tensor], ids: np.ndarray) -> None:
    """Write and commit what the sequence does not have yet."""
    cached = sequence.num_committed_tokens
    sequence.extend(len(ids) - cached)
    prefill = [(i, head.span(i)[1]) for i, group in enumerate(alloc.spec.groups) if group.growth == "prefill"]
    for index, count in prefill:
        sequence.extend(count, group=index)
    write_sections(alloc, alloc.batch([sequence]), head, sections)
    for index, count in prefill:
        sequence.commit(count=count, group=index)
    if head.exact and any(first > cached for first, _ in head.spans or ()):
        sequence.commit(count=len(ids) - cached)  # what the window has dropped would be found by other prompts
    else:
        commit(alloc, sequence, ids[cached:], head.exact)


def _check_spans(alloc: Allocator, reader: Reader, head: Head, committed: int) -> None:
    """``TierError`` unless the header's spans are those of a sequence of this spec."""
    good = head.spans is not None and committed <= len(head.tokens)
    for (first, end), group in zip(head.spans or (), alloc.spec.groups, strict=False):
        if group.growth == "fixed":
            good = good and (first, end) == (0, 1)
        elif group.growth == "prefill":
            good = good and first == 0
        else:
            good = good and end == committed
    if not good:
        raise reader.fail("the header's spans are not those of a sequence")


def _session_of(reader: Reader, fields: dict[str, Any], head: Head) -> Session:
    keys: Any
    try:
        keys = decode_key(bytes.fromhex(fields["extra"]["keys"]))
        salt, adapter, extra_key = keys
        label = fields["extra"]["label"]
    except (AssertionError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise reader.fail(f"the session's keys make no sense: {error}") from error
    return Session(head.tokens, None, salt, adapter, extra_key, label)
