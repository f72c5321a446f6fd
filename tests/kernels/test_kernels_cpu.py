"""kvmem's own kernel for a CPU (csrc/attend), with every vector unit of this machine, against float64."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import STEPS, Case, make_case, one_thread

import kvmem
from kvmem import _core
from kvmem.kernels import cpu, reference
from kvmem.kernels.checks import as_bytes, flat_tokens

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = _core.attention_levels()
#: Relative to the largest output: float32 arithmetic, and one rounding to the dtype of the queries.
ALLOWED = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.use_attention_level(request.param)
    yield request.param
    _core.use_attention_level(LEVELS[-1])


def check(q: torch.Tensor, cache: Any, batch: Any, **options: Any) -> None:
    threads = options.pop("threads", None)
    out, lse = cpu.attention(q, cache, batch, threads=threads, **options)
    expected, expected_lse = reference.oracle(q, cache, batch, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    if out.numel():
        error, largest = float((out.double() - expected).abs().max()), float(expected.abs().max())
        assert error <= ALLOWED[q.dtype] * max(1.0, largest), error


def filled(rng: random.Random, backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, Any, Any, dict[str, Any]]:
    """Queries, a cache, a batch and options: anything that a cache may be."""
    heads, group = rng.choice([1, 2, 3, 8]), rng.choice([1, 2, 3, 4, 7])
    width, window = rng.choice([1, 8, 16, 24, 64, 80, 128]), rng.choice([None, None, 1, 40])
    spec = kvmem.CacheSpec.kv(
        num_layers=2, num_kv_heads=heads, head_dim=width, dtype=dtype, block_size=rng.choice([1, 4, 16]),
        num_query_heads=heads * group,
    )  # fmt: skip
    alloc = kvmem.Allocator(
        spec, backend=backend, device="cpu", memory="64MiB", max_sequences=8, max_tokens=2048, page_bytes=4096,
        interleave=rng.choice([1, "all", "none"]),
    )  # fmt: skip
    lengths = [rng.choice([1, 5, 63, 64, 65, 300, 900]) for _ in range(rng.randrange(1, 6))]
    new = [min(length, rng.choice([0, 1, 1, 3, 20])) for length in lengths]
    ids = alloc.open_batch(len(lengths))
    alloc.extend_batch(ids, np.array(lengths, np.int32))
    slots, cache = alloc.batch(ids).slot_mapping, alloc.kv(1)
    draw = torch.Generator().manual_seed(rng.randrange(2**31))
    for part in cache:
        values = torch.randn(len(slots), heads, width, generator=draw)
        values = (20 * values).clamp(-127, 127) if dtype == torch.int8 else values
        as_bytes(flat_tokens(part))[slots] = as_bytes(values.to(dtype))
    alloc.commit_batch(ids, np.array(lengths, np.int32) - np.array(new, np.int32))
    batch = alloc.batch(ids)
    q = torch.randn(batch.num_new_tokens, heads * group, width, generator=draw)
    options: dict[str, Any] = {"scale": 0.01 if dtype == torch.int8 else rng.choice([None, 0.3])}
    options |= {"window_tokens": window} if window else {"causal": rng.random() < 0.7}
    return q, cache, batch, options


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_any_cache(dtype: torch.dtype, backend: str, seed: int) -> None:
    rng = random.Random(f"{seed} {dtype} {backend}")
    for _ in range(12):
        q, cache, batch, options = filled(rng, backend, dtype)
        check(q.to(rng.choice(list(ALLOWED))), cache, batch, threads=rng.choice([1, 2, 5]), **options)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window_tokens", [None, 20])
def test_steps_and_dropped_tokens(step: str, window_tokens: int | None, backend: str, seed: int) -> None:
    """What a window has dropped is taken away: a read of it would fault or meet what is not finite."""
    case = make_case(backend, step, dtype=torch.float32, window_tokens=window_tokens, pad_to=7, seed=seed)
    case.alloc.set_memory(case.alloc.stats().used_bytes + (1 << 20))
    case.alloc.trim()
    check(case.q, case.cache, case.batch, window_tokens=window_tokens)


def test_what_is_behind_the_end_is_not_read(seed: int) -> None:
    """On the virtual backend it may not even be mapped."""
    case = make_case("paged", "mixed", dtype=torch.bfloat16, seed=seed)
    expected = cpu.attention(case.q, case.cache, case.batch)
    for part in case.cache:
        for row, length in enumerate(case.batch.seq_lens.tolist()):
            if length == 0:
                continue
            block = int(case.batch.block_table[row, (length - 1) // case.batch.block_size])
            part[block, (length - 1) % case.batch.block_size + 1 :] = torch.nan
    again = cpu.attention(case.q, case.cache, case.batch)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_every_number_of_8_bits(dtype: torch.dtype, seed: int) -> None:
    """One token a sequence: the output is its V."""
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=16, dtype=dtype, block_size=16)
    alloc = kvmem.Allocator(spec, backend="paged", device="cpu", memory="1MiB", max_sequences=16, max_tokens=16)
    ids = alloc.open_batch(16)
    alloc.extend_batch(ids, np.ones(16, np.int32))
    batch, (_, v) = alloc.batch(ids), alloc.kv(0)
    every = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 1, 16)
    as_bytes(flat_tokens(v))[batch.slot_mapping] = as_bytes(every)
    out, _ = cpu.attention(torch.zeros(16, 1, 16), alloc.kv(0), batch)
    torch.testing.assert_close(out, every.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_rounded_to_the_nearest(dtype: torch.dtype, seed: int) -> None:
    """All of fp16's range, subnormals and overflow too, and ties; V is float32."""
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=64, dtype=torch.float32, block_size=16)
    alloc = kvmem.Allocator(spec, backend="paged", device="cpu", memory="4MiB", max_sequences=64, max_tokens=16)
    ids = alloc.open_batch(64)
    alloc.extend_batch(ids, np.ones(64, np.int32))
    batch, (_, v) = alloc.batch(ids), alloc.kv(0)
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(64, 1, 64, generator=draw) * 2.0 ** torch.randint(-30, 20, (64, 1, 64), generator=draw)
    bits = values.view(torch.int32)
    bits[::2] &= ~0x7FF  # more ties
    values[0, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 65519.99])
    flat_tokens(v)[batch.slot_mapping] = values
    out, _ = cpu.attention(torch.zeros(64, 1, 64, dtype=dtype), alloc.kv(0), batch)
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)


