"""Random operations with kernels running: on a GPU in a process of its own, and the same program on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_stress import Stress, extend_chain
from kernel_cases import BACKENDS, one_thread

import kvmem
from kvmem.kernels.checks import all_tokens

__all__ = ["one_thread"]
ROOT = Path(__file__).resolve().parents[2]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.gpu
@pytest.mark.timeout(400)
@every_backend
def test_on_a_gpu(backend: str, seed: int, tables: list[str]) -> None:
    """``KVMEM_STRESS_SECONDS`` for more of it."""
    seconds = os.environ.get("KVMEM_STRESS_SECONDS", "8")
    command = [
        sys.executable,
        "tests/gpu/gpu_stress.py",
        "--backend",
        backend,
        "--seconds",
        seconds,
        "--seed",
        str(seed),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=float(seconds) + 120
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    tables.append(f"stress, {seconds} s, {done.stdout.splitlines()[-1]}")


@pytest.mark.usefixtures("one_thread")
@every_backend
def test_on_a_cpu(backend: str, seed: int) -> None:
    stress = Stress(device="cpu", backend=backend, seed=seed)
    stress.run(2.5)
    assert sum(stress.done.values()) > 20 and stress.done["extend"] > 0


@pytest.mark.usefixtures("one_thread")
@every_backend
def test_one_wrong_number_is_found(backend: str, seed: int) -> None:
    stress = Stress(device="cpu", backend=backend, seed=seed)
    one = opened(stress)
    stress.verify()
    batch = stress.alloc.batch([one.seq])
    slot = int(batch.block_table[0, 0]) * batch.block_size + 2
    for layer in range(3):  # a read looks at two of the six places, and finds it in both
        for name in ("k", "v"):
            all_tokens(stress.alloc.tensor(layer, name))[slot, 1, 3] ^= 1
    with pytest.raises(AssertionError, match="^2 tokens held something else"):
        stress.verify()


def opened(stress: Stress):
    stress.open()
    one = stress.live[0]
    stress.grow(one, [7] * 5)
    return one


def test_equal_prefixes_have_equal_patterns_and_others_do_not() -> None:
    ids = [5, 6, 5, 6]
    chain = extend_chain([], ids)
    assert chain == extend_chain([], ids[:2]) + extend_chain(chain[:2], ids[2:])
    assert len(set(chain)) == 4 and extend_chain([], [6, 5])[1] != chain[1]


def test_a_graph_may_write_past_what_was_mapped_at_capture() -> None:
    """``all_tokens`` reaches every address that is reserved, and not one more."""
    spec = kvmem.CacheSpec.kv(num_layers=3, num_kv_heads=2, head_dim=8, dtype=torch.float16, block_size=16)
    for backend in BACKENDS:
        for interleave in (1, 2, "all"):
            alloc = kvmem.Allocator(
                spec, backend=backend, device="cpu", memory="1MiB", max_sequences=2, max_tokens=300, page_bytes=4096,
                interleave=interleave,
            )  # fmt: skip
            with alloc.sequence() as seq:
                seq.extend(3)
                for layer in range(3):
                    for cache in alloc.kv(layer):
                        whole = all_tokens(cache)
                        end = (whole.storage_offset() + (len(whole) - 1) * whole.stride(0) + 16) * 2
                        held = whole.untyped_storage().nbytes()
                        assert whole.data_ptr() == cache.data_ptr() and len(whole) >= 600
                        assert held - whole.stride(0) * 2 < end <= held
