"""The metadata of one step, in the forms that attention kernels read. The core fills it in place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from kvmem import _core
from kvmem.allocator.batch_buffers import FIELDS, PER_ROW, RowFields
from kvmem.allocator.cascade import Cascade, Rows, make_cascade
from kvmem.arguments import INT32_MAX, check_group, check_size
from kvmem.errors import OutOfMemory, SpecError
from kvmem.spec import Group

__all__ = ["Batch", "GroupBatch", "new_batch"]


class GroupBatch:
    """One group's metadata of a step: ``B`` rows (sequences, then padding rows), ``T`` new tokens, ``N`` blocks in all.

    Every field is a view into a buffer whose address never changes; its contents are valid until the next fill.

    =====================  =====================================================================================
    block_table            int32 [B, M]: block ids; entries past a sequence's last block are 0
    seq_lens               int32 [B]: tokens, this step's included
    first_tokens           int32 [B]: first token that is still held; 0 without a sliding window
    slot_mapping           int64 [T]: ``block * block_size + offset``, where each new token is written
    positions              int32 [T]: position of each new token in its sequence
    batch_indices          int32 [T]: row of the batch that each new token belongs to
    cu_seqlens_q           int32 [B + 1]: new tokens, running sum from 0 (FlashInfer's ``qo_indptr``)
    cu_seqlens_k           int32 or int64 [B + 1]: tokens, running sum from 0
    kv_indptr              int32 [B + 1]: blocks, running sum from 0 (FlashInfer's CSR)
    kv_indices             int32 [N]: block ids of all sequences, one sequence after the other
    kv_last_page_len       int32 [B]: tokens in the last block, 1 to ``block_size``
    rows                   int32 [B]: row of each sequence in ``Allocator.rows()``; None on the paged backend
    row_starts             int32 or int64 [B + 1]: ``row * row_tokens``; None on the paged backend
    =====================  =====================================================================================

    Each field also exists as ``<field>_cpu``, on the CPU: FlashInfer's ``plan()`` reads some there. On device "cpu"
    both are one tensor. A padding row has one new token: it reads the null block, block 0, which is zero, and writes to
    the padding block, block 1. Blocks that are out of window are 0 in ``block_table`` and ``kv_indices``.

    Two fields are int64 if int32 might be too small: ``cu_seqlens_k`` of a batch that was made for 2**31 tokens or more
    in all, and ``row_starts`` if the rows of the group have as many. Kernels that take int32 only refuse those.

    block_size: tokens of a block.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    first_tokens: torch.Tensor
    slot_mapping: torch.Tensor
    positions: torch.Tensor
    batch_indices: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor
    rows: torch.Tensor | None
    row_starts: torch.Tensor | None
    seq_lens_cpu: torch.Tensor
    first_tokens_cpu: torch.Tensor
    cu_seqlens_q_cpu: torch.Tensor
    cu_seqlens_k_cpu: torch.Tensor
    kv_indptr_cpu: torch.Tensor
    kv_indices_cpu: torch.Tensor
    kv_last_page_len_cpu: torch.Tensor
    rows_cpu: torch.Tensor | None
    row_starts_cpu: torch.Tensor | None

    def __init__(
        self,
        device: torch.device,
        block_size: int,
        all_rows_tokens: int,
        max_sequences: int,
        max_new_tokens: int,
        max_blocks: int,
        max_indices: int,
    ) -> None:
        """all_rows_tokens: tokens of all rows of the allocator; 0 on the paged backend, which has no rows."""
        self.block_size = block_size
        self._max_blocks = max_blocks
        self._core: _core.Allocator | None = None
        self._group = 0
        self._views: dict[str, tuple[int, torch.Tensor]] = {}
        lengths = {
            "B": max_sequences,
            "B+1": max_sequences + 1,
            "T": max_new_tokens,
            "N": max_indices,
            "BM": max_sequences * max_blocks,
        }
        on_gpu = device.type == "cuda"
        fields = {name: of for name, of in FIELDS.items() if all_rows_tokens or name not in ("rows", "row_starts")}
        for name, most in (("cu_seqlens_k", max_indices * block_size), ("row_starts", all_rows_tokens)):
            if most > INT32_MAX:
                fields[name] = torch.int64, fields[name][1]
        small = {name: (dtype, lengths[of]) for name, (dtype, of) in fields.items() if of in PER_ROW}
        try:
            self._small = RowFields(small, device)
            self._host = {
                name: self._small.host[name]
                if of in PER_ROW
                else torch.zeros(lengths[of], dtype=dtype, pin_memory=on_gpu)
                for name, (dtype, of) in fields.items()
            }
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemory(
                f"no host memory for a batch of max_sequences={max_sequences}, max_new_tokens={max_new_tokens} and "
                f"{max_blocks} blocks a sequence, {max_indices} in all: make it for fewer"
            ) from error
        self._device = self._host
        if on_gpu:
            large = {name: host.to(device) for name, host in self._host.items() if name not in self._small.device}
            self._device = self._small.device | large
        max_deltas = 4 * max_sequences + 64  # for more, whole rows of the table are uploaded
        self._places = torch.zeros(max_deltas, dtype=torch.int64, pin_memory=on_gpu)
        self._blocks = torch.zeros(max_deltas, dtype=torch.int32, pin_memory=on_gpu)
        self._uploaded = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self._stream = partial(torch.cuda.current_stream, device)
        self.buffers = _core.BatchBuffers(
            max_sequences=max_sequences,
            max_new_tokens=max_new_tokens,
            max_blocks=max_blocks,
            max_indices=max_indices,
            **{name: tensor.numpy() for name, tensor in self._host.items()},
            delta_places=self._places.numpy(),
            delta_blocks=self._blocks.numpy(),
        )

    def begin(self) -> None:
        """Wait until the last upload has read the host buffers, which are about to be written."""
        if self._uploaded is not None:
            self._uploaded.synchronize()

    def update(self, core: _core.Allocator, group: int) -> None:
        """Upload what the core has changed in the buffers, on torch's current stream.

        core, group: ``cascade()`` asks them for shared blocks.
        """
        self._core, self._group = core, group
        if self._uploaded is None:
            return
        filled = self.buffers
        self._small.upload()
        for name in ("slot_mapping", "positions", "batch_indices"):
            self._upload(name, 0, filled.num_new_tokens)
        self._upload("kv_indices", filled.indices_from, filled.num_indices)
        if filled.num_deltas < 0:
            first, end = filled.table_rows
            self._upload("block_table", first * self._max_blocks, end * self._max_blocks)
        elif filled.num_deltas > 0:
            table = self._device["block_table"]
            places, blocks = (x.to(table.device, non_blocking=True) for x in self._deltas())
            table.scatter_(0, places, blocks)
        self._uploaded.record(self._stream())  # by default it would be the current device's stream

    def check_current(self) -> None:
        """Raise ``StaleHandle`` if the batch may refer to memory that now belongs to other tokens.

        That is so once a sequence of the batch was freed since the fill, or once tokens that the batch has of it were
        moved, or its new tokens were cut off or are out of window. Other sequences may come and go meanwhile, and the
        batch's own may grow. ``write_kv`` and the attention functions call this.

        Cost: one comparison while nothing has changed in the allocator, else one for each sequence. Not found: memory
        that another thread frees between this check and the write. A captured graph runs no Python: call this before
        each replay.
        """
        if self._core is not None:
            self._core.check_current(self._group, self.buffers)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SpecError(
            f"{self!r}: a batch refers to memory of this process, and is not pickled or copied; send its tensors "
            "(block_table, seq_lens ...), or make_batch() a second one"
        )

    def __repr__(self) -> str:
        if not self.buffers.filled:
            return f"{type(self).__name__}(block_size={self.block_size}, not filled)"
        rows = f"{self.num_rows} rows, {self.num_new_tokens} new tokens, at most {self.max_seqlen_k} tokens a row"
        return f"{type(self).__name__}({rows}, {self.num_indices} blocks of {self.block_size})"

    @property
    def num_rows(self) -> int:
        """B, the number of rows: sequences, then padding rows."""
        return self.buffers.num_rows

    @property
    def num_new_tokens(self) -> int:
        """T, the number of new tokens, one for each padding row included."""
        return self.buffers.num_new_tokens

    @property
    def num_indices(self) -> int:
        """N, the number of blocks of all rows."""
        return self.buffers.num_indices

    @property
    def max_seqlen_q(self) -> int:
        """The largest number of new tokens of a row."""
        return self.buffers.max_seqlen_q

    @property
    def max_seqlen_k(self) -> int:
        """The largest number of tokens of a row."""
        return self.buffers.max_seqlen_k

    def _upload(self, name: str, begin: int, end: int) -> None:
        if begin < end:
            self._device[name][begin:end].copy_(self._host[name][begin:end], non_blocking=True)

    def _deltas(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._places[: self.buffers.num_deltas], self._blocks[: self.buffers.num_deltas]

    @property
    def table_deltas(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The entries of ``block_table`` that the last fill changed, for copies of it elsewhere; on the CPU.

        A pair: indices, int64 [n], ``row * M + column`` with the M that the batch was made for; and blocks, int32 [n].
        Valid until the next fill. None if more than ``4 * max_sequences + 64`` entries changed, as in the first fill:
        copy the whole table then.
        """
        return None if self.buffers.num_deltas < 0 else self._deltas()

    def _used(self, name: str) -> int:
        counts = {"B": self.num_rows, "B+1": self.num_rows + 1, "T": self.num_new_tokens, "N": self.num_indices}
        return counts.get(FIELDS[name][1], self.num_rows * self._max_blocks)

    @property
    def drops_tokens(self) -> bool:
        """True if tokens of this batch are out of window, so that kernels must be given the window."""
        return bool(self.first_tokens_cpu.any())

    def full(self, name: str) -> torch.Tensor:
        """Return the whole buffer of a field on the device, for captured graphs. Its address never changes."""
        buffer = self._device[name]
        return buffer.view(-1, self._max_blocks) if name == "block_table" else buffer

    def cascade(
        self, *, max_levels: int = 3, min_tokens: int = 256, queries: GroupBatch | None = None
    ) -> Cascade:  # fmt: skip
        """Return this batch as levels, for attention that reads shared prefixes once: see ``Cascade``.

        Sequences share blocks that are the same memory in both, after ``fork()`` or a prefix hit (virtual backend: in
        whole pages too). Only neighbours are compared: ``Allocator.cascade_order()`` puts sequences that share side by
        side.

        max_levels: the most levels, the last one (each sequence's own tokens) included. Each costs a kernel launch and
            a merge of all queries. If prefixes are nested deeper, those that save least are left out: their tokens are
            read with the prefixes within them.
        min_tokens: a shared part that is shorter gets no level of its own. Default: about one tile of a kernel.
        queries: the batch by which the queries are packed, if that is another group's (cross attention).

        A group with a sliding window gets one level, without sharing: kernels place a window relative to the end of
        each level, and shared tokens of such sequences soon are out of window. So does a batch that shares nothing.

        REQUIRES: the batch is filled, and nothing has changed its sequences since. ``StaleHandle`` if one was freed,
        ``SpecError`` for a batch that was never filled. Cost: a comparison for each shared page or block of each pair
        of neighbours, then linear in rows and blocks.
        """
        if self._core is None or not self.buffers.filled:
            raise SpecError("cascade: this batch was never filled; Allocator.batch() makes one that is")
        check_size("max_levels", max_levels), check_size("min_tokens", min_tokens, 0)
        if queries is not None and getattr(queries, "num_rows", None) != self.num_rows:
            raise SpecError(f"queries: got {queries!r}; must be another group's batch of the same {self.num_rows} rows")
        ids = np.array(self.buffers.handles, np.int32)
        cu_seqlens_q = (queries or self).cu_seqlens_q_cpu.numpy()
        asking = np.flatnonzero(np.diff(cu_seqlens_q))
        sharing = asking[asking < len(ids)]  # without padding rows
        common = np.empty(max(0, len(sharing) - 1), np.int64)
        self._core.common_blocks(ids[sharing], self._group, common)
        # Only the last level is masked, so new tokens stay out of shared parts, even if they were committed since.
        old = (self.seq_lens_cpu - self.cu_seqlens_q_cpu.diff()).numpy()[sharing] // self.block_size
        rows = Rows(
            cu_seqlens_q, self.kv_indptr_cpu.numpy(), self.kv_indices_cpu.numpy(), self.kv_last_page_len_cpu.numpy(),
            self.seq_lens_cpu.numpy(), self.first_tokens_cpu.numpy(), asking,
            np.minimum(common, np.minimum(old[:-1], old[1:])),
        )  # fmt: skip
        min_blocks = max(1, -(-min_tokens // self.block_size))
        device = self.kv_indices.device
        return make_cascade(
            rows, block_size=self.block_size, max_levels=max_levels, min_blocks=min_blocks, device=device
        )

    def _view(self, name: str, field: str, buffers: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Return the used part of a buffer, as a view that is made on first use."""
        if field not in buffers:
            return None
        used, known = self._used(field), self._views.get(name)
        if known is None or known[0] != used:
            view = buffers[field][:used]
            known = self._views[name] = used, view.view(-1, self._max_blocks) if field == "block_table" else view
        return known[1]


#: Of each field, its line in the table above.
_DOCS = dict(re.findall(r"^ *(\w+) +(int.+)$", GroupBatch.__doc__ or "", re.MULTILINE))


def _field(name: str, *, cpu: bool) -> property:
    def get(batch: GroupBatch) -> torch.Tensor | None:
        return batch._view(name + "_cpu" * cpu, name, batch._host if cpu else batch._device)

    return property(get, doc=_DOCS.get(name, "") + "; on the CPU" * cpu)


for _name in FIELDS:  # properties, because __getattr__ would slow down every other attribute
    setattr(GroupBatch, _name, _field(_name, cpu=False))
    setattr(GroupBatch, f"{_name}_cpu", _field(_name, cpu=True))


class Batch(GroupBatch):
    """The metadata of a step for every group; its own fields are those of the first group that grows with the tokens.

    Made by ``Allocator.batch()`` or ``make_batch()``, refilled in place by ``Allocator.fill()`` and ``step()``.
    ``batch.group(i)`` gives the fields of another group.
    """

    def __init__(self, main: int, others: dict[int, GroupBatch], **sizes: Any) -> None:
        """main: the index of this object's own group. others: by index. sizes: as for ``GroupBatch``."""
        super().__init__(**sizes)
        self._main = main
        self.others = others

    def begin_others(self) -> list[tuple[int, _core.BatchBuffers]] | None:
        """Call ``begin()`` of all other groups; return their buffers by group, or None if there is no other group."""
        if not self.others:
            return None
        for group in self.others.values():
            group.begin()
        return [(index, group.buffers) for index, group in self.others.items()]

    def forget(self) -> None:
        """Mark the contents of all buffers as unknown, after a fill that failed."""
        self.buffers.forget()
        for group in self.others.values():
            group.buffers.forget()

    def group(self, index: int) -> GroupBatch:
        """Return the metadata of group ``index`` of the spec. ``SpecError`` if there is no such group."""
        found = check_group("index", index, 1 + len(self.others))
        return self if found == self._main else self.others[found]

    @property
    def groups(self) -> list[GroupBatch]:
        """The metadata of all groups, in the order of the spec."""
        return [self.group(index) for index in range(1 + len(self.others))]


def _fits(field: str, count: int, of: str = "entries") -> int:
    if count > INT32_MAX:
        raise SpecError(f"{field}: got {count} {of} of a batch; kernels count them in int32, {INT32_MAX} at most")
    return count


def new_batch(
    groups: Sequence[Group],
    main: int,
    device: torch.device,
    all_rows_tokens: Sequence[int],
    rows: int,
    fresh: list[int],
    longest: list[int],
    blocks: list[int] | None,
) -> Batch:
    """Return empty buffers for ``rows`` rows. ``SpecError`` if a count would not fit an int32.

    all_rows_tokens, fresh, longest, blocks: by group, tokens of all rows of the allocator, new tokens in all, tokens of
    the longest sequence, and blocks in all (None: the most that these can make).
    """
    sizes: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        width = -(-longest[index] // group.block_size)
        sizes.append(
            {
                "device": device,
                "block_size": group.block_size,
                "all_rows_tokens": all_rows_tokens[index],
                "max_sequences": _fits("max_sequences", rows),
                "max_new_tokens": _fits("max_new_tokens", fresh[index]),
                "max_blocks": width,
                "max_indices": _fits(
                    "max_sequences and max_tokens", rows * width if blocks is None else blocks[index], "blocks in all"
                ),
            }
        )
    others = {index: GroupBatch(**size) for index, size in enumerate(sizes) if index != main}
    return Batch(main, others, **sizes[main])
