"""Copies, gathers and zeroing of many tokens or blocks at once: one launch, whatever there is to be done.

They serve connectors that send a layer's tokens as dense memory and bring them back, and kernels that take no block
table. All functions take any tensor that ``Allocator.tensor()`` or ``kv()`` gives, ``[num_blocks,
block_size, H, W]`` of any dtype and interleave, and move bytes: NaN payloads and 8-bit formats stay as they are.

Ids say where. A *slot* is ``block * block_size + offset``, as in ``Batch.slot_mapping``; ``batch_slots`` makes those of
every token of a batch, once for all layers. A *block id* is an entry of ``block_table`` or ``kv_indices``. Ids on the
host are checked (``SpecError``), and copied to the device. Ids in a CUDA tensor are taken as they are, since looking at
them would wait for the device: then nothing here waits, and a graph can capture it. Slots and blocks that no sequence
holds may be unmapped: on a GPU touching one faults; on a CPU writing does, and reading gives zeros.

Order: everything is put on torch's current stream and nothing waits for the host. Work on the same stream comes before
and after as it was issued. The allocator's own copies, zeroing and fences go to the stream of ``Allocator.set_stream``
(default: stream 0). Another stream must wait for an event of that one before a gather, and that one for an event
recorded after the gather before its tokens are freed, truncated or written to: the allocator waits for no other stream,
and could give the memory to another sequence.

``impl``: ``"torch"``, ``"triton"``, or None: Triton for CUDA tensors where it is installed, else torch. Their results
are the same bytes. Triton's own interpreter (``TRITON_INTERPRET=1`` before Triton is imported) takes CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as List
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from kvmem.allocator import Allocator
from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.sequence import Sequence
from kvmem.errors import SpecError
from kvmem.kernels.checks import as_bytes, check_batch, heads_first, plain
from kvmem.kernels.write import to_cache_dtype

if TYPE_CHECKING:
    import numpy.typing as npt

    Ids = torch.Tensor | List[int] | npt.NDArray[np.integer[Any]]

__all__ = [
    *("batch_slots", "copy_blocks", "gather", "gather_blocks", "gather_tokens", "pick", "scatter", "scatter_blocks"),
    *("scatter_tokens", "zero_blocks"),
]

Impl = Literal["torch", "triton"]

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


# ---- A sequence --------------------------------------------------------------------------------------


def gather(
    alloc: Allocator, sequence: Sequence | int, layer: int, component: str, *, start: int | None = None,
    end: int | None = None, out: torch.Tensor | None = None, impl: Impl | None = None,
) -> torch.Tensor:  # fmt: skip
    """Tokens ``[start, end)`` of a sequence in one layer, contiguous: ``[end - start, H, W]``.

    Default: all that it holds (of a sliding window, from the first token still there). For many layers or sequences,
    take slots once (``batch_slots``) and call ``gather_tokens``: this fills a batch of its own in each call.
    """
    slots = _sequence_slots(alloc, sequence, layer, component, start, end)
    return gather_tokens(alloc.tensor(layer, component), slots, out=out, impl=impl)


def scatter(
    alloc: Allocator, sequence: Sequence | int, layer: int, component: str, values: torch.Tensor, *,
    start: int | None = None, impl: Impl | None = None,
) -> None:  # fmt: skip
    """The reverse of ``gather``: writes ``values``, ``[n, H, W]``, to tokens ``[start, start + n)``.

    They must be reserved already. Tokens that other sequences share are written for all of them, and committed ones may
    be cached: write what was read, or what comes after ``num_cached_tokens``.
    """
    begin = _first_token(alloc, sequence, layer, component) if start is None else start
    slots = _sequence_slots(alloc, sequence, layer, component, begin, begin + len(values))
    scatter_tokens(alloc.tensor(layer, component), slots, values, impl=impl)


def _first_token(alloc: Allocator, sequence: Sequence | int, layer: int, component: str) -> int:
    handle = sequence.id if isinstance(sequence, Sequence) else sequence
    return alloc.core.first_token(handle, alloc.spec.group_of(layer, component))


def _sequence_slots(
    alloc: Allocator, sequence: Sequence | int, layer: int, component: str, start: int | None, end: int | None
) -> torch.Tensor:
    group = alloc.batch([sequence]).group(alloc.spec.group_of(layer, component))
    held, length = _first_token(alloc, sequence, layer, component), int(group.seq_lens_cpu[0])
    start, end = held if start is None else start, length if end is None else end
    if not held <= start <= end <= length:
        raise SpecError(f"tokens [{start}, {end}): the sequence holds [{held}, {length}) in layer {layer}")
    positions = torch.arange(start, end, device=group.block_table.device)
    return group.block_table[0].long()[positions // group.block_size] * group.block_size + positions % group.block_size


def batch_slots(batch: GroupBatch) -> torch.Tensor:
    """The slot of every token of every row, int64 [sum of ``seq_lens``], packed as ``cu_seqlens_k`` says.

    New for each fill, the same for all layers of the group. With it, ``gather_tokens`` gives K as attention over packed
    sequences takes it. Tokens that a window has dropped, and padding rows, read block 0, which is zero. No waiting.
    """
    check_batch(batch)
    total, device = int(batch.cu_seqlens_k_cpu[-1]), batch.block_table.device
    row = torch.repeat_interleave(
        torch.arange(batch.num_rows, device=device), batch.seq_lens.long(), output_size=total
    )  # fmt: skip
    position = torch.arange(total, device=device) - batch.cu_seqlens_k.long()[row]
    block = batch.kv_indices.long()[batch.kv_indptr.long()[row] + position // batch.block_size]
    return block * batch.block_size + position % batch.block_size


# ---- Tokens and blocks -------------------------------------------------------------------------------


def gather_tokens(
    blocks: torch.Tensor, slots: Ids, *, out: torch.Tensor | None = None, impl: Impl | None = None
) -> torch.Tensor:
    """The tokens at ``slots``, ``[n, H, W]`` in the cache's dtype, contiguous. out: written instead of new memory."""
    return _gather(_named(blocks, "slots", slots), out, impl)


