"""Every layout: one entry each, with what it cannot be combined with, and why. ``docs/layouts.md`` shows the table.

A new layout is one file and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

from kvmem.arguments import check_choice
from kvmem.errors import SpecError

__all__ = ["FEATURES", "LAYOUTS", "LayoutEntry", "check_combination", "find"]

#: What a user may want beside a layout, and what it means.
FEATURES: Final[Mapping[str, str]] = {
    "gqa": "several query heads share a KV head (GQA, MQA)",
    "rotation": "keys are rotated by their position (RoPE)",
    "bf16": "what is stored is bfloat16",
    "low-bit keys": "keys are stored in 8 bits or fewer",
    "eviction per head": "each KV head keeps other tokens (lanes)",
    "sliding window": "only the newest tokens are held",
    "prefix cache": "equal prompts share memory at any block",
    "truncate": "a sequence is cut to any earlier length",
    "heads over ranks": "each rank of a tensor-parallel group holds some of the KV heads",
    "other kernels": "attention kernels of other packages read the cache as it is",
}


@dataclass(frozen=True)
class LayoutEntry:
    """One layout.

    name: as ``check_combination`` takes it. module, factory: where its class is. paper: the source of the method.
    refuses: of ``FEATURES``, what it cannot be combined with: the reason, and the nearest choice that works.
    """

    name: str
    module: str
    factory: str
    paper: str
    refuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def layout_class(self) -> type[Any]:
        """The class, imported when it is asked for."""
        found: type[Any] = getattr(import_module(f"kvmem.layouts.{self.module}"), self.factory)
        return found


_ROTATED_AFTER = "is rotated when it is read, so it is derived into a scratch first: LayoutCache.derive()"

LAYOUTS: Final[tuple[LayoutEntry, ...]] = (
    LayoutEntry("plain", "plain", "PlainKV", ""),
    LayoutEntry(
        "slim", "slim", "SlimK", "arXiv:2503.05840",
        {
            "gqa": "the K of a token has a lower rank than its hidden state, so V cannot be derived: store K and V",
            "bf16": "deriving V multiplies the rounding of K by the condition number of W_K: store float16 or float32",
            "sliding window": "not built: use plain K and V for such layers",
            "low-bit keys": "as for bf16, and worse: quantise K and V of the plain layout instead",
            "eviction per head": "V of any head is derived from the K of every head: evict whole tokens",
            "heads over ranks": "every head needs the K of all heads: give each rank whole layers, or plain K and V",
            "other kernels": "K " + _ROTATED_AFTER,
        },
    ),
    LayoutEntry(
        "slim x", "slim", "SlimX", "arXiv:2503.05840",
        {
            "rotation": "a rotation between projection and dot product cannot be folded: use SlimK",
            "sliding window": "not built: use plain K and V for such layers",
            "low-bit keys": "the input of a layer is stored as floats: quantise K and V of the plain layout instead",
            "eviction per head": "all heads read one row of a token: evict whole tokens",
            "heads over ranks": "each rank would hold all of X: use plain K and V",
            "other kernels": "there is no K and V to read: LayoutCache.derive() projects them into a scratch",
        },
    ),
    LayoutEntry(
        "shared encoder", "slim", "SharedEncoder", "arXiv:2503.05840",
        {
            "rotation": "a rotation between projection and dot product cannot be folded; cross attention has none",
            "low-bit keys": "the encoder's output is stored as floats: quantise the plain cross K and V instead",
            "eviction per head": "all layers and heads read one row of a token: evict whole tokens",
            "sliding window": "every step reads all that prefill wrote: store plain cross K and V of the tokens needed",
            "prefix cache": "what a decoder stores depends on the encoder's input: no token ids name that",
            "truncate": "what is written at prefill has a fixed length: free the sequence",
            "heads over ranks": "each rank would hold all of the encoder's output: use plain cross K and V",
            "other kernels": "there is no K and V to read: LayoutCache.derive() projects them into a scratch",
        },
    ),
    LayoutEntry(
        "palu", "palu", "Palu", "arXiv:2407.21118",
        {
            "eviction per head": "the heads of a group share a latent: evict whole tokens",
            "sliding window": "its attention reads all latents: use plain K and V for such layers",
            "other kernels": "K " + _ROTATED_AFTER,
        },
    ),
    LayoutEntry(
        "goldfinch", "goldfinch", "GoldFinch", "arXiv:2407.12077",
        {
            "gqa": "it is a model of its own, whose attention layers have as many KV heads as query heads",
            "low-bit keys": "the compressed keys are stored as floats: they are 1/16 of the width already",
            "eviction per head": "all layers and heads read one row of a token, and each row needs the one before it",
            "sliding window": "all attention layers read all tokens: it is a model of its own",
            "prefix cache": "the recurrent state exists at one position only: share at snapshots (Sequence.snapshot)",
            "truncate": "the recurrent state cannot go back: fork or snapshot before drafting",
            "heads over ranks": "all heads read one row of a token: give each rank whole layers",
            "other kernels": "K and V exist in a scratch only: LayoutCache.derive()",
        },
    ),
    LayoutEntry(
        "aligned", "aligned", "AlignedKV", "arXiv:2409.16546",
        {
            "low-bit keys": "it reads fewer bits of 16-bit floats: there is nothing to leave out of 8 bits",
            "eviction per head": "blocks of K are encoded whole, and compaction would move rows: use plain K and V",
            "sliding window": "blocks of K are encoded whole and read whole: use plain K and V for such layers",
            "other kernels": "elements are split into planes: LayoutCache.derive() joins them in a scratch",
        },
    ),
    LayoutEntry(
        "quantised", "quantised", "QuantisedKV", "arXiv:2402.02750",
        {
            "eviction per head": "compaction would move rows between blocks that share scales: use float8 in lanes",
            "sliding window": "scales of a block outlive the tokens that leave the window: use plain K and V",
        },
    ),
    LayoutEntry(
        "lanes", "lanes", "LaneCache", "arXiv:2410.12876",
        {
            "sliding window": "rows are compacted, so a block spans no range of positions: SinkAndWindow is a policy",
            "prefix cache": "a gate has seen the whole prompt, so what it kept depends on it: share by fork()",
            "truncate": "the rows that were evicted do not come back: fork() before drafting",
        },
    ),
)  # fmt: skip


def find(name: str) -> LayoutEntry:
    """Return the entry of that name; ``SpecError``, with the names that there are, for any other."""
    check_choice("layout", name, tuple(entry.name for entry in LAYOUTS))
    return next(entry for entry in LAYOUTS if entry.name == name)


def check_combination(layout: str, *features: str) -> None:
    """Raise ``SpecError``, with the reason and what works instead, for the first of ``features`` that the layout cannot
    be combined with. layout: a name of ``LAYOUTS``; features: names of ``FEATURES``.

    This answers before there are weights. ``tests/layouts/test_registry.py`` lists what else refuses each: most a
    constructor, some ``LayoutCache`` or ``kernel_args``; what no argument can ask for, nothing.
    """
    entry = find(layout)
    for feature in features:
        check_choice("feature", feature, tuple(FEATURES))
        if reason := entry.refuses.get(feature):
            raise SpecError(f"layout {layout!r} with {feature!r}: {reason}")
