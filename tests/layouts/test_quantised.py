"""Quantised K and V: rounding, blocks that are encoded whole, exact bytes, and every refusal."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_oracle import attend
from layout_case import Case
from quantised_cases import BLOCK, HEADS, LAYERS, WIDTH, cases, plain_spec
from support import Steps

import kvmem
from kvmem.kernels import reference
from kvmem.kernels.base import Step
from kvmem.kernels.registry import find
from kvmem.layouts import LayoutCache, quantised
from kvmem.layouts.bits import BITS, hadamard, pack, quantise, unpack
from kvmem.layouts.quantised import QuantisedKV

every_backend = pytest.mark.parametrize("backend", ["virtual", "paged"])
every_case = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
SIZES: dict[str, Any] = {"device": "cpu", "memory": "4MiB", "max_sequences": 8, "max_tokens": 512, "page_bytes": 4096}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class World:
    """An allocator, and the token ids of its sequences; what a sequence has cut off may follow them."""

    def __init__(self, case: Case, backend: str, **sizes: Any) -> None:
        self.case = case
        self.alloc = kvmem.Allocator(
            case.layout.spec, backend=backend, **SIZES | {"debug": True} | case.extra.get("sizes", {}) | sizes
        )
        self.cache = LayoutCache(case.layout, self.alloc)
        self.ids: dict[kvmem.Sequence, list[int]] = {}
        self._known: dict[tuple[int, tuple[int, ...]], tuple[torch.Tensor, torch.Tensor]] = {}

    def open(self, prompt: list[int] = []) -> kvmem.Sequence:  # noqa: B006
        seq = self.alloc.sequence(prompt)
        self.ids[seq] = prompt
        return seq

    def write(self, seq: kvmem.Sequence, new: list[int], *, commit: bool = True) -> None:
        self.ids[seq] = self.ids[seq][: seq.num_tokens] + new
        seq.extend(len(new))
        batch = self.alloc.batch([seq])
        for layer in range(LAYERS):
            self.cache.write(layer, batch, *self.case.values(layer, torch.tensor(new), batch.positions.long()))
        if commit:
            seq.commit(new)

    def free(self, seq: kvmem.Sequence) -> None:
        del self.ids[seq]
        seq.free()

    def meant(self, layer: int, seq: kvmem.Sequence) -> tuple[torch.Tensor, torch.Tensor]:
        count = seq.num_tokens
        key = layer, tuple(self.ids[seq][:count])
        if key not in self._known:
            self._known[key] = self.case.plain(layer, torch.tensor(key[1]).long(), torch.arange(count))
        return self._known[key]

    def check(self) -> None:
        """All tokens of all sequences."""
        live = list(self.ids) or [self.open()]
        batch = self.alloc.batch(live, new_tokens=[0] * len(live))
        for layer in range(LAYERS):
            found = self.cache.derive(layer, batch)
            k, v = (torch.cat(parts) for parts in zip(*(self.meant(layer, seq) for seq in live), strict=True))
            torch.testing.assert_close((found.k.double(), found.v.double()), (k, v), rtol=1e-6, atol=1e-6)


def stored(
    spec: kvmem.CacheSpec, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """K and V ``[tokens, heads, width]`` of layer 0 after they were stored."""
    layout = QuantisedKV(spec, **options)
    alloc = kvmem.Allocator(layout.spec, backend="paged", **SIZES)
    cache, seq = LayoutCache(layout, alloc), alloc.sequence()
    seq.extend(len(k))
    cache.write(0, batch := alloc.batch([seq]), k, v)
    found = cache.derive(0, batch)
    return found.k, found.v


@every_backend
@every_case
@pytest.mark.parametrize(("interleave", "tile"), [("all", 256), ("none", 5)])
def test_every_length_around_a_block(
    case: Case, backend: str, interleave: str, tile: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Attention is that over what the bytes mean, and off from plain attention by no more than rounding explains."""
    monkeypatch.setattr(case.layout, "tile_tokens", tile)
    for chunks in ([BLOCK - 1, 1, 1], [BLOCK + 1], [BLOCK], [1] * 2 * BLOCK, [3, 3 * BLOCK, BLOCK - 3, 270, 2]):
        world = World(case, backend, interleave=interleave)
        seq = world.open()
        for number, count in enumerate(chunks):
            new = [(7 * seq.num_tokens + i) % 50 for i in range(count)]
            world.write(seq, new, commit=False)
            q = drawn(seed + number, count, 2 * HEADS, WIDTH).double()
            for layer in range(LAYERS):
                out, lse = world.cache.attend(q, layer, world.alloc.batch([seq]))
                k, v = world.meant(layer, seq)
                torch.testing.assert_close((out, lse), attend(q, k, v), rtol=1e-5, atol=1e-5)
                tokens = torch.tensor(world.ids[seq]), torch.arange(seq.num_tokens)
                raw_k, raw_v = (x.double() for x in case.values(layer, *tokens))
                # A score is off by no more than e, so weights change by factors of exp(2 e) at most.
                e = q.abs().sum(-1).max() * (k - raw_k).abs().max() * WIDTH**-0.5
                bound = (2 * e).expm1() * raw_v.abs().max() + (v - raw_v).abs().max()
                assert (out - attend(q, raw_k, raw_v)[0]).abs().max() <= bound + 1e-5
            seq.commit(new)
            world.check()


