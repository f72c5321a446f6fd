"""How large a physical page should be: large pages are mapped by fewer driver calls, small ones waste less."""

from __future__ import annotations

from collections.abc import Iterable

from kvmem.geometry.group_layout import GroupLayout

__all__ = ["LEAST_PAGE_BYTES", "choose_page_bytes"]

#: What CUDA's driver recommends.
LEAST_PAGE_BYTES = 2 << 20
#: Of a sequence's bytes: what its last pages may hold empty on average, half a page in each of its address ranges.
MOST_WASTE = 0.006
#: The memory must be so many pages, or there is too little to move from one sequence to another.
LEAST_PAGES = 1024
#: A sequence is expected to reach this part of the longest one. Production chats with room for 128 Ki tokens are 12 Ki
#: long on average (Mooncake's conversation trace).
EXPECTED_SHARE = 10


def choose_page_bytes(
    layouts: Iterable[GroupLayout],
    *,
    max_tokens: int,
    memory_bytes: int,
    least: int = LEAST_PAGE_BYTES,
    expected_tokens: int | None = None,
) -> int:
    """The page size of a virtual allocator, in bytes: the largest power of two times ``least`` at which a sequence of
    ``expected_tokens`` (default: a tenth of ``max_tokens``) wastes at most 0.6 % by rounding.

    A GPU's driver is called for each page that is mapped, at a cost that hardly depends on its size (3 us; a run's
    set_access and unmap take 60 and 42), so the calls fall as pages grow, and the waste rises. ``least``: what the
    driver recommends. Never more than 1/1,024 of the memory.
    """
    tokens = expected_tokens or max(1, max_tokens // EXPECTED_SHARE)
    layouts = list(layouts)
    growing = [layout for layout in layouts if layout.group.growth == "token"]
    states = [size for layout in layouts if layout.group.growth == "fixed" for size in layout.token_bytes]
    ranges = sum(len(layout.token_bytes) for layout in growing)
    held = sum(states)
    held += sum(sum(layout.token_bytes) * min(tokens, layout.group.window_tokens or tokens) for layout in growing)

    def waste(page: int) -> float:
        return ranges * page / 2 + sum(-size % page for size in states)

    page = least
    while growing and page * 2 * LEAST_PAGES <= memory_bytes and waste(2 * page) <= MOST_WASTE * held:
        page *= 2
    return page
