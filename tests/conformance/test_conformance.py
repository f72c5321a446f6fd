"""The conformance suite on every backend, device and layout; page, block and guard sizes go round among them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conformance import *  # noqa: F403 - the tests
from conformance_cases import cases_of, maker, named
from conformance_memory import *  # noqa: F403
from gpu_support import gpu_allocator, gpu_cases
from support import DEVICES

import kvmem


@pytest.fixture(params=[*named(cases_of(*DEVICES)), *gpu_cases(5)])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., kvmem.Allocator]:
    if "cuda" in request.param[1] and "stub" not in request.param[1]:
        return lambda **options: gpu_allocator(request.param, 400, options)
    return maker(request.param, 400, tmp_path)
