"""GoldFinch: the published ratios, a model decoded as its parallel form computes it, and what its states ask of callers."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from goldfinch_cases import cases
from kernel_cases import one_thread
from toy_goldfinch import F64, Toy, parallel, run

import kvmem
from kvmem import CacheSpec
from kvmem.errors import SpecError
from kvmem.layouts import LayoutCache
from kvmem.layouts.goldfinch import goldfinch_spec
from kvmem.layouts.rope import Rope

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
#: Layers and width; the ratio as the paper rounds it at the two ends (756 and 2,550).
SIZES = [(24, 2048, 756.2), (32, 4096, 1016.1), (40, 5120, 1272.0), (80, 8192, 2550.0)]


def allocator(spec: CacheSpec, backend: str, memory: str = "8MiB") -> kvmem.Allocator:
    return kvmem.Allocator(
        spec, backend=backend, device="cpu", memory=memory, max_sequences=6, max_tokens=400, page_bytes=4096
    )


def cache_of(toy: Toy, backend: str, **options: Any) -> LayoutCache:
    return LayoutCache(toy.layout(**options), allocator(toy.spec, backend))


def draw(seed: int, *counts: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=generator).tolist() for n in counts]


def assert_equal(got: list[torch.Tensor], want: torch.Tensor) -> None:
    torch.testing.assert_close(torch.cat(got), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("layers", "d_model", "ratio"), SIZES)
def test_the_published_ratios(layers: int, d_model: int, ratio: float, backend: str) -> None:
    spec = goldfinch_spec(num_layers=layers, d_model=d_model, dtype="bfloat16", states=False)
    plain = CacheSpec.kv(num_layers=layers, num_kv_heads=d_model // 64, head_dim=64, dtype="bfloat16")
    held = []
    for each in (spec, plain):
        alloc = allocator(each, backend, "128MiB")
        for tokens in (3, 2):
            alloc.sequence().extend(tokens)
        held.append(sum(alloc.ledger.held.values()))
        assert held[-1] == 5 * each.bytes_per_token
    formula = Fraction(2 * layers * d_model * 2, d_model // 16 * 2 + 4)
    assert Fraction(held[1], held[0]) == formula and round(float(formula), 1) == ratio


def test_states_are_counted_apart(backend: str) -> None:
    spec = goldfinch_spec(num_layers=24, d_model=2048, dtype="bfloat16")
    matrices, shifts = 16 * 32 * 64 * 64 * 4, 24 * 2 * 2048 * 2
    assert (spec.bytes_per_token, spec.fixed_bytes) == (260, matrices + shifts)
    assert spec.fixed_bytes / 2**20 == 8.1875
    alloc = allocator(spec, backend, "64MiB")
    alloc.sequence().extend(7)
    held = {name: bytes for (name, _), bytes in alloc.ledger.held.items()}
    assert held == {"c": 7 * 256, "tok": 7 * 4, "wkv": matrices, "shift": shifts}


@pytest.mark.parametrize("interleaved", [True, False])
def test_decode_equals_the_parallel_form(interleaved: bool, backend: str, seed: int) -> None:
    """Across tiles of 16, pages of 85 1/3 tokens, blocks of 8, and prefill, decode and drafts; beside padding rows."""
    toy, ids = Toy(seed, interleaved=interleaved), draw(seed, 120, 75)
    cache, got = cache_of(toy, backend, tile_tokens=16), [[], []]
    seqs, done = [cache.alloc.sequence(), cache.alloc.sequence()], [0, 0]
    for counts in [(80, 1), (1, 40), *[(1, 1)] * 20, (8, 3), *[(1, 1)] * 11]:
        new = [(s, i[a : a + n]) for s, i, a, n in zip(seqs, ids, done, counts, strict=True)]
        for kept, logits in zip(got, run(toy, cache, *new, pad_to=4), strict=True):
            kept.append(logits)
        done = [a + n for a, n in zip(done, counts, strict=True)]
    assert done == [len(i) for i in ids]
    for kept, i in zip(got, ids, strict=True):
        assert_equal(kept, parallel(toy, i))


def test_one_copy_serves_all_layers(backend: str, seed: int) -> None:
    held, read = [], []
    for gold in (2, 8):
        toy = Toy(seed, gold=gold)
        cache = cache_of(toy, backend, tile_tokens=16)
        run(toy, cache, (cache.alloc.sequence(), draw(seed, 40)[0]))
        ledger = cache.alloc.ledger
        held.append({name: ledger.held[name, "device"] for name in ("c", "tok")})
        read.append(ledger.read["c", "device"] + ledger.read["tok", "device"])
    each = 4 * 8 + 4
    assert held == [{"c": 40 * 32, "tok": 40 * 4}] * 2
    assert read == [gold * (40 + 2) * each for gold in (2, 8)]  # three tiles, of which two read one row more


def test_beams_diverge(backend: str, seed: int) -> None:
    toy, (prompt, left, right) = Toy(seed), draw(seed, 100, 9, 9)
    cache = cache_of(toy, backend)
    seq = cache.alloc.sequence()
    first = run(toy, cache, (seq, prompt))
    beam = seq.fork()
    got = [[*first], [*first]]
    for a, b in zip(left, right, strict=True):
        for kept, logits in zip(got, run(toy, cache, (seq, [a]), (beam, [b])), strict=True):
            kept.append(logits)
    assert_equal(got[0], parallel(toy, prompt + left))
    assert_equal(got[1], parallel(toy, prompt + right))
    held = cache.alloc.ledger.held
    assert held["wkv", "device"] + held["shift", "device"] == 2 * toy.spec.fixed_bytes
    assert held["c", "device"] < 2 * 109 * 32 and cache.alloc.stats().shared_bytes > 0
    assert cache.alloc.check() == []


def test_tiles_of_any_size(backend: str, seed: int) -> None:
    toy, (ids,) = Toy(seed, recurrent=1), draw(seed, 130)
    cache = cache_of(toy, backend)
    (seq := cache.alloc.sequence()).extend(130)
    cache.write(1, cache.alloc.batch([seq]), torch.randn(130, 4, dtype=F64), torch.tensor(ids))
    seq.commit(count=125)
    batch, q, results = cache.alloc.batch([seq]), torch.randn(5, 4, 16, dtype=F64), []
    for cache.layout.tile_tokens in (1, 16, 1000):
        derived = cache.derive(2, batch)
        results.append((*cache.attend(q, 2, batch), derived.k.clone(), derived.v.clone()))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-12)


def test_a_state_is_not_cut_back(backend: str, seed: int) -> None:
    """Rejected drafts: truncate() leaves the state ahead; a fork, or a copy of the state, brings it back."""
    toy, (ids, drafts, rest) = Toy(seed), draw(seed, 24, 5, 8)
    cache, want = cache_of(toy, backend), parallel(toy, ids + rest)[24:]
    alloc = cache.alloc
    run(toy, cache, (seq := alloc.sequence(), ids))
    kept = seq.fork()
    batch = alloc.batch([seq])
    places = [(i, c.name, int(g.block_table[0, 0])) for g, group in zip(batch.groups, toy.spec.groups, strict=True)
              if group.growth == "fixed" for i in group.layers for c in group.components]  # fmt: skip
    copies = [alloc.tensor(layer, name)[block].clone() for layer, name, block in places]
    run(toy, cache, (seq, drafts))
    seq.truncate(24)
    with pytest.raises(SpecError, match="state"):
        seq.snapshot()
    (ahead,) = run(toy, cache, (seq.fork(), rest))
    assert (ahead - want).abs().max() > 1e-3
    for (layer, name, block), copy in zip(places, copies, strict=True):
        alloc.tensor(layer, name)[block] = copy
    assert_equal(run(toy, cache, (seq, rest)), want)
    assert_equal(run(toy, cache, (kept, rest)), want)


def test_a_prefix_is_found_at_a_snapshot(backend: str, seed: int) -> None:
    toy, (ids, rest) = Toy(seed), draw(seed, 40, 9)
    cache = cache_of(toy, backend)
    with cache.alloc.sequence() as seq:
        run(toy, cache, (seq, ids[:32]))
        seq.snapshot()
        run(toy, cache, (seq, ids[32:]))
    with cache.alloc.sequence(ids + rest) as seq:
        assert seq.num_cached_tokens == 32  # 40 are cached, but the state is known after 32
        assert_equal(run(toy, cache, (seq, ids[32:] + rest)), parallel(toy, ids + rest)[32:])


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_the_cases_mean_what_they_say(case: Any, backend: str, seed: int) -> None:
    cache = LayoutCache(case.layout, allocator(case.layout.spec, backend))
    (seq := cache.alloc.sequence()).extend(60)
    batch, ids = cache.alloc.batch([seq]), torch.tensor(draw(seed, 60)[0])
    cache.write(2, batch, *case.values(2, ids, torch.arange(60)))
    for layer in range(3):
        got, want = cache.derive(layer, batch), case.plain(layer, ids, torch.arange(60))
        for mine, theirs in zip((got.k, got.v), want, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=case.tolerance * float(theirs.abs().max()))


def test_the_fingerprint_covers_every_weight(seed: int) -> None:
    toy, seen = Toy(seed), set()
    before = toy.layout().fingerprint
    assert before == Toy(seed).layout().fingerprint
    for owner, key in ((vars(toy), "shared"), (toy.key, 4)):
        kept = owner[key]
        for field in fields(kept):
            owner[key] = replace(kept, **{field.name: getattr(kept, field.name) + 1e-9})
            seen.add(toy.layout().fingerprint)
        owner[key] = kept
    seen |= {toy.layout(rope=None).fingerprint, toy.layout(interleaved=False).fingerprint}
    assert len(seen | {before}) == 12


def small(**wrong: Any) -> CacheSpec:
    return goldfinch_spec(**({"num_layers": 6, "recurrent_layers": 3, "d_model": 64, "dtype": F64} | wrong))


REFUSED_SPECS: dict[str, dict[str, Any]] = {
    "num_layers: got 1; must be an integer of at least 2": {"num_layers": 1},
    "compression: got 16, which does not divide d_model=100": {"d_model": 100},
    "state_width: got 48, which does not divide d_model=64": {"state_width": 48},
    "recurrent_layers: got 6 of 6 layers; at least one must be a GOLD layer": {"recurrent_layers": 6},
    "dtype: got torch.int8; must be a float such as bfloat16": {"dtype": "int8"},
    "state_dtype: got torch.int8; must be a float such as bfloat16": {"state_dtype": "int8"},
}
REFUSED_OPTIONS: dict[str, dict[str, Any]] = {
    "num_heads: got 3, which does not divide d_model=64": {"num_heads": 3},
    "tile_tokens: got 0; must be an integer of at least 1": {"tile_tokens": 0},
    "rope: turns 8 elements of a head; GOLD layers turn all, 16 with these": {"rope": Rope.default(8)},
    "spec: got groups ['all']; GoldFinch takes what goldfinch_spec": {
        "spec": CacheSpec.kv(num_layers=6, num_kv_heads=4, head_dim=16, dtype=F64)
    },
    "shared.expand: got shape (68, 64); must be (72, 64)": {"spec": small(compression=8)},
    "spec: its states are for d_model=128; the embedding table is for 64": {"spec": small(d_model=128, compression=32)},
    "layers: got [3, 4, 5]; must be the spec's GOLD layers, [4, 5]": {"spec": small(recurrent_layers=None)},
}
REFUSED_WEIGHTS: dict[str, tuple[str, torch.Tensor]] = {
    "layers[4].mix: got shape (3, 63); must be (3, 64)": ("mix", torch.ones(3, 63)),
    "layers[4].adapter_out: got shape (5, 64); must be (2, 5, 64)": ("adapter_out", torch.ones(5, 64)),
    "layers[4].norm: got torch.int32 on cpu; must be a float on cpu": ("norm", torch.ones(2, 2, 64).int()),
    "layers[4].residual_out: got torch.float32 on meta": ("residual_out", torch.ones(2, 8, 64, device="meta")),
    "shared.embedding: got shape (50,); must be [vocabulary, d_model]": ("embedding", torch.ones(50)),
}


def test_refused_layouts() -> None:
    for message, wrong in REFUSED_SPECS.items():
        with pytest.raises(SpecError, match=re.escape(message)):
            small(**wrong)
    for message, wrong in REFUSED_OPTIONS.items():
        with pytest.raises(SpecError, match=re.escape(message)):
            Toy(0).layout(**wrong)
    for message, (field, weight) in REFUSED_WEIGHTS.items():
        toy = Toy(0)
        owner, key = (vars(toy), "shared") if field == "embedding" else (toy.key, 4)
        owner[key] = replace(owner[key], **{field: weight})
        with pytest.raises(SpecError, match=re.escape(message)):
            toy.layout()


def test_refused_values(backend: str) -> None:
    toy = Toy(0)
    cache = cache_of(toy, backend)
    (seq := cache.alloc.sequence()).extend(2)
    batch, c, ids = cache.alloc.batch([seq]), torch.ones(2, 4, dtype=F64), torch.tensor([1, 2])
    cache.write(4, batch, c, ids)
    for message, layer, *values in (
        ("layer: got 0; must be one of .3, 4, 5.", 0, c, ids),
        ("values: got .*; must be c, .T, 4., and the token ids", 4, c + 1),
        (r"values: got .\(2, 3\) torch.float64 on cpu, \(2,\) .*; must be c, .T, 4.", 4, c[:, :3] + 1, ids + 1),
        (r"values: got .*, \(2, 1\) torch.int64 on cpu.; must be c", 4, c + 1, ids[:, None] + 1),
        ("token ids of torch.float64; must be integers", 4, c + 1, ids.double() + 1),
        ("values: got .*torch.int64 on meta.; must be tensors on cpu", 4, c + 1, ids.to("meta")),
        ("token ids from 1 to 50; the embedding table has 0 to 49", 4, c + 1, torch.tensor([1, 50])),
        ("token ids from -1 to 3", 4, c + 1, torch.tensor([3, -1])),
    ):
        with pytest.raises(SpecError, match=message):
            cache.write(layer, batch, *values)
        assert torch.equal(cache.readers(3, batch)[0].rows("c")[:, 0], c), "a refused write has written"
        assert torch.equal(cache.readers(3, batch)[0].rows("tok").flatten(), ids.int())
    with pytest.raises(SpecError, match="layer: got 1; must be one of .3, 4, 5."):
        cache.attend(torch.ones(2, 4, 16), 1, batch)
    with pytest.raises(SpecError, match="GoldFinch stores no K and V"):
        cache.layout.kernel_args(4)
