"""FlashAttention's arguments, followed by hand on a CPU. test_gpu_kernels.py has FlashAttention itself follow them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import kernel_oracle_flash_attention as stand_ins
import pytest
import torch
from kernel_cases import BACKENDS, BLOCK_SIZES, LAYOUTS, Case, assert_close, make_case, one_thread

import kvmem
from kvmem.kernels import flash_attention as args
from kvmem.kernels.rules import flat_tokens

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand() -> SimpleNamespace:
    return SimpleNamespace(
        fa2=stand_ins.fa2_with_kvcache, fa2_varlen=stand_ins.fa2_varlen, fa3=stand_ins.fa3_with_kvcache,
        fa3_varlen=stand_ins.fa3_varlen, options={"tail_guard_tokens": 256}, precision=torch.float64,
    )  # fmt: skip


@pytest.fixture
def kernels() -> SimpleNamespace:
    """The kernels by hand. The real ones are run by gpu_kernels.py, in processes of their own."""
    return by_hand()


def check(case: Case, kernels: SimpleNamespace, out: torch.Tensor, lse: torch.Tensor, **how: object) -> None:
    expected, expected_lse = case.expected(**how)
    assert_close(out, expected, kernels.precision)
    assert_close(args.natural_lse(lse), expected_lse, kernels.precision)


every_layout = pytest.mark.parametrize("interleave", LAYOUTS)
every_block_size = pytest.mark.parametrize("block_size", BLOCK_SIZES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_layout
@every_block_size
@pytest.mark.parametrize("step", ["decode", "drafts"])
def test_fa2_rows(kernels, step: str, block_size: int, interleave: int | str, seed: int) -> None:
    case = make_case("virtual", step, block_size=block_size, interleave=interleave, seed=seed, **kernels.options)
    k, v = map(args.plain, case.rows)
    out, lse, *_ = kernels.fa2(args.fa2_query(case.q, case.batch), k, v, **args.fa2_args(case.batch, return_lse=True))
    check(case, kernels, out.flatten(0, 1), lse)


@every_layout
@every_backend
@pytest.mark.parametrize("step", ["decode", "drafts"])
def test_fa2_blocks(kernels, backend: str, step: str, interleave: int | str, seed: int) -> None:
    case = make_case(backend, step, block_size=256, interleave=interleave, pad_to=None, seed=seed, **kernels.options)
    call = args.fa2_args(case.batch, form="blocks", scale=0.3, return_lse=True)
    out, lse, *_ = kernels.fa2(args.fa2_query(case.q, case.batch), *map(args.plain, case.cache), **call)
    check(case, kernels, out.flatten(0, 1), lse, scale=0.3)


@every_layout
@every_backend
@pytest.mark.parametrize("step", ["prefill", "mixed"])
def test_fa2_varlen_blocks(kernels, backend: str, step: str, interleave: int | str, seed: int) -> None:
    case = make_case(backend, step, block_size=256, interleave=interleave, pad_to=7, seed=seed, **kernels.options)
    call = args.fa2_varlen_args(case.batch, return_lse=True)
    out, lse, *_ = kernels.fa2_varlen(case.q, *map(args.plain, case.cache), **call)
    check(case, kernels, out, lse)


@every_layout
@every_block_size
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_fa3_rows(kernels, step: str, block_size: int, interleave: int | str, seed: int) -> None:
    case = make_case(
        "virtual", step, block_size=block_size, interleave=interleave, pad_to=7, seed=seed, **kernels.options
    )
    call = args.fa3_fwd_args(case.batch, dtype=torch.bfloat16, return_lse=True)
    out, lse, *_ = kernels.fa3(case.q, *map(args.plain, case.rows), **call)
    check(case, kernels, out, lse)


@every_layout
@every_block_size
@every_backend
def test_fa3_blocks(kernels, backend: str, block_size: int, interleave: int | str, seed: int) -> None:
    case = make_case(
        backend, "mixed", block_size=block_size, interleave=interleave, pad_to=7, seed=seed, **kernels.options
    )
    call = args.fa3_args(case.batch, form="blocks", return_lse=True)
    out, lse, *_ = kernels.fa3(case.q, *map(args.plain, case.cache), **call)
    check(case, kernels, out, lse)


@every_layout
@pytest.mark.parametrize("causal", [True, False])
def test_fa3_varlen(kernels, causal: bool, interleave: int | str, seed: int) -> None:
    case = make_case("virtual", "mixed", interleave=interleave, pad_to=7, seed=seed, **kernels.options)
    call = args.fa3_varlen_args(case.batch, causal=causal, return_lse=True)
    out, lse, *_ = kernels.fa3_varlen(case.q, *map(flat_tokens, case.cache), **call)
    check(case, kernels, out, lse, causal=causal)


@pytest.mark.parametrize("window_tokens", [1, 20])
def test_sliding_window(kernels, window_tokens: int, seed: int) -> None:
    window = {"window_tokens": window_tokens}
    # A small guard, because it also keeps tokens in front of the window.
    options = {**kernels.options, "tail_guard_tokens": 0}
    case = make_case("virtual", "drafts", seed=seed, **window, **options)
    for kernel, q, call in [
        (kernels.fa2, args.fa2_query(case.q, case.batch), args.fa2_args(case.batch, return_lse=True, **window)),
        (kernels.fa3, case.q, args.fa3_args(case.batch, return_lse=True, **window)),
    ]:
        out, lse, *_ = kernel(q, *map(args.plain, case.rows), **call)
        check(case, kernels, out.view(case.q.shape), lse)
    out, lse, *_ = kernels.fa3_varlen(
        case.q, *map(flat_tokens, case.cache), **args.fa3_varlen_args(case.batch, return_lse=True, **window)
    )
    check(case, kernels, out, lse)
    for backend in BACKENDS:
        case = make_case(backend, "drafts", block_size=256, seed=seed, **window, **options)
        call = args.fa2_varlen_args(case.batch, return_lse=True, **window)
        out, lse, *_ = kernels.fa2_varlen(case.q, *map(args.plain, case.cache), **call)
        check(case, kernels, out, lse)


def test_lengths_and_tables_are_the_batch_itself(seed: int) -> None:
    """A captured graph keeps these addresses: nothing is copied."""
    case = make_case("virtual", "decode", block_size=256, seed=seed)
    rows, blocks = args.fa3_args(case.batch), args.fa3_args(case.batch, form="blocks")
    for tensor, field in [
        (rows["cache_seqlens"], "seq_lens"), (rows["cache_batch_idx"], "rows"), (rows["cu_seqlens_q"], "cu_seqlens_q"),
        (blocks["page_table"], "block_table"), (args.fa3_varlen_args(case.batch)["cu_seqlens_k"], "row_starts"),
    ]:  # fmt: skip
        assert tensor.data_ptr() == case.batch.full(field).data_ptr()
    assert "page_table" not in rows and "cache_batch_idx" not in blocks and "cache_leftpad" not in rows


def test_lse_of_every_shape() -> None:
    rows = torch.tensor([[[1.0, 2.0], [3.0, torch.inf]]])  # [B, Hq, S], version 2's sign for an empty row
    assert torch.equal(args.natural_lse(rows), torch.tensor([[1.0, 3.0], [2.0, -torch.inf]]))
    assert torch.equal(args.natural_lse(rows[0]), torch.tensor([[1.0, 3.0], [2.0, -torch.inf]]))


def test_refusals(seed: int) -> None:
    paged = make_case("paged", "mixed", seed=seed)
    with pytest.raises(kvmem.SpecError, match="multiple of 256"):
        args.fa2_args(paged.batch)
    with pytest.raises(kvmem.SpecError, match="multiple of 256"):
        args.fa2_varlen_args(paged.batch)
    with pytest.raises(kvmem.SpecError, match="equally many"):
        args.fa2_query(paged.q, paged.batch)
    for make in (lambda b: args.fa3_args(b, form="rows"), args.fa3_varlen_args):
        with pytest.raises(kvmem.SpecError, match="contiguous sequences"):
            make(paged.batch)
    with pytest.raises(kvmem.SpecError, match='must be "rows"'):
        args.fa3_args(paged.batch, form="pages")
    with pytest.raises(kvmem.SpecError, match="bfloat16"):
        args.fa3_fwd_args(paged.batch, dtype=torch.float16)
    windowed = make_case("virtual", "decode", window_tokens=20, seed=seed)
    with pytest.raises(kvmem.SpecError, match="without sliding windows"):
        args.fa3_fwd_args(windowed.batch, dtype=torch.bfloat16)
    with pytest.raises(kvmem.SpecError, match="window_tokens: got None"):
        args.fa2_args(windowed.batch)
    with pytest.raises(kvmem.SpecError, match="causal"):
        args.fa3_varlen_args(windowed.batch, window_tokens=20, causal=False)


@pytest.mark.parametrize(
    ("module", "function", "made"),
    [
        ("flash_attn", "flash_attn_with_kvcache", args.fa2_args),
        ("flash_attn", "flash_attn_varlen_func", args.fa2_varlen_args),
        ("flash_attn_interface", "flash_attn_with_kvcache", args.fa3_args),
        ("flash_attn_interface", "flash_attn_varlen_func", args.fa3_varlen_args),
        ("fa3_fwd_interface", "flash_attn_with_kvcache", args.fa3_args),
        ("fa3_fwd_interface", "flash_attn_varlen_func", args.fa3_varlen_args),
    ],
)
def test_names_are_those_of_the_installed_package(module: str, function: str, made: Callable, seed: int) -> None:
    """Needs the package, but no GPU."""
    found = pytest.importorskip(module, reason=f"{module} is not installed: its signatures cannot be read")
    case = make_case("virtual", "decode", block_size=256, seed=seed)
    inspect.signature(getattr(found, function)).bind(None, None, None, **made(case.batch))
