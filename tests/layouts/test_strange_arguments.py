"""Every public argument of kvmem.layouts with strange values: what cannot be meant is a SpecError that names the field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from goldfinch_cases import cases as goldfinch_cases
from palu_cases import make_weights
from quantised_cases import plain_spec

import kvmem
from kvmem.layouts import LayoutCache, PlainKV, bits, read_set, registry
from kvmem.layouts.aligned import AlignedKV
from kvmem.layouts.goldfinch import GoldFinch, goldfinch_spec
from kvmem.layouts.lanes import LaneCache
from kvmem.layouts.palu import Palu, factor, latent_spec, search_ranks
from kvmem.layouts.policies import Gate, HeavyHitter, SinkAndWindow, SnapKV, any_of_group, apply
from kvmem.layouts.quantised import QuantisedKV
from kvmem.layouts.rope import Rope
from kvmem.layouts.slim import Projection, SharedEncoder, SlimK, SlimX, fold

STRANGE: dict[str, Any] = {
    "text": "strange", "empty text": "", "None": None, "True": True, "nan": float("nan"), "inf": float("inf"),
    "fraction": 0.37, "negative": -1, "zero": 0, "huge": 10**5000, "complex": 1j, "array": np.ones((2, 3)),
    "tensor": torch.ones(2, 3, 4, 5), "ints": torch.ones(2, 3, dtype=torch.int64), "list": [1], "empty": [],
    "dict": {"a": 1}, "object": object(), "type": int, "dtype": torch.int8,
}  # fmt: skip
W = torch.eye(16, dtype=torch.float64) + 0.1
ONE, ROPE = Projection(W, W), Rope.default(16)
HALF, MASK = torch.float16, torch.ones(2, 5, dtype=torch.bool)
PALU = make_weights(1, 3)
GOLD = goldfinch_cases()[0].layout
X = torch.ones(5, 2, 16)
Q = torch.ones(5, 4, 16)
Made = dict[str, Any]


def stored() -> Made:
    alloc = kvmem.Allocator(
        plain_spec(), backend="paged", device="cpu", memory="1MiB", max_sequences=4, max_tokens=64, page_bytes=4096
    )
    seq = alloc.sequence()
    seq.extend(5)
    cache, batch = LayoutCache(PlainKV(alloc.spec), alloc), alloc.batch([seq])
    cache.write(0, batch, X, X)
    lanes = lane_cache()
    row = lanes.sequence()
    row.append(0, X, X)
    return {"cache": cache, "batch": batch, "alloc": alloc, "seq": seq, "lanes": lanes, "row": row}


def lane_cache(**options: Any) -> LaneCache:
    sizes = {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32, "max_sequences": 2}
    given = {"device": "cpu", "memory": "1MiB", "max_tokens": 64, "page_bytes": 4096}
    return LaneCache(**{**sizes, **given, **options})


@pytest.fixture
def made() -> Made:
    return stored()


Call = tuple[Callable[[Made], Callable[..., object]], dict[str, Any], dict[str, set[str]]]
NUMBERS = {"fraction"}  # of what takes any number above 0
ANY_NUMBER = {"fraction", "negative", "zero"}
#: name -> how to get the callable, arguments that work, and by argument the strange values that work too.
CALLS: dict[str, Call] = {
    "fold": (
        lambda _: fold, {"w_k": W, "w_v": W, "b_k": W[0], "b_v": W[0], "max_cond": 1e12},
        {"b_k": {"None"}, "b_v": {"None"}, "max_cond": {"inf", "huge"}},
    ),
    "Projection": (lambda _: Projection, {"w_k": W, "w_v": W, "b_k": W[0], "b_v": W[0]}, {"b_k": {"None"}, "b_v": {"None"}}),
    "Projection.of": (lambda _: Projection.of, {"k": torch.nn.Linear(4, 4), "v": torch.nn.Linear(4, 4)}, {}),
    "SlimK": (
        lambda _: SlimK,
        {"layers": [ONE], "num_heads": 1, "head_dim": 16, "rope": ROPE, "k_norm": lambda layer, k: k, "dtype": HALF,
         "max_cond": 100.0, "order": "auto", "block_size": 16},
        {"rope": {"None"}, "k_norm": {"None", "type"}, "max_cond": {"None", "inf", "huge"}},
    ),
    "SlimX": (
        lambda _: SlimX,
        {"layers": [ONE], "head_dim": 16, "dtype": HALF, "rope": None, "order": "auto", "block_size": 16}, {"rope": {"None"}},
    ),
    "SharedEncoder": (
        lambda _: SharedEncoder,
        {"layers": {0: ONE}, "head_dim": 16, "decoder": PlainKV(plain_spec()), "dtype": HALF, "max_tokens": 32,
         "order": "auto", "rope": None},
        {"max_tokens": {"None"}, "rope": {"None"}},
    ),
    "factor": (lambda _: factor, {"weight": W, "rank": 4, "root": None}, {"root": {"None"}}),
    "search_ranks": (
        lambda _: search_ranks,
        {"scores": [[[1.0, 2.0]] * 2], "width": 16, "budget_bytes": 10_000, "dtype": HALF, "bits": None, "multiple": 8},
        {"scores": {"fraction", "True", "array", "tensor", "ints", "list"}, "bits": {"None"}, "ranks": set()},
    ),
    "latent_spec": (
        lambda _: latent_spec,
        {"ranks": [[[8], [8]]], "dtype": HALF, "bits": None, "rope": True, "block_size": 16},
        {"bits": {"None"}, "rope": {"True"}},
    ),
    "Palu": (
        lambda _: Palu,
        {"weights": PALU, "ranks": 8, "kv_heads": 4, "head_dim": 16, "group_heads": 2, "rope": ROPE, "covariances": None,
         "bits": None, "rotate_latents": False, "k_norms": None, "block_size": 16, "dtype": HALF},
        {"rope": {"None"}, "covariances": {"None"}, "bits": {"None"}, "k_norms": {"None"}, "rotate_latents": {"True"}},
    ),
    "goldfinch_spec": (
        lambda _: goldfinch_spec,
        {"num_layers": 6, "d_model": 64, "dtype": HALF, "recurrent_layers": 2, "compression": 16, "state_width": 64,
         "states": True, "state_dtype": "float32", "block_size": 16},
        {"recurrent_layers": {"None", "zero"}, "states": {"True"}},
    ),
    "GoldFinch": (
        lambda _: GoldFinch,
        {"spec": GOLD.spec, "shared": GOLD._shared, "layers": GOLD._layers, "num_heads": GOLD.num_heads, "rope": GOLD.rope,
         "interleaved": True, "tile_tokens": 24},
        {"rope": {"None"}, "interleaved": {"True"}},
    ),
    "AlignedKV": (
        lambda _: AlignedKV, {"spec": plain_spec(dtype=HALF, block_size=64, head_dim=32), "guard": 1, "impl": None},
        {"guard": {"zero"}, "impl": {"None"}},
    ),
    "QuantisedKV": (
        lambda _: QuantisedKV,
        {"spec": plain_spec(), "k": "fp8_e4m3", "v": "int4", "k_scales": 1.0, "v_scales": "token", "group_size": 8,
         "scale_dtype": HALF, "rotate": False},
        {"v": {"dtype"}, "k_scales": {"None", "fraction"}, "v_scales": {"None"}, "group_size": {"None"},
         "rotate": {"True"}},
    ),
    "PlainKV": (lambda _: PlainKV, {"spec": plain_spec()}, {}),
    "LaneCache": (
        lambda _: lane_cache,
        {"num_layers": 1, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32, "max_sequences": 2, "block_size": 16,
         "backend": "paged"},
        {"dtype": {"dtype"}},
    ),
    "Rope": (lambda _: Rope, {"inv_freq": torch.ones(8), "factor": 1.0}, {"factor": NUMBERS}),
    "Rope.default": (lambda _: Rope.default, {"head_dim": 16, "theta": 1e4}, {"theta": NUMBERS}),
    "Rope.from_config": (lambda _: Rope.from_config, {"config": {"rope_theta": 1e4, "head_dim": 16}}, {}),
    "Rope.apply": (lambda _: ROPE.apply, {"x": X, "positions": torch.arange(5)}, {}),
    "Rope.shift": (lambda _: ROPE.shift, {"x": X, "by": 3}, {"by": {"negative", "zero"}}),
    "hadamard": (
        lambda _: bits.hadamard, {"size": 16}, {},
    ),
    "quantise": (lambda _: lambda **how: bits.quantise(X, **how), {"bits": 4, "scale_dtype": HALF}, {}),
    "pack": (lambda _: bits.pack, {"codes": torch.zeros(8, dtype=torch.uint8), "bits": 4}, {}),
    "find": (lambda _: registry.find, {"name": "slim"}, {}),
    "check_combination": (lambda _: registry.check_combination, {"layout": "plain"}, {}),
    "LayoutCache": (lambda m: LayoutCache, {"layout": PlainKV(plain_spec()), "alloc": "alloc"}, {}),
    "LayoutCache.write": (
        lambda m: lambda layer, batch, k, v: m["cache"].write(layer, batch, k, v),
        {"layer": 0, "batch": "batch", "k": X, "v": X}, {"layer": {"zero"}},
    ),
    "LayoutCache.attend": (
        lambda m: m["cache"].attend,
        {"q": Q, "layer": 0, "batch": "batch", "scale": None, "causal": True, "queries": None},
        {"layer": {"zero"}, "scale": {"None", *ANY_NUMBER}, "causal": {"True"}, "queries": {"None"}},
    ),
    "LayoutCache.derive": (
        lambda m: m["cache"].derive, {"layer": 0, "batch": "batch", "dtype": None}, {"layer": {"zero"}, "dtype": {"None"}},
    ),
    "read_set": (
        lambda m: read_set, {"alloc": "alloc", "batch": "batch", "layer": 0, "components": ("k", "v")}, {"layer": {"zero"}},
    ),
    "lanes.append": (
        lambda m: lambda **given: m["lanes"].lanes([m["row"]]).append(**given),
        {"layer": 0, "k": X, "v": X, "keep": None, "counts": [5]}, {"layer": {"zero"}, "keep": {"None"}, "counts": {"None"}},
    ),
    "lanes.attend": (
        lambda m: m["row"].attend, {"q": Q, "layer": 0, "scale": 1.0}, {"layer": {"zero"}, "scale": {"None", *ANY_NUMBER}},
    ),
    "lanes.weights": (
        lambda m: m["row"].weights, {"q": Q, "layer": 0, "scale": 1.0}, {"layer": {"zero"}, "scale": {"None", *ANY_NUMBER}},
    ),
    "lanes.evict": (
        lambda m: m["row"].evict, {"layer": 0, "keep": "all", "compact": True}, {"layer": {"zero"}, "compact": {"True"}},
    ),
    "lanes.padded": (lambda m: m["row"].padded, {"layer": 0, "dtype": None}, {"layer": {"zero"}, "dtype": {"None"}}),
    "lanes.head_requests": (lambda m: m["row"].head_requests, {"layer": 0, "out": None}, {"layer": {"zero"}, "out": {"None"}}),
    "lanes.split_heads": (lambda m: m["row"].split_heads, {"q": Q, "layer": 0}, {"layer": {"zero"}}),
    "lanes.join_heads": (lambda m: m["row"].join_heads, {"out": torch.ones(10, 2, 16), "layer": 0}, {"layer": {"zero"}}),
    "lanes.positions": (lambda m: m["row"].positions, {"layer": 0, "head": 0}, {"layer": {"zero"}, "head": {"zero"}}),
    "LaneCache.lanes": (lambda m: m["lanes"].lanes, {"sequences": "rows"}, {}),
    "Gate": (
        lambda _: Gate, {"name": "g", "gate": lambda layer, given: MASK, "threshold": 0.5},
        {"name": {"text"}, "gate": {"type"}, "threshold": ANY_NUMBER},
    ),
    "SinkAndWindow": (lambda _: SinkAndWindow, {"window_tokens": 4, "sinks": 2}, {"sinks": {"zero"}}),
    "HeavyHitter": (lambda _: HeavyHitter, {"heavy": 4, "recent": 2}, {"heavy": {"zero"}, "recent": {"zero"}}),
    "SnapKV": (lambda _: SnapKV, {"budget": 40, "window": 4, "kernel_size": 3}, {}),
    "any_of_group": (lambda _: any_of_group, {"mask": MASK, "num_kv_heads": 1}, {}),
    "apply": (
        lambda m: apply,
        {"policy": SinkAndWindow(60), "sequence": "row", "layer": 0, "q": None, "scale": None, "compact": True},
        {"layer": {"zero"}, "q": {"None"}, "scale": {"None", *ANY_NUMBER}, "compact": {"True"}},
    ),
}  # fmt: skip


def given_to(made: Made, arguments: dict[str, Any]) -> dict[str, Any]:
    """Words stand for what is made once: an allocator, a batch, a sequence of lanes, a mask of its rows."""
    row = made["row"]
    words = {**made, "rows": [row], "all": torch.ones(2, int(row.lengths(0).max()), dtype=torch.bool)}
    return {name: words.get(value, value) if isinstance(value, str) else value for name, value in arguments.items()}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument(name: str, made: Made) -> None:
    find, arguments, fine = CALLS[name]
    find(made)(**given_to(made, arguments))
    wrong = []
    for field in arguments:
        for what, value in STRANGE.items():
            try:
                find(made)(**given_to(made, arguments) | {field: value})
            except kvmem.SpecError as error:
                if what in fine.get(field, ()):
                    wrong.append(f"{field}={what}: refused: {error}")
            except Exception as error:  # noqa: BLE001 - what is not a SpecError is what is looked for
                wrong.append(f"{field}={what}: {type(error).__name__}: {str(error)[:90]}")
            else:
                if what not in fine.get(field, ()):
                    wrong.append(f"{field}={what}: accepted")
    assert not wrong, "\n".join(wrong)
