"""What a machine can do, as numbers: a ``HardwareProfile`` is measured once (``kvmem.plan.profile``), kept as JSON and
planned with on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import log2
from typing import Any

from kvmem.arguments import brief, check_bool, check_members, check_name, check_size
from kvmem.errors import SpecError
from kvmem.plan.clock import Link, exact_rate, exact_seconds

__all__ = ["HardwareProfile", "MatmulRate"]


@dataclass(frozen=True)
class MatmulRate:
    """What the device reaches when ``rows`` tokens are multiplied with a weight matrix of ``dtype`` ("float32"): a
    multiplication and an addition are two operations. Few rows are bound by reading the weights, many by computing.
    """

    dtype: str
    rows: int
    flops_per_second: float

    def __post_init__(self) -> None:
        check_name("MatmulRate.dtype", self.dtype)
        check_size("MatmulRate.rows", self.rows)
        exact_rate(f"matmul of {self.rows} rows in {self.dtype}: flops_per_second", self.flops_per_second)


@dataclass(frozen=True)
class HardwareProfile:
    """The rates of one device, its host and the links between them. Each rate is a finite number above 0.

    device_bytes, host_bytes: the memory that plans may use, not what is built in: leave out what others use.
    to_device, to_host: the copies between pinned host memory and the device, which run at the same time.
    device_memory: passes over device memory that compute little (activations, residuals): bytes read and written; the
        latency is that of a kernel.
    device_attention, cpu_attention: decode attention: bytes of KV read; the latency is for each sequence. On the CPU
        it reads host memory in place.
    matmul: rates by dtype and rows; between two of them the rate is interpolated over the logarithm of the rows, and
        outside it is that of the nearest. matmul_seconds: of each multiplication, beside its operations.
    concurrent: links, device and CPU work at the same time. False where the device is the CPU: then all is one thread.

    ``SpecError`` for a rate that is zero, negative, infinite or NaN, and for a profile without matmul rates.
    """

    name: str
    device_bytes: int
    host_bytes: int
    to_device: Link
    to_host: Link
    device_memory: Link
    device_attention: Link
    cpu_attention: Link
    matmul: tuple[MatmulRate, ...]
    matmul_seconds: float = 0.0
    concurrent: bool = True

    def __post_init__(self) -> None:
        check_name("HardwareProfile.name", self.name)
        for field in ("device_bytes", "host_bytes"):
            check_size(field, getattr(self, field))
        for field in LINKS:
            if not isinstance(getattr(self, field), Link):
                raise SpecError(f"{field}: got {brief(getattr(self, field))}; must be a Link")
        exact_seconds("matmul_seconds", self.matmul_seconds)
        check_bool("concurrent", self.concurrent)
        ordered = sorted(check_members("matmul", self.matmul, MatmulRate), key=lambda rate: (rate.dtype, rate.rows))
        for a, b in pairwise(ordered):
            if (a.dtype, a.rows) == (b.dtype, b.rows):
                raise SpecError(f"matmul: got two rates of {a.rows} rows in {a.dtype}; give one")
        object.__setattr__(self, "matmul", tuple(ordered))

    def flops_per_second(self, dtype: str, rows: int) -> float:
        """The rate of a multiplication of ``rows`` tokens; ``SpecError`` for a dtype that was not measured."""
        rates = [rate for rate in self.matmul if rate.dtype == dtype]
        if not rates:
            known = ", ".join(dict.fromkeys(rate.dtype for rate in self.matmul))
            raise SpecError(f"dtype: got {brief(dtype)}; the profile {self.name!r} has matmul rates of {known}")
        for low, high in pairwise(rates):
            if low.rows <= rows <= high.rows:
                share = log2(rows / low.rows) / log2(high.rows / low.rows)
                return (1 - share) * low.flops_per_second + share * high.flops_per_second
        return (rates[0] if rows < rates[0].rows else rates[-1]).flops_per_second

    def to_dict(self) -> dict[str, Any]:
        """What ``json.dumps`` takes, and ``from_dict`` reads."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HardwareProfile:
        """The reverse of ``to_dict``; ``SpecError`` for what is missing, unknown or out of range."""
        if not isinstance(values, Mapping):
            raise SpecError(f"profile: got {brief(values)}; must be what to_dict() gave")
        try:
            given = dict(values) | {field: Link(**values[field]) for field in LINKS}
            given["matmul"] = tuple(MatmulRate(**rate) for rate in values["matmul"])
            return cls(**given)
        except (KeyError, TypeError) as error:
            named = [field.name for field in fields(cls)]
            raise SpecError(f"profile: {error}; a profile has the fields {', '.join(named)}") from error


LINKS = ("to_device", "to_host", "device_memory", "device_attention", "cpu_attention")
