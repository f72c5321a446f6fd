"""What no group may combine. ``kvmem.spec.Group`` asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvmem.spec.cache_spec import Group
    from kvmem.spec.component import Component

__all__ = ["GROUP_RULES"]


def _differ(what: Callable[[Component], object]) -> Callable[[Group], bool]:
    return lambda g: any(what(c) != what(g.components[0]) for c in g.components)


#: (field to name, condition to refuse, reason). The first rule that is broken is reported.
GROUP_RULES: Final[tuple[tuple[str, Callable[[Group], bool], str], ...]] = (
    ("components", _differ(lambda c: c.growth),
     "all components of a group must grow in the same way: put them in groups by growth"),
    ("components", _differ(lambda c: c.ragged),
     "components of a group share lengths: make all ragged or none, or put them in two groups"),
    ("components", lambda g: g.ragged and _differ(lambda c: c.heads)(g),
     "ragged lengths are per head, so all components of the group need the same heads"),
    ("components", lambda g: g.ragged and g.k_only,
     "ragged K with no V: V of any head is derived from the K of every head (Slim), so no head may drop a row alone"),
    ("components", lambda g: g.k_only and g.components[0].dtype.itemsize < 2,
     "8-bit K with no V: deriving V multiplies the rounding of K by the condition number of W_K; store fp16 or wider"),
    ("window_tokens", lambda g: g.window_tokens is not None and g.growth == "fixed",
     "a fixed state holds no tokens, so it has no window"),
    ("window_tokens", lambda g: g.window_tokens is not None and g.growth == "prefill",
     "what is fixed after prefill is read whole by every step: it has no sliding window"),
    ("window_tokens", lambda g: g.window_tokens is not None and g.ragged,
     "ragged rows are compacted, so a block no longer spans a range of positions that a window could leave behind"),
    ("max_tokens", lambda g: g.max_tokens is not None and g.growth != "prefill",
     "only a group that is fixed after prefill has such a limit"),
    ("block_size", lambda g: g.growth == "fixed" and g.block_size != 1,
     "a fixed state is one block per sequence: use 1, or leave it out"),
    ("block_order", lambda g: g.block_order != "tokens" and g.growth == "fixed",
     "a fixed state has no blocks of tokens: leave it out"),
    ("block_order", lambda g: g.block_order != "tokens" and any(c.unequal or c.planes for c in g.components),
     "heads of unequal width and planes have no such view: use 'tokens'"),
    ("block_order", lambda g: g.block_order == "joined" and (
        _differ(lambda c: (c.heads, c.width, c.dtype))(g) or any(c.scope == "shared" for c in g.components)),
     "components of one head lie side by side if all have equal heads, width and dtype in each layer: use 'heads'"),
    ("packing", lambda g: g.packing != "" and g.block_order == "tokens",
     "packed blocks are shown by head: give block_order 'heads' or 'joined'"),
)  # fmt: skip
