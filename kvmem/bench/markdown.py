"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """The first ``texts`` columns are words; numbers stand at the right edge."""
    lines = [columns, ["---" if index < texts else "---:" for index in range(len(columns))], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
