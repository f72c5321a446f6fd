"""The CUDA device under an allocator, over the stand-in for libcuda: properties of pages, memory="auto", streams, graphs."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support_cuda import MIB, PAGE, as_libcuda, blocks_until, fresh_stub, on_stub, used
from support_drivers import CudaStub

import kvmem
from kvmem import DeviceError, OutOfMemory, PagePool, SpecError
from kvmem.arguments import as_int32
from kvmem.memory import torch_cuda

pytestmark = pytest.mark.core

CUDA = torch.device("cuda", 0)


@pytest.fixture
def stub(tmp_path: Path) -> CudaStub:
    return fresh_stub(tmp_path)


# ---- What pages are --------------------------------------------------------------------------------------------------


def test_granularity_is_that_of_the_pages_asked_for(tmp_path: Path) -> None:
    stub = fresh_stub(tmp_path, 65536, rdma_granularity_bytes=4 * 65536, recommended_bytes=32 * 65536)
    assert stub.driver().info.granularity_bytes == 65536
    driver = stub.driver(rdma=True, shareable=True)
    info = driver.info
    assert (info.granularity_bytes, info.recommended_bytes) == (4 * 65536, 32 * 65536)
    assert info.rdma and info.shareable
    with pytest.raises(DeviceError, match="cuMemCreate failed: CUDA_ERROR_INVALID_VALUE"):
        driver.create(65536)  # what the plain granularity would have let through
    driver.destroy(driver.create(4 * 65536))
    with as_libcuda(stub):
        assert PagePool(device="cuda:0", memory="8MiB", rdma=True).page_bytes == 32 * 65536
        with pytest.raises(SpecError, match="maps multiples of 262144 bytes"):
            PagePool(device="cuda:0", memory="8MiB", rdma=True, page_bytes=65536)


@pytest.mark.parametrize(
    ("option", "setting", "attribute"),
    [
        ("shareable", "posix_fd_supported", "CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"),
        ("rdma", "rdma_supported", "CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED"),
    ],
)
def test_what_the_device_cannot_make_is_refused(stub: CudaStub, option: str, setting: str, attribute: str) -> None:
    stub.set(setting, 0)
    with as_libcuda(stub):
        with pytest.raises(DeviceError, match=f"leave out {option}=True .{attribute} is 0") as raised:
            PagePool(device="cuda:0", memory=4 * PAGE, **{option: True})
        assert raised.value.call == "cuDeviceGetAttribute"
        assert not any(stub.held().values())
        PagePool(device="cuda:0", memory=4 * PAGE)
    for device in ("cpu", "meta"):
        with pytest.raises(SpecError, match=f"driver of device '{device}' makes no such pages; leave out {option}"):
            PagePool(device=device, memory="1MiB", **{option: True})


# ---- memory="auto", and what is beside ours --------------------------------------------------------------------------


def test_auto_is_what_is_free_less_a_margin(tmp_path: Path) -> None:
    stub = fresh_stub(tmp_path, MIB, memory_bytes=1024 * MIB, foreign_bytes=100 * MIB)
    with as_libcuda(stub):
        pool = PagePool(device="cuda:0", memory="auto")
        assert pool.budget_bytes == (1024 - 100 - 512) * MIB == stub.get("created_bytes")
        stub.set("foreign_bytes", 300 * MIB)
        pool.set_memory("auto")
        assert pool.budget_bytes == (1024 - 300 - 512) * MIB, "what we hold counts as free"
        stub.set("foreign_bytes", 0)
        pool.set_memory("auto")
        assert pool.budget_bytes == 512 * MIB
        with pytest.raises(OutOfMemory, match="has 512 MiB free, of which 512 MiB is left to others"):
            PagePool(device="cuda:0", memory="auto")
        del pool
        stub.set("memory_bytes", 64 * 1024 * MIB)
        pool = PagePool(device="cuda:0", memory="auto", page_bytes=64 * MIB)
        assert 0 <= 64 * 1024 * MIB * 49 // 50 - pool.budget_bytes < 64 * MIB
        del pool
    assert not any(stub.held().values())
    for device in ("cpu", "meta"):
        with pytest.raises(SpecError, match=f'"auto", but device .{device}. does not report its free memory'):
            PagePool(device=device, memory="auto")


def test_stats_show_the_device_and_torch_beside_ours(stub: CudaStub, backend: str) -> None:
    stub.set("foreign_bytes", 7 * MIB)
    alloc = on_stub(stub, backend)
    stats = alloc.stats()
    assert stats.device_free_bytes == (1024 - 7) * MIB - alloc.pool.budget_bytes
    assert stats.created_bytes == stats.physical_bytes == 64 * PAGE
    spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")
    for device in ("cpu", "meta"):
        stats = kvmem.Allocator(spec, device=device, memory="4MiB", max_sequences=1, max_tokens=64).stats()
        assert (stats.device_free_bytes, stats.torch_allocated_bytes, stats.torch_reserved_bytes) == (None, None, None)


def test_what_torch_holds_is_read_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {kind: {"all": {"current": n, "peak": 99}} for kind, n in (("allocated_bytes", 3), ("reserved_bytes", 5))}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda where: held if where == CUDA else {})
    assert torch_cuda.allocator_bytes(CUDA) == (3, 5)
    held.clear()  # as before torch's first use of the device
    assert torch_cuda.allocator_bytes(CUDA) == (0, 0)


# ---- Streams ---------------------------------------------------------------------------------------------------------


def test_streams_as_people_have_them(stub: CudaStub, backend: str) -> None:
    alloc, one, two = on_stub(stub, backend), stub.stream(), stub.stream()
    for stream in (
        one,
        SimpleNamespace(cuda_stream=one, device=CUDA),
        SimpleNamespace(__cuda_stream__=lambda: (0, one)),
    ):
        alloc.set_stream(two)
        alloc.set_stream(stream)
        stub.trace()
        used(alloc, 20).free()
        assert f"record {one}" in stub.trace()
    for bad in ("1", 1.5, True, -1, object(), SimpleNamespace(__cuda_stream__=lambda: (3, one))):
        with pytest.raises(SpecError, match="stream"):
            alloc.set_stream(bad)
    with pytest.raises(SpecError, match="stream 2 means another stream in each thread"):
        alloc.set_stream(2)
    assert alloc.pool.streams.handle == one


def test_a_stream_of_another_device_is_refused_and_nothing_changes(stub: CudaStub, backend: str) -> None:
    stub.set("devices", 2)
    alloc, mine = on_stub(stub, backend), stub.stream()
    other_device = stub.driver(1)  # retains its context
    other = stub.stream(1)
    alloc.set_stream(mine)
    with pytest.raises(DeviceError, match="belongs to device 1, not to cuda:0 .cuStreamGetCtx.") as raised:
        alloc.set_stream(other)
    assert (raised.value.call, raised.value.code) == ("cuStreamGetCtx", 201)
    with pytest.raises(DeviceError, match="got one of cuda:1; must be one of cuda:0") as raised:
        alloc.set_stream(SimpleNamespace(cuda_stream=other, device=torch.device("cuda", 1)))
    assert raised.value.call == "torch.cuda.Stream.device"
    with pytest.raises(DeviceError, match="cuStreamGetCtx failed: CUDA_ERROR_INVALID_HANDLE"):
        alloc.set_stream(0xDEAD)
    stub.trace()
    used(alloc, 20).free()
    assert f"record {mine}" in stub.trace() and alloc.pool.streams.handle == mine
    assert stub.library.cuCtxPopCurrent_v2(None) == 201, "a context was left current"
    del other_device


def test_fences_follow_torchs_current_stream(stub: CudaStub, backend: str) -> None:
    """Every stream on which memory was handed out is minded, and the host waits only when memory is taken away."""
    first, second = stub.stream(), stub.stream()
    now = [first]
    alloc = on_stub(stub, backend, current=lambda: now[0], map_ahead_tokens=0)
    old = used(alloc, 300)
    stub.hold_stream(first, True)  # a kernel on the first stream that has not ended
    alloc.batch([old])
    now[0] = second
    alloc.kv(0)
    assert alloc.pool.streams.handle == second
    trace = stub.trace()
    assert trace[-2:] == [f"record {first}", f"wait {second}"], "the new stream goes on after the old one"
    child = old.fork()
    child.extend(1)
    trace = stub.trace()
    copied = trace.index(f"memcpy {second}")
    assert f"wait {second}" in trace[:copied], "what the first stream still writes is copied after it"
    child.free()
    old.free()
    trace = stub.trace()
    assert trace[-3:] == [f"record {first}", f"wait {second}", f"record {second}"]
    assert not any(line.startswith(("synchronize", "device-wide", "unmap")) for line in trace)
    blocks_until(alloc.trim, lambda: stub.hold_stream(first, False))
    assert alloc.stats().mapped_bytes <= 2 * PAGE and alloc.check() == []


def test_a_named_stream_is_the_only_one(stub: CudaStub, backend: str) -> None:
    current, named = stub.stream(), stub.stream()
    now = [current]
    alloc = on_stub(stub, backend, current=lambda: now[0])
    used(alloc, 40)
    alloc.set_stream(named)
    stub.trace()
    used(alloc, 40).free()
    lines = stub.trace()
    assert not any(str(current) in line for line in lines) and f"record {named}" in lines
    alloc.set_stream(None)
    used(alloc, 40)
    assert alloc.pool.streams.handle == current, "torch is followed again"


def test_a_step_asks_torch_and_the_driver_nothing_else(stub: CudaStub, backend: str) -> None:
    """Steady decoding: no call of any kind reaches libcuda, not even those that make its context current."""
    asked = []
    stream = stub.stream()
    alloc = on_stub(stub, backend, current=lambda: asked.append(1) or stream, map_ahead_tokens=0)
    warm = used(alloc, 400)
    warm.free()
    seq = used(alloc, 40)
    ids, ones = (as_int32("x", [x]) for x in (seq.id, 1))
    batch = alloc.make_batch(max_new_tokens=4)
    names = ("cuCtxPushCurrent", "cuEventRecord", "cuEventQuery", "cuMemMap", "cuMemsetD8Async", "cuStreamIsCapturing")
    before = [stub.calls(name) for name in names]
    stub.trace()
    asked.clear()
    for _ in range(100):
        alloc.extend_batch(ids, ones)
        alloc.fill(ids, batch)
        alloc.commit_batch(ids, ones)
    assert [stub.calls(name) for name in names] == before and stub.trace() == []
    assert len(asked) == 100


def test_steps_under_pressure_wait_for_no_more_than_they_take(stub: CudaStub, backend: str) -> None:
    """Sequences come and go in a pool that is too small for what they leave: pages are unmapped behind the events of
    their last users, and nothing waits for the device.
    """
    alloc = on_stub(stub, backend, memory=13 * PAGE, map_ahead_tokens=0)
    stub.trace()
    for _ in range(20):  # one long, then several short: what one leaves does not fit the others
        used(alloc, 200).free()
        for seq in [used(alloc, 50) for _ in range(4)]:
            seq.free()
    trace = stub.trace()
    assert "device-wide" not in trace and stub.calls("cuCtxSynchronize") == 0
    synchronised = [line for line in trace if line.startswith("synchronize")]
    assert len(synchronised) <= 100, "one event for a free at most"
    assert alloc.check() == []
    if backend == "paged":  # its blocks are used again where they are: nothing to unmap or wait for
        assert not any(line.startswith("unmap") for line in trace) and not synchronised
        return
    assert any(line.startswith("unmap") for line in trace)
    # A device that is busy with the one freed last keeps nobody from the pages of the one freed before.
    stream = stub.stream()
    alloc.set_stream(stream)
    first, second = used(alloc, 100), used(alloc, 100)
    first.free()
    stub.hold_stream(stream, True)
    second.free()
    stub.trace()
    alloc.trim(alloc.stats().free_bytes + PAGE)  # a wait for the held event would be an error after 10 seconds
    assert any(line.startswith("unmap") for line in stub.trace())
    blocks_until(alloc.trim, lambda: stub.hold_stream(stream, False))


def test_mapping_ahead_does_not_queue_behind_kernels(stub: CudaStub) -> None:
    """The mapper zeroes on a stream of its own: with a kernel that never ends, a sequence still grows past what was
    mapped when it began.
    """
    stream = stub.stream()
    alloc = on_stub(stub, "virtual", current=lambda: stream, map_ahead_tokens=64)
    seq = used(alloc, 20)
    stub.trace()
    stub.hold_stream(stream, True)
    end = time.monotonic() + 5
    while seq.num_tokens < 200 and time.monotonic() < end:
        seq.extend(1)
        alloc.batch([seq])
        time.sleep(0.001)
    assert seq.num_tokens == 200
    trace = stub.trace()
    assert sum(line.startswith("memset") for line in trace) >= 2  # neighbouring pages are zeroed by one call
    assert f"memset {stream}" not in trace, "the step itself had to zero"
    stub.hold_stream(stream, False)


# ---- Graphs ----------------------------------------------------------------------------------------------------------


def test_a_graph_outlives_growth(stub: CudaStub, backend: str) -> None:
    """Addresses that a captured graph holds stay right while sequences grow and pages come and go."""
    alloc = on_stub(stub, backend)
    seq = used(alloc, 10)
    base, arena = alloc.kv(0)[0].data_ptr(), alloc.core.arena_bytes(0, 0)
    seq.extend(500)
    other = used(alloc, 100)
    other.free()
    alloc.trim()
    assert alloc.kv(0)[0].data_ptr() == base
    assert alloc.sequence_tensor(seq, 2, "v").shape[0] == 510
    del arena


def test_a_capture_is_neither_written_to_nor_spoiled(stub: CudaStub, backend: str) -> None:
    main, graph = stub.stream(), stub.stream()
    now = [main]
    alloc = on_stub(stub, backend, current=lambda: now[0], map_ahead_tokens=0)
    seq = used(alloc, 20)
    now[0] = graph
    stub.capture(graph, True)
    stub.trace()
    batch = alloc.batch([seq])  # metadata of the step that is captured
    assert alloc.pool.streams.handle == main, "what is captured does not run now"
    used(alloc, 150).free()  # another thread's step, say
    alloc.trim()
    assert not any(line.startswith("captured") for line in stub.trace()) and stub.get("spoiled_captures") == 0
    stub.capture(graph, False)
    alloc.fill(as_int32("ids", [seq.id]), batch)
    assert alloc.pool.streams.handle == graph
    stub.capture(graph, True)
    before = (seq.num_tokens, alloc.stats().mapped_bytes)
    with pytest.raises(DeviceError, match="is being captured into a graph") as raised:
        seq.extend(300)
    assert raised.value.code == 900 and alloc.check() == []
    assert (seq.num_tokens, alloc.stats().mapped_bytes) == before
    stub.capture(graph, False)
    seq.extend(300)
    assert stub.get("spoiled_captures") == 0 and alloc.check() == []


def test_nothing_spoils_a_capture_of_somebody_else(stub: CudaStub, backend: str) -> None:
    """Pages are made, mapped, unmapped and given back, by this thread and by the mapper's, while another library captures
    a stream of its own; and at last the collector takes the allocator.
    """
    graph = stub.stream()
    stub.capture(graph, True)
    alloc = on_stub(stub, backend, map_ahead_tokens=50)
    seq = used(alloc, 100)
    used(alloc, 200).free()
    alloc.trim()
    alloc.set_memory(32 * PAGE)
    alloc.set_memory(64 * PAGE)
    seq.extend(200)
    assert alloc.check() == []
    del seq, alloc
    gc.collect()
    assert stub.get("spoiled_captures") == 0 and stub.get("mappings") == stub.get("allocations") == 0


def test_the_default_stream_while_one_that_waits_for_it_is_captured(stub: CudaStub, backend: str) -> None:
    """The driver's answer to any question about stream 0 is then CUDA_ERROR_STREAM_CAPTURE_IMPLICIT."""
    alloc = on_stub(stub, backend, map_ahead_tokens=0)
    seq = used(alloc, 20)
    stub.fail("cuStreamIsCapturing", 1, 906)
    with pytest.raises(DeviceError, match="stream 0 is being captured into a graph, by way of one") as raised:
        seq.extend(300)
    assert raised.value.code == 900 and seq.num_tokens == 20 and alloc.check() == []
    seq.extend(300)
