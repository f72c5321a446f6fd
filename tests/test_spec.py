"""The spec's arithmetic, its refusals, and its fingerprint."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmem.errors import KVMemError, SpecError
from kvmem.spec import CacheSpec, Component, Group, dtype_name, parse_dtype

BF16 = torch.bfloat16


def k(**changes: Any) -> Component:
    return Component(**({"name": "k", "heads": 8, "width": 128, "dtype": BF16, "rope": "post"} | changes))


def v(**changes: Any) -> Component:
    return k(**({"name": "v", "rope": "none"} | changes))


def group(*components: Component, **changes: Any) -> Group:
    return Group(**({"name": "full", "components": components or (k(), v()), "layers": range(4)} | changes))


# ---- arithmetic -------------------------------------------------------------------------------------------------------


def test_llama_3_8b_by_hand() -> None:
    spec = CacheSpec.kv(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bf16")
    assert spec.bytes_per_token == 32 * 2 * 8 * 128 * 2 == 131_072
    assert (spec.num_layers, spec.block_size, spec.fixed_bytes, spec.prefill_bytes_per_token) == (32, 16, 0, 0)
    assert spec.groups[0].row_bytes("k", 31) == 2048
    by_components = CacheSpec(components=[k(), v()], num_layers=32)
    assert by_components == spec and by_components.fingerprint == spec.fingerprint and hash(by_components) == hash(spec)


def test_slim_is_half_of_mha() -> None:
    mha = CacheSpec(
        components=[k(dtype="fp16", heads=32), v(dtype="fp16", heads=32)], num_layers=32, num_query_heads=32
    )
    slim = CacheSpec(components=[k(dtype="fp16", heads=32, rope="pre")], num_layers=32, num_query_heads=32)
    assert slim.bytes_per_token * 2 == mha.bytes_per_token
    assert slim.groups[0].k_only and not mha.groups[0].k_only


def test_palu_widths_differ_by_layer_and_head_group() -> None:
    k_ranks, v_ranks = ((32, 64), (96, 32)), ((128, 128), (64, 192))
    hk = Component("hk", heads=2, width=k_ranks, dtype=torch.float16, rope="pre")
    hv = Component("hv", heads=2, width=v_ranks, dtype=torch.float16)
    spec = CacheSpec(components=[hk, hv], num_layers=2)
    (g,) = spec.groups
    assert [g.row_bytes("hk", layer) for layer in (0, 1)] == [(32 + 64) * 2, (96 + 32) * 2]
    assert g.widths("hk", 1) == (96, 32)
    assert g.widths("hv", 0) == (128,), "equal head groups are one"
    assert spec.bytes_per_token == 2 * (32 + 64 + 96 + 32 + 128 + 128 + 64 + 192)
    # 1,024 + 3,072 of 2 x 4,096 numbers are exactly half, as the paper's 50 % setting.
    palu = [
        Component("hk", heads=8, width=128, dtype=BF16, rope="pre"),
        Component("hv", heads=8, width=384, dtype=BF16),
    ]
    full = CacheSpec(components=[k(heads=32), v(heads=32)], num_layers=32)
    assert 2 * CacheSpec(components=palu, num_layers=32).bytes_per_token == full.bytes_per_token


@pytest.mark.parametrize(("num_layers", "d", "ratio"), [(24, 2048, 756.2), (32, 4096, 1016.1), (80, 8192, 2550.0)])
def test_goldfinch_ratio(num_layers: int, d: int, ratio: float) -> None:
    """The published compression of the token cache; the recurrent state stands apart in fixed_bytes."""
    recurrent = tuple(range(2 * num_layers // 3))
    gold = tuple(range(len(recurrent), num_layers))
    shared = (Component("c", width=d // 16, dtype=BF16, scope="shared", rope="pre"),
              Component("tok", width=1, dtype=torch.int32, scope="shared"))  # fmt: skip
    state = (Component("wkv", heads=d // 64, width=64 * 64, dtype=torch.float32, growth="fixed"),
             Component("shift", heads=2, width=d, dtype=BF16, growth="fixed"))  # fmt: skip
    spec = CacheSpec([Group("gold", shared, gold), Group("state", state, recurrent)])
    plain = CacheSpec.kv(num_layers=num_layers, num_kv_heads=d // 64, head_dim=64, dtype=BF16)
    assert spec.bytes_per_token == d // 16 * 2 + 4, "one copy, whatever the number of layers"
    assert plain.bytes_per_token / spec.bytes_per_token == pytest.approx(ratio, abs=0.05)
    assert spec.fixed_bytes == len(recurrent) * (d // 64 * 4096 * 4 + 2 * d * 2)
    assert (spec.groups[0].block_size, spec.groups[1].block_size) == (16, 1)
    assert spec.groups[0].row_bytes("c", gold[0]) == spec.groups[0].row_bytes("c", gold[-1]) == d // 8


def test_whisper_with_one_shared_encoder_output() -> None:
    """Slim attention's option B: 7.9 times less for 32 layers once the encoder output itself is counted."""
    d, layers = 1280, range(32)
    own = Group("full", (k(heads=20, width=64, dtype="fp16"),), layers)
    encoder = Component("enc", width=d, dtype="fp16", scope="shared", growth="prefill")
    slim = CacheSpec([own, Group("encoder", (encoder,), layers, max_tokens=1500)], num_query_heads=20)
    assert (slim.bytes_per_token, slim.prefill_bytes_per_token) == (32 * d * 2, d * 2)
    plain = 32 * (2 * 1500 + 2 * 448) * d * 2
    assert plain / (448 * slim.bytes_per_token + 1500 * slim.prefill_bytes_per_token) == pytest.approx(7.87, abs=0.01)


