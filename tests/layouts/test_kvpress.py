"""Presses of the package kvpress decide, and lanes evict: the same tokens as with kvpress alone, and memory given back.

kvpress 0.5.5 declares transformers below 5.3; with 5.23, its hooks run if the caller passes ``cache_position``:

    pip install --no-deps kvpress==0.5.5 && pip install 'cachetools>=5.5.2,<6' 'datasets>=2.21' 'fire<0.7'
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from kernel_cases import one_thread

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed: see the top of this file")

from lanes_client import LaneModel, greedy, lane_cache, smollm2
from transformers import DynamicCache

__all__ = ["one_thread"]
pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("one_thread")]
TOKENS, STEPS, EVICTED = 400, 12, 0.628
PRESSES = {
    "knorm": lambda: kvpress.KnormPress(EVICTED),
    "snapkv": lambda: kvpress.SnapKVPress(EVICTED),
    "ada snapkv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(EVICTED)),
}


def alone(press: Any, prompt: list[int]) -> list[int]:
    """As users of kvpress call it: the press slices the cache, or masks keys in it where heads differ."""
    model, cache, place = smollm2(), DynamicCache(), iter(range(TOKENS + STEPS))

    def run(ids: list[int]) -> torch.Tensor:
        at = torch.tensor([next(place) for _ in ids])
        how = {"past_key_values": cache, "position_ids": at.unsqueeze(0), "cache_position": at}
        with torch.no_grad():
            return model(torch.tensor([ids]), **how).logits[0]

    with press(model):
        logits = run(prompt)
    return greedy(run, logits, STEPS)


def kept(press: Any, module: Any, keys: torch.Tensor, kwargs: Any) -> torch.Tensor:
    """What ``press.compress`` keeps, as a mask: it is given positions in place of V."""
    at = torch.arange(keys.shape[1]).float().view(1, 1, -1, 1).expand(1, *keys.shape)
    module.masked_key_indices = None
    left = press.compress(module, kwargs["hidden_states"], keys.unsqueeze(0), at, None, kwargs)[1]
    mask = torch.zeros(keys.shape[:2], dtype=torch.bool).scatter_(1, left[0, :, :, 0].long(), True)
    if module.masked_key_indices is not None:  # set by presses that keep other tokens in each head
        mask[module.masked_key_indices[1:]] = False
    return mask


@pytest.mark.parametrize("name", PRESSES)
def test_presses_drive_lanes(name: str, seed: int) -> None:
    model, press, freed = smollm2(), PRESSES[name](), []
    prompt = torch.randint(100, 40_000, (TOKENS,), generator=torch.Generator().manual_seed(seed)).tolist()
    expected, cache = alone(press, prompt), lane_cache(model)
    seq = cache.sequence()

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seq.append(layer, k, v)
        return seq.attend(q, layer)[0]

    def evict(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        keys = seq.padded(module.layer_idx)[0]
        freed.append(seq.evict(module.layer_idx, kept(press, module, keys, kwargs)))

    mine = LaneModel(model, attend)
    hooks = [layer.self_attn.register_forward_hook(evict, with_kwargs=True) for layer in model.model.layers]
    logits = mine(prompt)
    for hook in hooks:
        hook.remove()
    lengths = torch.stack([seq.lengths(layer) for layer in range(cache.num_layers)])
    assert (lengths.sum(1) == 3 * int(TOKENS * (1 - EVICTED))).all()
    assert (lengths != lengths[:, :1]).any() == name.startswith("ada")
    full, held = TOKENS * lengths.numel() * 512, cache.alloc.stats().held_bytes  # K and V of 64 float32
    assert held == (int((-(-lengths // 16)).sum()) + 2) * 16 * 512  # and the null and the padding block
    assert sum(freed) == (25 * lengths.numel() + 2) * 16 * 512 - held
    cache.trim()
    print(f"{name}: {cache.alloc.stats().physical_bytes / full:.1%} of the bytes remain")
    assert cache.alloc.stats().physical_bytes < 0.41 * full
    assert greedy(mine, logits, STEPS) == expected
