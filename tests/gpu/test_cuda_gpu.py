"""On a real GPU: what the stand-in for libcuda cannot prove. ``make test-gpu`` runs these; each stands alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch

import kvmem
from kvmem import DeviceError, OutOfMemory, PagePool
from kvmem.arguments import as_int32

pytestmark = pytest.mark.gpu

MIB = 1 << 20
LONG_CYCLES = 400_000_000  # some tenths of a second of a kernel that does nothing


@pytest.fixture(params=["virtual", "paged"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    torch.cuda.synchronize()
    yield
    torch.cuda.synchronize()


def make(backend: str, **options: object) -> kvmem.Allocator:
    spec = kvmem.CacheSpec.kv(num_layers=2, num_kv_heads=8, head_dim=128, dtype=torch.float16)  # 8 KiB a token
    sizes = {"memory": 256 * MIB, "max_sequences": 4, "max_tokens": 16_384}
    return kvmem.Allocator(spec, backend=backend, device="cuda:0", **sizes | options)  # type: ignore[arg-type]


def busy(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Keeps a stream busy; the event passes at the end."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_CYCLES)
        event = torch.cuda.Event()
        event.record(stream)
    return event


def test_auto_leaves_the_margin_and_torchs_cache_alone() -> None:
    kept = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda:0")
    reserved = torch.cuda.memory_reserved(0)
    free, total = torch.cuda.mem_get_info(0)
    pool = PagePool(device="cuda:0", memory="auto")
    margin = max(512 * MIB, total // 50)
    assert abs(free - margin - pool.budget_bytes) < 128 * MIB, "but for what the context itself took meanwhile"
    assert abs(torch.cuda.mem_get_info(0)[0] - margin) < 128 * MIB
    assert torch.cuda.memory_reserved(0) == reserved
    del pool
    assert torch.cuda.mem_get_info(0)[0] > free - 128 * MIB, "all of it came back"
    assert kept.numel() == 64 * MIB


def test_stats_agree_with_torch(backend: str) -> None:
    kept = torch.empty(32 * MIB, dtype=torch.uint8, device="cuda:0")
    stats = make(backend).stats()
    assert stats.torch_allocated_bytes == torch.cuda.memory_allocated(0) >= kept.numel()
    assert stats.torch_reserved_bytes == torch.cuda.memory_reserved(0)
    assert stats.device_free_bytes is not None
    assert abs(stats.device_free_bytes - torch.cuda.mem_get_info(0)[0]) < 64 * MIB
    assert stats.created_bytes == 256 * MIB


def test_more_than_there_is(backend: str) -> None:
    free, total = torch.cuda.mem_get_info(0)
    with pytest.raises(
        OutOfMemory, match=r"cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY.*could be had.*bytes free now"
    ):
        make(backend, memory=total + 1024 * MIB, page_bytes=256 * MIB)
    assert abs(torch.cuda.mem_get_info(0)[0] - free) < 128 * MIB
    make(backend)
    with pytest.raises(DeviceError, match="cuda:99 does not exist") as raised:
        PagePool(device="cuda:99", memory="64MiB")
    assert (raised.value.call, raised.value.code) == ("cuDeviceGet", 101)


def test_fences_are_on_the_stream_that_torch_uses(backend: str) -> None:
    alloc, side = make(backend), torch.cuda.Stream()
    seq = alloc.sequence()
    seq.extend(4000)
    with torch.cuda.stream(side):
        alloc.batch([seq])
        assert alloc.pool.streams.handle == side.cuda_stream
        event = busy(side)
    seq.commit(count=4000)
    seq.free()
    assert not event.query(), "free() waited"
    alloc.trim()
    assert event.query(), "pages were unmapped before their last user had ended"
    alloc.set_stream(torch.cuda.current_stream())
    assert alloc.check() == []


def test_a_step_waits_for_nobody(backend: str) -> None:
    """Steps that map pages, while a stream that has nothing to do with them is busy: nothing waits for the device."""
    alloc, other = make(backend), torch.cuda.Stream()
    batch = alloc.make_batch(max_new_tokens=64)  # torch's own allocations come before
    seq = alloc.sequence()
    ids = as_int32("ids", [seq.id])
    for step in range(21):
        seq.extend(64)
        alloc.fill(ids, batch)
        seq.commit(count=64)
        if step == 0:  # warm
            torch.cuda.synchronize()
            event, begin = busy(other), time.monotonic()
    took = time.monotonic() - begin
    assert not event.query(), f"the steps took {took:.3f} s: as long as a kernel of another stream"


def test_a_graph_outlives_growth() -> None:
    """A captured kernel writes through an address of the cache; the sequence grows, others come and go, pages are
    unmapped and mapped; the replay still writes there, and zeroing is not part of it.
    """
    alloc = make("virtual", map_ahead_tokens=4096)
    seq = alloc.sequence()
    seq.extend(32)  # the mapper goes on beside the capture
    k = alloc.sequence_tensor(seq, 0, "k")
    k.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        k.add_(1)
    graph.replay()
    for tokens in (500, 3000, 6000):
        seq.extend(tokens)
        with alloc.sequence() as passing:
            passing.extend(2000)
            alloc.batch([passing])
        alloc.trim()
        graph.replay()
    torch.cuda.synchronize()
    assert alloc.sequence_tensor(seq, 0, "k").data_ptr() == k.data_ptr()
    assert bool((k == 4).all()) and alloc.check() == []


def test_growing_on_a_captured_stream_is_an_error_and_not_part_of_the_graph() -> None:
    alloc = make("virtual", map_ahead_tokens=0)
    seq = alloc.sequence()
    seq.extend(32)
    side = torch.cuda.Stream()
    alloc.set_stream(side)
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(8, device="cuda:0")
    with torch.cuda.graph(graph, stream=side):
        x.add_(1)
        with pytest.raises(DeviceError, match="is being captured into a graph"):
            seq.extend(8000)
    assert seq.num_tokens == 32 and alloc.check() == []
    graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == [1.0] * 8
    seq.extend(8000)


def test_streams_of_other_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    alloc, other = make("virtual"), torch.cuda.Stream(device=1)
    for stream in (other, other.cuda_stream):
        with pytest.raises(DeviceError, match="cuda:1|device 1"):
            alloc.set_stream(stream)


def test_pages_for_other_processes_and_adapters() -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-python")
    import kvmem.integrations.cuda_python

    device = kvmem.integrations.cuda_python.devices()[0]
    torch.zeros(1, device="cuda:0")
    assert device.virtual_memory and kvmem.integrations.cuda_python.current_device() == "cuda:0"
    if not device.posix_fd:
        with pytest.raises(DeviceError, match="POSIX_FILE_DESCRIPTOR"):
            PagePool(device="cuda:0", memory="64MiB", shareable=True)
        return
    pool = PagePool(device="cuda:0", memory="64MiB", shareable=True, rdma=device.rdma)
    fd = kvmem.integrations.cuda_python.export_fd(pool, 3)
    kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    code, handle = driver.cuMemImportFromShareableHandle(fd, kind)
    os.close(fd)
    assert int(code) == 0
    code, properties = driver.cuMemGetAllocationPropertiesFromHandle(handle)
    assert int(code) == 0 and int(properties.allocFlags.gpuDirectRDMACapable) == int(device.rdma)
    assert int(driver.cuMemRelease(handle)[0]) == 0


def test_the_stream_of_cuda_core() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-python")
    import kvmem.integrations.cuda_python

    alloc, side = make("virtual"), torch.cuda.Stream()
    alloc.set_stream(side)
    stream = kvmem.integrations.cuda_python.stream(alloc.pool)
    assert int(stream.handle) == side.cuda_stream
    alloc.set_stream(stream)
    assert alloc.pool.streams.handle == side.cuda_stream