def test_planes_store_all_bits() -> None:
    planes = CacheSpec(components=[k(dtype="fp16", planes=(8, 4, 4)), v(dtype="fp16", planes=(8, 4, 4))], num_layers=4)
    plain = CacheSpec(components=[k(dtype="fp16"), v(dtype="fp16")], num_layers=4)
    assert planes.bytes_per_token == plain.bytes_per_token
    assert planes.fingerprint != plain.fingerprint
    assert k(planes=(12, 4)).planes == (12, 4), "the split that bf16 allows"


def test_lookups() -> None:
    window = group(name="sliding", layers=(0, 2, 3), window_tokens=64)
    spec = CacheSpec([group(name="full", layers=(1, 5)), window], num_layers=8)
    assert [spec.group_of(layer, "v") for layer in (0, 1, 2, 3, 5)] == [1, 0, 1, 1, 0]
    assert [c.name for c in spec.layer_components(3)] == ["k", "v"]
    assert spec.layer_components(4) == () and spec.num_layers == 8
    assert CacheSpec([window]).num_layers == 4
    for call, message in [
        (lambda: spec.group_of(4, "k"), r"component: got 'k' of layer 4; that layer has none"),
        (lambda: spec.group_of(1, "ckv"), r"component: got 'ckv' of layer 1; that layer has k, v"),
        (lambda: spec.layer_components(8), r"layer: got 8; the spec has layers 0 to 7"),
        (lambda: spec.layer_components(-1), r"layer: got -1"),
        (lambda: window.row_bytes("k", 1), r"layer: got 1; it has \(0, 2, 3\)"),
        (lambda: window.component("x"), r"component: got 'x'; it has k, v"),
    ]:
        with pytest.raises(SpecError, match=message):
            call()


def test_block_size_comes_from_the_spec_unless_the_group_has_one() -> None:
    spec = CacheSpec([group(name="a", layers=(0,)), group(name="b", layers=(1,), block_size=64)], block_size=32)
    assert [g.block_size for g in spec.groups] == [32, 64]


