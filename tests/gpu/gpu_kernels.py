"""Every kernel that kvmem's caches are read with, unchanged: how it is called, what it is tried on, and which constant
says how far past a sequence's end it may touch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gpu_libraries import ByHand, Real, Result
from kernel_cases import BACKENDS, FP8, Case

from kvmem.kernels import flash_attention, flash_attention_4, flashinfer, flashinfer_mla, reference
from kvmem.kernels.checks import flat_tokens
from kvmem.kernels.write import to_cache_dtype, write_kv

Library = ByHand | Real
Model = tuple[torch.dtype, torch.dtype, int]  # dtype of the queries, of the cache, size of a head

F16, BF16 = torch.float16, torch.bfloat16
HEADS = (64, 128, 256)
PLAIN: tuple[Model, ...] = tuple((dtype, dtype, head) for dtype in (F16, BF16) for head in HEADS)
#: Each model is a module to compile, up to a minute: each dtype and each head size at least once.
COMPILED: tuple[Model, ...] = ((BF16, BF16, 128), (F16, F16, 64), (BF16, FP8, 128), (F16, F16, 256))
EVERYTHING: tuple[Model, ...] = (*PLAIN, *((dtype, FP8, head) for dtype in (F16, BF16) for head in HEADS))
MLA: Model = (BF16, BF16, 512)
MLA_SCALE, MLA_KPE = 0.11, 64


@dataclass(frozen=True)
class Kernel:
    """``run(case, library)`` gives out ``[T, Hq, D]`` and the natural lse or None; ``expected(case)`` the same in
    float64.

    guard: the module of kvmem.kernels and the key of its ``TAIL_GUARD_TOKENS``. models: tried by default;
    more: with KVMEM_GPU_FULL=1. switch: an environment variable without which it is left out, being slow to compile.
    """

    name: str
    package: str
    guard: tuple[str, str]
    run: Callable[[Case, Library], Result]
    models: tuple[Model, ...] = COMPILED
    more: tuple[Model, ...] = EVERYTHING
    steps: tuple[str, ...] = ("prefill", "mixed", "drafts", "long decode")
    backends: tuple[str, ...] = tuple(BACKENDS)
    block_sizes: tuple[int, ...] = (1, 16, 256)
    windows: tuple[int | None, ...] = (None,)
    kind: str = "kv"  # or "mla", "shared": prefixes in common
    pads: bool = True
    expected: Callable[[Case], Result] = lambda case: case.expected()
    switch: str = ""

    @property
    def guard_tokens(self) -> int:
        module, key = self.guard
        tokens: int = importlib.import_module(f"kvmem.kernels.{module}").TAIL_GUARD_TOKENS[key]
        return tokens

    @property
    def guard_place(self) -> str:
        return f'kvmem/kernels/{self.guard[0]}.py TAIL_GUARD_TOKENS["{self.guard[1]}"]'

    @property
    def left_out(self) -> str:
        """Why this run does without the kernel; empty if it does not."""
        wanted = not self.switch or os.environ.get(self.switch) or os.environ.get("KVMEM_GPU_FULL")
        return "" if wanted else f"compiles for minutes: ask for it with {self.switch}=1 (or KVMEM_GPU_FULL=1)"


# ---- FlashInfer ------------------------------------------------------------------------------------------------------


def _decode(tensor_cores: bool) -> Callable[[Case, Library], Result]:
    def run(case: Case, lib: Library) -> Result:
        wrapper = lib.decode(tensor_cores)
        wrapper.plan(**flashinfer.decode_plan(case.batch, **case.heads, window_tokens=case.window_tokens))
        out, lse = wrapper.run(case.q, flashinfer.cache_of(*case.cache), return_lse=True, **case.scales)
        return out, flashinfer.natural_lse(lse)

    return run


def _prefill(backend: str) -> Callable[[Case, Library], Result]:
    def run(case: Case, lib: Library) -> Result:
        wrapper = lib.prefill(backend)
        wrapper.plan(**flashinfer.prefill_plan(case.batch, **case.heads, window_tokens=case.window_tokens))
        out, lse = wrapper.run(case.q, flashinfer.cache_of(*case.cache), return_lse=True, **case.scales)
        return out, flashinfer.natural_lse(lse)

    return run


def _ragged(backend: str) -> Callable[[Case, Library], Result]:
    def run(case: Case, lib: Library) -> Result:
        ragged = flashinfer.ragged_plan(case.batch, **case.heads, window_tokens=case.window_tokens)
        wrapper = lib.ragged(backend)
        wrapper.plan(**ragged.plan)
        cache = flashinfer.ragged_cache_of(*case.cache)
        out, lse = wrapper.run(case.q[ragged.order], *cache, return_lse=True)
        return out[ragged.inverse], flashinfer.natural_lse(lse)[ragged.inverse]

    return run


def _batch_attention(case: Case, lib: Library) -> Result:
    wrapper = lib.batch_attention()
    wrapper.plan(**flashinfer.batch_attention_plan(case.batch, **case.heads))
    out, lse = wrapper.run(case.q, flashinfer.cache_of(*case.cache), **case.scales)
    return out, flashinfer.natural_lse(lse)


def _cascade(case: Case, lib: Library) -> Result:
    cascade = case.batch.cascade(max_levels=99, min_tokens=1)
    wrapper = lib.cascade(len(cascade.levels))
    wrapper.plan(**flashinfer.cascade_plan(cascade, **case.heads))
    return wrapper.run(case.q, flashinfer.cache_of(*case.cache)), None


def _mla(case: Case, lib: Library) -> Result:
    ckv, kpe = case.cache
    width = ckv.shape[-1]
    how = {"head_dim_ckv": width, "head_dim_kpe": kpe.shape[-1], "scale": MLA_SCALE, "dtype": case.q.dtype}
    wrapper = lib.mla()
    form = {"wrapper": wrapper, "return_lse": True}
    wrapper.plan(**flashinfer_mla.mla_plan(case.batch, num_heads=case.q.shape[1], **how, **form))
    nope, pe = case.q[..., :width].contiguous(), case.q[..., width:].contiguous()
    out, lse = wrapper.run(**flashinfer_mla.mla_run(nope, pe, flashinfer_mla.mla_cache_of(ckv, kpe), **form))
    return out, flashinfer.natural_lse(lse)


def _new_kv(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Other numbers than the case's, to overwrite its new tokens with; the same at every call."""
    draw = torch.Generator().manual_seed(case.batch.num_new_tokens)
    k, v = torch.randn(2, case.batch.num_new_tokens, *case.cache[0].shape[2:], generator=draw).to(case.device)
    return k, v


