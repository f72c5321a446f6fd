"""AlignedKV's kernels in Triton: against torch, in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aligned_cases import Held, flip_unread, record, spec

from kvmem.layouts.aligned import AlignedKV

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install -e .[triton]")
#: KV heads, query heads of each, width, new tokens, length: widths that are no power of two, incomplete blocks, GQA.
SHAPES = [(2, 1, 32, 1, 128), (2, 2, 32, 3, 133), (4, 2, 80, 2, 129), (1, 4, 64, 2, 63), (8, 1, 24, 8, 65)]


@pytest.mark.parametrize(("backend", "dtype"), [("virtual", torch.float16), ("paged", torch.bfloat16)], ids=str)
def test_triton_reads_what_torch_reads(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int, request: pytest.FixtureRequest
) -> None:
    """The same result up to rounding, the same bytes; and no unread bit matters. The interpreter has to be chosen before
    Triton is imported: so the test runs itself again in a process of its own.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        test = f"{Path(__file__)}::{request.node.name}"
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={seed}", test],
            env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=110,
        )  # fmt: skip
        assert run.returncode == 0 and "1 passed" in run.stdout, run.stdout + run.stderr
        return
    random, seen = torch.Generator().manual_seed(seed), record(monkeypatch)
    for heads, group, width, new, length in SHAPES:
        k, v = torch.randn(2, length, heads, width, generator=random)
        k[..., :3] *= 16
        q = torch.randn(new, heads * group, width, generator=random) * 2
        found = []
        for impl in ("torch", "triton"):
            layout = AlignedKV(spec(heads, width, dtype), impl=impl)
            held = Held(layout, backend, interleave="none", page_bytes=128 * heads * width)
            held.add(k, v)
            for causal in (True, False):
                found.append((*layout.attend(q, held.reader(), scale=0.3, causal=causal), held.reads()))
        for (out, lse, reads), (its_out, its_lse, its_reads) in zip(found[:2], found[2:], strict=True):
            torch.testing.assert_close(its_out, out, rtol=0, atol=2e-5 * float(v.abs().max()))
            torch.testing.assert_close(its_lse, lse, rtol=1e-5, atol=1e-4)
            assert its_reads == reads
        flip_unread(held, seen)
        again = layout.attend(q, held.reader(), scale=0.3, causal=False)
        assert all(torch.equal(a, b) for a, b in zip(again, found[-1], strict=False))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
def test_the_kernels_compile_for_gpus_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code of two generations of GPUs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from kvmem.layouts import aligned_triton

    types = {"out": "*fp32", "q": "*fp16", "weights": "*fp32", "blocks": "*u8", "ids": "*i64", "levels": "*i32"}
    types |= {"scale": "fp32", "block_bytes": "i64"}
    fixed = {"NEW": 2, "GROUP": 4, "WIDTH": 128, "CAUSAL": True}
    for kernel in (aligned_triton._score_block, aligned_triton._weigh_block):
        names = kernel.arg_names
        for generation, kind in ((80, tl.float16), (90, tl.bfloat16)):
            values = {name: value for name, value in (fixed | {"KIND": kind}).items() if name in names}
            signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(values, "constexpr")
            source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in values.items()})
            assert compile(source, target=GPUTarget("cuda", generation, 32)).asm["cubin"]
