"""Every kernel of the registry by hand, over what it says that it needs; and a kernel that is added by one file and one
entry."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu_cases import Config, case_of, configs
from gpu_kernels import PLAIN, Trial
from gpu_worker import judge
from kernel_by_hand import library_by_hand
from kernel_cases import make_case, one_thread, step_of
from support_drivers import CudaStub, build_stub

import kvmem
from kvmem.kernels import registry
from kvmem.memory.device import open_device

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")
#: Those over head-major blocks are tried as they are, in test_kernels_head_major.py.
EVERY = tuple(kernel for kernel in registry.KERNELS if kernel.reads != "heads")
every_kernel = pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.name)


def trial_of(kernel: registry.Kernel) -> Trial:
    """Small: what is by hand takes any head. Every pair of what the kernel takes meets at least once."""
    models = tuple((q, kv, 16) for q, kv, head in PLAIN if head == 64 and (not kernel.dtypes or q in kernel.dtypes))
    trial = Trial(kernel, models=models)
    if kernel.kind == "shared":
        return replace(trial, steps=("decode", "drafts"), block_sizes=(16,))
    steps = tuple(step for step in trial.steps if step != "long decode")
    return replace(trial, steps=steps if kernel.kind != "mla" else ("decode", "mixed"))


def check(trial: Trial, config: Config, seed: int) -> None:
    case = case_of(trial, config, "cpu", seed)
    error, allowed = judge(trial, case, trial.run(case, library_by_hand(trial.kernel.package)))
    assert error <= allowed, f"{trial.name}, {config}: off by {error:.3g}; {allowed:.3g} is allowed"


@every_kernel
def test_what_it_needs_is_enough(kernel: registry.Kernel, seed: int) -> None:
    trial = trial_of(kernel)
    for config in configs(trial):
        check(trial, config, seed)


@every_kernel
def test_what_it_cannot_do_is_refused(kernel: registry.Kernel, seed: int) -> None:
    """Each need is real: without it the adapter refuses the batch, and says why."""
    library = library_by_hand(kernel.package)
    if kernel.contiguous:
        paged = make_case("paged", "decode", seed=seed, dtype=torch.bfloat16)
        with pytest.raises(kvmem.SpecError, match=r"contiguous|block_size: got 16"):
            kernel.prepare(library, step_of(paged))(paged.q, paged.cache)
    if kernel.block_multiple > 1:
        paged = make_case("paged", "decode", seed=seed, dtype=torch.bfloat16)
        with pytest.raises(kvmem.SpecError, match="block_size: got 16; .* multiple of 256"):
            kernel.prepare(library, step_of(paged))
    if kernel.queries != "any":
        backend = "virtual" if kernel.contiguous else "paged"
        mixed = make_case(backend, "mixed", seed=seed, block_size=kernel.block_multiple * 16, dtype=torch.bfloat16)
        with pytest.raises(kvmem.SpecError, match="new token"):
            kernel.prepare(library, step_of(mixed))(mixed.q, mixed.rows if kernel.reads == "rows" else mixed.cache)
    if not kernel.windows and kernel.kind == "kv":
        windowed = make_case("virtual", "decode", window_tokens=20, seed=seed, dtype=torch.bfloat16)
        with pytest.raises(kvmem.SpecError, match=r"window"):
            kernel.prepare(library, replace(step_of(windowed), window_tokens=None))


def test_names_are_unique_and_modules_are_there() -> None:
    assert len({kernel.name for kernel in registry.KERNELS}) == len(registry.KERNELS)
    for kernel in registry.KERNELS:
        assert import_module(f"kvmem.kernels.{kernel.module}").__name__ == f"kvmem.kernels.{kernel.module}"
        assert registry.find(kernel.name) is kernel
    with pytest.raises(kvmem.SpecError, match="kernel: got 'FlashAttention 5'; must be one of flashinfer"):
        registry.find("FlashAttention 5")


def test_a_gpus_default_guard_is_enough_for_every_kernel(tmp_path: Path) -> None:
    default = open_device("cuda:0", driver=CudaStub(build_stub(), tmp_path).driver()).info.default_guard_tokens
    assert max(kernel.guard_tokens for kernel in EVERY) == default


def test_a_guard_that_is_too_short_is_refused() -> None:
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=16, dtype=torch.float16)
    sizes = {"device": "cpu", "memory": "1MiB", "max_sequences": 1, "max_tokens": 64}
    bare, guarded = kvmem.Allocator(spec, **sizes), kvmem.Allocator(spec, tail_guard_tokens=256, **sizes)
    for kernel in EVERY:
        registry.check_guard(guarded, kernel.name)
        if kernel.guard_tokens == 0:
            registry.check_guard(bare, kernel.name)
            continue
        with pytest.raises(kvmem.SpecError, match=re.escape(kernel.name) + ".*tail_guard_tokens=256"):
            registry.check_guard(bare, kernel.name)


# ---- A kernel that is added ------------------------------------------------------------------------------------------

ADAPTER = '''
"""Attention by a library of its own, which wants K and V of each sequence one after the other."""

import torch

from kvmem.kernels.blocks import batch_slots, gather_tokens


def prepare_dummy(library, step):
    slots, batch = batch_slots(step.batch), step.batch
    left = -1 if step.window_tokens is None else step.window_tokens - 1

    def run(q, cache):
        k, v = (gather_tokens(blocks, slots) for blocks in cache)
        return library.attend(q, k, v, batch.cu_seqlens_q.tolist(), batch.cu_seqlens_k.tolist(), left)

    return run
'''
LIBRARY = """
from itertools import pairwise

from kernel_oracle import attend as one, pack


def attend(q, k, v, cu_q, cu_k, left):
    spans = zip(pairwise(cu_q), pairwise(cu_k), strict=True)
    return pack([one(q[a:b], k[first:end], v[first:end], left=left) for (a, b), (first, end) in spans])
"""


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.Kernel:
    """One file, and one entry."""
    (tmp_path / "dummy.py").write_text(ADAPTER)
    (tmp_path / "dummy_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    adapter: ModuleType = import_module("dummy")
    kernel = registry.Kernel("dummy", "dummy", "dummy_library", adapter.prepare_dummy)
    monkeypatch.setattr(registry, "KERNELS", (*EVERY, kernel))
    yield kernel
    for name in ("dummy", "dummy_library"):
        sys.modules.pop(name, None)


def test_a_kernel_is_added_by_one_file_and_one_entry(added: registry.Kernel, seed: int) -> None:
    trial = trial_of(registry.find("dummy"))
    tried = configs(trial)
    assert {(c.backend, c.window) for c in tried} == {(b, w) for b in ("virtual", "paged") for w in (None, 20)}
    for config in tried:
        check(trial, config, seed)


def test_an_added_kernel_that_is_wrong_is_found_out(added: registry.Kernel, seed: int) -> None:
    """The cases have power: a window that is one token too long fails one of them."""

    def prepare(library: object, step: registry.Step) -> registry.Run:
        longer = None if step.window_tokens is None else step.window_tokens + 1
        return added.prepare(library, replace(step, window_tokens=longer))

    trial = trial_of(replace(added, prepare=prepare))
    with pytest.raises(AssertionError, match="dummy, .* window 20.*off by"):
        for config in configs(trial):
            check(trial, config, seed)