def _stored(case: Case) -> torch.Tensor:
    """What the new tokens' places hold, and the block that padding reads, as numbers. Both padding rows write to one
    place, so those are left out.
    """
    real = case.batch.slot_mapping >= 2 * case.batch.block_size
    parts = [flat_tokens(c)[case.batch.slot_mapping[real]].double() for c in case.cache]
    if case.padded:
        parts += [flat_tokens(c)[: case.batch.block_size].double() for c in case.cache]
    return torch.cat(parts)


def _written(case: Case) -> Result:
    real = (case.batch.slot_mapping >= 2 * case.batch.block_size).cpu()
    dtype = case.cache[0].dtype
    parts = [to_cache_dtype(t, dtype).double().cpu()[real] for t in _new_kv(case)]
    if case.padded:
        parts += [torch.zeros(case.batch.block_size, *case.cache[0].shape[2:]).double()] * 2
    return torch.cat(parts), None


def _append(case: Case, lib: Library) -> Result:
    k, v = (to_cache_dtype(t, case.cache[0].dtype) for t in _new_kv(case))
    lib.append(k, v, paged_kv_cache=flashinfer.cache_of(*case.cache), **flashinfer.append_args(case.batch))
    return _stored(case), None


# ---- torch, FlashAttention, kvmem's own ------------------------------------------------------------------------------


def _write_kv(case: Case, lib: Library) -> Result:
    write_kv(case.cache, case.batch, *_new_kv(case))
    return _stored(case), None


def _sdpa(case: Case, lib: Library) -> Result:
    scale = case.q.shape[-1] ** -0.5 * case.scales.get("k_scale", 1.0)
    out = reference.sdpa(case.q, case.cache, case.batch, scale=scale, window_tokens=case.window_tokens)
    return out * case.scales.get("v_scale", 1.0), None