def test_plain_data() -> None:
    spec = CacheSpec([group(layers=[np.int64(0), np.int64(3)])])
    assert type(spec.groups[0].layers[0]) is int
    for other in (copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), replace(spec)):
        assert other == spec and hash(other) == hash(spec) and other.fingerprint == spec.fingerprint
    with pytest.raises(FrozenInstanceError):
        spec.block_size = 4  # type: ignore[misc]
    assert issubclass(SpecError, (KVMemError, ValueError))


@pytest.mark.parametrize("spelling", ["bfloat16", "torch.bfloat16", "bf16", torch.bfloat16])
def test_dtypes(spelling: Any) -> None:
    assert parse_dtype(spelling) is torch.bfloat16 and dtype_name(torch.bfloat16) == "bfloat16"


# ---- refusals ---------------------------------------------------------------------------------------------------------

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
    ({"heads": ()}, r"heads: got \(\); a per-layer tuple needs an entry"),
    ({"heads": ((8,),)}, r"heads\[0\]: got \(8,\); must be an integer"),
    ({"width": ((64, (1,)),)}, r"width\[0\]\[1\]: got \(1,\); must be an integer"),
    ({"width": (64, (64, 32))}, r"width: got .*not a mixture"),
    ({"planes": 16}, r"planes: got 16; must be a tuple of bits"),
    ({"planes": (16, 0)}, r"planes\[1\]: got 0"),
    ({"planes": (16,)}, r"planes: got \(16,\); one plane is no split"),
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
]  # fmt: skip


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
    ({"components": (k(heads=9, rope="none", width=((4, 4),) * 4),)}, r"got 2 head groups \(4, 4\), which do not divide 9 heads"),
    ({"components": (k(heads=1, width=3, dtype="fp16", planes=(8, 4, 4)),)}, r"planes: .*3 elements a token.*part of a byte"),
    ({"components": (k(), STATE)}, r"components: got k, wkv; .*so they grow alike"),
    ({"components": (k(), CROSS)}, r"components: got k, cross_k; .*so they grow alike"),
    ({"components": (k(ragged=True), v())}, r"components: got k, v; .*share lengths: make all ragged or none"),
    ({"components": (k(ragged=True, heads=4), v(ragged=True))}, r"components: got k, v; ragged lengths are per head"),
    ({"components": (k(ragged=True),)}, r"components: got k; ragged K with no V.*no head may drop a row alone"),
    ({"components": (k(dtype="int8"),)}, r"components: got k; 8-bit K with no V.*condition number"),
    ({"components": (STATE,), "window_tokens": 64}, r"window_tokens: got 64; a fixed state holds no tokens"),
    ({"components": (CROSS,), "window_tokens": 64}, r"window_tokens: got 64; .*read whole by every step"),
    ({"components": (k(ragged=True), v(ragged=True)), "window_tokens": 64}, r"window_tokens: got 64; ragged rows are compacted"),
    ({"max_tokens": 64}, r"max_tokens: got 64; only a group that is fixed after prefill"),
    ({"components": (CROSS,), "max_tokens": 0}, r"max_tokens: got 0"),
    ({"components": (STATE,), "block_size": 16}, r"block_size: got 16; a fixed state is one block per sequence"),
    ({"components": (k(heads=2**40, width=2**30),)}, r"must stay under 2\*\*63 bytes"),
    ({"window_tokens": 2**60}, r"1152921504606846976 tokens.*must stay under 2\*\*63"),
]  # fmt: skip


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
    ({"groups": [group(), group(name="b", layers=(3, 4))]}, r"got component 'k' of layer 3 in 'full' and in 'b'; it lives in one"),
    ({"groups": [group()], "num_layers": 3}, r"^num_layers: got 3; a group holds layer 3"),
    ({"groups": [group()], "num_query_heads": 0}, r"^num_query_heads: got 0"),
    ({"groups": [group()], "num_query_heads": 12}, r"^num_query_heads: got 12, which 8 heads of 'k' .* do not divide"),
    ({"groups": [group(k())], "num_query_heads": 32}, r"heads: got 8 of 'k' with no V for 32 query heads.*under GQA.*store V too"),
    ({"groups": [group(name=str(i), layers=(i,), block_size=2**50) for i in range(2)]}, r"2\*\*63 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_SPECS)
def test_specs_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CacheSpec(**arguments)


def test_what_looks_like_slim_but_is_not_is_allowed() -> None:
    """K with latent V under GQA (Palu on V alone), and shared latents, derive nothing from the inverse of W_K."""
    CacheSpec(components=[k(), Component("hv", heads=2, width=96, dtype=BF16)], num_layers=4, num_query_heads=32)
    CacheSpec(components=[Component("ckv", width=512, dtype=BF16)], num_layers=4, num_query_heads=32)
    CacheSpec(components=[k(ragged=True), v(ragged=True)], num_layers=4, num_query_heads=32)


# ---- properties -------------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int32])


@st.composite
def components(draw: Any, num_layers: int, name: str, growth: str) -> Component:
    scope = draw(st.sampled_from(["layer", "shared"]))
    copies = 1 if scope == "shared" else num_layers
    head_groups = draw(st.integers(1, 3))
    heads = st.integers(1, 4).map(lambda n: n * head_groups)
    number = st.integers(1, 300)
    widths = st.tuples(*[number] * head_groups)
    return Component(
        name,
        heads=draw(heads | st.tuples(*[heads] * copies)),
        width=draw(number | st.tuples(*[number] * copies) | st.tuples(*[widths] * copies)),
        dtype=draw(DTYPES),
        scope=scope,
        growth=growth,
        rope="none" if growth == "fixed" else draw(st.sampled_from(["none", "pre"])),
    )


@st.composite
def specs(draw: Any) -> CacheSpec:
    groups = []
    for index in range(draw(st.integers(1, 3))):
        layers = tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=5))))
        growth = draw(st.sampled_from(["token", "prefill", "fixed"]))
        names = [f"{index}{i}" for i in range(draw(st.integers(1, 3)))]
        parts = tuple(draw(components(len(layers), name, growth)) for name in names)
        size = None if growth == "fixed" else draw(st.none() | st.integers(1, 300))
        window = draw(st.none() | st.integers(1, 5000)) if growth == "token" else None
        limit = draw(st.none() | st.integers(1, 5000)) if growth == "prefill" else None
        groups.append(Group(str(index), parts, layers, window_tokens=window, max_tokens=limit, block_size=size))
    return CacheSpec(
        groups, block_size=draw(st.integers(1, 300)), num_query_heads=draw(st.none() | st.integers(1, 128))
    )


