"""A GoldFinch model (arXiv:2407.12077) with random weights, in float64, in two forms: all tokens at once without a cache,
and over an allocator, some new tokens of several sequences at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import layer_norm

import kvmem
from kvmem.layouts import LayoutCache
from kvmem.layouts.goldfinch import GoldFinch, GoldLayer, GoldShared, goldfinch_spec
from kvmem.layouts.rope import Rope

Tensor = torch.Tensor
F64, D, HEADS, C, VOCABULARY = torch.float64, 64, 4, 4, 50


def norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:])


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8)


def rotate(x: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """``x [T, heads, width]``: pairs are complex numbers, and each turns by its angle."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).mT
    angles = positions.double()[:, None, None] * 10_000.0 ** (-torch.arange(half, dtype=F64) / half)
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    return turned.flatten(-2) if interleaved else turned.mT.flatten(-2)


class Toy:
    """``recurrent`` layers, then ``gold`` layers."""

    def __init__(self, seed: int, recurrent: int = 3, gold: int = 3, *, interleaved: bool = True) -> None:
        draw, r = torch.Generator().manual_seed(seed), 5

        def w(*shape: int, scale: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=F64) * (scale or shape[-2] ** -0.5)

        def gold_layer() -> GoldLayer:
            mix, adapter = w(3, D, scale=0.5), (w(D, 2 * r), w(2, r, D))
            return GoldLayer(mix, *adapter, w(2, D, 8), w(2, 8, D), w(2, 2, D, scale=0.5))

        self.layers, self.gold, self.interleaved = recurrent + gold, range(recurrent, recurrent + gold), interleaved
        self.down, self.head = w(D, C), w(D, VOCABULARY)
        self.shared = GoldShared(w(VOCABULARY, D), w(2, D, scale=0.5), w(D + C, D))
        self.key = {i: gold_layer() for i in self.gold}
        self.mix = [(w(4, D, scale=0.5), w(4, D, D)) for _ in range(self.layers)]  # r, k, v, decay; or q and out
        self.channel = [(w(2, D, scale=0.5), w(3, D, D)) for _ in range(self.layers)]
        sizes = {"num_layers": self.layers, "recurrent_layers": recurrent, "d_model": D, "state_width": D // HEADS}
        self.spec = goldfinch_spec(**sizes, dtype=F64, state_dtype=F64, block_size=8)

    def layout(self, spec: kvmem.CacheSpec | None = None, **options: Any) -> GoldFinch:
        options = {"num_heads": HEADS, "rope": Rope.default(D // HEADS), "interleaved": self.interleaved} | options
        return GoldFinch(spec or self.spec, self.shared, self.key, **options)

    def begin(self, ids: Tensor) -> Tensor:
        return norm(self.shared.embedding[ids]) * self.shared.norm[0] + self.shared.norm[1]

    def keys_values(self, layer: int, c: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """K after rotation and V of a whole sequence, ``[T, heads, width]``, a token at a time."""
        g, rows, x0 = self.key[layer], [], self.begin(ids)
        bases = (rms_norm(torch.cat((x0, c), 1) @ self.shared.expand), rms_norm(x0))
        for t in range(len(ids)):
            now, last = [b[t] for b in bases], [b[t - 1] if t else torch.zeros_like(b[0]) for b in bases]
            hidden = torch.tanh(torch.lerp(now[1], last[1], g.mix[0]) @ g.adapter_in).chunk(2)
            for i in range(2):
                row = torch.lerp(now[i], last[i], g.mix[1 + i] + hidden[i] @ g.adapter_out[i])
                row = row + torch.tanh(row @ g.residual_in[i]) @ g.residual_out[i]
                rows.append(norm(row) * g.norm[i][0] + g.norm[i][1])
        k, v = torch.stack(rows).view(len(ids), 2, HEADS, -1).unbind(1)
        return rotate(k, torch.arange(len(ids)), self.interleaved), v

    def forward(self, ids: Tensor, positions: Tensor, form: Parallel | Cached) -> Tensor:
        """Logits."""
        x = self.begin(ids)
        for i in range(self.layers):
            if i == self.gold[0]:
                form.store(x @ self.down, ids)
            a, (mix, into) = norm(x), self.mix[i]
            step = form.before(i, 0, a) - a
            if i in self.gold:
                q = norm((a + step * mix[0]) @ into[0]).unflatten(1, (HEADS, -1))
                x = x + norm(form.attend(i, rotate(q, positions, self.interleaved))) @ into[1]
            else:
                r, k, v, w = (((a + step * m) @ n).unflatten(1, (HEADS, -1)) for m, n in zip(mix, into, strict=True))
                x = x + norm((form.wkv(i, r, k, v, -torch.exp(w - 1)) + v).flatten(1))
            b, (mix, (key, value, gate)) = norm(x), self.channel[i]
            step = form.before(i, 1, b) - b
            x = x + torch.sigmoid((b + step * mix[0]) @ gate) * (torch.relu((b + step * mix[1]) @ key).square() @ value)
        return norm(x) @ self.head


class Parallel:
    """All tokens of one sequence at once."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy

    def before(self, layer: int, row: int, x: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(x[:1]), x[:-1]))

    def wkv(self, layer: int, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor) -> Tensor:
        total, past = log_w.cumsum(0), torch.ones(len(r), len(r), dtype=F64).tril(-1)
        faded = ((total - log_w).unsqueeze(1) - total).clamp(max=0).exp()  # [t, s]: what is left of token s before t
        return torch.einsum("ts,thi,tshi,shi,shj->thj", past, r, faded, k, v)

    def store(self, c: Tensor, ids: Tensor) -> None:
        self.c, self.ids = c, ids

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = self.toy.keys_values(layer, self.c, self.ids)
        unseen = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        scores = torch.einsum("qhd,khd->hqk", q, k).masked_fill(unseen, -torch.inf) / q.shape[-1] ** 0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


class Cached:
    """The new tokens of a batch; everything else is in the allocator."""

    def __init__(self, cache: LayoutCache, batch: kvmem.Batch) -> None:
        self.cache, self.batch, self.alloc = cache, batch, cache.alloc

    def rows(self, layer: int) -> Iterator[tuple[slice, int, bool]]:
        """New tokens, block of the state, and whether the sequence begins here; padding rows left out."""
        group, starts = self.batch.group(self.alloc.spec.group_of(layer, "shift")), self.batch.cu_seqlens_q.tolist()
        for row, (begin, end) in enumerate(pairwise(starts[: len(self.batch.buffers.handles) + 1])):
            yield slice(begin, end), int(group.block_table[row, 0]), int(self.batch.seq_lens[row]) == end - begin

    def before(self, layer: int, row: int, x: Tensor) -> Tensor:
        last, held = torch.zeros_like(x), self.alloc.tensor(layer, "shift")
        for new, block, fresh in self.rows(layer):
            first = torch.zeros_like(x[:1]) if fresh else held[block, 0, row : row + 1]
            last[new] = torch.cat((first, x[new][:-1]))
            held[block, 0, row] = x[new][-1]
        return last

    def wkv(self, layer: int, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor) -> Tensor:
        out, held = torch.zeros_like(v), self.alloc.tensor(layer, "wkv")
        for new, block, fresh in self.rows(layer):
            state = held[block, 0].unflatten(0, (HEADS, -1))
            state = torch.zeros_like(state) if fresh else state
            for t in range(new.start, new.stop):
                out[t] = torch.einsum("hi,hij->hj", r[t], state)
                state = state * log_w[t].exp().unsqueeze(2) + k[t].unsqueeze(2) * v[t].unsqueeze(1)
            held[block, 0] = state.flatten(0, 1)
        return out

    def store(self, c: Tensor, ids: Tensor) -> None:
        self.cache.write(self.cache.layout.gold_layers[0], self.batch, c, ids)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        return self.cache.attend(q, layer, self.batch)[0].flatten(1)


def parallel(toy: Toy, ids: list[int]) -> Tensor:
    """Logits of all tokens."""
    return toy.forward(torch.tensor(ids), torch.arange(len(ids)), Parallel(toy))


def run(toy: Toy, cache: LayoutCache, *new: tuple[kvmem.Sequence, list[int]], **batch_options: Any) -> list[Tensor]:
    """Logits of the new tokens of each sequence, which are then committed."""
    for seq, ids in new:
        seq.extend(len(ids))
    batch = cache.alloc.batch([seq for seq, _ in new], **batch_options)
    packed = torch.tensor([i for _, ids in new for i in ids] + [7] * (batch.num_rows - len(new)))  # padding at the end
    logits = toy.forward(packed, batch.positions, Cached(cache, batch))
    for seq, ids in new:
        seq.commit(ids)
    return [logits[begin:end] for begin, end in pairwise(batch.cu_seqlens_q.tolist())][: len(new)]
