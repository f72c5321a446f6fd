"""The memory of an allocator as tensors: of layers, of rows, of one sequence."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from kvmem import _core
from kvmem.allocator.batch_calls import BatchCalls
from kvmem.allocator.ids import handle as handle_of
from kvmem.errors import SpecError, StaleHandle
from kvmem.layouts.views import CacheTensor, block_view, plain, row_view, token_view

if TYPE_CHECKING:
    from kvmem.allocator.sequence import Sequence

__all__ = ["TensorCalls"]


class TensorCalls(BatchCalls):
    """Views of what is mapped. Addresses never change (invariant 6)."""

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer for kernels, each ``[num_blocks, block_size, heads, width]``, with equal shape and
        strides.

        They end at the last mapped block; the address never changes. Blocks that no sequence holds may be unmapped, so
        index by a batch's block table. They are ``CacheTensor``: what names its blocks, views and kernels work, what
        would read, copy or write all of it is a ``SpecError``. An unmapped block that is named all the same reads as
        zeros on a CPU, where writing to it ends the process; on a GPU both end the context. ``plain()`` of
        ``kvmem.kernels.checks``, or ``as_subclass(torch.Tensor)``, takes the checks away.
        """
        k, v = self.tensor(layer, "k"), self.tensor(layer, "v")
        blocks = min(len(plain(k)), len(plain(v)))
        if len(plain(k)) != len(plain(v)):  # in ranges of their own (interleave="none"): one gave up parked pages
            return CacheTensor.over(plain(k)[:blocks]), CacheTensor.over(plain(v)[:blocks])
        return k, v

    def tensor(self, layer: int, component: str) -> torch.Tensor:
        """As ``kv``, for one component by name."""
        index = self.spec.group_of(layer, component)
        layout, group = self._layouts[index], self.spec.groups[index]
        where = layout.slice(layer, component)
        token_bytes = layout.token_bytes[where.arena]
        mapped = self.core.mapped_extent_bytes(index, where.arena)
        # The last one may be mapped in part; behind the last of all, a page may go on.
        blocks = min(self._geometry[index].max_blocks, -(-mapped // (token_bytes * group.block_size)))
        view = block_view(self._arena(index, where.arena), where, token_bytes, group.block_size, blocks)
        return CacheTensor.over(view)

    def rows(self, layer: int, component: str = "k") -> torch.Tensor:
        """The full rows, by name: ``[1 + max_sequences + cached_rows, row_tokens, heads, width]``, for kernels that
        take contiguous sequences (``cache_batch_idx``, ``seqused_k``). Row r is ``batch.rows[i]``; only the tokens that
        it holds are mapped. A ``CacheTensor``, see ``kv``. ``SpecError`` on the paged backend, which has no rows.
        """
        index = self.spec.group_of(layer, component)
        geometry, layout = self._geometry[index], self._layouts[index]
        if not geometry.row_tokens:
            raise SpecError('the paged backend has no rows; use kv(), or backend="virtual"')
        where = layout.slice(layer, component)
        arena, num_rows = self._arena(index, where.arena), self._num_rows
        view = row_view(arena, where, layout.token_bytes[where.arena], geometry.row_tokens, num_rows)
        return CacheTensor.over(view)

    def sequence_tensor(self, sequence: Sequence | int, layer: int, component: str) -> torch.Tensor:
        """``[tokens held, heads, width]`` of one sequence, in order, for reading; it can be saved, pickled and copied.

        Virtual: a view of what is mapped for these tokens, so it shows what is written later. Paged: a gathered copy,
        to which a write is lost (``UserWarning``). So write with ``kernels.write.write_kv`` or
        ``kernels.blocks.scatter``, which do the same on both. With a sliding window it starts at the first token still
        held (``core.first_token``).

        The view is valid while the sequence holds these tokens. Once it is freed or cut, the memory is another's or
        nobody's: reads give other bytes or zeros, writes spoil them or end the process. With ``debug``, such a use is a
        ``StaleHandle``.
        """
        handle = handle_of("sequence", sequence, self.core)
        index = self.spec.group_of(layer, component)
        first, end = self.core.first_token(handle, index), self.core.tokens(handle, index)
        if self._geometry[index].row_tokens:
            return self._tokens_in_place(handle, index, layer, component, first, end)
        batch = self.batch([handle])
        size = self.spec.groups[index].block_size
        blocks = batch.group(index).block_table[0, first // size : -(-end // size)].long()
        found = self.tensor(layer, component)[blocks].flatten(0, 1)[first % size : first % size + end - first]
        return CopiedTokens.over(found, [])

    def _tokens_in_place(
        self, handle: int, index: int, layer: int, component: str, first: int, end: int
    ) -> torch.Tensor:
        layout = self._layouts[index]
        where = layout.slice(layer, component)
        if first == end:
            device = self._arena(index, where.arena).device  # DeviceError on "meta"
            return torch.empty((0, where.heads, where.width), dtype=where.dtype, device=device)
        token_bytes = layout.token_bytes[where.arena]
        start = self.core.row(handle, index) * self._geometry[index].row_tokens + first
        span = (end - first - 1) * token_bytes + where.heads * where.width * where.dtype.itemsize
        memory = self._part(index, where.arena, start * token_bytes + where.offset_bytes, span)
        found = token_view(memory, where, token_bytes, end - first)
        return WatchedTokens.of(found, self.core, handle, index, first, end) if self._debug else found

    def _arena(self, group: int, arena: int) -> torch.Tensor:
        self.core.check_usable()
        self.pool.streams.follow()
        if (group, arena) not in self._arenas:
            # A tensor made in inference mode could never be written outside of it.
            with torch.inference_mode(False):
                self._arenas[group, arena] = from_dlpack(self.core.arena_bytes(group, arena))
        return self._arenas[group, arena]

    def _part(self, group: int, arena: int, begin: int, bytes: int) -> torch.Tensor:
        """Bytes of an arena in a storage of their own."""
        self.pool.streams.follow()
        with torch.inference_mode(False):
            return from_dlpack(self.core.arena_bytes(group, arena, begin, bytes))


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

