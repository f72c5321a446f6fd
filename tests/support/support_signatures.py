"""Signatures of functions in source files, read without importing them: their packages want a GPU's libraries."""

from __future__ import annotations

import ast
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path

__all__ = ["defined", "signature"]


def defined(folder: Path, name: str) -> bool:
    """Whether a class or function of that name stands in a file below ``folder``."""
    return bool(_found(folder, name))


def signature(folder: Path, name: str) -> Signature:
    """Of the one function ``name``, or ``Class.method`` (then with ``self``), below ``folder``; its overloads do not
    count. ``LookupError`` where there is not exactly one."""
    *owner, last = name.split(".")
    nodes: list[ast.AST] = []
    for node in _found(folder, owner[0] if owner else last):
        inside = node.body if owner and isinstance(node, ast.ClassDef) else [node]
        nodes += [n for n in inside if getattr(n, "name", "") == last and not _is_overload(n)]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    if len(functions) != 1:
        raise LookupError(f"{name} is {len(functions)} times below {folder}")
    return _signature_of(functions[0].args)


def _found(folder: Path, name: str) -> list[ast.stmt]:
    return [node for node in _statements(folder) if getattr(node, "name", "") == name]


@cache
def _statements(folder: Path) -> list[ast.stmt]:
    return [node for path in sorted(folder.rglob("*.py")) for node in ast.parse(path.read_text()).body]


def _is_overload(node: ast.AST) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in getattr(node, "decorator_list", ()))


def _signature_of(args: ast.arguments) -> Signature:
    """Defaults are there, or not; what they are is not read."""
    positional = [*((a, Parameter.POSITIONAL_ONLY) for a in args.posonlyargs)]
    positional += [(a, Parameter.POSITIONAL_OR_KEYWORD) for a in args.args]
    required = len(positional) - len(args.defaults)
    found = [
        Parameter(a.arg, kind, default=Parameter.empty if i < required else ...)
        for i, (a, kind) in enumerate(positional)
    ]
    if args.vararg:
        found.append(Parameter(args.vararg.arg, Parameter.VAR_POSITIONAL))
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(Parameter(a.arg, Parameter.KEYWORD_ONLY, default=... if default else Parameter.empty))
    if args.kwarg:
        found.append(Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)
