"""Chunks as files and as blobs: a plain header, then sections of raw bytes, each with its checksum.

``docs/format.md`` gives the fields. A reader believes a section only if the header is that of the cache it reads for,
and if index, length and checksum of the section are right under this header. What it allocates, the file has.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch

from kvmem.chunks.chunk import Chunk, Head, sections_of
from kvmem.chunks.codecs import codec_named
from kvmem.errors import SpecError, TierError
from kvmem.spec import CacheSpec
from kvmem.tiers.checksum import checksum
from kvmem.tiers.keys import Identity

__all__ = [
    "MAGIC", "VERSION", "ChunkFile", "Reader", "atomic_file", "blob_of", "chunk_in", "read_chunk", "write_chunk",
    "write_record",
]  # fmt: skip

MAGIC: Final = b"kvmemchk"
VERSION: Final = 1
MOST_HEADER_BYTES: Final = 1 << 16

_START: Final = struct.Struct("<8sII16s")  # magic, version, bytes of the header, checksum of these and the header
_FRAME: Final = struct.Struct("<Q16s16s")  # bytes of a section, its checksum; that of header, index and these two
FRAME_BYTES: Final = _FRAME.size
#: The fields of a header and their types. Digests are hex.
_FIELDS: Final = {
    "kind": str, "spec": str, "model": str, "rope": str, "rank": int, "ranks": int, "tokens": int, "position": int,
    "before": str, "exact": bool, "codec": str, "spans": list, "extra": dict,
}  # fmt: skip


# --- write ---


def write_record(
    file: IO[bytes], head: Head, sections: Iterable[torch.Tensor], *, codec: str = "none", kind: str = "chunk",
    extra: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write head and sections to a file, one section at a time. extra: further fields, of JSON's types."""
    coder, me = codec_named(codec), head.identity
    fields = {
        "kind": kind, "spec": head.spec.fingerprint, "model": me.model, "rope": me.rope, "rank": me.rank,
        "ranks": me.ranks, "tokens": len(head.tokens), "position": head.position, "before": head.before.hex(),
        "exact": head.exact and coder.exact, "codec": coder.name, "spans": [list(span) for span in head.spans or ()],
        "extra": extra or {},
    }  # fmt: skip
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    if len(text) > MOST_HEADER_BYTES:
        raise SpecError(f"header: got {len(text)} bytes; names and keys must fit {MOST_HEADER_BYTES} together")
    start = _START.pack(MAGIC, VERSION, len(text), b"")[:16]
    seal = checksum(start + text)
    file.write(start + seal + text)
    _write_section(file, seal, 0, head.tokens.astype("<i4", copy=False).view(np.uint8).data)
    for index, data in enumerate(sections, 1):
        section = sections_of(head.spec)[index - 1]
        _write_section(file, seal, index, coder.encode(data, head.places(section)))


