"""Tensors over an allocator's whole memory.

Addresses are reserved, not mapped: an access to an unmapped one loses the context on a GPU; on a CPU a read gives zeros
(with ``KVMEM_DEBUG`` a segmentation fault) and a write is a segmentation fault. So a tensor that spans more than one
sequence is a ``CacheTensor``, which allows operations that name the blocks they touch, and refuses those that touch
all.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, NoReturn

import numpy as np
import torch

from kvmem.errors import SpecError
from kvmem.geometry.group_layout import Slice

__all__ = ["CacheTensor", "block_view", "plain", "row_view", "slot_view", "token_view"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Answers about a tensor that do not look at its contents, and hooks for streams and exchange.
_ANSWERS = _names(
    "size stride dim ndimension numel nelement element_size storage_offset data_ptr untyped_storage storage get_device "
    "is_contiguous is_floating_point is_complex is_signed is_inference is_pinned is_shared is_set_to is_same_size "
    "__len__ __dir__ __dlpack__ __dlpack_device__ record_stream new_empty new_zeros new_ones new_full "
    "new_tensor new_empty_strided"
)
#: Views that keep what the first dimension counts: blocks, rows or tokens.
_RESHAPES = _names("view view_as reshape reshape_as flatten unflatten ravel contiguous as_strided unfold detach alias")
#: Views that may move the first dimension away.
_MOVES = _names(
    "transpose permute t adjoint movedim moveaxis swapaxes swapdims unsqueeze squeeze expand expand_as diagonal"
)
#: Take ``(tensor, dim, ...)``; what they touch is named when ``dim`` is the first.
_BY_FIRST = _names("index_select index_copy_ index_fill_ index_add_ narrow select")
#: Take ``(tensor, ...)`` and touch what their indices name.
_BY_INDEX = _names("gather scatter_ scatter_add_")  # take() copies what is not contiguous


class CacheTensor(torch.Tensor):
    """A view of cache memory, most of which may be unmapped: for indexing, for views and for kernels.

    An operation that names the blocks (rows, tokens) that it touches works and returns ordinary tensors: ``t[5]``,
    ``t[ids]``, ``t[2:9]``, ``t[blocks, offsets] = x``, ``index_select(0, ids)``. One that touches nothing works too:
    shapes, strides, addresses, and views (``view``, ``transpose``, ``unfold`` ...), which are cache tensors again.
    Custom operators get the plain tensor. Any other would read, copy or write everything: ``SpecError``. ``repr`` shows
    the shape. ``t.as_subclass(torch.Tensor)`` is the same memory without these checks.
    """

    _plain: torch.Tensor  # the same memory
    _first: bool  # whether the first dimension counts blocks, rows or tokens
    _owner: int = 0  # id() of the allocator's core, for checks; 0: not known

    @staticmethod
    def over(tensor: torch.Tensor, first: bool = True, owner: int = 0) -> CacheTensor:
        """``tensor``, guarded."""
        guarded = tensor.as_subclass(CacheTensor)
        guarded._plain, guarded._first, guarded._owner = tensor, first, owner
        return guarded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        subject = args[0] if args else kwargs.get("input")
        others = (*args[1:], *(value for key, value in kwargs.items() if args or key != "input"))
        if isinstance(subject, CacheTensor) and not _holds_cache(others):
            if name == "__getitem__":
                return subject[args[1]]
            if (handler := _handler(name)) is not None and not _has_anothers_name(func):
                return handler(subject, func, args, kwargs)
        if (name == "embedding" and not _holds_cache(args[:1])) or _is_foreign(func):
            return func(*_plain_all(args), **{key: _plain_one(value) for key, value in kwargs.items()})
        _refuse(name)

    def __getitem__(self, index: Any) -> torch.Tensor:  # without the way through __torch_function__
        if self._names_blocks(index):
            return self._plain[index]
        if _is_basic(index):
            found = self._plain[index]
            return CacheTensor.over(found, self._first and _same_first(found, self._plain))
        _refuse(f"an index that leaves the first dimension whole, {_short(index)}")

    def _names_blocks(self, index: Any) -> bool:
        if not self._first:
            return False
        for part in index if isinstance(index, tuple) else (index,):
            if part is None:
                continue
            if isinstance(part, slice):
                return part.start not in (None, 0) or part.stop is not None
            return part is not Ellipsis and not isinstance(part, bool)
        return False

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        t = self._plain
        return f"CacheTensor(shape={tuple(t.shape)}, stride={t.stride()}, dtype={t.dtype}, device={t.device})"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __hash__(self) -> int:
        return id(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse("pickling")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse("a deep copy")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a plain ``torch.Tensor``: a binding that tests for the exact type takes it too."""
    if isinstance(tensor, CacheTensor):
        return tensor._plain
    return tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)


