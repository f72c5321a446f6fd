"""The device under measurement: a clock, captured graphs, and kernels to keep it busy."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Protocol

import torch

from kvmem import _core
from kvmem.bench.errors import BenchError

__all__ = ["BenchDevice", "Call", "CpuDevice", "CudaDevice", "KernelLoad", "open_bench_device"]

Call = Callable[[], Any]
#: What a timed region waits behind, about 0.2 ms: the host queues the region meanwhile, so its launches are not in it.
_HOLD_CYCLES = 400_000


class BenchDevice(Protocol):
    """kind: ``"cuda"`` or ``"cpu"``. captures: whether `capture` records a graph, or hands the call back."""

    kind: str
    torch_device: torch.device
    captures: bool

    @property
    def name(self) -> str: ...

    def synchronize(self) -> None:
        """Waits for what is queued on the current stream, as a decoder does: not for the mapper's stream."""

    def capture(self, call: Call) -> Call:
        """``call`` to be repeated: on CUDA a graph of what it launches, recorded after one run to warm up."""

    def time_us(self, call: Call) -> float:
        """Microseconds of the device for what ``call`` launches."""

    def free_bytes(self) -> int: ...

    def driver(self) -> _core.Driver: ...

    def load(self) -> KernelLoad | None:
        """Kernels on a stream of their own; None where there are no streams."""

    def give_back(self) -> None:
        """Frees what the last case has left."""


class CudaDevice:
    kind, captures = "cuda", True

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise BenchError("torch sees no CUDA device; --device cpu --tiny runs the same code on the CPU")
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(index)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device)

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

    def driver(self) -> _core.Driver:
        return _core.cuda_driver(self.torch_device.index)

    def load(self) -> KernelLoad:
        return KernelLoad()

    def give_back(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class CpuDevice:
    kind, captures = "cpu", False
    torch_device = torch.device("cpu")
    name = "cpu"

    def synchronize(self) -> None:
        pass

    def capture(self, call: Call) -> Call:
        return call

    def time_us(self, call: Call) -> float:
        begin = perf_counter_ns()
        call()
        return (perf_counter_ns() - begin) / 1e3

    def free_bytes(self) -> int:
        return 1 << 30  # tiny sizes only; the test machine's own memory is not the limit

    def driver(self) -> _core.Driver:
        return _core.host_driver()

    def load(self) -> None:
        return None

    def give_back(self) -> None:
        gc.collect()


class KernelLoad:
    """Matrix products queued ahead on a stream of their own, so that no Python thread is busy while others are timed.

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
        return CpuDevice()
    if name.partition(":")[0] == "cuda":
        return CudaDevice(int(name.partition(":")[2] or 0))
    raise BenchError(f'--device: got {name!r}; must be "cuda", "cuda:N" or "cpu"')
