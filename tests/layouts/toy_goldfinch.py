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
F64 = torch.float64


def norm(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:])


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-8)


def rotate(x: Tensor, positions: Tensor, interleaved: bool = True) -> Tensor:
    """``x [T, heads, width]``: pairs are complex numbers, and each turns by its angle."""
    half = x.shape[-1] // 2
    pairs = x.unflatten(-1, (half, 2)) if interleaved else x.unflatten(-1, (2, half)).mT
    angles = positions.double()[:, None, None] * 10_000.0 ** (-torch.arange(half, dtype=F64) / half)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles))
    return turned.flatten(-2) if interleaved else turned.mT.flatten(-2)


class Toy:
    """``recurrent`` layers, then ``gold`` layers; d = 64, 4 heads, c of 4 elements, states of 4 matrices 16 x 16."""

    def __init__(self, seed: int, recurrent: int = 3, gold: int = 3, d: int = 64, *, interleaved: bool = True) -> None:
        draw, c, rank, self.heads = torch.Generator().manual_seed(seed), d // 16, 5, 4

        def w(*shape: int, scale: float = 0.0) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=F64) * (scale or shape[-2] ** -0.5)

        self.gold, self.layers, self.interleaved, self.draw = range(recurrent, recurrent + gold), recurrent + gold, interleaved, draw
        self.down, self.head = w(d, c), w(d, 50)
        self.shared = GoldShared(w(50, d), torch.stack((1 + w(d, scale=0.1), w(d, scale=0.1))), w(d + c, d))
        self.key = {i: GoldLayer(w(3, d, scale=0.5), w(d, 2 * rank), w(2, rank, d), w(2, d, 8), w(2, 8, d), w(2, 2, d, scale=0.5)) for i in self.gold}
        self.mix = {i: (w(4, d, scale=0.5), w(4, d, d)) for i in range(self.layers)}  # r, k, v, decay; or q and out
        self.channel = {i: (w(2, d, scale=0.5), w(3, d, d)) for i in range(self.layers)}
        self.bonus, self.adapter = w(d, scale=0.5), (w(d, rank), w(rank, d))
        self.spec = goldfinch_spec(num_layers=self.layers, recurrent_layers=recurrent, d_model=d, dtype=F64, state_width=16, state_dtype=F64, block_size=8)

    def layout(self, spec: kvmem.CacheSpec | None = None, **options: Any) -> GoldFinch:
        rope = Rope.default(self.head.shape[0] // self.heads)
        return GoldFinch(spec or self.spec, self.shared, self.key, **({"num_heads": self.heads, "rope": rope, "interleaved": self.interleaved} | options))

    def keys_values(self, layer: int, c: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """K after rotation and V of a whole sequence, ``[T, heads, width]``, a token at a time."""
        g, rows = self.key[layer], []
        x0 = norm(self.shared.embedding[ids]) * self.shared.norm[0] + self.shared.norm[1]
        bases = (rms_norm(torch.cat((x0, c), 1) @ self.shared.expand), rms_norm(x0))
        for t in range(len(ids)):
            now, last = [b[t] for b in bases], [b[t - 1] if t else torch.zeros_like(b[0]) for b in bases]
            hidden = torch.tanh(torch.lerp(now[1], last[1], g.mix[0]) @ g.adapter_in).chunk(2)
            for i in range(2):
                row = torch.lerp(now[i], last[i], g.mix[1 + i] + hidden[i] @ g.adapter_out[i])
                row = row + torch.tanh(row @ g.residual_in[i]) @ g.residual_out[i]
                rows.append(norm(row) * g.norm[i][0] + g.norm[i][1])
        k, v = torch.stack(rows).view(len(ids), 2, self.heads, -1).unbind(1)
        return rotate(k, torch.arange(len(ids)), self.interleaved), v

    def forward(self, ids: Tensor, positions: Tensor, tokens: Parallel | Cached) -> Tensor:
        """Logits. tokens: knows the tokens before, and those before each."""
        x = norm(self.shared.embedding[ids]) * self.shared.norm[0] + self.shared.norm[1]
        for i in range(self.layers):
            if i == self.gold[0]:
                tokens.store(x @ self.down, ids)
            a = norm(x)
            step, (mix, into) = tokens.before(i, 0, a) - a, self.mix[i]
            if i in self.gold:
                mix_q = mix[0] + torch.tanh((a + step * mix[1]) @ self.adapter[0]) @ self.adapter[1]
                q = norm((a + step * mix_q) @ into[0]).unflatten(1, (self.heads, -1))
                x = x + norm(tokens.attend(i, rotate(q, positions, self.interleaved))) @ into[1]
            else:
                r, k, v, w = ((a + step * m) @ n for m, n in zip(mix, into, strict=True))
                heads = (y.unflatten(1, (self.heads, -1)) for y in (r, k, v, -torch.exp(w - 1)))
                x = x + norm(tokens.wkv(i, *heads, self.bonus.view(self.heads, -1)).flatten(1))
            b = norm(x)
            step, (mix, (key, value, gate)) = tokens.before(i, 1, b) - b, self.channel[i]
            x = x + torch.sigmoid((b + step * mix[0]) @ gate) * (torch.relu((b + step * mix[1]) @ key).square() @ value)
        return norm(x) @ self.head


class Parallel:
    """All tokens of one sequence at once."""

    def __init__(self, toy: Toy) -> None:
        self.toy = toy

    def before(self, layer: int, row: int, x: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(x[:1]), x[:-1]))

    def wkv(self, layer: int, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor) -> Tensor:
        total, n = log_w.cumsum(0), len(r)
        faded = (total - log_w).unsqueeze(1) - total.unsqueeze(0)  # [t, s]: the decay of token s until t
        share = torch.einsum("thi,tshi,shi->ths", r, faded.clamp(max=0).exp(), k)
        share = share * torch.ones(n, n, dtype=F64).tril(-1).unsqueeze(1)
        return torch.einsum("ths,shj->thj", share, v) + (r * bonus * k).sum(-1, keepdim=True) * v

    def store(self, c: Tensor, ids: Tensor) -> None:
        self.c, self.ids = c, ids

    def attend(self, layer: int, q: Tensor) -> Tensor:
        k, v = self.toy.keys_values(layer, self.c, self.ids)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        unseen = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v).flatten(1)


