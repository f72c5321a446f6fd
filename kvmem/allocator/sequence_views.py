"""Tensors of one sequence's tokens that have something to say when they are used."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from kvmem import _core
from kvmem.errors import StaleHandle

__all__ = ["CopiedTokens", "WatchedTokens"]

#: End in an underscore and write no element.
_WRITE_NOTHING = frozenset(["share_memory_", "requires_grad_", "pin_memory_", "rename_"])
_WRITE = frozenset(["__setitem__"]) | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class _Tokens(torch.Tensor):
    """The memory of ``_plain`` under a check. What shares that memory is checked too; all else is ordinary."""

    _plain: torch.Tensor
    _note: Any

    @classmethod
    def over(cls, tensor: torch.Tensor, note: Any) -> torch.Tensor:
        guarded = tensor.as_subclass(cls)
        guarded._plain, guarded._note = tensor, note
        return guarded

    def _check(self, writes: bool) -> None:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found: list[_Tokens] = []
        plain_args = [_plain(value, found) for value in args]
        plain_kwargs = {key: _plain(value, found) for key, value in kwargs.items()}
        name = getattr(func, "__name__", "")
        written = _written(name, args, kwargs)
        for guarded in found:
            guarded._check(guarded is written)
        result = func(*plain_args, **plain_kwargs)
        return _guarded(result, found) if isinstance(result, torch.Tensor) and name != "as_subclass" else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._check(False)
        return torch.Tensor.__reduce_ex__(self._plain, protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        self._check(False)
        copied: torch.Tensor = torch.Tensor.__deepcopy__(self._plain, memo)  # type: ignore[no-untyped-call]
        return copied


class CopiedTokens(_Tokens):
    """Tokens gathered from blocks. ``UserWarning`` at the first write, which the cache does not see."""

    def _check(self, writes: bool) -> None:
        if writes and not self._note:
            self._note.append(True)  # shared by all views
            warnings.warn(
                "a write to tokens that the paged backend has gathered: it does not reach the cache. Write with "
                "kernels.write.write_kv() or kernels.blocks.scatter(), on both backends; clone() what is computed in "
                "place",
                stacklevel=4,
            )


class WatchedTokens(_Tokens):
    """Tokens in place, looked after by an allocator that was made with ``debug``: ``StaleHandle`` when the sequence was
    freed, cut, or passed by its window since.
    """

    @staticmethod
    def of(tensor: torch.Tensor, core: _core.Allocator, handle: int, group: int, first: int, end: int) -> torch.Tensor:
        return WatchedTokens.over(tensor, (core, handle, group, first, end))

    def _check(self, writes: bool) -> None:
        core, handle, group, first, end = self._note
        if core.first_token(handle, group) > first or core.tokens(handle, group) < end:
            raise StaleHandle(
                f"tokens [{first}, {end}) of sequence handle {handle}: it holds "
                f"[{core.first_token(handle, group)}, {core.tokens(handle, group)}) now; ask for the tensor again"
            )


def _plain(value: Any, found: list[_Tokens]) -> Any:
    if isinstance(value, _Tokens):
        found.append(value)
        return value._plain
    return type(value)([_plain(v, found) for v in value]) if type(value) in (tuple, list) else value


def _written(name: str, args: Any, kwargs: Any) -> Any:
    if "out" in kwargs:
        return kwargs["out"]
    in_place = name in _WRITE or (name.endswith("_") and not name.endswith("__") and name not in _WRITE_NOTHING)
    return args[0] if in_place and args else None


def _guarded(result: torch.Tensor, sources: list[_Tokens]) -> torch.Tensor:
    for source in sources:
        if result is source._plain:
            return source
        if (
            result.layout == torch.strided
            and result.untyped_storage().data_ptr() == source._plain.untyped_storage().data_ptr()
        ):
            return type(source).over(result, source._note)
    return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
