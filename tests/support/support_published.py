"""The event classes of published packages, without their packages: the definitions of one module, by its own source.

A module like that imports an engine, and with it a GPU's libraries. Its message classes need none of it, so only what
can be had is imported, and only those classes and aliases are made whose names are then known."""

from __future__ import annotations

import ast
import contextlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["published_classes"]


def published_classes(folder: Path, name: str) -> ModuleType:
    """What module ``name`` of the package in ``folder`` defines, as far as it can be defined without the package."""
    made = ModuleType(f"published.{name}")
    sys.modules[made.__name__] = made  # msgspec looks annotations up there
    for node in ast.parse((folder / f"{name.replace('.', '/')}.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == name.split(".")[0]:
            for alias in node.names:
                _take_alias(folder, str(node.module), alias.name, made.__dict__)
        elif isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.Assign, ast.AnnAssign)):
            _define(node, made.__dict__)
    return made


def _define(node: ast.stmt, names: dict[str, Any]) -> None:
    with contextlib.suppress(ImportError, NameError, AttributeError):  # what is absent; who needs the name will miss it
        exec(compile(ast.Module([node], []), "<published>", "exec"), names)


def _take_alias(folder: Path, module: str, name: str, names: dict[str, Any]) -> None:
    """A type alias from another module of the package: its assignment alone."""
    path = folder / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        return
    for node in ast.parse(path.read_text()).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            exec("from typing import *", names)
            _define(node, names)
