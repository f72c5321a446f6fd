"""What each kernel of kvmem's registry is tried on here, and what it should give."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_libraries import Result
from kernel_cases import BACKENDS, FP8, Case, step_of

from kvmem.kernels import registry
from kvmem.kernels.checks import flat_tokens
from kvmem.kernels.write import to_cache_dtype

Model = tuple[torch.dtype, torch.dtype, int]  # dtype of the queries, of the cache, size of a head

F16, BF16 = torch.float16, torch.bfloat16
HEADS = (64, 128, 256)
PLAIN: tuple[Model, ...] = tuple((dtype, dtype, head) for dtype in (F16, BF16) for head in HEADS)
#: Each model is a module to compile, up to a minute: each dtype and each head size at least once.
COMPILED: tuple[Model, ...] = ((BF16, BF16, 128), (F16, F16, 64), (BF16, FP8, 128), (F16, F16, 256))
EVERYTHING: tuple[Model, ...] = (*PLAIN, *((dtype, FP8, head) for dtype in (F16, BF16) for head in HEADS))
MLA: Model = (BF16, BF16, 512)
MLA_SCALE, MLA_KPE = 0.11, 64

DECODES = ("decode", "long decode")
#: By how many new tokens the rows may have.
STEPS = {"one": DECODES, "equal": (*DECODES, "drafts"), "any": (*DECODES, "prefill", "mixed")}


@dataclass(frozen=True)
class Trial:
    """A kernel of the registry and what it is tried on. What is not said follows from what the kernel needs.

    models: tried by default; more: with KVMEM_GPU_FULL=1. switch: an environment variable without which it is left out,
    being slow to compile.
    """

    kernel: registry.Kernel
    models: tuple[Model, ...] = ()
    more: tuple[Model, ...] = PLAIN
    steps: tuple[str, ...] = ()
    block_sizes: tuple[int, ...] = ()
    windows: tuple[int | None, ...] = ()
    switch: str = ""
    backends: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        needs = self.kernel
        derived: dict[str, Any] = {
            "models": tuple(m for m in PLAIN if not needs.dtypes or m[0] in needs.dtypes),
            "steps": STEPS[needs.queries],
            "block_sizes": tuple(size for size in (1, 16, 256) if size % needs.block_multiple == 0),
            "windows": (None, 20) if needs.windows else (None,),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, getattr(self, name) or value)
        object.__setattr__(self, "backends", ("virtual",) if needs.contiguous else tuple(BACKENDS))

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def kind(self) -> str:
        return self.kernel.kind

    @property
    def guard_place(self) -> str:
        return f'kvmem/kernels/registry.py "{self.name}": guard_tokens'

    @property
    def left_out(self) -> str:
        """Why this run does without the kernel; empty if it does not."""
        wanted = not self.switch or os.environ.get(self.switch) or os.environ.get("KVMEM_GPU_FULL")
        return "" if wanted else f"compiles for minutes: ask for it with {self.switch}=1 (or KVMEM_GPU_FULL=1)"

    def run(self, case: Case, library: Any) -> Result:
        """``(out, lse or None)``; of a kernel that writes, what it has written."""
        more = {"scale": MLA_SCALE, "head_dim_kpe": MLA_KPE} if self.kind == "mla" else {}
        if self.kind == "shared":
            more["cascade"] = case.batch.cascade(max_levels=99, min_tokens=1)
        cache = case.rows if self.kernel.reads == "rows" else case.cache
        run = self.kernel.prepare(library, step_of(case, workspace=getattr(library, "workspace", None), **more))
        if self.kind != "write":
            return run(case.q, cache)
        run(_new_kv(case), cache)
        return _stored(case), None

    def expected(self, case: Case) -> Result:
        """The same in float64."""
        if self.kind == "write":
            return _written(case)
        return case.expected(scale=MLA_SCALE) if self.kind == "mla" else case.expected()


# ---- What is written -------------------------------------------------------------------------------------------------


def _new_kv(case: Case) -> torch.Tensor:
    """``[2, T, H, D]``: other numbers than the case's, to overwrite its new tokens with; the same at every call."""
    draw = torch.Generator().manual_seed(case.batch.num_new_tokens)
    return torch.randn(2, case.batch.num_new_tokens, *case.cache[0].shape[2:], generator=draw).to(case.device)


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


