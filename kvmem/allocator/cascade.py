"""Cascade attention: a prefix that several sequences of a batch share is read once for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    Int32s = npt.NDArray[np.int32]
    Ints = npt.NDArray[np.int64]

__all__ = ["Cascade", "CascadeLevel", "Rows", "make_cascade"]


@dataclass(frozen=True)
class CascadeLevel:
    """One level: ``G`` groups of neighbouring queries, each with the blocks that all of its queries attend to.

    qo_indptr, qo_indptr_cpu: int32 [G + 1], queries, running sum from 0; the last is the batch's number of new tokens.
    kv_indptr, kv_indptr_cpu: int32 [G + 1], blocks, running sum from 0.
    kv_indices, kv_indices_cpu: int32 [N], block ids.
    kv_last_page_len, kv_last_page_len_cpu: int32 [G], tokens in the last block; 0 for a group without blocks.
    kv_lens, kv_lens_cpu: int32 [G], tokens.

    A group without blocks holds queries that share nothing at this level: attention over it is zero, with an lse of
    -inf.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    kv_last_page_len: torch.Tensor
    kv_lens: torch.Tensor
    qo_indptr_cpu: torch.Tensor
    kv_indptr_cpu: torch.Tensor
    kv_indices_cpu: torch.Tensor
    kv_last_page_len_cpu: torch.Tensor
    kv_lens_cpu: torch.Tensor


