"""Which tiers an allocator has, and what goes where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvmem.arguments import check_choice, check_number
from kvmem.errors import SpecError
from kvmem.tiers.base import Tier
from kvmem.tiers.keys import Identity

__all__ = ["Tiers"]


@dataclass(frozen=True)
class Tiers:
    """The tiers of an allocator: ``Allocator(..., tiers=Tiers(host="8GiB"))``.

    host: bytes of host memory for blocks that the device evicts, an int or a text such as ``"8GiB"``. Physical memory
        is taken as it fills. The blocks of a load from a lower tier pass through it too, so it must hold some of them.
    lower: tiers below the host, the fastest first, such as a ``DiskTier``. The allocator does not close them.
    identity: the model; needed with ``lower``, so that no other model's blocks are ever found.
    write: when a block is written to the first of ``lower``: ``"through"``, as soon as it is in host memory, or
        ``"back"``, when host memory runs short (fewer writes, but a restart finds less).
    admit: which blocks are written: ``"always"``, or ``"second_use"``, those that come to host memory a second time.
    policy: which block leaves host memory first, by name, as for ``Allocator(policy=)``.
    deadline_seconds: the longest that a load from lower tiers is waited for, whatever they do. What has arrived by then
        is used, and the rest is computed.
    """

    host: int | str
    lower: Sequence[Tier] = ()
    identity: Identity | None = None
    write: Literal["through", "back"] = "through"
    admit: Literal["always", "second_use"] = "always"
    policy: str = "density"
    deadline_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_choice("write", self.write, ("through", "back"))
        check_choice("admit", self.admit, ("always", "second_use"))
        check_number("deadline_seconds", self.deadline_seconds, above=0.0)
        if not isinstance(self.lower, (list, tuple)) or not all(isinstance(tier, Tier) for tier in self.lower):
            raise SpecError(f"lower: got {self.lower!r}; must be a list of tiers")
        if self.identity is not None and not isinstance(self.identity, Identity):
            raise SpecError(f"identity: got {self.identity!r}; must be an Identity")
        if self.lower and self.identity is None:
            raise SpecError("identity: missing; name the model, so that no other model's blocks are ever found")
