"""Blocks in Redis or Valkey, through redis-py and hiredis: one string a block, batches as pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

from kvmem.errors import SpecError
from kvmem.tiers.base import Buffer, Capacity, Result, Status
from kvmem.tiers.remote import ABSENT, Call, Limits, Record, RemoteTier, failed

__all__ = ["RedisTier"]

_SCHEMES: Final = ("redis", "rediss", "unix")
# The tier sets these itself: they bound its calls, and decide what an answer looks like.
_OURS: Final = {"socket_timeout", "socket_connect_timeout", "decode_responses", "protocol", "retry", "retry_on_error",
                "retry_on_timeout", "timeout", "max_connections", "socket_read_size", "encoding"}  # fmt: skip


class RedisTier(RemoteTier):
    """A tier in one server of Redis or Valkey, or a proxy that speaks for a cluster.

    Each block is a string ``NAMESPACE/VERSION/KEY``, the key in hexadecimal. What is dropped when memory is short, the
    server decides: ``maxmemory-policy allkeys-lru`` suits a cache; with ``noeviction``, puts are ``FULL``.

    url: ``redis://[user:password@]host[:port][/database]``, ``rediss://`` for TLS, or ``unix:///path``; parameters are
    those of redis-py. timeout_seconds, limits: see :class:`~kvmem.tiers.remote.RemoteTier`. namespace: keeps caches
    apart on one server. check: raise ``TierError`` unless the server answers, speaks the protocol and lets us in.
    ``SpecError`` for a bad argument, or without the package redis. Cost: one copy of each payload in and one out.
    """

    name = "redis"

    def __init__(
        self, url: str, *, timeout_seconds: float = 2.0, namespace: str = "kvmem", check: bool = False,
        limits: Limits = Limits(),  # noqa: B008  frozen
    ) -> None:  # fmt: skip
        try:
            import redis
        except ImportError as e:
            raise SpecError("RedisTier needs the package redis: pip install 'kvmem[redis]'") from e
        where = _checked(url)
        super().__init__(where, timeout_seconds, namespace, limits)
        try:
            self._pool: Any = redis.ConnectionPool.from_url(
                url, socket_timeout=timeout_seconds, socket_connect_timeout=timeout_seconds, protocol=2,
                decode_responses=False, socket_read_size=1 << 18, retry=_no_retry(), max_connections=limits.calls,
            )  # fmt: skip
            self._pool.connection_class(**self._pool.connection_kwargs)  # connects nowhere
        except (ValueError, TypeError, redis.RedisError) as e:
            raise SpecError(f"url: {where} was refused by redis-py: {e}") from e
        self._client: Any = redis.Redis(connection_pool=self._pool)
        self._open(check)

    def _run(self, call: Call, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        pipe = self._client.pipeline(transaction=False)
        call.abort = lambda: pipe.connection and pipe.connection.disconnect()
        for command in commands:
            pipe.execute_command(*command)
        answers: list[Any] = pipe.execute(raise_on_error=False)
        return answers

    def _ping(self, call: Call) -> list[object]:
        return [self._exists(call, [self._prefix])]

    def _exists(self, call: Call, names: Sequence[str]) -> list[bool]:
        answers = self._run(call, [("EXISTS", name) for name in names])
        for answer in answers:
            if type(answer) is not int:
                raise answer if isinstance(answer, Exception) else ValueError(f"got {answer!r} for EXISTS")
        return [answer == 1 for answer in answers]

    def _read(self, call: Call, names: Sequence[str], sizes: Sequence[int]) -> list[Record]:
        # Not GET: a value that is longer than the buffer, whoever put it there, would all be sent.
        commands = [("GETRANGE", name, 0, size - 1) for name, size in zip(names, sizes, strict=True)]
        return [_record(answer) for answer in self._run(call, commands)]

    def _write(self, call: Call, names: Sequence[str], records: Sequence[tuple[bytes, Buffer]]) -> list[Result]:
        return [
            Result(Status.OK) if answer is True else _refused(answer)
            for answer in self._run(call, [("SET", name, b"".join(r)) for name, r in zip(names, records, strict=True)])
        ]

    def _remove(self, call: Call, names: Sequence[str]) -> list[Result]:
        known = {1: Result(Status.OK), 0: ABSENT}
        answers = self._run(call, [("UNLINK", name) for name in names])
        return [known[a] if type(a) is int and a in known else _refused(a) for a in answers]

    def _measure(self, call: Call) -> list[Capacity]:
        """Bytes are the whole server's, and blocks all keys of the database."""
        memory, size = self._run(call, [("INFO", "memory"), ("DBSIZE",)])
        return [Capacity(int(memory["maxmemory"]) or None, int(memory["used_memory"]), int(size))]

    def _release(self, idle: bool) -> None:
        self._pool.disconnect()


def _checked(url: object) -> str:
    """Return the url without secrets, for messages."""
    if not isinstance(url, str):
        raise SpecError(f"url: got {url!r}; must be a text such as 'redis://127.0.0.1:6379/0'")
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES:
        raise SpecError(f"url: has the scheme {parts.scheme!r}; must be one of {', '.join(_SCHEMES)}")
    try:
        port = parts.port
    except ValueError as e:
        raise SpecError(f"url: {e}") from e
    place = parts.path if parts.scheme == "unix" else f"{parts.hostname or ''}:{6379 if port is None else port}"
    if not parts.path if parts.scheme == "unix" else not parts.hostname or port == 0:
        raise SpecError(f"url: {parts.scheme}://{place} names no server; write 'redis://host:port/database'")
    if parts.scheme != "unix" and not (parts.path.strip("/") or "0").isdecimal():
        raise SpecError(f"url: has the database {parts.path!r}; must be a number, as in 'redis://host:port/0'")
    ours = sorted(_OURS & parse_qs(parts.query, keep_blank_values=True).keys())
    if ours:
        raise SpecError(f"url: sets {', '.join(ours)}, which the tier sets itself; use timeout_seconds and limits")
    return f"{parts.scheme}://{place}{'' if parts.scheme == 'unix' else parts.path}"


def _no_retry() -> Any:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    return Retry(NoBackoff(), 0)


def _record(answer: Any) -> Record:
    if isinstance(answer, bytes):
        return answer or None  # GETRANGE of a key that is not there is empty, and a record never is
    if str(answer).startswith("WRONGTYPE"):
        return Result(Status.CORRUPT, 0, "what is stored under the key is not a string")
    return _refused(answer)


def _refused(answer: Any) -> Result:
    if not isinstance(answer, Exception):
        return failed(f"the server answered {str(answer)[:80]!r}")
    if "maxmemory" in str(answer):
        return Result(Status.FULL, 0, f"the server is full: {answer}")
    return failed(answer)
