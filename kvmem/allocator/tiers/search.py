"""Asks the lower tiers which blocks of a prompt they have. Waits for their answers, as long as their limits allow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmem.allocator.tiers.loads import Place
from kvmem.tiers.base import Tier
from kvmem.tiers.keys import slot_key

if TYPE_CHECKING:
    from kvmem.allocator.tiers.engine import Tiering
    from kvmem.allocator.tiers.places import Located, Prompt

__all__ = ["count_below", "key_of", "search"]


def key_of(prompt: Prompt, place: Place) -> bytes:
    """Return the key of one group's bytes of a block."""
    return slot_key(prompt.digests[place[0]], place[1])


def search(tiering: Tiering, prompt: Prompt, located: Located) -> tuple[dict[Place, Tier], int, str]:
    """Return which tier has what device and host do not have; how many blocks can be reached with it; and what no
    tier has, ``""`` if that is all of them.
    """
    found: dict[Place, Tier] = {}
    whole = 0
    while whole < prompt.num_blocks:
        places = [(k, g) for k in range(whole, prompt.num_blocks) for g in tiering.full_groups]
        rest = [place for place in places if not located.has(*place)]
        before = whole
        for tier in tiering.tiers:
            found.update(dict.fromkeys(rest[: tier.contains([key_of(prompt, p) for p in rest])], tier))
            whole = next((k for k, g in places if (k, g) not in found and not located.has(k, g)), prompt.num_blocks)
            if whole > before:
                break
        else:
            break

    def has(block: int, group: int) -> bool:
        place = (block, group)
        if located.has(block, group) or place in found:
            return True
        tier = next((t for t in tiering.tiers if t.contains([key_of(prompt, place)]) == 1), None)
        if tier is not None:
            found[place] = tier
        return tier is not None

    blocks = tiering.reach(whole, has)
    if blocks < whole:
        return found, blocks, f"no tier has what the windows or states of a start behind block {blocks} need"
    return found, blocks, f"no tier has block {whole}" if whole < prompt.num_blocks else ""


def count_below(tiering: Tiering, prompt: Prompt, tokens: int) -> tuple[dict[str, int], str]:
    """Return how many tokens behind the first ``tokens`` a load would find, by the name of the farthest tier that their
    blocks need; and what no tier has, ``""`` if nothing is missing.
    """
    located, size = tiering.locate(prompt), tiering.block_size
    try:
        found, blocks, missing = search(tiering, prompt, located)
    except Exception as error:  # noqa: BLE001  # of somebody's tier, which must not raise
        found, blocks, missing = {}, 0, f"{type(error).__name__}: {error}"
    places = ["device", "host", *(tier.name for tier in tiering.tiers)]
    farthest = ["device"] * blocks
    for k, g in tiering.needed(blocks):
        place = "device" if located.on_device(k, g) else found[k, g].name if (k, g) in found else "host"
        farthest[k] = max(farthest[k], place, key=places.index)
    counts = dict.fromkeys(places, 0)
    for k, place in enumerate(farthest):
        counts[place] += max(0, (k + 1) * size - max(tokens, k * size))
    return counts, missing
