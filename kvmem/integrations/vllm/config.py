"""``kv_connector_extra_config`` of the connector: which tiers, under which model, and how it waits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from kvmem import SpecError
from kvmem.arguments import check_bool, check_choice, check_number, parse_bytes
from kvmem.integrations import tier_list
from kvmem.tiers.base import Tier

__all__ = ["Options"]

# Of a disk's folder. Keys say whose a block is, so an engine of another configuration may take a folder over: it finds
# nothing there, and its blocks replace the old ones.
_FOLDER: Final = hashlib.sha256(b"kvmem vllm folder 1").digest()


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
        if found.tiers not in ((), []):
            tier_list.check_tiers(found.tiers)
        return found

    @property
    def has_shared(self) -> bool:
        return any(tier["type"] != "host" for tier in self.tiers)

    def open_tiers(self, rank: str, block_bytes: int, *, read_only: bool = False) -> list[Tier]:
        """Return the tiers of a rank; as ``tier_list.open_tiers``."""
        if not self.tiers:
            return []
        return tier_list.open_tiers(
            self.tiers,
            rank=rank,
            fingerprint=_FOLDER,
            block_bytes=block_bytes,
            read_only=read_only,
            tells_evicted=True,
        )
