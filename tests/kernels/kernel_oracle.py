"""Attention kernels done by hand, in float64, one query and one head at a time.

Each stand-in has the name and the arguments of the kernel that it stands for, follows them as that kernel's
documentation says, and refuses what it refuses. Nothing here knows kvmem: what the argument makers say is followed, not
trusted.
"""

from __future__ import annotations

import math

import torch

INT = torch.int32


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    left: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q ``[n, Hq, D]`` over k, v ``[m, H, .]``, masks aligned to the end. ``(out [n, Hq, Dv], lse [n, Hq])``,
    float64.
    """
    new, heads, width = q.shape
    held, group = k.shape[0], heads // k.shape[1]
    out = torch.zeros(new, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((new, heads), -math.inf, dtype=torch.float64)
    for i in range(new):
        position = held - new + i
        end = position + 1 if causal else held
        begin = max(0, position - left) if left >= 0 else 0
        if begin >= end:
            continue
        for h in range(heads):
            keys, values = k[begin:end, h // group].double().cpu(), v[begin:end, h // group].double().cpu()
            scores = keys @ q[i, h].double().cpu() * (width**-0.5 if scale is None else scale)
            top = scores.max()
            weights = torch.exp(scores - top)
            out[i, h] = weights @ values / weights.sum()
            lse[i, h] = top + weights.sum().log()
    return out, lse


def check_int32(device: torch.device | str, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            assert tensor.dtype == INT, f"{name} is {tensor.dtype}"
            assert tensor.device.type == torch.device(device).type, f"{name} is on {tensor.device}"
            assert tensor.stride(-1) == 1, f"{name} is not contiguous"


def check_pages(k: torch.Tensor, v: torch.Tensor, page_size: int) -> None:
    assert type(k) is torch.Tensor and type(v) is torch.Tensor
    assert k.shape == v.shape and k.stride() == v.stride() and k.stride(-1) == 1
    assert k.shape[1] == page_size
    assert all(0 < s < 2**32 for s in k.stride())


def gather(pages: torch.Tensor, ids: list[int], length: int) -> torch.Tensor:
    """The first ``length`` tokens of pages ``ids``, one token at a time."""
    size = pages.shape[1]
    assert len(ids) * size >= length
    tokens = [pages[ids[t // size], t % size] for t in range(length)]
    return torch.stack(tokens) if tokens else pages.new_zeros(0, *pages.shape[2:])


def pack(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([o for o, _ in parts]), torch.cat([s for _, s in parts])