@every_backend
@every_case
def test_random_calls(case: Case, backend: str, seed: int) -> None:
    """Prefix hits, forks and truncation within blocks, rejected drafts, eviction."""
    rng = random.Random(f"{seed} {case.name}")
    world = World(case, backend, memory="64KiB", max_tokens=128)
    stories = [[i + 3 * rng.randrange(20) for _ in range(120)] for i in range(3)]
    seen = dict.fromkeys(("hit", "fork", "truncated", "evicted"), 0)  # the first three: within a block
    steps = Steps(100)
    while steps.next(all(seen.values())):
        try:
            if len(world.ids) < 3:
                prompt = stories[rng.randrange(3)][: rng.randrange(2, 100)]
                seq = world.open([*prompt, 99])
                seen["hit"] += seq.num_tokens % BLOCK > 0
                world.write(seq, prompt[seq.num_tokens :])
            seq = rng.choice(list(world.ids))
            done = seq.num_tokens
            story = stories[world.ids[seq][0] % 3 if done else rng.randrange(3)]
            match rng.randrange(6):
                case 0 | 1 if done < 100:
                    world.write(seq, story[done : done + rng.choice([1, 2, 5, 20])])
                case 2 if done < 100:
                    world.write(seq, [70 + rng.randrange(9) for _ in range(rng.randrange(1, 12))], commit=False)
                    seq.truncate(rng.randrange(done, seq.num_tokens))
                    seq.commit(world.ids[seq][done : seq.num_tokens])
                case 3:
                    world.ids[seq.fork()] = world.ids[seq]
                    seen["fork"] += done % BLOCK > 0
                case 4 if done:
                    least = done // BLOCK * BLOCK if case.blockwise else max(0, done - 12)
                    seq.truncate(rng.randrange(least, done + 1))
                    seen["truncated"] += seq.num_tokens % BLOCK > 0
                case 5:
                    world.free(seq)
        except kvmem.OutOfMemory:
            world.free(rng.choice(list(world.ids)))
        seen["evicted"] = world.alloc.stats().evicted_blocks
        world.check()


@every_backend
def test_the_tail_holds_the_incomplete_block_alone(backend: str) -> None:
    """So committed tokens can be cut to its start, and no further; drafts anywhere."""
    world = World(cases()[0], backend)
    seq, start = world.open(), 2 * BLOCK
    for length in range(1, 3 * BLOCK):
        world.write(seq, [length])
        assert world.alloc.ledger.held.get(("k_tail", "device"), 0) == LAYERS * HEADS * WIDTH * 4 * (length % BLOCK)
    other = seq.fork()
    world.ids[other] = world.ids[seq]
    with pytest.raises(kvmem.SpecError, match=f"the least that would do is {start}"):
        seq.truncate(start - 1)
    seq.truncate(start)
    world.write(other, [7] * 2 * BLOCK, commit=False)
    other.truncate(3 * BLOCK - 1)
    world.check()