@dataclass(frozen=True)
class Cascade:
    """The levels of a batch, from ``Batch.cascade()``: the outermost shared prefix first, a sequence's own tokens last.

    Attention over the levels, merged (``kvmem.kernels.merge``), equals attention over the batch. Only the last level
    takes a causal mask: a shared part ends before the first new token of every sequence in it. The tensors belong to
    this object, but the blocks that they name are those of the batch: valid as long as the batch's contents are.
    After Hydragen (arXiv:2402.05099) and FlashInfer's cascade attention.

    levels: at least one. block_size: tokens of a block.
    read_tokens: KV tokens that a layer reads with these levels, each group's once.
    saved_tokens: KV tokens that a layer would read in addition without the levels.
    drops_tokens: True if tokens of this batch are out of window, so that kernels must be given the window.
    """

    levels: tuple[CascadeLevel, ...]
    block_size: int
    read_tokens: int
    saved_tokens: int
    drops_tokens: bool


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that a cascade is made from, on the CPU, with fields as in ``GroupBatch``.

    cu_seqlens_q [B + 1], kv_indptr [B + 1], kv_indices [N], kv_last_page_len [B], seq_lens [B], first_tokens [B].
    asking: int64 [A], the rows that have queries, in order.
    common: int64, at most [A - 1], how many blocks each of them shares with the next; rows past its end share none.
    """

    cu_seqlens_q: Int32s
    kv_indptr: Int32s
    kv_indices: Int32s
    kv_last_page_len: Int32s
    seq_lens: Int32s
    first_tokens: Int32s
    asking: Ints
    common: Ints


@dataclass(frozen=True)
class _Prefix:
    """Asking rows ``[begin, end)`` share their first ``blocks`` blocks.

    path: how many blocks each prefix around this one has, the outermost first; ``base`` is the last of them, or 0.
    parent: the index of the prefix around this one; -1 if there is none.
    """

    begin: int
    end: int
    blocks: int
    path: tuple[int, ...]
    parent: int

    @property
    def depth(self) -> int:
        return len(self.path)

    @property
    def base(self) -> int:
        return self.path[-1] if self.path else 0

    @property
    def saved_blocks(self) -> int:
        return (self.end - self.begin - 1) * (self.blocks - self.base)


def make_cascade(
    rows: Rows, *, block_size: int, max_levels: int, min_blocks: int, device: torch.device
) -> Cascade:  # fmt: skip
    """Return the levels, in one upload.

    Cost: linear in the batch's rows and blocks. If prefixes must be left out, in addition the number of prefixes times
    their depth times ``max_levels``.
    """
    prefixes = _choose(_nest(_runs(rows.common.tolist())), max_levels - 1, min_blocks)
    by_depth: list[list[_Prefix]] = [[] for _ in range(max((p.depth for p in prefixes), default=-1) + 1)]
    for prefix in prefixes:
        by_depth[prefix.depth].append(prefix)
    levels = [_shared_level(rows, same, block_size) for same in by_depth]
    held = int((rows.seq_lens - rows.first_tokens)[rows.asking].sum())
    saved = sum(prefix.saved_blocks for prefix in prefixes) * block_size
    return Cascade(
        levels=tuple(_upload([*levels, _own_level(rows, prefixes, block_size)], device)),
        block_size=block_size,
        read_tokens=held - saved,
        saved_tokens=saved,
        drops_tokens=bool(rows.first_tokens.any()),
    )


#: ``(begin, end, blocks)`` as in ``_Prefix``.
_Run = tuple[int, int, int]


def _runs(common: list[int]) -> list[_Run]:
    """Return every run of rows that share more with each other than with the rows around them."""
    found, rising = list[_Run](), list[tuple[int, int]]()  # rising: (begin, blocks) of open runs
    for i, blocks in enumerate([*common, 0]):
        begin = i
        while rising and rising[-1][1] > blocks:
            begin, deeper = rising.pop()
            found.append((begin, i + 1, deeper))
        if blocks > (rising[-1][1] if rising else 0):
            rising.append((begin, blocks))
    return found


def _nest(runs: list[_Run]) -> list[_Prefix]:
    """Return the runs as prefixes of trees, the outer before the inner, from left to right."""
    prefixes, parent = list[_Prefix](), -1
    for begin, end, blocks in sorted(runs, key=lambda run: (run[0], -run[1])):
        while parent >= 0 and prefixes[parent].end <= begin:
            parent = prefixes[parent].parent
        path = (*prefixes[parent].path, prefixes[parent].blocks) if parent >= 0 else ()
        prefixes.append(_Prefix(begin, end, blocks, path, parent))
        parent = len(prefixes) - 1
    return prefixes


def _choose(prefixes: list[_Prefix], max_depth: int, min_blocks: int) -> list[_Prefix]:
    """Return the prefixes that together save most, each with ``min_blocks`` or more beyond the one around it, nested at
    most ``max_depth`` deep. Blocks of a prefix that is left out are read with the prefixes within it.

    Dynamic programming, from the innermost prefix out. ``within[i][a, l]``: the most blocks that prefix i and those
    within it can save if the nearest chosen prefix around them is the a-th of its path (0: none) and l levels are left.
    """
    depth = max((p.depth for p in prefixes), default=-1) + 1
    if depth <= max_depth and all(p.blocks - p.base >= min_blocks for p in prefixes):
        return prefixes
    within = [np.zeros((p.depth + 2, min(depth, max_depth) + 1), np.int64) for p in prefixes]
    take: list[npt.NDArray[np.bool_]] = []
    for i in range(len(prefixes) - 1, -1, -1):
        p, chosen = prefixes[i], np.full_like(within[i][:-1], -1)
        added = p.blocks - np.array((0, *p.path))[:, None]
        saved = (p.end - p.begin - 1) * added + within[i][-1, :-1]
        chosen[:, 1:] = np.where(added >= min_blocks, saved, -1)
        take.append(chosen > within[i][:-1])
        if p.depth:
            within[p.parent] += np.maximum(chosen, within[i][:-1])
    take.reverse()
    states, kept = list[tuple[int, int]](), list[_Run]()
    for i, p in enumerate(prefixes):
        nearest, left = states[p.parent] if p.depth else (0, min(depth, max_depth))
        if take[i][nearest, left]:
            kept.append((p.begin, p.end, p.blocks))
            nearest, left = p.depth + 1, left - 1
        states.append((nearest, left))
    return _nest(kept)


#: The fields of one level, on the CPU, in the order of ``CascadeLevel``.
_Level = tuple["Int32s", "Int32s", "Int32s", "Int32s", "Int32s"]


def _shared_level(rows: Rows, prefixes: list[_Prefix], block_size: int) -> _Level:
    """Return a group for each prefix, and groups without blocks for the queries between them."""
    ends, groups = [0], list[tuple[int, int]]()  # ends of queries; index of the first block id, number of block ids
    for prefix in prefixes:
        first, last = rows.asking[prefix.begin], rows.asking[prefix.end - 1]
        begin = int(rows.cu_seqlens_q[first])
        if begin > ends[-1]:
            ends.append(begin)
            groups.append((0, 0))
        ends.append(int(rows.cu_seqlens_q[last + 1]))
        groups.append((int(rows.kv_indptr[first]) + prefix.base, prefix.blocks - prefix.base))
    if ends[-1] < rows.cu_seqlens_q[-1]:
        ends.append(int(rows.cu_seqlens_q[-1]))
        groups.append((0, 0))
    starts, counts = np.array(groups, np.int64).T
    return _level(rows, np.array(ends), starts, counts, np.where(counts, block_size, 0), block_size)


def _own_level(rows: Rows, prefixes: list[_Prefix], block_size: int) -> _Level:
    """Return one group for each row, with the blocks that are in no prefix."""
    shared = np.zeros(len(rows.seq_lens), np.int64)
    for prefix in prefixes:  # inner ones overwrite outer ones
        shared[rows.asking[prefix.begin : prefix.end]] = prefix.blocks
    begins = rows.kv_indptr[:-1] + shared
    held = rows.kv_indptr[1:] - begins
    return _level(rows, rows.cu_seqlens_q, begins, held, np.where(held, rows.kv_last_page_len, 0), block_size)


def _level(rows: Rows, ends: Ints | Int32s, starts: Ints, counts: Ints, last: Ints, block_size: int) -> _Level:
    """Return a level whose group i has ``counts[i]`` of the batch's block ids, from index ``starts[i]`` on."""
    indptr = np.concatenate(([0], np.cumsum(counts)))
    taken = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], counts)
    lengths = np.maximum(counts - 1, 0) * block_size + last
    return ends, indptr, rows.kv_indices[taken], last, lengths  # type: ignore[return-value]


def _upload(levels: Iterable[_Level], device: torch.device) -> list[CascadeLevel]:
    """Return the levels on the device, after one copy of one buffer with all fields of all levels."""
    fields = [part for level in levels for part in level]
    host = torch.from_numpy(np.concatenate(fields).astype(np.int32))
    # The source is pageable: torch stages it before the call returns, so nothing has to wait for the copy.
    there = host.to(device, non_blocking=True)
    sizes = [len(part) for part in fields]
    gpu, cpu = torch.split(there, sizes), torch.split(host, sizes)
    return [CascadeLevel(*gpu[i : i + 5], *cpu[i : i + 5]) for i in range(0, len(fields), 5)]
