"""FlashAttention's arguments, followed by hand on a CPU: what test_kernels_registry.py does not ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import kernel_oracle_flash_attention as stand_ins
import pytest
import torch
from kernel_cases import (
    BACKENDS,
    Case,
    check_attention,
    every_backend,
    every_block_size,
    every_layout,
    make_case,
    one_thread,
)

import kvmem
from kvmem.kernels import flash_attention as args
from kvmem.kernels import flash_attention_4 as fa4
from kvmem.kernels.checks import flat_tokens

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand() -> SimpleNamespace:
    return SimpleNamespace(
        fa2=stand_ins.fa2_with_kvcache, fa2_varlen=stand_ins.fa2_varlen, fa3=stand_ins.fa3_with_kvcache,
        fa3_varlen=stand_ins.fa3_varlen, fa4_varlen=stand_ins.fa4_varlen, options={"tail_guard_tokens": 256}, precision=torch.float64,
    )  # fmt: skip


@pytest.fixture
def kernels() -> SimpleNamespace:
    """The kernels by hand. The real ones are run by gpu_worker.py, in processes of their own."""
    return by_hand()


def check(case: Case, kernels: SimpleNamespace, out: torch.Tensor, lse: torch.Tensor, **how: object) -> None:
    check_attention(case, out, args.natural_lse(lse), kernels.precision, **how)


@every_layout
@every_backend
@pytest.mark.parametrize("step", ["decode", "drafts"])
def test_fa2_blocks(kernels, backend: str, step: str, interleave: int | str, seed: int) -> None:
    case = make_case(backend, step, block_size=256, interleave=interleave, pad_to=None, seed=seed, **kernels.options)
    call = args.fa2_args(case.batch, form="blocks", scale=0.3, return_lse=True)
    out, lse, *_ = kernels.fa2(args.fa2_query(case.q, case.batch), *map(args.plain, case.cache), **call)
    check(case, kernels, out.flatten(0, 1), lse, scale=0.3)


@every_layout
@pytest.mark.parametrize("causal", [True, False])
def test_fa3_varlen(kernels, causal: bool, interleave: int | str, seed: int) -> None:
    case = make_case("virtual", "mixed", interleave=interleave, pad_to=7, seed=seed, **kernels.options)
    call = args.fa3_varlen_args(case.batch, causal=causal, return_lse=True)
    out, lse, *_ = kernels.fa3_varlen(case.q, *map(flat_tokens, case.cache), **call)
    check(case, kernels, out, lse, causal=causal)


FOUR = {"head_dim": 16, "dtype": torch.bfloat16}


def fa4_call(kernels: SimpleNamespace, case: Case, form: args.Form, **how: object) -> tuple[torch.Tensor, torch.Tensor]:
    cache = map(flat_tokens if form == "rows" else fa4.plain, case.cache)
    out, lse = kernels.fa4_varlen(case.q, *cache, **fa4.fa4_varlen_args(case.batch, **FOUR, form=form, **how))
    return out, lse


@every_layout
@every_block_size
@pytest.mark.parametrize(("backend", "form"), [("virtual", "rows"), ("virtual", "blocks"), ("paged", "blocks")])
@pytest.mark.parametrize("window_tokens", [None, 20])
def test_fa4(kernels, backend, form, block_size: int, interleave: int | str, window_tokens: int | None, seed) -> None:
    case = make_case(
        backend, "mixed", block_size=block_size, interleave=interleave, window_tokens=window_tokens, pad_to=7,
        seed=seed, **kernels.options,
    )  # fmt: skip
    check(case, kernels, *fa4_call(kernels, case, form, window_tokens=window_tokens, return_lse=True))
    assert fa4_call(kernels, case, form, window_tokens=window_tokens)[1] is None
    default = fa4.fa4_varlen_args(case.batch, **FOUR, window_tokens=window_tokens)
    assert ("page_table" in default) == (backend == "paged"), "rows where there are any"


@pytest.mark.parametrize("form", ["rows", "blocks"])
def test_fa4_without_a_mask(kernels, form, seed: int) -> None:
    case = make_case("virtual", "mixed", seed=seed, **kernels.options)
    check(
        case, kernels, *fa4_call(kernels, case, form, causal=False, scale=0.3, return_lse=True), causal=False, scale=0.3
    )


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


def test_fa4_tables_are_the_batch_itself(seed: int) -> None:
    case = make_case("virtual", "decode", block_size=256, seed=seed)
    rows, blocks = (fa4.fa4_varlen_args(case.batch, **FOUR, form=form) for form in ("rows", "blocks"))
    for tensor, field in [
        (rows["cu_seqlens_k"], "row_starts"), (rows["seqused_k"], "seq_lens"), (rows["cu_seqlens_q"], "cu_seqlens_q"),
        (blocks["page_table"], "block_table"), (blocks["seqused_k"], "seq_lens"),
    ]:  # fmt: skip
        assert tensor.data_ptr() == case.batch.full(field).data_ptr()
    longest = case.batch.block_table.shape[1] * 256
    assert blocks["max_seqlen_k"] == longest, "holds in a captured graph for as long as the table has room"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"head_dim": 260}, "head_dim, head_dim_v: got .260, 260.; .* 8 to 256 each, in steps of 8"),
        ({"head_dim": 20}, "in steps of 8 for torch.bfloat16"),
        ({"head_dim": 24, "dtype": torch.float8_e4m3fn}, "in steps of 16 for torch.float8_e4m3fn"),
        ({"head_dim": 256, "head_dim_v": 128, "capability": (10, 0)}, "8 to 128 .* 10.x, .* or .192, 128., or .256"),
        ({"dtype": torch.float32}, "dtype: got torch.float32"),
        ({"dtype": torch.float8_e4m3fn, "capability": (9, 0)}, "dtype: got torch.float8_e4m3fn.*10.x"),
        ({"form": "blocks", "capability": (8, 0)}, 'form: got "blocks" .* 8.x.*form="rows"'),
        ({"form": "blocks", "capability": (12, 0)}, 'form: got "blocks" .* 12.x'),
        ({"capability": (7, 5)}, "capability: got 7.x"),
        ({"form": "pages"}, 'must be "rows"'),
    ],
)
def test_fa4_refusals(how: dict[str, object], says: str, seed: int) -> None:
    case = make_case("virtual", "decode", seed=seed)
    with pytest.raises(kvmem.SpecError, match=says):
        fa4.fa4_varlen_args(case.batch, **{**FOUR, **how})


def test_fa4_takes_what_its_devices_take(seed: int) -> None:
    case = make_case("virtual", "decode", seed=seed)
    eight = torch.float8_e4m3fn
    for how in (
        {"head_dim": 256, "capability": (9, 0)}, {"head_dim": 192, "head_dim_v": 128, "capability": (10, 0)},
        {"head_dim": 256, "capability": (11, 0)}, {"head_dim": 128, "dtype": eight, "capability": (10, 3)},
        {"form": "blocks", "capability": (9, 0)}, {"form": "rows", "capability": (8, 6)},
    ):  # fmt: skip
        assert fa4.fa4_varlen_args(case.batch, **{**FOUR, **how})["causal"] is True


def test_the_lse_is_asked_for_where_the_function_can_be_asked(seed: int) -> None:
    """As the hopper folder of flash-attn 2.8.3 has it, and as fa3-fwd."""

    def anything(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **rest) -> None: ...

    def without(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k) -> None: ...

    case = make_case("virtual", "decode", seed=seed)
    assert "return_attn_probs" not in args.fa3_varlen_args(case.batch)
    assert "return_attn_probs" not in args.fa3_varlen_args(case.batch, function=without)
    for function in (stand_ins.fa3_varlen, anything, None):
        assert args.fa3_varlen_args(case.batch, return_lse=True, function=function)["return_attn_probs"] is True
    with pytest.raises(kvmem.SpecError, match="return_lse: got True, .*fa3_args"):
        args.fa3_varlen_args(case.batch, return_lse=True, function=without)


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
        ("flash_attn.cute", "flash_attn_varlen_func", lambda batch: fa4.fa4_varlen_args(batch, **FOUR)),
    ],
)
def test_names_are_those_of_the_installed_package(module: str, function: str, made: Callable, seed: int) -> None:
    """Needs the package, but no GPU."""
    found = pytest.importorskip(module, reason=f"{module} is not installed: its signatures cannot be read")
    case = make_case("virtual", "decode", block_size=256, seed=seed)
    inspect.signature(getattr(found, function)).bind(None, None, None, **made(case.batch))