def gather_blocks(
    blocks: torch.Tensor, ids: Ids, *, out: torch.Tensor | None = None, impl: Impl | None = None
) -> torch.Tensor:
    """As ``gather_tokens``, whole blocks: ``[n, block_size, H, W]``."""
    return _gather(_named(blocks, "ids", ids), out, impl)


def scatter_tokens(blocks: torch.Tensor, slots: Ids, values: torch.Tensor, *, impl: Impl | None = None) -> None:
    """Writes ``values``, ``[n, H, W]`` of a dtype that ``write.to_cache_dtype`` converts, to ``slots``. Of two values
    for one slot either may stay.
    """
    _scatter(_named(blocks, "slots", slots), values, impl)


def scatter_blocks(blocks: torch.Tensor, ids: Ids, values: torch.Tensor, *, impl: Impl | None = None) -> None:
    """As ``scatter_tokens``, whole blocks; values: ``[n, block_size, H, W]``."""
    _scatter(_named(blocks, "ids", ids), values, impl)


def copy_blocks(blocks: torch.Tensor, from_ids: Ids, to_ids: Ids, *, impl: Impl | None = None) -> None:
    """Copies block ``from_ids[i]`` to block ``to_ids[i]`` for all i, in no order.

    So no block may be written twice, or written and read: ``SpecError`` where the ids are on the host. torch holds all
    of it twice for a moment, Triton does not.
    """
    source, target = _named(blocks, "from_ids", from_ids), _named(blocks, "to_ids", to_ids)
    if len(source.ids) != len(target.ids):
        raise SpecError(f"copy_blocks: {len(source.ids)} from_ids and {len(target.ids)} to_ids; they go in pairs")
    if _on_host(to_ids):
        written = _numbers(to_ids)
        if len(np.unique(written)) < len(written):
            raise SpecError("copy_blocks: a block is written twice; which copy would stay is not said")
        if _on_host(from_ids) and len(both := np.intersect1d(written, _numbers(from_ids))):
            raise SpecError(
                f"copy_blocks: block {both[0]} is read and written; the copies have no order, so make two calls"
            )
    if heads_first(source.blocks):
        return _scatter(target, _gather(source, None, impl), impl)
    _copy(pick(source.blocks, impl), (source.blocks, source.ids), (source.blocks, target.ids), source.tokens)


