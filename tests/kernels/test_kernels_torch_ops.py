"""The arguments of torch's own flash operator, followed by hand on a CPU: what test_kernels_registry.py does not ask
for."""

from __future__ import annotations

import inspect

import kernel_oracle_flash_attention as stand_ins
import pytest
import torch
from kernel_cases import BACKENDS, BLOCK_SIZES, LAYOUTS, Case, assert_close, check_attention, make_case, one_thread

import kvmem
from kvmem.kernels import torch_ops as args
from kvmem.kernels.checks import flat_tokens

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def check(case: Case, out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, **how: object) -> None:
    """lse ``[Hq, T]``, as the operator gives it."""
    check_attention(case, out, args.natural_lse(lse), dtype, **how)


@pytest.mark.parametrize("interleave", LAYOUTS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("step", ["decode", "prefill", "mixed"])
def test_rows(step: str, block_size: int, interleave: int | str, seed: int) -> None:
    case = make_case("virtual", step, block_size=block_size, interleave=interleave, pad_to=7, seed=seed)
    k, v = map(flat_tokens, case.cache)
    out, lse, *_ = stand_ins.flash_op(case.q, k, v, **args.flash_op_args(case.batch))
    check(case, out, lse, torch.float64)
    call = args.varlen_args(case.batch, scale=0.3)
    out, lse, *_ = stand_ins.varlen_attn(case.q, k, v, return_aux=_lse(), **call)
    check(case, out, lse, torch.float64, scale=0.3)


@pytest.mark.parametrize("window_tokens", [1, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sliding_window(backend: str, window_tokens: int, seed: int) -> None:
    block_size = 256 if backend == "paged" else 16
    case = make_case(backend, "mixed", block_size=block_size, window_tokens=window_tokens, seed=seed)
    assert case.batch.first_tokens.any()
    cache = map(args.plain if backend == "paged" else flat_tokens, case.cache)
    call = args.varlen_args(case.batch, window_tokens=window_tokens)
    check(case, *stand_ins.varlen_attn(case.q, *cache, return_aux=_lse(), **call), torch.float64)
    if backend == "virtual":
        call = args.flash_op_args(case.batch, window_tokens=window_tokens)
        check(case, *stand_ins.flash_op(case.q, *map(flat_tokens, case.cache), **call)[:2], torch.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("public", [True, False])
def test_attention_picks_what_there_is(public: bool, causal: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("virtual", "mixed", pad_to=7, seed=seed)
    from torch.nn.attention import varlen

    def old(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError("torch 2.11's varlen_attn knows no seqused_k")

    monkeypatch.setattr(varlen, "varlen_attn", stand_ins.varlen_attn if public else old)
    if not public:
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", stand_ins.flash_op)
    out, lse = args.attention(case.q, case.cache, case.batch, causal=causal)
    expected, expected_lse = case.expected(causal=causal)
    assert_close(out, expected, torch.float64)
    assert_close(lse, expected_lse, torch.float64)


def test_a_captured_graph_keeps_the_longest_that_it_is_told(seed: int) -> None:
    case = make_case("virtual", "decode", seed=seed)
    for make in (args.flash_op_args, args.varlen_args):
        assert make(case.batch)["max_k"] == 301 and make(case.batch, max_tokens=4096)["max_k"] == 4096


def test_a_row_without_a_query_beside_rows_with_one(seed: int) -> None:
    """The operator takes ``max_q == 1`` to mean that the queries are as many as the rows, and folds groups by that."""
    case = make_case("virtual", "decode", seed=seed)
    assert args.flash_op_args(case.batch)["max_q"] == args.varlen_args(case.batch)["max_q"] == 1
    seqs = [int(handle) for handle in case.alloc.core.handles()[:3]]
    batch = case.alloc.batch(seqs, new_tokens=[1, 0, 1])
    assert (batch.num_rows, batch.num_new_tokens, batch.max_seqlen_q) == (3, 2, 1)
    assert args.flash_op_args(batch)["max_q"] == args.varlen_args(batch)["max_q"] == 2


def test_refusals(seed: int) -> None:
    case = make_case("paged", "decode", seed=seed)
    with pytest.raises(kvmem.SpecError, match="multiple of 256"):
        args.varlen_args(case.batch)
    with pytest.raises(kvmem.SpecError, match=r"torch 2\.12"):
        args.flash_op_args(case.batch)
    assert not args.supports("no such argument")
    eight_bits = make_case("virtual", "decode", dtype=torch.bfloat16, kv_dtype=torch.float8_e4m3fn, seed=seed)
    with pytest.raises(kvmem.SpecError, match="takes one dtype"):
        args.attention(eight_bits.q, eight_bits.cache, eight_bits.batch)


def test_names_are_those_of_this_torch(seed: int) -> None:
    case = make_case("virtual", "decode", seed=seed)
    given = args.flash_op_args(case.batch)
    names = {a.name for a in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    assert set(given) <= names
    if not args.supports("seqused_k"):
        pytest.skip(f"varlen_attn of torch {torch.__version__} has no seqused_k; the operator is used instead")
    from torch.nn.attention.varlen import varlen_attn

    for batch in (case.batch, make_case("paged", "decode", block_size=256, seed=seed).batch):
        inspect.signature(varlen_attn).bind(None, None, None, **args.varlen_args(batch))


def _lse() -> object:
    from torch.nn.attention.varlen import AuxRequest

    return AuxRequest(lse=True)
