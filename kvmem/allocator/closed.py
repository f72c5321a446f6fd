"""What stands in the place of a core that was given up: every use of it is an error."""

from __future__ import annotations

from typing import Any, NoReturn

from kvmem.errors import StaleHandle

__all__ = ["Closed"]


class Closed:
    """Raises ``StaleHandle`` for whatever is asked of it."""

    def __getattr__(self, name: str) -> NoReturn:
        raise StaleHandle("this allocator is closed: close(), or the end of its with-statement, freed its sequences")

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        self.__getattr__(name)
