"""What a spec refuses: each refusal is a SpecError that names field and value, and says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support_spec import BF16, group, k, v

from kvmem.errors import SpecError
from kvmem.spec import CacheSpec, Component

SIZES = [0, -1, True, 1.0, "1", None]


@pytest.mark.parametrize("value", SIZES)
@pytest.mark.parametrize("field", ["heads", "width"])
def test_sizes_of_a_component(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"^component 'k': {field}: got {value!r}; must be an integer"):
        k(**{field: value})
    with pytest.raises(SpecError, match=rf"^component 'k': {field}\[1\]: got {value!r}"):
        k(**{field: (8, value)})


@pytest.mark.parametrize("value", [x for x in SIZES if x is not None])
@pytest.mark.parametrize("field", ["window_tokens", "block_size"])
def test_sizes_of_a_group(field: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"^group 'full': {field}: got {value!r}; must be an integer"):
        group(**{field: value})


@pytest.mark.parametrize("value", SIZES)
def test_sizes_of_a_spec(value: Any) -> None:
    with pytest.raises(SpecError, match=rf"^block_size: got {value!r}"):
        CacheSpec([group()], block_size=value)
    with pytest.raises(SpecError, match=rf"^num_layers: got {value!r}"):
        CacheSpec(components=[k(), v()], num_layers=value)
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        with pytest.raises(SpecError, match=rf"got {value!r}"):
            CacheSpec.kv(**({"num_layers": 2, "num_kv_heads": 2, "head_dim": 2, "dtype": BF16} | {name: value}))


BAD_COMPONENTS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, r"^Component.name: got ''"),
    ({"name": 3}, r"^Component.name: got 3"),
    ({"dtype": "float12"}, r"dtype: got 'float12'; a cache holds one of"),
    ({"dtype": torch.complex64}, r"dtype: got torch\.complex64"),
    ({"dtype": torch.bool}, r"dtype: got torch\.bool"),
    ({"dtype": None}, r"dtype: got None"),
    ({"scope": "global"}, r"scope: got 'global'; must be one of layer, shared"),
    ({"growth": "tokens"}, r"growth: got 'tokens'; must be one of token, prefill, fixed"),
    ({"growth": None}, r"growth: got None"),
    ({"rope": "yes"}, r"rope: got 'yes'; must be one of none, pre, post"),
    ({"rope": ("post", "yes")}, r"rope: got 'yes'"),
    ({"rope": ()}, r"rope: got \(\)"),
    ({"ragged": 1}, r"ragged: got 1; must be True or False"),
    ({"heads": ()}, r"heads: got \(\); a per-layer tuple needs at least one entry"),
    ({"heads": ((8,),)}, r"heads\[0\]: got \(8,\); must be an integer"),
    ({"width": ((64, (1,)),)}, r"width\[0\]\[1\]: got \(1,\); must be an integer"),
    ({"width": (64, (64, 32))}, r"width: got .*not a mixture"),
    ({"planes": 16}, r"planes: got 16; must be a tuple of bits"),
    ({"planes": (16, 0)}, r"planes\[1\]: got 0"),
    ({"planes": (16,)}, r"planes: got \(16,\); a single plane splits nothing"),
    ({"planes": (9, 4)}, r"planes: got \(9, 4\); planes must sum to the bits of the dtype"),
    ({"planes": (8, 4, 4)}, r"planes: got \(8, 4, 4\); .*bf16 has 8 exponent bits.*use 12/4, or fp16"),
    ({"dtype": "fp16", "planes": (5, 11)}, r"planes: got \(5, 11\); the first plane must hold sign and exponent"),
    ({"planes": (12, 4), "rope": "pre"}, r"planes: got .*rotation mixes channels: store the key after rotation"),
    ({"scope": "shared", "heads": (8, 8)}, r"heads: got \(8, 8\); one copy shared by all layers has one number"),
    ({"scope": "shared", "width": (64, 64)}, r"width: got \(64, 64\); one copy shared by all layers has one width"),
    ({"scope": "shared", "ragged": True}, r"ragged: got True; .*one copy shared by all layers has one length"),
    ({"growth": "fixed", "rope": "none", "ragged": True}, r"ragged: got True; a fixed state holds no tokens"),
    ({"growth": "fixed"}, r"rope: got 'post'; a fixed state holds no positions"),
    ({"heads": 2, "width": ((64, 32),)}, r"rope: got 'post'; .*a latent is taken before rotation"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_COMPONENTS)
def test_components_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        k(**changes)


STATE = Component("wkv", heads=4, width=64, dtype="float32", growth="fixed")
CROSS = Component("cross_k", heads=8, width=64, dtype=BF16, growth="prefill")

BAD_GROUPS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, r"^Group.name: got ''"),
    ({"components": ()}, r"components: got \(\); needs a sequence of at least one Component"),
    ({"components": "kv"}, r"components: got 'kv'"),
    ({"components": (k(), "v")}, r"components: got .*at least one Component"),
    ({"components": (k(), k(width=64))}, r"components: got 'k' 2 times; names must differ"),
    ({"layers": ()}, r"layers: got \(\); needs 1 to 65536 layer numbers"),
    ({"layers": 32}, r"layers: got 32; needs"),
    ({"layers": range(10**12)}, r"layers: got range\(0, 1000000000000\); needs"),
    ({"layers": (0, -1)}, r"layers: got -1; a layer number is"),
    ({"layers": (0, True)}, r"layers: got True"),
    ({"layers": (0, 1.0)}, r"layers: got 1\.0"),
    ({"layers": (0, 70_000)}, r"layers: got 70000"),
    ({"layers": (0, 2, 1)}, r"layers: got \(0, 2, 1\); must ascend"),
    ({"layers": (0, 1, 1)}, r"layers: got \(0, 1, 1\); must ascend with no repeats"),
    ({"components": (k(heads=(8, 8)),)}, r"component 'k': heads: got 2 entries.*needs 4"),
    ({"components": (k(width=(8, 8)),)}, r"component 'k': width: got 2 entries.*needs 4"),
    ({"components": (k(rope=("post", "none")),)}, r"component 'k': rope: got 2 entries.*needs 4"),
    (
        {"components": (k(heads=9, rope="none", width=((4, 4),) * 4),)},
        r"got 2 head groups \(4, 4\), which do not divide 9 heads",
    ),
    (
        {"components": (k(heads=1, width=3, dtype="fp16", planes=(8, 4, 4)),)},
        r"planes: .*3 elements a token.*part of a byte",
    ),
    ({"components": (k(), STATE)}, r"components: got k, wkv; .*must grow in the same way"),
    ({"components": (k(), CROSS)}, r"components: got k, cross_k; .*must grow in the same way"),
    ({"components": (k(ragged=True), v())}, r"components: got k, v; .*share lengths: make all ragged or none"),
    ({"components": (k(ragged=True, heads=4), v(ragged=True))}, r"components: got k, v; ragged lengths are per head"),
    ({"components": (k(ragged=True),)}, r"components: got k; ragged K with no V.*no head may drop a row alone"),
    ({"components": (k(dtype="int8"),)}, r"components: got k; 8-bit K with no V.*condition number"),
    ({"components": (STATE,), "window_tokens": 64}, r"window_tokens: got 64; a fixed state holds no tokens"),
    ({"components": (CROSS,), "window_tokens": 64}, r"window_tokens: got 64; .*read whole by every step"),
    (
        {"components": (k(ragged=True), v(ragged=True)), "window_tokens": 64},
        r"window_tokens: got 64; ragged rows are compacted",
    ),
    ({"max_tokens": 64}, r"max_tokens: got 64; only a group that is fixed after prefill"),
    ({"components": (CROSS,), "max_tokens": 0}, r"max_tokens: got 0"),
    ({"components": (STATE,), "block_size": 16}, r"block_size: got 16; a fixed state is one block per sequence"),
    ({"components": (k(heads=2**40, width=2**30),)}, r"must stay under 2\*\*63 bytes"),
    ({"window_tokens": 2**60}, r"1152921504606846976 tokens.*must stay under 2\*\*63"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_GROUPS)
def test_groups_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        group(**changes)


BAD_SPECS: list[tuple[dict[str, Any], str]] = [
    ({}, r"^groups: got \(\); needs a sequence of at least one Group"),
    ({"groups": []}, r"^groups: got \[\]"),
    ({"groups": [k()]}, r"^groups: got .*at least one Group"),
    ({"components": [], "num_layers": 2}, r"^components: got \[\]"),
    ({"components": [k(), v()]}, r"^num_layers: got None"),
    ({"components": [k(), v()], "num_layers": 10**12}, r"^num_layers: got 1000000000000; at most 65536"),
    ({"components": [k()], "groups": [group()], "num_layers": 4}, r"^components: got groups full too"),
    ({"groups": [group(), group(layers=(9,))]}, r"^groups: got 'full' 2 times"),
    (
        {"groups": [group(), group(name="b", layers=(3, 4))]},
        r"got component 'k' of layer 3 in 'full' and 'b'; it lives in one",
    ),
    ({"groups": [group()], "num_layers": 3}, r"^num_layers: got 3; a group holds layer 3"),
    ({"groups": [group()], "num_query_heads": 0}, r"^num_query_heads: got 0"),
    ({"groups": [group()], "num_query_heads": 12}, r"^num_query_heads: got 12, not a multiple of the 8 heads of 'k'"),
    (
        {"groups": [group(k())], "num_query_heads": 32},
        r"heads: got 8 of 'k' with no V for 32 query heads.*under GQA.*store V",
    ),
    ({"groups": [group(name=str(i), layers=(i,), block_size=2**50) for i in range(2)]}, r"2\*\*63 bytes"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SPECS)
def test_specs_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CacheSpec(**arguments)


def test_what_looks_like_slim_but_is_not_is_allowed() -> None:
    """K with latent V under GQA (Palu on V alone), and shared latents, derive nothing from the inverse of W_K."""
    CacheSpec(components=[k(), Component("hv", heads=2, width=96, dtype=BF16)], num_layers=4, num_query_heads=32)
    CacheSpec(components=[Component("ckv", width=512, dtype=BF16)], num_layers=4, num_query_heads=32)
    CacheSpec(components=[k(ragged=True), v(ragged=True)], num_layers=4, num_query_heads=32)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("format"), r"^format: got None; this version reads 1"),
        (lambda d: d.update(format=2), r"^format: got 2"),
        (lambda d: d.pop("block_size"), r"^block_size: missing from a CacheSpec"),
        (lambda d: d.update(colour=1), r"^colour: got 1; CacheSpec has no such field"),
        (lambda d: d.update(groups=[]), r"^groups: got \[\]"),
        (lambda d: d.update(groups="all"), r"^groups: got 'all'"),
        (lambda d: d["groups"][0].pop("layers"), r"^layers: missing from a Group"),
        (lambda d: d["groups"][0].update(components=None), r"^components: got None"),
        (lambda d: d["groups"][0]["components"][0].pop("width"), r"^width: missing from a Component"),
        (lambda d: d["groups"][0]["components"][0].update(dtype="x"), r"dtype: got 'x'"),
    ],
)
def test_bad_dicts(edit: Any, message: str) -> None:
    data = CacheSpec([group()]).to_dict()
    edit(data)
    with pytest.raises(SpecError, match=message):
        CacheSpec.from_dict(data)
    with pytest.raises(SpecError, match=r"^spec: got 5"):
        CacheSpec.from_dict(5)  # type: ignore[arg-type]