def _refuse(what: str) -> NoReturn:
    raise SpecError(
        f"{what}: a cache tensor spans memory that may not be mapped, and is not read, copied or written whole. Name "
        "the blocks: t[ids] or t[first:end], with the ids of a batch's block_table; take a sequence's tokens: "
        "Sequence.kv() or kernels.blocks.gather(), or t.as_subclass(torch.Tensor), where you know that all is mapped"
    )


# ---- What is let through ---------------------------------------------------------------------------------------------

_Handler = Callable[[CacheTensor, Any, Any, Any], Any]


def _handler(name: str) -> _Handler | None:
    if name == "__get__":
        return _view  # of a property: shape, device, T ...
    if name in _ANSWERS:
        return _answer
    if name in _RESHAPES or name in _MOVES:
        return _view
    if name in _BY_FIRST:
        return _by_first
    if name in _BY_INDEX:
        return _answer
    return {"__setitem__": _write, "index_put_": _write, "as_subclass": _as_subclass}.get(name)


def _answer(subject: CacheTensor, func: Any, args: Any, kwargs: Any) -> Any:
    found = func(subject._plain, *args[1:], **kwargs) if args else func(**kwargs | {"input": subject._plain})
    return subject if found is subject._plain else found


def _view(subject: CacheTensor, func: Any, args: Any, kwargs: Any) -> Any:
    name = func.__name__
    if name in ("reshape", "reshape_as", "flatten", "ravel", "contiguous") and not _stays_a_view(
        subject, func, args, kwargs
    ):
        _refuse(f"{name}, which would copy")
    found = _answer(subject, func, args, kwargs)
    if not isinstance(found, torch.Tensor) or found is subject:
        return found
    kept = name in _RESHAPES or _same_first(found, subject._plain)
    return CacheTensor.over(found, subject._first and kept)


def _stays_a_view(subject: CacheTensor, func: Any, args: Any, kwargs: Any) -> bool:
    """Asked of a tensor of the same shape without memory."""
    t = subject._plain
    stand_in = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    found = func(stand_in, *args[1:], **kwargs) if args else func(**kwargs | {"input": stand_in})
    return found is stand_in or found._base is stand_in  # ravel() gives a view, of a copy


def _same_first(found: torch.Tensor, source: torch.Tensor) -> bool:
    return found.ndim > 0 and (found.shape[0], found.stride(0)) == (source.shape[0], source.stride(0))


def _by_first(subject: CacheTensor, func: Any, args: Any, kwargs: Any) -> Any:
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if dim not in (0, -subject._plain.ndim) or not subject._first:
        _refuse(f"{func.__name__} along dimension {dim}, which leaves the first dimension whole")
    return _answer(subject, func, args, kwargs)


def _write(subject: CacheTensor, func: Any, args: Any, kwargs: Any) -> Any:
    index = args[1] if len(args) > 1 else kwargs.get("indices")
    whole = func.__name__ == "index_put_" and (
        not index or index[0] is None
    )  # None stands for all of a dimension there
    if whole or not subject._names_blocks(index):
        _refuse(f"a write that leaves the first dimension whole, {_short(index)}")
    return _answer(subject, func, args, kwargs)


