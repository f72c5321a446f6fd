"""What plans are made from: the sizes of a model, and what a machine can do, as numbers that are kept as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from math import log2
from typing import Any

import torch

from kvmem.arguments import brief, check_bool, check_members, check_name, check_size
from kvmem.errors import SpecError
from kvmem.plan.clock import Link, exact_rate, exact_seconds
from kvmem.spec.dtypes import dtype_name, parse_dtype

__all__ = ["HardwareProfile", "MatmulRate", "ModelShape"]


@dataclass(frozen=True)
class ModelShape:
    """A decoder whose layers are attention, a router and ``num_experts`` gated MLPs, of which each token takes
    ``experts_per_token`` (Mixtral); a dense model has one.

    num_layers, num_query_heads, num_kv_heads, head_dim, vocab: as configs have them.
    hidden: width of the residual stream. expert_hidden: width inside an expert. dtype: of weights and activations.
    tied: the output matrix is the embedding. Norms and biases, which are some thousandths, are not counted.
    """

    num_layers: int
    hidden: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    expert_hidden: int
    vocab: int
    dtype: torch.dtype | str = torch.bfloat16
    tied: bool = False

    def __post_init__(self) -> None:
        for field in fields(self)[:9]:
            check_size(field.name, getattr(self, field.name))
        object.__setattr__(self, "dtype", parse_dtype(self.dtype))
        check_bool("tied", self.tied)
        if self.num_query_heads % self.num_kv_heads:
            raise SpecError(f"num_query_heads: got {self.num_query_heads}, no multiple of {self.num_kv_heads} KV heads")
        if self.experts_per_token > self.num_experts:
            raise SpecError(f"experts_per_token: got {self.experts_per_token}; there are {self.num_experts} experts")

    @cached_property
    def element_bytes(self) -> int:
        return parse_dtype(self.dtype).itemsize

    @cached_property
    def dtype_name(self) -> str:
        return dtype_name(parse_dtype(self.dtype))

    @cached_property
    def query_width(self) -> int:
        return self.num_query_heads * self.head_dim

    @cached_property
    def qkv_width(self) -> int:
        return (self.num_query_heads + 2 * self.num_kv_heads) * self.head_dim

    @cached_property
    def dense_bytes(self) -> int:
        """What every token of a layer needs: the projections of attention, and the router."""
        return self.element_bytes * self.hidden * (self.qkv_width + self.query_width + self.num_experts)

    @cached_property
    def expert_bytes(self) -> int:
        """One expert of one layer: gate, up and down."""
        return self.element_bytes * 3 * self.hidden * self.expert_hidden

    @cached_property
    def vocabulary_bytes(self) -> int:
        """Embedding and output matrix."""
        return self.element_bytes * self.vocab * self.hidden * (1 if self.tied else 2)


@dataclass(frozen=True)
class MatmulRate:
    """What the device reaches when ``rows`` tokens are multiplied with a weight matrix of ``dtype`` ("float32"):
    flops_per_second, a multiplication and an addition as two operations. Few rows are bound by reading the weights,
    many by computing.
    """

    dtype: str
    rows: int
    flops_per_second: float

    def __post_init__(self) -> None:
        check_name("MatmulRate.dtype", self.dtype)
        check_size("MatmulRate.rows", self.rows)
        exact_rate(f"matmul of {self.rows} rows in {self.dtype}: flops_per_second", self.flops_per_second)


LINKS = ("to_device", "to_host", "device_memory", "device_attention", "cpu_attention")


@dataclass(frozen=True)
class HardwareProfile:
    """The rates of one device, its host and the links between them. Each rate is a finite number above 0.

    name: of the machine.
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
        check_size("device_bytes", self.device_bytes), check_size("host_bytes", self.host_bytes)
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
        try:
            links = {field: Link(**values[field]) for field in LINKS}
            return cls(**{**values, **links, "matmul": tuple(MatmulRate(**rate) for rate in values["matmul"])})
        except (KeyError, TypeError) as error:
            raise SpecError(f"profile: {error}; it has the fields {', '.join(f.name for f in fields(cls))}") from error