@pytest.mark.parametrize(("interleave", "fits"), [("all", 9 * 4096), ("none", 3 * 4096)])
def test_virtual_pages_hold_whole_blocks(interleave: str, fits: int) -> None:
    """A fork shares whole pages, and what encodes a block anew must not write into one."""
    spec = plain_spec(head_dim=24, block_size=12)  # 192 bytes a token of both layers; of each component 32 or 16
    layout = QuantisedKV(spec)
    how: dict[str, Any] = SIZES | {"backend": "virtual", "interleave": interleave}
    with pytest.raises(kvmem.SpecError, match=f'page_bytes: got 4096; .* use page_bytes={fits} .*backend="paged"'):
        LayoutCache(layout, kvmem.Allocator(layout.spec, **how))
    LayoutCache(layout, kvmem.Allocator(layout.spec, **how | {"page_bytes": fits}))
    LayoutCache(layout, kvmem.Allocator(layout.spec, **how | {"backend": "paged"}))
    by_token = QuantisedKV(spec, k_scales="token")
    LayoutCache(by_token, kvmem.Allocator(by_token.spec, **how))


@every_backend
@every_case
def test_bytes_are_those_of_the_spec_and_are_read_once(case: Case, backend: str) -> None:
    world = World(case, backend)
    seq, tokens = world.open(), 5 * BLOCK
    world.write(seq, list(range(tokens)))
    group = case.layout.spec.groups[0]
    held = sum(world.alloc.ledger.held.values())
    assert held * case.ratio == tokens * case.plain_bytes and held == tokens * group.bytes_per_token
    world.write(seq, [1], commit=False)
    world.alloc.ledger.reset()
    world.cache.attend(torch.ones(1, 2 * HEADS, WIDTH), 1, world.alloc.batch([seq]))
    tails = dict.fromkeys(case.layout.tail(1), HEADS * WIDTH * 4)  # of the new token, which completes no block
    rows = {c.name: group.row_bytes(c.name, 1) for c in group.components}
    expected = {name: n * (tokens if f"{name[0]}_tail" in tails else tokens + 1) for name, n in rows.items()} | tails
    assert {name: n for (name, _), n in world.alloc.ledger.read.items()} == expected


