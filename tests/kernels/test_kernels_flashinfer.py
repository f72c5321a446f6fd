"""FlashInfer's arguments, followed by hand on a CPU: what test_kernels_registry.py does not ask for."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import kernel_oracle_flashinfer as stand_ins
import pytest
import torch
from kernel_cases import (
    Case,
    check_attention,
    every_backend,
    every_block_size,
    every_layout,
    make_case,
    one_thread,
)

import kvmem
from kvmem.kernels import flashinfer as args

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

WRAPPERS = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
]


def by_hand() -> SimpleNamespace:
    made = {name: getattr(stand_ins, name) for name in [*WRAPPERS, "BatchAttention"]}
    return SimpleNamespace(**made, append=stand_ins.append_paged_kv_cache, options={}, precision=torch.float64)


@pytest.fixture
def kernels() -> SimpleNamespace:
    """The kernels by hand. The real ones are run by gpu_worker.py, in processes of their own."""
    return by_hand()


def check(case: Case, kernels: SimpleNamespace, out: torch.Tensor, lse: torch.Tensor, **how: object) -> None:
    check_attention(case, out, args.natural_lse(lse), kernels.precision, **how)


@every_layout
@every_block_size
@every_backend
@pytest.mark.parametrize("step", ["prefill", "mixed"])
def test_prefill(kernels, backend: str, step: str, block_size: int, interleave: int | str, seed: int) -> None:
    case = make_case(
        backend, step, block_size=block_size, interleave=interleave, pad_to=7, seed=seed, **kernels.options
    )
    wrapper = kernels.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(**args.prefill_plan(case.batch, **case.heads, scale=0.3))
    check(case, kernels, *wrapper.run(case.q, args.cache_of(*case.cache), return_lse=True), scale=0.3)


@every_layout
@pytest.mark.parametrize("step", ["prefill", "mixed"])
@pytest.mark.parametrize("window_tokens", [None, 20])
def test_ragged(kernels, step: str, window_tokens: int | None, interleave: int | str, seed: int) -> None:
    case = make_case(
        "virtual",
        step,
        interleave=interleave,
        window_tokens=window_tokens,
        tail_guard_tokens=256,
        seed=seed,
        **kernels.options,
    )
    ragged = args.ragged_plan(case.batch, **case.heads, window_tokens=window_tokens)
    wrapper = kernels.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan(**ragged.plan)
    out, lse = wrapper.run(case.q[ragged.order], *args.ragged_cache_of(*case.cache), return_lse=True)
    check(case, kernels, out[ragged.inverse], lse[ragged.inverse])


@every_backend
@pytest.mark.parametrize("window_tokens", [1, 20])
def test_sliding_window(kernels, backend: str, window_tokens: int, seed: int) -> None:
    for step in ("decode", "mixed"):
        case = make_case(backend, step, window_tokens=window_tokens, seed=seed, **kernels.options)
        wrapper = kernels.BatchPrefillWithPagedKVCacheWrapper()
        wrapper.plan(**args.prefill_plan(case.batch, **case.heads, window_tokens=window_tokens))
        check(case, kernels, *wrapper.run(case.q, args.cache_of(*case.cache), return_lse=True))
        if step == "decode":
            wrapper = kernels.BatchDecodeWithPagedKVCacheWrapper()
            wrapper.plan(**args.decode_plan(case.batch, **case.heads, window_tokens=window_tokens))
            check(case, kernels, *wrapper.run(case.q, args.cache_of(*case.cache), return_lse=True))


@every_backend
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (6, 1)])
def test_heads_and_no_mask(kernels, backend: str, query_heads: int, kv_heads: int, seed: int) -> None:
    case = make_case(backend, "mixed", query_heads=query_heads, kv_heads=kv_heads, seed=seed, **kernels.options)
    wrapper = kernels.BatchPrefillWithPagedKVCacheWrapper()
    wrapper.plan(**args.prefill_plan(case.batch, **case.heads, causal=False, queries=case.batch))
    check(case, kernels, *wrapper.run(case.q, args.cache_of(*case.cache), return_lse=True), causal=False)


def test_plans_read_on_the_host_are_copies_on_the_host(seed: int) -> None:
    case = make_case("virtual", "decode", seed=seed)
    plan = args.decode_plan(case.batch, **case.heads)
    assert plan["indptr"].data_ptr() != case.batch.kv_indptr_cpu.data_ptr()
    assert plan["indices"].data_ptr() == case.batch.full("kv_indices").data_ptr()
    assert plan["window_left"] == -1 and plan["sm_scale"] == 16**-0.5


def test_fillers_take_no_query_and_rows_ascend(seed: int) -> None:
    case = make_case("virtual", "prefill", seed=seed)
    plan = args.ragged_plan(case.batch, **case.heads).plan
    qo, kv = plan["qo_indptr"], plan["kv_indptr"]
    assert len(qo) == len(kv) == 2 * 3
    starts, order = case.batch.row_starts_cpu[:3].sort()
    assert torch.equal(kv[::2], starts)
    assert torch.equal(kv.diff()[::2], case.batch.seq_lens_cpu[order])
    assert (qo.diff()[1::2] == 0).all()


def test_refusals(seed: int) -> None:
    mixed = make_case("paged", "mixed", seed=seed)
    with pytest.raises(kvmem.SpecError, match="use prefill_plan"):
        args.decode_plan(mixed.batch, **mixed.heads)
    with pytest.raises(kvmem.SpecError, match="contiguous sequences"):
        args.ragged_plan(mixed.batch, **mixed.heads)
    with pytest.raises(kvmem.SpecError, match="multiple of num_kv_heads"):
        args.prefill_plan(mixed.batch, **{**mixed.heads, "num_query_heads": 3})
    padded = make_case("virtual", "decode", pad_to=5, seed=seed)
    with pytest.raises(kvmem.SpecError, match="two padding rows"):
        args.ragged_plan(padded.batch, **padded.heads)
    windowed = make_case("virtual", "decode", window_tokens=20, seed=seed)
    with pytest.raises(kvmem.SpecError, match="no sliding window"):
        args.batch_attention_plan(windowed.batch, **windowed.heads)
    for make in (args.decode_plan, args.prefill_plan, args.ragged_plan):
        with pytest.raises(kvmem.SpecError, match="window_tokens: got None"):
            make(windowed.batch, **windowed.heads)


def test_ragged_reach_is_32_bits() -> None:
    # Nothing is allocated: the strides alone make a cache of 2**32 elements and one token more.
    def cache(blocks: int) -> torch.Tensor:
        return torch.empty(0, device="meta").as_strided((blocks, 16, 8, 128), (16 * 2048, 2048, 128, 1))

    args.ragged_cache_of(cache(2**17), cache(2**17))
    with pytest.raises(kvmem.SpecError, match="use prefill_plan"):
        args.ragged_cache_of(cache(2**17 + 1), cache(2**17 + 1))


def test_names_are_those_of_the_installed_flashinfer(seed: int) -> None:
    """Needs the package, but no GPU."""
    flashinfer = pytest.importorskip("flashinfer", reason="FlashInfer is not installed: its signatures cannot be read")
    case = make_case("virtual", "decode", seed=seed)
    plans = {
        "BatchDecodeWithPagedKVCacheWrapper": args.decode_plan(case.batch, **case.heads),
        "BatchPrefillWithPagedKVCacheWrapper": args.prefill_plan(case.batch, **case.heads),
        "BatchPrefillWithRaggedKVCacheWrapper": args.ragged_plan(case.batch, **case.heads).plan,
        "BatchAttention": args.batch_attention_plan(case.batch, **case.heads),
    }
    for name, plan in plans.items():
        wrapper = getattr(flashinfer, name)
        method = wrapper.plan
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(method).parameters.values()):
            method = wrapper._plan_impl  # plan(**kwargs) takes anything; this is where it goes
        inspect.signature(method).bind(None, **plan)
    append = inspect.signature(flashinfer.append_paged_kv_cache)
    append.bind(None, None, paged_kv_cache=None, **args.append_args(case.batch))
