"""K, V and queries at random, attention by its definition, and the places that hold them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kvmem
from kvmem.near import NearStore, Part
from kvmem.near.disk import _shape_of
from kvmem.near.store import Store

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


class Text:
    """Tokens of one sequence and layer. q: of every token, ``[tokens, heads * group, width]``."""

    def __init__(
        self,
        tokens: int,
        *,
        heads: int = 2,
        group: int = 2,
        width: int = 32,
        v_width: int | None = None,
        dtype: Any = torch.float32,
    ) -> None:
        self.heads, self.width, self.v_width, self.dtype = heads, width, v_width or width, dtype
        self.k = torch.randn(tokens, heads, width, dtype=dtype)
        self.v = (
            torch.rand(tokens, heads, self.v_width).mul(2).sub(1).to(dtype)
        )  # outputs below 1, so errors are relative
        self.q = torch.randn(tokens, heads * group, width, dtype=dtype)

    @property
    def spec(self) -> kvmem.CacheSpec:
        return kvmem.CacheSpec.kv(
            num_layers=2, num_kv_heads=self.heads, head_dim=self.width, dtype=self.dtype, block_size=4
        )

    def full(self, first: int, end: int) -> Part:
        """The queries of tokens [first, end) over all tokens before, in float64, with causal masks."""
        group = self.q.shape[1] // self.heads
        q, k, v = (x.double() for x in (self.q[first:end], self.k[:end], self.v[:end]))
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * self.width**-0.5
        scores.masked_fill_(torch.arange(end) > torch.arange(first, end)[:, None], -torch.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(group, 1))
        return Part(out, scores.logsumexp(-1).T)


class LocalStore(NearStore):
    """A store in this process: what a worker holds, without one."""

    def __init__(self, spec: kvmem.CacheSpec, folder: Path, channels_per_page: int = 0) -> None:
        super().__init__(shape := _shape_of(spec), spec.groups[0].layers)
        facts = {**asdict(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
        self.store = Store(str(folder), 1 << 20, sorted(self.layers), facts, channels_per_page)
        self.traffic, self.close = self.store.traffic, self.store.close  # type: ignore[method-assign]

    def _call(self, call: str, *tensors: torch.Tensor, **arguments: Any) -> Any:
        return getattr(self.store, call)(*tensors, **arguments)

    def close(self) -> None: ...


def difference(a: Part, b: Part) -> float:
    """The largest difference of outputs, and of lse, relative to those above 1."""
    assert a.out.shape == b.out.shape and a.lse.shape == b.lse.shape
    if not a.out.numel():
        return 0.0
    of_lse = (a.lse - b.lse) / b.lse.abs().clamp(min=1)
    return torch.cat([(a.out - b.out).abs().flatten(), of_lse.abs().flatten()]).max().item()  # NaN where one is


def filled(alloc: kvmem.Allocator, text: Text, tokens: list[int], *, layer: int = 1) -> kvmem.Sequence:
    """A sequence whose layer has the K and V of these tokens of the text, committed."""
    from kvmem.kernels.write import write_kv

    seq = alloc.sequence()
    if tokens:
        seq.extend(len(tokens))
        write_kv(alloc.kv(layer), alloc.batch([seq]), text.k[tokens], text.v[tokens])
        seq.commit(count=len(tokens))
    return seq
