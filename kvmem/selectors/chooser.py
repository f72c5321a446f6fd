"""A selector over an allocator: summaries kept in each step, and blocks chosen for its queries."""

from __future__ import annotations

import numpy as np
import torch

from kvmem.allocator import Allocator, Batch
from kvmem.allocator.batch import GroupBatch
from kvmem.arguments import brief, check_bool, check_number, check_size
from kvmem.errors import SpecError
from kvmem.kernels.checks import as_bytes, check_queries, plain
from kvmem.layouts.attention import compute_dtype, described
from kvmem.layouts.cache import check_whole_blocks
from kvmem.layouts.reading import check_batch_of
from kvmem.selectors.base import LayerView, Selector, objection
from kvmem.selectors.chosen import ChosenBatch, Plan, head_stride
from kvmem.spec.component import canonical

__all__ = ["Chooser"]


class Chooser:
    """Keeps a selector's summaries in one allocator, and chooses what attention reads. A step of a decoder::

        alloc.extend_batch(ids, counts)
        batch = alloc.batch(ids)
        for layer in range(num_layers):
            write_kv(alloc.kv(layer), batch, k, v)
            chooser.update(layer, batch)                     # before the commit, which may share the blocks
            chosen = chooser.select(q, layer, batch, budget_tokens=1024)
            out = sdpa(q, alloc.kv(layer), chosen)           # or any paged kernel
        alloc.commit_batch(ids, counts, tokens)

    Nothing is evicted: what is not chosen now may be in the next step. layers: those in which blocks can be chosen.
    """

    def __init__(self, selector: Selector, alloc: Allocator) -> None:
        """``SpecError`` unless ``alloc`` has the selector's summaries (``Allocator(selector.extend(spec))``) and memory
        (device "meta" has none), and on the virtual backend unless a page holds whole blocks: a kernel may load a block
        whole, and forks that end within one write its summary anew.
        """
        if not isinstance(selector, Selector) or not isinstance(alloc, Allocator) or alloc.device.type == "meta":
            raise SpecError(
                f"selector, alloc: got {brief(selector)}, {brief(alloc)}; give Selector, and Allocator with memory"
            )
        self.selector, self.alloc = selector, alloc
        self._kept: dict[int, tuple[str, ...]] = {}  # by layer
        for index, group in enumerate(alloc.spec.groups):
            if objection(group):
                continue
            kept = {canonical(component, len(group.layers), "") for component in selector.components(group)}
            for component in kept - set(group.components):
                raise SpecError(
                    f"alloc: group {group.name!r} has no {component.name} as {type(selector).__name__} keeps it: make "
                    "it with Allocator(selector.extend(spec), ...)"
                )
            check_whole_blocks(alloc, index, "are read and summarised whole")
            self._kept |= dict.fromkeys(group.layers, tuple(component.name for component in kept))
        self.layers = tuple(sorted(self._kept))

    @torch.no_grad()
    def update(self, layer: int, batch: Batch, *, first_token: int | None = None) -> None:
        """Write the summaries of the blocks that this step has completed. Call it when K of the new tokens is written.

        first_token: of all complete blocks from there on instead, for K that came otherwise (chunks whose keys were
        rotated), or was written without a summary. They are read, and their summaries written, for all that share
        them. ``SpecError``, ``StaleHandle``: as ``LayoutCache.write``. Cost: most steps complete nothing; a block is
        read once.
        """
        group = self._group(layer, batch)
        if first_token is not None:
            check_size("first_token", first_token, 0)
        if not self._kept[layer]:
            return
        rows = len(batch.buffers.handles)
        lengths, new = group.seq_lens_cpu.numpy()[:rows], np.diff(group.cu_seqlens_q_cpu.numpy())[:rows]
        first = lengths - new if first_token is None else np.full(rows, first_token)
        first, end = first // group.block_size, lengths // group.block_size
        counts = (end - first).clip(0)
        if not (total := int(counts.sum())):
            return
        row = np.repeat(np.arange(rows), counts)
        column = np.arange(total) - np.repeat(counts.cumsum() - counts, counts) + first[row]
        at = torch.from_numpy(np.stack((row, column)).astype(np.int64)).to(group.block_table.device)
        ids = group.block_table[at[0], at[1]].long()
        k = plain(self.alloc.tensor(layer, "k"))
        keys = as_bytes(k).index_select(0, ids).view(k.dtype)
        found = self.selector.summarise(keys, [n for n in counts.tolist() if n])
        for name in self._kept[layer]:
            blocks, numbers = plain(self.alloc.tensor(layer, name)), found[name]
            room = blocks.new_zeros(total, blocks[0].numel())
            room[:, : numbers.shape[1]] = numbers
            as_bytes(blocks)[ids] = as_bytes(room.view(total, *blocks.shape[1:]))

    @torch.no_grad()
    def select(
        self, q: torch.Tensor, layer: int, batch: Batch, *, budget_tokens: int, scale: float | None = None,
        per_head: bool = False, queries: GroupBatch | None = None,
    ) -> ChosenBatch:  # fmt: skip
        """Return the batch over the blocks that attention of these queries reads.

        q: ``[T, query heads, width]``, packed by ``cu_seqlens_q``, after rotation. budget_tokens: of a sequence, in
        whole blocks, the incomplete one counted whole; blocks with new tokens and the first block are in beyond it. A
        budget of a sequence's length or more chooses everything. scale: of the scores, default ``width ** -0.5``.
        queries: the batch by which q is packed, if that is another one, whose queries come after all tokens here
        (``causal=False``); its rows are those of this batch.

        per_head: False: one choice for all heads, by the mass that a block has in all of them, since each head's scores
        are first made a share of its own. True: a choice for each KV head, as rows of one head: ``ChosenBatch``.

        ``SpecError`` for queries that do not fit and layers without a choice (sliding windows); ``StaleHandle``. Cost:
        what ``selector.logits`` reads, a top-k over blocks, and some hundred small operations of torch for the whole
        batch; the device is not waited for.
        """
        group = self._group(layer, batch)
        packed = self._packed(group, queries)
        plan = Plan.of(group, packed, check_size("budget_tokens", budget_tokens))
        check_bool("per_head", per_head)
        most = int(plan.blocks.max(initial=0))
        view = LayerView(self.alloc, layer, group, most)
        padded, asked = _padded(self._checked(q, view, plan), plan, view.heads)
        scale = float(view.width**-0.5) if scale is None else check_number("scale", scale, above=0)
        logits = self.selector.logits(padded, view, scale).expand(*padded.shape[:-1], most)
        choices = _chosen(self._scores(logits, asked, view, per_head), plan, view.lengths.device)
        ids = view.table.unsqueeze(1).expand(-1, choices.shape[1], -1).gather(2, choices.clamp(min=0))
        if per_head:
            ids = ids * head_stride(view.k) + torch.arange(view.heads, device=ids.device).unsqueeze(1)
        return ChosenBatch(plan, choices, ids, per_head)

    def _scores(self, logits: torch.Tensor, asked: torch.Tensor, view: LayerView, per_head: bool) -> torch.Tensor:
        """Return the logarithm of the share of the mass, ``[B, H or 1, M]``, the lowest number where it is unknown.

        In logarithms, so that blocks that differ in a mass of almost nothing are in order too.
        """
        size = view.block_size
        known = view.lengths // size if self._kept[view.layer] else -(-view.lengths // size)
        blocks = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill((blocks >= known.unsqueeze(1))[:, None, None, None], -torch.inf)
        shares = logits.log_softmax(-1).masked_fill(~asked[:, :, None, None, None], -torch.inf)
        found = shares.logsumexp((1, 3)) if per_head else shares.logsumexp((1, 2, 3)).unsqueeze(1)
        return found.nan_to_num(nan=-torch.inf).clamp(torch.finfo(found.dtype).min, torch.finfo(found.dtype).max)

    def _group(self, layer: int, batch: Batch) -> GroupBatch:
        self.alloc.spec.layer_components(layer)  # refuses a layer that the spec does not have
        if layer not in self.layers:
            groups = [group for group in self.alloc.spec.groups if layer in group.layers]
            reasons = "; ".join(f"group {group.name!r}: {objection(group)}" for group in groups)
            raise SpecError(f"layer: got {layer}; no blocks can be chosen there: {reasons or 'it stores nothing'}")
        check_batch_of(self.alloc, batch, Batch)
        return batch.group(self.alloc.spec.group_of(layer, "k"))

    def _packed(self, group: GroupBatch, queries: GroupBatch | None) -> GroupBatch:
        queries = group if queries is None else queries
        if not isinstance(queries, GroupBatch) or queries.num_rows != group.num_rows:
            raise SpecError(f"queries: got {brief(queries)}; must be a batch of the same {group.num_rows} rows")
        queries.check_current()
        return queries

    def _checked(self, q: torch.Tensor, view: LayerView, plan: Plan) -> torch.Tensor:
        check_queries(q)
        tokens, device = int(plan.queries.sum()), view.table.device
        right = (len(q), q.shape[2], q.device) == (tokens, view.width, device)
        if not right or not q.shape[1] or q.shape[1] % view.heads:
            fit = f"[{tokens}, a multiple of {view.heads} heads, {view.width}] on {device}"
            raise SpecError(f"q: got {described(q)}; must be {fit}")
        return q.to(compute_dtype(q))


