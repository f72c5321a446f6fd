"""What the kernels' libraries take, which differs by version: a package's version, or a function's own signature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache, lru_cache
from importlib import metadata
from typing import Any

__all__ = ["installed", "takes"]


@cache
def installed(package: str) -> tuple[int, ...] | None:
    """The first three numbers of the version that is installed, ``(0,)`` where it has none, None without the package.
    Looked up once in a process.
    """
    try:
        found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", metadata.version(package))
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(number or 0) for number in found.groups()) if found else (0,)


@lru_cache(maxsize=64)
def takes(function: Callable[..., Any], keyword: str) -> bool:
    """Whether ``function`` can be called with ``keyword=``; False where it does not say. Its signature is read once,
    which costs tens of microseconds.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # no callable, or one of C without a signature
        return False
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