def count_bytes(spec: CacheSpec, growth: str) -> int:
    """Head by head and copy by copy: slow and obvious."""
    total = 0
    for g in spec.groups:
        for c in g.components if g.growth == growth else ():
            for layer in g.layers[:1] if c.scope == "shared" else g.layers:
                widths = g.widths(c.name, layer)
                heads = g.heads(c.name, layer)
                for head in range(heads):
                    total += widths[head * len(widths) // heads] * torch.empty(0, dtype=c.dtype).element_size()
    return total


@settings(max_examples=150, deadline=None, print_blob=True)
@given(specs())
def test_bytes_equal_a_sum_by_hand(spec: CacheSpec) -> None:
    assert spec.bytes_per_token == count_bytes(spec, "token")
    assert spec.prefill_bytes_per_token == count_bytes(spec, "prefill")
    assert spec.fixed_bytes == count_bytes(spec, "fixed")
    for g in spec.groups:
        for layer in g.layers:
            assert all(spec.groups[spec.group_of(layer, c.name)] is g for c in g.components)


@settings(max_examples=150, deadline=None, print_blob=True)
@given(specs())
def test_dict_round_trip(spec: CacheSpec) -> None:
    data = spec.to_dict()
    text = json.dumps(data)
    assert json.loads(text) == data, "already plain JSON"
    back = CacheSpec.from_dict(json.loads(text))
    assert back == spec and hash(back) == hash(spec) and back.fingerprint == spec.fingerprint


@settings(max_examples=150, deadline=None, print_blob=True)
@given(specs(), specs())
def test_fingerprints_agree_with_equality(a: CacheSpec, b: CacheSpec) -> None:
    assert (a.fingerprint == b.fingerprint) == (a == b)


def test_every_field_changes_the_fingerprint() -> None:
    base = group(k(dtype="fp16"), v(dtype="fp16"))
    parts = base.components
    changed = [replace(parts[0], **{field: value}) for field, value in {
        "name": "key", "heads": 4, "width": 64, "dtype": torch.bfloat16, "scope": "shared", "rope": "pre", "planes": (8, 4, 4),
    }.items()]  # fmt: skip
    groups = [replace(base, components=(c, parts[1])) for c in changed]
    groups += [
        replace(base, components=tuple(replace(c, **{f: x}) for c in parts))
        for f, x in {"growth": "prefill", "ragged": True}.items()
    ]
    groups += [replace(base, components=parts[::-1]), replace(base, name="x"), replace(base, layers=(0, 1, 2, 4))]
    groups += [replace(base, window_tokens=64), replace(base, block_size=8)]
    variants = [CacheSpec([g], num_layers=8) for g in (base, *groups)]
    variants += [CacheSpec([base], num_layers=9), CacheSpec([base], num_layers=8, block_size=8)]
    variants += [CacheSpec([base], num_layers=8, num_query_heads=32)]
    cross = replace(groups[7], max_tokens=1500)
    assert cross.growth == "prefill"
    variants += [CacheSpec([cross], num_layers=8)]
    prints = [spec.fingerprint for spec in variants]
    same = {(i, j) for i in range(len(prints)) for j in range(i) if prints[i] == prints[j]}
    # A group's own block_size of 8 with the spec's 16, and the spec's 8, describe different defaults: kept apart.
    assert same == set() and all(len(p) == 64 for p in prints)


def test_one_spelling_of_equal_shapes() -> None:
    want = CacheSpec(components=[k(rope="none"), v()], num_layers=2)
    for heads, width in [((8, 8), 128), (8, (128, 128)), (8, ((128, 128), (128, 128))), ([8, 8], [[128], [128]])]:
        spec = CacheSpec(components=[k(rope=("none", "none"), heads=heads, width=width), v()], num_layers=2)
        assert spec == want and spec.fingerprint == want.fingerprint
    fine = CacheSpec(components=[v(heads=4, width=((64, 64, 32, 32), (8, 8, 8, 8)))], num_layers=2)
    coarse = CacheSpec(components=[v(heads=4, width=((64, 32), (8, 8)))], num_layers=2)
    assert fine == coarse and fine.groups[0].widths("v", 0) == (64, 32)
    other = CacheSpec(components=[v(heads=4, width=((64, 64, 64, 32), (8, 8, 8, 8)))], num_layers=2)
    assert other != fine and other.groups[0].widths("v", 0) == (64, 64, 64, 32)


def test_fingerprint_is_the_same_in_another_process_and_forever() -> None:
    code = (
        "import torch; from kvmem.spec import CacheSpec, Component, Group\n"
        "s = CacheSpec([Group('full', (Component('k', heads=8, width=(64, 32), dtype=torch.bfloat16, rope='post'),), (0, 1)),"
        "Group('state', (Component('wkv', heads=2, width=64, dtype='float32', growth='fixed'),), (2,))])\n"
        "print(s.fingerprint)"
    )
    prints = set()
    for seed in ("0", "1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        prints.add(run.stdout.strip())
    # Pinned: a stored prefix names its spec by this value. It may change only together with the format number.
    assert prints == {"ce3ce6030a7d7a6fe13da31ed94111e4085cca3cb19a921c7440892f2ed247c7"}


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