def by_hand(case: Case, cap: float, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outs, lses = [], []
    for row, (k, v) in enumerate(case.tokens):
        begin, end = case.batch.cu_seqlens_q[row : row + 2].tolist()
        for i in range(begin, end):
            seen = len(k) - (end - i) + 1
            heads = case.q.shape[1] // k.shape[1]
            keys, values = (t[:seen].double().repeat_interleave(heads, 1) for t in (k, v))
            scores = torch.einsum("hd,khd->hk", case.q[i].double(), keys) * case.q.shape[2] ** -0.5
            scores = torch.cat([cap * torch.tanh(scores / cap), sinks.double()[:, None]], 1)
            lses.append(scores.logsumexp(1))
            outs.append(torch.einsum("hk,khd->hd", scores.softmax(1)[:, :-1], values))
    return torch.stack(outs), torch.stack(lses)


def test_soft_cap_and_sinks(backend: str, seed: int) -> None:
    case = make_case(backend, "mixed", dtype=torch.float32, query_heads=6, kv_heads=2, seed=seed)
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 3
    for cap in (0.05, 1.5, 30.0):
        expected, expected_lse = by_hand(case, cap, sinks)
        out, lse = cpu.attention(case.q, case.cache, case.batch, soft_cap=cap, sinks=sinks)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=3e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_threads_change_nothing(backend: str, seed: int) -> None:
    """Long enough to be divided by tokens, short enough to be divided by heads; several callers at once."""
    for step in ("long decode", "drafts"):
        case = make_case(backend, step, dtype=torch.bfloat16, query_heads=8, kv_heads=4, seed=seed)
        expected = cpu.attention(case.q, case.cache, case.batch, threads=1)
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def work(case: Case = case, found: list[tuple[torch.Tensor, torch.Tensor]] = found) -> None:
            for threads in (2, 3, 8):
                found.append(cpu.attention(case.q, case.cache, case.batch, threads=threads))

        callers = [threading.Thread(target=work) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(found) == 9
        assert all(torch.equal(a, b) for pair in found for a, b in zip(expected, pair, strict=True))


def test_one_plan_serves_all_layers(backend: str, seed: int) -> None:
    case = make_case(backend, "mixed", dtype=torch.bfloat16, seed=seed)
    heads, width = case.cache[0].shape[2:]
    run = cpu.plan(
        case.batch, num_query_heads=case.q.shape[1], num_kv_heads=heads, head_dim=width, dtype=case.q.dtype,
        return_lse=False,
    )  # fmt: skip
    for layer in range(case.alloc.spec.num_layers):
        cache = case.alloc.kv(layer)
        out, lse = run(case.q, cache)
        assert lse is None
        expected, _ = cpu.attention(case.q, cache, case.batch)  # of layers that hold nothing yet, anything
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(kvmem.SpecError, match="this plan was made for"):
        run(case.q.float(), case.cache)
    with pytest.raises(kvmem.SpecError, match=r"q: must be \["):
        run(case.q[:-1], case.cache)
    for seq in case.alloc.sequences():
        case.alloc.free_batch([seq.id])
    with pytest.raises(kvmem.StaleHandle):
        run(case.q, case.cache)


def test_refusals(backend: str, seed: int) -> None:
    case = make_case(backend, "decode", dtype=torch.float32, window_tokens=20, seed=seed)
    for q, cache, options, words in [
        (case.q.double(), case.cache, {}, "takes queries of float32, bfloat16, float16 and a cache"),
        (case.q, (torch.zeros(case.cache[0][:2].shape).double(),) * 2, {}, "takes queries of"),
        (case.q[:, :1], case.cache, {}, "must be a multiple of the cache's"),
        (case.q[..., :3], case.cache, {}, r"k: must be \[blocks, 16"),
        (case.q, case.cache, {"window_tokens": None}, "a window has dropped tokens"),
        (case.q, case.cache, {"window_tokens": 0}, "window_tokens: got 0"),
        (case.q, case.cache, {"sinks": torch.zeros(1)}, "sinks: got"),
        (case.q, (case.cache[0][:1], case.cache[1]), {}, "block_table: has block"),
        (case.q, case.cache[0], {}, "cache: got"),
        ("q", case.cache, {}, "q: got"),
    ]:
        with pytest.raises(kvmem.SpecError, match=words):
            cpu.attention(q, cache, case.batch, **{"window_tokens": 20, **options})
    check(case.q, case.cache, case.batch, window_tokens=20)


def test_levels() -> None:
    assert LEVELS[0] == "portable"
    with pytest.raises(kvmem.SpecError, match="level: got riscv"):
        _core.use_attention_level("riscv")
