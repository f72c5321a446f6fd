"""Whole sequences on disk: a session to resume, or a system prompt, in another process and on either backend."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

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

    def _open(self, alloc: Allocator, ids: np.ndarray | None) -> Sequence:
        """Return a sequence that starts with what is cached of the ids: of all, if there is room for a token more."""
        prompt = ids if ids is None or len(ids) >= alloc.max_tokens else np.append(ids, np.int32(0))
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
        for number, session in enumerate(todo):
            with ExitStack() as opened:
                ids = token_ids(session.tokens)
                sequence = session.sequence or opened.enter_context(session._open(alloc, ids))
                head, committed = _head_of(alloc, sequence, ids, identity), sequence.num_committed_tokens
                if session.sequence is None and not committed:
                    raise SpecError(f"sessions: nothing is cached of a prompt of {len(ids)} tokens")
                extra = {
                    "number": number, "committed": committed, "keys": session._keys(), "label": session.label,
                }  # fmt: skip
                kind = "prompt" if session.sequence is None else "session"
                write_record(file, head, read_sections(alloc, sequence, head), kind=kind, extra=extra)


def _head_of(alloc: Allocator, sequence: Sequence, ids: np.ndarray, identity: Identity) -> Head:
    """Return the head of a whole sequence. Its spans: what each group holds, a state as one token."""
    if (committed := sequence.num_committed_tokens) > len(ids):
        raise SpecError(f"tokens: got {len(ids)} ids of a session with {committed} committed tokens")
    spans = tuple(
        (0, 1) if group.growth == "fixed" else
        (alloc.core.first_token(sequence.id, index), alloc.core.committed(sequence.id, index))
        for index, group in enumerate(alloc.spec.groups)
    )  # fmt: skip
    return Head(alloc.spec, identity, ids, 0, digest_before(_NOTHING), is_exact(alloc, sequence), spans)


def load(alloc: Allocator, path: str | os.PathLike[str], *, identity: Identity) -> list[Session]:
    """Return the sessions of a file, each with a new sequence that holds its committed tokens; of a prompt, whose
    tokens are cached from now on, without one.

    A session goes on with ``session.tokens[session.sequence.num_committed_tokens :]``. What is cached already is
    shared, and what is loaded is found by other prompts, with two exceptions: a session whose KV is approximate
    (``compose``), and one of which a sliding window has dropped tokens.

    ``TierError``, with the reason, for a damaged file, another format version, and a file of another model, RoPE, rank
    or spec; ``OutOfMemory``. No sequence is open then. Cost: as ``save``.
    """
    done: list[Session] = []
    with ExitStack() as undo:
        with open_plain(path) as file:
            reader = Reader(file, os.fstat(file.fileno()).st_size, str(path))
            fields = reader.header()
            if fields["kind"] != "cache":
                raise reader.fail(f"holds a {fields['kind']}, not a cache: kvmem.chunks.read_chunk() reads it")
            reader.head(fields, alloc.spec, identity)
            for number in range(_int(reader, fields, "sessions")):
                done.append(_load_one(alloc, reader, identity, number))
                undo.enter_context(done[-1].sequence or nullcontext())
            if not reader.at_end:
                raise reader.fail("goes on after its last session")
        undo.pop_all()
    return done


def _int(reader: Reader, fields: dict[str, Any], name: str) -> int:
    value = fields["extra"].get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise reader.fail(f"the header has no {name}")
    return value


def _load_one(alloc: Allocator, reader: Reader, identity: Identity, number: int) -> Session:
    fields = reader.header()
    if _int(reader, fields, "number") != number:
        raise reader.fail(f"another session stands in place of number {number}")
    head, committed = reader.head(fields, alloc.spec, identity), _int(reader, fields, "committed")
    _check_spans(alloc, reader, head, committed)
    session, ids = _session_of(reader, fields, head), head.tokens[:committed]
    try:
        sequence = session._open(alloc, ids if head.exact else None)
    except SpecError as error:
        raise reader.fail(f"a session cannot be opened here: {error}") from error
    try:
        _fill(alloc, sequence, head, reader.sections(fields, head), ids)
    except BaseException:
        sequence.free()
        raise
    if fields["kind"] == "prompt":
        sequence.free()
        return session
    return replace(session, sequence=sequence)


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