# ---- What a GPU's time is too short for ------------------------------------------------------------------------------

FA3_MODELS: tuple[Model, ...] = (*((BF16, BF16, head) for head in HEADS), (FP8, FP8, 128))
FA3_MORE: tuple[Model, ...] = (*FA3_MODELS, (FP8, FP8, 64), (FP8, FP8, 256))
FA3_SWITCH = "KVMEM_GPU_FA3"
ONE: tuple[Model, ...] = ((BF16, BF16, 128),)
NO_WINDOW = (None,)
MANY = ("prefill", "mixed", "drafts", "long decode")
# fa3-fwd was built without fp16, windows and paging; FlashInfer's fa3 reads an 8-bit cache with 8-bit queries only.
CHOICES: dict[str, dict[str, Any]] = {
    "flashinfer prefill fa3": {"models": ONE, "steps": MANY, "windows": NO_WINDOW, "switch": FA3_SWITCH},
    "flashinfer ragged fa3": {"models": ONE, "steps": MANY[:2], "windows": NO_WINDOW, "switch": FA3_SWITCH},
    "flashinfer prefill fa2": {"models": COMPILED, "more": EVERYTHING, "steps": MANY, "windows": NO_WINDOW},
    "flashinfer ragged fa2": {"models": (*COMPILED[:2], COMPILED[3]), "steps": MANY[:2], "windows": NO_WINDOW},
    "flashinfer BatchAttention": {"models": COMPILED[:3], "more": EVERYTHING, "steps": ("mixed", "long decode")},
    "flashinfer MLA": {"models": (MLA,), "more": ((F16, F16, 512),), "steps": ("decode", "mixed"), "block_sizes": (16, 64)},
    "flashinfer decode": {"models": COMPILED, "more": EVERYTHING, "windows": NO_WINDOW},
    "flashinfer decode, tensor cores": {"models": COMPILED, "more": EVERYTHING, "windows": NO_WINDOW},
    "flashinfer cascade": {"models": COMPILED[:2], "steps": ("decode", "drafts"), "block_sizes": (16,)},
    "flashinfer append": {"models": (*COMPILED[:2], COMPILED[2]), "more": EVERYTHING, "steps": ("mixed",), "windows": NO_WINDOW},
    "torch flash, rows": {"steps": (*DECODES, "drafts", "prefill", "mixed")},
    "fa3-fwd, rows": {"models": FA3_MODELS, "more": FA3_MORE, "steps": (*DECODES, "mixed")},
    "fa3-fwd, varlen": {"models": FA3_MODELS, "more": FA3_MORE, "steps": MANY[:2]},
    "FlashAttention 3, blocks": {"models": FA3_MODELS, "more": (*PLAIN, *FA3_MORE), "steps": (*DECODES, "mixed"), "windows": NO_WINDOW},
    "FlashAttention 3, varlen": {"models": FA3_MODELS, "more": (*PLAIN, *FA3_MORE), "steps": MANY[:2], "windows": NO_WINDOW},
    "FlashAttention 4, rows": {"models": ONE},
    "FlashAttention 4, blocks": {"models": ONE},
    "FlashAttention 2, varlen": {"steps": MANY[:2]},
    "kvmem sdpa": {"models": (*PLAIN, COMPILED[2]), "more": EVERYTHING, "steps": MANY},
    "kvmem write_kv": {"models": (*PLAIN[:2], COMPILED[2]), "more": EVERYTHING, "steps": ("mixed",), "windows": NO_WINDOW},
}  # fmt: skip

#: What takes longest to compile is started first, as the registry has it.
TRIALS = [Trial(kernel, **CHOICES.get(kernel.name, {})) for kernel in registry.KERNELS if kernel.reads != "heads"]
BY_NAME = {trial.name: trial for trial in TRIALS}
