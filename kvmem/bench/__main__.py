"""``python -m kvmem.bench``. Exit codes: 0 done, 2 bad input or a shortage, with one line that says which."""

from __future__ import annotations

import sys
from typing import Any

from kvmem.errors import KVMemError


def main(arguments: list[str] | None = None, command: Any = None, name: str = "python -m kvmem.bench") -> int:
    """Runs ``command``, by default this package's, and returns its exit code."""
    try:
        import click

        from kvmem.bench.cli import bench
    except ImportError as error:
        print(f"error: kvmem.bench needs click and rich ({error}); install kvmem[bench]", file=sys.stderr)
        return 2
    try:
        code = (command or bench)(arguments, prog_name=name, standalone_mode=False)
    except KVMemError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return 2
    except click.exceptions.Abort:
        print("interrupted", file=sys.stderr)
        return 130
    return int(code or 0)  # a command returns None, its context.exit(n) gives n


if __name__ == "__main__":
    sys.exit(main())