def zero_blocks(blocks: torch.Tensor, ids: Ids, *, impl: Impl | None = None) -> None:
    """Writes zero to whole blocks of one component of one layer."""
    found = _named(blocks, "ids", ids)
    if len(found.ids) == 0:
        return
    if heads_first(found.blocks):
        pick(found.blocks, impl)
        as_bytes(found.blocks)[found.ids] = 0
        return
    (cells,) = _words(found.blocks)
    if pick(found.blocks, impl) == "torch":
        cells.index_fill_(0, found.ids.long(), 0)
    else:
        from kvmem.kernels import blocks_triton

        blocks_triton.zero(cells, found.ids)


class _Named(NamedTuple):
    """Blocks or tokens of a cache that ids name: ``shape`` together, ``tokens`` each."""

    blocks: torch.Tensor
    ids: torch.Tensor
    shape: tuple[int, ...]
    tokens: int


def _named(blocks: torch.Tensor, name: str, ids: Ids) -> _Named:
    blocks = plain(blocks)
    if blocks.ndim != 4:
        raise SpecError(f"blocks: got shape {tuple(blocks.shape)}; must be [num_blocks, block_size, heads, width]")
    num_blocks, size, *row = blocks.shape
    if name == "slots":
        checked = _checked(name, ids, num_blocks * size, blocks.device)
        return _Named(blocks, checked, (len(checked), *row), 1)
    checked = _checked(name, ids, num_blocks, blocks.device)
    return _Named(blocks, checked, (len(checked), size, *row), size)


