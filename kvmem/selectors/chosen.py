"""The batch over chosen blocks: the metadata of a step, with fewer blocks in it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvmem.allocator.batch import GroupBatch
from kvmem.allocator.batch_buffers import FIELDS
from kvmem.arguments import INT32_MAX
from kvmem.errors import SpecError
from kvmem.geometry.views import plain

__all__ = ["ChosenBatch", "Plan", "head_stride"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """How many blocks of each row are chosen: known on the host before any score is.

    group: what is read. Of each row, int64 ``[B]``: queries; blocks that it has; first_new, the first of those that are
    always in since they are the newest, all with new tokens; counts, how many are chosen.
    """

    group: GroupBatch
    queries: Ints
    blocks: Ints
    first_new: Ints
    counts: Ints

    @staticmethod
    def of(group: GroupBatch, packed: GroupBatch, budget_tokens: int) -> Plan:
        size, lengths = group.block_size, group.seq_lens_cpu.numpy().astype(np.int64)
        new = np.diff(group.cu_seqlens_q_cpu.numpy()).clip(1)
        blocks, first_new = -(-lengths // size), (lengths - new).clip(0) // size
        always = blocks - first_new + (first_new > 0)
        counts = np.minimum(blocks, np.maximum(budget_tokens // size, always))
        return Plan(group, np.diff(packed.cu_seqlens_q_cpu.numpy()).astype(np.int64), blocks, first_new, counts)


def head_stride(blocks: torch.Tensor) -> int:
    """Return how many heads lie from one block to the next, in a tensor ``[num_blocks, block_size, heads, width]``.

    With it, the head of a block is a block of one head: number ``block * head_stride + head`` of a tensor in which
    blocks lie ``width`` elements apart. ``SpecError`` where that cannot be.
    """
    step, width = blocks.stride(0), blocks.shape[3]
    if step % width or (len(blocks) + 1) * (step // width) > INT32_MAX:
        raise SpecError(
            f"per_head: this cache has {len(blocks)} blocks, one every {step} elements; they must be a multiple of the "
            f'{width} of a head, and as many heads as int32 counts: use interleave="none", or per_head=False'
        )
    return step // width


class ChosenBatch(GroupBatch):
    """The metadata of a step over chosen blocks: what paged kernels take in place of the step's own batch.

    Adapters of ``kvmem.kernels`` take it as any batch::

        k, v = chosen.cache(*alloc.kv(layer))
        out = sdpa(chosen.queries(q), (k, v), chosen)      # or FlashInfer, with decode_plan(chosen, ...)
        out = chosen.outputs(out)

    A row is a sequence; with ``per_head`` it is a KV head of a sequence, with one head in the cache, and there are ``B
    * H`` of them. Blocks are in the order of the sequence, the newest one last, so that causal masks, which count from
    the end, are right. Fields are those of ``GroupBatch``, in block form on both backends (``rows`` is None), except
    those that say where to write: ``SpecError``. ``seq_lens`` counts the tokens of chosen blocks. On a GPU, block ids
    have no copy on the CPU; all else is known there without waiting, and does not depend on the layer: FlashInfer's
    ``plan()`` is called once a step if ``kv_indices`` is copied into one buffer.

    Valid while the step's batch is. blocks: int64 ``[rows, M]``, which blocks of the sequence were chosen, ascending,
    -1 past the last one. per_head: see above.
    """

    def __init__(self, plan: Plan, chosen: torch.Tensor, ids: torch.Tensor, per_head: bool) -> None:
        """chosen: as ``blocks``, ``[B, H or 1, M]``. ids: int64, their numbers in the cache, of any value where chosen
        is -1.
        """
        self.per_head, self.block_size, self._source = per_head, plan.group.block_size, plan.group
        self._heads = chosen.shape[1] if per_head else 1
        self.blocks = chosen.flatten(0, 1)
        self._core, self._group, self._views, self._max_blocks = None, 0, {}, chosen.shape[2]
        table = ids.flatten(0, 1).masked_fill(self.blocks < 0, 0).to(torch.int32)
        counts, lengths = plan.counts.repeat(self._heads), plan.group.seq_lens_cpu.numpy()
        last = (lengths - (plan.blocks - 1) * self.block_size) * (plan.blocks > 0)
        tokens = ((plan.counts - 1).clip(0) * self.block_size + last).repeat(self._heads)
        used = np.flatnonzero(np.arange(self._max_blocks) < counts[:, None])
        queries = plan.queries.repeat(self._heads)
        host = {
            "seq_lens": tokens, "first_tokens": 0 * tokens, "kv_last_page_len": last.repeat(self._heads),
            "cu_seqlens_q": _sums(queries), "cu_seqlens_k": _sums(tokens), "kv_indptr": _sums(counts),
        }  # fmt: skip
        wide = {"cu_seqlens_k": torch.int64} if tokens.sum() > INT32_MAX else {}
        self._host = {n: torch.from_numpy(x).to(wide.get(n, FIELDS[n][0])) for n, x in host.items()}
        device, self._order = ids.device, None if not per_head else _order(plan.queries, self._heads, ids.device)
        self._device = {name: x.to(device, non_blocking=True) for name, x in self._host.items()}
        blocks = {
            "block_table": table.flatten(),
            "kv_indices": table.flatten().index_select(0, torch.from_numpy(used).to(device)),
        }
        self._device |= blocks
        if device.type == "cpu":
            self._host |= blocks
        self.buffers: Any = SimpleNamespace(  # what GroupBatch asks of those that the core fills
            filled=True, handles=(), num_deltas=-1, num_rows=len(tokens), num_indices=int(counts.sum()),
            num_new_tokens=int(queries.sum()), max_seqlen_q=int(queries.max(initial=0)),
            max_seqlen_k=int(tokens.max(initial=0)),
        )  # fmt: skip

    def check_current(self) -> None:
        """As ``GroupBatch.check_current``, of the step's batch."""
        self._source.check_current()

    def cache(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of a layer as this batch's rows read them; k, v: ``Allocator.kv(layer)``.

        With ``per_head``: views ``[n, block_size, 1, width]`` whose blocks overlap, for reading. ``SpecError`` then if
        K and V differ in width or strides.
        """
        if not self.per_head:
            return k, v
        k, v = plain(k), plain(v)
        if k.stride() != v.stride() or k.shape[1:] != v.shape[1:]:
            raise SpecError(
                f"per_head: K is {tuple(k.shape)} with strides {k.stride()} and V {tuple(v.shape)} with {v.stride()}; "
                "one table is for both: use per_head=False"
            )
        step, (blocks, size, heads, width) = head_stride(k), k.shape
        shape, strides = (max(0, (blocks - 1) * step + heads), size, 1, width), (width, k.stride(1), width, 1)
        return k.as_strided(shape, strides), v.as_strided(shape, strides)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Return queries ``[T, query heads, width]`` as they are packed by ``cu_seqlens_q``; with ``per_head`` ``[T *
        H, query heads / H, width]``.
        """
        if self._order is None:
            return q
        return torch.unflatten(q, 1, (self._heads, -1)).flatten(0, 1)[self._order]

    def outputs(self, out: torch.Tensor) -> torch.Tensor:
        """Return what attention gives for ``queries(q)``, the output or the lse, in the order of q."""
        if self._order is None:
            return out
        found = torch.empty_like(out)
        found[self._order] = out
        return torch.unflatten(found, 0, (-1, self._heads)).flatten(1, 2)

    def _view(self, name: str, field: str, buffers: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if field not in buffers and field in _WRITES:
            raise SpecError(f"{field}: a batch over chosen blocks is for reading; write with the step's own batch")
        if field not in buffers and field in _BLOCKS:
            raise SpecError(f"{name}: blocks were chosen on the device; copy {field} and wait, where that is needed")
        return super()._view(name, field, buffers)


_WRITES: Final = ("slot_mapping", "positions", "batch_indices")
_BLOCKS: Final = ("block_table", "kv_indices")


def _sums(counts: Ints) -> Ints:
    return np.concatenate(([0], counts.cumsum()))


def _order(queries: Ints, heads: int, device: torch.device) -> torch.Tensor:
    """Return where each query of ``(row, head, token)`` is in ``(token, head)``, int64 ``[T * heads]``."""
    rows = np.repeat(np.arange(len(queries)), queries)
    token, head = np.divmod(np.arange(len(rows) * heads), heads)
    return torch.from_numpy(np.lexsort((token, head, rows[token]))).to(device)