def _write_section(file: IO[bytes], seal: bytes, index: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    total = checksum(view)
    file.write(_FRAME.pack(len(view), total, _frame_seal(seal, index, len(view), total)))
    file.write(view)


def _frame_seal(seal: bytes, index: int, length: int, total: bytes) -> bytes:
    return checksum(seal + struct.pack("<IQ", index, length) + total)


# --- read ---


class Reader:
    """Reads records one after the other. ``TierError``, with the reason, for what is not as it was written."""

    def __init__(self, file: IO[bytes], size: int, name: str) -> None:
        """size: of the file in bytes. name: what errors call it."""
        self._file, self._left, self._name = file, size, name
        self._seal, self._index = b"", 0

    def fail(self, why: str) -> TierError:
        """Return the error for this file."""
        return TierError(f"{self._name}: {why}")

    @property
    def at_end(self) -> bool:
        """Whether nothing is left."""
        return self._left == 0

    def header(self) -> dict[str, Any]:
        """Return the fields of the next record's header."""
        magic, version, length, seal = _START.unpack(self._take(_START.size, "header"))
        if magic != MAGIC:
            raise self.fail("this is no chunk or cache of kvmem")
        if version != VERSION:
            raise self.fail(f"has format version {version}, and this kvmem reads version {VERSION}")
        if length > MOST_HEADER_BYTES:
            raise self.fail(f"the header claims {length} bytes, and has {MOST_HEADER_BYTES} at most")
        text = bytes(self._take(length, "header"))
        if checksum(_START.pack(MAGIC, VERSION, length, b"")[:16] + text) != seal:
            raise self.fail("the header's checksum is wrong")
        self._seal, self._index = seal, 0
        try:
            fields: dict[str, Any] = json.loads(text)
            good = {name: type(value) for name, value in fields.items()} == _FIELDS
        except (ValueError, AttributeError, RecursionError):
            good = False
        if not good:
            raise self.fail("the header has other fields than this version's")
        return fields

    def head(self, fields: dict[str, Any], spec: CacheSpec, identity: Identity) -> Head:
        """Return the head of fields and ids, the record's first section; ``TierError`` if it is another cache's."""
        for name in ("model", "rope", "rank", "ranks"):
            if fields[name] != (value := getattr(identity, name)):
                raise self.fail(f"{name}: was written for {fields[name]!r}, and is read for {value!r}")
        if fields["spec"] != spec.fingerprint:
            raise self.fail(
                f"spec: was written with another CacheSpec, of fingerprint {fields['spec'][:12]}..., than "
                f"{spec.fingerprint[:12]}...: make the allocator with that one's layers, widths, dtypes and block size"
            )
        ids = np.frombuffer(self.section(fields["tokens"] * 4).numpy(), "<i4").astype(np.int32, copy=False)
        try:
            spans = _checked_spans(fields, len(spec.groups))
            before = bytes.fromhex(fields["before"])
        except (TypeError, ValueError) as error:
            raise self.fail(f"the header's positions or digest make no sense: {error}") from error
        return Head(spec, identity, ids, fields["position"], before, fields["exact"], spans)

    def section(self, length: int | None = None) -> torch.Tensor:
        """Return the bytes of the next section. length: what it must have; None: any."""
        index, self._index = self._index, self._index + 1
        found, total, seal = _FRAME.unpack(self._take(FRAME_BYTES, f"section {index}"))
        if seal != _frame_seal(self._seal, index, found, total):
            raise self.fail(f"section {index}: the checksum of its length is wrong")
        if length is not None and found != length:
            raise self.fail(f"section {index}: has {found} bytes, and {length} belong there")
        data = self._take(found, f"section {index}")
        if checksum(data) != total:
            raise self.fail(f"section {index}: its checksum is wrong")
        return torch.frombuffer(data, dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)

    def sections(self, fields: dict[str, Any], head: Head) -> Iterator[torch.Tensor]:
        """Yield the decoded sections of the record, one at a time."""
        try:
            coder = codec_named(fields["codec"])
        except SpecError as error:
            raise self.fail(str(error)) from error
        for section in sections_of(head.spec):
            places = head.places(section)
            data = self.section(head.bytes_of(section) if coder.name == "none" else None)
            try:
                yield coder.decode(data, places)
            except ValueError as error:
                raise self.fail(f"section {self._index - 1}: {error}") from error

    def _take(self, length: int, what: str) -> bytearray:
        if length > self._left:
            raise self.fail(f"{what}: is cut off, {self._left} of {length} bytes are there")
        data, got = bytearray(length), 0
        try:
            while got < length and (more := self._file.readinto(memoryview(data)[got:])):  # type: ignore[attr-defined]
                got += more
        except OSError as error:
            raise self.fail(f"{what}: {error}") from error
        if got != length:
            raise self.fail(f"{what}: is cut off, {got} of {length} bytes were read")
        self._left -= length
        return data


def _checked_spans(fields: dict[str, Any], groups: int) -> tuple[tuple[int, int], ...] | None:
    """Return the spans, None if there are none; ``TypeError`` or ``ValueError`` for positions that cannot be."""
    spans = tuple((first, end) for first, end in fields["spans"])
    if any(type(n) is not int or not 0 <= n < 2**31 for n in (fields["position"], *chain(*spans))):
        raise ValueError("a position is from 0 to 2**31 - 1")
    if spans and (len(spans) != groups or any(first > end for first, end in spans)):
        raise ValueError("a span for each group, from its first token on")
    return spans or None


class ChunkFile:
    """An open file of one chunk, whose sections are read one at a time; a context manager.

    head, sections: as of a ``Chunk``, but ``sections`` is an iterator: each section is read and verified when it is
    asked for, and the last one is followed by ``TierError`` if the file goes on. ``TierError`` for a file that is not
    this cache's, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, spec: CacheSpec, identity: Identity) -> None:
        self._file = open_plain(path)
        try:
            reader = Reader(self._file, os.fstat(self._file.fileno()).st_size, str(path))
            fields = reader.header()
            if fields["kind"] != "chunk":
                raise reader.fail(f"holds a {fields['kind']}, not a chunk: kvmem.chunks.load() reads it")
            self.head = reader.head(fields, spec, identity)
            self.sections = checked_end(reader, reader.sections(fields, self.head))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def checked_end(reader: Reader, sections: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the sections, and fail in place of a further one if the file goes on."""
    yield from sections
    if not reader.at_end:
        raise reader.fail("goes on after its last section")


def write_chunk(path: str | os.PathLike[str], chunk: Chunk, *, codec: str = "none") -> None:
    """Write a chunk to a file: the whole file, or an error and the file is as it was. codec: see ``codecs``.

    ``TierError`` where the file system refuses. Cost: one pass over the bytes for the checksum, and an fsync.
    """
    with atomic_file(path) as file:
        write_record(file, chunk.head, chunk.sections, codec=codec)


def read_chunk(path: str | os.PathLike[str], *, spec: CacheSpec, identity: Identity) -> Chunk:
    """Return the chunk of a file; ``TierError``, with the reason, for a damaged file or that of another cache."""
    with ChunkFile(path, spec=spec, identity=identity) as file:
        return Chunk(file.head, tuple(file.sections))


def blob_of(chunk: Chunk, *, codec: str = "none", extra: dict[str, Any] | None = None) -> memoryview:
    """Return what ``write_chunk`` would write, as bytes."""
    room = BytesIO()
    write_record(room, chunk.head, chunk.sections, codec=codec, extra=extra)
    return room.getbuffer()


def chunk_in(
    blob: bytes | bytearray | memoryview, name: str, *, spec: CacheSpec, identity: Identity
) -> tuple[Chunk, dict[str, Any]]:
    """Return the chunk in a blob and its ``extra`` fields; errors as ``read_chunk``. name: what errors call it."""
    reader = Reader(BytesIO(blob), len(blob), name)
    fields = reader.header()
    head = reader.head(fields, spec, identity)
    return Chunk(head, tuple(checked_end(reader, reader.sections(fields, head)))), fields["extra"]


# --- files ---


def open_plain(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading, not through a symbolic link; ``TierError`` otherwise."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, TypeError, ValueError) as error:
        raise TierError(f"path: cannot read {path!s}: {error}") from error
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise TierError(f"path: {path!s} is no regular file")
    return os.fdopen(number, "rb", buffering=0)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a new file that takes the path's place when the body ends: written, synced, renamed. ``TierError`` from the
    file system, and where the body raises, the path is as it was."""
    target = Path(path)
    name = None
    try:
        number, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        with os.fdopen(number, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
        name = None
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, TierError):
            raise
        raise TierError(f"path: cannot write {target}: {error}") from error
    finally:
        if name is not None:
            with suppress(OSError):
                os.unlink(name)


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a loss of power."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