def _as_subclass(subject: CacheTensor, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    kind = args[1] if len(args) > 1 else kwargs["cls"]
    if kind is CacheTensor:
        return subject
    found: torch.Tensor = subject._plain if kind is torch.Tensor else subject._plain.as_subclass(kind)
    return found


def _is_basic(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer)) for part in parts)


def _is_foreign(func: Any) -> bool:
    """Whether it is a custom operator, or a function of another package: a kernel, which reads what it is given."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(func).partition(".")[0] not in ("aten", "prim", "prims")
    return isinstance(func, FunctionType) and func.__module__.partition(".")[0] != "torch"


def _has_anothers_name(func: Any) -> bool:
    """``torch.nn.functional.unfold`` is not ``Tensor.unfold``."""
    return isinstance(func, FunctionType) and func.__module__ != "torch._tensor"


def _holds_cache(args: Any) -> bool:
    return any(isinstance(a, CacheTensor) or (isinstance(a, (tuple, list)) and _holds_cache(a)) for a in args)


def _plain_one(value: Any) -> Any:
    if isinstance(value, CacheTensor):
        return value._plain
    return _plain_all(value) if type(value) in (tuple, list) else value


def _plain_all(values: Any) -> Any:
    return type(values)(_plain_one(value) for value in values)


def _short(index: Any) -> str:
    return "of a tensor" if isinstance(index, torch.Tensor) else f"[{str(index)[:60]}]"


# ---- Where they are --------------------------------------------------------------------------------------------------


def _strided(
    memory: torch.Tensor, where: Slice, lead: tuple[int, ...], lead_bytes: tuple[int, ...], offset: int
) -> torch.Tensor:
    size = where.dtype.itemsize
    strides = [*lead_bytes, where.head_bytes or where.row_bytes, size]
    with torch.inference_mode(False):  # a view made in that mode could never be written outside of it
        return memory.view(where.dtype).as_strided(
            (*lead, where.heads, where.width), [b // size for b in strides], (offset + where.offset_bytes) // size
        )


def block_view(arena: torch.Tensor, where: Slice, token_bytes: int, block_size: int, num_blocks: int) -> torch.Tensor:
    """``[num_blocks, block_size, heads, width]`` over an arena's bytes; block b starts at ``b * block_size *
    token_bytes``. Where heads come first in memory, it is a transposed view.
    """
    step = where.row_bytes if where.head_bytes else token_bytes
    return _strided(arena, where, (num_blocks, block_size), (block_size * token_bytes, step), 0)


def row_view(arena: torch.Tensor, where: Slice, token_bytes: int, row_tokens: int, num_rows: int) -> torch.Tensor:
    """``[num_rows, row_tokens, heads, width]`` over an arena's bytes, where tokens come first."""
    return _strided(arena, where, (num_rows, row_tokens), (row_tokens * token_bytes, token_bytes), 0)


def slot_view(
    memory: torch.Tensor, where: Slice, shape: tuple[int, int], strides: tuple[int, int], begin: int
) -> torch.Tensor:
    """``[slots, block_size, heads, width]`` over the bytes of host slots, where tokens come first. shape: slots,
    block_size. strides: bytes of a slot, and of a token. begin: where the bytes of the arena begin in the first slot.
    """
    return _strided(memory, where, shape, strides, begin)


def token_view(tokens: torch.Tensor, where: Slice, token_bytes: int, num_tokens: int) -> torch.Tensor:
    """``[num_tokens, heads, width]`` over bytes that begin with the first token's slice and end with the last one's."""
    with torch.inference_mode(False):
        return tokens.view(where.dtype).as_strided(
            (num_tokens, where.heads, where.width), (token_bytes // where.dtype.itemsize, where.width, 1)
        )
