"""Blocks in S3, Google Cloud Storage, Azure, a folder or memory, through obstore: one object a block."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

from kvmem.errors import SpecError, TierError
from kvmem.tiers.base import Buffer, Capacity, Result, Status
from kvmem.tiers.remote import ABSENT, Call, Limits, Record, RemoteTier, failed

__all__ = ["ObjectStoreTier"]

_SCHEMES: Final = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "file", "memory")
_FULL: Final = ("No space left", "QuotaExceeded", "quota exceeded", "StorageFull")  # of Linux, Ceph, MinIO
_OURS: Final = {"client_options", "retry_config"}


class ObjectStoreTier(RemoteTier):
    """A tier in a bucket, a container or a folder.

    Each block is an object ``PATH/NAMESPACE/VERSION/KEY``, the key in hexadecimal. Nothing is dropped from it but by
    ``delete`` and by the store's own rules, such as an expiry by age: set one.

    url: ``s3://bucket/path``, ``gs://``, ``az://``, ``file:///folder`` or ``memory:///``. options: what obstore's store
    of that kind takes, such as ``{"endpoint": ..., "region": ..., "access_key_id": ...}``; without, the environment's
    credentials. An endpoint with ``http://`` is used as such. timeout_seconds, limits: see
    :class:`~kvmem.tiers.remote.RemoteTier`; the requests of a part are under way at once. namespace: keeps caches apart
    in one bucket. check: raise ``TierError`` unless the store answers. ``SpecError`` for a bad argument, or without the
    package obstore. Cost: a request a block, two to delete it; ``capacity`` lists the namespace, 1,000 a request.
    """

    name = "object_store"
    part_keys: ClassVar[int] = 32

    def __init__(
        self, url: str, *, options: Mapping[str, Any] | None = None, timeout_seconds: float = 5.0,
        namespace: str = "kvmem", check: bool = False, limits: Limits = Limits(),  # noqa: B008  frozen
    ) -> None:  # fmt: skip
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as e:
            raise SpecError("ObjectStoreTier needs the package obstore: pip install 'kvmem[s3]'") from e
        if not isinstance(url, str) or (scheme := urlsplit(url).scheme) not in _SCHEMES:
            raise SpecError(f"url: got {url!r}; must be a text that begins with one of {', '.join(_SCHEMES)}")
        where = url.partition("?")[0]
        super().__init__(where, timeout_seconds, namespace, limits)
        given = dict(options or {})
        if ours := sorted(_OURS & given.keys()):
            raise SpecError(f"options: has {', '.join(ours)}, which the tier sets; use timeout_seconds and limits")
        if scheme not in ("file", "memory"):
            given |= self._bounds([str(value) for key, value in given.items() if "endpoint" in key.lower()])
        elif scheme == "file" and not given.get("mkdir") and not os.path.isdir(urlsplit(url).path):
            raise TierError(f"{where}: is no folder; make it, or pass options={{'mkdir': True}}")
        self._obstore: Any = obstore
        try:
            self._store: Any = from_url(url, **given)
        except (obstore.exceptions.BaseError, ValueError, TypeError) as e:
            raise SpecError(f"url, options: {where} was refused by obstore: {failed(e).reason}") from e
        self._open(check)

    def _bounds(self, endpoints: Sequence[str]) -> dict[str, Any]:
        """Return the options that bound a client's requests, which the tier itself does again."""
        for endpoint in endpoints:
            if urlsplit(endpoint).scheme not in ("http", "https"):
                raise SpecError(f"options: got the endpoint {endpoint!r}; must be a URL with http:// or https://")
        seconds, http = f"{int(self._seconds * 1e6)}us", any(e.startswith("http://") for e in endpoints)
        client = {"timeout": seconds, "connect_timeout": seconds, "allow_http": http}
        return {"client_options": client, "retry_config": {"max_retries": 0}}

    def _each(self, call: Call, one: Callable[[int], Awaitable[Any]], count: int) -> list[Any]:
        """Return what ``one`` returns for each index, all under way at once; a Result for what fails or is late."""

        async def everything() -> list[Any]:
            tasks = [asyncio.ensure_future(one(i)) for i in range(count)]
            await asyncio.wait(tasks, timeout=max(0.0, call.deadline - time.monotonic()))
            late = failed("no answer in time")
            return [_answer(task) if task.done() else late for task in tasks]

        return asyncio.run(everything())  # which cancels the late ones

    def _ping(self, call: Call) -> list[object]:
        return [next(iter(self._obstore.list(self._store, self._prefix, chunk_size=1)), None)]

    def _exists(self, call: Call, names: Sequence[str]) -> list[bool] | Result:
        answers = self._each(call, lambda i: self._obstore.head_async(self._store, names[i]), len(names))
        problems = (a for a in answers if isinstance(a, Result) and a is not ABSENT)
        return next(problems, None) or [answer is not ABSENT for answer in answers]

    def _read(self, call: Call, names: Sequence[str], sizes: Sequence[int]) -> Sequence[Record]:
        async def read(i: int) -> Record:
            return memoryview(await self._obstore.get_range_async(self._store, names[i], start=0, end=sizes[i]))

        return self._each(call, read, len(names))

    def _write(self, call: Call, names: Sequence[str], records: Sequence[tuple[bytes, Buffer]]) -> list[Result]:
        async def write(i: int) -> Result:
            await self._obstore.put_async(self._store, names[i], list(records[i]), use_multipart=False)
            return Result(Status.OK)

        nowhere = failed("the bucket or container does not exist")
        return [nowhere if answer is ABSENT else answer for answer in self._each(call, write, len(names))]

    def _remove(self, call: Call, names: Sequence[str]) -> list[Result]:
        async def remove(i: int) -> Result:
            await self._obstore.head_async(
                self._store, names[i]
            )  # a store answers alike if there was nothing to delete
            await self._obstore.delete_async(self._store, names[i])
            return Result(Status.OK)

        return self._each(call, remove, len(names))

    def _measure(self, call: Call) -> list[Capacity]:
        blocks = used = 0
        for page in self._obstore.list(self._store, self._prefix):
            blocks, used = blocks + len(page), used + sum(entry["size"] for entry in page)
            if time.monotonic() > call.deadline:
                raise TimeoutError(f"counted {blocks} blocks, and not all, in time")
        return [Capacity(None, used, blocks)]

    def _release(self, idle: bool) -> None:
        self._store = None  # its connections close with it


def _answer(task: asyncio.Future[Any]) -> Any:
    from obstore.exceptions import NotFoundError

    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, (NotFoundError, FileNotFoundError)):
        return ABSENT
    if any(word in str(error) for word in _FULL):
        return Result(Status.FULL, 0, f"the store is full: {failed(error).reason}")
    return failed(error)
