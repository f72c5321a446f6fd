"""SmolLM2 over lanes: its K and V are in kvmem only. Presses of the package kvpress decide, and lanes evict: the same
tokens as with kvpress alone, and memory given back.

kvpress 0.5.5 declares transformers below 5.3; with 5.23, its hooks run if the caller passes ``cache_position``. `make
kvpress-peers` installs it beside the environment.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import one_thread

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra kvmem[transformers]")

from test_lanes import Mirror
from test_transformers_smollm2 import weights_file
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvmem.bench.language_models import load_language_model
from kvmem.layouts.lanes import LaneCache

__all__ = ["one_thread"]
sys.path.append(str(Path(__file__).parents[2] / "build" / "peers" / "kvpress"))  # last: the environment's torch is used
pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("one_thread")]
TOKENS, STEPS, EVICTED, ROW = 400, 12, 0.628, 2 * 64 * 4  # bytes of K and V of a token and KV head


@cache
def smollm2() -> PreTrainedModel:
    weights_file()  # skips without it
    model: PreTrainedModel = load_language_model("smollm2").model
    return model


def runner(attention: Callable[..., torch.Tensor] | None = None) -> Callable[[list[int]], torch.Tensor]:
    """Return ``run(ids)``, the logits of the next tokens: with transformers' own cache, or with ``attention(layer, q,
    k, v)`` of the new tokens, each ``[T, heads, width]`` and rotated.
    """
    own, place = DynamicCache() if attention is None else None, iter(range(10**6))

    def interface(module: Any, q: Any, k: Any, v: Any, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        return attention(module.layer_idx, *(x[0].transpose(0, 1) for x in (q, k, v))).unsqueeze(0), None

    def run(ids: list[int]) -> torch.Tensor:
        at, model = torch.tensor([next(place) for _ in ids]), smollm2()
        ALL_ATTENTION_FUNCTIONS["lanes"] = interface
        model.config._attn_implementation = "sdpa" if attention is None else "lanes"
        how = {"position_ids": at.unsqueeze(0), "cache_position": at, "past_key_values": own}
        with torch.no_grad():
            return model(torch.tensor([ids]), **how, use_cache=attention is None).logits[0]

    return run


def greedy(run: Callable[[list[int]], torch.Tensor], logits: torch.Tensor) -> list[int]:
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < STEPS:
        tokens.append(int(run(tokens[-1:])[-1].argmax()))
    return tokens


def start(seed: int) -> tuple[Mirror, list[int]]:
    sizes = {"num_layers": 30, "num_kv_heads": 3, "head_dim": 64, "dtype": torch.float32, "max_sequences": 1}
    lanes, draw = LaneCache(**sizes, device="cpu", memory="64MiB", max_tokens=1024), torch.Generator().manual_seed(seed)
    return Mirror(lanes.sequence(), draw), torch.randint(100, 40_000, (TOKENS,), generator=draw).tolist()


def check_memory(lanes: LaneCache, lengths: torch.Tensor, freed: int) -> None:
    assert (blocks := int((-(-lengths // 16)).sum())) * 16 * ROW == TOKENS * lengths.numel() * ROW - freed
    lanes.trim()
    assert lanes.alloc.stats().held_bytes == (blocks + 2) * 16 * ROW, "with the null and the padding block"
    share = lanes.alloc.stats().physical_bytes / (TOKENS * lengths.numel() * ROW)
    print(f"{share:.1%} of the bytes remain")
    assert share < 0.41


def test_smollm2_goes_on_after_eviction(seed: int) -> None:
    """Other tokens go in each layer and head; every attention is compared with one over all K and V with a mask."""
    mirror, prompt = start(seed)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mirror.note(layer, k, v)
        mirror.seq.append(layer, k, v)
        out, right = mirror.seq.attend(q, layer)[0], mirror.expected(layer, q)[0]
        torch.testing.assert_close(out, right, rtol=0, atol=1e-4 * float(right.abs().max()))
        return out

    run = runner(attend)
    logits = run(prompt)
    freed = sum(mirror.seq.evict(layer, mirror.mask(layer, 1 - EVICTED)) for layer in range(30))
    check_memory(mirror.seq.cache, torch.stack([held.sum(1) for held in mirror.held.values()]), freed)
    assert len(greedy(run, logits)) == STEPS


def kept(press: Any, module: Any, keys: torch.Tensor, kwargs: Any) -> torch.Tensor:
    """What ``press.compress`` keeps, as a mask: it is given positions in place of V."""
    at = torch.arange(keys.shape[1]).float().view(1, 1, -1, 1).expand(1, *keys.shape)
    module.masked_key_indices = None
    left = press.compress(module, kwargs["hidden_states"], keys.unsqueeze(0), at, None, kwargs)[1]
    mask = torch.zeros(keys.shape[:2], dtype=torch.bool).scatter_(1, left[0, :, :, 0].long(), True)
    if module.masked_key_indices is not None:  # set by presses that keep other tokens in each head
        mask[module.masked_key_indices[1:]] = False
    return mask


@pytest.mark.parametrize("name", ["KnormPress", "SnapKVPress", "AdaKVPress"])
def test_presses_drive_lanes(name: str, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed: make kvpress-peers")
    model, (mirror, prompt), freed = smollm2(), start(seed), []
    press = (
        kvpress.AdaKVPress(kvpress.SnapKVPress(EVICTED)) if name == "AdaKVPress" else getattr(kvpress, name)(EVICTED)
    )
    run, seq = runner(), mirror.seq
    with press(model):  # as users of kvpress call it: it slices the cache, or masks keys in it where heads differ
        logits = run(prompt)
    expected = greedy(run, logits)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seq.append(layer, k, v)
        return seq.attend(q, layer)[0]

    def evict(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        keys = seq.padded(module.layer_idx)[0]
        freed.append(seq.evict(module.layer_idx, kept(press, module, keys, kwargs)))

    run = runner(attend)
    hooks = [layer.self_attn.register_forward_hook(evict, with_kwargs=True) for layer in model.model.layers]
    logits = run(prompt)
    for hook in hooks:
        hook.remove()
    lengths = torch.stack([seq.lengths(layer) for layer in range(30)])
    assert (lengths.sum(1) == 3 * int(TOKENS * (1 - EVICTED))).all()
    assert (lengths != lengths[:, :1]).any() == (name == "AdaKVPress")
    check_memory(seq.cache, lengths, sum(freed))
    assert greedy(run, logits) == expected
