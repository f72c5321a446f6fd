"""Palu (arXiv:2407.21118): latents give what the truncated model gives, at the bytes of their ranks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from palu_cases import GROUP, HEAD_DIM, HIDDEN, KV_HEADS, QUERY_HEADS, ROPE, make_weights, truncated

import kvmem
from kvmem import SpecError
from kvmem.kernels.write import write_component
from kvmem.layouts import LayoutCache, palu
from kvmem.layouts.bits import hadamard
from kvmem.layouts.palu import Palu, search_ranks, stored_bytes
from kvmem.layouts.rope import Rope

WIDTH = GROUP * HEAD_DIM
UNEQUAL = [[[8, 24], [32, 3]], [[16, 16], [1, 20]]]
SHAPE: dict[str, Any] = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "group_heads": GROUP}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def allocator(layout: Palu, backend: str) -> kvmem.Allocator:
    return kvmem.Allocator(
        layout.spec, backend=backend, device="cpu", memory="4MiB", max_sequences=4, max_tokens=1024, page_bytes=4096
    )


def written(layout: Palu, alloc: kvmem.Allocator, x: torch.Tensor, layer: int = 0) -> tuple[LayoutCache, Any]:
    """x as one sequence, in two steps; the batch is that of the second."""
    cache, seq = LayoutCache(layout, alloc), alloc.sequence()
    for begin, end in pairwise((0, len(x) // 2, len(x))):
        seq.extend(end - begin)
        batch = alloc.batch([seq])
        cache.write(layer, batch, x[begin:end])
        seq.commit(count=end - begin)
    return cache, batch


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens, one head after the other."""
    k, v = (t.repeat_interleave(QUERY_HEADS // KV_HEADS, 1) for t in (k, v))
    seen = torch.arange(len(k)) <= torch.arange(len(k) - len(q), len(k)).unsqueeze(1)
    scores = [(q[:, i] @ k[:, i].T * HEAD_DIM**-0.5).masked_fill(~seen, -torch.inf) for i in range(QUERY_HEADS)]
    return torch.stack([s.softmax(-1) @ v[:, i] for i, s in enumerate(scores)], 1)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


# --- equal to the truncated model ---


@pytest.mark.parametrize("ranks", [WIDTH // 2, UNEQUAL, WIDTH], ids=["half", "unequal", "full"])
@pytest.mark.parametrize("kind", ["rope", "no rope", "norm", "whitened"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_latents_give_what_the_truncated_model_gives(
    backend: str, dtype: torch.dtype, kind: str, ranks: Any, seed: int
) -> None:
    w_o = random(seed + 1, QUERY_HEADS * HEAD_DIM, HIDDEN).to(dtype)
    weights = [(w_k, w_v, w_o) for w_k, w_v, _ in make_weights(2, seed, dtype)]
    inputs = random(seed + 2, 200, HIDDEN) * torch.linspace(0.1, 3, HIDDEN)
    covariance = inputs.T @ inputs / 200 if kind == "whitened" else None
    norm = torch.nn.RMSNorm(HEAD_DIM, eps=1e-6, dtype=dtype)
    torch.nn.init.uniform_(norm.weight.requires_grad_(False), 0.5, 2)
    layout = Palu(
        weights, ranks, **SHAPE, dtype=dtype, rope=None if kind == "no rope" else ROPE,
        covariances=None if covariance is None else [covariance, 2 * covariance],
        k_norms=[norm, norm] if kind == "norm" else None,
    )  # fmt: skip
    layout.tile_tokens = 32
    x, q = inputs[:77].to(dtype), random(seed + 3, 39, QUERY_HEADS, HEAD_DIM).to(dtype)
    alloc, most = allocator(layout, backend), 1e-10 if dtype == torch.float64 else 1e-5
    for layer in (0, 1):
        cache, batch = written(layout, alloc, x, layer)
        cut = [weights[layer][part].double() for part in (0, 1)]
        if ranks != WIDTH:  # the full rank is the model itself
            cut = [truncated(cut[part], layout.ranks[layer][part], covariance) for part in (0, 1)]
        k, v = ((x.double() @ w).unflatten(1, (KV_HEADS, HEAD_DIM)) for w in cut)
        k = norm(k.to(dtype)).double() if kind == "norm" else k
        k = k if kind == "no rope" else ROPE.apply(k, torch.arange(77))
        (out, _), derived = cache.attend(q, layer, batch), cache.derive(layer, batch)
        assert out.dtype == derived.k.dtype == dtype
        assert error(layout.project(layer, out), reference(q.double(), k, v).flatten(1) @ w_o.double()) < most
        assert error(derived.k, k) < most and error(derived.v, v) < most
        for group, rank in enumerate(layout.ranks[layer][1]):
            assert not out.unflatten(1, (KV_HEADS // GROUP, -1))[:, group, :, rank:].any()


def test_whitened_factors_lose_least_on_such_inputs(seed: int) -> None:
    weight, inputs = random(seed, HIDDEN, WIDTH), random(seed + 1, 400, HIDDEN) * torch.logspace(0, -2, HIDDEN)
    root = palu.covariance_root(inputs.T @ inputs, HIDDEN)
    cut = [torch.mm(*palu.factor(weight, 10, r)) for r in (None, root)]
    plain, whitened = (float((inputs @ (weight - w)).square().sum()) for w in cut)
    least = float(torch.linalg.svdvals(inputs @ weight)[10:].square().sum())  # Eckart and Young
    assert whitened == pytest.approx(least, rel=1e-9) and plain > 1.01 * least


def test_weights_of_a_low_rank_and_of_zeros(seed: int) -> None:
    """Singular values of zero are split too."""
    low = random(seed, HIDDEN, 3) @ random(seed + 1, 3, WIDTH)
    for weight in (low, torch.zeros_like(low)):
        down, up = palu.factor(weight, WIDTH)
        assert down.isfinite().all() and (down @ up - weight).abs().max() < 1e-10


def test_a_bias_is_one_more_row_and_a_column_of_ones(backend: str, seed: int) -> None:
    (w_k, w_v, w_o), biases, x = (
        make_weights(1, seed)[0],
        random(seed, 2, KV_HEADS * HEAD_DIM),
        random(seed, 20, HIDDEN),
    )
    longer = [torch.cat([w, bias[None]]) for w, bias in zip((w_k, w_v), biases, strict=True)]
    layout = Palu([(*longer, w_o)], WIDTH, **SHAPE, dtype="float64")
    cache, batch = written(layout, allocator(layout, backend), torch.cat([x, torch.ones(20, 1)], 1))
    derived = cache.derive(0, batch)
    assert error(derived.k.flatten(1), x @ w_k + biases[0]) < 1e-12
    assert error(derived.v.flatten(1), x @ w_v + biases[1]) < 1e-12


def test_latents_serve_at_other_positions_as_they_are(backend: str, seed: int) -> None:
    """Bytes of a chunk that were written behind one prefix, copied behind a longer one: nothing is rotated anew."""
    weights = make_weights(1, seed)
    layout = Palu(weights, UNEQUAL[:1], **SHAPE, dtype="float64", rope=ROPE)
    alloc, chunk, prefix = allocator(layout, backend), random(seed, 48, HIDDEN), random(seed + 1, 29, HIDDEN)
    cache, batch = written(layout, alloc, torch.cat([prefix[:5], chunk]))
    copied = {name: cache.readers(0, batch)[0].rows(name, 5).clone() for name in ("hk", "hv")}
    seq = alloc.sequence()
    for rows in (layout.encode(0, prefix, positions=torch.arange(29)), copied):
        seq.extend(len(rows["hk"]))
        batch = alloc.batch([seq])
        for name, values in rows.items():
            write_component(alloc.tensor(0, name), batch, values)
        seq.commit(count=len(rows["hk"]))
    k = torch.cat([prefix, chunk]) @ truncated(weights[0][0], UNEQUAL[0][0])
    expected = ROPE.apply(k.unflatten(1, (KV_HEADS, HEAD_DIM)), torch.arange(77))
    assert error(cache.derive(0, batch).k, expected) < 1e-12


def test_perplexity_through_a_cache_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m benchmarks.perplexity``, where nothing is lost: plain, and at the full rank; and a half rank loses."""
    pytest.importorskip("transformers", reason="needs the extra kvmem[transformers]")
    from benchmarks import perplexity as module
    from kvmem.bench.language_models import load_language_model

    monkeypatch.setattr(module, "DTYPE", torch.float32)
    monkeypatch.setattr(module, "CALIBRATION_TOKENS", 1024)
    subject = module.Subject(load_language_model("tiny"))
    ids = subject.read(module.TEXT, 600)
    with torch.no_grad():
        expected = float(subject.model(ids[None], labels=ids[None]).loss.exp())
    found = {
        name: module.perplexity(subject, module.LAYOUTS[name](subject), ids)
        for name in ("plain", "Palu, full rank", "Palu, rank 50 %", "Palu, rank 50 % in all, searched")
    }
    assert found.pop("plain") == pytest.approx(expected, rel=1e-4)
    assert found.pop("Palu, full rank") == pytest.approx(expected, rel=1e-4)
    assert len({round(x / expected, 3) for x in (expected, *found.values())}) == 3


# --- bytes ---


def test_half_the_ranks_are_half_the_bytes(backend: str, seed: int) -> None:
    """As the ledger counts them: tokens held, bytes read; and mapped pages in the same ratio."""
    found = []
    for ranks in (WIDTH, WIDTH // 2, [[[WIDTH // 4] * 2, [3 * WIDTH // 4] * 2]]):
        layout = Palu(make_weights(1, seed, torch.float32), ranks, **SHAPE, dtype="float16", rope=ROPE)
        alloc, per_token = allocator(layout, backend), layout.spec.bytes_per_token
        cache, batch = written(layout, alloc, random(seed, 1024, HIDDEN))
        cache.attend(random(seed, 512, QUERY_HEADS, HEAD_DIM), 0, batch)
        held, read = (sum(count.values()) for count in (alloc.ledger.held, alloc.ledger.read))
        found.append([held, read, alloc.stats().mapped_bytes, per_token])
        assert held == read == 1024 * per_token
    full, half, uneven = found
    plain = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float16")
    assert full[3] == plain.bytes_per_token
    assert [2 * n for n in half] == [2 * n for n in uneven] == full


def test_the_published_setting_of_llama_2_7b_is_half() -> None:
    """Rank 1,024 of 4,096 for K and 3,072 for V, in eight groups of four heads and 32 layers."""
    spec = palu.latent_spec([[[128] * 8, [384] * 8]] * 32, dtype="float16")
    plain = kvmem.CacheSpec.kv(num_layers=32, num_kv_heads=32, head_dim=128, dtype="float16")
    assert 2 * spec.bytes_per_token == plain.bytes_per_token
    assert (spec.groups[0].rope("hk", 3), spec.groups[0].rope("hv", 3)) == ("pre", "none")


def test_a_norm_sees_the_dtype_of_the_weights(backend: str, seed: int) -> None:
    """Whatever that of the queries: torch's LayerNorm takes its own only."""
    norm = torch.nn.LayerNorm(HEAD_DIM)
    layout = Palu(make_weights(1, seed, torch.float32), 8, **SHAPE, dtype="float32", rope=ROPE, k_norms=[norm])
    cache, batch = written(layout, allocator(layout, backend), random(seed, 20, HIDDEN))
    q = random(seed, 20, QUERY_HEADS, HEAD_DIM)[: batch.num_new_tokens]
    outs = [cache.attend(q.to(dtype), 0, batch)[0].detach() for dtype in (torch.float64, torch.float32)]
    assert error(outs[1].double(), outs[0]) < 1e-5


def test_autocast_shortens_no_weights(seed: int) -> None:
    weights = make_weights(1, seed, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layout = Palu(weights, 8, **SHAPE, dtype="float32")
    other = Palu(weights, 8, **SHAPE, dtype="float32")
    assert torch.equal(layout.output_projection(0), other.output_projection(0))


def test_a_folded_output_projection_is_larger_and_counted(seed: int) -> None:
    """Four heads a group and 75 % of the rank of V: three times the rows of W_O."""
    weights = [(w_k, w_v, random(seed, 4 * HEAD_DIM, HIDDEN)) for w_k, w_v, _ in make_weights(1, seed)]
    layout = Palu(weights, [[[16], [48]]], kv_heads=4, head_dim=HEAD_DIM, group_heads=4, dtype="float32")
    assert layout.output_projection(0).shape == (3 * 4 * HEAD_DIM, HIDDEN)
    factors = (16 + 48) * (HIDDEN + 4 * HEAD_DIM)
    assert layout.weight_bytes == 8 * (factors + 3 * 4 * HEAD_DIM * HIDDEN)  # of float64


# --- low bits ---


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_is_exact_on_its_grid_and_half_a_step_beside_it(backend: str, bits: int, seed: int) -> None:
    def round_trip(latents: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        packed = palu.pack_latents(latents, bits, dtype)
        assert packed.dtype == torch.uint8 and packed.shape[1] == stored_bytes(latents.shape[1], dtype, bits)
        return palu.unpack_latents(packed, bits, dtype, latents.dtype)

    codes = torch.randint(2**bits, (50, 24), generator=torch.Generator().manual_seed(seed)).double()
    codes[:, :2] = torch.tensor([0, 2**bits - 1])
    assert torch.equal(round_trip(codes * 0.25 - 3), codes * 0.25 - 3)
    beside = random(seed, 50, 24) * torch.logspace(-6, 6, 50).unsqueeze(1)
    step = (beside.amax(1) - beside.amin(1)) / (2**bits - 1)
    assert ((round_trip(beside) - beside).abs().amax(1) <= 0.5001 * step).all()
    flat = torch.tensor([[7.0] * 8, [0.0] * 8, [1e30] * 8])  # beyond float16: its largest number, not infinity
    assert torch.equal(round_trip(flat, torch.float16), flat.clamp(max=65504))
    assert round_trip(flat[:0]).shape == (0, 8)
    layout = Palu(make_weights(1, seed), [[[8, 24], [32, 16]]], **SHAPE, dtype="bfloat16", bits=bits)
    written(layout, alloc := allocator(layout, backend), random(seed, 50, HIDDEN))
    payload, scales_and_zeros = (8 + 24 + 32 + 16) * bits // 8, 4 * (2 + 2)
    assert sum(alloc.ledger.held.values()) == 50 * (payload + scales_and_zeros)


def test_each_matrix_is_orthogonal_with_entries_of_one_size() -> None:
    for size in [1, 2, 4, 8, 12, 20, 24, 44, *range(32, 1153, 32)]:
        matrix = hadamard(size, dtype=torch.float64)
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_rotation_changes_no_product_and_spreads_outliers(backend: str, seed: int) -> None:
    weights, x, derived = make_weights(1, seed), random(seed, 200, HIDDEN), []
    for rotate in (False, True):
        layout = Palu(weights, [[[24, 12], [20, 32]]], **SHAPE, dtype="float32", rope=ROPE, rotate_latents=rotate)
        cache, batch = written(layout, allocator(layout, backend), x)
        derived.append(cache.derive(0, batch))
    assert error(derived[1].k, derived[0].k) < 1e-6 and error(derived[1].v, derived[0].v) < 1e-6

    latents, turn = random(seed + 1, 200, 64), hadamard(64, dtype=torch.float64)
    latents[:, [3, 17, 40]] *= 20  # outlier channels
    plain, rotated = (
        palu.unpack_latents(palu.pack_latents(h, 3, torch.bfloat16), 3, torch.bfloat16, h.dtype)
        for h in (latents, latents @ turn)
    )
    assert (rotated @ turn.T - latents).norm() < 0.7 * (plain - latents).norm()


# --- rank search ---


@pytest.mark.parametrize("bits", [None, 3])
def test_ranks_spend_the_budget_in_order_of_their_scores(bits: int | None, seed: int) -> None:
    scores = random(seed, 4, 2, 8).exp()
    one, two, top = (stored_bytes(rank, "bfloat16", bits) for rank in (32, 64, 512))
    for budget in np.linspace(64 * one, 64 * top + 1000, 23).astype(int).tolist():
        ranks = search_ranks(scores, width=520, budget_bytes=budget, dtype="bfloat16", bits=bits)
        spent = palu.latent_spec(ranks, dtype="bfloat16", bits=bits).bytes_per_token
        assert budget - (two - one) < spent <= budget or spent == 64 * top
        found = torch.tensor(ranks)
        assert found.shape == scores.shape and not (found % 32).any() and found.min() >= 32 and found.max() <= 512
        assert (found.flatten()[scores.flatten().argsort()].diff() >= 0).all()
    budget = 20 * stored_bytes(32, "float16") + 63
    assert search_ranks([[1, 3], [6, 10]], width=512, budget_bytes=budget, dtype="float16") == [[32, 96], [192, 320]]


# --- refusals ---


def test_options_that_do_not_fit_are_refused(seed: int) -> None:
    above, shape = [[[8, 8], [8, 8]], [[8, 8], [8, 33]]], r"ranks: got .*; must be one integer, or .* shape \(2, 2, 2\)"
    for ranks, options, message in [
        (above, {}, r"ranks\[1, 1, 1\]: got 33; must be from 1 to 32, the channels of a group"),
        (0, {}, r"ranks: got 0; must be from 1 to 32"),
        *((wrong, {}, shape) for wrong in ([8, 8], above[:1], [[[8, 8], [8]], [[8, 8], [8, 8]]], 8.0, "8")),
        (8, {"group_heads": 3}, "group_heads: got 3; must divide 4 KV heads: the nearest is 2"),
        (8, {"group_heads": 9}, "group_heads: got 9; must divide 4 KV heads: the nearest is 4"),
        (18, {"rotate_latents": True}, "ranks: got 18; no Hadamard matrix of that size .*: use 16"),
        (8, {"rope": Rope.default(32)}, "rope: got 32; must be None, or a Rope of at most head_dim=16"),
        (12, {"bits": 4}, "ranks: got 12; packed latents need multiples of 8, such as 8"),
        (8, {"bits": 5}, "bits: got 5; must be None, 2, 3, 4 or 8"),
        (8, {"rope": 5}, "rope: got int; must be None, or a Rope"),
        (8, {"dtype": "int8"}, "dtype: got torch.int8; .* need a float"),
        (8, {"dtype": "float8_e4m3fn", "bits": 4}, "dtype: got torch.float8_e4m3fn; .* need a float"),
        (8, {"k_norms": [torch.nn.Identity()]}, "k_norms: got 1; needs one for each of 2 layers"),
    ]:
        with pytest.raises(SpecError, match=message):
            Palu(make_weights(2, seed), ranks, **SHAPE | {"dtype": "float32"} | options)
    for scores, options, message in [
        ([1.0, 0.0], {}, "scores: got .*; all must be finite and above 0"),
        ([1.0, 2.0], {"width": 24}, "multiple: got 32; a group has 24 channels: at most 24"),
        ([1.0, 2.0], {"budget_bytes": 127}, "budget_bytes: got 127; ranks of 32 need 128 in all"),
    ]:
        with pytest.raises(SpecError, match=message):
            search_ranks(scores, **{"width": 64, "budget_bytes": 500, "dtype": "float16"} | options)


def test_weights_and_covariances_that_do_not_fit_are_refused(seed: int) -> None:
    good, eye = make_weights(2, seed), torch.eye(HIDDEN, dtype=torch.float64)
    (w_k, w_v, w_o), few = good[1], random(seed, HIDDEN - 1, HIDDEN)
    for second, covariance, message in [
        ((w_k[1:], w_v, w_o), eye, r"weights\[1\]: got W_K of shape \(47, 64\); the nearest is \(48, 64\)"),
        ((w_k, w_v[:, 1:], w_o), eye, r"weights\[1\]: got W_V of shape \(48, 63\); the nearest is \(48, 64\)"),
        ((w_k, w_v, w_o[1:]), eye, r"weights\[1\]: got W_O of shape \(127, 128\); the nearest is \(64, 128\)"),
        ((w_k, w_v), eye, r"weights\[1\]: got .*; must be W_K, W_V and W_O, float matrices"),
        ((w_k, w_v, None), eye, r"weights\[1\]: got .*, NoneType.; must be W_K, W_V"),
        ((w_k, w_v.int(), w_o), eye, r"weights\[1\]: got .*int32 on cpu, .*; must be W_K, W_V"),
        (w_k, eye, r"weights\[1\]: got \(48, 64\) torch.float64 on cpu; must be W_K, W_V"),
        (good[1], None, r"covariances\[1\]: got NoneType; must be a tensor"),
        ((w_k, w_v * torch.nan, w_o), eye, r"weights\[1\]: got NaN or infinity in W_V"),
        (good[1], eye[1:], r"covariances\[1\]: got \(47, 48\) torch.float64 on cpu; must be a tensor \(48, 48\)"),
        (good[1], eye * torch.nan, r"covariances\[1\]: got NaN or infinity"),
        (good[1], few.T @ few, r"covariances\[1\]: .*not positive definite: calibrate on more than 48 tokens, or add"),
        (good[1], 0 * eye, r"covariances\[1\]: .*not positive definite"),
    ]:
        with pytest.raises(SpecError, match=message):
            Palu([good[0], second], 8, **SHAPE, dtype="float32", covariances=[eye, covariance])
    with pytest.raises(SpecError, match="covariances: got 1; needs one for each of 2 layers"):
        Palu(good, 8, **SHAPE, dtype="float32", covariances=[eye])
    for none in ([], None, torch.ones(3)):
        with pytest.raises(SpecError, match="weights: got .*; needs"):
            Palu(none, 8, **SHAPE, dtype="float32")  # type: ignore[arg-type]


def test_inputs_that_do_not_fit_change_nothing(backend: str, seed: int) -> None:
    layout = Palu(make_weights(1, seed), 8, **SHAPE, dtype="float32", rope=ROPE)
    x = random(seed, 20, HIDDEN)
    cache, batch = written(layout, allocator(layout, backend), x)
    before = cache.derive(0, batch).k.clone()
    with pytest.raises(SpecError, match=r"layer: got 1; must be one of \(0,\)"):
        layout.encode(1, x, positions=torch.arange(20))
    for wrong in ((x[:10, 1:],), (x[:10], x[:10]), (), (x[:10].int(),)):
        with pytest.raises(SpecError, match=r"values: got .*; must be x, the input of the projections: \[T, 48\]"):
            cache.write(0, batch, *wrong)
    for shape in ((10, QUERY_HEADS, 8), (10, KV_HEADS, HEAD_DIM)):
        with pytest.raises(SpecError, match=r"q: got shape .*; must be \[n, 8, 16\]"):
            cache.attend(torch.zeros(shape), 0, batch)
    assert torch.equal(cache.derive(0, batch).k, before)
