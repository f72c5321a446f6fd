"""A CUDA device that is the stand-in for libcuda, for tests of the allocator and the pool on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import make_allocator, plain
from support_drivers import CudaStub, build_stub

import kvmem
from kvmem.memory import torch_cuda
from kvmem.memory.streams import Streams

PAGE = 4096  # plain(16) has 192 bytes a token: 21.3 tokens a page
MIB = 1 << 20


def fresh_stub(folder: Path, granularity: int = PAGE, **settings: int) -> CudaStub:
    stub = CudaStub(build_stub(), folder)
    for name, value in {"granularity_bytes": granularity, **settings}.items():
        stub.set(name, value)
    return stub


def on_stub(
    stub: CudaStub, backend: str, *, current: Callable[[], int] | None = None, **options: Any
) -> kvmem.Allocator:
    """An allocator over the stand-in. ``current`` plays torch's current stream."""
    sizes = {"memory": 64 * PAGE, "page_bytes": PAGE, "max_tokens": 600, "tail_guard_tokens": 0}
    alloc = make_allocator(plain(16), backend, driver=stub.driver(), **sizes | options)
    handle = partial(torch_cuda.stream_handle, torch.device("cuda", 0))
    seen = replace(alloc.pool.device, current_stream=current, stream_handle=handle)
    alloc.pool.streams = Streams(alloc.pool.core, seen)
    return alloc


@contextmanager
def as_libcuda(stub: CudaStub) -> Iterator[None]:
    """``device="cuda:N"`` opens the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMEM_CUDA_DRIVER", str(stub.path))
        yield


def used(alloc: kvmem.Allocator, tokens: int) -> kvmem.Sequence:
    """A sequence whose tokens kernels may be reading."""
    sequence = alloc.sequence()
    sequence.extend(tokens)
    alloc.batch([sequence])
    sequence.commit(count=tokens)
    return sequence


def blocks_until(call: Callable[[], Any], let_go: Callable[[], Any]) -> None:
    """``call`` blocks, and returns once ``let_go`` has been called."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call)
        done, _ = wait([running], timeout=0.1)
        let_go()
        running.result(timeout=5)
    assert not done, "it did not wait"
