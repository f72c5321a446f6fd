"""Attention over shared prefixes: what several sequences of a batch have in common is read once for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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

    ================  ===============  ========================================================================
    qo_indptr         int32 [G + 1]    queries, running sum from 0; the last is the batch's number of new tokens
    kv_indptr         int32 [G + 1]    blocks, running sum from 0
    kv_indices        int32 [N]        block ids
    kv_last_page_len  int32 [G]        tokens in the last block; 0 where a group has no blocks
    kv_lens           int32 [G]        tokens
    ================  ===============  ========================================================================

    Each also exists as ``<field>_cpu``. A group without blocks stands for queries that share nothing at this level:
    attention over it is zero, with an lse of -inf.
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
    """The levels of a batch, the outermost shared prefix first, each sequence's own tokens last. From
    ``Batch.cascade()``.

    Attention over the levels, joined (``kvmem.kernels.merge``), is attention over the batch. Only the last level takes
    a causal mask: a shared part ends before the first new token of every sequence in it. Its tensors are its own, but
    the blocks they name are those of the batch: valid as long as the batch's contents are.

    block_size: tokens of a block.
    read_tokens: KV tokens that a layer reads with these levels, one read a group; without them, ``read_tokens +
        saved_tokens``.
    drops_tokens: a sliding window has dropped tokens of this batch, so kernels must be given the window.
    """

    levels: tuple[CascadeLevel, ...]
    block_size: int
    read_tokens: int
    saved_tokens: int
    drops_tokens: bool


@dataclass(frozen=True)
class Rows:
    """What a cascade is made of, all on the CPU: rows of a batch, as in ``GroupBatch``.

    cu_seqlens_q [B + 1], kv_indptr [B + 1], kv_indices [N], kv_last_page_len [B], seq_lens [B], first_tokens [B].
    asking: int64 [A], the rows that have queries, in order. common: int64 [A - 1], the blocks that each of them shares
    with the next; nothing is shared after the end of it.
    """

    cu_seqlens_q: Int32s
    kv_indptr: Int32s
    kv_indices: Int32s
    kv_last_page_len: Int32s
    seq_lens: Int32s
    first_tokens: Int32s
    asking: Ints
    common: Ints


@dataclass
class _Node:
    """Asking rows ``[begin, end)`` have their first ``blocks`` blocks in common; ``parent`` the first few of those."""

    begin: int
    end: int
    blocks: int
    parent: _Node | None = None
    children: list[_Node] = field(default_factory=list)

    @property
    def base(self) -> int:
        return 0 if self.parent is None else self.parent.blocks

    @property
    def saved_blocks(self) -> int:
        return (self.end - self.begin - 1) * (self.blocks - self.base)

    @property
    def loss(self) -> int:
        """Blocks that would be read more often without this node: each part below would read them for itself."""
        parts = self.end - self.begin - sum(c.end - c.begin - 1 for c in self.children)
        return (parts - 1) * (self.blocks - self.base)


def make_cascade(
    rows: Rows, *, block_size: int, max_levels: int, min_blocks: int, device: torch.device
) -> Cascade:  # fmt: skip
    """Cost: linear in the batch's rows and blocks, and quadratic in the number of shared prefixes that are dropped
    because they are short or nested too deep. One upload.
    """
    nodes = _thin(_nest(_prefixes(rows.common.tolist())), max_levels - 1, min_blocks)
    by_depth: list[list[_Node]] = []
    for node, depth in zip(nodes, _depths(nodes), strict=True):
        by_depth += [[] for _ in range(depth + 1 - len(by_depth))]
        by_depth[depth].append(node)
    levels = [_shared_level(rows, same, block_size) for same in by_depth]
    held = int((rows.seq_lens - rows.first_tokens)[rows.asking].sum())
    saved = sum(node.saved_blocks for node in nodes) * block_size
    return Cascade(
        levels=tuple(_upload([*levels, _own_level(rows, nodes, block_size)], device)),
        block_size=block_size,
        read_tokens=held - saved,
        saved_tokens=saved,
        drops_tokens=bool(rows.first_tokens.any()),
    )


def _prefixes(common: list[int]) -> list[tuple[int, int, int]]:
    """``(begin, end, blocks)`` of every run of rows that share more with each other than with the rows around them."""
    found, rising = [], list[tuple[int, int]]()  # rising: (begin, blocks) of runs that are not over yet
    for i, blocks in enumerate([*common, 0]):
        begin = i
        while rising and rising[-1][1] > blocks:
            begin, deeper = rising.pop()
            found.append((begin, i + 1, deeper))
        if blocks > (rising[-1][1] if rising else 0):
            rising.append((begin, blocks))
    return found


def _nest(prefixes: list[tuple[int, int, int]]) -> list[_Node]:
    """The prefixes as trees, parents before their children, from left to right."""
    nodes, around = list[_Node](), list[_Node]()
    for begin, end, blocks in sorted(prefixes, key=lambda p: (p[0], -p[1])):
        while around and around[-1].end <= begin:
            around.pop()
        node = _Node(begin, end, blocks, around[-1] if around else None)
        if node.parent is not None:
            node.parent.children.append(node)
        nodes.append(node)
        around.append(node)
    return nodes


def _depths(nodes: list[_Node]) -> list[int]:
    depths: dict[int, int] = {}
    for node in nodes:
        depths[id(node)] = 0 if node.parent is None else depths[id(node.parent)] + 1
    return list(depths.values())


def _thin(nodes: list[_Node], max_depth: int, min_blocks: int) -> list[_Node]:
    """Without prefixes that add fewer than ``min_blocks`` to the one around them, and with at most ``max_depth`` around
    any row. Those that save least go first; what they held becomes part of what lies within.
    """
    while True:
        below: dict[int, int] = {}  # how many nodes the longest chain from here down has
        for node in reversed(nodes):
            below[id(node)] = 1 + max((below[id(c)] for c in node.children), default=0)
        above = _depths(nodes)
        bad = [
            node
            for node, depth in zip(nodes, above, strict=True)
            if node.blocks - node.base < min_blocks or depth + below[id(node)] > max_depth
        ]
        if not bad:
            return nodes
        worst = min(bad, key=lambda node: node.loss)
        for child in worst.children:
            child.parent = worst.parent
        if worst.parent is not None:
            siblings = worst.parent.children
            siblings.remove(worst)
            siblings += worst.children
        nodes = [node for node in nodes if node is not worst]


#: The fields of one level, on the CPU, in the order of ``CascadeLevel``.
_Level = tuple["Int32s", "Int32s", "Int32s", "Int32s", "Int32s"]


def _shared_level(rows: Rows, nodes: list[_Node], block_size: int) -> _Level:
    """Groups of the nodes, and between them groups without blocks for all queries that share nothing here."""
    ends, groups = [0], list[tuple[int, int]]()  # of queries; the first of its block ids, and how many
    for node in nodes:
        first, last = rows.asking[node.begin], rows.asking[node.end - 1]
        begin = int(rows.cu_seqlens_q[first])
        if begin > ends[-1]:
            ends.append(begin)
            groups.append((0, 0))
        ends.append(int(rows.cu_seqlens_q[last + 1]))
        groups.append((int(rows.kv_indptr[first]) + node.base, node.blocks - node.base))
    if ends[-1] < rows.cu_seqlens_q[-1]:
        ends.append(int(rows.cu_seqlens_q[-1]))
        groups.append((0, 0))
    starts, counts = np.array(groups, np.int64).T
    return _level(rows, np.array(ends), starts, counts, np.where(counts, block_size, 0), block_size)


def _own_level(rows: Rows, nodes: list[_Node], block_size: int) -> _Level:
    shared = np.zeros(len(rows.seq_lens), np.int64)
    for node in nodes:  # a child comes after its parent
        shared[rows.asking[node.begin : node.end]] = node.blocks
    begins = rows.kv_indptr[:-1] + shared
    held = rows.kv_indptr[1:] - begins
    return _level(rows, rows.cu_seqlens_q, begins, held, np.where(held, rows.kv_last_page_len, 0), block_size)


def _level(rows: Rows, ends: Ints | Int32s, starts: Ints, counts: Ints, last: Ints, block_size: int) -> _Level:
    """Group i takes ``counts[i]`` of the batch's block ids from ``starts[i]`` on."""
    indptr = np.concatenate(([0], np.cumsum(counts)))
    taken = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], counts)
    lengths = np.maximum(counts - 1, 0) * block_size + last
    return ends, indptr, rows.kv_indices[taken], last, lengths  # type: ignore[return-value]


def _upload(levels: Iterable[_Level], device: torch.device) -> list[CascadeLevel]:
    """All fields of all levels in one buffer, so that it takes one copy."""
    fields = [part for level in levels for part in level]
    host = torch.from_numpy(np.concatenate(fields).astype(np.int32))
    # Ordinary memory: torch stages it before it returns, so it need not wait for the copy.
    there = host.to(device, non_blocking=True)
    sizes = [len(part) for part in fields]
    gpu, cpu = torch.split(there, sizes), torch.split(host, sizes)
    return [CascadeLevel(*gpu[i : i + 5], *cpu[i : i + 5]) for i in range(0, len(fields), 5)]