@every_backend
def test_int4_gives_memory_back(backend: str) -> None:
    """With 32 elements to a scale and a zero point, int4 takes 5 bits an element: 5/16 of float16."""
    used, mapped = [], []
    spec = kvmem.CacheSpec.kv(num_layers=4, num_kv_heads=2, head_dim=128, dtype="float16", block_size=32)
    for made in (spec, QuantisedKV(spec, group_size=32).spec):
        sizes = SIZES | {"memory": "32MiB", "max_tokens": 4096, "interleave": "none"}
        alloc = kvmem.Allocator(made, backend=backend, **sizes)
        seq = alloc.sequence()
        for _ in range(4096 // 256):
            seq.extend(256)
            seq.commit(count=256)
        used.append(alloc.stats().used_bytes)
        mapped.append(alloc.stats().mapped_bytes - alloc.stats().parked_bytes)
    assert used == [4096 * 4096, 4096 * 4096 * 5 // 16]
    assert mapped[0] == used[0] and mapped[1] <= used[1] + 256 * 2048  # at most the tail of the last step


@pytest.mark.parametrize("bits", BITS)
def test_channels_that_are_large_in_all_tokens(bits: int, seed: int) -> None:
    """Keys have some. By channel (KIVI), they alone lose precision; by token, a rotation helps, from 3 bits on."""
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=2, head_dim=96, dtype="float32", block_size=32)
    flat = drawn(seed, 128, 2, 96)
    k = flat.clone()
    k[..., [3, 40]] += 50

    def error(x: torch.Tensor, **options: Any) -> float:
        return float((stored(spec, x, x, {"k": f"int{bits}", **options})[0] - x).square().mean())

    by_channel, by_token = error(k), error(k, k_scales="token")
    assert by_channel < by_token / 20  # ranges of 54 and 4, and errors are as their squares
    assert bits == 2 or error(k, k_scales="token", rotate=True) < by_token / 2
    assert error(flat, rotate=True) < 1.5 * error(flat)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_kernels_read_eight_bits(backend: str, dtype: torch.dtype, seed: int) -> None:
    layout = QuantisedKV(plain_spec(), k=dtype, v=dtype, k_scales=0.5, v_scales=[0.25, 3.0])
    alloc = kvmem.Allocator(layout.spec, backend=backend, **SIZES)
    cache, seqs = LayoutCache(layout, alloc), [alloc.sequence() for _ in range(3)]
    for seq, count in zip(seqs, (5, 40, 17), strict=True):
        seq.extend(count)
    batch = alloc.batch(seqs)
    q, k, v = (drawn(seed + i, 62, heads, WIDTH) for i, heads in enumerate((4, 2, 2)))
    for layer, v_scale in enumerate((0.25, 3.0)):
        cache.write(layer, batch, k, v)
        args = layout.kernel_args(layer)
        assert args == {"k_scale": 0.5, "v_scale": v_scale}
        step = Step(batch, 4, 2, WIDTH, torch.float32, dtype, scales=args)
        out, _ = find("kvmem sdpa").prepare(reference, step)(q, alloc.kv(layer))
        torch.testing.assert_close(out, cache.attend(q, layer, batch)[0], rtol=1e-5, atol=1e-5)
    assert QuantisedKV(plain_spec(), k="float16", v="float16").kernel_args(1) == {}
    for case in cases():
        if case.name != "fp8":
            with pytest.raises(kvmem.SpecError, match="kernels read K and V of one floating-point dtype; .* stores k"):
                case.layout.kernel_args(0)


@pytest.mark.parametrize(
    ("options", "largest", "shared"),
    [
        ({"k": "fp8_e4m3", "k_scales": 2.0}, 2 * 448.0, (2, 1, 3)),
        ({"k": "fp8_e5m2"}, 57344.0, (2, 1, 3)),
        ({"k": "int8", "k_scales": "token"}, 65504.0, (2, 1)),
        ({"k": "int8"}, 65504.0, (slice(None), 1, 3)),
    ],
)
def test_large_and_nan_values(options: dict[str, Any], largest: float, shared: tuple[Any, ...]) -> None:
    """Saturated at the format's end; a NaN stays, with those that share its scale, and in no other token or head."""
    k, v = torch.ones(2, BLOCK, HEADS, WIDTH)
    k[0, 0, 1], k[1, 0, 1], k[2, 1, 3] = torch.inf, -1e9, torch.nan
    found, other = stored(plain_spec(), k, v, options)
    torch.testing.assert_close(found[:2, 0, 1], torch.tensor([largest, -largest]), rtol=1 / 255, atol=0)
    nans = torch.zeros_like(k, dtype=torch.bool)
    nans[shared] = True
    assert torch.equal(found.isnan(), nans) and torch.equal(other, v)


K3, V3 = (kvmem.Component(name, heads=2, width=16, dtype="float16") for name in "kv")
WIDE = kvmem.Component("v", heads=2, width=(8, 16), dtype="float16")
TWO = kvmem.CacheSpec((kvmem.Group("a", (K3, V3), (0,)), kvmem.Group("b", (K3, V3), (1,))))


def over(spec: kvmem.CacheSpec | None = None, **options: Any) -> Callable[[], object]:
    return lambda: QuantisedKV(spec or plain_spec(), **options)


REFUSED: list[tuple[Callable[[], object], str]] = [
    (over(k="fp8_e4m3", k_scales=0.0), "k_scales: got 0.0; .* an int or float above 0"),
    (over(v="fp8_e5m2", v_scales=[1.0, -2.0]), "v_scales: got -2.0"),
    (over(k="fp8_e4m3", k_scales=float("nan")), "k_scales: got nan"),
    (over(k="fp8_e4m3", k_scales=float("inf")), "k_scales: got inf"),
    (over(k="fp8_e4m3", k_scales=1e-40), "k_scales: got 1e-40; .* an int or float above 0"),
    (over(k="fp8_e4m3", k_scales=10**400), "k_scales: got "),
    (over(k="fp8_e4m3", k_scales=True), "k_scales: got True"),
    (over(k="fp8_e4m3", k_scales="row"), "k_scales: got 'row'; must be one of token, channel"),
    (
        over(plain_spec(block_size=32), k="fp8_e4m3", k_scales="channel"),
        "block_size: got 32; .*the 16 scales.*: use 16",
    ),
    (over(k="fp8_e4m3", k_scales=[1.0] * 3), "k_scales: got 3 numbers; must be one, or 2"),
    (over(k="bf16", k_scales=1.0), "k_scales: got 1.0; k is stored as torch.bfloat16, which is not scaled"),
    (over(k="int4", k_scales=0.5), "k_scales: got 0.5; must be one of token, channel"),
    (over(k="int5"), "k: got 'int5'; must be one of int2, int3, int4, int8, or a floating-point"),
    (over(v=torch.uint8), "v: got torch.uint8"),
    (over(v=None), "v: got None"),
    (over(group_size=6), "group_size: got 6, which does not divide the width 16: use 4"),
    (over(group_size=0), "group_size: got 0"),
    (over(v="float16", group_size=8), "group_size: got 8, but neither"),
    (over(scale_dtype="float8_e4m3fn"), "scale_dtype: got 'float8_e4m3fn'; must be one of"),
    (over(rotate=1), "rotate: got 1; must be True or False"),
    (over(plain_spec(head_dim=36), rotate=True, k_scales="token"), "head_dim: got 36; .* use 32"),
    (over(plain_spec(head_dim=20), k="int3"), "k: got int3 for a width of 20.* multiple of 8"),
    (over(plain_spec(block_size=12)), "block_size: got 12; by channel, the 32 .*: use 8"),
    (over(plain_spec(window_tokens=64)), "spec: got 1 groups with k, v, the first with window_tokens=64"),
    (over(plain_spec(dtype="int8")), "spec: k has .*torch.int8; .* the model's dtype"),
    (over(kvmem.CacheSpec(components=[K3], num_layers=1)), "spec: got 1 groups with k, "),
    (over(kvmem.CacheSpec(components=[K3, WIDE], num_layers=2)), "spec: v has width"),
    (over(TWO), "spec: got 2 groups"),
    (lambda: QuantisedKV({"num_layers": 1}), "spec: got {'num_layers': 1}; must be a CacheSpec"),  # type: ignore[arg-type]
    (lambda: hadamard(30), "size: got 30; .* use 32"),
    (lambda: hadamard(100), "size: got 100; .* use 96"),
    (lambda: hadamard("64"), "size: got '64'"),  # type: ignore[arg-type]
    (lambda: hadamard(1 << 40), "size: got 1099511627776; the largest that works is 8192"),
    (lambda: quantise(torch.ones(4), 5), "bits: got 5; must be one of 2, 3, 4, 8"),
    (
        lambda: quantise(torch.ones(4), 4, scale_dtype=torch.float64),
        "scale_dtype: got 'float64'; must be one of float16",
    ),
    (lambda: pack(torch.zeros(3, 12, dtype=torch.uint8), 3), "codes: got 12 .* multiple of 8: 16"),
    (lambda: pack(torch.zeros(8), 4), "codes: got 8 of torch.float32; must be uint8"),
    (lambda: unpack(torch.zeros(4, dtype=torch.uint8), 3), "packed: got 4 .* multiple of 3: 3"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(kvmem.SpecError, match=message):
        call()


def test_refused_values_change_nothing() -> None:
    world = World(cases()[0], "virtual")
    seq = world.open()
    world.write(seq, [1, 2, 3])
    seq.extend(2)
    batch, k = world.alloc.batch([seq]), torch.ones(2, HEADS, WIDTH)
    for given, message in [
        ((k,), "values: got 1 tensors; must be k and v"),
        ((k, k[:1]), r"v: got torch.float32 \(1, 2, 16\); must be floats of shape \(2, 2, 16\)"),
        ((k.int(), k), "k: got torch.int32"),
        ((k, k[..., :8]), "v: got torch.float32"),
    ]:
        with pytest.raises(kvmem.SpecError, match=message):
            world.cache.write(0, batch, *given)
    seq.truncate(3)
    world.check()


def test_a_rotation_first_used_in_inference_serves_gradients_too() -> None:
    quantised._rotation.cache_clear()
    layout, k = QuantisedKV(plain_spec(), k_scales="token", rotate=True), torch.ones(1, HEADS, WIDTH)
    with torch.inference_mode():
        wanted = layout.encode(0, k, k, positions=torch.zeros(1))
    found = layout.encode(0, k.clone().requires_grad_(), k, positions=torch.zeros(1))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
