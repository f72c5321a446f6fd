"""cuda_driver.cpp line by line, over the stand-in for libcuda: every return code, every way a driver can be absent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support_drivers import ROOT, CudaStub, assert_runs, build_stub

from kvmem import _core
from kvmem.errors import DeviceError, OutOfMemory

ENTRIES = re.findall(r"ENTRY\((cu\w+),", (ROOT / "csrc/driver/cuda/cuda_api.h").read_text())
NOTHING = dict.fromkeys(
    ("reservations", "allocations", "mappings", "events", "streams", "contexts", "created_bytes", "physical_bytes"), 0
)


@pytest.fixture
def stub(tmp_path: Path) -> CudaStub:
    return CudaStub(build_stub(), tmp_path)


def scenario(stub: CudaStub) -> None:
    """Every verb once, on a driver of its own; what a failing verb leaves is left to the driver's destructor."""
    driver = stub.driver()
    size = driver.info.granularity_bytes
    assert driver.available_bytes() == driver.info.total_bytes
    base = driver.reserve(4 * size)
    page = driver.create(size)
    driver.map(base, size, 0, page)
    driver.set_access(base, size)
    driver.zero(base, size)
    driver.copy(base, base + size // 2, size // 2)
    driver.load(base + 16, b"sixteen bytes ok")
    assert driver.store(base + 16, 16) == b"sixteen bytes ok"
    driver.check_stream(0)
    event = driver.record()
    driver.order(event, driver.side_stream())
    driver.wait(event)
    assert driver.done(event)
    driver.forget(event)
    driver.unmap(base, size)
    driver.destroy(page)
    driver.release(base, 4 * size)


# ---- Return codes ----------------------------------------------------------------------------------------------------

# Called only where no exception may be thrown (the destructor) or to describe an error that is thrown anyway.
NEVER_RAISES = {
    "cuDevicePrimaryCtxRelease", "cuCtxGetDevice", "cuCtxSynchronize", "cuStreamDestroy", "cuEventDestroy",
    "cuGetErrorName", "cuGetErrorString",
}  # fmt: skip


def test_the_list_of_entry_points_was_read() -> None:
    assert len(ENTRIES) == 37 and {"cuMemMap", "cuMemSetAccess", *NEVER_RAISES} <= set(ENTRIES)


def test_the_scenario_calls_every_entry_point(stub: CudaStub) -> None:
    scenario(stub)
    quiet = {"cuGetErrorName", "cuGetErrorString", "cuCtxGetDevice", "cuCtxSynchronize"}  # errors; pages still mapped
    assert {call for call in ENTRIES if stub.calls(call) == 0} == quiet
    assert stub.held() == NOTHING


@pytest.mark.parametrize("code", [2, 999])
@pytest.mark.parametrize("call", sorted(set(ENTRIES) - NEVER_RAISES))
def test_every_return_code_is_looked_at(stub: CudaStub, call: str, code: int) -> None:
    """Each call of each entry point fails in turn: a typed error that names call and code, and nothing is leaked."""
    raised = 0
    for nth in range(1, 50):
        stub.fail(call, nth, code)
        try:
            scenario(stub)
        except OutOfMemory as error:
            assert code == 2
            assert f"{call} failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory)" in str(error)
        except DeviceError as error:
            assert (error.call, error.code) == (call, code) == (call, 999)
            assert f"{call} failed: CUDA_ERROR_UNKNOWN (unknown error)" in str(error)
        else:
            # Either the scenario makes fewer calls than that, or it was the destructor's, which must not throw, ...
            if stub.pending() or call in ("cuCtxPushCurrent", "cuCtxPopCurrent"):
                break
            # ... or it put a thread's capture mode back after what was asked for had been done.
            assert call == "cuThreadExchangeStreamCaptureMode" and stub.held() == NOTHING
            continue
        raised += 1
        assert stub.held() == NOTHING, f"a failing {call}, number {nth}, leaked"
    assert raised >= 1, f"no call of {call} was ever made to fail"


def test_a_failing_query_of_an_event_is_not_a_pending_one(stub: CudaStub) -> None:
    driver = stub.driver()
    event = driver.record()
    stub.fail("cuEventQuery", 1, 700)
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        driver.done(event)
    assert driver.done(event)


def test_an_error_without_a_name_still_has_its_number(stub: CudaStub) -> None:
    driver = stub.driver()
    stub.fail("cuMemCreate", 1, 12345)
    with pytest.raises(DeviceError, match="12345") as raised:
        driver.create(driver.info.granularity_bytes)
    assert raised.value.code == 12345


@pytest.mark.parametrize("call", sorted(NEVER_RAISES - {"cuGetErrorName", "cuGetErrorString", "cuCtxGetDevice"}))
@pytest.mark.parametrize("code", [4, 709, 999])
def test_the_destructor_survives_a_dead_device(stub: CudaStub, call: str, code: int) -> None:
    driver = stub.driver()
    size = driver.info.granularity_bytes
    driver.map(driver.reserve(size), size, 0, driver.create(size))
    driver.forget(driver.record(driver.side_stream()))
    stub.fail(call, 1, code)
    del driver
    assert stub.pending() == 0
    driver = stub.driver()
    for gone in (
        "cuMemUnmap",
        "cuMemRelease",
        "cuMemAddressFree",
        "cuEventDestroy",
        "cuStreamDestroy",
        "cuCtxPushCurrent",
    ):
        stub.fail(gone, 1, code)
    del driver


def test_the_destructor_gives_everything_back(stub: CudaStub) -> None:
    driver = stub.driver()
    size = driver.info.granularity_bytes
    base = driver.reserve(8 * size)
    driver.map_run(base, size, [driver.create(size) for _ in range(4)])
    driver.set_access(base, 4 * size)
    driver.zero(base, 4 * size)
    driver.forget(driver.record())
    driver.create(size)
    assert stub.held()["physical_bytes"] == 4 * size
    del driver
    assert stub.held() == NOTHING
    assert stub.calls("cuCtxSynchronize") == 1, "work in flight ends before its pages are unmapped"


def test_runs_that_fail_are_undone(stub: CudaStub) -> None:
    driver = stub.driver()
    size = driver.info.granularity_bytes
    base = driver.reserve(8 * size)
    pages = [driver.create(size) for _ in range(4)]
    for nth in range(1, 5):
        stub.fail("cuMemMap", nth, 2)
        with pytest.raises(OutOfMemory):
            driver.map_run(base, size, pages)
        assert stub.get("mappings") == 0
    driver.map_run(base, size, pages)
    driver.set_access(base, 4 * size)
    _core.write_bytes(base, b"0123" * size)
    for nth in range(1, 5):
        stub.fail("cuMemUnmap", nth, 999)
        with pytest.raises(DeviceError):
            driver.unmap_run(base, size, 4)
        assert stub.get("mappings") == 4
        assert _core.read_bytes(base, 4 * size) == b"0123" * size
    stub.fail("cuMemUnmap", 3, 999)
    stub.fail("cuMemMap", 1, 999)
    with pytest.raises(DeviceError, match="could not be undone"):
        driver.unmap_run(base, size, 4)


def test_a_run_is_unmapped_by_one_call_where_the_driver_takes_that(stub: CudaStub) -> None:
    stub.set("unmaps_runs", 1)
    driver = stub.driver()
    size = driver.info.granularity_bytes
    base = driver.reserve(8 * size)
    driver.map_run(base, size, [driver.create(size) for _ in range(6)])
    stub.fail("cuMemUnmap", 1, 999)
    with pytest.raises(DeviceError):
        driver.unmap_run(base, size, 4)
    assert stub.get("mappings") == 6
    with pytest.raises(DeviceError, match="is not made of mappings"):
        driver.unmap_run(base + 4 * size, size, 3)
    before = stub.calls("cuMemUnmap")
    driver.unmap_run(base, size, 4)
    driver.unmap(base + 4 * size, size)
    assert stub.calls("cuMemUnmap") - before == 2 and stub.get("mappings") == 1


def test_a_driver_that_refuses_a_run_is_asked_for_one_once(stub: CudaStub) -> None:
    driver = stub.driver()
    size = driver.info.granularity_bytes
    base = driver.reserve(8 * size)
    driver.map_run(base, size, [driver.create(size) for _ in range(8)])
    driver.unmap_run(base, size, 4)
    assert stub.calls("cuMemUnmap") == 1 + 4 and stub.get("mappings") == 4
    driver.unmap_run(base + 4 * size, size, 4)
    assert stub.calls("cuMemUnmap") == 1 + 8 and stub.get("mappings") == 0


# ---- No driver, or not enough of one ---------------------------------------------------------------------------------


def test_a_missing_library_is_a_clear_error(tmp_path: Path) -> None:
    path = str(tmp_path / "libnowhere.so")
    with pytest.raises(DeviceError, match="no CUDA driver: cannot open .*libnowhere.so.*KVMEM_CUDA_DRIVER"):
        _core.cuda_driver(0, path)


def test_a_library_that_is_not_a_driver_is_a_clear_error() -> None:
    with pytest.raises(DeviceError, match="no cuGetProcAddress"):
        _core.cuda_driver(0, "libc.so.6")


def test_the_library_is_the_argument_then_the_environment(stub: CudaStub, tmp_path: Path) -> None:
    code = """
        import sys
        from kvmem import _core
        from kvmem.errors import DeviceError
        assert _core.cuda_driver().info.granularity_bytes == 8192
        try:
            _core.cuda_driver(0, "/nonexistent/libcuda.so.1")
        except DeviceError as error:
            assert "/nonexistent/" in str(error)
            print("ok")
    """
    env = {"KVMEM_CUDA_DRIVER": str(stub.path), "KVMEM_STUB_GRANULARITY_BYTES": "8192"}
    assert assert_runs(code, env=env).strip() == "ok"


@pytest.mark.parametrize("symbol", ENTRIES)
def test_a_missing_entry_point_is_named(stub: CudaStub, symbol: str) -> None:
    stub.hide(symbol)
    message = (
        rf"has no {symbol} as of CUDA \d+\.\d: the driver is too old: it is for CUDA 13.0, kvmem needs .* CUDA 11.3"
    )
    with pytest.raises(DeviceError, match=message):
        stub.driver()
    assert stub.calls("cuInit") == 0


def test_a_driver_of_cuda_11_works(tmp_path: Path) -> None:
    """It has cuGetProcAddress with four arguments and no _v2."""
    old = CudaStub(build_stub("-DSTUB_OLD"), tmp_path)
    assert not hasattr(old.library, "cuGetProcAddress_v2")
    scenario(old)
    assert old.held() == NOTHING
    old.hide("cuMemMap")
    with pytest.raises(DeviceError, match="has no cuMemMap") as raised:
        old.driver()
    assert raised.value.code == 500


def test_no_device(stub: CudaStub) -> None:
    stub.set("devices", 0)
    with pytest.raises(DeviceError, match="no CUDA device: cuInit failed: CUDA_ERROR_NO_DEVICE") as raised:
        stub.driver()
    assert (raised.value.call, raised.value.code) == ("cuInit", 100)


@pytest.mark.parametrize("index", [2, -1, 100])
def test_a_device_that_does_not_exist(stub: CudaStub, index: int) -> None:
    stub.set("devices", 2)
    with pytest.raises(DeviceError, match=f"cuda:{index} does not exist: there are 2 CUDA devices") as raised:
        stub.driver(index)
    assert (raised.value.call, raised.value.code) == ("cuDeviceGet", 101)
    assert stub.driver(1).info.device_index == 1


def test_a_device_without_virtual_memory_management(stub: CudaStub) -> None:
    stub.set("vmm_supported", 0)
    with pytest.raises(DeviceError, match="cuda:0 has no virtual memory management"):
        stub.driver()
    assert stub.held() == NOTHING


# ---- Contexts, events, memory ----------------------------------------------------------------------------------------


def test_the_callers_context_stays_current(stub: CudaStub) -> None:
    """A caller with its own context, or none, finds its stack of contexts as it left it, on success and on failure."""
    driver = stub.driver()
    size = driver.info.granularity_bytes
    base = driver.reserve(size)
    driver.map(base, size, 0, driver.create(size))
    driver.set_access(base, size)
    driver.zero(base, size)
    driver.wait(driver.record())
    with pytest.raises(DeviceError):
        driver.zero(base - (1 << 42), size)
    assert stub.library.cuCtxPopCurrent_v2(None) == 201, "a context was left current"


def test_a_failed_record_keeps_no_event(stub: CudaStub) -> None:
    driver = stub.driver()
    with pytest.raises(DeviceError, match="cuStreamIsCapturing failed: CUDA_ERROR_INVALID_HANDLE"):
        driver.record(stream=0xDEAD)
    stub.fail("cuEventRecord", 1, 400)
    with pytest.raises(DeviceError, match="cuEventRecord failed: CUDA_ERROR_INVALID_HANDLE"):
        driver.record()
    driver.forget(driver.record())
    assert stub.get("events") == 1, "the event of the failed record is used again"


def test_events_are_reused(stub: CudaStub) -> None:
    driver = stub.driver()
    for _ in range(100):
        driver.forget(driver.record())
    assert stub.calls("cuEventCreate") == 1


def test_an_event_held_back_is_not_done_and_wait_blocks(stub: CudaStub) -> None:
    driver = stub.driver()
    stub.set("hold_events", 1)
    event = driver.record()
    assert not driver.done(event)
    waiter = threading.Thread(target=driver.wait, args=(event,))
    waiter.start()
    time.sleep(0.05)
    assert waiter.is_alive(), "wait returned before the event was done"
    stub.complete_events()
    waiter.join(5)
    assert not waiter.is_alive() and driver.done(event)


def test_out_of_memory_leaves_room_as_it_was(stub: CudaStub) -> None:
    stub.set("memory_bytes", 10 * 65536)
    driver = stub.driver()
    pages = [driver.create(65536) for _ in range(10)]
    with pytest.raises(OutOfMemory, match="holds 655360 of the device's 655360 bytes"):
        driver.create(65536)
    assert driver.available_bytes() == 0 and driver.physical_bytes() == 655360
    driver.destroy(pages.pop())
    assert driver.available_bytes() == 65536
    driver.create(65536)


def test_a_forked_child_is_refused(stub: CudaStub) -> None:
    out = assert_runs(f"""
        import os
        from kvmem import _core
        from kvmem.errors import DeviceError
        driver = _core.cuda_driver(0, {str(stub.path)!r})
        size = driver.info.granularity_bytes
        base = driver.reserve(size)
        page = driver.create(size)
        driver.map(base, size, 0, page)
        driver.set_access(base, size)
        child = os.fork()
        if child == 0:
            refused = 0
            for call in (lambda: driver.create(size), lambda: driver.unmap(base, size), lambda: driver.zero(base, 1),
                         driver.record, driver.available_bytes, lambda: driver.destroy(page)):
                try:
                    call()
                except DeviceError as error:
                    refused += "fork" in str(error)
            driver = None
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
        driver.zero(base, size)
        print("ok")
    """)
    assert out.strip() == "ok"


# ---- Against NVIDIA's header -----------------------------------------------------------------------------------------


def cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), nvcc and str(Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    found = [Path(root) / "include" for root in roots if root and (Path(root) / "include/cudaTypedefs.h").exists()]
    return found[0] if found else None


def test_our_prototypes_are_those_of_cuda_h() -> None:
    include, compiler = cuda_include(), os.environ.get("CXX") or shutil.which("c++")
    if not include or not compiler:
        pytest.skip("needs a compiler, and cuda.h of a CUDA toolkit (CUDA_HOME, nvcc or /usr/local/cuda)")
    command = [*compiler.split(), "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    source = ROOT / "tests/native/cuda_stub/check_abi.cpp"
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    swapped = [*command, "-DcuMemMap=cuMemUnmap", str(source)]
    wrong = subprocess.run(swapped, capture_output=True, text=True, timeout=120)
    assert wrong.returncode != 0, "the check cannot fail"