def _torch_flash(case: Case, lib: Library) -> Result:
    return lib.torch_flash(case.q, case.cache, case.batch, window_tokens=case.window_tokens)


def _fa2(case: Case, lib: Library) -> Result:
    form = "rows" if case.batch.rows is not None else "blocks"
    args = flash_attention.fa2_args(case.batch, form=form, window_tokens=case.window_tokens, return_lse=True)
    cache = map(flash_attention.plain, case.rows if form == "rows" else case.cache)
    out, lse, *_ = lib.fa2(flash_attention.fa2_query(case.q, case.batch), *cache, **args)
    return out.flatten(0, 1), flash_attention.natural_lse(lse)


def _fa2_varlen(case: Case, lib: Library) -> Result:
    args = flash_attention.fa2_varlen_args(case.batch, window_tokens=case.window_tokens, return_lse=True)
    out, lse, *_ = lib.fa2_varlen(case.q, *map(flash_attention.plain, case.cache), **args)
    return out, flash_attention.natural_lse(lse)


def _descale(case: Case) -> dict[str, torch.Tensor]:
    if not case.scales:
        return {}
    shape = case.batch.num_rows, case.cache[0].shape[2]
    scales = {"q_descale": 1.0, "k_descale": case.scales["k_scale"], "v_descale": case.scales["v_scale"]}
    return {name: torch.full(shape, value, device=case.device) for name, value in scales.items()}


def _fa3_fwd(case: Case, lib: Library) -> Result:
    args = flash_attention.fa3_fwd_args(case.batch, dtype=case.q.dtype, return_lse=True)
    out, lse, *_ = lib.fa3(case.q, *map(flash_attention.plain, case.rows), **args, **_descale(case))
    return out, flash_attention.natural_lse(lse)


def _fa3_blocks(case: Case, lib: Library) -> Result:
    args = flash_attention.fa3_args(case.batch, form="blocks", return_lse=True)
    out, lse, *_ = lib.fa3(case.q, *map(flash_attention.plain, case.cache), **args, **_descale(case))
    return out, flash_attention.natural_lse(lse)


def _fa3_varlen(case: Case, lib: Library) -> Result:
    args = flash_attention.fa3_varlen_args(case.batch, return_lse=True)
    out, lse, *_ = lib.fa3_varlen(case.q, *map(flat_tokens, case.cache), **args, **_descale(case))
    return out, flash_attention.natural_lse(lse)


def _fa4(form: flash_attention.Form) -> Callable[[Case, Library], Result]:
    def run(case: Case, lib: Library) -> Result:
        args = flash_attention_4.fa4_varlen_args(
            case.batch, head_dim=case.q.shape[-1], dtype=case.q.dtype, form=form, window_tokens=case.window_tokens,
            return_lse=True,
        )  # fmt: skip
        cache = map(flat_tokens if form == "rows" else flash_attention_4.plain, case.cache)
        out, lse = lib.fa4_varlen(case.q, *cache, **args)
        return out, flash_attention_4.natural_lse(lse)

    return run


ROWS, WINDOWS = ("virtual",), (None, 20)
DECODES = ("decode", "long decode")
FA3_MODELS: tuple[Model, ...] = (*((BF16, BF16, head) for head in HEADS), (FP8, FP8, 128))
FA3_MORE: tuple[Model, ...] = (*FA3_MODELS, (FP8, FP8, 64), (FP8, FP8, 256))
FA3_SWITCH = "KVMEM_GPU_FA3"
ONE: tuple[Model, ...] = ((BF16, BF16, 128),)
# fa3-fwd was built without fp16, windows and paging; FlashInfer's fa3 reads an 8-bit cache with 8-bit queries only.

