"""What can go wrong with a CUDA device, over the stand-in for libcuda: typed errors that name the driver's call and code,
nothing changed, and the process lives.
"""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support_cuda import PAGE, as_libcuda, fresh_stub, on_stub, used
from support_drivers import CudaStub, assert_runs

import kvmem
from kvmem import DeviceError, OutOfMemory, PagePool, _core

pytestmark = pytest.mark.core


@pytest.fixture
def stub(tmp_path: Path) -> CudaStub:
    return fresh_stub(tmp_path)


def spec() -> kvmem.CacheSpec:
    return kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")


# ---- The driver ------------------------------------------------------------------------------------------------------


def test_a_driver_too_old_says_what_it_is_and_what_is_needed(stub: CudaStub) -> None:
    stub.set("driver_version", 11020)
    with pytest.raises(DeviceError, match="too old: it is for CUDA 11.2, kvmem needs one for CUDA 11.3 or l") as raised:
        stub.driver()
    assert raised.value.call == "cuDriverGetVersion" and stub.calls("cuInit") == 0
    stub.set("driver_version", 11030)
    stub.driver()
    stub.fail("cuDriverGetVersion", 1, 999)  # then its entry points decide
    stub.driver()


@pytest.mark.parametrize(
    ("code", "name", "hint"),
    [
        (34, "CUDA_ERROR_STUB_LIBRARY", "toolkit's stub"),
        (100, "CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES empty"),
        (101, "CUDA_ERROR_INVALID_DEVICE", "CUDA_VISIBLE_DEVICES name a device"),
        (802, "CUDA_ERROR_SYSTEM_NOT_READY", "fabricmanager"),
        (803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "different versions"),
        (804, "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "cuda-compat"),
        (999, "CUDA_ERROR_UNKNOWN", "nvidia-smi"),
        (12345, "12345", "nvidia-smi"),
    ],
)
def test_a_driver_that_does_not_start_says_why(stub: CudaStub, code: int, name: str, hint: str) -> None:
    stub.fail("cuInit", 1, code)
    with pytest.raises(DeviceError, match=f"cuInit failed: .*{name}.*{hint}") as raised:
        stub.driver()
    assert (raised.value.call, raised.value.code) == ("cuInit", code)


def test_a_device_that_is_not_there_or_cannot(stub: CudaStub) -> None:
    with as_libcuda(stub):
        with pytest.raises(DeviceError, match="cuda:7 does not exist: there are 1 CUDA devices") as raised:
            kvmem.Allocator(spec(), device="cuda:7", memory="1MiB", max_sequences=1, max_tokens=64)
        assert (raised.value.call, raised.value.code) == ("cuDeviceGet", 101)
        stub.set("vmm_supported", 0)
        with pytest.raises(DeviceError, match="cuda:0 has no virtual memory management") as raised:
            PagePool(device="cuda", memory="1MiB")
        assert raised.value.call == "cuDeviceGetAttribute"
    assert not any(stub.held().values())


# ---- Memory that is not there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("had", [0, 1, 7])
def test_another_process_takes_the_memory_meanwhile(stub: CudaStub, had: int) -> None:
    """Between the look and the last page: nothing is kept, and the message says what there was."""
    stub.set("memory_bytes", 64 * PAGE)
    stub.set("foreign_bytes", (56 if had == 7 else 0) * PAGE)
    stub.fail("cuMemCreate", had + 1, 2)
    message = (
        rf"cuMemCreate failed: CUDA_ERROR_OUT_OF_MEMORY.*\. {had * PAGE} of the {16 * PAGE} bytes asked for could be had "
        rf"and were given back; the device has {(8 if had == 7 else 64) * PAGE} bytes free now"
    )
    with as_libcuda(stub), pytest.raises(OutOfMemory, match=message):
        PagePool(device="cuda:0", memory=16 * PAGE)
    assert not any(stub.held().values()), "no page is kept"
    stub.set("foreign_bytes", 0)
    with as_libcuda(stub):
        PagePool(device="cuda:0", memory=16 * PAGE)


def test_growing_into_memory_that_another_process_has(stub: CudaStub, backend: str) -> None:
    alloc = on_stub(stub, backend, memory=20 * PAGE)
    seq = used(alloc, 100)
    before = alloc.stats()
    stub.set("memory_bytes", 64 * PAGE)
    stub.set("foreign_bytes", 30 * PAGE)
    for grow in (alloc.set_memory, alloc.pool.set_memory):
        with pytest.raises(OutOfMemory, match=f"{14 * PAGE} of the {20 * PAGE} bytes asked for could be had"):
            grow(40 * PAGE)
        stats = alloc.stats()
        assert (stats.budget_bytes, stats.created_bytes) == (before.budget_bytes, before.created_bytes)
        assert stub.get("created_bytes") == 20 * PAGE and alloc.check() == []
    seq.extend(50)
    alloc.set_memory(34 * PAGE)
    assert stub.get("created_bytes") == 34 * PAGE == alloc.stats().created_bytes


def test_pages_that_cannot_be_given_back_are_not_lost(stub: CudaStub) -> None:
    """Creating fails in the middle, and so does giving back one of the pages: the pool is poisoned, and its end frees
    them all.
    """
    with as_libcuda(stub):
        pool = PagePool(device="cuda:0", memory=4 * PAGE)
    stub.fail("cuMemCreate", 6, 2)
    stub.fail("cuMemRelease", 2, 999)
    for _ in range(2):
        with pytest.raises(DeviceError, match="create failed .cuMemCreate.*could not be undone .cuMemRelease.*Discard"):
            pool.set_memory(12 * PAGE)
    assert stub.get("created_bytes") == 8 * PAGE, "five, of which one was given back, and the four of before"
    del pool
    assert not any(stub.held().values())


@pytest.mark.parametrize("code", [2, 1, 999])
@pytest.mark.parametrize(
    "call", ["cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuStreamIsCapturing", "cuCtxPushCurrent"]
)
def test_a_run_of_maps_that_fails_in_the_middle(stub: CudaStub, backend: str, call: str, code: int) -> None:
    """Each call of the growth fails in turn. The error names it; nothing has changed; the next call works."""
    alloc = on_stub(stub, backend, map_ahead_tokens=0)
    seq = used(alloc, 30)
    mapped, failed = stub.get("mappings"), 0
    for nth in range(1, 100):
        stub.fail(call, nth, code)
        try:
            seq.extend(200)
        except OutOfMemory as error:
            assert code == 2 and f"{call} failed: CUDA_ERROR_OUT_OF_MEMORY" in str(error)
        except DeviceError as error:
            assert (error.call, error.code) == (call, code) != (call, 2)
        else:
            break
        failed += 1
        assert stub.pending() == 0
        assert seq.num_tokens == 30 and stub.get("mappings") == mapped and alloc.check() == []
        assert alloc.batch([seq]).seq_lens.tolist() == [30]
    # A page is mapped by a call of its own; access is set, and zeroes are written, for a run of them.
    assert failed >= (9 if call == "cuMemMap" else 1) and seq.num_tokens == 230 and alloc.check() == []


# ---- Ends ------------------------------------------------------------------------------------------------------------

DEATHS = {4: "DEINITIALIZED", 709: "CONTEXT_IS_DESTROYED", 700: "ILLEGAL_ADDRESS", 719: "LAUNCH_FAILED"}


def die(stub: CudaStub, backend: str, code: int) -> None:
    alloc = on_stub(stub, backend)
    live, gone = used(alloc, 100), used(alloc, 100)
    stub.hold_stream(0, True)  # work in flight that nobody will see the end of
    gone.free()
    stub.set("dead", code)
    calls: list[Callable[[], object]] = [
        lambda: live.extend(400),
        alloc.trim,
        lambda: alloc.set_memory(80 * PAGE),
        lambda: alloc.set_stream(0),
        alloc.stats,
    ]
    for call in calls:
        with pytest.raises(DeviceError, match=DEATHS[code]) as raised:
            call()
        assert raised.value.code == code and raised.value.call.startswith("cu")
    assert live.num_tokens == 100 and alloc.check() == []


@pytest.mark.parametrize("code", DEATHS)
def test_a_dead_context_is_an_error_and_then_an_end(stub: CudaStub, backend: str, code: int) -> None:
    die(stub, backend, code)
    gc.collect()
    assert stub.calls("cuDevicePrimaryCtxRelease") == 1, "the driver was not closed"


AT_EXIT = """
    import ctypes, os, sys, torch
    import kvmem
    from kvmem import _core

    def run(backend, dead, path):
        stub = ctypes.CDLL(path)
        stub.kvmem_stub_set(b"granularity_bytes", ctypes.c_longlong(4096))
        pool = kvmem.PagePool(memory=64 * 4096, page_bytes=4096, driver=_core.cuda_driver(0, path))
        spec = kvmem.CacheSpec.kv(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
        sizes = {"max_sequences": 4, "max_tokens": 900, "map_ahead_tokens": 64}
        alloc = kvmem.Allocator(spec, backend=backend, pool=pool, **sizes)
        seqs = [alloc.sequence() for _ in range(3)]
        for seq in seqs:
            seq.extend(50)
            seq.commit(count=50)
        seqs[0].free()
        stub.kvmem_stub_set(b"dead", ctypes.c_longlong(dead))
        return alloc, seqs

    for backend, dead in (("virtual", 0), ("paged", 4), ("virtual", 700), ("paged", 709)):
        child = os.fork()
        if child == 0:
            kept = run(backend, dead, PATH)
            sys.exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 0, (backend, dead, status)
    print("ok")
"""


def test_the_process_ends_well_whatever_is_left(stub: CudaStub) -> None:
    """Allocators that live until the interpreter ends: the driver is unloaded before them, or their context is dead."""
    assert assert_runs(f"PATH = {str(stub.path)!r}\n" + textwrap.dedent(AT_EXIT)).strip() == "ok"


def test_a_closed_driver_is_closed_once(stub: CudaStub) -> None:
    """The page pool goes before its driver, the driver before its allocator's tensors: in any order."""
    with as_libcuda(stub):
        driver = _core.cuda_driver(0)
        pool = PagePool(memory=4 * PAGE, page_bytes=PAGE, driver=driver)
    del driver
    assert stub.get("created_bytes") == 4 * PAGE and stub.get("contexts") == 1, "the pool keeps it"
    del pool
    assert not any(stub.held().values())
