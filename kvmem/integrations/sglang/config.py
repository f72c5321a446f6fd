"""What the user configures, and what SGLang says about model, ranks and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sglang.srt.runtime_context import get_lora, get_model, get_parallel, get_serving

from kvmem.arguments import check_number, parse_bytes
from kvmem.errors import SpecError
from kvmem.integrations.sglang.keys import PageKeys, Rank, fingerprint
from kvmem.integrations.sglang.names import VERSION
from kvmem.integrations.sglang.store import TierStore
from kvmem.integrations.tier_list import check_tiers, open_tiers
from kvmem.integrations.weights import weights_name

__all__ = ["Options", "open_store", "page_keys"]


@dataclass(frozen=True)
class Options:
    """What a user configures.

    tiers: the fastest first, as ``kvmem.integrations.tier_list`` has them. model: names the weights, so that machines
    share pages; ``""`` takes what SGLang loads, a folder's files included. deadline_seconds: the longest that one call
    waits for the tiers. staging: bytes of host memory for what is being moved, each way.
    """

    tiers: Sequence[Mapping[str, Any]]
    model: str = ""
    deadline_seconds: float = 2.0
    staging: int | str = "1GiB"

    @classmethod
    def of(cls, given: object) -> Options:
        """Return the options that a dict holds; ``SpecError`` for a key or a value that is not known."""
        known = [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or "tiers" not in given or set(given) - set(known):
            raise SpecError(f"kvmem's configuration: got {given!r}; must be a dict with tiers, and maybe {known[1:]}")
        found = cls(**given)
        check_tiers(found.tiers)
        check_number("deadline_seconds", found.deadline_seconds, above=0.0, most=3600.0)
        parse_bytes("staging", found.staging)
        if not isinstance(found.model, str):
            raise SpecError(f"model: got {found.model!r}; must be a text")
        return found


def page_keys(options: Options, ranks: dict[str, Rank], forms: object) -> PageKeys:
    """Return the keys of pools. ranks: the shard of each. forms: what the layout of their pages depends on."""
    model = get_model()
    weights = options.model or weights_name(model.model_path, model.revision)
    loaded = [str(getattr(model, name)) for name in ("quantization", "dtype", "json_model_override_args")]
    # SGLang names an adapter that it starts with by name and path; one that it loads later has a name of its own.
    paths = get_lora().lora_paths if get_lora().enable_lora else None
    adapters = sorted(weights_name(ref.lora_path, None) for ref in paths or ())
    loaded += [str(model.load_format == "dummy"), *adapters]
    return PageKeys(fingerprint(VERSION, weights, loaded, forms), ranks, lambda: str(get_serving().weight_version))


def open_store(options: Options, rank: Rank, block_bytes: int, forms: object) -> TierStore:
    """Return the tiers of this process, opened. block_bytes: the largest payload."""
    parallel = get_parallel()
    name = f"{rank}-dp{parallel.dp_rank or 0}.{parallel.attn_dp_rank or 0}"
    identity = fingerprint(VERSION, "folder", forms)
    tiers = open_tiers(options.tiers, rank=name, fingerprint=identity, block_bytes=block_bytes)
    return TierStore(tiers, options.deadline_seconds)
