"""The memory of an allocator as tensors: of layers, of rows, of one sequence, whose tokens may be checked on use."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.dlpack import from_dlpack

from kvmem import _core
from kvmem.allocator.batch_calls import BatchCalls
from kvmem.allocator.ids import handle as handle_of
from kvmem.errors import SpecError, StaleHandle
from kvmem.geometry.views import CacheTensor, block_view, plain, row_view, token_view

if TYPE_CHECKING:
    from kvmem.allocator.sequence import Sequence

__all__ = ["TensorCalls"]


class TensorCalls(BatchCalls):
    """The calls of an allocator that return tensors. Addresses never change (invariant 6)."""

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a layer for kernels, each ``[num_blocks, block_size, heads, width]``, with equal strides.
        Where heads come first in memory (``Group.block_order``) they are transposed views of ``kv_by_head``.

        Valid while the allocator is open; the address never changes. The tensors end at the last mapped block, so ask
        again after growth. Index them by a batch's block table, because blocks that no sequence holds may be unmapped:
        on a CPU an unmapped block reads as zeros and writing to it ends the process; on a GPU either ends the context.

        They are ``CacheTensor``: indexing by blocks, views and kernels work; an operation that would read, copy or
        write the whole tensor raises ``SpecError``. ``as_subclass(torch.Tensor)`` removes these checks.
        """
        return self._as_long(self.tensor(layer, "k"), self.tensor(layer, "v"))

    def tensor(self, layer: int, component: str) -> torch.Tensor:
        """Return one component of a layer, ``[num_blocks, block_size, heads, width]``; as ``kv``. ``SpecError`` for
        packed blocks, of which only ``by_head`` can be shown.
        """
        if packing := self.spec.groups[self.spec.group_of(layer, component)].packing:
            raise SpecError(
                f"component {component!r} of layer {layer} is packed as {packing!r}: its blocks are opaque, so there "
                "are no tokens to show, read or write one by one; use kv_by_head() with the kernel that packs them"
            )
        return CacheTensor.over(self._blocks(layer, component), owner=id(self.core))

    def kv_by_head(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a layer for head-major kernels, each ``[num_blocks, heads, block_size, width]`` with the
        last two dimensions dense; as ``kv``. Of packed blocks only the bytes of a whole block, or of a head of one,
        mean something. ``SpecError`` unless the spec's ``block_order`` is ``"heads"`` or ``"joined"``.
        """
        return self._as_long(self.by_head(layer, "k"), self.by_head(layer, "v"))

    def by_head(self, layer: int, component: str) -> torch.Tensor:
        """Return one component of a layer, ``[num_blocks, heads, block_size, width]``; as ``kv_by_head``."""
        group, blocks = self.spec.groups[self.spec.group_of(layer, component)], self._blocks(layer, component)
        if group.block_order == "tokens":
            raise SpecError(
                f'group {group.name!r}: block_order: got "tokens", where the heads of a token lie side by side; make '
                'the allocator of spec.with_blocks("heads"), or use kv()'
            )
        return CacheTensor.over(blocks.transpose(1, 2), owner=id(self.core))

    def joined(self, layer: int, component: str = "k") -> torch.Tensor:
        """Return all components of a layer in one tensor, ``[num_blocks, heads, components * block_size, width]``: of
        each head ``block_size`` rows of K, then those of V; as ``kv_by_head``. component: any of the group.
        ``SpecError`` unless ``block_order`` is ``"joined"``.
        """
        group = self.spec.groups[self.spec.group_of(layer, component)]
        first = self._blocks(layer, group.components[0].name).transpose(1, 2)
        if group.block_order != "joined":
            raise SpecError(f'group {group.name!r}: block_order: got {group.block_order!r}; one tensor needs "joined"')
        shape = (*first.shape[:2], len(group.components) * group.block_size, first.shape[3])
        return CacheTensor.over(first.as_strided(shape, first.stride()), owner=id(self.core))

    def _as_long(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = min(len(plain(k)), len(plain(v)))
        if len(plain(k)) != len(plain(v)):  # interleave="none": one range has lost parked pages
            owner = id(self.core)
            return CacheTensor.over(plain(k)[:blocks], owner=owner), CacheTensor.over(plain(v)[:blocks], owner=owner)
        return k, v

    def _blocks(self, layer: int, component: str) -> torch.Tensor:
        index = self.spec.group_of(layer, component)
        layout, group = self._layouts[index], self.spec.groups[index]
        where = layout.slice(layer, component)
        token_bytes = layout.token_bytes[where.arena]
        mapped = self.core.mapped_extent_bytes(index, where.arena)
        # The last block may be mapped in part, and the last page may reach past the last block.
        blocks = min(self._geometry[index].max_blocks, -(-mapped // (token_bytes * group.block_size)))
        return block_view(self._arena(index, where.arena), where, token_bytes, group.block_size, blocks)

    def rows(self, layer: int, component: str = "k") -> torch.Tensor:
        """Return all rows of a component, ``[1 + max_sequences + cached_rows, row_tokens, heads, width]``.

        For kernels that take contiguous sequences (``cache_batch_idx``, ``seqused_k``). The i-th sequence of a batch is
        row ``batch.rows[i]``; only tokens that it holds are mapped. A ``CacheTensor``, valid while the allocator is
        open; see ``kv``. ``SpecError`` on the paged backend, which has no rows.
        """
        index = self.spec.group_of(layer, component)
        geometry, layout = self._geometry[index], self._layouts[index]
        if not geometry.row_tokens:
            raise SpecError('the paged backend has no rows; use kv(), or backend="virtual"')
        if self.spec.groups[index].block_order != "tokens":
            raise SpecError("in head-major blocks the tokens of a row do not lie side by side; use kv_by_head()")
        where = layout.slice(layer, component)
        arena, num_rows = self._arena(index, where.arena), self._num_rows
        view = row_view(arena, where, layout.token_bytes[where.arena], geometry.row_tokens, num_rows)
        return CacheTensor.over(view)

    def sequence_tensor(self, sequence: Sequence | int, layer: int, component: str) -> torch.Tensor:
        """Return a component of one sequence's tokens, ``[tokens, heads, width]``, in order, for reading.

        With a sliding window it starts at the first token in the window. It can be saved, pickled and copied.

        Virtual: a view, which shows later writes. Valid while the sequence holds these tokens: once it is freed or cut,
        the memory may belong to another sequence or be unmapped. With ``debug``, such a use raises ``StaleHandle``.
        Paged, and head-major: a gathered copy, always valid; a write to it does not reach the cache (``UserWarning``).
        So write with ``kernels.write.write_kv`` or ``kernels.blocks.scatter``, which do the same on both backends.
        ``SpecError`` for packed blocks.
        """
        handle = handle_of("sequence", sequence, self.core)
        index = self.spec.group_of(layer, component)
        first, end = self.core.first_token(handle, index), self.core.tokens(handle, index)
        if self._geometry[index].row_tokens and self.spec.groups[index].block_order == "tokens":
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
            # A tensor made in inference mode cannot be written outside of it.
            with torch.inference_mode(False):
                self._arenas[group, arena] = from_dlpack(self.core.arena_bytes(group, arena))
        return self._arenas[group, arena]

    def _part(self, group: int, arena: int, begin: int, bytes: int) -> torch.Tensor:
        """Return bytes ``[begin, begin + bytes)`` of an arena, as a tensor with a storage of its own."""
        self.pool.streams.follow()
        with torch.inference_mode(False):
            return from_dlpack(self.core.arena_bytes(group, arena, begin, bytes))


#: Names that end in an underscore, although these functions write no element.
_WRITE_NOTHING = frozenset(["share_memory_", "requires_grad_", "pin_memory_", "rename_"])
_WRITE = frozenset(["__setitem__"]) | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}


class _Tokens(torch.Tensor):
    """A tensor over ``_plain`` whose uses are checked. Its views are checked too; other results are plain tensors."""

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
    """Tokens gathered from blocks. The first write warns (``UserWarning``), since it does not reach the cache."""

    def _check(self, writes: bool) -> None:
        if writes and not self._note:
            self._note.append(True)  # all views have this list
            warnings.warn(
                "a write to tokens that the paged backend has gathered: it does not reach the cache. Write with "
                "kernels.write.write_kv() or kernels.blocks.scatter(), on both backends; clone() before computing in "
                "place",
                stacklevel=4,
            )


class WatchedTokens(_Tokens):
    """Tokens in place, of an allocator with ``debug``: a use raises ``StaleHandle`` once the sequence was freed or cut,
    or its window has moved past a token.
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
