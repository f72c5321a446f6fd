"""AlignedKV: nothing is lost, what is left out is what the rules say, and what is read is what is counted."""

from __future__ import annotations

import pytest
import torch
from aligned_cases import Held, flip_unread, record, spec

from kvmem import CacheSpec, Component, Group, SpecError
from kvmem.layouts.aligned import AlignedKV, key_levels, value_levels
from kvmem.layouts.attention import attend_tile
from kvmem.layouts.planes import FORMATS, join_planes, split_planes

HALF, BRAIN = torch.float16, torch.bfloat16
every_dtype = pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
both_backends = pytest.mark.parametrize("backend", ["virtual", "paged"])


@pytest.fixture
def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(out: torch.Tensor, q: torch.Tensor, held: Held) -> torch.Tensor:
    """Of each query and head, relative to the exact result."""
    exact, _ = attend_tile(q.double(), held.k, held.v, first=0, length=len(held.k))
    return (out.double() - exact).norm(dim=-1) / exact.norm(dim=-1)


def assert_derived(held: Held, first: int, end: int) -> None:
    for found, written in zip(held.layout.derive(held.reader(), first, end), (held.k, held.v), strict=True):
        assert torch.equal(found.view(torch.int16), written[first:end].view(torch.int16))


@every_dtype
def test_every_pattern_of_bits(dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormal numbers, infinities and all NaN among them; and the bytes that they take."""
    patterns = torch.arange(1 << 16).to(torch.int16).view(dtype)
    for units in (1, 4, 512):
        rows = split_planes(patterns.view(8, units, -1))
        assert torch.equal(join_planes(rows, units, dtype).view(torch.int16).flatten(), patterns.view(torch.int16))
    assert FORMATS[dtype].exponents(torch.arange(1 << 16)).unique().tolist() == list(range(1, FORMATS[dtype].top + 1))
    held = Held(AlignedKV(spec(2, 64, dtype)))
    held.add(patterns.view(512, 2, 64), patterns.flip(0).view(512, 2, 64))
    assert_derived(held, 0, 512)
    expected = {"k": 512 * 256, "v": 512 * 256, "max_exponent": 512 // 64 * 256, "k_tail": 128 * 256}
    assert held.alloc.ledger.held == {(name, "device"): size for name, size in expected.items()}


@both_backends
@every_dtype
def test_rows_over_the_end_of_a_block(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, random: torch.Generator
) -> None:
    """Chunks and single tokens over lengths of 63, 64 and 65, a fork in the middle of a block and its own tokens, and
    draft tokens that are taken back: K and V are as written, statistics are those of the tokens that are there, at once.
    """
    seen = record(monkeypatch)
    held = Held(AlignedKV(spec(2, 32, dtype)), backend, interleave="all", page_bytes=16384)

    def grow(count: int, drafts: int = 0) -> None:
        k, v = torch.randn(2, count + drafts, 2, 32, generator=random)
        place = torch.randint(32, (2,), generator=random)
        k[0, 1, place[0]] = v[0, 0, place[1]] = -10 - 0.1 * len(held.k)  # a new maximum of negative sign
        held.add(k, v, drafts)
        length, q = len(held.k), torch.randn(1, 4, 32, generator=random)
        for first, end in ((0, length), (length // 3, length), (length // 2, length - 1), (0, length // 2)):
            assert_derived(held, first, end)
        out, _ = held.layout.attend(q, held.reader())
        assert error(out, q, held).max() < (1e-2 if dtype == HALF else 8e-2)
        for name, values in (("key", held.k), ("value", held.v)):
            exponents = torch.frexp(values.float().abs().amax(0)).exponent - 1 + FORMATS[dtype].top // 2
            assert torch.equal(seen[f"{name} exponents"], exponents.clamp(min=1))

    for count in (5, 57, *([1] * 5), 60, 1, 2, 1, 200, 1):
        grow(count)
    twin, mine = held.seq.fork(), (held.k, held.v)
    grow(70)
    held.seq, twin, (held.k, held.v), mine = twin, held.seq, mine, (held.k, held.v)
    for drafts in (1, 40, 63):
        grow(30, drafts)
        grow(3)
    held.seq, (held.k, held.v) = twin, mine
    grow(1)
    assert held.alloc.check() == []


@both_backends
def test_a_sequence_without_tokens(backend: str) -> None:
    """In an allocator that has not held any yet."""
    held = Held(AlignedKV(spec(2, 32)), backend, page_bytes=16384)
    held.add(*torch.ones(2, 0, 2, 32))
    assert_derived(held, 0, 0)
    out, lse = held.layout.attend(torch.ones(1, 4, 32), held.reader())
    assert not out.any() and (lse == -torch.inf).all()


def test_levels_by_hand() -> None:
    """Operands 3, 4, 5, 7, 8 and 9 powers of two below the first, by the size of query, channel or weight."""
    steps, ones = torch.tensor([0, 3, 4, 5, 7, 8, 9, 100]), torch.ones(8)
    by_guard = {0: [2, 2, 1, 1, 1, 0, 0, 0], 1: [2, 2, 2, 1, 1, 1, 0, 0], 5: [2, 2, 2, 2, 2, 2, 1, 0]}
    for guard, wanted in by_guard.items():
        for form in FORMATS.values():
            for q, largest in ((2.0**-steps, 20 * ones), (-ones, 200 - steps)):
                levels = key_levels(q.view(1, 1, 8), largest.int().view(1, 8), form, guard)
                assert levels.tolist() == [[max(level, form.floor) for level in wanted]]
        # An output of 2, of which half is relied on; values of up to 1; the second channel is further away.
        weights, size = 2.0 ** -steps.view(1, 1, 8), torch.tensor([[[2.0, 2.0**9]]])
        assert value_levels(weights, size, torch.tensor([[15, 16]]), FORMATS[HALF], guard).flatten().tolist() == wanted


def test_queries_of_a_group_share_the_most_precise_read(random: torch.Generator) -> None:
    q = torch.randn(2, 6, 32, generator=random) * 2.0 ** torch.randint(-9, 9, (2, 6, 32), generator=random)
    weights = 2.0 ** (torch.randint(-20, 0, (50,), generator=random) - torch.randint(3, (6, 2, 50), generator=random))
    size = 2.0 ** torch.randint(8, 11, (6, 2, 32), generator=random)
    largest, rest = torch.randint(5, 25, (2, 32), generator=random), (FORMATS[HALF], 1)
    keys, values = key_levels(q, largest, *rest), value_levels(weights, size, largest, *rest)
    assert len(keys.unique()) == len(values.unique()) == 3
    for head in range(2):
        alone, top = [(head * 3 + i, n) for i in range(3) for n in range(2)], largest[head : head + 1]
        each = [key_levels(q[n : n + 1, h : h + 1], top, *rest)[0] for h, n in alone]
        assert torch.equal(keys[head], torch.stack(each).amax(0))
        parts = [[x[h, n].view(1, 1, -1) for x in (weights, size)] for h, n in alone]
        assert torch.equal(values[:, head], torch.stack([value_levels(*p, top, *rest)[:, 0] for p in parts]).amax(0))


def measure(dtype: torch.dtype, guard: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[float, float]:
    """What share of the reads is saved, and the mean error of the heads."""
    held = Held(AlignedKV(spec(*k.shape[1:], dtype), guard=guard))
    held.add(k, v)
    out, _ = held.layout.attend(q.to(dtype), held.reader())
    saved, off = 1 - sum(held.reads().values()) / (k.numel() * 4), error(out, q.to(dtype), held).mean().item()
    print(f"{dtype}, guard {guard}: {saved:.1%} saved, error {off:.1e}")
    return saved, off


def test_the_saving_and_its_error() -> None:
    """2,048 tokens, 20 heads of independent data; statistics and estimate are counted. Four channels of 128 that are 16
    times larger save a quarter of all reads, random data do not. The data are fixed: errors of single heads lie far
    apart, so that their mean is 1.2e-3 to 1.9e-3 in 40 draws.
    """
    random, saved, errors = torch.Generator().manual_seed(0), {}, {}
    for kind in ("gaussian", "outliers", "peaky"):
        k, v = torch.randn(2, 2048, 20, 128, generator=random)
        q = torch.randn(1, 20, 128, generator=random) * (2 if kind == "peaky" else 1)
        for head in range(20 if kind != "gaussian" else 0):
            k[:, head, torch.randperm(128, generator=random)[:4]] *= 16
        for guard in range(4):
            saved[kind, guard], errors[kind, guard] = measure(HALF, guard, q, k, v)
        for guard in range(3):
            assert saved[kind, guard] >= saved[kind, guard + 1] and errors[kind, guard] >= errors[kind, guard + 1]
        if kind == "outliers":
            fewer, off = measure(BRAIN, 1, q, k, v)
            assert fewer >= 0.18 and off <= 1.5e-2
    assert all(saved[kind, 1] >= 0.25 and errors[kind, 1] <= 2e-3 for kind in ("outliers", "peaky"))
    assert saved["gaussian", 1] < 0.15
    assert 1e-3 < measure(HALF, 1, q, k * 1e-3, torch.ones_like(v))[1] < 5e-3, "low bits that are alike add up"


def test_reads_are_counted_to_the_byte(monkeypatch: pytest.MonkeyPatch, random: torch.Generator) -> None:
    """The estimate, the statistics and what is read of the incomplete block, beside the planes. A nibble plane of
    heads of 24 takes 12 bytes each, and all 32 bytes are read that one of them lies in.
    """
    held = Held(AlignedKV(spec(1, 128)))
    held.add(*torch.randn(2, 2 * 64 + 5, 1, 128, generator=random).sign())  # all of one exponent
    q = torch.zeros(1, 1, 128)
    q[0, 0, :3] = torch.tensor([2.0**-10, 2.0**-15, 2.0**-19])  # so weights are equal too
    held.layout.attend(q, held.reader())
    keys = {"k_tail": 5 * 128 * 2, "k.high": 128 * 128, "k.mid": 2 * 2 * 32, "k.low": 2 * 32}
    values = {"v.high": (133 + 5 + 32) * 128, "v.mid": 133 * 64}
    assert held.reads() == keys | values | {"max_exponent": 2 * 2 * 128}
    held.alloc.ledger.reset()
    held.layout.derive(held.reader(), 0, 133)
    rows = {"k.high": 128, "k.mid": 64, "k.low": 64, "v.high": 133, "v.mid": 66.5, "v.low": 66.5, "k_tail": 10}
    assert held.reads() == {name: rows[name] * 128 for name in rows}

    seen, held = record(monkeypatch), Held(AlignedKV(spec(8, 24)))
    held.add(*torch.randn(2, 200, 8, 24, generator=random))
    held.layout.attend(torch.randn(1, 8, 24, generator=random) * 4, held.reader())
    for level, plane in ((1, "mid"), (2, "low")):
        asked = (seen["value"] >= level).repeat_interleave(12, dim=1)
        assert held.reads()[f"v.{plane}"] == asked.view(200, 3, 32).any(-1).sum() * 32 > asked.sum()


@both_backends
@pytest.mark.parametrize("length", [128, 150])
@every_dtype
def test_the_result_depends_on_no_unread_bit(
    backend: str, dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch, random: torch.Generator
) -> None:
    seen, held = record(monkeypatch), Held(AlignedKV(spec(2, 64, dtype), guard=0), backend)
    k, v = torch.randn(2, length, 2, 64, generator=random)
    k[..., :3] *= 16
    held.add(k, v)
    q = torch.randn(1, 4, 64, generator=random).to(dtype) * 4
    before = held.layout.attend(q, held.reader())
    counted = sum(size for name, size in held.reads().items() if "." in name)
    twice = (length % 64 + 32) * 2 * (64 if dtype == HALF else 96)  # statistics of the tail, and estimate
    for _ in range(2):
        asked = flip_unread(held, seen)
        assert asked < length * 2 * 64 * 4 and counted == asked + twice
        after = held.layout.attend(q, held.reader())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert_derived(held, 0, length)  # each bit was flipped twice
    blocks, ids = held.reader().blocks("v", 0, 1)
    blocks[ids[0]] ^= 0x80  # the signs, which are read
    assert not torch.equal(held.layout.attend(q, held.reader())[0], before[0])


def test_many_queries_are_exact(random: torch.Generator) -> None:
    held = Held(AlignedKV(spec(2, 64), guard=0))
    k, v = torch.randn(2, 300, 2, 64, generator=random)
    k[..., 0] *= 16
    held.add(k, v)
    q = torch.randn(9, 4, 64, generator=random, dtype=torch.float64)
    q[:, :, 0] = 2  # or some query needs the other channels
    assert error(held.layout.attend(q, held.reader())[0], q, held).max() < 1e-12
    assert error(held.layout.attend(q[1:], held.reader())[0], q[1:], held).max() > 1e-6
    assert [part.shape for part in held.layout.attend(q[:0], held.reader())] == [(0, 4, 64), (0, 4)]


@every_dtype
def test_infinity_and_nan_are_what_they_were(dtype: torch.dtype, random: torch.Generator) -> None:
    """Infinite keys, which hide their tokens, where the query is small and where it is large; and a head whose V has
    infinities and NaN, one of them at a token of almost no weight.
    """
    held = Held(AlignedKV(spec(2, 32, dtype)))
    k, v = torch.randn(2, 130, 2, 32, generator=random)
    q = torch.randn(1, 2, 32, generator=random)
    q[0, 0, 3], k[7, 0, 3], q[0, 0, 4], k[8, 0, 4] = 1e-7, -torch.inf, 4, -torch.inf
    k[12, 1], v[12, 1, 4] = q[0, 1] * -150 / q[0, 1].square().sum(), torch.inf
    v[9, 1, 1], v[11, 1, 2], v[:2, 1, 3] = torch.nan, torch.inf, torch.tensor([torch.inf, -torch.inf])
    held.add(k, v)
    out, _ = held.layout.attend(q, held.reader())
    assert error(out, q, held)[0, 0] < (1e-2 if dtype == HALF else 8e-2)
    wanted = ["finite", "nan", "inf", "nan", "inf"] + 27 * ["finite"]
    assert [str(x) if x != x or x == torch.inf else "finite" for x in out[0, 1].tolist()] == wanted


def test_refusals(random: torch.Generator) -> None:
    """Of specs and options; and of values, which changes nothing."""
    k, v = (Component(name, width=64, dtype=HALF) for name in "kv")
    narrow, unrotated = Component("v", width=32, dtype=HALF), Component("k", width=64, dtype=HALF, rope="pre")
    groups = (Group("a", (k, v), (0,)), Group("b", (k, v), (1,)))
    for given, message in [
        (spec(2, 64, torch.float32), "dtype: got torch.float32; must be torch.float16 or torch.bfloat16"),
        (spec(2, 64, block_size=16), "block_size: got 16; must be 64"),
        (spec(2, 64, window_tokens=100), "window_tokens: got 100; .* None"),
        (spec(3, 48), "got 3 x 48 = 144; must be a multiple of 64, .* nearest is 128"),
        (spec(1, 16), "got 1 x 16 = 16; .* nearest is 64"),
        (spec(64, 3), "head_dim: got 3; must be even, .* nearest is 4"),
        (CacheSpec(groups, block_size=64), "AlignedKV takes one, of k and v"),
        (AlignedKV(spec(2, 64)).spec, "AlignedKV takes one, of k and v"),
        (CacheSpec(components=[k, narrow], num_layers=1, block_size=64), "one shape"),
        (CacheSpec(components=[unrotated, v], num_layers=1, block_size=64), "after rotation"),
    ]:
        with pytest.raises(SpecError, match=message):
            AlignedKV(given)
    with pytest.raises(SpecError, match="spec: got None; must be a CacheSpec"):
        AlignedKV(None)
    for field, value in (("guard", -1), ("guard", 1.5), ("guard", 2**31), ("impl", "c")):
        with pytest.raises(SpecError, match=f"{field}: got '?{value}"):
            AlignedKV(spec(2, 64), **{field: value})
    held = Held(AlignedKV(spec(1, 64), impl="triton"))
    held.add(*torch.ones(2, 64, 1, 64))
    with pytest.raises(SpecError, match='impl="triton": the (cache is on cpu|package triton)'):
        held.layout.attend(torch.ones(1, 1, 64), held.reader())
    held.layout.attend(torch.ones(1, 1, 64).double(), held.reader())  # float64 is computed in torch
    held, good = Held(AlignedKV(spec(2, 64))), torch.randn(70, 2, 64, generator=random)
    held.add(good, -good)
    held.seq.extend(70)
    for given, message in (
        ((good.view(70, 4, 32), good), "values: got .*70, 4, 32.* must be k and v, floats of shape .70, 2, 64"),
        ((good, good[1:]), "values: got .*, torch.float32 .69, 2"),
        ((good, good.int()), "values: got .*, torch.int32"),
        ((good,), "values: got torch.float32 .70, 2, 64.; must be k and v"),
    ):
        with pytest.raises(SpecError, match=message):
            held.cache.write(0, held.alloc.batch([held.seq]), *given)
    assert_derived(held, 0, 70)