#: What takes longest to compile is started first.
KERNELS = [
    Kernel("flashinfer prefill fa3", "flashinfer", ("flashinfer", "prefill"), _prefill("fa3"), ONE, PLAIN,
           switch=FA3_SWITCH),
    Kernel("flashinfer ragged fa3", "flashinfer", ("flashinfer", "ragged_fa3"), _ragged("fa3"), ONE, PLAIN,
           ("prefill", "mixed"), ROWS, pads=False, switch=FA3_SWITCH),
    Kernel("flashinfer prefill fa2", "flashinfer", ("flashinfer", "prefill"), _prefill("fa2")),
    Kernel("flashinfer ragged fa2", "flashinfer", ("flashinfer", "ragged_fa2"), _ragged("fa2"),
           (COMPILED[0], COMPILED[1], COMPILED[3]), PLAIN, ("prefill", "mixed"), ROWS, pads=False),
    Kernel("flashinfer BatchAttention", "flashinfer", ("flashinfer", "batch_attention"), _batch_attention, COMPILED[:3],
           steps=("mixed", "long decode")),
    Kernel("flashinfer MLA", "flashinfer", ("flashinfer_mla", "mla"), _mla, (MLA,), ((F16, F16, 512),),
           ("decode", "mixed"), block_sizes=(16, 64), kind="mla", expected=lambda c: c.expected(scale=MLA_SCALE)),
    Kernel("flashinfer decode", "flashinfer", ("flashinfer", "decode"), _decode(False), steps=DECODES),
    Kernel("flashinfer decode, tensor cores", "flashinfer", ("flashinfer", "decode"), _decode(True), steps=DECODES),
    Kernel("flashinfer cascade", "flashinfer", ("flashinfer", "cascade"), _cascade, COMPILED[:2], PLAIN,
           ("decode", "drafts"), block_sizes=(16,), kind="shared"),
    Kernel("flashinfer append", "flashinfer", ("flashinfer", "append"), _append, (*COMPILED[:2], (BF16, FP8, 128)),
           steps=("mixed",), expected=_written),
    Kernel("torch flash, rows", "torch", ("torch_ops", "flash"), _torch_flash, PLAIN, PLAIN,
           (*DECODES, "drafts", "prefill", "mixed"), ROWS, windows=WINDOWS),
    Kernel("torch flash, blocks", "torch", ("torch_ops", "flash"), _torch_flash, PLAIN, PLAIN,
           (*DECODES, "prefill", "mixed"), block_sizes=(256,), windows=WINDOWS),
    Kernel("fa3-fwd, rows", "fa3_fwd_interface", ("flash_attention", "fa3"), _fa3_fwd, FA3_MODELS, FA3_MORE,
           (*DECODES, "mixed"), ROWS),
    Kernel("fa3-fwd, varlen", "fa3_fwd_interface", ("flash_attention", "fa3"), _fa3_varlen, FA3_MODELS, FA3_MORE,
           ("prefill", "mixed"), ROWS),
    Kernel("FlashAttention 3, blocks", "flash_attn_interface", ("flash_attention", "fa3"), _fa3_blocks, FA3_MODELS,
           (*PLAIN, *FA3_MORE), (*DECODES, "mixed")),
    Kernel("FlashAttention 3, varlen", "flash_attn_interface", ("flash_attention", "fa3"), _fa3_varlen, FA3_MODELS,
           (*PLAIN, *FA3_MORE), ("prefill", "mixed"), ROWS),
    Kernel("FlashAttention 4, rows", "flash_attn.cute", ("flash_attention_4", "fa4"), _fa4("rows"), ONE, PLAIN,
           (*DECODES, "prefill", "mixed"), ROWS, windows=WINDOWS),
    Kernel("FlashAttention 4, blocks", "flash_attn.cute", ("flash_attention_4", "fa4"), _fa4("blocks"), ONE, PLAIN,
           (*DECODES, "prefill", "mixed"), windows=WINDOWS),
    Kernel("FlashAttention 2", "flash_attn", ("flash_attention", "fa2"), _fa2, PLAIN, PLAIN, (*DECODES, "drafts"),
           block_sizes=(256,), windows=WINDOWS, pads=False),
    Kernel("FlashAttention 2, varlen", "flash_attn", ("flash_attention", "fa2"), _fa2_varlen, PLAIN, PLAIN,
           ("prefill", "mixed"), block_sizes=(256,), windows=WINDOWS),
    Kernel("kvmem sdpa", "torch", ("torch_ops", "flash"), _sdpa, (*PLAIN, (BF16, FP8, 128)), EVERYTHING,
           windows=WINDOWS),
    Kernel("kvmem write_kv", "torch", ("torch_ops", "flash"), _write_kv, (*PLAIN[:2], (BF16, FP8, 128)),
           steps=("mixed",), expected=_written),
]  # fmt: skip
BY_NAME = {kernel.name: kernel for kernel in KERNELS}