class Cached:
    """The new tokens of a batch; everything else is in the allocator."""

    def __init__(self, cache: LayoutCache, batch: kvmem.Batch) -> None:
        self.cache, self.batch, self.alloc = cache, batch, cache.alloc

    def _rows(self, layer: int) -> Iterator[tuple[slice, int, bool]]:
        """New tokens, block of the state, and whether the sequence begins here; padding rows left out."""
        group = self.batch.group(self.alloc.spec.group_of(layer, "shift"))
        spans = list(pairwise(self.batch.cu_seqlens_q_cpu.tolist()))[: len(self.batch.buffers.handles)]
        for row, (begin, end) in enumerate(spans):
            yield slice(begin, end), int(group.block_table[row, 0]), int(self.batch.seq_lens[row]) == end - begin

    def before(self, layer: int, row: int, x: Tensor) -> Tensor:
        last, held = torch.zeros_like(x), self.alloc.tensor(layer, "shift")
        for new, block, fresh in self._rows(layer):
            first = torch.zeros_like(x[:1]) if fresh else held[block, 0, row : row + 1]
            last[new] = torch.cat((first, x[new][:-1]))
            held[block, 0, row] = x[new][-1]
        return last

    def wkv(self, layer: int, r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, bonus: Tensor) -> Tensor:
        out, held = torch.zeros_like(v), self.alloc.tensor(layer, "wkv")
        for new, block, fresh in self._rows(layer):
            state = held[block, 0].unflatten(0, (r.shape[1], -1)).clone().mul_(not fresh)
            for t in range(new.start, new.stop):
                added = k[t].unsqueeze(2) * v[t].unsqueeze(1)
                out[t] = torch.einsum("hi,hij->hj", r[t], state + bonus.unsqueeze(2) * added)
                state = state * log_w[t].exp().unsqueeze(2) + added
            held[block, 0] = state.flatten(0, 1)
        return out

    def store(self, c: Tensor, ids: Tensor) -> None:
        self.cache.write(self.cache.layout.gold_layers[0], self.batch, c, ids)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        return self.cache.attend(q, layer, self.batch)[0].flatten(1)


def parallel(toy: Toy, ids: list[int]) -> Tensor:
    """Logits of all tokens."""
    return toy.forward(torch.tensor(ids), torch.arange(len(ids)), Parallel(toy))


def run(toy: Toy, cache: LayoutCache, *new: tuple[kvmem.Sequence, list[int]], pad_to: int | None = None) -> list[Tensor]:
    """Logits of the new tokens of each sequence, which are then committed."""
    for seq, ids in new:
        seq.extend(len(ids))
    batch = cache.alloc.batch([seq for seq, _ in new], pad_to=pad_to)
    packed = torch.zeros(batch.num_new_tokens, dtype=torch.int64)
    packed[: sum(len(ids) for _, ids in new)] = torch.tensor([i for _, ids in new for i in ids])
    logits = toy.forward(packed, batch.positions, Cached(cache, batch))
    for seq, ids in new:
        seq.commit(ids)
    return list(logits.split([len(ids) for _, ids in new] + [1] * (batch.num_rows - len(new))))[: len(new)]
