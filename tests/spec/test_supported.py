"""Every combination of a spec's fields works on both backends, or is refused by an error that names field and value."""

from __future__ import annotations

import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from contents import by_sequence, by_table, expected, write_slots
from hypothesis import HealthCheck, given, settings
from support import BACKENDS, LONG, make_allocator

import kvmem
from kvmem.kernels.reference import sdpa
from kvmem.kernels.write import to_cache_dtype, write_component, write_kv
from kvmem.spec.dtypes import EXPONENT_BITS

TOKENS = 21
DTYPES = [*EXPONENT_BITS]
INTEGERS = [name for name, exponent in EXPONENT_BITS.items() if exponent == 0]


def refused(error: kvmem.SpecError) -> bool:
    """Whether a field and what it was given are named: ``field: got value; why``."""
    return bool(re.search(r"\b(\w+(\[\d+\])*): got .+[;,]", str(error)))


# ---- Specs -----------------------------------------------------------------------------------------------------------


def _per_layer(one: st.SearchStrategy[Any], layers: int) -> st.SearchStrategy[Any]:
    """One for all layers, or one for each; now and then one too many."""
    return one | st.sampled_from((layers, layers, layers + 1)).flatmap(lambda n: st.tuples(*[one] * n))


@st.composite
def components(draw: st.DrawFn, layers: int, often: str) -> dict[str, Any]:
    """Fields of a component. Most of them keep the rules of ``kvmem.spec``, or nothing would come as far as a cache.

    often: how it grows, mostly.
    """
    fields: dict[str, Any] = {"dtype": draw(st.sampled_from(DTYPES)), "growth": often}
    groups = st.lists(st.sampled_from((2, 3, 8)), min_size=1, max_size=2).map(tuple)
    fields["width"] = draw(_per_layer(st.sampled_from((1, 8, 12)), layers) | st.tuples(*[groups] * layers))
    fields["heads"] = draw(st.sampled_from((2, 4)) | _per_layer(st.sampled_from((1, 2, 4)), layers))
    if draw(st.sampled_from((False, False, True))):
        fields["scope"] = draw(st.sampled_from(("layer", "shared")))
    if draw(st.sampled_from((False, False, True))):
        fields["rope"] = draw(_per_layer(st.sampled_from(("none", "pre", "post")), layers))
    if draw(st.sampled_from((False, False, True))):
        bits = 8 * getattr(torch, fields["dtype"]).itemsize
        fields["planes"] = draw(
            st.sampled_from(((bits // 2, bits // 2), (bits - 4, 4), (bits - 2, 1, 1), (8, 8), (16,)))
        )
    if draw(st.sampled_from((*[False] * 9, True))):
        fields["ragged"] = True
    if draw(st.sampled_from((*[False] * 9, True))):
        fields["growth"] = draw(st.sampled_from(("token", "prefill", "fixed")))
    return fields


@st.composite
def fields_of_spec(draw: st.DrawFn) -> dict[str, Any]:
    """Mostly components that are alike, since a group of components at odds is refused before an allocator sees it."""
    layers = draw(st.sampled_from(((0,), (0, 1), (1, 2, 4))))
    names = draw(st.sampled_from((("k", "v"), ("k",), ("ckv", "kpe"), ("cross_k", "cross_v"), ("state",))))
    growth = {"cross_k": "prefill", "state": "fixed"}.get(names[0], "token")
    common = draw(components(len(layers), growth))
    differ = draw(st.sampled_from((False, False, True)))
    parts = {name: draw(components(len(layers), growth)) if differ else common for name in names}
    group: dict[str, Any] = {}
    for field, values, mostly in (
        ("window_tokens", (1, 7, 16, 2**40), "token"), ("max_tokens", (TOKENS, 50), "prefill"),
        ("block_size", (1, 5, 16, 300), "token"),
    ):  # fmt: skip
        if draw(st.sampled_from((False, True) if growth == mostly else (*[False] * 9, True))):
            group[field] = draw(st.sampled_from(values))
    return {"parts": parts, "layers": layers, "group": group, "queries": draw(st.sampled_from((None, None, 4, 6)))}


def spec_of(given: dict[str, Any]) -> kvmem.CacheSpec:
    components = tuple(kvmem.Component(name, **fields) for name, fields in given["parts"].items())
    group = kvmem.Group("group", components, given["layers"], **given["group"])
    return kvmem.CacheSpec((group,), num_query_heads=given["queries"])


# ---- What works, works on both backends ------------------------------------------------------------------------------


def use(spec: kvmem.CacheSpec, backend: str, interleave: int | str) -> None:
    """Two sequences grow in pieces, are written as a kernel writes, and read back."""
    alloc = make_allocator(spec, backend, memory="16MiB", page_bytes=4096, max_tokens=64, interleave=interleave)
    (group,) = spec.groups
    tokens = 1 if group.growth == "fixed" else TOKENS
    piece = 8 if group.growth == "token" else tokens  # the others grow once
    seqs = [alloc.sequence(), alloc.sequence()]
    for begin in range(0, tokens, piece):
        for writer, seq in enumerate(seqs):
            count = min(piece, tokens - begin)
            seq.extend(count, group=0 if group.growth == "prefill" else None)
            table = alloc.batch([seq]).group(0).block_table[0].long()
            positions = torch.arange(begin, begin + count)
            slots = table[positions // group.block_size] * group.block_size + positions % group.block_size
            write_slots(alloc, 0, slots, np.full(count, writer), positions.numpy())
            if group.growth != "fixed":
                seq.commit(count=count, group=0 if group.growth == "prefill" else None)
    for writer, seq in enumerate(seqs):
        first = alloc.core.first_token(seq.id, 0)
        assert tokens - first >= min(tokens, (group.window_tokens or TOKENS + 1) - 1)  # what the next query sees
        held = np.arange(first, tokens)
        wanted = list(expected(spec, 0, np.full(len(held), writer), held))
        for read in (by_sequence, by_table):
            found = list(read(alloc, [seq.id], 0))
            assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), read.__name__
    for seq in seqs:
        seq.free()
    assert alloc.check() == []


@settings(
    max_examples=1000 if LONG else 150, deadline=None, database=None, print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(fields=fields_of_spec(), interleave=st.sampled_from((1, "none", "all")))
def test_every_spec_works_or_is_refused(fields: dict[str, Any], interleave: int | str) -> None:
    try:
        spec = spec_of(fields)
    except kvmem.SpecError as error:
        assert refused(error), error
        return
    (group,) = spec.groups
    for backend in BACKENDS:
        if group.ragged:
            with pytest.raises(
                kvmem.SpecError, match=r"component '\w+': ragged: got True; an allocator has one length"
            ):
                use(spec, backend, interleave)
        else:
            use(spec, backend, interleave)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_is_refused_wherever_it_stands(backend: str, device: str) -> None:
    plain = tuple(kvmem.Component(n, heads=2, width=8, dtype="fp16") for n in ("k", "v"))
    lanes = tuple(kvmem.Component(n, heads=2, width=8, dtype="fp16", ragged=True) for n in ("k", "v"))
    spec = kvmem.CacheSpec((kvmem.Group("plain", plain, (0,)), kvmem.Group("lanes", lanes, (1,))))
    with pytest.raises(kvmem.SpecError, match="group 'lanes': component 'k': ragged: got True"):
        kvmem.Allocator(spec, backend=backend, device=device, memory="4MiB", max_sequences=2, max_tokens=64)


# ---- Numbers into caches that cannot hold them -----------------------------------------------------------------------


def opened(backend: str, **fields: Any) -> tuple[kvmem.Allocator, kvmem.Batch, torch.Tensor]:
    """With three new tokens, and what the cache holds of them."""
    parts = [kvmem.Component(name, **({"heads": 2, "width": 8} | fields)) for name in ("k", "v")]
    alloc = make_allocator(kvmem.CacheSpec(components=parts, num_layers=1), backend)
    seq = alloc.sequence()
    seq.extend(3)
    batch = alloc.batch([seq])
    ones = torch.ones(3, *alloc.tensor(0, "k").shape[2:], dtype=alloc.tensor(0, "k").dtype)
    write_kv(alloc.kv(0), batch, ones, ones)
    return alloc, batch, ones


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_cache_of_integers_takes_its_own_dtype_only(backend: str, dtype: str) -> None:
    alloc, batch, ones = opened(backend, dtype=dtype)
    floats, wide = torch.full(ones.shape, 1.7), ones.to(torch.int16 if ones.dtype == torch.int64 else torch.int64)
    for values in (floats, floats.bfloat16(), wide):
        got = re.escape(f"got {values.dtype}; the cache holds {ones.dtype}")
        with pytest.raises(kvmem.SpecError, match=f"v: {got}"):
            write_kv(alloc.kv(0), batch, 0 * ones, values)
        with pytest.raises(kvmem.SpecError, match=f"values: {got}"):
            write_component(alloc.tensor(0, "k"), batch, values)
    with pytest.raises(kvmem.SpecError, match="k: got .* with a scale"):
        write_kv(alloc.kv(0), batch, ones, ones, k_scale=0.5)
    slots = batch.slot_mapping
    for cache in alloc.kv(0):
        assert torch.equal(cache[slots // 16, slots % 16], ones), "what is refused writes nothing, K neither"
    write_kv(alloc.kv(0), batch, 5 * ones, 7 * ones)
    assert torch.equal(alloc.kv(0)[1][slots // 16, slots % 16], 7 * ones)


@pytest.mark.parametrize("backend", BACKENDS)
def test_planes_are_bytes_and_take_bytes_only(backend: str) -> None:
    alloc, batch, ones = opened(backend, dtype="fp16", planes=(8, 4, 4))
    assert (alloc.tensor(0, "k").dtype, tuple(ones.shape)) == (torch.uint8, (3, 1, 2 * 8 * 2))
    with pytest.raises(kvmem.SpecError, match=r"k: got shape \(3, 2, 8\)"):
        write_kv(alloc.kv(0), batch, torch.ones(3, 2, 8).half(), ones)
    with pytest.raises(kvmem.SpecError, match=r"k: got torch.float16; the cache holds torch.uint8"):
        write_kv(alloc.kv(0), batch, ones.half(), ones)
    with pytest.raises(kvmem.SpecError, match="q: got 2 heads of width 8; the cache has 1 of width 32"):
        sdpa(torch.ones(3, 2, 8).half(), alloc.kv(0), batch)  # joining the planes again is the reader's part


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64], ids=str)
def test_values_of_the_caches_own_dtype_are_stored_as_they_are(dtype: torch.dtype) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(dtype)  # NaN payloads and infinities too
    assert to_cache_dtype(values, dtype) is values
    halved = to_cache_dtype(torch.ones(1).to(dtype), dtype, scale=2.0)
    assert halved.dtype == dtype and halved.float() == 0.5
    wider = to_cache_dtype(torch.full((1,), 1.5).to(torch.float8_e5m2), dtype)
    assert wider.dtype == dtype and wider.float() == 1.5


def test_more_windows_than_a_record_has_bits_for() -> None:
    """The virtual backend refuses a 33rd group with a window, and has made nothing; the paged backend takes them."""
    k = kvmem.Component("k", width=4, dtype="float32")

    def spec(windows: int) -> kvmem.CacheSpec:
        return kvmem.CacheSpec(
            [kvmem.Group(f"g{i}", (k,), (i,), block_size=4, window_tokens=8) for i in range(windows)]
        )

    sizes: dict[str, Any] = {"memory": "8MiB", "page_bytes": 4096, "max_sequences": 4, "max_tokens": 256}
    with pytest.raises(kvmem.SpecError, match="got 33; the virtual backend takes at most 32"):
        kvmem.Allocator(spec(33), backend="virtual", device="cpu", **sizes)
    for backend, windows in (("virtual", 32), ("paged", 33)):
        alloc = kvmem.Allocator(spec(windows), backend=backend, device="cpu", **sizes)
        seq = alloc.sequence()
        seq.extend(73)
        seq.commit([1] * 73)
        seq.free()
        assert alloc.sequence([1] * 74).num_cached_tokens == 72
        assert alloc.check() == []
