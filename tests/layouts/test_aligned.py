"""AlignedKV: nothing is lost, what is left out is what the rules say, and what is read is what is counted."""

from __future__ import annotations

import pytest
import torch
from aligned_cases import Held, flip_unread, record, spec

from kvmem import CacheSpec, Component, Group, SpecError
from kvmem.layouts.aligned import FORMATS, AlignedKV, join_planes, key_levels, split_planes, value_levels
from kvmem.layouts.attention import attend_tile

DTYPES = [torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_backends = pytest.mark.parametrize("backend", ["virtual", "paged"])


@pytest.fixture
def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(out: torch.Tensor, q: torch.Tensor, held: Held, dim: int = -1) -> torch.Tensor:
    """Of each query head, relative to the exact result."""
    exact, _ = attend_tile(q.double(), held.k, held.v, first=0, length=len(held.k))
    return (out.double() - exact).norm(dim=dim) / exact.norm(dim=dim)


# --- what is stored ---


@every_dtype
def test_every_pattern_of_bits(dtype: torch.dtype) -> None:
    """Zeros of both signs, subnormal numbers, infinities and all NaN among them, through the cache."""
    patterns = torch.arange(1 << 16).to(torch.int16).view(dtype)
    for units in (1, 4, 512):
        rows = split_planes(patterns.view(8, units, -1))
        assert torch.equal(join_planes(rows, units).flatten(), torch.arange(1 << 16))
    layout = AlignedKV(spec(2, 64, dtype))
    held = Held(layout, prefix_cache=False)
    k, v = patterns.view(512, 2, 64), patterns.flip(0).view(512, 2, 64)
    held.add(k[:500], v[:500])
    held.add(k[500:], v[500:])
    for written, found in zip((k, v), layout.derive(held.reader(), 0, 512), strict=True):
        assert torch.equal(found.view(torch.int16), written.contiguous().view(torch.int16))
    planes = 512 * 2 * 64 * 2
    tail = (512 - held.alloc.core.first_token(held.seq.id, 2)) * 2 * 64 * 2
    assert 128 * 2 * 64 * 2 <= tail <= 192 * 2 * 64 * 2
    expected = {"k": planes, "v": planes, "max_exponent": 512 // 64 * 2 * 2 * 64, "k_tail": tail}
    assert held.alloc.ledger.held == {(name, "device"): size for name, size in expected.items()}


@both_backends
@every_dtype
def test_rows_over_the_end_of_a_block(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, random: torch.Generator
) -> None:
    """Chunks and single tokens over lengths of 63, 64 and 65, a fork in the middle of a block and its own tokens, and
    cuts of less than a block: K and V are as written, statistics are those of the tokens that are there, at once.
    """
    seen = record(monkeypatch)
    held = Held(AlignedKV(spec(2, 32, dtype)), backend, interleave="all")

    def grow(count: int) -> None:
        k, v = torch.randn(2, count, 2, 32, generator=random)
        k[0, 1, int(torch.randint(32, (), generator=random))] = -10 - 0.1 * len(held.k)  # of negative sign, and rising
        v[0, 0, int(torch.randint(32, (), generator=random))] = -10 - 0.1 * len(held.k)
        held.add(k, v)
        check()

    def check() -> None:
        length, reader = len(held.k), held.reader()
        for first, end in ((0, length), (length // 3, length), (length // 2, length - 1), (0, length // 2)):
            k, v = held.layout.derive(reader, first, end)
            assert torch.equal(k, held.k[first:end]) and torch.equal(v, held.v[first:end])
        q = torch.randn(1, 4, 32, generator=random)
        out, _ = held.layout.attend(q, reader)
        assert error(out, q, held).max() < (5e-3 if dtype == torch.float16 else 4e-2)
        for name, values in (("key", held.k), ("value", held.v)):
            exponents = torch.frexp(values.float().abs().amax(0)).exponent - 1 + FORMATS[dtype].top // 2
            assert torch.equal(seen[f"{name} exponents"], exponents.clamp(min=1))

    for count in (5, 57, *([1] * 5), 60, 1, 2, 1, 200, 1):
        grow(count)
    held.commit()
    twin, mine = held.seq.fork(), (held.k, held.v)
    grow(70)
    ours, held.seq, (held.k, held.v) = held.seq, twin, mine
    for cut in (1, 40, 63):
        grow(30)
        held.seq.truncate(len(held.k) - cut)
        held.k, held.v = held.k[:-cut], held.v[:-cut]
        grow(3)
    assert ours.num_tokens == len(mine[0]) + 70 and held.alloc.check() == []


# --- the rules ---


def test_levels_by_hand() -> None:
    """Channels 3, 4, 5, 7, 8 and 9 powers of two below the first, by the size of the query or of the channel."""
    steps = torch.tensor([0, 3, 4, 5, 7, 8, 9, 100])
    by_guard = {0: [2, 2, 1, 1, 1, 0, 0, 0], 1: [2, 2, 2, 1, 1, 1, 0, 0], 5: [2, 2, 2, 2, 2, 2, 1, 0]}
    for guard, wanted in by_guard.items():
        for q, largest in ((2.0**-steps, 20 + 0 * steps), (-(2.0 ** (0.0 * steps)), 200 - steps)):
            for dtype in DTYPES:
                fp16, levels = FORMATS[dtype], key_levels(q.view(1, 1, 8), largest.view(1, 8), FORMATS[dtype], guard)
                assert levels.tolist() == [[max(level, fp16.floor) for level in wanted]]
        # An output of 2 ** 1, of which half is relied on; values of up to 2 ** 0; the second channel is further away.
        weights, size = 2.0 ** -steps.view(1, 1, 8), torch.tensor([[[2.0, 2.0**9]]])
        levels = value_levels(weights, size, torch.tensor([[15, 16]]), FORMATS[torch.float16], guard)
        assert levels.flatten().tolist() == wanted


def test_queries_of_a_group_share_the_most_precise_read(random: torch.Generator) -> None:
    q = torch.randn(2, 6, 32, generator=random) * 2.0 ** torch.randint(-9, 9, (2, 6, 32), generator=random)
    weights = 2.0 ** (torch.randint(-20, 0, (50,), generator=random) - torch.randint(3, (6, 2, 50), generator=random))
    size = 2.0 ** torch.randint(8, 11, (6, 2, 32), generator=random)
    largest = torch.randint(5, 25, (2, 32), generator=random)
    form = FORMATS[torch.float16]
    keys, values = key_levels(q, largest, form, 1), value_levels(weights, size, largest, form, 1)
    assert len(keys.unique()) == len(values.unique()) == 3
    for head in range(2):
        alone, top = [(head * 3 + i, n) for i in range(3) for n in range(2)], largest[head : head + 1]
        each = [key_levels(q[n : n + 1, h : h + 1], top, form, 1)[0] for h, n in alone]
        assert torch.equal(keys[head], torch.stack(each).amax(0))
        each = [value_levels(weights[h, n][None, None], size[h, n][None, None], top, form, 1)[:, 0] for h, n in alone]
        assert torch.equal(values[:, head], torch.stack(each).amax(0))


# --- what is read, and what it costs ---


def outliers(random: torch.Generator, heads: int, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, 2048, heads, 128, generator=random)
    q = torch.randn(1, heads, 128, generator=random)
    for head in range(heads if kind != "gaussian" else 0):
        k[:, head, torch.randperm(128, generator=random)[:4]] *= 16
    return q * (2 if kind == "peaky" else 1), k, v


def test_the_saving_and_its_error() -> None:
    """2,048 tokens, 20 heads of independent data; statistics and estimate are counted. Four channels of 128 that are 16
    times larger save a quarter of all reads, random data do not. The data are fixed: errors of single heads lie far
    apart, so that their mean is 1.2e-3 to 1.9e-3 in 40 draws.
    """
    random = torch.Generator().manual_seed(0)
    saved, errors = {}, {}
    for kind in ("gaussian", "outliers", "peaky"):
        q, k, v = outliers(random, 20, kind)
        for guard in range(4):
            held = Held(AlignedKV(spec(20, 128), guard=guard))
            held.add(k, v)
            out, _ = held.layout.attend(q.half(), held.reader())
            saved[kind, guard] = 1 - sum(held.reads().values()) / (2048 * 20 * 128 * 4)
            errors[kind, guard] = error(out, q.half(), held).mean().item()
            print(f"{kind}, guard {guard}: {saved[kind, guard]:.1%} saved, error {errors[kind, guard]:.1e}")
        for guard in range(3):
            assert saved[kind, guard] >= saved[kind, guard + 1] and errors[kind, guard] >= errors[kind, guard + 1]
    for kind in ("outliers", "peaky"):
        assert saved[kind, 1] >= 0.25 and errors[kind, 1] <= 2e-3
    assert saved["gaussian", 1] < 0.15


def test_reads_are_counted_to_the_byte(random: torch.Generator) -> None:
    """The estimate, the statistics and what is read of the incomplete block, beside the planes."""
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


def test_narrow_heads_are_counted_in_whole_sectors(monkeypatch: pytest.MonkeyPatch, random: torch.Generator) -> None:
    """Heads of 16: a nibble plane holds four of them in 32 bytes, which are read if one of them is."""
    seen = record(monkeypatch)
    held = Held(AlignedKV(spec(8, 16)))
    held.add(*torch.randn(2, 200, 8, 16, generator=random))
    held.layout.attend(torch.randn(1, 8, 16, generator=random) * 4, held.reader())
    for level, plane in ((1, "mid"), (2, "low")):
        asked = seen["value"] >= level
        sectors = asked.view(200, 2, 4).any(-1).sum()
        assert held.reads()[f"v.{plane}"] == sectors * 32 > asked.sum() * 8


@both_backends
@pytest.mark.parametrize("length", [128, 150])
@every_dtype
def test_the_result_depends_on_no_unread_bit(
    backend: str, dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch, random: torch.Generator
) -> None:
    seen = record(monkeypatch)
    held = Held(AlignedKV(spec(2, 64, dtype), guard=0), backend)
    k, v = torch.randn(2, length, 2, 64, generator=random)
    k[..., :3] *= 16
    held.add(k, v)
    q = torch.randn(1, 4, 64, generator=random).to(dtype) * 4
    before = held.layout.attend(q, held.reader())
    reads = held.reads()
    twice = (length % 64 + 32) * 2 * (64 if dtype == torch.float16 else 96)  # statistics of the tail, and estimate
    for _ in range(2):
        asked = flip_unread(held, seen)
        counted = sum(bytes for name, bytes in reads.items() if "." in name)
        assert asked < length * 2 * 64 * 4 and counted == asked + twice
        after = held.layout.attend(q, held.reader())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    k, v = held.layout.derive(held.reader(), 0, length)
    assert torch.equal(k, held.k) and torch.equal(v, held.v), "each bit was flipped twice"
    blocks, ids = held.reader().blocks("v", 0, 1)
    blocks[ids[0], int(seen["value"][:64].amax(1).argmax())] ^= 0x80  # a bit that is read
    assert not torch.equal(held.layout.attend(q, held.reader())[0], before[0])


def test_many_queries_are_exact(random: torch.Generator) -> None:
    held = Held(AlignedKV(spec(2, 64), guard=0))
    k, v = torch.randn(2, 300, 2, 64, generator=random)
    k[..., 0] *= 16
    held.add(k, v)
    q = torch.randn(9, 4, 64, generator=random, dtype=torch.float64)
    out, _ = held.layout.attend(q, held.reader())
    assert error(out, q, held).max() < 1e-12
    q[:, :, 0] = 2  # or some query needs the other channels
    out, _ = held.layout.attend(q[1:], held.reader())
    assert 1e-6 < error(out, q[1:], held).max() < 2e-2


@every_dtype
def test_infinity_and_nan_are_what_they_were(dtype: torch.dtype, random: torch.Generator) -> None:
    """An infinite key of a token that this hides, and a head whose V has infinities and NaN."""
    held = Held(AlignedKV(spec(2, 32, dtype)))
    k, v = torch.randn(2, 130, 2, 32, generator=random)
    q = torch.randn(1, 2, 32, generator=random)
    k[7, 0, 3] = -torch.inf * q[0, 0, 3].sign()
    v[9, 1, 1], v[11, 1, 2], v[:2, 1, 3] = torch.nan, torch.inf, torch.tensor([torch.inf, -torch.inf])
    held.add(k, v)
    out, _ = held.layout.attend(q, held.reader())
    assert error(out, q, held)[0, 0] < (5e-3 if dtype == torch.float16 else 5e-2)
    wrong = out[0, 1, :4]
    assert wrong[1].isnan() and wrong[2] == torch.inf and wrong[3].isnan() and out[0, 1, 4:].isfinite().all()


# --- refusals ---


def test_what_cannot_be_cut_is_refused() -> None:
    half = {"width": 64, "dtype": torch.float16}
    k, v = Component("k", **half), Component("v", **half)
    two = CacheSpec((Group("a", (k, v), (0,)), Group("b", (k, v), (1,))), block_size=64)
    for given, message in [
        (spec(2, 64, torch.float32), r"dtype: got torch.float32; must be torch.float16 or torch.bfloat16"),
        (spec(2, 64, block_size=16), r"block_size: got 16; must be 64"),
        (spec(2, 64, window_tokens=100), r"window_tokens: got 100; .* None"),
        (spec(3, 48), r"got 3 x 48 = 144; must be a multiple of 64, .* nearest is 128"),
        (spec(1, 16), r"got 1 x 16 = 16; .* nearest is 64"),
        (spec(64, 3), r"head_dim: got 3; must be even, .* nearest is 4"),
        (CacheSpec(components=[k], num_layers=1, block_size=64), r"AlignedKV takes one, of k and v"),
        (two, r"AlignedKV takes one, of k and v"),
        (
            CacheSpec(components=[k, Component("v", width=32, dtype=torch.float16)], num_layers=1, block_size=64),
            r"one shape",
        ),
        (CacheSpec(components=[Component("k", **half, rope="pre"), v], num_layers=1, block_size=64), r"after rotation"),
        (AlignedKV(spec(2, 64)).spec, r"AlignedKV takes one, of k and v"),
    ]:
        with pytest.raises(SpecError, match=message):
            AlignedKV(given)
    for options, message in [
        ({"guard": -1}, "guard: got -1"),
        ({"guard": 1.5}, "guard: got 1.5"),
        ({"impl": "c"}, "impl: got 'c'"),
    ]:
        with pytest.raises(SpecError, match=message):
            AlignedKV(spec(2, 64), **options)


def test_values_that_do_not_fit_change_nothing(random: torch.Generator) -> None:
    held = Held(AlignedKV(spec(2, 64)))
    held.add(*torch.randn(2, 70, 2, 64, generator=random))
    good = torch.randn(70, 2, 64, generator=random)
    for k, v, message in [
        (good.view(70, 4, 32), good, r"k: got \(70, 4, 32\); must be \(70, 2, 64\)"),
        (good, good[1:], r"v: got \(69, 2, 64\)"),
    ]:
        with pytest.raises(SpecError, match=message):
            held.cache.write(0, held.batch, k, v)
    k, v = held.layout.derive(held.reader(), 0, 70)
    assert torch.equal(k, held.k) and torch.equal(v, held.v)
