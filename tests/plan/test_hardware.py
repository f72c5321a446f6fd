"""Profiles of a machine: what they refuse, how they are kept, and that they can be measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvmem import DeviceError, SpecError
from kvmem.plan import Grid, HardwareProfile, Link, MatmulRate, ModelShape, modules, profile
from kvmem.spec import CacheSpec

SHAPE = ModelShape(
    num_layers=2, hidden=64, num_query_heads=4, num_kv_heads=2, head_dim=16, num_experts=4, experts_per_token=2,
    expert_hidden=96, vocab=50, dtype=torch.float32,
)  # fmt: skip
PROFILE = HardwareProfile(
    "test", 10**9, 10**9, Link("up", 1e9), Link("down", 1e9), Link("memory", 1e10), Link("attention", 1e10, 1e-6),
    Link("cpu", 1e9), (MatmulRate("float32", 16, 2e9), MatmulRate("float32", 1, 1e9)), 1e-6,
)  # fmt: skip


@pytest.mark.parametrize("rate", [0, -1, 0.0, float("nan"), float("inf"), "fast", None, True])
def test_a_rate_that_is_none(rate: Any) -> None:
    with pytest.raises(SpecError, match="up: bytes_per_second: got"):
        Link("up", rate)
    with pytest.raises(SpecError, match="matmul of 4 rows in float32: flops_per_second: got"):
        MatmulRate("float32", 4, rate)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_bytes": 0}, "device_bytes"),
        ({"host_bytes": 1.5}, "host_bytes"),
        ({"to_device": 1e9}, "to_device: .* must be a Link"),
        ({"matmul": ()}, "matmul"),
        ({"matmul": (MatmulRate("float32", 4, 1), MatmulRate("float32", 4, 2))}, "two rates of 4 rows in float32"),
        ({"matmul_seconds": -1}, "matmul_seconds"),
        ({"concurrent": 1}, "concurrent"),
    ],
)
def test_a_profile_is_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        replace(PROFILE, **changes)


def test_rates_between_those_that_were_measured() -> None:
    assert [PROFILE.flops_per_second("float32", rows) for rows in (1, 4, 16, 1000)] == [1e9, 1.5e9, 2e9, 2e9]
    with pytest.raises(SpecError, match="has matmul rates of float32"):
        PROFILE.flops_per_second("bfloat16", 1)


def test_a_profile_is_kept_as_json() -> None:
    values = json.loads(json.dumps(PROFILE.to_dict()))
    assert HardwareProfile.from_dict(values) == PROFILE
    for wrong in (None, {}, values | {"gpu": 1}, values | {"to_host": {"name": "x"}}, values | {"matmul": [{}]}):
        with pytest.raises(SpecError, match="profile: "):
            HardwareProfile.from_dict(wrong)
    with pytest.raises(SpecError, match="bytes_per_second"):
        HardwareProfile.from_dict(values | {"to_host": {"name": "down", "bytes_per_second": 0}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_this_machine(dtype: torch.dtype) -> None:
    """Measured, kept, read again and planned with."""
    shape = replace(SHAPE, dtype=dtype)
    found = profile("cpu", model=shape, device_bytes=10**8, host_bytes=10**8, context=64, repetitions=2)
    assert HardwareProfile.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert not found.concurrent and {rate.dtype for rate in found.matmul} == {str(dtype).removeprefix("torch.")}
    spec = CacheSpec.kv(num_layers=2, num_kv_heads=2, head_dim=16, dtype=dtype)
    plan = modules(spec, shape, found, context=64, queries=12, grid=Grid(ba=(1, 4), omega=(0.0, 0.5)))
    assert plan.B in (3, 6, 9, 12) and 0 < plan.step_seconds < 60 and plan.bound_by == "thread"


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"device": "tpu"}, SpecError, "device"),
        ({"device": "meta"}, SpecError, 'must be "cpu"'),
        ({"device": "cuda:99"}, DeviceError, "torch sees"),
        ({"model": None}, SpecError, "ModelShape"),
        ({"context": 8}, SpecError, "context"),
        ({"device_bytes": 0}, SpecError, "device_bytes"),
        ({"repetitions": 0}, SpecError, "repetitions"),
        ({"dtypes": ("float32",)}, SpecError, "dtypes"),
        ({"dtypes": (torch.float8_e4m3fn,)}, SpecError, "dtypes: got torch.float8_e4m3fn"),
    ],
)
def test_what_cannot_be_measured(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    values: dict[str, Any] = {"device": "cpu", "model": SHAPE, "device_bytes": 10**8, "host_bytes": 10**8} | changes
    with pytest.raises(error, match=words):
        profile(**values)
