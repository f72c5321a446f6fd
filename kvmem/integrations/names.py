"""Names of somebody else's package that kvmem relies on, and the check that an installed version still has them.

Extension points of engines are documented, and change all the same. So each integration lists the names that it uses,
and looks them up before the engine starts: another version stops with one sentence instead of wrong tokens.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

__all__ = ["missing_arguments", "missing_names"]


def missing_names(names: Iterable[str]) -> list[str]:
    """Return those of ``names`` (module:name or module:class.attribute) that the installed packages do not have.

    A field that a class only declares, without a default, counts as its attribute.
    """
    return [name for name in names if not _has(name)]


def _has(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for part in path.split("."):
        if hasattr(found, part):
            found = getattr(found, part)
        elif not (inspect.isclass(found) and any(part in inspect.get_annotations(base) for base in found.__mro__)):
            return False
    return True


def missing_arguments(theirs: Any, ours: Any) -> list[str]:
    """Return the arguments of ``theirs``, the package's function, that ``ours``, which overrides it, does not take."""
    known = inspect.signature(ours).parameters
    return [name for name in inspect.signature(theirs).parameters if name not in known]
