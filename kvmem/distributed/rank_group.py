"""Ranks of a tensor-parallel group with one cache: rank 0 decides, every rank acts, and all agree on each step."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist

from kvmem.allocator import Allocator
from kvmem.allocator.ops import HEADER
from kvmem.arguments import brief, check_size
from kvmem.distributed.op_bytes import pack, unpack
from kvmem.errors import DeviceError, KVMemError, SpecError

__all__ = ["RankGroup"]

_FIRST: Final = 8192  # bytes of the broadcast that every step has; longer steps have a second one
_REASON: Final = 480
# step, kind, crc32 of what follows, bytes of the ops, bytes of the message
_HEAD: Final = struct.Struct("<QIIQQ")
_STEP, _STOP, _END = range(3)


class RankGroup:
    """Keeps the allocators of all ranks equal. A context manager that closes it.

    Each rank stores its own heads, so all have the same spec. Rank ``leader`` decides: its allocator, made with
    ``record_ops=True``, opens, extends, commits, finds prefixes, evicts. Once a step it calls ``lead()``, which sends
    what was decided to the others, where ``follow()`` applies it. Both return when *every* rank has applied it, so none
    computes a step that another does not have::

        if dist.get_rank() == 0:
            seq.extend(1)                              # OutOfMemory: nothing has changed, on any rank
            group.lead(message)                        # any bytes, such as the ids and tokens of the batch
        else:
            while (message := group.follow()) is not None: ...

    alloc: this rank's, over this rank's device. With the same spec, backend, sizes and options on all ranks, but
        ``record_ops``, ``prefix_cache``, ``policy`` and ``events``, which the leader alone needs. A follower opens no
        sequence of its own.
    group: a gloo group that nothing else uses, such as ``dist.new_group(ranks, timeout, backend="gloo")``, closed by
        the rank group; its timeout is the longest that a rank waits for another. None: one of all ranks is made, with
        ``timeout_seconds``. A leader with nothing to do calls ``lead()`` more often than that.
    leader: the rank in the group that decides.

    **Failures.** What fails on the leader (``OutOfMemory``, ``DeviceError``) has changed nothing there, and the others
    never hear of it. If another rank cannot apply a step, or dies, or answers no more, all ranks stop: the call raises
    one ``DeviceError`` that names the rank and the reason, and so does every later call. The ranks that had applied the
    step cannot take it back, so nothing goes on from there: close the allocators, make new ones and a new group, and
    compute the live requests again. A rank that died is noticed at once, one that hangs after ``timeout_seconds``.

    Control goes over a gloo group of its own, between the hosts' CPUs, so it mixes with no collective of the model and
    occupies no GPU. Cost of a step: a broadcast of ``step_bytes`` and an all-reduce of a number a rank.

    Attributes: ``rank`` in the group, ``ranks`` how many, ``leads``, ``step`` the number of the latest step,
    ``step_bytes`` of its ops and message.

    ``SpecError`` if the allocators differ in what must be equal (all ranks raise it; ``zero`` is not compared), or
    torch.distributed is not initialised. Not thread-safe.
    """

    def __init__(
        self, alloc: Allocator, *, group: dist.ProcessGroup | None = None, leader: int = 0,
        timeout_seconds: float = 60.0,
    ) -> None:  # fmt: skip
        if not dist.is_available() or not dist.is_initialized():
            raise SpecError("RankGroup: call torch.distributed.init_process_group() first")
        if not isinstance(alloc, Allocator):
            raise SpecError(f"alloc: got {brief(alloc)}; must be an Allocator")
        number = isinstance(timeout_seconds, (int, float)) and not isinstance(timeout_seconds, bool)
        if not number or not 0.01 <= timeout_seconds <= 86_400:
            raise SpecError(f"timeout_seconds: got {timeout_seconds!r}; must be from 0.01 to a day")
        if group is not None and not (isinstance(group, dist.ProcessGroup) and "gloo" in dist.get_backend(group)):
            raise SpecError(f"group: got {brief(group)}; must be a gloo group with this rank in it, or None")
        self.alloc, self.rank, self.ranks = alloc, dist.get_rank(group), dist.get_world_size(group)
        self._leader, self.leads = check_size("leader", leader, 0, self.ranks - 1), self.rank == leader
        if group is None:
            try:
                group = dist.new_group(timeout=timedelta(seconds=timeout_seconds), backend="gloo")
            except (RuntimeError, ValueError) as error:
                raise DeviceError(f"RankGroup: a rank is gone or did not come in time: {_text(error)}") from error
        self._group: Any = group
        self.step, self.step_bytes, self._stopped = 0, 0, ""
        self._source = dist.get_global_rank(group, leader)
        self._compare()

    # --- the calls of a step ---

    def lead(self, message: bytes = b"") -> None:
        """Send the other ranks what this rank's allocator has decided since the last call, and ``message``.

        On return all of them have applied it. ``DeviceError``: the group has stopped. ``SpecError`` on a follower.
        """
        self._check(leads=True)
        if not isinstance(message, (bytes, bytearray, memoryview)):
            raise SpecError(f"message: got {brief(message)}; must be bytes")
        with self._under_way():
            try:
                ops = pack(self.alloc.take_ops())
            except Exception as error:  # noqa: BLE001  they are taken and lost: nobody goes on without them
                self._tell(_STOP, b"", _said(error))
                self._stop(f"rank {self._leader} has no ops to send: {_text(error)}", error)
            self.step += 1
            self._tell(_STEP, ops, bytes(message))
            self._agree(None)

    def follow(self) -> bytes | None:
        """Apply the leader's next step, and return its message; None when the leader has closed the group.

        On return all ranks have applied it. Waits for the leader. ``DeviceError``: the group has stopped.
        ``SpecError`` on the leader.
        """
        self._check(leads=False)
        with self._under_way():
            kind, step, ops, message = self._hear()
            if kind == _END:
                self._release()
                return None
            if kind == _STOP:
                self._stop(f"rank {self._leader} has stopped: {message.decode(errors='replace')}")
            self.step += 1
            try:
                if step != self.step:
                    raise SpecError(f"this is step {step}, and {self.step} is missing")
                self.alloc.apply(unpack(ops))
            except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
                self._agree(error)
            else:
                self._agree(None)
        return message

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """What ends a step before all agree ends the group: its ops are on some ranks only, or lost."""
        try:
            yield
        except BaseException as error:  # also a signal
            self._release()
            if isinstance(error, Exception) and not isinstance(error, KVMemError):  # as of a frame's damaged length
                self._stop(f"step {self.step} broke off: {_text(error)}", error)
            raise

    def close(self) -> None:
        """End the group; on the leader, the others' ``follow()`` returns None. Closing twice is no error. The
        allocators stay open.
        """
        if self.leads and self._group is not None:
            self._tell(_END, b"", b"")
        self._release()

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self.leads and error is not None and self._group is not None:
                self._tell(_STOP, b"", _said(error))
                self._release()
            self.close()
        except DeviceError:
            if error is None:  # an exception of the body takes precedence
                raise

    # --- frames ---

    def _tell(self, kind: int, ops: bytes, message: bytes) -> None:
        body = ops + message
        frame = _HEAD.pack(self.step, kind, zlib.crc32(body), len(ops), len(message)) + body
        self.step_bytes = len(body)
        self._broadcast(torch.frombuffer(bytearray(frame[:_FIRST].ljust(_FIRST, b"\0")), dtype=torch.uint8))
        if len(frame) > _FIRST:
            self._broadcast(torch.frombuffer(bytearray(frame[_FIRST:]), dtype=torch.uint8))

    def _hear(self) -> tuple[int, int, bytes, bytes]:
        """Return kind, step, ops and message of the leader's next frame."""
        first = self._broadcast(torch.empty(_FIRST, dtype=torch.uint8))
        step, kind, check, ops, message = _HEAD.unpack(first[: _HEAD.size])
        body = first[_HEAD.size : _HEAD.size + ops + message]
        if (more := ops + message - len(body)) > 0:
            body += self._broadcast(torch.empty(more, dtype=torch.uint8))
        if zlib.crc32(body) != check:
            self._stop(f"the bytes of step {step} were damaged on their way from rank {self._leader}")
        self.step_bytes = len(body)
        return kind, step, body[:ops], body[ops:]

    def _broadcast(self, data: torch.Tensor) -> bytes:
        try:
            dist.broadcast(data, self._source, group=self._group)
        except (RuntimeError, ValueError) as error:  # gloo's errors, among them a closed connection
            self._stop(f"a rank is gone or did not answer in time: {_text(error)}", error)
        return data.numpy().tobytes()

    # --- agreement ---

    def _agree(self, error: Exception | None) -> None:
        """Return if every rank has applied the step; else stop, everywhere, for the same reason."""
        failed = torch.zeros(self.ranks, dtype=torch.int32)
        failed[self.rank] = error is not None
        try:
            dist.all_reduce(failed, group=self._group)
            if not failed.any():
                return
            reasons = self._gather(b"" if error is None else _said(error))
        except (RuntimeError, ValueError) as gone:
            self._stop(f"in step {self.step} a rank is gone or did not answer in time: {_text(gone)}", gone)
        said = "; ".join(f"rank {at}: {reasons[at].decode(errors='replace')}" for at in failed.nonzero()[:, 0].tolist())
        self._stop(f"step {self.step} was not applied everywhere: {said}", error)

    def _gather(self, mine: bytes) -> list[bytes]:
        """Return ``mine`` of every rank, at most ``_REASON`` bytes each."""
        row = torch.frombuffer(bytearray(mine[:_REASON].ljust(_REASON, b"\0")), dtype=torch.uint8)
        rows = [torch.empty_like(row) for _ in range(self.ranks)]
        dist.all_gather(rows, row, group=self._group)
        return [one.numpy().tobytes().rstrip(b"\0") for one in rows]

    def _compare(self) -> None:
        """Raise ``SpecError`` on every rank unless all allocators can follow the leader's."""
        a = self.alloc
        parts = {
            "spec": a.spec.fingerprint, "backend": a.backend, "page_bytes": a.pool.page_bytes,
            "memory": a.pool.budget_bytes, "interleave": a.interleave, "max_sequences": a.max_sequences,
            "max_tokens": a.max_tokens, "cached_rows": a.cached_rows, "tail_guard_tokens": a.tail_guard_tokens,
            "format of ops": HEADER,
        }  # fmt: skip
        mine = b"".join(hashlib.sha256(repr(part).encode()).hexdigest()[:8].encode() for part in parts.values())
        unfit = ""
        if self.leads and not a._recording:
            unfit = "the leader's allocator was made without record_ops=True"
        elif not self.leads and a.sequences():
            unfit = "a follower has sequences of its own"
        try:
            rows = self._gather(mine + unfit.encode())
        except (RuntimeError, ValueError) as error:
            self._stop(f"a rank is gone or did not answer in time: {_text(error)}", error)
        wrong = []
        for at, row in enumerate(rows):
            same = [row[8 * i : 8 * i + 8] == rows[0][8 * i : 8 * i + 8] for i in range(len(parts))]
            wrong += [f"rank {at} differs from rank 0 in {n}" for n, ok in zip(parts, same, strict=True) if not ok]
            if reason := row[len(mine) :].decode(errors="replace"):
                wrong.append(f"rank {at}: {reason}")
        if wrong:
            self._release()
            raise SpecError("the ranks cannot share one cache: " + "; ".join(wrong))

    # --- the end ---

    def _check(self, *, leads: bool) -> None:
        if self._stopped:
            raise DeviceError(self._stopped)
        if self._group is None:
            raise SpecError("the group is closed")
        if leads != self.leads:
            raise SpecError("the leader calls lead() and the other ranks follow()")

    def _stop(self, reason: str, error: BaseException | None = None) -> NoReturn:
        self._stopped = f"the rank group has stopped: {reason}; close the allocators of all ranks, and make new ones"
        self._release()
        raise DeviceError(self._stopped) from error

    def _release(self) -> None:
        """Close the connections, so that ranks that wait for this one do not wait for the timeout."""
        group, self._group = self._group, None
        if group is not None:
            with suppress(RuntimeError, ValueError):  # the caller has ended torch.distributed before
                dist.destroy_process_group(group)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _said(error: BaseException) -> bytes:
    return _text(error).encode()
