"""``kv_connector_extra_config`` of the connector: which tiers, under which model, and how it waits."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from kvmem import SpecError
from kvmem.arguments import check_bool, check_choice, check_number, parse_bytes
from kvmem.tiers.base import Tier
from kvmem.tiers.disk import DiskTier
from kvmem.tiers.host import HostTier
from kvmem.tiers.mooncake import MooncakeTier
from kvmem.tiers.object_store import ObjectStoreTier
from kvmem.tiers.redis import RedisTier

__all__ = ["Options", "open_tiers"]

_REMOTE: dict[str, Any] = {"redis": RedisTier, "object_store": ObjectStoreTier, "mooncake": MooncakeTier}


@dataclass(frozen=True)
class Options:
    """What ``kv_connector_extra_config`` may hold.

    tiers: the fastest first, each a dict of ``type`` and the arguments of its class: ``host`` (capacity, policy),
        ``disk`` (path, capacity, ...), ``redis``, ``object_store``, ``mooncake``, or ``package.module:Class``.
    model: names the weights, so that machines share blocks; ``""`` takes what the engine loads, its files included.
    memory: ``"lazy"`` puts the KV cache over memory of kvmem; ``"vllm"`` leaves it; ``""``: lazy on a CPU.
    layerwise: a request is scheduled at once, and its layers wait for their load; else loads come between steps.
    deadline_seconds: the longest that a request waits for an answer of a tier. staging: bytes on their way at most.
    """

    tiers: Sequence[Mapping[str, Any]] = ()
    model: str = ""
    memory: Literal["", "lazy", "vllm"] = ""
    layerwise: bool = False
    deadline_seconds: float = 10.0
    staging: int | str = "256MiB"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Return the options that a dict holds. ``SpecError`` for a key or a value that is not known."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(given) - known):
            raise SpecError(f"kv_connector_extra_config: {', '.join(unknown)} is not known; {sorted(known)} are")
        found = cls(**given)
        check_choice("memory", found.memory, ("", "lazy", "vllm"))
        check_bool("layerwise", found.layerwise)
        check_number("deadline_seconds", found.deadline_seconds, above=0.0)
        parse_bytes("staging", found.staging)
        if not isinstance(found.tiers, (list, tuple)):
            raise SpecError(f"tiers: got {found.tiers!r}; must be a list of dicts")
        for tier in found.tiers:
            kind = tier.get("type", "") if isinstance(tier, Mapping) else ""
            if kind not in ("host", "disk", *_REMOTE) and ":" not in str(kind):
                raise SpecError(f"tiers: got {tier!r}; type is host, disk, {', '.join(_REMOTE)} or module:Class")
        if sum(tier["type"] == "host" for tier in found.tiers) > 1:
            raise SpecError("tiers: two of type host; one process has one")
        return found

    @property
    def has_host(self) -> bool:
        return any(tier["type"] == "host" for tier in self.tiers)

    @property
    def has_shared(self) -> bool:
        return any(tier["type"] != "host" for tier in self.tiers)


def open_tiers(options: Options, rank: int, fingerprint: bytes, block_bytes: int, *, looks: bool = False) -> list[Tier]:
    """Return the tiers of a rank. looks: only those that another process fills, to ask what they hold.

    ``SpecError`` or ``TierError`` if one cannot be opened.
    """
    found: list[Tier] = []
    try:
        for tier in options.tiers:
            given = {name: value for name, value in tier.items() if name != "type"}
            if tier["type"] != "host" or not looks:
                found.append(_open(tier["type"], given, rank, fingerprint, block_bytes, looks))
    except TypeError as e:
        raise SpecError(f"tiers: {tier!r}: {e}") from e
    finally:
        if len(found) < len(options.tiers) - (looks and options.has_host):
            for one in found:
                one.close()
    return found


def _open(kind: str, given: dict[str, Any], rank: int, fingerprint: bytes, block_bytes: int, looks: bool) -> Tier:
    if kind == "host":
        return HostTier(block_bytes=block_bytes, **given)
    if kind == "disk":  # a folder has one writer
        given["path"] = os.path.join(given["path"], f"rank-{rank}") if "path" in given else ""
        if looks:
            given = {"path": given["path"], "read_only": True}
        return DiskTier(block_bytes=block_bytes, fingerprint=fingerprint, **given)
    if kind in _REMOTE:
        made: Tier = _REMOTE[kind](**given)
        return made
    module, _, name = kind.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(**given)
    except (ImportError, AttributeError) as e:
        raise SpecError(f"tiers: {kind}: {e}") from e
    if not isinstance(made, Tier):
        raise SpecError(f"tiers: {kind} is no kvmem.tiers.Tier")
    return made