def _index(named: _Named) -> tuple[torch.Tensor, ...]:
    """What is named, as an index of head-major blocks: these are copied by torch, head by head, whatever ``impl``."""
    ids, size = named.ids, named.blocks.shape[1]
    return (ids,) if named.tokens == size else (ids // size, ids % size)


def _gather(source: _Named, out: torch.Tensor | None, impl: Impl | None) -> torch.Tensor:
    out = _target(source.blocks, out, source.shape)
    if heads_first(source.blocks):
        pick(source.blocks, impl)
        as_bytes(out).copy_(as_bytes(source.blocks)[_index(source)])
        return out
    _copy(pick(source.blocks, impl), (source.blocks, source.ids), (out, None), source.tokens)
    return out


def _scatter(target: _Named, values: torch.Tensor, impl: Impl | None) -> None:
    blocks = target.blocks
    if tuple(values.shape) != target.shape or values.device != blocks.device:
        raise SpecError(
            f"values: got shape {tuple(values.shape)} on {values.device}; the ids and the cache make it {target.shape} "
            f"on {blocks.device}"
        )
    values = to_cache_dtype(values, blocks.dtype).contiguous()
    if heads_first(blocks):
        pick(blocks, impl)
        as_bytes(blocks)[_index(target)] = as_bytes(values)
        return
    _copy(pick(blocks, impl), (values, None), (blocks, target.ids), target.tokens)


# ---- How -------------------------------------------------------------------------------------------


def pick(blocks: torch.Tensor, impl: Impl | None = None) -> Impl:
    """The implementation that is used for a cache, or ``SpecError`` where the one asked for cannot be."""
    if impl is None:
        return "triton" if blocks.is_cuda and _has_triton() else "torch"
    if impl not in ("torch", "triton"):
        raise SpecError(f'impl: got {impl!r}; must be "torch", "triton" or None')
    if impl == "triton" and not _has_triton():
        raise SpecError('impl="triton": the package triton is not installed here; use "torch"')
    if impl == "triton" and not blocks.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise SpecError(
            f'impl="triton": the cache is on {blocks.device}; Triton compiles for GPUs only, and interprets where '
            'TRITON_INTERPRET=1 is set before it is imported: use "torch"'
        )
    return impl


@lru_cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


#: A tensor, and which of its tokens or blocks; None: all, in order.
_Side = tuple[torch.Tensor, torch.Tensor | None]


def _copy(impl: Impl, source: _Side, target: _Side, tokens: int) -> None:
    """tokens: how many each id stands for: 1 for slots, the block size for block ids."""
    ids = source[1] if target[1] is None else target[1]
    if ids is None or len(ids) == 0:
        return
    (read, from_ids), (written, to_ids) = source, target
    read, written = _words(read, written)
    if impl == "triton":
        from kvmem.kernels import blocks_triton

        return blocks_triton.copy(read, from_ids, written, to_ids, len(ids), tokens)
    if from_ids is not None:
        read = _by_id(read, tokens)
        if to_ids is None:
            torch.index_select(read, 0, from_ids, out=written.view(len(ids), *read.shape[1:]))
            return
        read = torch.index_select(read, 0, from_ids)
    written = _by_id(written, tokens)
    written.index_copy_(0, to_ids.long(), read.reshape(len(ids), *written.shape[1:]))  # type: ignore[union-attr]


def _by_id(cells: torch.Tensor, tokens: int) -> torch.Tensor:
    return cells.view(-1, cells.shape[-1]) if tokens == 1 else cells


def _words(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same memory as ``[num_blocks, block_size, words]`` (``[n, words]`` for tokens), in the widest integers that
    divide every row, stride and address."""
    try:
        flat = [plain(t).view(*t.shape[:-2], t.shape[-2] * t.shape[-1]) for t in tensors]  # never a copy
    except RuntimeError as error:
        raise SpecError(
            "blocks: the heads of a token must lie side by side, as in what Allocator.tensor() gives"
        ) from error
    sizes = [int(row.shape[-1]) * row.itemsize for row in flat]
    sizes += [int(stride) * row.itemsize for row in flat for stride in row.stride()[:-1]]
    sizes += [row.data_ptr() for row in flat] + [int(row.storage_offset()) * row.itemsize for row in flat]
    word = next(word for word in _WORDS if all(size % word == 0 for size in sizes))
    return [row.view(_WORDS[word]) for row in flat]


# ---- Checks ----------------------------------------------------------------------------------------


def _on_host(ids: Ids) -> bool:
    return not (isinstance(ids, torch.Tensor) and ids.device.type != "cpu")


def _numbers(ids: Ids) -> npt.NDArray[np.integer[Any]]:
    return ids.numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)


def _checked(name: str, ids: Ids, limit: int, device: torch.device) -> torch.Tensor:
    """One-dimensional int32 or int64 on the cache's device; those on the host lie in [0, limit)."""
    if not _on_host(ids):
        assert isinstance(ids, torch.Tensor)
        if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64) or ids.device != device:
            raise SpecError(
                f"{name}: got {ids.dtype} {tuple(ids.shape)} on {ids.device}; must be one dimension of int32 or int64 "
                f"on {device} or the host"
            )
        return ids.contiguous()
    numbers = _numbers(ids)
    if numbers.size == 0:
        numbers = np.zeros(0, np.int64)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise SpecError(f"{name}: got {numbers.dtype} {numbers.shape}; must be one dimension of integers")
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < limit:
        raise SpecError(f"{name}: got {numbers.min()} to {numbers.max()}; the tensor has 0 to {limit - 1}")
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int64)).to(device)


def _target(blocks: torch.Tensor, out: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=blocks.dtype, device=blocks.device)
    if tuple(out.shape) != shape or out.dtype != blocks.dtype or out.device != blocks.device or not out.is_contiguous():
        raise SpecError(
            f"out: got {out.dtype} {tuple(out.shape)} on {out.device}; must be contiguous {blocks.dtype} {shape} on "
            f"{blocks.device}"
        )
    return out