def _padded(q: torch.Tensor, plan: Plan, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries ``[B, n, H, g, width]``, zero where a row has fewer than n, and bool ``[B, n]``, which are."""
    there = np.arange(plan.queries.max(initial=0)) < plan.queries[:, None]
    padded = q.new_zeros(there.size, *q.shape[1:])
    padded[torch.from_numpy(np.flatnonzero(there)).to(q.device)] = q
    shape = *there.shape, heads, q.shape[1] // heads, q.shape[2]
    return padded.view(shape), torch.from_numpy(there).to(q.device)


def _chosen(scores: torch.Tensor, plan: Plan, device: torch.device) -> torch.Tensor:
    """Return the numbers of the best blocks, ascending, -1 past a row's count: int64 ``[B, H or 1, most]``."""
    blocks, first, counts = (
        torch.from_numpy(x).to(device).view(-1, 1, 1) for x in (plan.blocks, plan.first_new, plan.counts)
    )
    at = torch.arange(scores.shape[-1], device=device)
    always = ((at == 0) | (at >= first)) & (at < blocks)
    scores = scores.masked_fill(at >= blocks, -torch.inf).masked_fill(always, torch.inf)
    most = int(plan.counts.max(initial=0))
    best = scores.topk(most, dim=-1).indices
    past = torch.arange(most, device=device) >= counts
    found = best.masked_fill(past, scores.shape[-1]).sort(dim=-1).values
    return found.masked_fill(past, -1)
