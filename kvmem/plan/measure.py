"""The rates of this machine, measured with the calls that a step of module batching makes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kvmem.allocator import Allocator
from kvmem.arguments import brief, check_members, check_size
from kvmem.errors import SpecError
from kvmem.kernels.write import write_kv
from kvmem.plan.clock import Link
from kvmem.plan.hardware import HardwareProfile, MatmulRate, ModelShape
from kvmem.plan.module_step import AttendStaged, attend_in_place, attend_staged
from kvmem.plan.staging import StagingRing, open_device
from kvmem.spec import CacheSpec
from kvmem.spec.dtypes import dtype_name, parse_dtype

if TYPE_CHECKING:
    from kvmem.arguments import Handles

__all__ = ["filled_sequences", "profile"]

_ROWS = (1, 4, 16, 64, 256, 1024)
_BLOCK = 16
_BEYOND_CACHES = 64 << 20  # bytes of weights that are used in turn, so that they come from memory
_KV_BYTES = 32 << 20  # of the sequences that are attended together, as far as 4 to 32 of them have as many


def profile(
    device: torch.device | str = "cpu", *, model: ModelShape, device_bytes: int, host_bytes: int, context: int = 1024,
    dtypes: tuple[torch.dtype, ...] | None = None, repetitions: int = 7, attend: AttendStaged = attend_staged,
    clock: Callable[[], float] = perf_counter,
) -> HardwareProfile:  # fmt: skip
    """A ``HardwareProfile`` of this machine; each time is the median of ``repetitions``.

    device: ``"cuda:N"``, or ``"cpu"``, where copies between two places of its memory stand for the links. model: its
    widths, heads and dtype are those that are measured, with random values. device_bytes, host_bytes: what plans may
    use. context: tokens of the longer of two lengths of sequences. dtypes: of the matmul rates, default the model's.
    attend: as ``ModuleStep(attend=)``. clock: in seconds; ``time.thread_time`` for the CPU and one thread of a machine
    that others use too.

    Rates and latencies are the line through the times of two sizes. Run it while the machine does nothing else, with
    as many threads as the plan is for (``torch.set_num_threads``). Cost: seconds. ``SpecError`` for sizes that are no
    sizes, ``DeviceError`` if there is no such device.
    """
    if not isinstance(model, ModelShape):
        raise SpecError(f"model: got {brief(model)}; must be a ModelShape")
    kinds = check_members("dtypes", (model.dtype,) if dtypes is None else dtypes, torch.dtype)
    for kind in kinds:
        if not kind.is_floating_point or kind.itemsize == 1:
            raise SpecError(f"dtypes: got {kind}; torch multiplies matrices of floats of 16 to 64 bits")
    check_size("context", context, 2 * _BLOCK), check_size("repetitions", repetitions)
    check_size("device_bytes", device_bytes), check_size("host_bytes", host_bytes)
    place = open_device(device)
    timer = _Timer(place, repetitions, clock)
    rates = tuple(_matmul(timer, model, dtype, rows) for dtype in kinds for rows in _ROWS)
    to_device, to_host, on_device, on_cpu = _attention(timer, model, context, attend)
    one = torch.ones(1, 1, dtype=parse_dtype(model.dtype), device=place)
    return HardwareProfile(
        name="cpu" if place.type == "cpu" else torch.cuda.get_device_name(place),
        device_bytes=device_bytes, host_bytes=host_bytes, to_device=to_device, to_host=to_host,
        device_memory=_passes(timer, one.dtype), device_attention=on_device, cpu_attention=on_cpu, matmul=rates,
        matmul_seconds=timer.seconds(lambda: one @ one)[0], concurrent=place.type != "cpu",
    )  # fmt: skip


class _Timer:
    def __init__(self, device: torch.device, repetitions: int, clock: Callable[[], float]) -> None:
        self.device, self.repetitions, self.clock = device, repetitions, clock

    def seconds(self, *calls: Callable[[], object]) -> list[float]:
        """Of each; they take turns, so that a slow moment of the machine affects all of them."""
        times: list[list[float]] = [[] for _ in calls]
        for repetition in range(2 + self.repetitions):
            for call, own in zip(calls, times, strict=True):
                self._wait()
                begin = self.clock()
                call()
                self._wait()
                if repetition >= 2:
                    own.append(self.clock() - begin)
        return [max(median(own), 1e-9) for own in times]  # a clock may not have moved

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def line(self, name: str, small: _Case, large: _Case) -> Link:
        """Through the times of two amounts, ``times`` of each at once."""
        found = zip((small, large), self.seconds(small.call, large.call), strict=True)
        (few, first), (many, second) = ((case.bytes, seconds / case.times) for case, seconds in found)
        if second <= first:  # too noisy, or too small to tell apart
            return Link(name, many / second)
        rate = (many - few) / (second - first)
        return Link(name, rate, max(0.0, first - few / rate))


class _Case(NamedTuple):
    """``call`` does ``times`` things of ``bytes`` each."""

    bytes: int
    times: int
    call: Callable[[], object]


def _matmul(timer: _Timer, model: ModelShape, dtype: torch.dtype, rows: int) -> MatmulRate:
    shape = (model.hidden, model.expert_hidden)
    size = shape[0] * shape[1] * dtype.itemsize
    number = max(2, min(model.num_layers * model.num_experts * 3, _BEYOND_CACHES // size))
    weights = cycle([torch.ones(shape, dtype=dtype, device=timer.device) for _ in range(number)])
    x = torch.ones(rows, shape[0], dtype=dtype, device=timer.device)
    (seconds,) = timer.seconds(lambda: x @ next(weights))
    return MatmulRate(dtype_name(dtype), rows, 2 * rows * shape[0] * shape[1] / seconds)


def _passes(timer: _Timer, dtype: torch.dtype) -> Link:
    """One kernel that reads two tensors and writes one."""

    def case(elements: int) -> _Case:
        a, b, c = (torch.ones(elements, dtype=dtype, device=timer.device) for _ in "abc")
        return _Case(3 * elements * dtype.itemsize, 1, lambda: torch.add(a, b, out=c))

    return timer.line("device_memory", case(256), case(2 << 20))


def _attention(timer: _Timer, model: ModelShape, context: int, attend: AttendStaged) -> list[Link]:
    """Both links and both attentions, over sequences of two lengths in an allocator on the CPU."""
    spec = CacheSpec.kv(
        num_layers=1, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, dtype=model.dtype, block_size=_BLOCK
    )
    longest = -(-context // _BLOCK) * _BLOCK
    number = max(4, min(32, _KV_BYTES // (longest * spec.bytes_per_token)))
    memory = 2 * (number + 1) * (longest + _BLOCK) * spec.bytes_per_token + (4 << 20)
    with Allocator(
        spec, backend="paged", device="cpu", memory=memory, max_sequences=2 * number + 1, max_tokens=longest,
        interleave="none",
    ) as host:  # fmt: skip
        ring = StagingRing(host, blocks=number * longest // _BLOCK, device=timer.device)
        one, short, long = (
            _Sequences(host, ring, model, n, tokens) for n, tokens in ((1, 1), (number, _BLOCK), (number, longest))
        )
        return [
            timer.line("to_device", one.case(one.fetch, 1), long.case(long.fetch, 1)),
            timer.line("to_host", one.new(), long.new()),
            timer.line("device_attention", *(some.case(some.on_device(attend), number) for some in (short, long))),
            timer.line("cpu_attention", *(some.case(some.on_cpu, number) for some in (short, long))),
        ]


class _Sequences:
    """Sequences of equal length with random KV, whose last token is new."""

    def __init__(self, host: Allocator, ring: StagingRing, model: ModelShape, number: int, tokens: int) -> None:
        self.host, self.ring, self.number = host, ring, number
        ids = filled_sequences(host, number, tokens - 1)
        host.extend_batch(ids, np.ones_like(ids))
        self.batch = host.batch(ids)
        self.part = ring.micro_batch(self.batch)
        self.bytes = tokens * host.spec.bytes_per_token
        k, v = host.kv(0)
        self.q_cpu = torch.randn(number, model.num_query_heads, model.head_dim).to(k.dtype)
        self.k, self.v = (torch.randn(number, *part.shape[2:]).to(ring.device, part.dtype) for part in (k, v))
        self.q = self.q_cpu.to(ring.device)

    def case(self, call: Callable[[], object], times: int) -> _Case:
        return _Case(self.bytes * self.number // times, times, call)

    def fetch(self) -> None:
        staged = self.ring.fetch(0, self.part)
        staged.write(self.k, self.v)
        staged.release()

    def on_device(self, attend: AttendStaged) -> Callable[[], object]:
        staged = self.ring.fetch(0, self.part)
        return lambda: attend(self.q, staged, None)

    def on_cpu(self) -> None:
        attend_in_place(self.q_cpu, self.host, 0, self.batch, None)

    def new(self) -> _Case:
        """The new tokens on their way back."""

        def write() -> None:
            write_kv(self.host.kv(0), self.batch, self.k.to("cpu"), self.v.to("cpu"))

        return _Case(self.number * self.host.spec.bytes_per_token, 1, write)


def filled_sequences(host: Allocator, number: int, tokens: int) -> Handles:
    """Handles of new sequences with so many committed tokens of random K and V, in every layer."""
    ids, counts = host.open_batch(number), np.full(number, tokens, np.int32)
    host.extend_batch(ids, counts)
    new = host.batch(ids)
    for layer in range(host.spec.num_layers):
        cache = host.kv(layer)
        k, v = (torch.randn(number * tokens, *part.shape[2:]).to(part.dtype) for part in cache)
        write_kv(cache, new, k, v)
    host.commit_batch(ids, counts)
    return ids
