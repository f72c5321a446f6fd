"""The measured device: its clock, captured graphs, and kernels that keep it busy."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

import torch

from kvmem import _core
from kvmem.bench.document import printed_by, version
from kvmem.bench.text import BenchError

Call = Callable[[], Any]
#: A timed region waits for this kernel, about 0.2 ms: the host queues the region meanwhile, so launches are not timed.
_HOLD_CYCLES = 400_000
_PACKAGES = ("flashinfer-python", "fa3-fwd", "triton")


class BenchDevice:
    """The CPU; `CudaDevice` says what differs on a GPU. kind: ``"cuda"`` or ``"cpu"``. captures: whether `capture`
    records a graph, or returns the call.
    """

    kind, name, captures = "cpu", "cpu", False
    torch_device = torch.device("cpu")

    def synchronize(self) -> None:
        """Waits for what is queued on the current stream, as a decoder does: not for the mapper's stream."""

    def capture(self, call: Call) -> Call:
        """``call`` to be repeated: on CUDA a graph of what it launches, recorded after one run to warm up."""
        return call

    def time_us(self, call: Call) -> float:
        """Microseconds of the device for what ``call`` launches."""
        begin = perf_counter_ns()
        call()
        return (perf_counter_ns() - begin) / 1e3

    def free_bytes(self) -> int:
        return 1 << 30  # tiny sizes only; the test machine's own memory is not the limit

    def facts(self) -> dict[str, Any]:
        """For the environment of a document: flat, JSON-ready."""
        return {"device": "cpu"}

    def driver(self) -> _core.Driver:
        return _core.host_driver()

    def load(self) -> KernelLoad | None:
        """Kernels on a stream of their own; None where there are no streams."""
        return None

    def give_back(self) -> None:
        """Frees what the last case has left."""
        gc.collect()


class CudaDevice(BenchDevice):
    kind, captures = "cuda", True

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise BenchError("torch sees no CUDA device; --device cpu --tiny runs the same code on the CPU")
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(index)
        self.name = torch.cuda.get_device_name(self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.current_stream().synchronize()

    def capture(self, call: Call) -> Call:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the mapper's thread may call the driver meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        return graph.replay

    def time_us(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_HOLD_CYCLES)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.torch_device)
        return {
            "device": found.name,
            "device_bytes": found.total_memory,
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "driver": next(
                iter(printed_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()), None
            ),
            "cuda": torch.version.cuda,
            **{name: version(name) for name in _PACKAGES},
        }

    def driver(self) -> _core.Driver:
        return _core.cuda_driver(self.torch_device.index)

    def load(self) -> KernelLoad:
        return KernelLoad()

    def give_back(self) -> None:
        super().give_back()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class KernelLoad:
    """Matrix products queued ahead on a stream of their own, so that no Python thread is busy during a measurement.

    8,192 cubed in bfloat16, about 1.4 ms each on an H100; 160 of them are queued, well under what a stream holds.
    """

    _SIDE, _BURST, _BURSTS = 8192, 20, 8

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._a, self._b = torch.randn(2, self._SIDE, self._SIDE, device="cuda", dtype=torch.bfloat16)
        self._out = torch.empty_like(self._a)
        self._events: deque[torch.cuda.Event] = deque()
        torch.cuda.synchronize()

    def top_up(self) -> None:
        """Queues as many as are missing."""
        while self._events and self._events[0].query():  # type: ignore[no-untyped-call]
            self._events.popleft()
        with torch.cuda.stream(self._stream):
            while len(self._events) < self._BURSTS:
                for _ in range(self._BURST):
                    torch.mm(self._a, self._b, out=self._out)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
                self._events.append(event)

    def busy(self) -> bool:
        """Whether kernels were running all the time since the last `top_up`."""
        return not self._events[-1].query()  # type: ignore[no-untyped-call]


def open_bench_device(name: str) -> BenchDevice:
    if name == "cpu":
        return BenchDevice()
    if name.partition(":")[0] == "cuda":
        return CudaDevice(int(name.partition(":")[2] or 0))
    raise BenchError(f'--device: got {name!r}; must be "cuda", "cuda:N" or "cpu"')
