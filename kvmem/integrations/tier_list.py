"""Tiers that an engine's configuration names: a list of dicts, as they come from JSON."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvmem.errors import SpecError
from kvmem.tiers.base import Tier
from kvmem.tiers.disk import DiskTier
from kvmem.tiers.host import HostTier
from kvmem.tiers.mooncake import MooncakeTier
from kvmem.tiers.object_store import ObjectStoreTier
from kvmem.tiers.redis import RedisTier

__all__ = ["check_tiers", "open_tiers"]

_REMOTE: Final[dict[str, Any]] = {"redis": RedisTier, "object_store": ObjectStoreTier, "mooncake": MooncakeTier}


def check_tiers(tiers: object) -> Sequence[Mapping[str, Any]]:
    """Return ``tiers``, if it is a list of at least one dict with a known ``type``; ``SpecError`` otherwise.

    ``host`` (capacity, policy), ``disk`` (path, capacity, ...), ``redis``, ``object_store`` and ``mooncake`` take the
    arguments of their classes; ``package.module:Class`` is a tier of somebody else's.
    """
    if not isinstance(tiers, (list, tuple)) or not tiers:
        raise SpecError(f"tiers: got {tiers!r}; must be a list of dicts, the fastest first")
    for tier in tiers:
        kind = tier.get("type", "") if isinstance(tier, Mapping) else ""
        if kind not in ("host", "disk", *_REMOTE) and ":" not in str(kind):
            raise SpecError(f"tiers: got {tier!r}; type is host, disk, {', '.join(_REMOTE)} or module:Class")
    if sum(tier["type"] == "host" for tier in tiers) > 1:
        raise SpecError("tiers: two of type host; one process has one")
    return tiers


def open_tiers(
    tiers: object,
    *,
    rank: str,
    fingerprint: bytes,
    block_bytes: int,
    read_only: bool = False,
    tells_evicted: bool = False,
) -> list[Tier]:
    """Return the tiers that ``check_tiers`` accepts, opened.

    rank: names the process, for a folder has one writer. fingerprint: of what the bytes depend on. block_bytes: the
    largest payload. read_only: only those that another process fills, to ask what they hold. tells_evicted: of
    ``HostTier``. ``SpecError`` or ``TierError`` if one cannot be opened; then none stays open.
    """
    found: list[Tier] = []
    try:
        for tier in check_tiers(tiers):
            given = {name: value for name, value in tier.items() if name != "type"}
            if read_only and tier["type"] == "disk":
                given["read_only"] = True
            if tier["type"] == "host":
                given["tells_evicted"] = tells_evicted
            if not read_only or tier["type"] != "host":
                found.append(_open(tier["type"], given, rank, fingerprint, block_bytes))
    except BaseException as error:
        for one in found:
            one.close()
        if isinstance(error, TypeError):  # an argument that the tier does not have
            raise SpecError(f"tiers: {tier!r}: {error}") from error
        raise
    return found


def _open(kind: str, given: dict[str, Any], rank: str, fingerprint: bytes, block_bytes: int) -> Tier:
    if kind == "host":
        return HostTier(block_bytes=block_bytes, **given)
    if kind == "disk":
        given["path"] = os.path.join(given.get("path", ""), rank) if given.get("path") else ""
        return DiskTier(block_bytes=block_bytes, fingerprint=fingerprint, **given)
    if kind in _REMOTE:
        made: Tier = _REMOTE[kind](**given)
        return made
    module, _, name = kind.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(**given)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"tiers: {kind}: {error}") from error
    if not isinstance(made, Tier):
        raise SpecError(f"tiers: {kind} is no kvmem.tiers.Tier")
    return made
